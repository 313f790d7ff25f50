//! `mor eval --sweep`: quality against mean depth and speed.

use mor_model::MorConfig;
use mor_runtime::DepthControl;
use serde::Serialize;

use crate::eval::Quality;
use crate::plot::lines::{Chart, Point as PlotPoint, Series};

/// Most points of a sweep; each scores the whole text.
const MOST_POINTS: usize = 100;

/// Values that a sweep runs through, both ends included.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Sweep {
    /// `last`: `None` is R.
    MaxDepth {
        first: usize,
        last: Option<usize>,
    },
    RouterBias {
        first: f64,
        step: f64,
        count: usize,
    },
}

impl Sweep {
    /// Reads `max-depth=A..B` or `router-bias=A..B[:STEP]`.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let expected = || "expected max-depth=A..B, where B may be R, or router-bias=A..B[:STEP]".to_owned();
        let (name, range) = text.split_once('=').ok_or_else(expected)?;
        let (range, step) = match range.split_once(':') {
            Some((range, step)) => (range, Some(step)),
            None => (range, None),
        };
        let (first, last) = range.split_once("..").ok_or_else(expected)?;
        let number = |text: &str| text.parse().ok().filter(|number: &f64| number.is_finite()).ok_or_else(expected);
        match (name, step) {
            ("max-depth", None) => {
                let first = first.parse().map_err(|_| expected())?;
                let last = if last == "R" { None } else { Some(last.parse().map_err(|_| expected())?) };
                if last.is_some_and(|last| last < first) {
                    return Err(format!("{first} is above the end of the range; write the smaller end first"));
                }
                if last.is_some_and(|last| last - first >= MOST_POINTS) {
                    return Err(format!("expected at most {MOST_POINTS} points"));
                }
                Ok(Sweep::MaxDepth { first, last })
            }
            ("router-bias", step) => {
                let (first, last, step) = (number(first)?, number(last)?, step.map_or(Ok(1.0), number)?);
                if step <= 0.0 {
                    return Err(format!("the step is {step}, expected a number above 0"));
                }
                if last < first {
                    return Err(format!("{first} is above the end of the range; write the smaller end first"));
                }
                // The last point stands although steps are rounded.
                let steps = ((last - first) / step + 1e-6).floor();
                if steps >= MOST_POINTS as f64 {
                    return Err(format!("expected at most {MOST_POINTS} points; take a larger step"));
                }
                Ok(Sweep::RouterBias { first, step, count: steps as usize + 1 })
            }
            _ => Err(expected()),
        }
    }

    /// The option that is swept.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Sweep::MaxDepth { .. } => "max-depth",
            Sweep::RouterBias { .. } => "router-bias",
        }
    }

    /// The controls to run, all else as in `base`.
    pub(crate) fn controls(&self, base: DepthControl, config: &MorConfig) -> Vec<DepthControl> {
        match *self {
            Sweep::MaxDepth { first, last } => {
                // A range that begins beyond R has its beginning refused.
                let last = last.unwrap_or(config.num_recursions.max(first));
                (first..=last).map(|depth| DepthControl { max_depth: Some(depth), ..base }).collect()
            }
            Sweep::RouterBias { first, step, count } => {
                let value = |i: usize| {
                    let value = first + i as f64 * step;
                    // Zero is zero although steps are rounded.
                    if value.abs() < 1e-6 * step { 0.0 } else { value as f32 }
                };
                (0..count).map(|i| DepthControl { router_bias: value(i), ..base }).collect()
            }
        }
    }
}

/// A text scored at one setting of a sweep.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Point {
    pub(crate) sweep: &'static str,
    #[serde(flatten)]
    pub(crate) quality: Quality,
}

impl Point {
    /// What the swept option was set to.
    fn value(&self) -> String {
        match self.quality.max_depth {
            Some(depth) if self.sweep == "max-depth" => depth.to_string(),
            _ => self.quality.router_bias.to_string(),
        }
    }
}

/// One line a point.
pub(crate) fn table(points: &[Point]) -> String {
    let head = ["sweep", "value", "mean_nll_nats", "perplexity", "mean_depth", "tokens/s"];
    let mut text =
        format!("{:<11} {:>6}  {:>13}  {:>10}  {:>10}  {:>8}\n", head[0], head[1], head[2], head[3], head[4], head[5]);
    for point in points {
        text += &format!(
            "{:<11} {:>6}  {:>13.6}  {:>10.5}  {:>10.5}  {:>8.1}\n",
            point.sweep,
            point.value(),
            point.quality.mean_nll_nats,
            point.quality.perplexity,
            point.quality.mean_depth,
            point.quality.tokens_per_s
        );
    }
    text
}

/// Perplexity against mean depth and against speed.
pub(crate) fn charts(points: &[Point]) -> Vec<Chart> {
    let mut names: Vec<&str> = points.iter().map(|point| point.sweep).collect();
    names.dedup();
    let chart = |x_label: &str, x: fn(&Quality) -> f64| Chart {
        x_label: x_label.to_owned(),
        y_label: "perplexity".to_owned(),
        series: names
            .iter()
            .map(|name| Series {
                name: format!("--{name}"),
                points: points
                    .iter()
                    .filter(|point| point.sweep == *name)
                    .map(|point| PlotPoint { x: x(&point.quality), y: point.quality.perplexity, label: point.value() })
                    .collect(),
            })
            .collect(),
    };
    vec![chart("mean depth", |quality| quality.mean_depth), chart("tokens/s", |quality| quality.tokens_per_s)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::embedded;

    #[test]
    fn sweeps_are_read() {
        assert_eq!(Sweep::parse("max-depth=1..3"), Ok(Sweep::MaxDepth { first: 1, last: Some(3) }));
        assert_eq!(Sweep::parse("max-depth=2..R"), Ok(Sweep::MaxDepth { first: 2, last: None }));
        assert_eq!(Sweep::parse("router-bias=-2..2"), Ok(Sweep::RouterBias { first: -2.0, step: 1.0, count: 5 }));
        let fine = Sweep::parse("router-bias=-0.3..0.3:0.1");
        assert_eq!(fine, Ok(Sweep::RouterBias { first: -0.3, step: 0.1, count: 7 }));
        for text in [
            "max-depth",
            "max-depth=1",
            "max-depth=1..x",
            "max-depth=-1..3",
            "max-depth=3..1",
            "max-depth=1..3:1",
            "max-depth=1..500",
            "router-bias=2..-2",
            "router-bias=0..1:0",
            "router-bias=0..1:-1",
            "router-bias=0..1:1e-9",
            "router-bias=0..inf",
            "router-bias=nan..1",
            "depth=1..3",
        ] {
            assert!(Sweep::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn points_leave_the_other_control_as_it_is() {
        let config = MorConfig::from_json_str(embedded::CONFIG, "test").unwrap();
        let base = DepthControl { max_depth: Some(2), router_bias: 0.5 };
        let biases = Sweep::parse("router-bias=-1..1").unwrap().controls(base, &config);
        let expected = [-1.0, 0.0, 1.0].map(|router_bias| DepthControl { router_bias, ..base });
        assert_eq!(biases, expected);
        let fine = Sweep::parse("router-bias=-0.3..0.3:0.1").unwrap().controls(base, &config);
        let fine: Vec<f32> = fine.iter().map(|control| control.router_bias).collect();
        assert_eq!(fine, [-0.3, -0.2, -0.1, 0.0, 0.1, 0.2, 0.3]);
        let depths = Sweep::parse("max-depth=1..R").unwrap().controls(base, &config);
        assert_eq!(depths, [1, 2, 3].map(|depth| DepthControl { max_depth: Some(depth), ..base }));
    }
}
