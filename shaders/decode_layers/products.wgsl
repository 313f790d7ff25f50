// Products of decode_layers: rows of a matrix on their way before the activation is there, and the sums of pairs of outputs, by
// lanes and then teams.
// Products differ in constants and types alone, and each has functions of its own, called from one place: compilers inline those,
// and know all sizes then.
#for P T W in QKV:LAYER:qkv_proj O:LAYER:o_proj GATE_UP:LAYER:gate_up_proj DOWN:LAYER:down_proj HEAD:HEAD:lm_head EMBED:HEAD:embed_tokens
// Unit `unit` of row `row` of matrix `place` of a stack; those past the end are the last one.
fn fetch_$P(place: u32, row: u32, unit: u32) -> Unit_$T {
    let outputs = $P_ROWS;
    let start = (place * outputs + min(row, outputs - 1u)) * $P_STRIDE;
    let at = min(unit, $P_QUADS - 1u);
#if $T_QUANTISED
    // Behind the codes, in one word of a quad: to fetch it whole would be four times as much.
    let word = (start + $P_QUADS) * 4u + at * $T_QUAD_ELEMS / GROUP * $T_PARAMETERS / 2u;
    return Unit_$T($W[start + at], $W[word / 4u][word % 4u]);
#else
    return Unit_$T($W[start + at]);
#endif
}
#endfor

#for P T in QKV:LAYER O:LAYER GATE_UP:LAYER DOWN:LAYER HEAD:HEAD
// Products of unit `unit` of two rows with the staged activation.
fn pair_product_$P(a: Unit_$T, b: Unit_$T, unit: u32) -> vec2<f32> {
    let quads = $P_QUADS;
#if $T_F16
    let x0 = staged[unit];
    let x1 = staged[quads + unit];
    return vec2<f32>(
        dot(vec4<f32>(unpack2x16float(a.codes.x), unpack2x16float(a.codes.y)), x0)
            + dot(vec4<f32>(unpack2x16float(a.codes.z), unpack2x16float(a.codes.w)), x1),
        dot(vec4<f32>(unpack2x16float(b.codes.x), unpack2x16float(b.codes.y)), x0)
            + dot(vec4<f32>(unpack2x16float(b.codes.z), unpack2x16float(b.codes.w)), x1),
    );
#elif $T_BF16
    // Low halves are the even elements, high halves the odd ones.
    let x0 = staged[unit];
    let x1 = staged[quads + unit];
    let even = vec4<f32>(x0.xz, x1.xz);
    let odd = vec4<f32>(x0.yw, x1.yw);
    return vec2<f32>(
        dot(bitcast<vec4<f32>>(a.codes << vec4<u32>(16u)), even)
            + dot(bitcast<vec4<f32>>(a.codes & vec4<u32>(0xffff0000u)), odd),
        dot(bitcast<vec4<f32>>(b.codes << vec4<u32>(16u)), even)
            + dot(bitcast<vec4<f32>>(b.codes & vec4<u32>(0xffff0000u)), odd),
    );
#elif $T_QUANTISED
    var products = vec2<f32>();
#if $T_Q4
    var inputs = 0.0;
#endif
#repeat eight $T_UNIT_CODES
    let digits = bitcast<vec4<u32>>(staged[eight * quads + unit]);
    let scaling = staged[($T_UNIT_CODES + eight / 2u) * quads + unit];
    let step = scaling[eight % 2u * 2u];
#if $T_Q8
    let codes_a = vec2<u32>(a.codes[2u * eight], a.codes[2u * eight + 1u]);
    let codes_b = vec2<u32>(b.codes[2u * eight], b.codes[2u * eight + 1u]);
#else
    let codes_a = q4_words(a.codes[eight]);
    let codes_b = q4_words(b.codes[eight]);
    inputs += scaling[eight % 2u * 2u + 1u];
#endif
    products += step * vec2<f32>(digit_product(codes_a, digits), digit_product(codes_b, digits));
#endrepeat
#if $T_Q8
    let group = unit * $T_QUAD_ELEMS / GROUP;
    return products * vec2<f32>(q8_scale(a.parameters, group), q8_scale(b.parameters, group));
#else
    let pa = q4_scale_offset(a.parameters);
    let pb = q4_scale_offset(b.parameters);
    return products * vec2<f32>(pa.x, pb.x) + inputs * vec2<f32>(pa.y, pb.y);
#endif
#else
    let x0 = staged[unit];
    return vec2<f32>(dot(bitcast<vec4<f32>>(a.codes), x0), dot(bitcast<vec4<f32>>(b.codes), x0));
#endif
}
#endfor

// The pair of outputs that is number `local` of this workgroup.
fn pair_number(local: u32) -> u32 {
    return local * NUM_WORKGROUPS + own_workgroup;
}

#for P T in QKV:LAYER O:LAYER GATE_UP:LAYER DOWN:LAYER HEAD:HEAD
// First row of this team in a round.
fn first_row_$P(round: u32) -> u32 {
    return 2u * pair_number(round * (TEAMS / $P_SPLIT) + team / $P_SPLIT);
}

// Unit of a row that is this lane's in a step.
fn own_unit_$P(step: u32) -> u32 {
    return (step * $P_SPLIT + team % $P_SPLIT) * LANES + lane;
}

// Sends for the first units of a product. Teams without a pair would all fetch the last row, which the others wait for; but with
// matrices of f16 the branch takes longer than that (H200, 360M shape: 595 us for 541 with it, q4 525 us for 589).
fn prefetch_$P(place: u32, ahead: ptr<function, array<Unit_$T, 2u * $T_PREFETCH>>) {
#repeat p $T_PREFETCH
    if p < $P_ABREAST * $P_TURN {
        let row = first_row_$P(p % $P_ABREAST);
        let unit = own_unit_$P(p / $P_ABREAST);
#if $T_QUANTISED
        if row < $P_ROWS {
            (*ahead)[2u * p] = fetch_$P(place, row, unit);
            (*ahead)[2u * p + 1u] = fetch_$P(place, row + 1u, unit);
        }
#else
        (*ahead)[2u * p] = fetch_$P(place, row, unit);
        (*ahead)[2u * p + 1u] = fetch_$P(place, row + 1u, unit);
#endif
    }
#endrepeat
}

// Multiplies the pairs of rows that are this team's in the rounds from `round` on with the staged activation, or its part of
// them, and sends for what is multiplied next. Even lanes have products of first rows, odd lanes those of second ones.
fn multiply_rounds_$P(
    place: u32,
    round: u32,
    ahead: ptr<function, array<Unit_$T, 2u * $T_PREFETCH>>,
) -> array<f32, $P_ABREAST> {
    var sums: array<vec2<f32>, $P_ABREAST>;
    for (var step = 0u; step < $P_STEPS; step += $P_TURN) {
        let is_last = step + $P_TURN >= $P_STEPS;
        let coming_round = select(round, round + $P_ABREAST, is_last);
        let coming_step = select(step + $P_TURN, 0u, is_last);
#repeat p $T_PREFETCH
        if p < $P_ABREAST * $P_TURN {
            let a = (*ahead)[2u * p];
            let b = (*ahead)[2u * p + 1u];
            if coming_round + p % $P_ABREAST < $P_ROUNDS {
                let row = first_row_$P(coming_round + p % $P_ABREAST);
                let coming = own_unit_$P(coming_step + p / $P_ABREAST);
                (*ahead)[2u * p] = fetch_$P(place, row, coming);
                (*ahead)[2u * p + 1u] = fetch_$P(place, row + 1u, coming);
            }
            // Rows abreast meet the same unit, which is read once.
            let unit = own_unit_$P(step + p / $P_ABREAST);
            if unit < $P_QUADS {
                sums[p % $P_ABREAST] += pair_product_$P(a, b, unit);
            }
        }
#endrepeat
    }
    var products: array<f32, $P_ABREAST>;
    for (var i = 0u; i < $P_ABREAST; i++) {
        products[i] = lane_sums(sums[i], lane);
    }
    return products;
}
#endfor

#for P T in QKV:LAYER O:LAYER GATE_UP:LAYER DOWN:LAYER
// Multiplies this workgroup's rows with the staged activation; sums of teams go to `team_sums`, for after a barrier.
fn multiply_$P(place: u32, ahead: ptr<function, array<Unit_$T, 2u * $T_PREFETCH>>) {
    for (var round = 0u; round < $P_ROUNDS; round += $P_ABREAST) {
        let products = multiply_rounds_$P(place, round, ahead);
        for (var i = 0u; i < $P_ABREAST; i++) {
            if lane < 2u && round + i < $P_ROUNDS {
                team_sums[(round + i) * TEAMS + team][lane] = products[i];
            }
        }
    }
}

// Pairs of outputs that this workgroup may have.
fn pairs_of_$P() -> u32 {
    return $P_ROUNDS * (TEAMS / $P_SPLIT);
}

// The product's outputs of pair number `local` of this workgroup.
fn product_$P(local: u32) -> vec2<f32> {
    let split = $P_SPLIT;
    let in_a_round = TEAMS / split;
    let first = local / in_a_round * TEAMS + local % in_a_round * split;
    var sum = vec2<f32>();
    for (var part = 0u; part < split; part++) {
        sum += team_sums[first + part];
    }
    return sum;
}

// Whether this thread has a pair to finish, and which.
fn has_pair_$P() -> bool {
    return thread < pairs_of_$P() && 2u * pair_number(thread) < $P_ROWS;
}
#endfor

#for P T in QKV:LAYER O:LAYER GATE_UP:LAYER DOWN:LAYER HEAD:HEAD
// Stages the elements of the activation of a product that are number `own` of their kind: OWN next to each other.
fn stage_$P(own: u32, values: array<f32, OWN>) {
#if $T_QUANTISED
#if $T_Q8
    let digits = digits_of(vec4<f32>(values[0], values[1], values[2], values[3]), vec4<f32>(values[4], values[5], values[6], values[7]));
#else
    let digits = digits_of(vec4<f32>(values[0], values[2], values[4], values[6]), vec4<f32>(values[1], values[3], values[5], values[7]));
#endif
    let unit = own / $T_UNIT_CODES;
    let eight = own % $T_UNIT_CODES;
    staged[eight * $P_QUADS + unit] = bitcast<vec4<f32>>(digits.words);
    let to = ($T_UNIT_CODES + eight / 2u) * $P_QUADS + unit;
    staged[to][eight % 2u * 2u] = digits.step;
#if $T_Q4
    staged[to][eight % 2u * 2u + 1u] = digits.sum;
#endif
#else
#repeat i OWN
    let element = own * OWN + i;
    let within = element % $T_QUAD_ELEMS;
    staged[within / 4u * $P_QUADS + element / $T_QUAD_ELEMS][within % 4u] = values[i];
#endrepeat
#endif
}

// The last unit may have more elements than there are.
fn pad_$P(count: u32) {
    for (var own = count / OWN + thread; own < $P_QUADS * $T_QUAD_ELEMS / OWN; own += WORKGROUP_SIZE) {
        stage_$P(own, array<f32, OWN>());
    }
}
#endfor
