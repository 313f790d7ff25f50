// Activations as integers, whose products with the codes of quantised weights are those of dot4I8Packed. A group of 32 elements has
// a step, a 127th of its greatest size, and each element three signed bytes, its digits:
// x = step * (d0 + d1 / 254 + d2 / 254^2). What is left is less than 2^-23 of the greatest: as exact as f32, where one digit, as
// others have it, would lose 2^-8. Products of a group's digits with codes are summed exactly.
//
// Eight neighbouring lanes hold a group, four consecutive elements each.

struct Digits {
    // Of each digit a word, the first element's in the low byte.
    words: vec3<u32>,
    step: f32,
}

fn digit_words(x: vec4<f32>) -> vec3<u32> {
    let first = round(x);
    let second = round((x - first) * 254.0);
    let third = round(((x - first) * 254.0 - second) * 254.0);
    return vec3<u32>(pack4xI8(vec4<i32>(first)), pack4xI8(vec4<i32>(second)), pack4xI8(vec4<i32>(third)));
}

fn digits_of(x: vec4<f32>) -> Digits {
    let sizes = max(abs(x.xy), abs(x.zw));
    var greatest = max(sizes.x, sizes.y);
    for (var step = 0u; step < 3u; step++) {
        greatest = max(greatest, subgroupShuffleXor(greatest, 1u << step));
    }
    // The inverse of less could overflow.
    return Digits(digit_words(x * select(0.0, 127.0 / greatest, greatest > 1e-30)), greatest / 127.0);
}

// The sum of a group.
fn group_sum(x: vec4<f32>) -> f32 {
    var sum = dot(x, vec4<f32>(1.0));
    for (var step = 0u; step < 3u; step++) {
        sum += subgroupShuffleXor(sum, 1u << step);
    }
    return sum;
}

// A word of 4-bit codes holds even elements in the low halves of its bytes and odd ones in the high halves: of two lanes that have its
// eight elements, the first gets the even ones' digits, the second the odd ones'.
fn q4_digit_words(own: vec3<u32>, lane: u32) -> vec3<u32> {
    let others = subgroupShuffleXor(own, 1u);
    let is_second = lane % 2u == 1u;
    let low = select(own, others >> vec3<u32>(8u), is_second) & vec3<u32>(0x00ff00ffu);
    let high = select(others, own >> vec3<u32>(8u), is_second) & vec3<u32>(0x00ff00ffu);
    let low_bytes = (low | low >> vec3<u32>(8u)) & vec3<u32>(0xffffu);
    let high_bytes = (high | high >> vec3<u32>(8u)) << vec3<u32>(16u);
    return low_bytes | high_bytes;
}

// The 4-bit codes that meet vector `half` of each digit, as bytes.
fn q4_digit_codes(codes: vec4<u32>, half: u32) -> vec4<u32> {
    let pair = select(codes.xy, codes.zw, half == 1u);
    return vec4<u32>(pair.x, pair.x >> 4u, pair.y, pair.y >> 4u) & vec4<u32>(0x0f0f0f0fu);
}

// Adds the products of 16 codes with as many elements, of each digit.
fn add_dots(sums: vec3<i32>, codes: vec4<u32>, first: vec4<u32>, second: vec4<u32>, third: vec4<u32>) -> vec3<i32> {
    return vec3<i32>(
        sums.x + dot4I8Packed(codes.x, first.x) + dot4I8Packed(codes.y, first.y)
            + dot4I8Packed(codes.z, first.z) + dot4I8Packed(codes.w, first.w),
        sums.y + dot4I8Packed(codes.x, second.x) + dot4I8Packed(codes.y, second.y)
            + dot4I8Packed(codes.z, second.z) + dot4I8Packed(codes.w, second.w),
        sums.z + dot4I8Packed(codes.x, third.x) + dot4I8Packed(codes.y, third.y)
            + dot4I8Packed(codes.z, third.z) + dot4I8Packed(codes.w, third.w),
    );
}

// What the digits' sums amount to, in steps.
fn in_steps(sums: vec3<i32>) -> f32 {
    return f32(sums.x) + f32(sums.y * 254 + sums.z) * (1.0 / 64516.0);
}
