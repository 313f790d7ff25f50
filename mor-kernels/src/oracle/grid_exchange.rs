//! CPU reference of `grid_exchange`.

/// The value of every workgroup after `num_rounds` rounds.
pub fn grid_exchange(num_workgroups: u32, num_rounds: u32) -> Vec<u32> {
    let mut values: Vec<u32> = (0..num_workgroups).map(|own| own % 1024).collect();
    for _ in 0..num_rounds {
        let total: u32 = values.iter().sum();
        values = (0..num_workgroups).map(|own| (own + total) % 1024).collect();
    }
    values
}
