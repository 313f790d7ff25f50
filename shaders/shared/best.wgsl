// The best of a workgroup: (largest key, lowest token that has it). Flags: SUBGROUP.
// Workgroup memory: 16 bytes.
var<workgroup> best_key: atomic<u32>;
var<workgroup> best_token: atomic<u32>;
var<workgroup> best_found: vec2<u32>;

// The best of all threads', (0, NONE) stands for none. Call in uniform flow; the result is uniform.
fn workgroup_best(best: vec2<u32>, thread: u32, lane: u32) -> vec2<u32> {
    if thread == 0u {
        atomicStore(&best_key, 0u);
        atomicStore(&best_token, NONE);
    }
    workgroupBarrier();
#if SUBGROUP
    let subgroup_key = subgroupMax(best.x);
    if lane == 0u {
        atomicMax(&best_key, subgroup_key);
    }
#else
    atomicMax(&best_key, best.x);
#endif
    workgroupBarrier();
    let key = atomicLoad(&best_key);
    if best.x == key {
        atomicMin(&best_token, best.y);
    }
    workgroupBarrier();
    if thread == 0u {
        best_found = vec2<u32>(key, atomicLoad(&best_token));
    }
    return workgroupUniformLoad(&best_found);
}
