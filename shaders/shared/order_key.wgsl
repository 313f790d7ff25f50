// Unsigned keys in the order of the floats they come from: exact comparison with integers alone.
// NaN is 0, below every number; infinities count as the largest finite numbers; -0 equals +0.
fn order_key(value: f32) -> u32 {
    let bits = bitcast<u32>(value);
    let magnitude = bits & 0x7fffffffu;
    if magnitude > 0x7f800000u {
        return 0u;
    }
    let finite = min(magnitude, 0x7f7fffffu);
    return select(0x80000000u | finite, 0x7fffffffu - finite, bits > 0x80000000u);
}

// The finite number a key other than 0 comes from.
fn value_of_key(key: u32) -> f32 {
    return bitcast<f32>(select(~key, key & 0x7fffffffu, key >= 0x80000000u));
}
