// Row vocabulary: mirrors mor-kernels/src/rows.rs, field by field. The constants NONE, PAGE_SIZE,
// ROW_PADDING, ROW_ACTIVE, ROW_SAMPLE and END_* are added to every specialisation by the host.
struct Row {
    token: u32,
    position: u32,
    sequence: u32,
    flags: u32,
}

struct ActiveRow {
    row: u32,
    sequence: u32,
    position: u32,
    kv_slot: u32,
    kv_len: u32,
    kv_table: u32,
    recursion: u32,
    end: u32,
}
