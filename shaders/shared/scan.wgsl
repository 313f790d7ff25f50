// Inclusive scan over a workgroup of WORKGROUP_SIZE threads: afterwards counts[t] is the sum of the values of threads 0 to
// t, for all to read. By runs of threads, then over runs: two short loops cost less than a barrier for every power of
// two. Call in uniform flow, again when all have read. Workgroup memory: 4 * WORKGROUP_SIZE bytes.
const SCAN_RUN: u32 = 16u;
var<workgroup> counts: array<u32, WORKGROUP_SIZE>;

fn scan(value: u32, thread: u32) {
    let first = thread / SCAN_RUN * SCAN_RUN;
    counts[thread] = value;
    workgroupBarrier();
    var sum = 0u;
    for (var t = first; t <= thread; t++) {
        sum += counts[t];
    }
    workgroupBarrier();
    counts[thread] = sum;
    workgroupBarrier();
    // The last thread of a run holds the run's sum.
    for (var t = SCAN_RUN - 1u; t < first; t += SCAN_RUN) {
        sum += counts[t];
    }
    workgroupBarrier();
    counts[thread] = sum;
    workgroupBarrier();
}
