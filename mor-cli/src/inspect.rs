//! `mor inspect`: what a model consists of and what it takes, without a device.

use mor_model::{Checkpoint, KvLayout, KvStrategy, LayerLayout, MorConfig, Quantization};
use mor_runtime::Precision;
use serde::Serialize;

use crate::args::InspectArgs;
use crate::model::Model;
use crate::{print, print_json};

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Report {
    model: String,
    mode: &'static str,
    sharing: &'static str,
    num_recursions: usize,
    kv: &'static str,
    /// Adapters of the shared layers.
    lora: Option<Adapters>,
    /// Whether each recursion multiplies its block's output by a vector of its own.
    recursion_encoding: bool,
    router: Option<String>,
    /// Whether the routers still have the values they started from.
    untrained_router: bool,
    capacity: Option<Vec<f64>>,
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_attention_heads: usize,
    num_key_value_heads: usize,
    head_dim: usize,
    max_position_embeddings: usize,
    /// How the checkpoint's matrices are quantised.
    quantization: Option<&'static str>,
    parameters: Parameters,
    /// Bytes of all distinct weights as stored in the checkpoint.
    checkpoint_bytes: u64,
    weights: Vec<WeightBytes>,
    kv_bytes_per_token: Vec<StrategyBytes>,
    layers: Vec<Layer>,
}

#[derive(Debug, Serialize)]
struct Adapters {
    rank: usize,
    /// What their product is multiplied by.
    scale: f64,
    targets: Vec<&'static str>,
}

#[derive(Debug, Serialize)]
struct Parameters {
    /// Distinct ones.
    unique: u64,
    unique_non_embedding: u64,
    /// Of the unrolled model: a tied layer counts as often as it runs.
    effective: u64,
    effective_non_embedding: u64,
    /// Of adapters and recursion encodings, which the others contain.
    relaxation: u64,
}

/// What the weights take on a device, padding aside.
#[derive(Debug, Serialize)]
struct WeightBytes {
    dtype: &'static str,
    /// What they are quantised to while loading.
    quantize: Option<&'static str>,
    bytes: u64,
}

/// What a cached token takes on average, at the fraction of tokens that `capacity` gives each recursion.
#[derive(Debug, Serialize)]
struct StrategyBytes {
    strategy: &'static str,
    is_configured: bool,
    f32_bytes: f64,
    f16_bytes: f64,
    /// Of a vanilla model of the same depth.
    vanilla_f32_bytes: f64,
    vanilla_f16_bytes: f64,
    ratio: f64,
}

#[derive(Debug, Serialize)]
struct Layer {
    layer: usize,
    /// The first layer with the same tensors.
    owner: usize,
    recursion: Option<u32>,
    /// Prefix of its tensors in the checkpoint.
    prefix: String,
    /// Whether it stores keys and values under the configured strategy.
    stores_kv: bool,
}

pub(crate) fn run(args: &InspectArgs) -> anyhow::Result<()> {
    let model = Model::named(args.model.as_deref())?;
    let report = Report::new(model.name(), &model.checkpoint()?);
    if args.json { print_json(&report) } else { Ok(print(&report.to_text())?) }
}

impl Report {
    fn new(model: String, checkpoint: &Checkpoint) -> Self {
        let config = checkpoint.config();
        let counts = checkpoint.parameter_counts();
        let kv = KvLayout::new(config, checkpoint.layout());
        let layers = checkpoint.layout().layers().iter().enumerate();
        Self {
            model,
            mode: config.mode.as_str(),
            sharing: config.sharing.as_str(),
            num_recursions: config.num_recursions,
            kv: config.kv.as_str(),
            lora: config.lora.as_ref().map(|lora| Adapters {
                rank: lora.rank,
                scale: lora.scale(),
                targets: lora.targets.iter().map(|target| target.name()).collect(),
            }),
            recursion_encoding: config.recursion_encoding,
            router: config
                .is_routed()
                .then(|| format!("{}, {}, alpha {}", config.router_type, config.router_func, config.alpha)),
            untrained_router: config.untrained_router,
            capacity: config.is_routed().then(|| config.capacity.clone()),
            vocab_size: config.vocab_size,
            hidden_size: config.hidden_size,
            intermediate_size: config.intermediate_size,
            num_attention_heads: config.num_attention_heads,
            num_key_value_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
            max_position_embeddings: config.max_position_embeddings,
            quantization: config.quantization.map(Quantization::as_str),
            parameters: Parameters {
                unique: counts.unique(),
                unique_non_embedding: counts.unique_non_embedding,
                effective: counts.effective(),
                effective_non_embedding: counts.effective_non_embedding,
                relaxation: counts.relaxation,
            },
            checkpoint_bytes: counts.unique_bytes,
            weights: weights(checkpoint),
            kv_bytes_per_token: KvStrategy::ALL.iter().filter_map(|&kv| strategy_bytes(config, kv)).collect(),
            layers: layers
                .map(|(index, layer)| Layer {
                    layer: index,
                    owner: layer.owner,
                    recursion: layer.recursion,
                    prefix: layer.prefix.clone(),
                    stores_kv: kv.layer(index).write_group.is_some(),
                })
                .collect(),
        }
    }

    fn to_text(&self) -> String {
        let mut lines = vec![
            format!("model             {}", self.model),
            match self.num_recursions {
                1 => format!("mode              {}", self.mode),
                n => format!("mode              {}, {n} recursions, sharing {}", self.mode, self.sharing),
            },
        ];
        let untrained = if self.untrained_router { "; untrained, depths mean nothing yet" } else { "" };
        lines.extend(self.router.iter().map(|router| format!("router            {router}{untrained}")));
        lines.extend([
            format!(
                "shape             {} layers, hidden {}, MLP {}, {} heads of {}, {} K/V heads, vocabulary {}",
                self.layers.len(),
                self.hidden_size,
                self.intermediate_size,
                self.num_attention_heads,
                self.head_dim,
                self.num_key_value_heads,
                self.vocab_size
            ),
            format!("context           {} tokens", self.max_position_embeddings),
            format!(
                "parameters        {} unique ({} without embeddings), {} effective ({} without embeddings)",
                millions(self.parameters.unique),
                millions(self.parameters.unique_non_embedding),
                millions(self.parameters.effective),
                millions(self.parameters.effective_non_embedding)
            ),
        ]);
        let adapters = self.lora.as_ref().map(|lora| {
            format!("adapters of rank {}, factor {}, for {}", lora.rank, lora.scale, lora.targets.join(", "))
        });
        let encoding = self.recursion_encoding.then(|| "recursion encodings".to_owned());
        let relaxations: Vec<String> = adapters.into_iter().chain(encoding).collect();
        if !relaxations.is_empty() {
            let count = self.parameters.relaxation;
            lines.push(format!("relaxed by        {} ({count} parameters)", relaxations.join("; ")));
        }
        lines.extend(self.quantization.map(|format| format!("quantised         {format}")));
        for WeightBytes { dtype, quantize, bytes } in &self.weights {
            let quantize = quantize.map_or(String::new(), |format| format!(" --quantize {format}"));
            lines.push(format!("weights on GPU    {} with --dtype {dtype}{quantize}", bytes_text(*bytes)));
        }
        lines
            .extend([String::new(), "K/V bytes per token     f32     f16  vanilla f32  vanilla f16  ratio".to_owned()]);
        for kv in &self.kv_bytes_per_token {
            lines.push(format!(
                "  {:<16}{:>9.0}{:>8.0}{:>13.0}{:>13.0}{:>7.2}{}",
                kv.strategy,
                kv.f32_bytes,
                kv.f16_bytes,
                kv.vanilla_f32_bytes,
                kv.vanilla_f16_bytes,
                kv.ratio,
                if kv.is_configured { "  (configured)" } else { "" }
            ));
        }
        if self.capacity.is_some() {
            lines.push("  at the fraction of tokens that the config's capacity gives each recursion".to_owned());
        }
        lines.extend([String::new(), "layer  owner  recursion  K/V     tensors".to_owned()]);
        for layer in &self.layers {
            lines.push(format!(
                "{:>5}{:>7}{:>11}  {:<6}  {}",
                layer.layer,
                layer.owner,
                layer.recursion.map_or("-".to_owned(), |r| r.to_string()),
                if layer.stores_kv { "own" } else { "shared" },
                layer.prefix
            ));
        }
        lines.join("\n") + "\n"
    }
}

/// The ways to load a checkpoint: a quantised one only as it is.
fn weights(checkpoint: &Checkpoint) -> Vec<WeightBytes> {
    let formats: &[Quantization] = if checkpoint.config().quantization.is_some() { &[] } else { Quantization::ALL };
    let plain = [(Precision::F32, None), (Precision::F16, None)].into_iter();
    let ways = plain.chain(formats.iter().map(|format| (Precision::F16, Some(*format))));
    ways.map(|(precision, quantize)| WeightBytes {
        dtype: precision.as_str(),
        quantize: quantize.map(Quantization::as_str),
        bytes: checkpoint.device_bytes(precision, quantize),
    })
    .collect()
}

/// `None` for a strategy that the mode does not have.
fn strategy_bytes(config: &MorConfig, kv: KvStrategy) -> Option<StrategyBytes> {
    let is_configured = config.kv == kv;
    let config = config.with_kv(kv).ok()?;
    let layout = KvLayout::new(&config, &LayerLayout::new(&config));
    let f32_bytes = layout.bytes_per_token(&config.capacity, 4);
    let f16_bytes = layout.bytes_per_token(&config.capacity, 2);
    Some(StrategyBytes {
        strategy: kv.as_str(),
        is_configured,
        f32_bytes: f32_bytes.model,
        f16_bytes: f16_bytes.model,
        vanilla_f32_bytes: f32_bytes.vanilla,
        vanilla_f16_bytes: f16_bytes.vanilla,
        ratio: f32_bytes.ratio(),
    })
}

fn millions(count: u64) -> String {
    format!("{:.2} M", count as f64 / 1e6)
}

/// Bytes in the unit that leaves one to three digits before the point.
pub(crate) fn bytes_text(bytes: u64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if bytes < 1024 { format!("{bytes} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_embedded_model_is_described() {
        let model = Model::Embedded;
        let report = Report::new(model.name(), &model.checkpoint().unwrap());
        let owners: Vec<usize> = report.layers.iter().map(|layer| layer.owner).collect();
        assert_eq!(owners, [0, 1, 2, 3, 1, 2, 3, 1, 2, 3, 10]);
        assert!((4_730_000..4_750_000).contains(&report.parameters.unique), "{:?}", report.parameters);
        assert!(report.parameters.effective > report.parameters.unique);
        // Stored as bfloat16, which both precisions keep, and quantised to 8.5 bits and, but for the embedding, 5.
        let bytes: Vec<_> = report.weights.iter().map(|w| w.bytes as f64 / report.checkpoint_bytes as f64).collect();
        assert_eq!(bytes[..2], [1.0; 2]);
        assert!((bytes[2] - 8.5 / 16.0).abs() < 0.01 && (0.31..0.45).contains(&bytes[3]), "{bytes:?}");
        // A key and a value of 2 heads of 64 in each of 11 layers.
        let own = &report.kv_bytes_per_token[0];
        assert_eq!((own.strategy, own.is_configured), ("recursion_wise", true));
        assert_eq!(own.vanilla_f16_bytes, 2.0 * 128.0 * 11.0 * 2.0);
        assert!((own.ratio - 8.0 / 11.0).abs() < 1e-9, "{}", own.ratio);
        let text = report.to_text();
        assert!(text.contains("    4      1          1  own     model.layers.2.block.0"), "{text}");
    }

    #[test]
    fn relaxations_are_described() {
        let folder = mor_model::golden::fixtures_dir().with_file_name("relaxed").join("expert_middle_cycle_r3_both");
        let report = Report::new("relaxed".to_owned(), &Checkpoint::open(folder).unwrap());
        // Six layers of four adapters of rank 4: of q and o 24 x 24, of v 8 x 24, of down 24 x 20; three encodings.
        assert_eq!(report.parameters.relaxation, 6 * 4 * (2 * 48 + 32 + 44) + 3 * 24);
        let text = report.to_text();
        let line = "relaxed by        adapters of rank 4, factor 1.5, for q_proj, v_proj, o_proj, down_proj; \
                    recursion encodings (4200 parameters)";
        assert!(text.contains(line), "{text}");
    }

    #[test]
    fn bytes_are_readable() {
        assert_eq!(bytes_text(1023), "1023 B");
        assert_eq!(bytes_text(1536), "1.5 KiB");
        assert_eq!(bytes_text(9 << 20), "9.0 MiB");
        assert_eq!(bytes_text(u64::MAX), "16777216.0 TiB");
    }
}
