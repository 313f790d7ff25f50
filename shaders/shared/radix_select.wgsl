// 256 bins of weight, and the bin at which a wanted weight is reached from the top: one digit of a radix selection.
//
// A weight is x * 2^13 + y in two words, y below 2^13 once carried: up to 2^18 terms of up to 2^26 add up exactly with
// 32-bit atomics, so no result depends on the order in which they arrive.
// Every function is called in uniform flow except bins_add. WORKGROUP_SIZE is 16 at least.
// Workgroup memory: 2192 bytes.
const WEIGHT_LOW_BITS: u32 = 13u;
const NUM_BINS: u32 = 256u;

var<workgroup> bin_high: array<atomic<u32>, NUM_BINS>;
var<workgroup> bin_low: array<atomic<u32>, NUM_BINS>;
var<workgroup> bin_group: array<vec2<u32>, 16>;
var<workgroup> bin_found: vec4<u32>;

fn weight_carried(weight: vec2<u32>) -> vec2<u32> {
    return vec2<u32>(weight.x + (weight.y >> WEIGHT_LOW_BITS), weight.y & ((1u << WEIGHT_LOW_BITS) - 1u));
}

fn weight_is_less(a: vec2<u32>, b: vec2<u32>) -> bool {
    return a.x < b.x || (a.x == b.x && a.y < b.y);
}

fn bin_weight(bin: u32) -> vec2<u32> {
    return vec2<u32>(atomicLoad(&bin_high[bin]), atomicLoad(&bin_low[bin]));
}

fn bins_clear(thread: u32) {
    for (var bin = thread; bin < NUM_BINS; bin += WORKGROUP_SIZE) {
        atomicStore(&bin_high[bin], 0u);
        atomicStore(&bin_low[bin], 0u);
    }
    workgroupBarrier();
}

// Adds `weight` <= 2^26 to a bin.
fn bins_add(bin: u32, weight: u32) {
    let carried = weight_carried(vec2<u32>(0u, weight));
    // Small weights and counts touch one word only.
    if carried.x != 0u {
        atomicAdd(&bin_high[bin], carried.x);
    }
    if carried.y != 0u {
        atomicAdd(&bin_low[bin], carried.y);
    }
}

// Ends the additions; the weight of all bins.
fn bins_sum(thread: u32) -> vec2<u32> {
    workgroupBarrier();
    if thread < 16u {
        var sum = vec2<u32>(0u);
        for (var bin = 16u * thread; bin < 16u * thread + 16u; bin++) {
            sum += bin_weight(bin);
        }
        bin_group[thread] = sum;
    }
    workgroupBarrier();
    var total = vec2<u32>(0u);
    for (var group = 0u; group < 16u; group++) {
        total += bin_group[group];
    }
    return weight_carried(total);
}

// After bins_sum: (bin, weight above it), where bin is the highest one such that `above` and the bins from the top down
// to it weigh `wanted` > above at least; bin 0 if all together do not. The weight returned includes `above`.
fn bins_find(above: vec2<u32>, wanted: vec2<u32>, thread: u32) -> vec4<u32> {
    for (var bin = thread; bin < NUM_BINS; bin += WORKGROUP_SIZE) {
        var sum = above;
        for (var group = bin / 16u + 1u; group < 16u; group++) {
            sum += bin_group[group];
        }
        for (var other = bin + 1u; other % 16u != 0u; other++) {
            sum += bin_weight(other);
        }
        let before = weight_carried(sum);
        let reached = !weight_is_less(weight_carried(sum + bin_weight(bin)), wanted);
        // One bin is the first to reach the weight, or bin 0 stands for "never".
        if weight_is_less(before, wanted) && (reached || bin == 0u) {
            bin_found = vec4<u32>(bin, before, 0u);
        }
    }
    return workgroupUniformLoad(&bin_found);
}
