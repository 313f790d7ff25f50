// Mail of decode_layers: where in it workgroups leave results for each other, how a result is staged as the activation of the next
// product, and how one is posted.

// Place of an element among `count`: where a thread stages several next to each other, neighbouring threads read neighbouring places.
fn place(element: u32, count: u32) -> u32 {
    return element % OWN * (count / OWN) + element / OWN;
}

// Of a stream's elements, OWN next to each other, which are this thread's at a turn; the last ones for threads past the end.
fn own_number(turn: u32) -> u32 {
    return min(turn * WORKGROUP_SIZE + thread, HIDDEN_SIZE / OWN - 1u);
}

// Sends for a thread's elements of a norm's weight.
fn prefetch_norm(at: u32, ahead_norm: ptr<function, array<f32, STREAM_TURNS * OWN>>) {
#repeat turn STREAM_TURNS
    let unit = norms[at / OWN + own_number(turn)];
#repeat i OWN
#if DIGITS
    (*ahead_norm)[turn * OWN + i] = unit[i / 4u][i % 4u];
#else
    (*ahead_norm)[turn * OWN + i] = unit;
#endif
#endrepeat
#endrepeat
}

#for P in QKV GATE_UP HEAD
// Stages a stream from place `at` of the mail on, times a norm's weight, as the activation of the product; leaves the teams' sums
// of squares, and of the products with routers from `router_at` on unless that is NONE. False if it does not come.
fn stage_stream_$P(
    at: u32,
    expected: u32,
    weights: ptr<function, array<f32, STREAM_TURNS * OWN>>,
    router_at: u32,
) -> bool {
    var elements: array<vec2<u32>, STREAM_TURNS * OWN>;
#if ROUTED
    var router_weights: array<f32, STREAM_TURNS * OWN * ROUTERS>;
    // At most one turn.
    for (var row = router_at; row != NONE; row = NONE) {
#repeat turn STREAM_TURNS
#repeat i OWN
        for (var r = 0u; r < ROUTERS; r++) {
            router_weights[(turn * OWN + i) * ROUTERS + r] = router_weight(row + r * HIDDEN_SIZE + own_number(turn) * OWN + i);
        }
#endrepeat
#endrepeat
    }
    router_sums = array<f32, ROUTERS>();
#endif
    while thread < HIDDEN_SIZE / OWN {
        var is_there = true;
#repeat turn STREAM_TURNS
#repeat i OWN
        elements[turn * OWN + i] = mail[at + i * (HIDDEN_SIZE / OWN) + own_number(turn)];
#endrepeat
#endrepeat
#repeat turn STREAM_TURNS
#repeat i OWN
        is_there = is_there && elements[turn * OWN + i].y == expected;
#endrepeat
#endrepeat
        if is_there || !keeps_waiting() {
            break;
        }
    }
    var square = 0.0;
#repeat turn STREAM_TURNS
    if turn * WORKGROUP_SIZE + thread < HIDDEN_SIZE / OWN {
        var values: array<f32, OWN>;
#repeat i OWN
        let value = bitcast<f32>(elements[turn * OWN + i].x);
#if ROUTED
        if router_at != NONE {
            for (var r = 0u; r < ROUTERS; r++) {
                router_sums[r] += value * router_weights[(turn * OWN + i) * ROUTERS + r];
            }
        }
#endif
        square += value * value;
        values[i] = value * (*weights)[turn * OWN + i];
#endrepeat
        stage_$P(turn * WORKGROUP_SIZE + thread, values);
    }
#endrepeat
    pad_$P(HIDDEN_SIZE);
    let sum = lane_sum(square);
    if lane == 0u {
        team_values[team] = sum;
    }
#if ROUTED
    if router_at != NONE {
        for (var r = 0u; r < ROUTERS; r++) {
            let sum = lane_sum(router_sums[r]);
            if lane == 0u {
                team_routers[r * TEAMS + team] = sum;
            }
        }
    }
#endif
    return all_is_there();
}
#endfor

#for P in O DOWN
// Stages `count` elements from place `at` of the mail on, as the activation of the product. False if they do not come.
fn stage_mail_$P(at: u32, count: u32) -> bool {
    for (var first = thread; first < count / OWN; first += BATCH_TURNS * WORKGROUP_SIZE) {
        var elements: array<vec2<u32>, BATCH_TURNS * OWN>;
        loop {
            var is_there = true;
#repeat turn BATCH_TURNS
#repeat i OWN
            if turn == 0u || turn * WORKGROUP_SIZE < count / OWN {
                elements[turn * OWN + i] = mail[at + i * (count / OWN) + min(first + turn * WORKGROUP_SIZE, count / OWN - 1u)];
            }
#endrepeat
#endrepeat
#repeat turn BATCH_TURNS
#repeat i OWN
            if turn == 0u || turn * WORKGROUP_SIZE < count / OWN {
                is_there = is_there && elements[turn * OWN + i].y == tag;
            }
#endrepeat
#endrepeat
            if is_there || !keeps_waiting() {
                break;
            }
        }
#repeat turn BATCH_TURNS
        if first + turn * WORKGROUP_SIZE < count / OWN {
            var values: array<f32, OWN>;
#repeat i OWN
            values[i] = bitcast<f32>(elements[turn * OWN + i].x);
#endrepeat
            stage_$P(first + turn * WORKGROUP_SIZE, values);
        }
#endrepeat
    }
    pad_$P(count);
    return all_is_there();
}
#endfor

// A barrier of the workgroup after all its threads have what they waited for; false if one has not.
fn all_is_there() -> bool {
    polls = 0u;
    return workgroupUniformLoad(&has_failed) == 0u;
}

// What scales the sums of a normed activation; every lane of a team must call.
fn norm_factor() -> f32 {
    var total = 0.0;
    for (var t = lane; t < TEAMS; t += LANES) {
        total += team_values[t];
    }
    return inverseSqrt(lane_sum(total) / f32(HIDDEN_SIZE) + params.eps);
}

fn post_pair(at: u32, value: vec2<f32>) {
    post(at, value.x, tag);
    post(at + 1u, value.y, tag);
}

// Elements `column` and `column + 1` of the stream at `at`.
fn post_stream(at: u32, column: u32, value: vec2<f32>) {
    post(at + place(column, HIDDEN_SIZE), value.x, tag);
    post(at + place(column + 1u, HIDDEN_SIZE), value.y, tag);
}
