//! CPU reference of `read_words`.

/// The sum of the words that each of `num_workgroups` workgroups of `workgroup_size` threads reads, four at a time and in turns.
pub fn read_words(x: &[u32], num_workgroups: usize, workgroup_size: usize) -> Vec<u32> {
    let mut out = vec![0u32; num_workgroups];
    for (at, quad) in x.chunks_exact(4).enumerate() {
        let sum = &mut out[at / workgroup_size % num_workgroups];
        quad.iter().for_each(|word| *sum = sum.wrapping_add(*word));
    }
    out
}
