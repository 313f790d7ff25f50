//! [`Row`]: what `mor bench` says of a test, and the forms in which it says it.

use std::fmt::Write;
use std::path::Path;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::speed::Sample;
use crate::inspect::bytes_text;
use crate::output::write_atomically;
use crate::plot::bars::{Bar, Bars, Panel};

/// One test of a model on a device; the columns of all forms but Markdown. Times are in milliseconds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Row {
    /// Version and commit of the program.
    pub(super) build: String,
    pub(super) gpu_library: String,
    pub(super) device: String,
    pub(super) driver: String,
    pub(super) backend: String,
    /// What is used of what the adapter offers.
    pub(super) features: String,
    pub(super) dtype: String,
    /// Empty for none.
    pub(super) quantization: String,
    /// How lanes exchange values.
    pub(super) lanes: String,
    /// Peaks of the device, measured in the same run.
    pub(super) copy_gb_per_s: Option<f64>,
    pub(super) read_gb_per_s: Option<f64>,
    pub(super) matrix_tflop_per_s: Option<f64>,
    pub(super) model: String,
    pub(super) model_mode: String,
    /// `routed`, `by-capacity` or `full-depth`.
    pub(super) depths: String,
    pub(super) parameters: u64,
    pub(super) effective_parameters: u64,
    /// On the device.
    pub(super) weight_bytes: u64,
    pub(super) test: String,
    pub(super) prompt_tokens: usize,
    pub(super) new_tokens: usize,
    /// Tokens before those that are generated; not timed.
    pub(super) context_tokens: usize,
    pub(super) batch: usize,
    pub(super) repetitions: usize,
    /// Mean over the repetitions.
    pub(super) tokens_per_s: f64,
    /// Of a sample.
    pub(super) tokens_per_s_sd: f64,
    pub(super) tokens_per_s_median: f64,
    pub(super) tokens_per_s_samples: Vec<f64>,
    /// Mean time to the first token, of tests that time a prompt.
    pub(super) first_token_ms: Option<f64>,
    pub(super) mean_depth: f64,
    /// Of `read_gb_per_s` or `matrix_tflop_per_s`, whichever the test should reach.
    pub(super) share: Option<f64>,
    pub(super) dispatches_per_token: f64,
    pub(super) load_ms: f64,
    /// Compiling all kernels of the model so far.
    pub(super) compile_ms: f64,
    pub(super) longest_submit_ms: f64,
    /// Tokens compared with the CPU's; none where that was left out.
    pub(super) check_tokens: Option<usize>,
    pub(super) check_same_depths: Option<bool>,
    pub(super) check_same_argmax: Option<bool>,
    /// The largest, of the largest logit.
    pub(super) check_logit_difference: Option<f64>,
}

/// Names of the fields, in order.
const COLUMNS: [&str; 39] = [
    "build",
    "gpu_library",
    "device",
    "driver",
    "backend",
    "features",
    "dtype",
    "quantization",
    "lanes",
    "copy_gb_per_s",
    "read_gb_per_s",
    "matrix_tflop_per_s",
    "model",
    "model_mode",
    "depths",
    "parameters",
    "effective_parameters",
    "weight_bytes",
    "test",
    "prompt_tokens",
    "new_tokens",
    "context_tokens",
    "batch",
    "repetitions",
    "tokens_per_s",
    "tokens_per_s_sd",
    "tokens_per_s_median",
    "tokens_per_s_samples",
    "first_token_ms",
    "mean_depth",
    "share",
    "dispatches_per_token",
    "load_ms",
    "compile_ms",
    "longest_submit_ms",
    "check_tokens",
    "check_same_depths",
    "check_same_argmax",
    "check_logit_difference",
];

/// How rows are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Format {
    Md,
    Csv,
    Json,
    Jsonl,
    Sql,
}

impl Row {
    /// Takes in what the repetitions brought.
    pub(super) fn take(&mut self, samples: &[Sample]) {
        let count = samples.len().max(1) as f64;
        let mean = |value: &dyn Fn(&Sample) -> f64| samples.iter().map(value).sum::<f64>() / count;
        let mut rates: Vec<f64> = samples.iter().map(|sample| sample.tokens_per_s).collect();
        self.tokens_per_s = mean(&|sample| sample.tokens_per_s);
        let squares: f64 = rates.iter().map(|rate| (rate - self.tokens_per_s).powi(2)).sum();
        self.tokens_per_s_sd = (squares / (count - 1.0).max(1.0)).sqrt();
        self.tokens_per_s_samples = rates.clone();
        rates.sort_by(f64::total_cmp);
        self.tokens_per_s_median = (rates[(rates.len() - 1) / 2] + rates[rates.len() / 2]) / 2.0;
        self.first_token_ms = (self.prompt_tokens > 0).then(|| mean(&|sample| sample.first_token.as_secs_f64() * 1e3));
        self.mean_depth = mean(&|sample| sample.mean_depth);
        self.dispatches_per_token = mean(&|sample| sample.dispatches_per_token);
        let submits = samples.iter().map(|sample| sample.longest_submit.as_secs_f64() * 1e3);
        self.longest_submit_ms = submits.fold(0.0, f64::max);
    }

    /// What is measured, for rows of a table over machines.
    pub(super) fn test_name(&self) -> String {
        if self.batch == 1 { self.test.clone() } else { format!("{} x {}", self.test, self.batch) }
    }

    /// How numbers are stored.
    fn storage(&self) -> String {
        if self.quantization.is_empty() { self.dtype.clone() } else { format!("{}/{}", self.dtype, self.quantization) }
    }

    /// What it is measured on: model, storage, depths and device.
    pub(super) fn series(&self) -> String {
        let depths = if self.depths == "routed" { String::new() } else { format!(" {}", self.depths) };
        format!("{}, {}{depths}, {}", self.model, self.storage(), self.device)
    }

    fn check(&self) -> String {
        let (Some(argmax), Some(depths)) = (self.check_same_argmax, self.check_same_depths) else {
            return "not compared with the CPU".to_owned();
        };
        let but = |same, what: &str| if same { String::new() } else { format!("; other {what}") };
        format!(
            "{} tokens beside the CPU's: logits within {:.1e} of the largest{}{}",
            self.check_tokens.unwrap_or(0),
            self.check_logit_difference.unwrap_or(0.0),
            but(argmax, "most likely tokens"),
            but(depths, "depths after them"),
        )
    }
}

/// A session's rows for people: what they have in common, then a table.
pub(super) fn markdown(rows: &[Row]) -> String {
    let Some(first) = rows.first() else { return String::new() };
    let optional = |value: Option<f64>, digits: usize, unit: &str| match value {
        Some(value) => format!("{value:.digits$}{unit}"),
        None => "-".to_owned(),
    };
    let peaks = match (first.copy_gb_per_s, first.read_gb_per_s, first.matrix_tflop_per_s) {
        (Some(copy), Some(read), Some(matrix)) => {
            format!("copies {copy:.1}, reads {read:.1} GB/s, multiplies {matrix:.2} TFLOP/s")
        }
        _ => "peaks not measured".to_owned(),
    };
    let mut text = format!(
        "{}: {}, {}, {}; {:.1} M parameters, {:.1} M effective; {}\n{}, {}, {}: {}; uses {}; {peaks}\n{}, {}; {}\n\n",
        first.model,
        first.model_mode,
        first.depths,
        first.storage(),
        first.parameters as f64 / 1e6,
        first.effective_parameters as f64 / 1e6,
        bytes_text(first.weight_bytes),
        first.device,
        first.backend,
        first.driver,
        first.lanes,
        if first.features.is_empty() { "no features" } else { &first.features },
        first.build,
        first.gpu_library,
        first.check(),
    );
    let columns = [
        "test",
        "tokens/s",
        "median",
        "first token ms",
        "share",
        "mean depth",
        "dispatches/token",
        "longest submit ms",
        "compiled ms",
    ];
    let _ = writeln!(text, "| {} |\n| --- |{}", columns.join(" | "), " ---: |".repeat(columns.len() - 1));
    for row in rows {
        let cells = [
            row.test_name(),
            format!("{:.1} ± {:.1}", row.tokens_per_s, row.tokens_per_s_sd),
            format!("{:.1}", row.tokens_per_s_median),
            optional(row.first_token_ms, 2, ""),
            optional(row.share.map(|share| 100.0 * share), 1, " %"),
            format!("{:.2}", row.mean_depth),
            format!("{:.2}", row.dispatches_per_token),
            format!("{:.2}", row.longest_submit_ms),
            format!("{:.0}", row.compile_ms),
        ];
        let _ = writeln!(text, "| {} |", cells.join(" | "));
    }
    text.push('\n');
    text
}

/// All rows in a form for programs.
pub(super) fn text(rows: &[Row], format: Format) -> serde_json::Result<String> {
    let lines = |line: &dyn Fn(&Row) -> serde_json::Result<String>| {
        rows.iter().map(|row| Ok(line(row)? + "\n")).collect::<serde_json::Result<String>>()
    };
    match format {
        Format::Md => Ok(rows.iter().map(|row| markdown(std::slice::from_ref(row))).collect()),
        Format::Json => Ok(serde_json::to_string_pretty(rows)? + "\n"),
        Format::Jsonl => lines(&|row| serde_json::to_string(row)),
        Format::Csv => {
            let rows = lines(&|row| Ok(cells(row)?.iter().map(csv).collect::<Vec<_>>().join(",")))?;
            Ok(format!("{}\n{rows}", COLUMNS.join(",")))
        }
        Format::Sql => {
            let rows = lines(&|row| {
                let values: Vec<_> = cells(row)?.iter().map(sql).collect();
                Ok(format!("INSERT INTO mor_bench ({}) VALUES ({});", COLUMNS.join(", "), values.join(", ")))
            })?;
            let kinds = cells(&Row::default())?;
            let columns = COLUMNS.iter().zip(&kinds).map(|(name, value)| {
                let kind = if value.is_string() || value.is_array() { "TEXT" } else { "REAL" };
                format!("  {name} {kind}")
            });
            let columns: Vec<_> = columns.collect();
            Ok(format!("CREATE TABLE IF NOT EXISTS mor_bench (\n{}\n);\n{rows}", columns.join(",\n")))
        }
    }
}

/// The fields of a row in the order of [`COLUMNS`].
fn cells(row: &Row) -> serde_json::Result<Vec<Value>> {
    let mut fields: Map<String, Value> = serde_json::from_value(serde_json::to_value(row)?)?;
    Ok(COLUMNS.iter().map(|name| fields.remove(*name).unwrap_or_default()).collect())
}

/// A value without quotes; nothing for nothing.
fn plain(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        Value::Array(values) => values.iter().map(plain).collect::<Vec<_>>().join(" "),
        value => value.to_string(),
    }
}

/// A value as RFC 4180 wants it.
fn csv(value: &Value) -> String {
    let text = plain(value);
    if text.contains([',', '"', '\n', '\r']) { format!("\"{}\"", text.replace('"', "\"\"")) } else { text }
}

fn sql(value: &Value) -> String {
    match value {
        Value::Null => "NULL".to_owned(),
        Value::Bool(value) => u8::from(*value).to_string(),
        Value::Number(number) => number.to_string(),
        value => format!("'{}'", plain(value).replace('\'', "''")),
    }
}

/// Rows of one model on one device, and what these are called.
#[derive(Debug)]
pub(super) struct Series<'a> {
    pub(super) name: String,
    pub(super) rows: Vec<&'a Row>,
}

/// Divides rows by what they were measured on, in the order of their appearance.
pub(super) fn by_series(rows: &[Row]) -> Vec<Series<'_>> {
    let mut all: Vec<Series<'_>> = Vec::new();
    for row in rows {
        let name = row.series();
        match all.iter_mut().find(|series| series.name == name) {
            Some(series) => series.rows.push(row),
            None => all.push(Series { name, rows: vec![row] }),
        }
    }
    all
}

/// The tests of all series, in the order of their appearance.
pub(super) fn test_names(all: &[Series<'_>]) -> Vec<String> {
    let mut names = Vec::new();
    for name in all.iter().flat_map(|series| &series.rows).map(|row| row.test_name()) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

/// Draws a panel a test with a bar a series.
pub(super) fn write_plot(path: &Path, title: &str, all: &[Series<'_>]) -> anyhow::Result<()> {
    let panel = |test: String| {
        let bar = |(index, series): (usize, &Series<'_>)| {
            let row = series.rows.iter().find(|row| row.test_name() == test)?;
            Some(Bar { series: index, value: row.tokens_per_s, deviation: row.tokens_per_s_sd })
        };
        Panel { bars: all.iter().enumerate().filter_map(bar).collect(), title: test }
    };
    let bars = Bars {
        title: title.to_owned(),
        unit: "tokens/s",
        series: all.iter().map(|series| series.name.clone()).collect(),
        panels: test_names(all).into_iter().map(panel).collect(),
    };
    write_atomically(path, |partial| std::fs::write(partial, bars.svg()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row() -> Row {
        Row {
            model: "a, \"b\"'s".to_owned(),
            test: "pp16".to_owned(),
            batch: 2,
            tokens_per_s_samples: vec![1.0, 2.5],
            check_same_argmax: Some(true),
            ..Row::default()
        }
    }

    #[test]
    fn columns_are_the_fields_in_order() {
        let text = serde_json::to_string(&row()).unwrap();
        let mut at = 0;
        for name in COLUMNS {
            at += text[at..].find(&format!("\"{name}\":")).unwrap_or_else(|| panic!("{name} is not next in {text}"));
        }
        assert_eq!(cells(&row()).unwrap().len(), serde_json::to_value(row()).unwrap().as_object().unwrap().len());
    }

    #[test]
    fn cells_are_quoted_where_they_must_be() {
        let csv = text(&[row()], Format::Csv).unwrap();
        assert!(csv.contains(",\"a, \"\"b\"\"'s\",") && csv.contains(",1.0 2.5,"), "{csv}");
        assert_eq!(csv.lines().count(), 2);
        let sql = text(&[row()], Format::Sql).unwrap();
        assert!(sql.contains("'a, \"b\"''s'") && sql.contains("NULL") && sql.contains("  batch REAL"), "{sql}");
    }

    #[test]
    fn rows_survive_their_forms_for_programs() {
        let rows = [row(), row()];
        let json = text(&rows, Format::Json).unwrap();
        assert_eq!(serde_json::from_str::<Vec<Row>>(&json).unwrap(), rows);
        let lines = text(&rows, Format::Jsonl).unwrap();
        assert!(lines.lines().all(|line| serde_json::from_str::<Row>(line).unwrap() == row()));
    }

    #[test]
    fn samples_are_summed_up() {
        use std::time::Duration;
        let sample = |tokens_per_s, millis| Sample {
            tokens_per_s,
            first_token: Duration::from_millis(millis),
            mean_depth: 2.0,
            full_depth: 0.5,
            dispatches_per_token: 3.0,
            longest_submit: Duration::from_millis(millis),
        };
        let mut row = Row { prompt_tokens: 1, ..row() };
        row.take(&[sample(1.0, 10), sample(6.0, 30), sample(2.0, 20)]);
        assert_eq!((row.tokens_per_s, row.tokens_per_s_median, row.tokens_per_s_sd), (3.0, 2.0, 7.0_f64.sqrt()));
        assert_eq!((row.first_token_ms, row.longest_submit_ms), (Some(20.0), 30.0));
        row.take(&[sample(4.0, 1)]);
        assert_eq!((row.tokens_per_s_median, row.tokens_per_s_sd), (4.0, 0.0));
    }
}
