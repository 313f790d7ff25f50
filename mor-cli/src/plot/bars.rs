//! Horizontal bars, a panel a test, each with a scale of its own.

use super::{Anchor, Axis, Drawing, GRID, INK, colour, number};

// Pixels.
const WIDTH: f64 = 880.0;
const MARGIN: f64 = 24.0;
/// At the right of the longest bar, for its number.
const NUMBER: f64 = 96.0;
const LINE: f64 = 20.0;
const BAR: f64 = 16.0;

/// What is drawn.
#[derive(Clone, Debug)]
pub(crate) struct Bars {
    pub(crate) title: String,
    /// Of all values.
    pub(crate) unit: &'static str,
    /// Names of the colours.
    pub(crate) series: Vec<String>,
    pub(crate) panels: Vec<Panel>,
}

#[derive(Clone, Debug)]
pub(crate) struct Panel {
    pub(crate) title: String,
    pub(crate) bars: Vec<Bar>,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Bar {
    /// Index of its colour.
    pub(crate) series: usize,
    pub(crate) value: f64,
    /// Half of the line over its end.
    pub(crate) deviation: f64,
}

impl Bars {
    /// As an SVG document.
    pub(crate) fn svg(&self) -> String {
        let mut drawing = Drawing::default();
        let mut y = MARGIN + LINE / 2.0;
        drawing.styled((MARGIN, y), Anchor::Start, "font-size=\"15\" font-weight=\"bold\"", &self.title);
        for (index, name) in self.series.iter().enumerate() {
            y += LINE;
            drawing.rect((MARGIN, y - 10.0), (12.0, 12.0), colour(index));
            drawing.text((MARGIN + LINE, y), Anchor::Start, name);
        }
        for panel in &self.panels {
            y += 2.0 * LINE;
            drawing.styled((MARGIN, y), Anchor::Start, "font-weight=\"bold\"", &panel.title);
            y = self.draw(&mut drawing, panel, y + LINE / 2.0);
        }
        drawing.to_svg(&self.title, (WIDTH, y + MARGIN))
    }

    /// Draws the bars of a panel and the axis below them from `top` on; the bottom.
    fn draw(&self, drawing: &mut Drawing, panel: &Panel, top: f64) -> f64 {
        let bottom = top + LINE * panel.bars.len() as f64;
        let axis = Axis::from_zero(panel.bars.iter().map(|bar| bar.value + bar.deviation).fold(0.0, f64::max));
        let x = |value: f64| MARGIN + (WIDTH - 2.0 * MARGIN - NUMBER) * axis.part(value);
        for (index, tick) in axis.ticks().enumerate() {
            drawing.line((x(tick), top), (x(tick), bottom + 4.0), GRID);
            let unit = if index as i64 == axis.last { format!(" {}", self.unit) } else { String::new() };
            let name = axis.name(tick) + &unit;
            drawing.styled((x(tick), bottom + LINE), Anchor::Middle, "fill=\"#666\"", &name);
        }
        for (index, bar) in panel.bars.iter().enumerate() {
            let y = top + LINE * index as f64;
            drawing.rect((x(0.0), y), (x(bar.value) - x(0.0), BAR), colour(bar.series));
            let middle = y + BAR / 2.0;
            let (low, high) = ((bar.value - bar.deviation).max(0.0), bar.value + bar.deviation);
            drawing.line((x(low), middle), (x(high), middle), INK);
            // Three digits or more.
            let digits = usize::from(bar.value < 100.0 && bar.value != bar.value.trunc());
            drawing.text((x(high) + 6.0, middle + 4.0), Anchor::Start, &number(bar.value, digits));
        }
        drawing.line((x(0.0), top), (x(0.0), bottom + 4.0), INK);
        bottom + LINE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_are_as_long_as_their_values() {
        let bar = |series, value| Bar { series, value, deviation: 0.0 };
        let bars = Bars {
            title: "a < b & c".to_owned(),
            unit: "tokens/s",
            series: vec!["one".to_owned(), "two".to_owned()],
            panels: vec![Panel { title: "pp512".to_owned(), bars: vec![bar(0, 2000.0), bar(1, 1000.0)] }],
        };
        let svg = bars.svg();
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
        assert!((width(colour(0)) - 2.0 * width(colour(1))).abs() < 0.2, "{svg}");
    }

    #[test]
    fn nothing_is_a_plot_too() {
        let bars = Bars { title: String::new(), unit: "", series: Vec::new(), panels: Vec::new() };
        roxmltree::Document::parse(&bars.svg()).unwrap();
    }
}
