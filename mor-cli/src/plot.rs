//! Line charts as SVG.

use std::fmt::Write;

/// A point with its name.
#[derive(Clone, Debug)]
pub(crate) struct Point {
    pub(crate) x: f64,
    pub(crate) y: f64,
    pub(crate) label: String,
}

/// Points joined in their order.
#[derive(Clone, Debug)]
pub(crate) struct Series {
    pub(crate) name: String,
    pub(crate) points: Vec<Point>,
}

/// Series over the same two axes.
#[derive(Clone, Debug)]
pub(crate) struct Chart {
    pub(crate) x_label: String,
    pub(crate) y_label: String,
    pub(crate) series: Vec<Series>,
}

/// Told apart also by those who do not see red or green, on white.
const COLOURS: [&str; 4] = ["#0072b2", "#d55e00", "#009e73", "#aa4499"];
/// Size of a chart, and of the room around what it plots.
const SIZE: (f64, f64) = (460.0, 360.0);
const LEFT: f64 = 64.0;
const RIGHT: f64 = 24.0;
const TOP: f64 = 44.0;
const BOTTOM: f64 = 52.0;
const TITLE: f64 = 34.0;

/// Charts beside each other, as an SVG document.
pub(crate) fn svg(title: &str, charts: &[Chart]) -> String {
    let (width, height) = (SIZE.0 * charts.len() as f64, SIZE.1 + TITLE);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" \
         height=\"{height}\" font-family=\"system-ui, sans-serif\" font-size=\"12\" fill=\"#222\">\n\
         <title>{title}</title>\n<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n\
         <text x=\"{middle}\" y=\"24\" text-anchor=\"middle\" font-size=\"15\">{title}</text>\n",
        title = escaped(title),
        middle = width / 2.0
    );
    for (i, chart) in charts.iter().enumerate() {
        let x = SIZE.0 * i as f64;
        // Writing to a string cannot fail.
        let _ = write!(out, "<g transform=\"translate({x} {TITLE})\">\n{}</g>\n", plotted(chart));
    }
    out += "</svg>\n";
    out
}

/// One chart, its origin at its top left corner.
fn plotted(chart: &Chart) -> String {
    let all = || chart.series.iter().flat_map(|series| &series.points);
    let (x_axis, y_axis) = (Axis::over(all().map(|point| point.x)), Axis::over(all().map(|point| point.y)));
    let (right, bottom) = (SIZE.0 - RIGHT, SIZE.1 - BOTTOM);
    let x_of = |x: f64| LEFT + x_axis.part(x) * (right - LEFT);
    let y_of = |y: f64| bottom - y_axis.part(y) * (bottom - TOP);
    let mut out = String::new();
    let mut line = |text: String| {
        out += &text;
        out.push('\n');
    };
    for tick in x_axis.ticks() {
        let (x, name) = (x_of(tick), x_axis.name(tick));
        line(format!("<path d=\"M{x:.1} {TOP}V{bottom}\" stroke=\"#ddd\"/>"));
        line(format!("<text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{name}</text>", bottom + 17.0));
    }
    for tick in y_axis.ticks() {
        let (y, name) = (y_of(tick), y_axis.name(tick));
        line(format!("<path d=\"M{LEFT} {y:.1}H{right}\" stroke=\"#ddd\"/>"));
        line(format!("<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{name}</text>", LEFT - 7.0, y + 4.0));
    }
    line(format!("<path d=\"M{LEFT} {TOP}V{bottom}H{right}\" fill=\"none\" stroke=\"#222\"/>"));
    let (x_middle, y_middle) = ((LEFT + right) / 2.0, (TOP + bottom) / 2.0);
    let x_label = escaped(&chart.x_label);
    line(format!("<text x=\"{x_middle:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{x_label}</text>", bottom + 38.0));
    let y_label = escaped(&chart.y_label);
    line(format!(
        "<text transform=\"translate(16 {y_middle:.1}) rotate(-90)\" text-anchor=\"middle\">{y_label}</text>"
    ));
    for (i, series) in chart.series.iter().enumerate() {
        let colour = COLOURS[i % COLOURS.len()];
        let at = |point: &Point| format!("{:.1},{:.1}", x_of(point.x), y_of(point.y));
        let places: Vec<String> = series.points.iter().map(at).collect();
        let places = places.join(" ");
        line(format!("<polyline points=\"{places}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>"));
        // Names of one series stand above its points, those of the next below.
        let beside = if i % 2 == 0 { -9.0 } else { 19.0 };
        let mut named: Vec<(f64, f64)> = Vec::new();
        for point in &series.points {
            let (x, y, label) = (x_of(point.x), y_of(point.y), escaped(&point.label));
            line(format!("<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4\" fill=\"{colour}\"/>"));
            // Where points crowd, names would cover each other; the order of the line tells the rest.
            if named.iter().any(|(other_x, other_y)| (x - other_x).abs() < 20.0 && (y - other_y).abs() < 14.0) {
                continue;
            }
            named.push((x, y));
            let y = y + beside;
            line(format!("<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"middle\" fill=\"{colour}\">{label}</text>"));
        }
        let (x, name) = (LEFT + 8.0 + 130.0 * i as f64, escaped(&series.name));
        line(format!("<path d=\"M{x} 18h18\" stroke=\"{colour}\" stroke-width=\"2\"/>"));
        line(format!("<text x=\"{}\" y=\"22\">{name}</text>", x + 24.0));
    }
    out
}

/// A range of round numbers around some values.
#[derive(Debug, PartialEq)]
struct Axis {
    /// In steps.
    first: i64,
    last: i64,
    step: f64,
}

impl Axis {
    /// With a little room at both ends, in about five steps of 1, 2 or 5 times a power of ten.
    fn over(values: impl Iterator<Item = f64>) -> Self {
        let (mut low, mut high) =
            values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), x| (low.min(x), high.max(x)));
        if !(low.is_finite() && high.is_finite()) {
            (low, high) = (0.0, 1.0);
        }
        let room = 0.08 * (high - low);
        // All values alike take a range of their own size.
        let room = if room > 1e-9 * high.abs() { room } else { (0.1 * high.abs()).max(0.1) };
        (low, high) = (low - room, high + room);
        let rough = (high - low) / 5.0;
        let power = 10_f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].into_iter().find(|step| step * power >= rough).unwrap_or(10.0) * power;
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
        let digits = (-self.step.log10().floor()).max(0.0) as usize;
        format!("{tick:.digits$}")
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_have_round_ticks_around_all_values() {
        for (low, high) in [(1.0, 3.0), (6.714, 6.9), (-0.002, 12_345.0), (5.0, 5.0), (0.0, 0.0), (1e-7, 2e-7)] {
            let axis = Axis::over([low, high].into_iter());
            let ticks: Vec<f64> = axis.ticks().collect();
            assert!((3..=9).contains(&ticks.len()), "{low}..{high}: {ticks:?}");
            assert!(ticks[0] <= low && high <= ticks[ticks.len() - 1], "{low}..{high}: {ticks:?}");
            let names: Vec<String> = ticks.iter().map(|tick| axis.name(*tick)).collect();
            assert!(names.windows(2).all(|pair| pair[0] != pair[1]), "{names:?}");
        }
        assert_eq!(Axis::over([1.0, 3.0].into_iter()), Axis { first: 1, last: 7, step: 0.5 });
        assert_eq!(Axis::over(std::iter::empty()).part(0.5), 0.5);
    }

    #[test]
    fn text_is_escaped_and_every_point_is_drawn() {
        let point = |x: f64| Point { x, y: 2.0 * x, label: "<1>".to_owned() };
        let series = Series { name: "a & b".to_owned(), points: vec![point(1.0), point(2.0)] };
        let chart = Chart { x_label: "x".to_owned(), y_label: "y".to_owned(), series: vec![series] };
        let svg = svg("\"<t>\"", &[chart.clone(), chart]);
        assert_eq!(svg.matches("<circle ").count(), 4);
        assert_eq!(svg.matches("<polyline ").count(), 2);
        assert!(
            svg.contains("a &amp; b")
                && svg.contains("&lt;1&gt;")
                && svg.contains("<title>&quot;&lt;t&gt;&quot;</title>")
        );
    }
}
