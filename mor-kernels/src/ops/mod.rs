//! Typed host wrappers, one per kernel, named like its shader.

pub mod attention_decode;
pub mod attention_prefill;
pub mod cross_entropy;
pub mod decode_layers;
pub mod embed_tokens;
pub mod grid_exchange;
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

pub use attention_decode::*;
pub use attention_prefill::*;
pub use cross_entropy::*;
pub use decode_layers::*;
pub use embed_tokens::*;
pub use grid_exchange::*;
pub use linear::*;
pub use linear_decode::*;
pub use read_words::*;
pub use rms_norm::*;
pub use router_expert::*;
pub use router_token::*;
pub use router_topk::*;
pub use sample_partial::*;
pub use sample_token::*;
pub use slots_compact::*;
pub use tokens_compact::*;
