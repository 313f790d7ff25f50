//! Where adapters start: with the closest they can come to what a shared weight takes from a layer.

use std::num::NonZero;

/// Directions followed beyond those kept: the weaker ones converge as slowly as their neighbours are close.
const SPARE_DIRECTIONS: usize = 16;
/// Most rounds of subspace iteration.
const MAX_ROUNDS: usize = 60;
/// Gain of a round, relative to what the kept directions hold, below which they have converged.
const CONVERGED: f64 = 1e-9;

/// The factors of an adapter, row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraFactors {
    /// `[rank, in]`, rows orthonormal; zero beyond the rank of what is approximated.
    pub a: Vec<f32>,
    /// `[out, rank]`.
    pub b: Vec<f32>,
}

/// Factors whose product `B A` is the closest of rank `rank` to `original - shared`, by its singular value decomposition
/// U S V^T: A holds the first rows of V^T, B the first columns of U S.
///
/// `original` is what a layer's weight `[out, in]` was, `shared` what its tied group has now, both row-major with rows of
/// `num_inputs`. A model adds `alpha / rank * B (A x)`, so that it starts closest to the original layers where alpha is
/// the rank. All cores work on it; how many there are changes no bit of the result.
///
/// # Panics
/// If the weights are not of one size or have no whole rows.
///
/// # Source
/// Relaxed recursive transformers (arXiv 2410.20672); subspace iteration (Halko et al., arXiv 0909.4061), one-sided Jacobi.
///
/// ```
/// let (original, shared) = ([3.0, 0.0, 0.0, 2.0], [1.0, 0.0, 0.0, 1.0]);
/// let factors = mor_model::lora_factors(&original, &shared, 2, 1);
/// let product: Vec<f32> = factors.b.iter().flat_map(|b| factors.a.iter().map(move |a| b * a)).collect();
/// assert!(product.iter().zip([2.0, 0.0, 0.0, 0.0]).all(|(found, expected)| (found - expected).abs() < 1e-6));
/// ```
pub fn lora_factors(original: &[f32], shared: &[f32], num_inputs: usize, rank: usize) -> LoraFactors {
    assert!(original.len() == shared.len() && num_inputs > 0 && original.len().is_multiple_of(num_inputs));
    let delta = Delta {
        values: original.iter().zip(shared).map(|(original, shared)| original - shared).collect(),
        num_inputs,
        num_outputs: original.len() / num_inputs,
    };
    let width = (2 * rank + SPARE_DIRECTIONS).min(num_inputs).min(delta.num_outputs);
    let mut right = Columns::start(num_inputs, width);
    let mut held = 0.0;
    for _ in 0..MAX_ROUNDS {
        right = delta.times_transposed(&delta.times(&right));
        right.orthonormalise();
        // Ritz values: what the directions hold, strongest first.
        let mut left = delta.times(&right);
        let energies = left.diagonalise(&mut right);
        let before = std::mem::replace(&mut held, energies.iter().take(rank).sum());
        if held - before <= CONVERGED * held {
            break;
        }
    }
    let left = delta.times(&right);
    let kept = |columns: &Columns, row: usize, k: usize| if k < width { columns.at(row, k) as f32 } else { 0.0 };
    LoraFactors {
        a: (0..rank).flat_map(|k| (0..num_inputs).map(move |i| (k, i))).map(|(k, i)| kept(&right, i, k)).collect(),
        b: (0..delta.num_outputs)
            .flat_map(|o| (0..rank).map(move |k| (o, k)))
            .map(|(o, k)| kept(&left, o, k))
            .collect(),
    }
}

/// `[num_outputs, num_inputs]`, row-major.
struct Delta {
    values: Vec<f32>,
    num_inputs: usize,
    num_outputs: usize,
}

/// A tall matrix of a few columns, row-major.
struct Columns {
    values: Vec<f64>,
    width: usize,
}

impl Delta {
    /// `self @ columns`: `[num_outputs, width]`.
    fn times(&self, columns: &Columns) -> Columns {
        let width = columns.width;
        in_parallel(self.num_outputs, width, &|first, out| {
            for (row, out) in self.values[first * self.num_inputs..].chunks(self.num_inputs).zip(out.chunks_mut(width))
            {
                for (value, column) in row.iter().zip(columns.values.chunks(width)) {
                    add_scaled(out, f64::from(*value), column);
                }
            }
        })
    }

    /// `self^T @ columns`: `[num_inputs, width]`.
    fn times_transposed(&self, columns: &Columns) -> Columns {
        let width = columns.width;
        in_parallel(self.num_inputs, width, &|first, out| {
            for (row, column) in self.values.chunks(self.num_inputs).zip(columns.values.chunks(width)) {
                for (value, out) in row[first..].iter().zip(out.chunks_mut(width)) {
                    add_scaled(out, f64::from(*value), column);
                }
            }
        })
    }
}

impl Columns {
    /// Directions that nothing in a weight is aligned with: pseudo-random ones, always the same.
    fn start(num_rows: usize, width: usize) -> Self {
        let mut state = 0u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as f64 / f64::from(1u32 << 30) - 1.0
        };
        Self { values: (0..num_rows * width).map(|_| next()).collect(), width }
    }

    fn at(&self, row: usize, column: usize) -> f64 {
        self.values[row * self.width + column]
    }

    fn dot(&self, a: usize, b: usize) -> f64 {
        self.values.chunks(self.width).map(|row| row[a] * row[b]).sum()
    }

    /// Gram-Schmidt, twice, which is as good as rounding allows. Columns that depend on others become zero.
    fn orthonormalise(&mut self) {
        for column in 0..self.width {
            let norm = self.dot(column, column).sqrt();
            for _ in 0..2 {
                for other in 0..column {
                    let share = self.dot(column, other);
                    self.values.chunks_mut(self.width).for_each(|row| row[column] -= share * row[other]);
                }
            }
            let left = self.dot(column, column).sqrt();
            let scale = if left > 1e-12 * norm { left.recip() } else { 0.0 };
            self.values.chunks_mut(self.width).for_each(|row| row[column] *= scale);
        }
    }

    /// Rotates the columns until they are orthogonal, and those of `other` alike; strongest first. Returns their squared
    /// norms.
    fn diagonalise(&mut self, other: &mut Self) -> Vec<f64> {
        for _ in 0..30 {
            let mut rotated = false;
            for p in 0..self.width {
                for q in p + 1..self.width {
                    let (pp, qq, pq) = (self.dot(p, p), self.dot(q, q), self.dot(p, q));
                    if pq.abs() <= 1e-14 * (pp * qq).sqrt() || pq == 0.0 {
                        continue;
                    }
                    rotated = true;
                    let tau = (qq - pp) / (2.0 * pq);
                    let tan = tau.signum() / (tau.abs() + tau.hypot(1.0));
                    let cos = tan.hypot(1.0).recip();
                    self.rotate(p, q, cos, cos * tan);
                    other.rotate(p, q, cos, cos * tan);
                }
            }
            if !rotated {
                break;
            }
        }
        let mut order: Vec<(f64, usize)> = (0..self.width).map(|k| (self.dot(k, k), k)).collect();
        order.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        for columns in [self, other] {
            for row in columns.values.chunks_mut(columns.width) {
                let sorted: Vec<f64> = order.iter().map(|(_, k)| row[*k]).collect();
                row.copy_from_slice(&sorted);
            }
        }
        order.into_iter().map(|(energy, _)| energy).collect()
    }

    fn rotate(&mut self, p: usize, q: usize, cos: f64, sin: f64) {
        for row in self.values.chunks_mut(self.width) {
            (row[p], row[q]) = (cos * row[p] - sin * row[q], sin * row[p] + cos * row[q]);
        }
    }
}

fn add_scaled(sum: &mut [f64], scale: f64, values: &[f64]) {
    sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += scale * value);
}

/// A matrix `[num_rows, width]` whose rows `fill` adds to zeros, from the row it is told on.
fn in_parallel(num_rows: usize, width: usize, fill: &(dyn Fn(usize, &mut [f64]) + Sync)) -> Columns {
    let mut values = vec![0.0; num_rows * width];
    let num_threads = std::thread::available_parallelism().map_or(1, NonZero::get);
    let rows_per_part = num_rows.div_ceil(num_threads).max(16);
    std::thread::scope(|scope| {
        for (part, rows) in values.chunks_mut(rows_per_part * width).enumerate() {
            scope.spawn(move || fill(part * rows_per_part, rows));
        }
    });
    Columns { values, width }
}
