// Draws of decode_layers: the token that follows, and what a complete step leaves for the next one.

// What sample_partial does, for the tokens whose logits are of this workgroup, which must have been written; then, where tokens are drawn
// here, what sample_token does, of all workgroups' partials: the token that follows, or NONE if they do not come.
//
// The stages are one loop, and end with one call: of forms with a function for the workgroup's and one for all workgroups' tokens
// NVIDIA's driver 580 made kernels of some types that hang or find no token (benches/runs/2026-11-30-nvidia-h200, calls 26 to 28).
fn draw(s: Sampling) -> u32 {
    let source = source_of(s, 0u, own_row.sequence);
    let has_noise = !is_greedy(s) && !has_threshold(s);
    var relative = source;
    // (key, token) of the most likely one, then of the one that is drawn, if any is.
    var partial = vec4<u32>(0u, NONE, 0u, NONE);
    var best = vec2<u32>(0u, NONE);
    for (var stage = 0u; stage < select(2u, 4u, params.num_tokens > 0u); stage++) {
        let is_drawn = stage % 2u == 1u;
        if is_drawn && !has_noise {
            continue;
        }
        // A thread's tokens, or workgroups, ascend, so the first of equals stays.
        var own = vec2<u32>(0u, NONE);
        if stage < 2u {
            for (var i = thread; 2u * pair_number(i / 2u) < HEAD_ROWS; i += WORKGROUP_SIZE) {
                let token = 2u * pair_number(i / 2u) + i % 2u;
                if token < HEAD_ROWS {
                    let key = token_key(source, token);
                    var score = key;
                    if is_drawn && key != 0u {
                        score = token_score(relative, s, own_row.position, token, key);
                    }
                    if score > own.x {
                        own = vec2<u32>(score, token);
                    }
                }
            }
        } else {
            if stage == 2u {
                tag += 1u;
                if thread < 4u {
                    mail[PARTIALS + 4u * own_workgroup + thread] = vec2<u32>(partial[thread], tag);
                }
            }
            for (var w = thread; w < NUM_WORKGROUPS; w += WORKGROUP_SIZE) {
                let at = PARTIALS + 4u * w;
                var elements: array<vec2<u32>, 4>;
                loop {
                    elements = array<vec2<u32>, 4>(mail[at], mail[at + 1u], mail[at + 2u], mail[at + 3u]);
                    let tags = vec4<u32>(elements[0].y, elements[1].y, elements[2].y, elements[3].y);
                    if all(tags == vec4<u32>(tag)) || !keeps_waiting() {
                        break;
                    }
                }
                var found = vec2<u32>(elements[0].x, elements[1].x);
                if is_drawn {
                    found = vec2<u32>(elements[2].x, elements[3].x);
                    if found.x != 0u {
                        found.x = token_score(relative, s, own_row.position, found.y, found.x);
                    }
                }
                if found.x > own.x || (found.x == own.x && found.y < own.y) {
                    own = found;
                }
            }
            if !all_is_there() {
                return NONE;
            }
        }
        let of_workgroup = workgroup_best(own, thread, lane);
        if !is_drawn {
            best = of_workgroup;
            // Where nothing has a key, nothing is compared.
            relative = relative_to(source, s, best.x);
        }
        if stage == 0u {
            partial = vec4<u32>(best, 0u, NONE);
        } else if stage == 1u && of_workgroup.y != NONE {
            partial = vec4<u32>(partial.xy, token_key(source, of_workgroup.y), of_workgroup.y);
        } else if stage == 3u && of_workgroup.y != NONE {
            best = of_workgroup;
        }
    }
    if thread == 0u && params.num_tokens == 0u {
        partials[own_workgroup] = partial;
    }
    // Of NaN alone none has a key above 0.
    return select(best.y, 0u, best.x == 0u);
}

// The step is complete: the row's keys and values count.
fn complete_step() {
    for (var s = thread; s < params.num_steps; s += WORKGROUP_SIZE) {
        // Each recursion has a group of its own.
        if (steps[s].flags & BLOCK_BEGIN) != 0u && steps[s].recursion < blocks {
            kv_places[steps[s].group].len += 1u;
        }
    }
    if thread == 0u {
        if params.unshared_group != NONE {
            kv_places[params.unshared_group].len += 1u;
        }
        num_complete += 1u;
    }
}
