// How workgroups of one dispatch, which must all run at a time, pass values to each other: an element is written as (bits, tag) in
// one store of 8 bytes, and who needs it reads it until it has the tag of the moment. No barrier and no fence stands between, so
// a value arrives as soon as it can.
//
// The including kernel binds `mail: array<vec2<u32>>`, coherent, and `control: array<atomic<u32>>` with the last tag that is taken,
// workgroups that have left and whether one has waited in vain, and has `params.poll_limit`. A place is written again only
// when all have read it: when all have been waited for since. Between threads of a workgroup a barrier stands as ever.

// Set by a thread that waited in vain, or saw that another did.
var<workgroup> has_failed: u32;
var<private> polls: u32 = 0u;

fn post(at: u32, value: f32, tag: u32) {
    mail[at] = vec2<u32>(bitcast<u32>(value), tag);
}

// Whether to look again for what has not come.
fn keeps_waiting() -> bool {
    polls += 1u;
    if polls % 256u == 0u && atomicLoad(&control[2]) != 0u {
        has_failed = 1u;
    }
    if polls >= params.poll_limit {
        atomicStore(&control[2], 1u);
        has_failed = 1u;
    }
    return has_failed == 0u;
}

// The element at a place.
fn collect(at: u32, tag: u32) -> f32 {
    var element = mail[at];
    while element.y != tag {
        if !keeps_waiting() {
            break;
        }
        element = mail[at];
    }
    return bitcast<f32>(element.x);
}
