//! Charts as SVG: what [`lines`] and [`bars`] draw with.

pub(crate) mod bars;
pub(crate) mod lines;

use std::fmt::Write;

/// Colours that those who do not see red or green can tell apart (Okabe and Ito), on white.
const COLOURS: [&str; 7] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f"];
/// Of text and axes.
const INK: &str = "#222";
/// Of the lines at ticks.
const GRID: &str = "#ddd";

/// The colour of a series.
fn colour(series: usize) -> &'static str {
    COLOURS[series % COLOURS.len()]
}

/// Which part of a text is at its place.
#[derive(Clone, Copy)]
enum Anchor {
    Start,
    Middle,
    End,
}

/// Elements of an SVG document, in pixels from the top left corner.
#[derive(Default)]
struct Drawing {
    elements: String,
}

impl Drawing {
    /// An element that has no content.
    fn element(&mut self, element: std::fmt::Arguments<'_>) {
        // Writing to a string cannot fail.
        let _ = writeln!(self.elements, "<{element}/>");
    }

    fn line(&mut self, (x1, y1): (f64, f64), (x2, y2): (f64, f64), stroke: &str) {
        self.element(format_args!(
            "line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" stroke=\"{stroke}\""
        ));
    }

    fn rect(&mut self, (x, y): (f64, f64), (width, height): (f64, f64), fill: &str) {
        let size = format_args!("width=\"{width:.1}\" height=\"{height:.1}\"");
        self.element(format_args!("rect x=\"{x:.1}\" y=\"{y:.1}\" {size} fill=\"{fill}\""));
    }

    fn text(&mut self, at: (f64, f64), anchor: Anchor, text: &str) {
        self.styled(at, anchor, "", text);
    }

    /// Text with attributes of its own.
    fn styled(&mut self, (x, y): (f64, f64), anchor: Anchor, attributes: &str, text: &str) {
        let anchor = match anchor {
            Anchor::Start => "start",
            Anchor::Middle => "middle",
            Anchor::End => "end",
        };
        let place = format_args!("x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\"");
        let _ = writeln!(self.elements, "<text {place} {attributes}>{}</text>", escaped(text));
    }

    /// The elements of another drawing, moved.
    fn place(&mut self, (x, y): (f64, f64), other: &Self) {
        let _ = writeln!(self.elements, "<g transform=\"translate({x} {y})\">\n{}</g>", other.elements);
    }

    /// The document.
    fn to_svg(&self, title: &str, (width, height): (f64, f64)) -> String {
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" \
             height=\"{height}\" font-family=\"system-ui, sans-serif\" font-size=\"12\" fill=\"{INK}\">\n\
             <title>{}</title>\n<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n{}</svg>\n",
            escaped(title),
            self.elements
        )
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// A range of round numbers.
#[derive(Debug, PartialEq)]
struct Axis {
    /// In steps.
    first: i64,
    last: i64,
    step: f64,
}

impl Axis {
    /// Around some values, with a little room at both ends.
    fn around(values: impl Iterator<Item = f64>) -> Self {
        let (mut low, mut high) =
            values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), x| (low.min(x), high.max(x)));
        if !(low.is_finite() && high.is_finite()) {
            (low, high) = (0.0, 1.0);
        }
        let room = 0.08 * (high - low);
        // All values alike take a range of their own size.
        let room = if room > 1e-9 * high.abs() { room } else { (0.1 * high.abs()).max(0.1) };
        Self::over(low - room, high + room)
    }

    /// From 0 to `largest`.
    fn from_zero(largest: f64) -> Self {
        Self::over(0.0, if largest > 0.0 { largest } else { 1.0 })
    }

    /// In about five steps of 1, 2 or 5 times a power of ten.
    fn over(low: f64, high: f64) -> Self {
        let least = (high - low) / 5.0;
        let power = 10_f64.powf(least.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].into_iter().find(|step| step * power >= least).unwrap_or(10.0) * power;
        Self { first: (low / step).floor() as i64, last: (high / step).ceil() as i64, step }
    }

    fn ticks(&self) -> impl Iterator<Item = f64> {
        (self.first..=self.last).map(|i| i as f64 * self.step)
    }

    /// A value's place, from 0 to 1.
    fn part(&self, value: f64) -> f64 {
        (value / self.step - self.first as f64) / (self.last - self.first) as f64
    }

    /// A tick with as many digits as the step has.
    fn name(&self, tick: f64) -> String {
        number(tick, (-self.step.log10().floor()).max(0.0) as usize)
    }
}

/// So many digits after the point; thousands apart.
fn number(value: f64, digits: usize) -> String {
    let text = format!("{value:.digits$}");
    let (whole, rest) = text.split_at(text.find('.').unwrap_or(text.len()));
    let (sign, whole) = whole.split_at(usize::from(whole.starts_with('-')));
    let mut grouped = sign.to_owned();
    for (index, digit) in whole.chars().enumerate() {
        if index > 0 && (whole.len() - index).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_have_round_ticks_around_all_values() {
        for (low, high) in [(1.0, 3.0), (6.714, 6.9), (-0.002, 12_345.0), (5.0, 5.0), (0.0, 0.0), (1e-7, 2e-7)] {
            let axis = Axis::around([low, high].into_iter());
            let ticks: Vec<f64> = axis.ticks().collect();
            assert!((3..=9).contains(&ticks.len()), "{low}..{high}: {ticks:?}");
            assert!(ticks[0] <= low && high <= ticks[ticks.len() - 1], "{low}..{high}: {ticks:?}");
            let names: Vec<String> = ticks.iter().map(|tick| axis.name(*tick)).collect();
            assert!(names.windows(2).all(|pair| pair[0] != pair[1]), "{names:?}");
        }
        assert_eq!(Axis::around([1.0, 3.0].into_iter()), Axis { first: 1, last: 7, step: 0.5 });
        assert_eq!(Axis::around(std::iter::empty()).part(0.5), 0.5);
        assert_eq!([4.0, 90.0, 120_000.0].map(|largest| Axis::from_zero(largest).step), [1.0, 20.0, 50_000.0]);
        assert_eq!(Axis::from_zero(0.0), Axis { first: 0, last: 5, step: 0.2 });
    }

    #[test]
    fn thousands_stand_apart() {
        let numbers = [(0.5, 1), (12.34, 1), (1234.5, 0), (-1e6, 0), (-123.25, 2), (100.0, 0)];
        let texts = numbers.map(|(value, digits)| number(value, digits));
        assert_eq!(texts, ["0.5", "12.3", "1,234", "-1,000,000", "-123.25", "100"]);
    }
}
