// Expert choice's gate of a row that takes a recursion. Flags: SIGMOID, TANH or neither.
//
// The including kernel has `params.alpha`.
#import shared/gate

fn gate_of(logit: f32) -> f32 {
#if SIGMOID
    return params.alpha * sigmoid(logit);
#elif TANH
    // By exp(-2|v|), which cannot overflow; the built-in tanh may.
    let e = exp(-2.0 * abs(logit));
    let magnitude = (1.0 - e) / (1.0 + e);
    return params.alpha * select(-magnitude, magnitude, logit >= 0.0);
#else
    return logit;
#endif
}
