// slots_compact: move the tokens of a depth-wise batch on: list the slots that leave, enter or run the block.
// Math      EXIT: slots whose token has taken its last recursion. ENTER: free slots with a next row, which moves in.
//           BLOCK: slots with a token that takes a recursion now, each at its own. AT: of these, the ones at
//           `recursion`. Every list ascends by slot; a row of a list is its slot
// Why       tokens at different depths share one pass through the block, and a slot that is left is filled in the same
//           tick; counts, K/V slots and grids stay on the device
// Shapes    S slots; rows, next_rows [S]; state [S] of (passes through the block, recursions that counted);
//           decision [S] f32; target_depth [S] u32; kv_lengths [S, groups]; pages [S, groups, max_pages];
//           active_out [S + ROW_PADDING + 1]; dispatch [4 + 3 * MAX_GRIDS]; kv_slots [S, groups, max_positions]
// Bindings  0 params uniform; 1 grids uniform; 2 recursions uniform [RECURSIONS]; 3 rows write; 4 state write;
//           5 active_out write; 6 dispatch write; 7 decision read [EXPERT]; 7 target_depth read [TOKEN];
//           7 next_rows write [ENTER]; 8 pages read [KV]; 9 kv_lengths write [KV_LENGTHS]; 10 kv_slots write [KV_SLOTS]
// Grid      (1, 1, 1): one workgroup; each thread owns a run of consecutive slots
// Spec      WORKGROUP_SIZE power of two: 4 * WORKGROUP_SIZE bytes of workgroup memory; EXIT, ENTER, BLOCK or AT;
//           DECIDES: EXIT or BLOCK; IN_BLOCK: BLOCK or AT; RECURSIONS: IN_BLOCK with KV, or EXPERT; NUM_RECURSIONS;
//           with DECIDES EXPERT, TOKEN or neither (all take all recursions); KV: the rows attend; KV_LENGTHS: KV but for EXIT;
//           KV_SLOTS: the table lists keys, not pages (hybrid caches)
// Limits    params.num_slots <= S; a sequence is its slot
// Numerics  integers; a recursion is taken if its decision >= params.threshold (NaN does not pass) or its capacity is 1
// Source    MoR, continuous depth-wise batching (arXiv 2507.10524, section 4.2)
#import shared/rows
#import shared/scan

struct Params {
    num_slots: u32,
    recursion: u32,
    keep_all: u32,
    num_groups: u32,
    max_pages: u32,
    max_positions: u32,
    threshold: f32,
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
#if RECURSIONS
// (K/V group written, group read, 1 if every token that comes this far takes it, 0)
@group(0) @binding(2) var<uniform> recursions: array<vec4<u32>, NUM_RECURSIONS>;
#endif
@group(0) @binding(3) var<storage, read_write> rows: array<Row>;
@group(0) @binding(4) var<storage, read_write> state: array<vec2<u32>>;
@group(0) @binding(5) var<storage, read_write> active_out: array<ActiveRow>;
@group(0) @binding(6) var<storage, read_write> dispatch: array<u32>;
#if EXPERT
@group(0) @binding(7) var<storage, read> decision: array<f32>;
#endif
#if TOKEN
@group(0) @binding(7) var<storage, read> target_depth: array<u32>;
#endif
#if ENTER
@group(0) @binding(7) var<storage, read_write> next_rows: array<Row>;
#endif
#if KV
@group(0) @binding(8) var<storage, read> pages: array<u32>;
#endif
#if KV_LENGTHS
@group(0) @binding(9) var<storage, read_write> kv_lengths: array<u32>;
#endif
#if KV_SLOTS
@group(0) @binding(10) var<storage, read_write> kv_slots: array<u32>;
#endif

fn is_running(slot: u32) -> bool {
    return (rows[slot].flags & ROW_ACTIVE) != 0u;
}

#if DECIDES
// Whether the token takes the recursion after those it has passed through.
fn goes_on(slot: u32, passes: u32, counted: u32) -> bool {
    if passes >= NUM_RECURSIONS {
        return false;
    }
#if EXPERT
    return counted == passes && (recursions[passes].z != 0u || decision[slot] >= params.threshold);
#elif TOKEN
    return target_depth[slot] > passes;
#else
    return true;
#endif
}
#endif

fn is_listed(slot: u32) -> bool {
#if ENTER
    return !is_running(slot) && (next_rows[slot].flags & ROW_ACTIVE) != 0u;
#elif EXIT
    return is_running(slot) && !goes_on(slot, state[slot].x, state[slot].y);
#elif BLOCK
    return is_running(slot)
        && (goes_on(slot, state[slot].x, state[slot].y) || (state[slot].x == 0u && params.keep_all != 0u));
#else
    return is_running(slot) && state[slot].x == params.recursion + 1u;
#endif
}

#if KV
fn physical(slot: u32, group: u32, index: u32) -> u32 {
    let page = pages[(slot * params.num_groups + group) * params.max_pages + index / PAGE_SIZE];
    return page * PAGE_SIZE + index % PAGE_SIZE;
}
#endif

#if IN_BLOCK
#if KV
// Where the row stores its keys and values at recursion `r`, and which it attends to; `index` is its place in the
// group.
fn place_in_cache(listed: ActiveRow, r: u32, index: u32) -> ActiveRow {
    var entry = listed;
    let groups = recursions[r];
    entry.kv_table = (entry.row * params.num_groups + groups.y) * params.max_pages;
    entry.kv_len = entry.position + 1u;
    if groups.x != NONE {
        entry.kv_slot = physical(entry.row, groups.x, index);
        if groups.x == groups.y {
            entry.kv_len = index + 1u;
        }
    }
    return entry;
}
#endif
#endif

// Moves the slot on and describes its row.
fn list(slot: u32) -> ActiveRow {
#if ENTER
    rows[slot] = next_rows[slot];
    next_rows[slot].flags = 0u;
    state[slot] = vec2<u32>(0u);
#endif
    let row = rows[slot];
    var entry = ActiveRow(slot, slot, row.position, NONE, 0u, 0u, NONE, END_NOTHING);
#if !IN_BLOCK
#if KV
    // Outside the block, every token has an entry at its position.
    entry.kv_slot = physical(slot, 0u, row.position);
    entry.kv_table = slot * params.num_groups * params.max_pages;
    entry.kv_len = row.position + 1u;
#endif
#if KV_LENGTHS
    kv_lengths[slot * params.num_groups] = row.position + 1u;
#endif
#endif
#if EXIT
#if EXPERT
    entry.recursion = state[slot].y;
#else
    entry.recursion = state[slot].x;
#endif
    rows[slot].flags = 0u;
#endif
#if BLOCK
    let passes = state[slot].x;
    let counted = state[slot].y;
    entry.recursion = passes;
#if EXPERT
    let is_selected = goes_on(slot, passes, counted);
    entry.end = select(END_NOTHING, END_GATED, is_selected);
#else
    let is_selected = true;
#endif
#if TOKEN
    entry.end = select(END_PASS, END_GATED, target_depth[slot] == passes + 1u);
#endif
    state[slot] = vec2<u32>(passes + 1u, counted + u32(is_selected));
#if KV
    let group = recursions[passes].x;
    if group != NONE {
        let index = kv_lengths[slot * params.num_groups + group];
        kv_lengths[slot * params.num_groups + group] = index + 1u;
        entry = place_in_cache(entry, passes, index);
    } else {
        entry = place_in_cache(entry, passes, 0u);
    }
#if KV_SLOTS
    // At its first recursion a token's entry stands in for those of all later ones, until they override it.
    entry.kv_len = row.position + 1u;
    entry.kv_table = (slot * params.num_groups + group) * params.max_positions;
    let last = select(group, params.num_groups - 1u, passes == 0u);
    for (var g = group; g <= last; g++) {
        kv_slots[(slot * params.num_groups + g) * params.max_positions + row.position] = entry.kv_slot;
    }
#endif
#endif
#endif
#if AT
    entry.recursion = params.recursion;
#if KV
    let group = recursions[params.recursion].x;
    entry = place_in_cache(entry, params.recursion, kv_lengths[slot * params.num_groups + group] - 1u);
#endif
#endif
    return entry;
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(local_invocation_index) thread: u32) {
    let run = max((params.num_slots + WORKGROUP_SIZE - 1u) / WORKGROUP_SIZE, 1u);
    let first = min(thread * run, params.num_slots);
    let last = min(first + run, params.num_slots);

    var mine = 0u;
    for (var slot = first; slot < last; slot++) {
        mine += u32(is_listed(slot));
    }
    scan(mine, thread);
    let total = counts[WORKGROUP_SIZE - 1u];

    // A slot's fate depends on that slot alone, so it may change while other threads decide.
    var place = counts[thread] - mine;
    for (var slot = first; slot < last; slot++) {
        if is_listed(slot) {
            active_out[place] = list(slot);
            place++;
        }
    }
    for (var i = thread; i < ROW_PADDING; i += WORKGROUP_SIZE) {
        active_out[total + i] = ActiveRow(NONE, 0u, 0u, NONE, 0u, 0u, NONE, END_NOTHING);
    }
    if thread == 0u {
        active_out[arrayLength(&active_out) - 1u].row = total;
        // Rows listed so far: work done, to be checked against depths.
        dispatch[0] += total;
    }
    for (var g = thread; g < grids.count; g += WORKGROUP_SIZE) {
        let grid = grids.entries[g];
        let empty = total == 0u;
        dispatch[4u + 3u * g] = select(grid.x, 0u, empty);
        dispatch[5u + 3u * g] = (total + grid.y - 1u) / grid.y;
        dispatch[6u + 3u * g] = select(grid.z, 0u, empty);
    }
}
