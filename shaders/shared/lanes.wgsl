// Sums and maxima over LANES neighbouring lanes, a power of two, by shuffles. Where others wait for the result they come sooner than
// built-in ones of floats: decode_layers took 586 us for 672 with them (H200, 32 layers of the 360M shape).
//
// The including kernel has LANES.

const LANES_LOG2: u32 = firstTrailingBit(LANES);

// Counted steps, not a halving variable: compilers unroll only the former.
fn lane_sum(value: f32) -> f32 {
    var sum = value;
    for (var step = 0u; step < LANES_LOG2; step++) {
        sum += subgroupShuffleXor(sum, 1u << step);
    }
    return sum;
}

fn lane_max(value: f32) -> f32 {
    var highest = value;
    for (var step = 0u; step < LANES_LOG2; step++) {
        highest = max(highest, subgroupShuffleXor(highest, 1u << step));
    }
    return highest;
}

// Two sums for the price of one: even lanes have that of the first values, odd lanes that of the second. LANES is 2 or more.
fn lane_sums(values: vec2<f32>, lane: u32) -> f32 {
    let is_odd = lane % 2u == 1u;
    var sum = select(values.x, values.y, is_odd) + subgroupShuffleXor(select(values.y, values.x, is_odd), 1u);
    for (var step = 1u; step < LANES_LOG2; step++) {
        sum += subgroupShuffleXor(sum, 1u << step);
    }
    return sum;
}
