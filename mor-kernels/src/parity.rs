//! The harness of the kernel tests and benches: devices in every profile, seeded inputs, outputs between
//! sentinels, and comparison with stated tolerances.

use std::sync::OnceLock;

use crate::Result;
use crate::epilogue::{Epilogue, EpilogueKind, LinearParams};
use crate::gpu::{DeviceSelector, Gpu, GpuOptions};
use crate::oracle::linear_decode::EpilogueState;
use crate::plan::PlanBuilder;
use crate::quantize;
use crate::rows::{ActiveRow, NONE, RowSet};
use crate::tensor::{DType, Tensor};

/// Elements after an output that must stay untouched.
const GUARD: usize = 64;
/// What outputs hold before a kernel runs: a NaN with a payload no arithmetic produces.
const SENTINEL: u32 = 0x7fc5_a5a5;

/// Largest accepted `|got - want|`, as `absolute + relative * |want|`.
#[derive(Clone, Copy, Debug)]
pub struct Tolerance {
    pub(crate) absolute: f32,
    pub(crate) relative: f32,
}

impl Tolerance {
    /// Equal to the bit, for indices and copies.
    pub const EXACT: Self = Self { absolute: 0.0, relative: 0.0 };
    /// f32 sums in another order than the oracle's f64.
    pub const F32: Self = Self { absolute: 2e-5, relative: 2e-5 };
    /// Values stored once as f16.
    pub const F16: Self = Self { absolute: 2e-3, relative: 2e-3 };
}

/// The ways a kernel must work: `(name, options)`.
fn profiles() -> [(&'static str, GpuOptions); 3] {
    let base = GpuOptions { checked: false, subgroups: true, webgpu_limits: false, ..GpuOptions::default() };
    [
        ("unchecked", base.clone()),
        ("checked", GpuOptions { checked: true, ..base.clone() }),
        ("no-subgroups webgpu-limits", GpuOptions { checked: true, subgroups: false, webgpu_limits: true, ..base }),
    ]
}

/// Runs `test` on the default adapter in every profile: unchecked, checked, and checked with subgroups stripped
/// and limits clamped to WebGPU's defaults. `MOR_TEST_DEVICE` names another adapter.
///
/// # Panics
/// If no device opens: without a GPU install a software one, tests do not skip themselves.
pub fn on_every_profile(mut test: impl FnMut(&Gpu, &str)) {
    for (gpu, name) in devices() {
        test(gpu, name);
        gpu.check().expect("the device raised no error");
    }
}

/// As [`on_every_profile`], and where the adapter is a software rasteriser once more as if it were a GPU, unchecked: for kernels
/// that have variants of their own there.
///
/// # Panics
/// As [`on_every_profile`].
pub fn on_every_profile_and_as_gpu(mut test: impl FnMut(&Gpu, &str)) {
    on_every_profile(&mut test);
    if let Some(gpu) = as_gpu() {
        test(gpu, "unchecked, as a GPU");
        gpu.check().expect("the device raised no error");
    }
}

/// As [`on_every_profile`], and where the adapter is a software rasteriser that multiplies cooperative matrices, as Mesa's does since
/// 25.2, once more as if it were a GPU, unchecked.
///
/// # Panics
/// As [`on_every_profile`].
pub fn on_every_profile_and_with_matrices(mut test: impl FnMut(&Gpu, &str)) {
    on_every_profile(&mut test);
    if let Some(gpu) = as_gpu().filter(|gpu| gpu.caps().cooperative_matrices.is_some()) {
        test(gpu, "unchecked, as a GPU");
        gpu.check().expect("the device raised no error");
    }
}

/// The adapter of the tests as if it were a GPU, if it is a software rasteriser.
fn as_gpu() -> Option<&'static Gpu> {
    static AS_GPU: OnceLock<Option<Gpu>> = OnceLock::new();
    let open = || {
        let [(_, options), ..] = profiles();
        let options = GpuOptions { device: device(), software_as_gpu: true, ..options };
        gpu().caps().is_cpu.then(|| Gpu::open(&options).unwrap_or_else(|error| panic!("{error}")))
    };
    AS_GPU.get_or_init(open).as_ref()
}

/// The unchecked device of [`on_every_profile`], for tests of one profile.
pub fn gpu() -> &'static Gpu {
    &devices()[0].0
}

/// The adapter that tests use: the one `MOR_TEST_DEVICE` names, else the best.
pub fn device() -> DeviceSelector {
    std::env::var("MOR_TEST_DEVICE").map_or(DeviceSelector::Best, DeviceSelector::Name)
}

fn devices() -> &'static [(Gpu, &'static str)] {
    static DEVICES: OnceLock<Vec<(Gpu, &'static str)>> = OnceLock::new();
    DEVICES.get_or_init(|| {
        let open = |(name, mut options): (&'static str, GpuOptions)| {
            options.device = device();
            (Gpu::open(&options).unwrap_or_else(|error| panic!("{error}")), name)
        };
        profiles().into_iter().map(open).collect()
    })
}

/// SplitMix64: small, seeded by a name, the same everywhere.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// A stream for `name`; `MOR_TEST_SEED` shifts all streams for a sweep. Prints the seed.
    pub fn new(name: &str) -> Self {
        let shift: u64 = std::env::var("MOR_TEST_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(0);
        let seed = name
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
        println!("{name}: seed {:#x} (MOR_TEST_SEED={shift})", seed.wrapping_add(shift));
        Self(seed.wrapping_add(shift))
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in 0..n.
    pub fn below(&mut self, n: usize) -> usize {
        (self.next_u64() % n.max(1) as u64) as usize
    }

    /// Uniform in [0, 1).
    pub fn unit(&mut self) -> f32 {
        (self.next_u64() >> 40) as f32 / (1u64 << 24) as f32
    }

    /// Standard normal.
    pub fn normal(&mut self) -> f32 {
        let radius = (-2.0 * (1.0 - self.unit()).ln()).sqrt();
        radius * (std::f32::consts::TAU * self.unit()).cos()
    }

    /// `n` standard normals.
    pub fn normals(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.normal()).collect()
    }
}

/// `num_active` of `num_rows` rows, ascending, as a set lists them: one sequence, position = row, no K/V.
pub fn some_rows(rng: &mut Rng, num_rows: usize, num_active: usize) -> Vec<ActiveRow> {
    let mut rows: Vec<usize> = (0..num_rows).collect();
    while rows.len() > num_active {
        rows.remove(rng.below(rows.len()));
    }
    let entry = |row: usize| ActiveRow { row: row as u32, position: row as u32, ..ActiveRow::ABSENT };
    rows.into_iter().map(entry).collect()
}

/// A set holding `active`.
///
/// # Panics
/// If the device refuses the memory.
pub fn row_set(gpu: &Gpu, active: &[ActiveRow]) -> RowSet {
    RowSet::from_rows(gpu, "rows", active).expect("a small buffer fits")
}

/// A tensor of f32.
///
/// # Panics
/// If the device refuses the memory.
pub fn upload(gpu: &Gpu, data: &[f32]) -> Tensor {
    Tensor::from_slice(gpu, "input", DType::F32, &[data.len()], data).expect("a test's buffer fits")
}

/// A tensor of u32.
///
/// # Panics
/// If the device refuses the memory.
pub fn upload_u32(gpu: &Gpu, data: &[u32]) -> Tensor {
    Tensor::from_slice(gpu, "input", DType::U32, &[data.len()], data).expect("a test's buffer fits")
}

/// An output of 4-byte elements, filled with sentinels and followed by a guard.
#[derive(Debug)]
pub struct Output {
    /// Bind this.
    pub tensor: Tensor,
    len: usize,
}

impl Output {
    /// `len` elements of sentinels.
    ///
    /// # Panics
    /// If the device refuses the memory.
    pub fn new(gpu: &Gpu, len: usize) -> Self {
        let data = vec![SENTINEL; len + GUARD];
        let tensor = Tensor::from_slice(gpu, "output", DType::U32, &[data.len()], &data).expect("a test's buffer fits");
        Self { tensor, len }
    }

    /// `initial` followed by the guard, for outputs that are updated in place.
    ///
    /// # Panics
    /// If the device refuses the memory.
    pub fn from_values(gpu: &Gpu, initial: &[f32]) -> Self {
        let output = Self::new(gpu, initial.len());
        gpu.write(&output.tensor, 0, bytemuck::cast_slice(initial));
        output
    }

    /// As [`Output::from_values`], of integers.
    ///
    /// # Panics
    /// If the device refuses the memory.
    pub fn from_words(gpu: &Gpu, initial: &[u32]) -> Self {
        let output = Self::new(gpu, initial.len());
        gpu.write(&output.tensor, 0, bytemuck::cast_slice(initial));
        output
    }

    /// The elements as f32, after checking that the guard is untouched.
    ///
    /// # Panics
    /// If the kernel wrote past the end.
    pub fn read(&self, gpu: &Gpu) -> Vec<f32> {
        self.read_u32(gpu).into_iter().map(f32::from_bits).collect()
    }

    /// The elements as u32, after checking that the guard is untouched.
    ///
    /// # Panics
    /// If the kernel wrote past the end.
    pub fn read_u32(&self, gpu: &Gpu) -> Vec<u32> {
        let mut data: Vec<u32> = gpu.read(&self.tensor.clone().with_dtype(DType::U32)).expect("the device answers");
        assert!(data[self.len..].iter().all(|word| *word == SENTINEL), "the kernel wrote past its output");
        data.truncate(self.len);
        data
    }
}

/// Whether an output element was never written.
pub fn is_untouched(value: f32) -> bool {
    value.to_bits() == SENTINEL
}

/// Records a plan with `record`, runs it once and waits.
///
/// # Panics
/// If recording or the device fails.
pub fn run(gpu: &Gpu, record: impl FnOnce(&mut PlanBuilder<'_>) -> Result<()>) {
    let mut plan = PlanBuilder::new(gpu).unwrap_or_else(|error| panic!("{error}"));
    record(&mut plan).unwrap_or_else(|error| panic!("{error}"));
    let plan = plan.finish().unwrap_or_else(|error| panic!("{error}"));
    gpu.run(&plan).unwrap_or_else(|error| panic!("{error}"));
}

/// Compares element by element; equal bits always pass, so infinities and untouched sentinels compare too.
///
/// # Panics
/// At the first element out of tolerance, naming the worst one.
pub fn assert_close(what: &str, got: &[f32], want: &[f32], tolerance: Tolerance) {
    assert_eq!(got.len(), want.len(), "{what}: number of elements");
    let excess = |(g, w): (&f32, &f32)| {
        if g.to_bits() == w.to_bits() || g == w {
            return 0.0;
        }
        let allowed = tolerance.absolute + tolerance.relative * w.abs();
        let difference = (g - w).abs();
        if difference.is_nan() {
            f32::INFINITY
        } else if difference <= allowed {
            0.0
        } else {
            difference / allowed
        }
    };
    let worst = got.iter().zip(want).map(excess).enumerate().max_by(|a, b| a.1.total_cmp(&b.1));
    if let Some((index, excess)) = worst
        && excess > 0.0
    {
        panic!("{what}: element {index} is {} but the oracle says {} ({tolerance:?})", got[index], want[index]);
    }
}

/// A weight matrix `[num_outputs, in_features]` in `dtype`, with the f32 values the kernel will see.
///
/// # Panics
/// If the device refuses the memory.
pub fn upload_weight(
    gpu: &Gpu,
    rng: &mut Rng,
    num_outputs: usize,
    in_features: usize,
    dtype: DType,
) -> (Tensor, Vec<f32>) {
    let scale = 1.0 / (in_features as f32).sqrt();
    let values: Vec<f32> = rng.normals(num_outputs * in_features).into_iter().map(|v| v * scale).collect();
    let shape = [num_outputs, in_features];
    let tensor = |data: &[u8]| {
        let weight = Tensor::from_slice(gpu, "weight", dtype, &shape, data).expect("a test's buffer fits");
        weight.into_weight(gpu).expect("a test's texture fits")
    };
    match dtype {
        DType::F16 => {
            let halves: Vec<_> = values.iter().map(|v| half::f16::from_f32(*v)).collect();
            (tensor(bytemuck::cast_slice(&halves)), halves.iter().map(|h| h.to_f32()).collect())
        }
        DType::BF16 => {
            let halves: Vec<_> = values.iter().map(|v| half::bf16::from_f32(*v)).collect();
            (tensor(bytemuck::cast_slice(&halves)), halves.iter().map(|h| h.to_f32()).collect())
        }
        DType::Q8 | DType::Q4 => {
            let row_bytes = dtype.row_bytes(in_features);
            let (mut rows, mut seen) = (vec![0; num_outputs * row_bytes], vec![0.0; values.len()]);
            let packed = rows.chunks_mut(row_bytes).zip(seen.chunks_mut(in_features));
            for (values, (row, seen)) in values.chunks(in_features).zip(packed) {
                quantize::quantize_row(dtype, values, row).expect("a test's values are small");
                quantize::dequantize_row(dtype, row, seen);
            }
            (tensor(&rows), seen)
        }
        DType::Block8 => unreachable!("no weight is of that type"),
        DType::F32 | DType::U32 => (tensor(bytemuck::cast_slice(&values)), values),
    }
}

/// One linear kernel's epilogue under test: its tensors on the device and their initial values.
#[derive(Debug)]
pub struct EpilogueCase {
    /// Epilogue under test.
    pub kind: EpilogueKind,
    /// The active rows.
    pub active: Vec<ActiveRow>,
    /// `active` on the device.
    pub rows: RowSet,
    /// Everything but `num_outputs`, `first_output` and `in_features`.
    pub params: LinearParams,
    /// Values before the kernel ran; apply the oracle to a clone.
    pub initial: EpilogueState,
    out: Output,
    residual: Tensor,
    rope: Tensor,
    k_cache: Output,
    v_cache: Output,
    gates: Tensor,
    running: Output,
    encoding: Tensor,
    num_columns: usize,
}

impl EpilogueCase {
    const Q_DIM: usize = 48;
    const KV_DIM: usize = 32;
    const HEAD_DIM: usize = 16;

    /// A case over `num_rows` rows of which `num_active` are active, with distinct K/V slots and mixed ends.
    ///
    /// # Panics
    /// If the device refuses the memory.
    pub fn new(gpu: &Gpu, rng: &mut Rng, kind: EpilogueKind, num_rows: usize, num_active: usize) -> Self {
        use EpilogueKind as E;
        let num_columns = Self::Q_DIM + 2 * Self::KV_DIM;
        let mut active = some_rows(rng, num_rows, num_active);
        for (i, entry) in active.iter_mut().enumerate() {
            entry.kv_slot = (num_active - 1 - i) as u32 + 2;
            entry.end = rng.below(3) as u32;
            // As rows that attend to another recursion's keys.
            if i == 1 {
                entry.kv_slot = NONE;
            }
        }
        let (out_rows, out_stride) = match kind {
            E::Store | E::Gelu => (num_active, num_columns),
            E::SwiGlu | E::SwiGluF16 | E::SwiGluDelta => (num_active, num_columns / 2),
            _ if kind.is_qkv() => (num_active, Self::Q_DIM),
            E::Residual | E::ResidualCopy | E::BlockEndExpert | E::BlockEndToken => (num_rows, num_columns),
            _ => (num_rows, num_columns),
        };
        // What is added lies behind what is written, with a gap.
        let delta_start = out_rows * out_stride + 8;
        let out_elems = if kind.has_delta() { delta_start + num_active * num_columns } else { out_rows * out_stride };
        let kv_elems = (num_active + 2) * Self::KV_DIM;
        // f16 caches are compared as the words that hold two halves each.
        let kv_f16 = kind.is_qkv() && !matches!(kind, E::QkvF32 | E::QkvF32Delta);
        let (kv_words, kv_dtype) = if kv_f16 { (kv_elems / 2, DType::F16) } else { (kv_elems, DType::F32) };
        let cache = || {
            let mut output = Output::new(gpu, kv_words);
            gpu.write(&output.tensor, 0, &vec![0; 4 * kv_words]);
            output.tensor = output.tensor.with_dtype(kv_dtype);
            output
        };
        let initial = EpilogueState {
            out: rng.normals(out_elems),
            residual: rng.normals(num_rows * num_columns),
            rope: (0..num_rows * Self::HEAD_DIM / 2).map(|_| [rng.normal(), rng.normal()]).collect(),
            k_cache: vec![0.0; kv_elems],
            v_cache: vec![0.0; kv_elems],
            gates: rng.normals(num_rows),
            running: rng.normals(num_rows * num_columns),
            encoding: rng.normals(num_columns),
        };
        let params = LinearParams {
            out_stride: out_stride as u32,
            q_dim: Self::Q_DIM as u32,
            kv_dim: Self::KV_DIM as u32,
            head_dim: Self::HEAD_DIM as u32,
            additive: rng.below(2) as u32,
            scale: 1.5,
            delta_start: delta_start as u32,
            ..Default::default()
        };
        Self {
            kind,
            rows: row_set(gpu, &active),
            params,
            out: Output::from_values(gpu, &initial.out),
            residual: upload(gpu, &initial.residual),
            rope: upload(gpu, initial.rope.as_flattened()),
            k_cache: cache(),
            v_cache: cache(),
            gates: upload(gpu, &initial.gates),
            running: Output::from_values(gpu, &initial.running),
            encoding: upload(gpu, &initial.encoding),
            active,
            initial,
            num_columns,
        }
    }

    /// `(first_output, num_outputs)` of two dispatches that together cover all columns, in multiples of `unit`.
    pub fn shards(&self, unit: usize) -> [(usize, usize); 2] {
        let first = 34_usize.next_multiple_of(unit);
        [(0, first), (first, self.num_columns - first)]
    }

    /// The epilogue over this case's tensors.
    pub fn epilogue(&self) -> Epilogue<'_> {
        let out = &self.out.tensor;
        let (residual, gates, running) = (&self.residual, &self.gates, &self.running.tensor);
        let delta = self.kind.has_delta();
        let encoding = self.kind.is_encoded().then_some(&self.encoding);
        match self.kind {
            EpilogueKind::Store => Epilogue::Store { out },
            EpilogueKind::Gelu => Epilogue::Gelu { out },
            EpilogueKind::Residual => Epilogue::Residual { residual, out, copy: None },
            EpilogueKind::ResidualCopy => Epilogue::Residual { residual, out, copy: Some(running) },
            EpilogueKind::Scaled => unreachable!("what norms share has a test of its own"),
            EpilogueKind::Encoded => Epilogue::Encoded { residual, out, encoding: &self.encoding },
            EpilogueKind::SwiGlu | EpilogueKind::SwiGluF16 | EpilogueKind::SwiGluDelta => {
                Epilogue::SwiGlu { out, delta }
            }
            _ if self.kind.is_qkv() => {
                let staged = matches!(self.kind, EpilogueKind::QkvStaged | EpilogueKind::QkvStagedDelta);
                let (k_cache, v_cache) = (&self.k_cache.tensor, &self.v_cache.tensor);
                Epilogue::Qkv { rope: &self.rope, q: out, k_cache, v_cache, delta, staged }
            }
            EpilogueKind::BlockEndExpert | EpilogueKind::BlockEndExpertEncoded => {
                Epilogue::BlockEndExpert { residual, hidden: out, gates, encoding }
            }
            _ => Epilogue::BlockEndToken { residual, hidden: out, gates, running, encoding },
        }
    }

    /// Compares everything the epilogue may write with `want`.
    ///
    /// # Panics
    /// At the first difference out of tolerance.
    pub fn assert_matches(&self, gpu: &Gpu, what: &str, want: &EpilogueState) {
        assert_close(&format!("{what} out"), &self.out.read(gpu), &want.out, Tolerance::F32);
        assert_close(&format!("{what} running"), &self.running.read(gpu), &want.running, Tolerance::F32);
        for (name, cache, want) in [("k", &self.k_cache, &want.k_cache), ("v", &self.v_cache, &want.v_cache)] {
            if cache.tensor.dtype() == DType::F16 {
                let words = cache.read_u32(gpu);
                let halves: &[half::f16] = bytemuck::cast_slice(&words);
                let got: Vec<f32> = halves.iter().map(|h| h.to_f32()).collect();
                assert_close(&format!("{what} {name}"), &got, want, Tolerance::F16);
            } else {
                assert_close(&format!("{what} {name}"), &cache.read(gpu), want, Tolerance::F32);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn profiles_are_what_they_are_called() {
        let mut seen = Vec::new();
        on_every_profile(|gpu, profile| {
            seen.push(profile.to_owned());
            assert_eq!(gpu.is_checked(), profile != "unchecked", "{profile}");
            if profile != "no-subgroups webgpu-limits" {
                return;
            }
            assert_eq!(gpu.caps().subgroup_sizes, None);
            assert!(!gpu.caps().lanes().uses_subgroups());
            // What WebGPU guarantees (https://www.w3.org/TR/webgpu/#limits), asked of what kernels see and of the
            // device itself, which enforces it.
            let caps = gpu.caps();
            assert!(caps.max_storage_binding_bytes <= 128 << 20);
            assert!(caps.max_buffer_bytes <= 256 << 20);
            assert!(caps.max_workgroup_storage_bytes <= 16 << 10);
            assert!(caps.max_workgroup_size <= 256);
            assert!(caps.max_workgroups <= 65535);
            assert!(caps.max_storage_buffers <= 8);
            assert!(caps.uniform_alignment >= 256);
            let limits = gpu.catch(|device, _| device.limits());
            assert!(limits.max_storage_buffer_binding_size <= 128 << 20);
            assert!(limits.max_uniform_buffer_binding_size <= 64 << 10);
            assert!(limits.max_buffer_size <= 256 << 20);
            assert!(limits.max_compute_workgroup_storage_size <= 16 << 10);
            assert!(limits.max_compute_invocations_per_workgroup <= 256);
            assert!(limits.max_compute_workgroups_per_dimension <= 65535);
            assert!(limits.max_storage_buffers_per_shader_stage <= 8);
            assert!(!gpu.catch(|device, _| device.features()).contains(wgpu::Features::SUBGROUP));
        });
        assert_eq!(seen, ["unchecked", "checked", "no-subgroups webgpu-limits"]);
        // Stripping is an option of the third profile alone: the others offer what the adapter has.
        let [full, checked, _] = devices() else { panic!("three profiles") };
        assert_eq!(full.0.caps(), checked.0.caps());
    }
}
