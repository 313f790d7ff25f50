// Routers of decode_layers: their logits, gates and what they decide. Flags: ROUTED; EXPERT (SIGMOID, TANH or neither; SCRIPTED) or
// TOKEN (SOFTMAX or neither; BIAS); without ROUTED this file is empty.
#if ROUTED
// input_scale * the product with router `index` of those that were staged with, in every thread.
fn router_logit(index: u32) -> f32 {
    var total = 0.0;
    for (var t = lane; t < TEAMS; t += LANES) {
        total += team_routers[index * TEAMS + t];
    }
    return params.input_scale * lane_sum(total);
}
#endif

#if EXPERT
#import shared/expert_gate

// What is compared with the threshold before recursion `recursion`, and the gate.
fn route(recursion: u32) -> vec2<f32> {
    let logit = router_logit(0u);
    if thread == 0u {
        routed = vec2<f32>(logit, gate_of(logit));
#if SCRIPTED
        routed.x = script[recursion];
#endif
    }
    return workgroupUniformLoad(&routed);
}
#endif

#if TOKEN
// The depth, and its gate; as in router_token.
fn route() -> vec2<f32> {
    var values: array<f32, ROUTERS>;
    for (var r = 0u; r < ROUTERS; r++) {
        values[r] = router_logit(r);
    }
#if SOFTMAX
    var top = LOWEST;
    for (var r = 0u; r < ROUTERS; r++) {
        top = max(top, values[r]);
    }
    var total = 0.0;
    for (var r = 0u; r < ROUTERS; r++) {
        total += exp(values[r] - top);
    }
#endif
    var best = LOWEST;
    var chosen = 0u;
    var chosen_gate = 0.0;
    for (var r = 0u; r < ROUTERS; r++) {
#if SOFTMAX
        let gate = params.alpha * (exp(values[r] - top) / total);
#else
        let gate = params.alpha * sigmoid(values[r]);
#endif
        var score = gate;
#if BIAS
        score += bias[r];
#endif
        score += f32(r) * params.depth_bias;
        if r == 0u {
            chosen_gate = gate;
        }
        if r < params.max_depth && score > best {
            best = score;
            chosen = r;
            chosen_gate = gate;
        }
    }
    if thread == 0u {
        routed = vec2<f32>(f32(chosen + 1u), chosen_gate);
    }
    return workgroupUniformLoad(&routed);
}
#endif
