//! The harness of the kernel tests and benches: devices in every profile, seeded inputs, outputs between
//! sentinels, and comparison with stated tolerances.

use std::sync::OnceLock;

use crate::gpu::{Gpu, GpuOptions};
use crate::plan::PlanBuilder;
use crate::rows::{ActiveRow, RowSet};
use crate::tensor::{DType, Tensor};
use crate::Result;

/// Elements after an output that must stay untouched.
const GUARD: usize = 64;
/// What outputs hold before a kernel runs: a NaN with a payload no arithmetic produces.
const SENTINEL: u32 = 0x7fc5_a5a5;

/// Largest accepted `|got - want|`, as `absolute + relative * |want|`.
#[derive(Clone, Copy, Debug)]
pub struct Tolerance {
    absolute: f32,
    relative: f32,
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

/// The unchecked device of [`on_every_profile`], for tests of one profile.
pub fn gpu() -> &'static Gpu {
    &devices()[0].0
}

fn devices() -> &'static [(Gpu, &'static str)] {
    static DEVICES: OnceLock<Vec<(Gpu, &'static str)>> = OnceLock::new();
    DEVICES.get_or_init(|| {
        let device = std::env::var("MOR_TEST_DEVICE").ok();
        let open = |(name, mut options): (&'static str, GpuOptions)| {
            if let Some(device) = &device {
                options.device = crate::gpu::DeviceSelector::Name(device.clone());
            }
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
        let seed = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
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
        let mut data: Vec<u32> = gpu.read(&self.tensor).expect("the device answers");
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
        if difference.is_nan() { f32::INFINITY } else if difference <= allowed { 0.0 } else { difference / allowed }
    };
    let worst = got.iter().zip(want).map(excess).enumerate().max_by(|a, b| a.1.total_cmp(&b.1));
    if let Some((index, excess)) = worst
        && excess > 0.0
    {
        panic!("{what}: element {index} is {} but the oracle says {} ({tolerance:?})", got[index], want[index]);
    }
}
