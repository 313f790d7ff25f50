// tokens_compact: decide which rows are active now, list them in position order, give them K/V slots and size the grids.
// Math      active = [r : keep(r)] ascending; slot of the j-th kept row of a sequence = kv_lengths + j;
//           FIRST: the same rows in a second list, with slots of another group, as those of recursion 0
// Why       counts stay on the device: the list and the indirect grids are all that later kernels need
// Shapes    rows [T]; decision [T] f32; depth [T]; kv_lengths [sequences, groups]; pages [sequences, groups, max_pages];
//           active_out, first_out [T + ROW_PADDING + 1]; dispatch, first_dispatch [4 + 3 * MAX_GRIDS]; slots [sequences, groups,
//           max_positions]
// Bindings  0 params uniform; 1 grids uniform; 2 rows read; 3 depth write; 4 active_out write; 5 dispatch write;
//           6 kv_lengths write [KV]; 7 pages read [KV]; 8 decision read [EXPERT]; 9 slots write [KV_SLOTS];
//           10 first_out write [FIRST]; 11 first_dispatch write [FIRST]
// Grid      (1, 1, 1): one workgroup, which goes through WORKGROUP_SIZE * EACH rows at a time, EACH neighbours a thread
// Spec      WORKGROUP_SIZE power of two, EACH at most 32: 4 * WORKGROUP_SIZE bytes of workgroup memory, KV: twice as many and 4
//           more; BEGIN, EXPERT, TOKEN, FIXED, SAMPLE or ENDS: which rows; KV: they store or read K/V; KV_SLOTS: the table lists
//           keys, not pages (hybrid caches); FIRST, beside BEGIN and KV: the first recursion takes all
// Limits    rows of a sequence are contiguous and ascend in position; params.num_rows <= T; ENDS: a row to be sampled is the
//           last of its sequence
// Numerics  integers; a row is selected if its decision >= params.threshold (NaN does not pass)
// Source    MoR, expert-choice and token-choice routing (arXiv 2507.10524)
#import shared/rows
#import shared/scan

struct Params {
    num_rows: u32,
    recursion: u32,
    always: u32,
    keep_all: u32,
    num_groups: u32,
    write_group: u32,
    read_group: u32,
    max_pages: u32,
    max_positions: u32,
    first_hybrid_group: u32,
    threshold: f32,
    first_group: u32,
}

struct Grids {
    count: u32,
    pad0: u32,
    pad1: u32,
    pad2: u32,
    // (x, rows per workgroup, z, 0)
    entries: array<vec4<u32>, MAX_GRIDS>,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<uniform> grids: Grids;
// Of Row; of ActiveRow, two each. Word by word, every one of 32 lanes would reach for a line of its own.
@group(0) @binding(2) var<storage, read> rows: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read_write> depth: array<u32>;
@group(0) @binding(4) var<storage, read_write> active_out: array<vec4<u32>>;
@group(0) @binding(5) var<storage, read_write> dispatch: array<u32>;
#if KV
@group(0) @binding(6) var<storage, read_write> kv_lengths: array<u32>;
@group(0) @binding(7) var<storage, read> pages: array<u32>;
#endif
#if EXPERT
@group(0) @binding(8) var<storage, read> decision: array<f32>;
#endif
#if KV_SLOTS
@group(0) @binding(9) var<storage, read_write> slots: array<u32>;
#endif
#if FIRST
@group(0) @binding(10) var<storage, read_write> first_out: array<vec4<u32>>;
@group(0) @binding(11) var<storage, read_write> first_dispatch: array<u32>;
// Lists that are made.
const LISTS: u32 = 2u;
#else
const LISTS: u32 = 1u;
#endif

fn row_at(r: u32) -> Row {
    let row = rows[r];
    return Row(row.x, row.y, row.z, row.w);
}

fn list(place: u32, entry: ActiveRow) {
    active_out[2u * place] = vec4<u32>(entry.row, entry.sequence, entry.position, entry.kv_slot);
    active_out[2u * place + 1u] = vec4<u32>(entry.kv_len, entry.kv_table, entry.recursion, entry.end);
}

#if FIRST
fn list_first(place: u32, entry: ActiveRow) {
    first_out[2u * place] = vec4<u32>(entry.row, entry.sequence, entry.position, entry.kv_slot);
    first_out[2u * place + 1u] = vec4<u32>(entry.kv_len, entry.kv_table, entry.recursion, entry.end);
}
#endif

// Recursions that row r has taken, and what the router says of its next, where rows are chosen by these.
fn depth_of(r: u32) -> u32 {
#if EXPERT
    return depth[r];
#elif TOKEN
    return depth[r];
#elif ENDS
    return depth[r];
#else
    return 0u;
#endif
}

fn decision_of(r: u32) -> f32 {
#if EXPERT
    return decision[r];
#else
    return 0.0;
#endif
}

// Of a row, its depth_of and decision_of. Bit 0: listed. Bit 1: selected, that is counted into the token's depth.
fn keep(row: Row, reached: u32, score: f32) -> u32 {
    if (row.flags & ROW_ACTIVE) == 0u {
        return 0u;
    }
#if BEGIN
    return 3u;
#elif EXPERT
    let selected = reached == params.recursion && (params.always != 0u || score >= params.threshold);
    return select(params.keep_all, 3u, selected);
#elif TOKEN
    return select(0u, 3u, reached > params.recursion);
#elif FIXED
    return 3u;
#elif ENDS
    return select(0u, 3u, (row.flags & ROW_SAMPLE) != 0u && reached > params.recursion);
#else
    return select(0u, 3u, (row.flags & ROW_SAMPLE) != 0u);
#endif
}

#if KV
fn physical(sequence: u32, group: u32, slot: u32) -> u32 {
    let page = pages[(sequence * params.num_groups + group) * params.max_pages + slot / PAGE_SIZE];
    return page * PAGE_SIZE + slot % PAGE_SIZE;
}

// The group that rows of a list are stored in.
fn write_group(l: u32) -> u32 {
    return select(params.write_group, params.first_group, l == 1u);
}

// Listed rows before the sequence that the last row so far belongs to.
var<workgroup> before_last: u32;
// Which of its rows a thread lists, a bit each.
var<workgroup> listed: array<u32, WORKGROUP_SIZE>;

// Listed rows before the one at place `i` of those of this turn.
fn listed_before(i: u32) -> u32 {
    return counts[i / EACH] - countOneBits(listed[i / EACH] >> (i % EACH));
}
#endif

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(local_invocation_index) thread: u32) {
    // Listed rows of the rows so far.
    var total = 0u;
    for (var first = 0u; first < params.num_rows; first += WORKGROUP_SIZE * EACH) {
        let first_own = first + thread * EACH;
        // Without a branch, so that no load waits for another but those of lengths: past the end, what the last row has.
        let last = params.num_rows - 1u;
        var own: array<Row, EACH>;
        var reached: array<u32, EACH>;
        var scores: array<f32, EACH>;
        for (var e = 0u; e < EACH; e++) {
            let r = min(first_own + e, last);
            own[e] = row_at(r);
            reached[e] = depth_of(r);
            scores[e] = decision_of(r);
        }
#if KV
        let following = row_at(min(first_own + EACH, last));
        // Of their sequences: entries stored before this step in each list's group, and whether these are the last rows.
        var stored: array<u32, EACH * LISTS>;
        var is_last: array<bool, EACH>;
        for (var l = 0u; l < LISTS; l++) {
            if write_group(l) == NONE {
                continue;
            }
            for (var e = 0u; e < EACH; e++) {
                let is_active = (own[e].flags & ROW_ACTIVE) != 0u;
                let sequence = select(0u, own[e].sequence, is_active);
                stored[l * EACH + e] = kv_lengths[sequence * params.num_groups + write_group(l)];
                var next = following.sequence;
                if e + 1u < EACH {
                    next = own[min(e + 1u, EACH - 1u)].sequence;
                }
                let r = first_own + e;
                is_last[e] = is_active && (r == last || r < last && next != own[e].sequence);
            }
        }
#endif
        var kept: array<u32, EACH>;
        var bits = 0u;
        for (var e = 0u; e < EACH; e++) {
            if first_own + e <= last {
                kept[e] = keep(own[e], reached[e], scores[e]);
            }
            bits |= (kept[e] & 1u) << e;
        }
#if KV
        listed[thread] = bits;
#endif
        scan(countOneBits(bits), thread);
        // Listed rows before the thread's.
        let before_own = total + counts[thread] - countOneBits(bits);
#if KV
        // Listed rows before their sequences.
        var before: array<u32, EACH>;
#endif
        for (var e = 0u; e < EACH; e++) {
            let r = first_own + e;
            let row = own[e];
            let place = before_own + countOneBits(bits & ((1u << e) - 1u));
#if KV
            let begin = min(r, last) - row.flags / ROW_INDEX_UNIT;
            // Its sequence may have begun among earlier rows.
            if begin < first {
                before[e] = before_last;
            } else {
                before[e] = total + listed_before(begin - first);
            }
#if KV_SLOTS
            // Unless a later recursion overrides it, it sees the first one's entry at this position.
            if params.first_hybrid_group != NONE && r <= last && (row.flags & ROW_ACTIVE) != 0u {
                for (var g = params.first_hybrid_group; g < params.num_groups; g++) {
                    slots[(row.sequence * params.num_groups + g) * params.max_positions + row.position] =
                        physical(row.sequence, params.write_group, row.position);
                }
            }
#endif
#endif
            if (kept[e] & 1u) != 0u {
                var entry = ActiveRow(r, row.sequence, row.position, NONE, 0u, 0u, NONE, END_NOTHING);
#if EXPERT
                entry.recursion = params.recursion;
                entry.end = select(END_NOTHING, END_GATED, (kept[e] & 2u) != 0u);
#elif TOKEN
                entry.recursion = params.recursion;
                entry.end = select(END_PASS, END_GATED, reached[e] == params.recursion + 1u);
#elif FIXED
                entry.recursion = params.recursion;
#elif ENDS
                entry.recursion = params.recursion;
                entry.end = END_GATED;
#elif SAMPLE
                entry.recursion = depth[r];
#endif
#if KV
                entry.kv_table = (row.sequence * params.num_groups + params.read_group) * params.max_pages;
                entry.kv_len = row.position + 1u;
#if ENDS
#if KV_SLOTS
                entry.kv_table = (row.sequence * params.num_groups + params.read_group) * params.max_positions;
#else
                // It attends to all that its sequence has stored by now.
                entry.kv_len = kv_lengths[row.sequence * params.num_groups + params.read_group];
#endif
#endif
                if params.write_group != NONE {
                    let slot = stored[e] + place - before[e];
                    entry.kv_slot = physical(row.sequence, params.write_group, slot);
                    if params.write_group == params.read_group {
                        entry.kv_len = slot + 1u;
                    }
#if KV_SLOTS
                    entry.kv_table = (row.sequence * params.num_groups + params.write_group) * params.max_positions;
                    slots[entry.kv_table + row.position] = entry.kv_slot;
                    entry.kv_len = row.position + 1u;
#endif
                }
#endif
                list(place, entry);
#if FIRST
                entry.recursion = 0u;
                entry.end = END_GATED;
                entry.kv_table = (row.sequence * params.num_groups + params.first_group) * params.max_pages;
                let slot = stored[EACH + e] + place - before[e];
                entry.kv_slot = physical(row.sequence, params.first_group, slot);
                entry.kv_len = slot + 1u;
                list_first(place, entry);
#endif
            }
#if BEGIN
            if r < params.num_rows {
#if FIRST
                depth[r] = kept[e] & 1u;
#else
                depth[r] = 0u;
#endif
            }
#elif SAMPLE
            // Reads depths only.
#elif ENDS
            // So does this.
#elif TOKEN
            // The router has written the depth.
#else
            if (kept[e] & 2u) != 0u {
                depth[r] = params.recursion + 1u;
            }
#endif
        }
        total += counts[WORKGROUP_SIZE - 1u];
        // All have read counts and lengths: now they may change.
        storageBarrier();
        workgroupBarrier();
#if KV
        for (var e = 0u; e < EACH; e++) {
            if is_last[e] {
                let end = before_own + countOneBits(bits & ((2u << e) - 1u));
                for (var l = 0u; l < LISTS; l++) {
                    if write_group(l) != NONE {
                        let length = stored[l * EACH + e] + end - before[e];
                        kv_lengths[own[e].sequence * params.num_groups + write_group(l)] = length;
                    }
                }
            }
        }
        if thread == WORKGROUP_SIZE - 1u {
            before_last = before[EACH - 1u];
        }
#endif
    }
    for (var i = thread; i < ROW_PADDING; i += WORKGROUP_SIZE) {
        list(total + i, ActiveRow(NONE, 0u, 0u, NONE, 0u, 0u, NONE, END_NOTHING));
#if FIRST
        list_first(total + i, ActiveRow(NONE, 0u, 0u, NONE, 0u, 0u, NONE, END_NOTHING));
#endif
    }
    if thread == 0u {
        active_out[arrayLength(&active_out) - 2u].x = total;
        // Rows listed so far: work done, to be checked against depths.
        dispatch[0] += total;
#if FIRST
        first_out[arrayLength(&first_out) - 2u].x = total;
        first_dispatch[0] += total;
#endif
    }
    for (var g = thread; g < grids.count; g += WORKGROUP_SIZE) {
        let grid = grids.entries[g];
        let empty = total == 0u;
        let size = vec3<u32>(select(grid.x, 0u, empty), (total + grid.y - 1u) / grid.y, select(grid.z, 0u, empty));
        for (var i = 0u; i < 3u; i++) {
            dispatch[4u + 3u * g + i] = size[i];
#if FIRST
            first_dispatch[4u + 3u * g + i] = size[i];
#endif
        }
    }
}
