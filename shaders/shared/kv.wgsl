// The K/V cache as attention reads it: units of 8 consecutive elements of a head, and the slot of a key.
// The importer binds `kv_table: array<u32>`. Flags: KV_F16 (two elements in a u32, low half first), KV_BLOCKS (8 bits an element,
// mor-kernels/src/kv_blocks.rs), else f32;
// KV_SLOTS (the table lists every key), else the table lists pages of PAGE_SIZE keys.
#if KV_F16
alias KvUnit = vec4<u32>;
fn unpack_kv(u: KvUnit) -> mat2x4<f32> {
    return mat2x4<f32>(
        vec4<f32>(unpack2x16float(u.x), unpack2x16float(u.y)),
        vec4<f32>(unpack2x16float(u.z), unpack2x16float(u.w)),
    );
}
#elif KV_BLOCKS
alias KvUnit = vec2<u32>;
fn unpack_kv(u: KvUnit) -> mat2x4<f32> {
    let scale = unpack2x16float(((u.x >> 28u) | (u.y >> 28u << 4u)) << 7u).x;
    // Codes of 7 bits, whose highest is the sign.
    let low = vec4<i32>(vec4<u32>(u.x) << vec4<u32>(25u, 18u, 11u, 4u)) >> vec4<u32>(25u);
    let high = vec4<i32>(vec4<u32>(u.y) << vec4<u32>(25u, 18u, 11u, 4u)) >> vec4<u32>(25u);
    return mat2x4<f32>(vec4<f32>(low) * scale, vec4<f32>(high) * scale);
}
#else
alias KvUnit = mat2x4<f32>;
fn unpack_kv(u: KvUnit) -> mat2x4<f32> {
    return u;
}
#endif

fn kv_slot(table: u32, key: u32) -> u32 {
#if KV_SLOTS
    return kv_table[table + key];
#else
    return kv_table[table + key / PAGE_SIZE] * PAGE_SIZE + key % PAGE_SIZE;
#endif
}
