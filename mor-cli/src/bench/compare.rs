//! `mor bench compare`: measurements of several machines, models or builds side by side.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use super::report::{self, Row, Series};
use crate::failure::bad_input;
use crate::input::read_text;
use crate::output::check_target;
use crate::print;

#[derive(Debug, clap::Args)]
pub(crate) struct CompareArgs {
    /// Files that `mor bench -o json` or `-o jsonl` has printed; ratios are to the first measurement
    #[arg(required = true, value_name = "JSON")]
    files: Vec<PathBuf>,
    /// Draw them as bars
    #[arg(long, value_name = "SVG")]
    plot: Option<PathBuf>,
}

pub(crate) fn run(args: &CompareArgs) -> anyhow::Result<()> {
    args.plot.iter().try_for_each(|path| check_target("--plot", path))?;
    let files = args.files.iter().map(|path| Ok((path.as_path(), rows(path)?))).collect::<anyhow::Result<Vec<_>>>()?;
    let all = name(&files);
    print(&markdown(&all))?;
    match &args.plot {
        Some(path) => report::write_plot(path, "mor bench compare", &all),
        None => Ok(()),
    }
}

/// Reads the rows of a file: one array, or an object a line.
fn rows(path: &Path) -> anyhow::Result<Vec<Row>> {
    let text = read_text(path)?;
    let rows = match text.trim_start().starts_with('[') {
        true => serde_json::from_str(&text),
        false => text.lines().filter(|line| !line.trim().is_empty()).map(serde_json::from_str).collect(),
    };
    let expected = "expected what mor bench -o json prints";
    match rows {
        Ok(rows) if Vec::is_empty(&rows) => Err(bad_input!("{}: holds no measurement, {expected}", path.display())),
        Ok(rows) => Ok(rows),
        Err(error) => Err(bad_input!("{}: {error}, {expected}", path.display())),
    }
}

/// All series, each under a name of its own: with its file where another file measured the same.
fn name<'a>(files: &'a [(&Path, Vec<Row>)]) -> Vec<Series<'a>> {
    let of_files: Vec<_> = files.iter().map(|(path, rows)| (*path, report::by_series(rows))).collect();
    let times = |name: &str| of_files.iter().flat_map(|(_, all)| all).filter(|series| series.name == name).count();
    let common: Vec<_> = of_files.iter().flat_map(|(_, all)| all).map(|series| times(&series.name) > 1).collect();
    let all = of_files.into_iter().flat_map(|(path, all)| all.into_iter().map(move |series| (path, series)));
    let named = all.zip(common).map(|((path, series), is_common)| match is_common {
        true => Series { name: format!("{}: {}", path.display(), series.name), ..series },
        false => series,
    });
    named.collect()
}

/// A row a test and a column a series, with the ratio to the first.
fn markdown(all: &[Series<'_>]) -> String {
    let mut text = String::from("tokens/s, mean ± standard deviation (ratio to the first column)\n\n| test |");
    for series in all {
        let _ = write!(text, " {} |", series.name.replace('|', "\\|"));
    }
    let _ = writeln!(text, "\n| --- |{}", " ---: |".repeat(all.len()));
    for test in report::test_names(all) {
        let row = |series: &Series<'_>| series.rows.iter().find(|row| row.test_name() == test).copied().cloned();
        let base = all.first().and_then(row).map(|row| row.tokens_per_s);
        let cell = |(index, series): (usize, &Series<'_>)| {
            let Some(row) = row(series) else { return "-".to_owned() };
            let rate = format!("{:.1} ± {:.1}", row.tokens_per_s, row.tokens_per_s_sd);
            match base {
                Some(base) if index > 0 => format!("{rate} ({:.2})", row.tokens_per_s / base),
                _ => rate,
            }
        };
        let cells: Vec<_> = all.iter().enumerate().map(cell).collect();
        let _ = writeln!(text, "| {test} | {} |", cells.join(" | "));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(device: &str, test: &str, tokens_per_s: f64) -> Row {
        let (device, test) = (device.to_owned(), test.to_owned());
        Row {
            model: "m".to_owned(),
            depths: "routed".to_owned(),
            device,
            test,
            batch: 1,
            tokens_per_s,
            ..Row::default()
        }
    }

    #[test]
    fn machines_stand_side_by_side() {
        let files = [
            (Path::new("a.json"), vec![row("A", "pp8", 100.0), row("A", "tg8", 10.0)]),
            (Path::new("b.json"), vec![row("B", "tg8", 25.0), row("B", "pp16", 7.0)]),
        ];
        let text = markdown(&name(&files));
        let lines: Vec<_> = text.lines().skip(2).collect();
        assert_eq!(lines[0], "| test | m, , A | m, , B |");
        assert_eq!(lines[2], "| pp8 | 100.0 ± 0.0 | - |");
        assert_eq!(lines[3], "| tg8 | 10.0 ± 0.0 | 25.0 ± 0.0 (2.50) |");
        assert_eq!(lines[4], "| pp16 | - | 7.0 ± 0.0 |");
    }

    #[test]
    fn what_is_measured_twice_is_named_by_its_file() {
        let rows = || vec![row("A", "pp8", 1.0)];
        let files = [(Path::new("old.json"), rows()), (Path::new("new.json"), rows())];
        let names: Vec<_> = name(&files).into_iter().map(|series| series.name).collect();
        assert_eq!(names, ["old.json: m, , A", "new.json: m, , A"]);
    }
}
