//! One module per kernel; `cargo bench -p mor-bench -- rms_norm` runs one.

mod cross_entropy;
mod embed_tokens;
mod linear;
mod rms_norm;

use criterion::Criterion;

fn main() {
    let gpu = mor_kernels::parity::gpu();
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(std::time::Duration::from_millis(500))
        .measurement_time(std::time::Duration::from_secs(1))
        .configure_from_args();
    cross_entropy::bench(&mut criterion, gpu);
    embed_tokens::bench(&mut criterion, gpu);
    linear::bench(&mut criterion, gpu);
    rms_norm::bench(&mut criterion, gpu);
    criterion.final_summary();
}
