// A dispatch of decode_layers as a whole: what its last workgroup leaves for the next one, and the trial whether all run at a time.

// What the last workgroup to leave does: the next dispatch finds counts of 0 and tags that nothing has. Lengths are now
// as the complete steps make them, and the row of the last one is listed for its draw; none is if one is not complete.
fn conclude() {
    // Of a step five a layer, and the draw's.
    var last_tag = first_tag + max(max(params.num_tokens, 1u) * (5u * params.num_steps + 2u), params.trial_rounds);
    if last_tag >= FEW_TAGS_LEFT {
        // Before tags come again that places still have.
        for (var i = 0u; i < max(MAIL, 2u * NUM_WORKGROUPS); i++) {
            mail[i] = vec2<u32>();
        }
        last_tag = 0u;
    }
    atomicStore(&control[0], last_tag);
    atomicStore(&control[1], 0u);
    if params.trial_rounds > 0u {
        return;
    }
    let row = rows[0];
    var listed = ActiveRow(NONE, 0u, 0u, NONE, 0u, 0u, NONE, END_NOTHING);
    if (row.flags & ROW_ACTIVE) != 0u {
        // Where another kernel draws, a step that somebody has given up is done again, and must not count. What was drawn here is drawn.
        if num_complete > 0u && (params.num_tokens > 0u || atomicLoad(&control[2]) == 0u) {
            let first_length = row.sequence * params.num_groups;
            for (var s = 0u; s < params.num_steps; s++) {
                let step = steps[s];
                if (step.flags & BLOCK_BEGIN) != 0u {
                    let more = kv_places[step.group].len - 1u - kv_lengths[first_length + step.group];
                    atomicAdd(&control[4u + step.recursion], more);
                }
            }
            for (var group = 0u; group < params.num_groups; group++) {
                kv_lengths[first_length + group] = kv_places[group].len - 1u;
            }
        }
        if params.num_tokens > 0u {
            rows[0] = own_row;
        }
        if atomicLoad(&control[2]) != 0u {
            rows[0].flags = ROW_FAILED;
        } else {
            depth[0] = params.base_depth + taken;
            if (row.flags & ROW_SAMPLE) != 0u {
                listed.row = 0u;
                listed.sequence = row.sequence;
                listed.position = row.position + num_complete - 1u;
                listed.recursion = params.base_depth + taken;
            }
        }
    }
    active_rows[0] = listed;
}

// Waits for all workgroups and lets all wait for this one, so many times.
fn try_rounds() {
    for (var round = 0u; round < params.trial_rounds; round++) {
        let box = round % 2u * NUM_WORKGROUPS;
        if thread == 0u {
            post(box + own_workgroup, 0.0, tag);
        }
        workgroupBarrier();
        for (var w = thread; w < NUM_WORKGROUPS; w += WORKGROUP_SIZE) {
            _ = collect(box + w, tag);
        }
        if !all_is_there() {
            break;
        }
        tag += 1u;
    }
}
