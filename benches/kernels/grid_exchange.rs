//! `grid_exchange`: a round in which all workgroups wait for each other: 1, half and all of those that run at a time, of 512
//! threads and 24 KiB each; throughput counts what they write.

use criterion::Criterion;
use mor_bench::{record, time_rounds};
use mor_kernels::gpu::Gpu;
use mor_kernels::ops::{GridExchange, GridExchangeBindings, GridExchangeParams};
use mor_kernels::oracle::grid_exchange::grid_exchange;
use mor_kernels::parity::Output;

const WORKGROUP_SIZE: u32 = 512;
const RESERVED_BYTES: u32 = 24 << 10;
const NUM_ROUNDS: u32 = 200;

pub(crate) fn bench(criterion: &mut Criterion, gpu: &Gpu) {
    let caps = gpu.caps();
    if !caps.coherent_storage || caps.max_workgroup_size < WORKGROUP_SIZE {
        eprintln!("grid_exchange skipped: the device has no coherent storage, or smaller workgroups");
        return;
    }
    let kernel = GridExchange { workgroup_size: WORKGROUP_SIZE, reserved_bytes: RESERVED_BYTES };
    let most = GridExchange::most_workgroups(gpu, WORKGROUP_SIZE, RESERVED_BYTES).expect("the device answers");
    let mut grids = vec![1, most.div_ceil(2), most];
    grids.dedup();
    for num_workgroups in grids {
        let id = num_workgroups.to_string();
        let out = Output::new(gpu, num_workgroups as usize);
        let mail = Output::from_words(gpu, &vec![0; 4 * num_workgroups as usize]);
        let control = Output::from_words(gpu, &[0; 3]);
        let bindings = GridExchangeBindings { out: &out.tensor, mail: &mail.tensor, control: &control.tensor };
        let params =
            GridExchangeParams { num_workgroups, num_rounds: NUM_ROUNDS, poll_limit: GridExchange::POLL_LIMIT };
        let Some(plan) = record(gpu, &id, |plan| kernel.record(plan, bindings, params)) else { continue };
        gpu.run(&plan).expect("the device answers");
        assert_eq!(control.read_u32(gpu), [NUM_ROUNDS, 0, 0], "{id}: all values came");
        let got: Vec<u32> = out.read(gpu).iter().map(|value| *value as u32).collect();
        assert_eq!(got, grid_exchange(num_workgroups, NUM_ROUNDS), "{id}");
        time_rounds(criterion, gpu, "grid_exchange", &id, 8 * u64::from(num_workgroups), &plan, NUM_ROUNDS as usize);
    }
}
