//! CPU reference of `read_words`.

/// The sum of the words that each of `num_workgroups` workgroups reads, in turns of `quads_in_turn` times four words side by side.
pub fn read_words(x: &[u32], num_workgroups: usize, quads_in_turn: usize) -> Vec<u32> {
    let mut out = vec![0u32; num_workgroups];
    for (at, quad) in x.chunks_exact(4).enumerate() {
        let sum = &mut out[at / quads_in_turn % num_workgroups];
        quad.iter().for_each(|word| *sum = sum.wrapping_add(*word));
    }
    out
}
