// grid_exchange: pass values between all workgroups of a grid, round after round: whether a device can, and what it costs.
// Math      v_0[w] = w mod 1024; v_r[w] = (w + sum of all v_{r-1}) mod 1024; out[w] = v_rounds[w]
// Why       kernels whose workgroups wait for each other need all of them to run at a time, coherent storage to be
//           coherent and 8 bytes to be written at once; no query tells, a trial does
// Shapes    out [num_workgroups]; mail [2, num_workgroups, 2]; control [3]
// Bindings  0 params uniform; 1 out write; 2 mail write; 3 control write
// Grid      (params.num_workgroups, 1, 1), all of which must run at a time
// Spec      WORKGROUP_SIZE power of two; RESERVED vec4s of workgroup memory, so that it takes as much as the kernel
//           that is tried for
// Limits    16 * RESERVED + 4 * WORKGROUP_SIZE + 4 bytes of workgroup memory; a value that is polled params.poll_limit
//           times in vain ends the dispatch: control[2] = 1
// Numerics  integers below 2^24, exact in f32
// Source    Gupta, Stuart and Owens 2012 (doi 10.1109/InPar.2012.6339596); Sorensen et al. 2016 (doi
//           10.1145/2983990.2984032)
#import shared/mailbox
#import shared/reduce

struct Params {
    num_workgroups: u32,
    num_rounds: u32,
    poll_limit: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read_write> out: array<f32>;
@group(0) @binding(2) @coherent var<storage, read_write> mail: array<vec2<u32>>;
@group(0) @binding(3) var<storage, read_write> control: array<atomic<u32>>;

var<workgroup> reserved: array<vec4<f32>, RESERVED>;

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) workgroup_id: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let own = workgroup_id.x;
    // Places that nobody has written have tag 0.
    let first_tag = atomicLoad(&control[0]) + 1u;
    if thread == 0u {
        has_failed = atomicLoad(&control[2]);
        reserved[0].x = f32(own);
    }
    var value = f32(own % 1024u);
    for (var round = 0u; round < params.num_rounds; round++) {
        let box = round % 2u * params.num_workgroups;
        if thread == 0u {
            post(box + own, value, first_tag + round);
        }
        // Nobody waits for a thread of its own workgroup: it might not run meanwhile.
        workgroupBarrier();
        var sum = 0.0;
        for (var w = thread; w < params.num_workgroups; w += WORKGROUP_SIZE) {
            sum += collect(box + w, first_tag + round);
        }
        let total = workgroup_sum(sum, thread);
        if thread == 0u {
            reserved[round % RESERVED].x = f32((u32(total) + own) % 1024u);
            value = reserved[round % RESERVED].x;
        }
        polls = 0u;
        if workgroupUniformLoad(&has_failed) != 0u {
            break;
        }
    }
    if thread == 0u {
        out[own] = value;
        if atomicAdd(&control[1], 1u) == params.num_workgroups - 1u {
            atomicStore(&control[0], first_tag + params.num_rounds - 1u);
            atomicStore(&control[1], 0u);
        }
    }
}
