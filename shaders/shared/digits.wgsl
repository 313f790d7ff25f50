// Activations as integers, whose products with the codes of quantised weights are those of dot4I8Packed. A group of GROUP elements
// has a step, a 127th of its greatest size, and each element three signed bytes, its digits:
// x = step * (d0 + d1 / 254 + d2 / 254^2). What is left is less than 2^-23 of the greatest: as exact as f32, where one digit, as
// others have it, would lose 2^-8. Products of a group's digits and codes are summed exactly. Flag: DIGITS; without, this file is
// empty.
//
// Eight neighbouring lanes hold a group, four consecutive elements each. The including kernel imports
// shared/quantized_units.
#if DIGITS
// The digits of four elements: of each digit a word of signed bytes, in the order of the codes. With the step, and the sum of x.
struct Digits {
    words: vec3<u32>,
    step: f32,
    sum: f32,
}

fn packed_digits(x: vec4<f32>) -> vec3<u32> {
    let d0 = round(x);
    let rest = (x - d0) * 254.0;
    let d1 = round(rest);
    let d2 = round((rest - d1) * 254.0);
    return vec3<u32>(pack4xI8(vec4<i32>(d0)), pack4xI8(vec4<i32>(d1)), pack4xI8(vec4<i32>(d2)));
}

fn digits_of(x: vec4<f32>, lane: u32) -> Digits {
    let sizes = max(abs(x.xy), abs(x.zw));
    var greatest = max(sizes.x, sizes.y);
#if WEIGHT_Q4
    var sum = dot(x, vec4<f32>(1.0));
#else
    let sum = 0.0;
#endif
    for (var step = 1u; step < 8u; step = step * 2u) {
        greatest = max(greatest, subgroupShuffleXor(greatest, step));
#if WEIGHT_Q4
        sum += subgroupShuffleXor(sum, step);
#endif
    }
    // Of smaller groups the inverse could overflow.
    let own = packed_digits(x * select(0.0, 127.0 / greatest, greatest > 1e-30));
#if WEIGHT_Q4
    // A word of codes has its even elements in the low halves of its bytes, its odd ones in the high halves: two lanes have the eight
    // elements; the first keeps the even ones of both.
    let others = subgroupShuffleXor(own, 1u);
    let is_odd = lane % 2u == 1u;
    let low = select(own, others >> vec3<u32>(8u), is_odd);
    let high = select(others, own >> vec3<u32>(8u), is_odd);
    let words = (low & vec3<u32>(0xffu)) | ((low >> vec3<u32>(8u)) & vec3<u32>(0xff00u))
        | (((high & vec3<u32>(0xffu)) | ((high >> vec3<u32>(8u)) & vec3<u32>(0xff00u))) << vec3<u32>(16u));
#else
    let words = own;
#endif
    return Digits(words, greatest / 127.0, sum);
}

// The product of a unit's codes with its digits, to be multiplied with the step and the codes' scale. `sums` are those of each digit.
fn digit_product(sums: vec3<i32>) -> f32 {
    return f32(sums.x) + f32(sums.y * 254 + sums.z) * (1.0 / 64516.0);
}

// Adds the products of four words of codes (q8) or of two (q4) with four words of one digit.
fn add_dots(sum: i32, codes: vec4<u32>, digits: vec4<u32>) -> i32 {
    return sum + dot4I8Packed(codes.x, digits.x) + dot4I8Packed(codes.y, digits.y) + dot4I8Packed(codes.z, digits.z)
        + dot4I8Packed(codes.w, digits.w);
}

#if WEIGHT_Q4
// The codes that meet vector `half` of each digit.
fn digit_codes(codes: vec4<u32>, half: u32) -> vec4<u32> {
    let pair = select(codes.xy, codes.zw, half == 1u);
    return vec4<u32>(pair.x, pair.x >> 4u, pair.y, pair.y >> 4u) & vec4<u32>(0x0f0f0f0fu);
}
#else
fn digit_codes(codes: vec4<u32>, half: u32) -> vec4<u32> {
    return codes;
}
#endif
#endif
