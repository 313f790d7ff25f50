//! One module per kernel; `cargo bench -p mor-bench -- rms_norm/` runs one.

mod attention_decode;
mod attention_prefill;
mod cross_entropy;
mod decode_layers;
mod embed_tokens;
mod grid_exchange;
mod kv_pack;
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
use mor_bench::is_wanted;
use mor_kernels::Gpu;

fn main() {
    let gpu = mor_kernels::parity::gpu();
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(std::time::Duration::from_millis(500))
        .measurement_time(std::time::Duration::from_secs(1))
        .configure_from_args();
    type Bench = fn(&mut Criterion, &Gpu);
    let kernels: [(&str, Bench); 18] = [
        ("attention_decode", attention_decode::bench),
        ("attention_prefill", attention_prefill::bench),
        ("cross_entropy", cross_entropy::bench),
        ("decode_layers", decode_layers::bench),
        ("embed_tokens", embed_tokens::bench),
        ("grid_exchange", grid_exchange::bench),
        ("kv_pack", kv_pack::bench),
        ("linear", linear::bench),
        ("linear_decode", linear_decode::bench),
        ("read_words", read_words::bench),
        ("rms_norm", rms_norm::bench),
        ("router_expert", router_expert::bench),
        ("router_token", router_token::bench),
        ("router_topk", router_topk::bench),
        ("sample_partial", sample_partial::bench),
        ("sample_token", sample_token::bench),
        ("slots_compact", slots_compact::bench),
        ("tokens_compact", tokens_compact::bench),
    ];
    for (name, bench) in kernels {
        if is_wanted(&format!("{name}/")) {
            bench(&mut criterion, gpu);
        }
    }
    criterion.final_summary();
}
