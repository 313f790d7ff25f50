// 1 / (1 + exp(-v)) without overflow: exp only ever sees -|v|.
fn sigmoid(v: f32) -> f32 {
    let e = exp(-abs(v));
    return select(e, 1.0, v >= 0.0) / (1.0 + e);
}
