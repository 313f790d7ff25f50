// What a script decides a token's depth by, in [0, 1): it takes the recursions whose shares are larger. Multiples of the golden
// ratio lie so evenly that of n tokens in a row a share s of all takes s * n but for a few, as of a sequence of which the top k are
// chosen; where they begin is drawn for each sequence.
// The importer imports shared/pcg4d. Weyl 1916 (doi 10.1007/BF01475864).
fn scripted_draw(seed_low: u32, seed_high: u32, sequence: u32, position: u32) -> f32 {
    let bits = pcg4d(vec4<u32>(seed_low, seed_high, sequence, 0u)).x + position * 2654435769u;
    // Below 1 in all 24 bits: a share of 1 takes every token, one of 0 none.
    return f32(bits >> 8u) * 5.9604644775390625e-8;
}
