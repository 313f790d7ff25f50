//! Arithmetic of rows and choices among values, for the [oracle](super).

/// Indices of the `k` largest values, ascending; of equal values the lower index wins.
pub(super) fn top_k(values: &[f32], k: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    // The sort is stable, which settles ties.
    order.sort_by(|&a, &b| values[b].total_cmp(&values[a]));
    order.truncate(k);
    order.sort_unstable();
    order
}

/// Index of the largest value; of equal values the lowest index.
pub(super) fn argmax(values: &[f32]) -> usize {
    values.iter().enumerate().fold(0, |best, (i, &value)| if value > values[best] { i } else { best })
}

/// Writes `values[i]` to index `indices[i]` of a row of zeros.
pub(super) fn spread(values: &[f32], indices: &[usize], len: usize) -> Vec<f32> {
    let mut out = vec![0.0; len];
    indices.iter().zip(values).for_each(|(&i, &value)| out[i] = value);
    out
}

pub(super) fn mask(indices: &[usize], len: usize) -> Vec<bool> {
    let mut out = vec![false; len];
    indices.iter().for_each(|&i| out[i] = true);
    out
}

pub(super) fn add(x: &mut [f32], y: &[f32]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

/// Dot product with f64 sums, in four lanes so that the compiler can use vectors.
pub(super) fn dot(a: &[f32], b: &[f32]) -> f64 {
    let (a4, a_tail) = a.as_chunks::<4>();
    let (b4, b_tail) = b.as_chunks::<4>();
    let mut lanes = [0.0f64; 4];
    for (a, b) in a4.iter().zip(b4) {
        for i in 0..4 {
            lanes[i] += f64::from(a[i]) * f64::from(b[i]);
        }
    }
    let tail: f64 = a_tail.iter().zip(b_tail).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
    lanes.iter().sum::<f64>() + tail
}

pub(super) fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

pub(super) fn silu(x: f32) -> f32 {
    let x = f64::from(x);
    (x * sigmoid(x)) as f32
}

/// The exact GELU, x * Phi(x).
pub(super) fn gelu(x: f32) -> f32 {
    let x = f64::from(x);
    (0.5 * x * (1.0 + erf(x * std::f64::consts::FRAC_1_SQRT_2))) as f32
}

/// Error function by the series exp(-x^2) * sum of 2^n x^(2n+1) / (2n+1)!!, whose terms share one sign.
fn erf(x: f64) -> f64 {
    // Beyond 6 the difference to 1 is below the precision of f64.
    if x.abs() >= 6.0 {
        return x.signum();
    }
    let (mut term, mut sum, mut n) = (x, x, 0.0);
    while term.abs() > f64::EPSILON * sum.abs() {
        n += 1.0;
        term *= 2.0 * x * x / (2.0 * n + 1.0);
        sum += term;
    }
    std::f64::consts::FRAC_2_SQRT_PI * (-x * x).exp() * sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn erf_matches_known_values() {
        for (x, expected) in [
            (0.0, 0.0),
            (0.5, 0.520_499_877_813_046_5),
            (1.0, 0.842_700_792_949_714_9),
            (-2.0, -0.995_322_265_018_952_7),
            (4.0, 0.999_999_984_582_742_1),
            (7.0, 1.0),
        ] {
            assert!((erf(x) - expected).abs() < 1e-15, "erf({x}) = {}", erf(x));
        }
    }

    #[test]
    fn top_k_keeps_position_order_and_prefers_the_lower_position() {
        assert_eq!(top_k(&[0.5, 0.9, 0.5, 0.1], 2), [0, 1]);
        assert_eq!(top_k(&[0.1, 0.2], 5), [0, 1]);
        assert!(top_k(&[], 3).is_empty());
        assert_eq!(argmax(&[1.0, 3.0, 3.0]), 1);
    }

    #[test]
    fn dot_handles_every_tail() {
        for len in 0..9usize {
            let a: Vec<f32> = (0..len).map(|i| i as f32 + 1.0).collect();
            assert_eq!(dot(&a, &a), (len * (len + 1) * (2 * len + 1) / 6) as f64);
        }
    }
}
