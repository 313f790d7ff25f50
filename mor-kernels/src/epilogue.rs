//! What the linear kernels share: their parameters and what becomes of their results.

use crate::kernel::Binding;
use crate::quantize;
use crate::shader::Definitions;
use crate::tensor::{DType, Tensor};

/// Sizes and constants of a linear kernel's call. Mirrors `struct Params` of `linear` and `linear_decode`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, bytemuck::Pod, bytemuck::Zeroable)]
pub struct LinearParams {
    /// Rows of the weight bound here; even.
    pub num_outputs: u32,
    /// Column of the whole output where they start; even. Not 0 for the later shards of a split weight.
    pub first_output: u32,
    /// Columns of a row of the output tensor; even (SwiGLU: half as many as weight rows).
    pub out_stride: u32,
    /// Columns of q (QKV).
    pub q_dim: u32,
    /// Columns of k, and of v (QKV).
    pub kv_dim: u32,
    /// Elements of a head (QKV, attention merge).
    pub head_dim: u32,
    /// 1: the block's result is added ungated (block end).
    pub additive: u32,
    /// Added to the mean square (norm prologue).
    pub eps: f32,
    /// Multiplies the result (store and GELU).
    pub scale: f32,
    /// Elements of a row of the weight; a multiple of 8.
    pub in_features: u32,
    /// Element of the output tensor where what is added to the product starts; even (SwiGLU and QKV with `delta`).
    pub delta_start: u32,
    /// Elements from one part of squares to the next ([`Epilogue::Scaled`], and [`Prologue::Scaled`](crate::ops::Prologue::Scaled)
    /// after it).
    pub part_stride: u32,
}

/// Where a linear kernel's results go, with the tensors it takes. See `shaders/shared/epilogue.wgsl`.
#[derive(Clone, Copy, Debug)]
pub enum Epilogue<'a> {
    /// `out = scale * y`, compact.
    Store {
        /// `[n, out_stride]` f32.
        out: &'a Tensor,
    },
    /// `out = gelu(scale * y)`, compact.
    Gelu {
        /// `[n, out_stride]` f32.
        out: &'a Tensor,
    },
    /// `out = residual + y`, between streams.
    Residual {
        /// `[T, out_stride]` f32.
        residual: &'a Tensor,
        /// `[T, out_stride]` f32; another tensor than `residual`.
        out: &'a Tensor,
        /// A second stream that gets the same values, if any.
        copy: Option<&'a Tensor>,
    },
    /// `out = residual + y`, between streams, and for the norm that reads the same rows next what
    /// [`Prologue::Scaled`](crate::ops::Prologue::Scaled) takes. Of [`Linear`](crate::ops::Linear) where it multiplies halves, all
    /// columns at once.
    Scaled {
        /// `[T, out_stride]` f32.
        residual: &'a Tensor,
        /// `[T, out_stride]` f32; another tensor than `residual`.
        out: &'a Tensor,
        /// `[out_stride]` f32, the norm's.
        next_weight: &'a Tensor,
        /// `[n, out_stride]` f16: `next_weight / 16 * out`, compact.
        next_x: &'a Tensor,
        /// `[num_parts, n]` f32, see [`LinearTile::num_norm_parts`](crate::ops::LinearTile::num_norm_parts): sums of squares of parts of the
        /// rows of `out`, compact.
        next_squares: &'a Tensor,
    },
    /// `out = encoding * (residual + y)`, between streams: the end of a recursion's last layer.
    Encoded {
        /// `[T, out_stride]` f32.
        residual: &'a Tensor,
        /// `[T, out_stride]` f32; another tensor than `residual`.
        out: &'a Tensor,
        /// `[out_stride]` f32.
        encoding: &'a Tensor,
    },
    /// `out = silu(gate) * up` of interleaved gate and up columns, compact.
    SwiGlu {
        /// `[n, out_stride]` f32; with `delta`, then `[n, 2 * out_stride]` from [`LinearParams::delta_start`] on. Without,
        /// f16 is possible where [`Linear`](crate::ops::Linear) multiplies halves.
        out: &'a Tensor,
        /// Whether the latter is added to the product.
        delta: bool,
    },
    /// Rotates q and k, stores q compact and k, v in the caches; rows without a slot store no k and v.
    Qkv {
        /// `[max_positions, head_dim / 2]` of (cos, sin).
        rope: &'a Tensor,
        /// `[n, q_dim]` f32; with `delta`, then `[n, q_dim + 2 * kv_dim]` from [`LinearParams::delta_start`] on.
        q: &'a Tensor,
        /// `[num_slots, kv_dim]` f32 or f16.
        k_cache: &'a Tensor,
        /// As `k_cache`.
        v_cache: &'a Tensor,
        /// Whether what follows q is added to the product.
        delta: bool,
        /// Whether k and v are `[n, kv_dim]` f16 instead, compact, for [`KvPack`](crate::ops::KvPack).
        staged: bool,
    },
    /// Expert choice: adds the gated result to the rows with [`END_GATED`](crate::rows::END_GATED).
    BlockEndExpert {
        /// `[T, C]`: the block's running stream.
        residual: &'a Tensor,
        /// `[T, C]`: the residual stream of the whole model, updated.
        hidden: &'a Tensor,
        /// `[T]` f32.
        gates: &'a Tensor,
        /// `[C]` f32: multiplies the block's result, if the recursion has an encoding.
        encoding: Option<&'a Tensor>,
    },
    /// Token choice: finishes the rows with [`END_GATED`](crate::rows::END_GATED) and passes the others on.
    BlockEndToken {
        /// `[T, C]`: the block's running stream.
        residual: &'a Tensor,
        /// `[T, C]`: the residual stream of the whole model, updated for finished rows.
        hidden: &'a Tensor,
        /// `[T]` f32.
        gates: &'a Tensor,
        /// `[T, C]`: input of the next recursion, written for the other rows.
        running: &'a Tensor,
        /// `[C]` f32: multiplies the block's result, if the recursion has an encoding.
        encoding: Option<&'a Tensor>,
    },
}

/// Which [`Epilogue`] a kernel is specialised for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EpilogueKind {
    /// [`Epilogue::Store`].
    Store,
    /// [`Epilogue::Gelu`].
    Gelu,
    /// [`Epilogue::Residual`] into one stream.
    Residual,
    /// [`Epilogue::Residual`] into two streams.
    ResidualCopy,
    /// [`Epilogue::Scaled`].
    Scaled,
    /// [`Epilogue::Encoded`].
    Encoded,
    /// [`Epilogue::SwiGlu`].
    SwiGlu,
    /// [`Epilogue::SwiGlu`] into f16.
    SwiGluF16,
    /// [`Epilogue::SwiGlu`] with `delta`.
    SwiGluDelta,
    /// [`Epilogue::Qkv`] with f32 caches.
    QkvF32,
    /// [`Epilogue::Qkv`] with f16 caches.
    QkvF16,
    /// [`Epilogue::Qkv`] with f32 caches and `delta`.
    QkvF32Delta,
    /// [`Epilogue::Qkv`] with f16 caches and `delta`.
    QkvF16Delta,
    /// [`Epilogue::Qkv`], `staged`.
    QkvStaged,
    /// [`Epilogue::Qkv`], `staged`, with `delta`.
    QkvStagedDelta,
    /// [`Epilogue::BlockEndExpert`].
    BlockEndExpert,
    /// [`Epilogue::BlockEndToken`].
    BlockEndToken,
    /// [`Epilogue::BlockEndExpert`] with an encoding.
    BlockEndExpertEncoded,
    /// [`Epilogue::BlockEndToken`] with an encoding.
    BlockEndTokenEncoded,
}

impl EpilogueKind {
    /// Every kind but [`EpilogueKind::Scaled`] and [`EpilogueKind::SwiGluF16`], which few kernels have: for tests that translate all
    /// specialisations.
    pub const ALL: [Self; 17] = [
        Self::Store,
        Self::Gelu,
        Self::Residual,
        Self::ResidualCopy,
        Self::Encoded,
        Self::SwiGlu,
        Self::SwiGluDelta,
        Self::QkvF32,
        Self::QkvF16,
        Self::QkvF32Delta,
        Self::QkvF16Delta,
        Self::QkvStaged,
        Self::QkvStagedDelta,
        Self::BlockEndExpert,
        Self::BlockEndToken,
        Self::BlockEndExpertEncoded,
        Self::BlockEndTokenEncoded,
    ];

    /// Whether something is added to the product first.
    pub const fn has_delta(self) -> bool {
        matches!(self, Self::SwiGluDelta | Self::QkvF32Delta | Self::QkvF16Delta | Self::QkvStagedDelta)
    }

    /// Whether it is [`Epilogue::Qkv`].
    pub const fn is_qkv(self) -> bool {
        matches!(
            self,
            Self::QkvF32
                | Self::QkvF16
                | Self::QkvF32Delta
                | Self::QkvF16Delta
                | Self::QkvStaged
                | Self::QkvStagedDelta
        )
    }

    /// Whether the result of the layer is multiplied by an encoding.
    pub const fn is_encoded(self) -> bool {
        matches!(self, Self::Encoded | Self::BlockEndExpertEncoded | Self::BlockEndTokenEncoded)
    }

    /// Adds this kind's flags.
    pub fn define(self, definitions: Definitions) -> Definitions {
        let name = match self {
            Self::Store => "STORE",
            Self::Gelu => "GELU",
            Self::Residual | Self::ResidualCopy | Self::Scaled | Self::Encoded => "RESIDUAL",
            Self::SwiGlu | Self::SwiGluF16 | Self::SwiGluDelta => "SWIGLU",
            Self::QkvF32 | Self::QkvF16 | Self::QkvF32Delta | Self::QkvF16Delta => "QKV",
            Self::QkvStaged | Self::QkvStagedDelta => "QKV",
            Self::BlockEndExpert | Self::BlockEndExpertEncoded => "BLOCK_END",
            Self::BlockEndToken | Self::BlockEndTokenEncoded => "BLOCK_END",
        };
        definitions
            .flag(name, true)
            .flag("RESIDUAL_COPY", self == Self::ResidualCopy)
            .flag("RUNNING", matches!(self, Self::BlockEndToken | Self::BlockEndTokenEncoded))
            .flag("NEXT_NORM", self == Self::Scaled)
            .flag("OUT_F16", self == Self::SwiGluF16)
            .flag("KV_F16", self.is_qkv() && !matches!(self, Self::QkvF32 | Self::QkvF32Delta))
            .flag("KV_STAGED", matches!(self, Self::QkvStaged | Self::QkvStagedDelta))
            .flag("DELTA", self.has_delta())
            .flag("ENCODED", self.is_encoded())
    }
}

impl<'a> Epilogue<'a> {
    /// What to specialise a kernel for.
    pub fn kind(&self) -> EpilogueKind {
        match self {
            Epilogue::Store { .. } => EpilogueKind::Store,
            Epilogue::Gelu { .. } => EpilogueKind::Gelu,
            Epilogue::Residual { copy: None, .. } => EpilogueKind::Residual,
            Epilogue::Residual { .. } => EpilogueKind::ResidualCopy,
            Epilogue::Scaled { .. } => EpilogueKind::Scaled,
            Epilogue::Encoded { .. } => EpilogueKind::Encoded,
            Epilogue::SwiGlu { delta: false, out } if out.dtype() == DType::F16 => EpilogueKind::SwiGluF16,
            Epilogue::SwiGlu { delta: false, .. } => EpilogueKind::SwiGlu,
            Epilogue::SwiGlu { delta: true, .. } => EpilogueKind::SwiGluDelta,
            Epilogue::Qkv { staged: true, delta: false, .. } => EpilogueKind::QkvStaged,
            Epilogue::Qkv { staged: true, .. } => EpilogueKind::QkvStagedDelta,
            Epilogue::Qkv { k_cache, delta, .. } => match (k_cache.dtype() == DType::F16, delta) {
                (false, false) => EpilogueKind::QkvF32,
                (true, false) => EpilogueKind::QkvF16,
                (false, true) => EpilogueKind::QkvF32Delta,
                (true, true) => EpilogueKind::QkvF16Delta,
            },
            Epilogue::BlockEndExpert { encoding: None, .. } => EpilogueKind::BlockEndExpert,
            Epilogue::BlockEndToken { encoding: None, .. } => EpilogueKind::BlockEndToken,
            Epilogue::BlockEndExpert { .. } => EpilogueKind::BlockEndExpertEncoded,
            Epilogue::BlockEndToken { .. } => EpilogueKind::BlockEndTokenEncoded,
        }
    }

    /// The tensors at their binding indices, 4 and from 6 on.
    pub fn bindings(&self) -> Vec<Binding<'a>> {
        match *self {
            Epilogue::Store { out } | Epilogue::Gelu { out } | Epilogue::SwiGlu { out, .. } => {
                vec![Binding::write(4, out)]
            }
            Epilogue::Residual { residual, out, copy } => {
                let mut bindings = vec![Binding::write(4, out), Binding::read(6, residual)];
                bindings.extend(copy.map(|copy| Binding::write(7, copy)));
                bindings
            }
            Epilogue::Scaled { residual, out, next_weight, next_x, next_squares } => vec![
                Binding::write(4, out),
                Binding::read(6, residual),
                Binding::read(10, next_weight),
                Binding::write(11, next_x),
                Binding::write(12, next_squares),
            ],
            Epilogue::Encoded { residual, out, encoding } => {
                vec![Binding::write(4, out), Binding::read(6, residual), Binding::read(9, encoding)]
            }
            Epilogue::Qkv { rope, q, k_cache, v_cache, .. } => vec![
                Binding::write(4, q),
                Binding::read(6, rope),
                Binding::write(7, k_cache),
                Binding::write(8, v_cache),
            ],
            Epilogue::BlockEndExpert { residual, hidden, gates, encoding } => {
                let mut bindings = vec![Binding::write(4, hidden), Binding::read(6, residual), Binding::read(7, gates)];
                bindings.extend(encoding.map(|encoding| Binding::read(9, encoding)));
                bindings
            }
            Epilogue::BlockEndToken { residual, hidden, gates, running, encoding } => {
                let mut bindings = vec![
                    Binding::write(4, hidden),
                    Binding::read(6, residual),
                    Binding::read(7, gates),
                    Binding::write(8, running),
                ];
                bindings.extend(encoding.map(|encoding| Binding::read(9, encoding)));
                bindings
            }
        }
    }
}

/// Adds the flags of a weight's element type, read by `shared/weights.wgsl` and `shared/quantized_units.wgsl`.
pub fn define_weight(definitions: Definitions, dtype: DType) -> Definitions {
    let definitions = definitions
        .flag("WEIGHT_F16", dtype == DType::F16)
        .flag("WEIGHT_BF16", dtype == DType::BF16)
        .flag("WEIGHT_Q8", dtype == DType::Q8)
        .flag("WEIGHT_Q4", dtype == DType::Q4)
        .flag("QUANTISED", dtype.is_quantized());
    if dtype.is_quantized() { definitions.u32("GROUP", quantize::GROUP as u32) } else { definitions }
}
