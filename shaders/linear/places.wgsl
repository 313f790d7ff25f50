// Places of linear's results: which row and column of a tile, list entries and operands of the epilogue belong to what a lane stores
// of each fragment.

// Row of the tile that place `at` lies in, of the fragments in row m of their subgroups.
fn place_row(at: u32, m: u32) -> u32 {
    return (at / PLACES / SUBGROUPS_N * FRAGMENTS_M + m) * EDGE + at % PLACES / ROW_COLUMNS;
}

// Its first column, of those in column j.
fn place_column(at: u32, j: u32) -> u32 {
    return (at / PLACES % SUBGROUPS_N * FRAGMENTS_N + j) * EDGE + at % ROW_COLUMNS * WIDTH;
}

// The places of a thread; the last one for those that are past the end.
fn own_places(subgroup: u32, lane: u32) -> array<u32, OWN> {
    var places: array<u32, OWN>;
    for (var i = 0u; i < OWN; i++) {
#if SLICED
        places[i] = min(subgroup * SUBGROUP_WIDTH + lane + i * THREADS, SLICE_PLACES - 1u);
#else
        places[i] = subgroup * PLACES + lane + i * SUBGROUP_WIDTH;
#endif
    }
    return places;
}

// Entries of the rows of a thread's places, for all rows of fragments.
fn own_entries(first_entry: u32, places: array<u32, OWN>) -> array<ActiveRow, FRAGMENTS_M * OWN> {
    var own = places;
    var entries: array<ActiveRow, FRAGMENTS_M * OWN>;
    for (var m = 0u; m < FRAGMENTS_M; m++) {
        for (var i = 0u; i < OWN; i++) {
            entries[m * OWN + i] = active_rows[first_entry + place_row(own[i], m)];
        }
    }
    return entries;
}

#if BLOCK_END
// Gates of these rows.
fn own_gates(entries: array<ActiveRow, FRAGMENTS_M * OWN>) -> array<f32, FRAGMENTS_M * OWN> {
    var own = entries;
    var of_rows: array<f32, FRAGMENTS_M * OWN>;
    for (var i = 0u; i < FRAGMENTS_M * OWN; i++) {
        if own[i].row != NONE {
            of_rows[i] = row_gate(own[i]);
        }
    }
    return of_rows;
}

// row_stream of a thread's places in row m of fragments.
fn own_streams(
    first_column: u32,
    places: array<u32, OWN>,
    entries: array<ActiveRow, FRAGMENTS_M * OWN>,
    m: u32,
) -> array<Columns, FRAGMENTS_N * OWN> {
    var at = places;
    var own = entries;
    var streams: array<Columns, FRAGMENTS_N * OWN>;
    for (var j = 0u; j < FRAGMENTS_N; j++) {
        for (var i = 0u; i < OWN; i++) {
            let column = first_column + place_column(at[i], j);
            if own[m * OWN + i].row != NONE && column < params.num_outputs {
                streams[j * OWN + i] = row_stream(own[m * OWN + i], params.first_output + column);
            }
        }
    }
    return streams;
}
#endif

// column_operands of what begins at `column` of those bound here; of columns and rows past the end, nothing that counts.
fn operands_inside(i: u32, entry: ActiveRow, column: u32) -> Operands {
    // In a branch of their own, loads are not moved to where they are needed.
    var is_read = entry.row != NONE && column < params.num_outputs;
#if QKV
#if !DELTA
    // Angles exist for every entry and column, and without a branch compilers see that they lie at the same columns of all
    // rows.
    is_read = true;
#endif
#endif
    var read = Operands();
    if is_read {
        read = column_operands(i, entry, params.first_output + column);
    }
    return read;
}
