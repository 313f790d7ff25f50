// The K/V cache as attention reads it: units of 8 consecutive elements of a head, and the slot of a key.
// The importer binds `kv_table: array<u32>`. Flags: KV_F16 (two elements in a u32, low half first), else f32;
// KV_SLOTS (the table lists every key), else the table lists pages of PAGE_SIZE keys.
#if KV_F16
alias KvUnit = vec4<u32>;
fn unpack_kv(u: KvUnit) -> mat2x4<f32> {
    return mat2x4<f32>(
        vec4<f32>(unpack2x16float(u.x), unpack2x16float(u.y)),
        vec4<f32>(unpack2x16float(u.z), unpack2x16float(u.w)),
    );
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
