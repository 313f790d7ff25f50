// Attention of decode_layers: a token's key and value to the caches, keys and values of earlier ones on their way before the query is
// there, parts of the keys each a workgroup's, and the merge of their results.
fn kv_at(step_slot: u32, key: u32, kv_head: u32, unit: u32) -> u32 {
    let slot = step_slot + pages[kv_places[kv_group].table + key / PAGE_SIZE] * PAGE_SIZE + key % PAGE_SIZE;
    return ((slot * NUM_KEY_VALUE_HEADS + kv_head) * HEAD_UNITS + unit) * KV_QUADS;
}

#if KV_F16
fn key_unit(at: u32) -> KvUnit {
    return KvUnit(keys[at]);
}

fn value_unit(at: u32) -> KvUnit {
    return KvUnit(values[at]);
}

fn unpack_kv(unit: KvUnit) -> mat2x4<f32> {
    return mat2x4<f32>(
        vec4<f32>(unpack2x16float(unit.packed.x), unpack2x16float(unit.packed.y)),
        vec4<f32>(unpack2x16float(unit.packed.z), unpack2x16float(unit.packed.w)),
    );
}
#else
fn key_unit(at: u32) -> KvUnit {
    return KvUnit(keys[at], keys[at + 1u]);
}

fn value_unit(at: u32) -> KvUnit {
    return KvUnit(values[at], values[at + 1u]);
}

fn unpack_kv(unit: KvUnit) -> mat2x4<f32> {
    return mat2x4<f32>(bitcast<vec4<f32>>(unit.low), bitcast<vec4<f32>>(unit.high));
}
#endif

// Stores columns `column` and `column + 1` of the row's key or value.
fn store_kv(is_key: bool, step_slot: u32, column: u32, value: vec2<f32>) {
    let element = (step_slot + kv_places[kv_group].slot) * KV_DIM + column;
#if KV_F16
    let word = pack2x16float(value);
    if is_key {
        keys[element / 8u][element / 2u % 4u] = word;
    } else {
        values[element / 8u][element / 2u % 4u] = word;
    }
#else
    let words = bitcast<vec2<u32>>(value);
    if is_key {
        keys[element / 4u][element % 4u] = words.x;
        keys[element / 4u][element % 4u + 1u] = words.y;
    } else {
        values[element / 4u][element % 4u] = words.x;
        values[element / 4u][element % 4u + 1u] = words.y;
    }
#endif
}

// Parts that the keys are split into, each a workgroup's.
fn num_splits() -> u32 {
    // Few keys are read sooner than what becomes of them is merged.
    let kv_len = kv_places[kv_group].len;
    let keys = select(kv_len, 1u, kv_len <= ALONE_KEYS);
    return min((keys + SPLIT_KEYS - 1u) / SPLIT_KEYS, MAX_SPLITS);
}

struct AttentionPart {
    head: u32,
    split: u32,
    start: u32,
    end: u32,
}

fn attention_part(item: u32) -> AttentionPart {
    let kv_len = kv_places[kv_group].len;
    let chunk = (kv_len + num_splits() - 1u) / num_splits();
    let split = item / NUM_ATTENTION_HEADS;
    return AttentionPart(
        item % NUM_ATTENTION_HEADS,
        split,
        min(split * chunk, kv_len),
        min(split * chunk + chunk, kv_len),
    );
}

// Sends for keys and values of earlier tokens.
fn prefetch_kv(
    step_slot: u32,
    ahead_keys: ptr<function, array<KvUnit, KEYS>>,
    ahead_values: ptr<function, array<KvUnit, KEYS>>,
) {
    if own_workgroup < NUM_ATTENTION_HEADS * num_splits() {
        let part = attention_part(own_workgroup);
        let unit = min(lane % KEY_LANES, HEAD_UNITS - 1u);
        let kv_head = part.head / (NUM_ATTENTION_HEADS / NUM_KEY_VALUE_HEADS);
#repeat i KEYS
        let key = part.start + i * SLICES + thread / KEY_LANES;
        if key + 1u < kv_places[kv_group].len {
            let at = kv_at(step_slot, key, kv_head, unit);
            (*ahead_keys)[i] = key_unit(at);
            (*ahead_values)[i] = value_unit(at);
        }
#endrepeat
    }
}

// Elements of the query, of the row's own key and of its value, as staged.
const STAGED_KEY: u32 = HEAD_DIM / 4u;
const STAGED_VALUE: u32 = HEAD_DIM / 2u;
const STAGED_PARTS: u32 = 3u * HEAD_DIM / 4u;

fn staged_unit(at: u32, unit: u32) -> mat2x4<f32> {
    return mat2x4<f32>(staged[at + 2u * unit], staged[at + 2u * unit + 1u]);
}

// As the cache has it.
fn rounded(value: f32) -> f32 {
#if KV_F16
    return unpack2x16float(pack2x16float(vec2<f32>(value, 0.0))).x;
#else
    return value;
#endif
}

// Attention of this workgroup's heads and parts of the keys; false if queries do not come.
fn attend(
    step_slot: u32,
    ahead_keys: ptr<function, array<KvUnit, KEYS>>,
    ahead_values: ptr<function, array<KvUnit, KEYS>>,
) -> bool {
    let kv_len = kv_places[kv_group].len;
    let splits = num_splits();
    let key_lane = lane % KEY_LANES;
    let unit = min(key_lane, HEAD_UNITS - 1u);
    let slice = thread / KEY_LANES;
    for (var item = own_workgroup; item < NUM_ATTENTION_HEADS * splits; item += NUM_WORKGROUPS) {
        let part = attention_part(item);
        let kv_head = part.head / (NUM_ATTENTION_HEADS / NUM_KEY_VALUE_HEADS);
        for (var i = thread; i < 3u * HEAD_DIM; i += WORKGROUP_SIZE) {
            let within = i % HEAD_DIM;
            var at = QUERY + part.head * HEAD_DIM + within;
            if i >= 2u * HEAD_DIM {
                at = NEW_VALUE + kv_head * HEAD_DIM + within;
            } else if i >= HEAD_DIM {
                at = NEW_KEY + kv_head * HEAD_DIM + within;
            }
            let value = collect(at, tag);
            staged[i / 4u][i % 4u] = select(rounded(value), value * params.attention_scale, i < HEAD_DIM);
        }
        if !all_is_there() {
            return false;
        }
        // Lanes past the head repeat its last unit and are not counted.
        let query = staged_unit(0u, unit) * select(0.0, 1.0, key_lane < HEAD_UNITS);
        var highest = LOWEST;
        var sum = 0.0;
        var out = mat2x4<f32>(vec4<f32>(), vec4<f32>());
        for (var base = part.start; base < part.end; base += SLICES * KEYS) {
            var scores: array<f32, KEYS>;
            var tile_highest = highest;
#repeat i KEYS
            let key = base + i * SLICES + slice;
            if (base > part.start || item > own_workgroup) && key < part.end {
                let at = kv_at(step_slot, key, kv_head, unit);
                (*ahead_keys)[i] = key_unit(at);
                (*ahead_values)[i] = value_unit(at);
            }
#endrepeat
#repeat i KEYS
            let key = base + i * SLICES + slice;
            var k = unpack_kv((*ahead_keys)[i]);
            if key + 1u == kv_len {
                k = staged_unit(STAGED_KEY, unit);
            }
            var score = dot(query[0], k[0]) + dot(query[1], k[1]);
            for (var step = 0u; step < KEY_LANES_LOG2; step++) {
                score += subgroupShuffleXor(score, 1u << step);
            }
            scores[i] = score;
            tile_highest = select(tile_highest, max(tile_highest, score), key < part.end);
#endrepeat
            let kept = exp(highest - tile_highest);
            highest = tile_highest;
            sum *= kept;
            out = out * kept;
#repeat i KEYS
            let key = base + i * SLICES + slice;
            if key < part.end {
                var v = unpack_kv((*ahead_values)[i]);
                if key + 1u == kv_len {
                    v = staged_unit(STAGED_VALUE, unit);
                }
                let p = exp(scores[i] - highest);
                sum += p;
                out = out + v * p;
            }
#endrepeat
        }
        // The slices of a team become one, relative to the maximum of all teams.
        let team_highest = lane_max(highest);
        if lane == 0u {
            team_values[team] = team_highest;
        }
        workgroupBarrier();
        var all_highest = LOWEST;
        for (var t = lane; t < TEAMS; t += LANES) {
            all_highest = max(all_highest, team_values[t]);
        }
        all_highest = lane_max(all_highest);
        let weight = exp(highest - all_highest);
        sum *= weight;
        out = out * weight;
        for (var step = KEY_LANES_LOG2; step < LANES_LOG2; step++) {
            sum += subgroupShuffleXor(sum, 1u << step);
            out = mat2x4<f32>(
                out[0] + subgroupShuffleXor(out[0], 1u << step),
                out[1] + subgroupShuffleXor(out[1], 1u << step),
            );
        }
        if lane < HEAD_UNITS {
            staged[STAGED_PARTS + team * (HEAD_DIM / 4u) + 2u * lane] = out[0];
            staged[STAGED_PARTS + team * (HEAD_DIM / 4u) + 2u * lane + 1u] = out[1];
        }
        if lane == 0u {
            team_sums[team].x = sum;
        }
        workgroupBarrier();
        if thread < HEAD_DIM {
            var all_sum = 0.0;
            var all_out = 0.0;
            for (var t = 0u; t < TEAMS; t++) {
                all_sum += team_sums[t].x;
                all_out += staged[STAGED_PARTS + t * (HEAD_DIM / 4u) + thread / 4u][thread % 4u];
            }
            let at = part.head * splits + part.split;
            if splits == 1u {
                all_out /= max(all_sum, 1e-30);
            } else if thread == 0u {
                post(STATISTICS + 2u * at, all_highest, tag + 1u);
                post(STATISTICS + 2u * at + 1u, all_sum, tag + 1u);
            }
            // Merged by element, or as it is by what stages it.
            let to = select(at * HEAD_DIM + thread, place(part.head * HEAD_DIM + thread, Q_DIM), splits == 1u);
            post(ATTENTION + to, all_out, tag + 1u);
        }
        workgroupBarrier();
    }
    return true;
}

// Stages the attention of all heads, its parts merged; false if it does not come.
fn stage_attention() -> bool {
    let splits = num_splits();
    if splits == 1u {
        return stage_mail_O(ATTENTION, Q_DIM);
    }
    // Each part's share of its head's attention.
    for (var i = thread; i < NUM_ATTENTION_HEADS * splits; i += WORKGROUP_SIZE) {
        var statistic = array<vec2<u32>, 2>(mail[STATISTICS + 2u * i], mail[STATISTICS + 2u * i + 1u]);
        while statistic[0].y != tag || statistic[1].y != tag {
            if !keeps_waiting() {
                break;
            }
            statistic = array<vec2<u32>, 2>(mail[STATISTICS + 2u * i], mail[STATISTICS + 2u * i + 1u]);
        }
        team_sums[i] = bitcast<vec2<f32>>(vec2<u32>(statistic[0].x, statistic[1].x));
    }
    workgroupBarrier();
    for (var head = thread; head < NUM_ATTENTION_HEADS; head += WORKGROUP_SIZE) {
        var highest = LOWEST;
        for (var s = 0u; s < splits; s++) {
            highest = max(highest, team_sums[head * splits + s].x);
        }
        var mass = 0.0;
        for (var s = 0u; s < splits; s++) {
            let share = exp(team_sums[head * splits + s].x - highest);
            mass += share * team_sums[head * splits + s].y;
            team_sums[head * splits + s].x = share;
        }
        for (var s = 0u; s < splits; s++) {
            team_sums[head * splits + s].x /= mass;
        }
    }
    workgroupBarrier();
    for (var element = thread; element < Q_DIM; element += WORKGROUP_SIZE) {
        var value = 0.0;
        let first = element / HEAD_DIM * splits;
        for (var base = 0u; base < splits; base += BATCH) {
            var elements: array<vec2<u32>, BATCH>;
            loop {
                var is_there = true;
#repeat i BATCH
                elements[i] = mail[ATTENTION + (first + min(base + i, splits - 1u)) * HEAD_DIM + element % HEAD_DIM];
#endrepeat
#repeat i BATCH
                is_there = is_there && elements[i].y == tag;
#endrepeat
                if is_there || !keeps_waiting() {
                    break;
                }
            }
#repeat i BATCH
            if base + i < splits {
                value += team_sums[first + base + i].x * bitcast<f32>(elements[i].x);
            }
#endrepeat
        }
#if DIGITS
        staged[STAGED_MERGED + element / 4u][element % 4u] = value;
#else
        stage_O(element, array<f32, OWN>(value));
#endif
    }
#if DIGITS
    if !all_is_there() {
        return false;
    }
    for (var own = thread; own < Q_DIM / OWN; own += WORKGROUP_SIZE) {
        let low = staged[STAGED_MERGED + 2u * own];
        let high = staged[STAGED_MERGED + 2u * own + 1u];
        stage_O(own, array<f32, OWN>(low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w));
    }
#endif
    pad_O(Q_DIM);
    return all_is_there();
}
