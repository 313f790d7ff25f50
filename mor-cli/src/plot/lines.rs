//! Line charts.

use super::{Anchor, Axis, Drawing, GRID, INK, colour};

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

/// Size of a chart, and of the room around what it plots.
const SIZE: (f64, f64) = (460.0, 360.0);
const LEFT: f64 = 64.0;
const RIGHT: f64 = 24.0;
const TOP: f64 = 44.0;
const BOTTOM: f64 = 52.0;
const TITLE: f64 = 34.0;

/// Charts beside each other, as an SVG document.
pub(crate) fn svg(title: &str, charts: &[Chart]) -> String {
    let size = (SIZE.0 * charts.len() as f64, SIZE.1 + TITLE);
    let mut drawing = Drawing::default();
    drawing.styled((size.0 / 2.0, 24.0), Anchor::Middle, "font-size=\"15\"", title);
    for (i, chart) in charts.iter().enumerate() {
        drawing.place((SIZE.0 * i as f64, TITLE), &plotted(chart));
    }
    drawing.to_svg(title, size)
}

/// One chart, its origin at its top left corner.
fn plotted(chart: &Chart) -> Drawing {
    let all = || chart.series.iter().flat_map(|series| &series.points);
    let (x_axis, y_axis) = (Axis::around(all().map(|point| point.x)), Axis::around(all().map(|point| point.y)));
    let (right, bottom) = (SIZE.0 - RIGHT, SIZE.1 - BOTTOM);
    let x_of = |x: f64| LEFT + x_axis.part(x) * (right - LEFT);
    let y_of = |y: f64| bottom - y_axis.part(y) * (bottom - TOP);
    let mut drawing = Drawing::default();
    for tick in x_axis.ticks() {
        let x = x_of(tick);
        drawing.line((x, TOP), (x, bottom), GRID);
        drawing.text((x, bottom + 17.0), Anchor::Middle, &x_axis.name(tick));
    }
    for tick in y_axis.ticks() {
        let y = y_of(tick);
        drawing.line((LEFT, y), (right, y), GRID);
        drawing.text((LEFT - 7.0, y + 4.0), Anchor::End, &y_axis.name(tick));
    }
    drawing.line((LEFT, TOP), (LEFT, bottom), INK);
    drawing.line((LEFT, bottom), (right, bottom), INK);
    let (x_middle, y_middle) = ((LEFT + right) / 2.0, (TOP + bottom) / 2.0);
    drawing.text((x_middle, bottom + 38.0), Anchor::Middle, &chart.x_label);
    let upwards = format!("transform=\"rotate(-90 16 {y_middle:.1})\"");
    drawing.styled((16.0, y_middle), Anchor::Middle, &upwards, &chart.y_label);
    for (i, series) in chart.series.iter().enumerate() {
        let colour = colour(i);
        let stroke = format_args!("stroke=\"{colour}\" stroke-width=\"2\"");
        let at = |point: &Point| format!("{:.1},{:.1}", x_of(point.x), y_of(point.y));
        let places = series.points.iter().map(at).collect::<Vec<_>>().join(" ");
        drawing.element(format_args!("polyline points=\"{places}\" fill=\"none\" {stroke}"));
        // Names of one series stand above its points, those of the next below.
        let beside = if i % 2 == 0 { -9.0 } else { 19.0 };
        let mut named: Vec<(f64, f64)> = Vec::new();
        for point in &series.points {
            let (x, y) = (x_of(point.x), y_of(point.y));
            drawing.element(format_args!("circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4\" fill=\"{colour}\""));
            // Where points crowd, names would cover each other; the order of the line tells the rest.
            if named.iter().any(|(other_x, other_y)| (x - other_x).abs() < 20.0 && (y - other_y).abs() < 14.0) {
                continue;
            }
            named.push((x, y));
            drawing.styled((x, y + beside), Anchor::Middle, &format!("fill=\"{colour}\""), &point.label);
        }
        let x = LEFT + 8.0 + 130.0 * i as f64;
        drawing.element(format_args!("path d=\"M{x} 18h18\" {stroke}"));
        drawing.text((x + 24.0, 22.0), Anchor::Start, &series.name);
    }
    drawing
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_escaped_and_every_point_is_drawn() {
        let point = |x: f64| Point { x, y: 2.0 * x, label: "<1>".to_owned() };
        let series = Series { name: "a & b".to_owned(), points: vec![point(1.0), point(2.0)] };
        let chart = Chart { x_label: "x".to_owned(), y_label: "y".to_owned(), series: vec![series] };
        let svg = svg("\"<t>\"", &[chart.clone(), chart]);
        let document = roxmltree::Document::parse(&svg).unwrap();
        let count = |name: &str| document.descendants().filter(|node| node.has_tag_name(name)).count();
        assert_eq!((count("circle"), count("polyline")), (4, 2));
        let texts: Vec<_> = document.descendants().filter_map(|node| node.text()).collect();
        assert!(["a & b", "<1>", "\"<t>\""].iter().all(|text| texts.contains(text)), "{svg}");
    }

    #[test]
    fn nothing_is_a_chart_too() {
        let chart = Chart { x_label: String::new(), y_label: String::new(), series: Vec::new() };
        roxmltree::Document::parse(&svg("", &[chart])).unwrap();
    }
}
