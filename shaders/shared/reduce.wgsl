// Sum over a workgroup of WORKGROUP_SIZE threads; every thread gets the result. Call in uniform flow.
// Workgroup memory: 4 * WORKGROUP_SIZE bytes.
var<workgroup> reduce_scratch: array<f32, WORKGROUP_SIZE>;

fn workgroup_sum(value: f32, thread: u32) -> f32 {
    reduce_scratch[thread] = value;
    workgroupBarrier();
    for (var half = WORKGROUP_SIZE / 2u; half > 0u; half = half / 2u) {
        if thread < half {
            reduce_scratch[thread] += reduce_scratch[thread + half];
        }
        workgroupBarrier();
    }
    let total = reduce_scratch[0];
    // The next call overwrites the scratch.
    workgroupBarrier();
    return total;
}
