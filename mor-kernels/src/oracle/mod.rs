//! CPU references, one per kernel, named like its shader: plain loops on slices with sums in f64.

pub mod attention_decode;
pub mod attention_prefill;
pub mod cross_entropy;
pub mod decode_layers;
pub mod embed_tokens;
pub mod grid_exchange;
pub mod kv_pack;
pub mod linear;
pub mod linear_decode;
pub mod read_words;
pub mod rms_norm;
pub mod router_expert;
pub mod router_token;
pub mod router_topk;
pub mod sample_partial;
pub mod sample_token;
pub mod slots_compact;
pub mod tokens_compact;
