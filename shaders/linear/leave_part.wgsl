// Of a product in parts: a workgroup leaves the sums of its part, and ends unless it is the last one of its tile. Nobody waits for
// another, so it does not matter which workgroups run at a time.
    let lane_of_all = subgroup * SUBGROUP_WIDTH + lane;
    let tile = workgroup.y * ((params.num_outputs + TILE_N - 1u) / TILE_N) + workgroup.x;
    let first_place = tile * K_PARTS * TILE_PLACES;
#repeat m FRAGMENTS_M
#repeat j FRAGMENTS_N
    coopStoreT(sums[m * FRAGMENTS_N + j], &scratch[subgroup * PLACES], ROW_COLUMNS);
#if SLICED
    workgroupBarrier();
#else
    subgroupBarrier();
#endif
    for (var i = 0u; i < OWN; i++) {
        var v = Columns();
        for (var s = 0u; s < SPLIT_K; s++) {
            v += scratch[s * SLICE_PLACES + places[i]];
        }
        part_sums[first_place + workgroup.z * TILE_PLACES + part_place(m, j, i, lane_of_all)] = v;
    }
#if SLICED
    workgroupBarrier();
#else
    subgroupBarrier();
#endif
#endrepeat
#endrepeat
    // WGSL has these barriers order what a workgroup's own threads see. SPIR-V, which is where matrices of 16x16 come from, makes
    // them barriers of the device: sums are there before the count says so, and are read after it.
    storageBarrier();
    if thread == 0u {
        arrived.x = atomicAdd(&arrivals[tile], 1u) + 1u;
    }
    if workgroupUniformLoad(&arrived).x < K_PARTS {
        return;
    }
    if thread == 0u {
        atomicStore(&arrivals[tile], 0u);
    }
    storageBarrier();
