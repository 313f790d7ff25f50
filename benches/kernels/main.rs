//! One module per kernel; `cargo bench -p mor-bench -- rms_norm` runs one.

mod attention_decode;
mod attention_prefill;
mod cross_entropy;
mod decode_layers;
mod embed_tokens;
mod grid_exchange;
mod linear;
mod linear_decode;
mod read_words;
mod rms_norm;
mod router_expert;
mod router_token;
mod router_topk;
mod sample_partial;
mod sample_token;
mod slots_compact;
mod tokens_compact;

use criterion::Criterion;

fn main() {
    let gpu = mor_kernels::parity::gpu();
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(std::time::Duration::from_millis(500))
        .measurement_time(std::time::Duration::from_secs(1))
        .configure_from_args();
    attention_decode::bench(&mut criterion, gpu);
    attention_prefill::bench(&mut criterion, gpu);
    cross_entropy::bench(&mut criterion, gpu);
    decode_layers::bench(&mut criterion, gpu);
    embed_tokens::bench(&mut criterion, gpu);
    grid_exchange::bench(&mut criterion, gpu);
    linear::bench(&mut criterion, gpu);
    linear_decode::bench(&mut criterion, gpu);
    read_words::bench(&mut criterion, gpu);
    rms_norm::bench(&mut criterion, gpu);
    router_expert::bench(&mut criterion, gpu);
    router_token::bench(&mut criterion, gpu);
    router_topk::bench(&mut criterion, gpu);
    sample_partial::bench(&mut criterion, gpu);
    sample_token::bench(&mut criterion, gpu);
    slots_compact::bench(&mut criterion, gpu);
    tokens_compact::bench(&mut criterion, gpu);
    criterion.final_summary();
}
