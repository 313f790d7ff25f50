//! The specialisations that can exist: every kernel, for every kind of device, in every value of its flags and in
//! the sizes that change its text. Tests translate and inspect them without a GPU.

use std::fmt::Debug;
use std::mem::discriminant;

use crate::caps::DeviceCaps;
use crate::epilogue::EpilogueKind;
use crate::kernel::{self, Kernel};
use crate::ops::{
    AttentionDecode, AttentionPrefill, AttentionShape, CrossEntropy, DecodeLayers, EmbedTokens, ExpertGate,
    GridExchange, KvPack, LayerRouting, LayersShape, Linear, LinearDecode, LinearTile, PrologueKind, ReadWords,
    RmsNorm, RouterExpert, RouterToken, RouterTopk, SamplePartial, SampleToken, SlotsCompact, TokenGate, TokensCompact,
};
use crate::rows::KvTable;
use crate::tensor::DType;

/// Storage buffers a stage can bind under WebGPU's default limits.
pub const WEBGPU_STORAGE_BUFFERS: u32 = 8;
/// Workgroup memory under WebGPU's default limits, bytes.
pub const WEBGPU_WORKGROUP_STORAGE_BYTES: u32 = 16 << 10;
/// Invocations of a workgroup under WebGPU's default limits.
pub const WEBGPU_WORKGROUP_SIZE: u32 = 256;
/// Workgroup memory of every device that is not clamped, bytes: the least that Metal and the desktop drivers offer.
pub const NATIVE_WORKGROUP_STORAGE_BYTES: u32 = 32 << 10;
/// Workgroup memory of every device with cooperative matrices of 16x16, bytes: the least of their drivers, NVIDIA's.
pub const COOPERATIVE_WORKGROUP_STORAGE_BYTES: u32 = 48 << 10;

/// Types of vectors and routers.
const PLAIN_DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];
/// Types of matrices.
const WEIGHT_DTYPES: [DType; 5] = [DType::F32, DType::F16, DType::BF16, DType::Q8, DType::Q4];

/// One specialisation on one kind of device.
#[derive(Clone, Debug)]
pub struct Variant {
    /// [`Kernel::NAME`].
    pub kernel: &'static str,
    /// The kernel's fields and the device, for messages.
    pub description: String,
    /// What the driver receives.
    pub wgsl: String,
    /// Flags of the specialisation.
    pub flags: Vec<&'static str>,
    /// Constants of the specialisation, without those that every kernel gets.
    pub constants: Vec<&'static str>,
    /// [`Kernel::workgroup_storage_bytes`].
    pub workgroup_storage_bytes: u32,
    /// Size of [`Kernel::Params`].
    pub params_bytes: usize,
    /// What the device offers.
    pub caps: DeviceCaps,
}

impl Variant {
    /// Whether the device is clamped to WebGPU's default limits.
    pub fn has_webgpu_limits(&self) -> bool {
        self.caps.max_workgroup_storage_bytes == WEBGPU_WORKGROUP_STORAGE_BYTES
    }
}

/// The kinds of devices that specialisations tell apart, each with its own limits and then with WebGPU's.
fn devices() -> Vec<(String, DeviceCaps)> {
    // Smallest and largest subgroup. 8 is llvmpipe with 256-bit vectors, 32 NVIDIA and Apple, 64 AMD GCN, 32 to 64
    // AMD RDNA, 8 to 32 Intel, 4 and 16 Arm; 4 to 128 is what WebGPU leaves open.
    let subgroups = [(4, 4), (8, 8), (16, 16), (32, 32), (64, 64), (32, 64), (8, 32), (4, 128)];
    let kinds = [(true, None), (true, Some((4, 4))), (true, Some((8, 8))), (false, None)]
        .into_iter()
        .chain(subgroups.map(|sizes| (false, Some(sizes))))
        .map(|(is_cpu, sizes)| (is_cpu, sizes, None))
        .chain([16, 8].map(|edge| (false, Some((32, 32)), Some(edge))));
    let mut devices = Vec::new();
    for (is_cpu, subgroup_sizes, cooperative_matrices) in kinds {
        for webgpu_limits in [false, true] {
            let caps = DeviceCaps {
                subgroup_sizes,
                shader_f16: cooperative_matrices.is_some(),
                cooperative_matrices,
                packed_dots: subgroup_sizes == Some((32, 32)),
                coherent_storage: !webgpu_limits,
                timestamps: false,
                max_storage_binding_bytes: 128 << 20,
                max_buffer_bytes: 256 << 20,
                max_workgroup_storage_bytes: if webgpu_limits {
                    WEBGPU_WORKGROUP_STORAGE_BYTES
                } else if cooperative_matrices == Some(16) {
                    COOPERATIVE_WORKGROUP_STORAGE_BYTES
                } else {
                    NATIVE_WORKGROUP_STORAGE_BYTES
                },
                max_workgroup_size: if webgpu_limits { WEBGPU_WORKGROUP_SIZE } else { 1024 },
                max_workgroups: 65535,
                max_storage_buffers: if webgpu_limits { WEBGPU_STORAGE_BUFFERS } else { 32 },
                uniform_alignment: 256,
                storage_alignment: 256,
                is_cpu,
            };
            let name = format!(
                "{} with {}{}{}",
                if is_cpu { "CPU" } else { "GPU" },
                subgroup_sizes.map_or("no subgroups".to_owned(), |(min, max)| format!("subgroups of {min} to {max}")),
                cooperative_matrices
                    .map_or(String::new(), |edge| format!(" and cooperative matrices of {edge}x{edge}")),
                if webgpu_limits { " and WebGPU's limits" } else { "" },
            );
            devices.push((name, caps));
        }
    }
    devices
}

struct List {
    device: String,
    caps: DeviceCaps,
    /// Number of the kind of device, the same with either limits: where the turns begin of what takes turns.
    turn: usize,
    variants: Vec<Variant>,
}

impl List {
    /// Whether most GPUs are of this kind: NVIDIA's and Apple's.
    fn is_likeliest(&self) -> bool {
        self.caps.subgroup_sizes == Some((32, 32)) && self.caps.cooperative_matrices.is_none()
    }

    fn add<K: Kernel + Debug>(&mut self, kernel: &K) {
        let definitions = kernel.definitions(&self.caps);
        self.variants.push(Variant {
            kernel: K::NAME,
            description: format!("{kernel:?} on a {}", self.device),
            wgsl: kernel::wgsl(kernel, &self.caps).expect("directives of ours are well-formed"),
            flags: definitions.flags().collect(),
            constants: definitions.constants().collect(),
            workgroup_storage_bytes: kernel.workgroup_storage_bytes(&self.caps),
            params_bytes: size_of::<K::Params>(),
            caps: self.caps.clone(),
        });
    }
}

/// The specialisations of every kernel on every kind of device; many share their text.
///
/// Flags and sizes that meet in a shader are combined. Those that do not, as the epilogue of a linear kernel and the type
/// of its weight, are combined in full on the likeliest kind of device or in one tile of each kind, and take turns on the
/// others: each value is on every device, each combination on some.
pub fn all() -> Vec<Variant> {
    let mut variants = Vec::new();
    for (i, (device, caps)) in devices().into_iter().enumerate() {
        let mut list = List { device, caps, turn: i / 2, variants };
        add_attention(&mut list);
        add_linear(&mut list);
        add_linear_decode(&mut list);
        add_routers(&mut list);
        add_tokens_compact(&mut list);
        add_slots_compact(&mut list);
        add_decode_layers(&mut list);
        list.add(&CrossEntropy::default());
        for half_output in [false, true] {
            let kernel = RmsNorm::new(&list.caps, 960);
            list.add(&RmsNorm { half_output, ..kernel });
        }
        list.add(&KvPack::default());
        list.add(&ReadWords::new(&list.caps));
        list.add(&SamplePartial::new(&list.caps));
        list.add(&SampleToken::new(&list.caps));
        for dtype in WEIGHT_DTYPES {
            list.add(&EmbedTokens::new(dtype));
        }
        variants = list.variants;
    }
    variants
}

fn add_attention(list: &mut List) {
    // Groups of 1, 3 and 5 query heads: the last needs several workgroups. Head sizes up to the largest, one that is
    // no power of two.
    let heads = [[9, 3, 8], [9, 3, 16], [9, 3, 64], [4, 4, 64], [10, 2, 64], [9, 3, 72], [9, 3, 128], [9, 3, 256]];
    for [num_attention_heads, num_key_value_heads, head_dim] in heads {
        for kv_dtype in [DType::F32, DType::F16, DType::Block8] {
            for kv_table in [KvTable::Pages, KvTable::Slots] {
                let shape = AttentionShape { num_attention_heads, num_key_value_heads, head_dim, kv_dtype, kv_table };
                for (num_rows, half_products) in [(1, false), (1, true), (2700, true), (4096, true)] {
                    let kernel = AttentionPrefill::new(shape, num_rows, half_products);
                    list.add(&kernel);
                    if kernel.can_write_halves(&list.caps) {
                        list.add(&AttentionPrefill { half_output: true, ..kernel });
                    }
                }
                for num_splits in [1, 2, 8] {
                    list.add(&AttentionDecode::new(shape, num_splits, &list.caps));
                }
            }
        }
    }
}

/// What a linear kernel that reads `prologue` can end with. Deltas come where a norm is, fused or apart; encodings, where a
/// layer ends, after a compact input: beside a norm they would be one storage buffer too many.
fn epilogues(prologue: PrologueKind) -> impl Iterator<Item = EpilogueKind> {
    let (compact, norm) = (prologue == PrologueKind::Compact, prologue == PrologueKind::Norm);
    EpilogueKind::ALL.into_iter().filter(move |kind| compact || !kind.is_encoded() && (norm || !kind.has_delta()))
}

fn add_linear(list: &mut List) {
    use PrologueKind as P;
    let mut tiles = Vec::new();
    for max_rows in [1, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1366, 1536, 2048, 4096] {
        for num_outputs in [34, 960, 1600, 2048, 3072, 4096, 5120, 49152] {
            for half_products in [false, true] {
                let tile = LinearTile::for_shape(&list.caps, [max_rows, num_outputs], half_products);
                if !tiles.contains(&tile) {
                    tiles.push(tile);
                }
            }
        }
    }
    for (t, tile) in tiles.iter().copied().enumerate() {
        // The first tile of its kind has every type of weight. In the others the types take turns: what unpacks them is
        // the same in all tiles of a kind.
        let of_kind = |other: &LinearTile| discriminant(other) == discriminant(&tile);
        let is_first = !tiles[..t].iter().any(of_kind);
        let [tile_m, tile_n] = tile.size();
        let mut turn = (tile_m + tile_n) as usize / 16;
        let prologues = [P::Compact, P::Stream, P::Norm];
        for prologue in prologues.into_iter().filter(|prologue| *prologue != P::Norm || tile.fuses_norm()) {
            for epilogue in epilogues(prologue) {
                for (i, weight_dtype) in WEIGHT_DTYPES.into_iter().enumerate() {
                    if is_first || i == turn % WEIGHT_DTYPES.len() {
                        list.add(&Linear { in_features: 960, weight_dtype, prologue, epilogue, tile });
                    }
                }
                turn += 1;
            }
        }
        if tile.multiplies_halves() {
            let scaled = P::Scaled { num_parts: 16 };
            for (prologue, epilogue) in [
                (P::CompactF16, EpilogueKind::Residual),
                (P::CompactF16, EpilogueKind::Scaled),
                (P::StreamF16, EpilogueKind::QkvF16),
                (P::Compact, EpilogueKind::SwiGluF16),
                (scaled, EpilogueKind::SwiGluF16),
                (scaled, EpilogueKind::QkvF16),
            ] {
                for weight_dtype in WEIGHT_DTYPES {
                    list.add(&Linear { in_features: 960, weight_dtype, prologue, epilogue, tile });
                }
            }
        }
    }
    for max_rows in [170, 256, 341, 512] {
        let in_features = 8192;
        let Some(tile) = LinearTile::in_parts(&list.caps, [max_rows, 2048], max_rows, in_features) else {
            continue;
        };
        for (i, weight_dtype) in WEIGHT_DTYPES.into_iter().enumerate() {
            let ends = [EpilogueKind::Residual, EpilogueKind::Scaled, EpilogueKind::BlockEndExpert];
            for (prologue, epilogue) in [(P::CompactF16, ends[i % 3]), (P::Stream, EpilogueKind::Store)] {
                list.add(&Linear { in_features, weight_dtype, prologue, epilogue, tile });
            }
        }
    }
}

fn add_linear_decode(list: &mut List) {
    use PrologueKind as P;
    // The likeliest device has every combination. On the others each prologue meets each epilogue once; types of weights
    // take turns, with a single row and without, and begin elsewhere on each device.
    let mut turn = list.turn;
    for prologue in [P::Compact, P::Stream, P::Norm, P::Merge { num_splits: 2, head_dim: 64 }] {
        for epilogue in epilogues(prologue) {
            for (i, dtype) in WEIGHT_DTYPES.into_iter().enumerate() {
                for single_row in [false, true] {
                    if list.is_likeliest() || 2 * i + usize::from(single_row) == turn % (2 * WEIGHT_DTYPES.len()) {
                        let kernel = LinearDecode::new(&list.caps, [2560, 960], dtype, prologue, epilogue, 1);
                        list.add(&LinearDecode { single_row, ..kernel });
                    }
                }
            }
            turn += 1;
        }
    }
    // Activations staged at once and in chunks, with each number of rows: together these decide what is staged.
    for prologue in [P::Compact, P::Stream, P::Norm, P::Merge { num_splits: 8, head_dim: 64 }] {
        // A stream is staged as a compact input is.
        if prologue == P::Stream && !list.is_likeliest() {
            continue;
        }
        let epilogue = EpilogueKind::Store;
        for in_features in [960, 8192] {
            for max_rows in [1, 2, 4, 8] {
                for dtype in [DType::F16, DType::Q8, DType::Q4] {
                    list.add(&LinearDecode::new(&list.caps, [98, in_features], dtype, prologue, epilogue, max_rows));
                }
            }
        }
        // Many outputs have larger workgroups.
        list.add(&LinearDecode::new(&list.caps, [5120, 960], DType::F16, prologue, epilogue, 8));
    }
}

fn add_routers(list: &mut List) {
    list.add(&RouterTopk::default());
    for weight_dtype in PLAIN_DTYPES {
        for x_by_row in [false, true] {
            for gate in [ExpertGate::Sigmoid, ExpertGate::Tanh, ExpertGate::None] {
                for (logit_only, scripted) in [(false, false), (true, false), (false, true), (true, true)] {
                    let kernel = RouterExpert::new(&list.caps, 960);
                    let kernel = RouterExpert { gate, weight_dtype, x_by_row, logit_only, scripted, ..kernel };
                    list.add(&kernel);
                    if x_by_row && !logit_only {
                        list.add(&RouterExpert { norms: true, ..kernel });
                    }
                }
            }
            for num_recursions in [2, 3, 4, 16] {
                for gate in [TokenGate::Softmax, TokenGate::Sigmoid] {
                    for bias in [false, true] {
                        let kernel = RouterToken::new(num_recursions);
                        list.add(&RouterToken { gate, weight_dtype, x_by_row, bias, ..kernel });
                    }
                }
            }
        }
    }
}

fn add_tokens_compact(list: &mut List) {
    let most = list.caps.max_workgroup_size;
    for mode in ["BEGIN", "EXPERT", "TOKEN", "FIXED", "SAMPLE", "ENDS"] {
        for (kv, kv_slots) in [(false, false), (true, false), (true, true)] {
            for workgroup_size in [32, 64, 128, 256, 512, 1024].into_iter().filter(|size| *size <= most) {
                let rows_each = if workgroup_size == most { 4 } else { 1 };
                let kernel = TokensCompact { mode, kv, kv_slots, first: false, workgroup_size, rows_each };
                list.add(&kernel);
                if mode == "BEGIN" && kv && !kv_slots {
                    list.add(&TokensCompact { first: true, ..kernel });
                }
            }
        }
    }
}

fn add_slots_compact(list: &mut List) {
    let rules = [None, Some("EXPERT"), Some("TOKEN")];
    for (phase, rules) in [("EXIT", &rules[..]), ("ENTER", &rules[..1]), ("BLOCK", &rules[..]), ("AT", &rules[..1])] {
        for rule in rules.iter().copied() {
            for (kv, kv_slots) in [(false, false), (true, false), (true, phase == "BLOCK")] {
                for workgroup_size in [32, 256] {
                    list.add(&SlotsCompact { phase, rule, kv, kv_slots, num_recursions: 3, workgroup_size });
                }
            }
        }
    }
}

/// Kernels whose workgroups wait for each other: devices without coherent storage have none.
fn add_decode_layers(list: &mut List) {
    if !list.caps.coherent_storage {
        return;
    }
    for (workgroup_size, reserved_bytes) in [(256, 0), (512, 24 << 10)] {
        list.add(&GridExchange { workgroup_size, reserved_bytes });
    }
    let expert = |gate, scripted| LayerRouting::Expert { gate, scripted };
    let token = |gate, bias| LayerRouting::Token { gate, bias, num_recursions: 3 };
    let routings = [
        LayerRouting::Fixed,
        expert(ExpertGate::Sigmoid, false),
        expert(ExpertGate::Sigmoid, true),
        expert(ExpertGate::Tanh, false),
        expert(ExpertGate::None, true),
        token(TokenGate::Softmax, false),
        token(TokenGate::Softmax, true),
        token(TokenGate::Sigmoid, false),
        token(TokenGate::Sigmoid, true),
    ];
    // Small heads, which subgroups of 4 share too; a real model's; one head of keys and values, and padded units.
    let sizes = [[64, 96, 6, 2, 16], [960, 2560, 15, 5, 64], [72, 200, 3, 3, 24], [160, 440, 5, 1, 128]];
    // Every routing twice; types and sizes take turns. Each takes long to translate, so other devices than the likeliest get a few.
    for i in (0..2 * routings.len()).step_by(if list.is_likeliest() { 1 } else { 7 }) {
        let [hidden_size, mlp_dim, num_attention_heads, num_key_value_heads, head_dim] = sizes[i % sizes.len()];
        let kv_dtype = if i / 2 % 2 == 0 { DType::F16 } else { DType::F32 };
        let kv_table = KvTable::Pages;
        let layer_dtype = WEIGHT_DTYPES[i % WEIGHT_DTYPES.len()];
        let shape = LayersShape {
            hidden_size,
            mlp_dim,
            vocab_size: [333, 49152][i % 2],
            attention: AttentionShape { num_attention_heads, num_key_value_heads, head_dim, kv_dtype, kv_table },
            layer_dtype,
            // As models have it, but for one of q4.
            head_dtype: if layer_dtype == DType::Q4 && i > WEIGHT_DTYPES.len() { DType::Q8 } else { layer_dtype },
            router_dtype: PLAIN_DTYPES[i / 4 % PLAIN_DTYPES.len()],
            routing: routings[i % routings.len()],
        };
        let num_workgroups = if list.caps.is_cpu { 1 } else { (hidden_size / 2).min(132) };
        // Some devices it refuses, some shapes are too much for a single workgroup.
        if let Ok(kernel) = DecodeLayers::new(&list.caps, shape, 34, num_workgroups) {
            list.add(&kernel);
        }
    }
}
