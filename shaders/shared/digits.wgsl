// Activations as integers, whose products with the codes of quantised weights are those of dot4I8Packed. Eight elements next to each
// other have a step, and each of them two signed bytes, its digits: x = step * (256 * high + low). What is left is less than 2^-15
// of the greatest, where one digit, as others have it, would lose 2^-8. A thread makes the digits of its eight alone, since what
// waits for them waits for every exchange between lanes. Flag: DIGITS; without, this file is empty.
#if DIGITS
struct Digits {
    // Low bytes of `a`, of `b`, high bytes of `a`, of `b`.
    words: vec4<u32>,
    step: f32,
    // Of the elements as the digits have them.
    sum: f32,
}

const GREATEST: f32 = 32600.0;
// Added to a number it leaves that, and 128, in the last places of a fraction: the lowest byte counts from -128 then.
const LAST_PLACES: f32 = 12583040.0;

fn digits_of(a: vec4<f32>, b: vec4<f32>) -> Digits {
    let sizes = max(abs(a), abs(b));
    let pair = max(sizes.xy, sizes.zw);
    let greatest = max(pair.x, pair.y);
    // Of smaller ones the inverse could overflow.
    let factor = select(0.0, GREATEST * (1.0 / greatest), greatest > 1e-30);
    let x = bitcast<vec4<u32>>(fma(a, vec4<f32>(factor), vec4<f32>(LAST_PLACES)));
    let y = bitcast<vec4<u32>>(fma(b, vec4<f32>(factor), vec4<f32>(LAST_PLACES)));
    // Low and high bytes of the even elements, and of the odd ones.
    let even = vec2<u32>((x.x & 0xffffu) | (x.z << 16u), (y.x & 0xffffu) | (y.z << 16u));
    let odd = vec2<u32>((x.y & 0xffffu) | (x.w << 16u), (y.y & 0xffffu) | (y.w << 16u));
    let low = (even & vec2<u32>(0x00ff00ffu)) | ((odd & vec2<u32>(0x00ff00ffu)) << vec2<u32>(8u));
    let high = ((even >> vec2<u32>(8u)) & vec2<u32>(0x00ff00ffu)) | (odd & vec2<u32>(0xff00ff00u));
    let places = x + y;
    let sum = i32(places.x + places.y + places.z + places.w - 8u * bitcast<u32>(LAST_PLACES));
    let step = greatest * (1.0 / GREATEST);
    return Digits(vec4<u32>(low ^ vec2<u32>(0x80808080u), high), step, step * f32(sum));
}

// The product of eight codes with the digits of eight elements, in steps: a whole number, rounded to f32.
fn digit_product(codes: vec2<u32>, words: vec4<u32>) -> f32 {
    let low = dot4I8Packed(codes.x, words.x) + dot4I8Packed(codes.y, words.y);
    let high = dot4I8Packed(codes.x, words.z) + dot4I8Packed(codes.y, words.w);
    return f32(high * 256 + low);
}
#endif
