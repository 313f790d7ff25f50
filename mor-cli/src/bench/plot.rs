//! [`Plot`]: bars as SVG, a panel a test, each with a scale of its own.

use std::fmt::Write;
use std::path::Path;

use crate::output::write_atomically;

/// Colours that those who do not see red or green can tell apart (Okabe and Ito).
const COLOURS: [&str; 7] = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#7f7f7f"];

// Pixels.
const WIDTH: f64 = 880.0;
const MARGIN: f64 = 24.0;
/// At the right of the longest bar, for its number.
const NUMBER: f64 = 96.0;
const LINE: f64 = 20.0;
const BAR: f64 = 16.0;

/// Horizontal bars.
#[derive(Clone, Debug)]
pub(super) struct Plot {
    pub(super) title: String,
    /// Of all values.
    pub(super) unit: &'static str,
    /// Names of the colours.
    pub(super) series: Vec<String>,
    pub(super) panels: Vec<Panel>,
}

#[derive(Clone, Debug)]
pub(super) struct Panel {
    pub(super) title: String,
    pub(super) bars: Vec<Bar>,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Bar {
    /// Index of its colour.
    pub(super) series: usize,
    pub(super) value: f64,
    /// Half of the line over its end.
    pub(super) deviation: f64,
}

/// Writes a plot to a file.
pub(super) fn write(path: &Path, plot: &Plot) -> anyhow::Result<()> {
    write_atomically(path, |partial| std::fs::write(partial, plot.to_svg()))
}

impl Plot {
    pub(super) fn to_svg(&self) -> String {
        let mut body = String::new();
        let mut y = MARGIN + LINE / 2.0;
        text(&mut body, (MARGIN, y), "font-size=\"15\" font-weight=\"bold\"", &self.title);
        for (index, name) in self.series.iter().enumerate() {
            y += LINE;
            let colour = COLOURS[index % COLOURS.len()];
            rect(&mut body, (MARGIN, y - 10.0), (12.0, 12.0), colour);
            text(&mut body, (MARGIN + LINE, y), "", name);
        }
        for panel in &self.panels {
            y += 2.0 * LINE;
            text(&mut body, (MARGIN, y), "font-weight=\"bold\"", &panel.title);
            y = self.draw(&mut body, panel, y + LINE / 2.0);
        }
        let height = y + MARGIN;
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" \
             viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" font-size=\"12\" fill=\"#222\">\n\
             <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n{body}</svg>\n"
        )
    }

    /// Draws the bars of a panel and the axis below them from `top` on; the bottom.
    fn draw(&self, body: &mut String, panel: &Panel, top: f64) -> f64 {
        let bottom = top + LINE * panel.bars.len() as f64;
        let largest = panel.bars.iter().map(|bar| bar.value + bar.deviation).fold(0.0, f64::max);
        let step = tick_step(largest);
        let end = step * (largest / step).ceil().max(1.0);
        let x = |value: f64| MARGIN + (WIDTH - 2.0 * MARGIN - NUMBER) * value / end;
        for tick in 0..=(end / step).round() as usize {
            let value = tick as f64 * step;
            line(body, (x(value), top), (x(value), bottom + 4.0), "#ddd");
            let unit = if value == end { format!(" {}", self.unit) } else { String::new() };
            let label = format!("{}{unit}", number(value));
            text(body, (x(value), bottom + LINE), "text-anchor=\"middle\" fill=\"#666\"", &label);
        }
        for (index, bar) in panel.bars.iter().enumerate() {
            let y = top + LINE * index as f64;
            rect(body, (x(0.0), y), (x(bar.value) - x(0.0), BAR), COLOURS[bar.series % COLOURS.len()]);
            let middle = y + BAR / 2.0;
            line(
                body,
                (x((bar.value - bar.deviation).max(0.0)), middle),
                (x(bar.value + bar.deviation), middle),
                "#222",
            );
            text(body, (x(bar.value + bar.deviation) + 6.0, middle + 4.0), "", &number(bar.value));
        }
        line(body, (x(0.0), top), (x(0.0), bottom + 4.0), "#222");
        bottom + LINE
    }
}

/// 1, 2 or 5 times a power of ten, so that an axis up to `largest` has about five ticks.
fn tick_step(largest: f64) -> f64 {
    let least = (largest / 5.0).max(1e-3);
    let power = 10_f64.powf(least.log10().floor());
    [1.0, 2.0, 5.0, 10.0].into_iter().map(|factor| factor * power).find(|step| *step >= least).unwrap_or(power)
}

/// Three digits or more; thousands apart.
fn number(value: f64) -> String {
    let digits = if value >= 100.0 || value == value.trunc() { 0 } else { 1 };
    let text = format!("{value:.digits$}");
    let (whole, rest) = text.split_at(text.find('.').unwrap_or(text.len()));
    let mut grouped = String::new();
    for (index, digit) in whole.chars().enumerate() {
        if index > 0 && (whole.len() - index).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped + rest
}

fn text(body: &mut String, (x, y): (f64, f64), attributes: &str, content: &str) {
    let content = content.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    let _ = writeln!(body, "<text x=\"{x:.1}\" y=\"{y:.1}\" {attributes}>{content}</text>");
}

fn rect(body: &mut String, (x, y): (f64, f64), (width, height): (f64, f64), fill: &str) {
    let _ =
        writeln!(body, "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" fill=\"{fill}\"/>");
}

fn line(body: &mut String, (x1, y1): (f64, f64), (x2, y2): (f64, f64), stroke: &str) {
    let _ = writeln!(body, "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" stroke=\"{stroke}\"/>");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_are_as_long_as_their_values() {
        let bar = |series, value| Bar { series, value, deviation: 0.0 };
        let plot = Plot {
            title: "a < b & c".to_owned(),
            unit: "tokens/s",
            series: vec!["one".to_owned(), "two".to_owned()],
            panels: vec![Panel { title: "pp512".to_owned(), bars: vec![bar(0, 2000.0), bar(1, 1000.0)] }],
        };
        let svg = plot.to_svg();
        let document = roxmltree::Document::parse(&svg).unwrap();
        let texts: Vec<_> = document.descendants().filter_map(|node| node.text()).collect();
        assert!(
            ["a < b & c", "two", "pp512", "2,000", "2,000 tokens/s"].iter().all(|text| texts.contains(text)),
            "{svg}"
        );
        let width = |colour: &str| -> f64 {
            let mut bars = document.descendants().filter(|node| node.attribute("fill") == Some(colour));
            bars.next_back().and_then(|bar| bar.attribute("width")).unwrap().parse().unwrap()
        };
        assert!((width(COLOURS[0]) - 2.0 * width(COLOURS[1])).abs() < 0.2, "{svg}");
    }

    #[test]
    fn nothing_is_a_plot_too() {
        let plot = Plot { title: String::new(), unit: "", series: Vec::new(), panels: Vec::new() };
        roxmltree::Document::parse(&plot.to_svg()).unwrap();
    }

    #[test]
    fn ticks_are_round() {
        assert_eq!([4.0, 90.0, 120_000.0].map(tick_step), [1.0, 20.0, 50_000.0]);
        assert_eq!([0.5, 12.34, 1234.5, 1_000_000.0].map(number), ["0.5", "12.3", "1,234", "1,000,000"]);
    }
}
