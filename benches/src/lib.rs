//! Shared parts of the benchmarks: the shape table and the timing of one kernel.
//!
//! - `kernels/<stem>.rs`: every shape is first compared with the kernel's oracle, then timed by device timestamps. A
//!   shape that does not fit the device is skipped by name.
//!   Beside criterion's report stands the best rate and its share of what the device reaches in the same run: of the bandwidth of
//!   a copy, or of reads where a kernel reads weights, keys and values and writes little, and of a dispatch that does nothing but
//!   read as many bytes; or of `linear` in a large square product.
//! - `runs/`: raw outputs, one file per date and device; a number in prose links the one it comes from.
//!
//! `cargo bench -p mor-bench` times; `cargo test -p mor-bench --benches` runs everything once. `MOR_TEST_DEVICE` chooses an
//! adapter. A GPU's clock falls when idle: warm it up, quote medians. Whole models are measured by `mor bench`.

use std::sync::OnceLock;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput};
use mor_kernels::gpu::Gpu;
use mor_kernels::peaks::Peaks;
use mor_kernels::plan::{Plan, PlanBuilder};
use mor_kernels::timing;

/// Sizes of a model whose kernels are timed.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Short name, used as bench id.
    pub name: &'static str,
    /// Residual stream width.
    pub hidden_size: u32,
    /// MLP width.
    pub intermediate_size: u32,
    /// Query heads.
    pub num_attention_heads: u32,
    /// Key-value heads.
    pub num_key_value_heads: u32,
    /// Elements of a head.
    pub head_dim: u32,
    /// Vocabulary.
    pub vocab_size: u32,
}

/// The SmolLM shapes and the embedded default.
pub const SHAPES: &[Shape] = &[
    shape("tinystories-5m", 256, 704, 4, 2, 4096),
    shape("135m", 576, 1536, 9, 3, 49152),
    shape("360m", 960, 2560, 15, 5, 49152),
    shape("730m", 1536, 4096, 24, 8, 49152),
    shape("1.7b", 2048, 8192, 32, 32, 49152),
];

const fn shape(name: &'static str, hidden: u32, mlp: u32, heads: u32, kv_heads: u32, vocab: u32) -> Shape {
    Shape {
        name,
        hidden_size: hidden,
        intermediate_size: mlp,
        num_attention_heads: heads,
        num_key_value_heads: kv_heads,
        head_dim: 64,
        vocab_size: vocab,
    }
}

/// Most runs of a plan between two timestamps.
pub const MAX_BATCH: usize = 100;

/// Whether benchmarks whose ids begin with `name` are asked for: criterion's own filters come too late, since to prepare one and to
/// compare it with its oracle takes longer than to time it. Arguments that are no beginning of an id, `KERNEL/..`, leave all of
/// them to criterion: values of its options, other patterns.
pub fn is_wanted(name: &str) -> bool {
    is_wanted_by(name, std::env::args().skip(1))
}

fn is_wanted_by(name: &str, arguments: impl Iterator<Item = String>) -> bool {
    let is_beginning = |argument: &String| {
        argument.contains('/') && argument.chars().all(|c| c.is_alphanumeric() || "_/ -".contains(c))
    };
    let filters: Vec<String> = arguments.filter(is_beginning).collect();
    filters.is_empty() || filters.iter().any(|filter| filter.starts_with(name) || name.starts_with(filter.as_str()))
}

/// Records a plan, or explains why it cannot run here and returns `None` (a shape too large for a small device).
pub fn record(
    gpu: &Gpu,
    what: &str,
    record: impl FnOnce(&mut PlanBuilder<'_>) -> mor_kernels::Result<()>,
) -> Option<Plan> {
    let plan = PlanBuilder::new(gpu).and_then(|mut plan| {
        record(&mut plan)?;
        plan.finish()
    });
    plan.inspect_err(|error| eprintln!("{what} skipped: {error}")).ok()
}

/// Times `plan` under `group/id` by device timestamps; `bytes` is the least it must move.
pub fn time(criterion: &mut Criterion, gpu: &Gpu, group: &str, id: &str, bytes: u64, plan: &Plan) {
    time_per(criterion, gpu, group, id, Work::Move(bytes), (plan, 1), &|| {});
}

/// As [`time`], for kernels that count on: `reset` restores what they read before every [`MAX_BATCH`] runs, untimed.
pub fn time_from(
    criterion: &mut Criterion,
    gpu: &Gpu,
    group: &str,
    id: &str,
    bytes: u64,
    plan: &Plan,
    reset: &dyn Fn(),
) {
    time_per(criterion, gpu, group, id, Work::Move(bytes), (plan, 1), reset);
}

/// As [`time_from`], for kernels that read nearly all of `bytes`.
pub fn time_read(
    criterion: &mut Criterion,
    gpu: &Gpu,
    group: &str,
    id: &str,
    bytes: u64,
    plan: &Plan,
    reset: &dyn Fn(),
) {
    time_per(criterion, gpu, group, id, Work::Read(bytes), (plan, 1), reset);
}

/// As [`time`], for kernels that do the same `count` times over: what is reported is one of these, which moves `bytes`.
pub fn time_rounds(criterion: &mut Criterion, gpu: &Gpu, group: &str, id: &str, bytes: u64, plan: &Plan, count: usize) {
    time_per(criterion, gpu, group, id, Work::Move(bytes), (plan, count), &|| {});
}

/// As [`time`], for kernels bound by arithmetic: the elements criterion counts are `flop` operations. The plan holds the
/// kernel `count` times, over other weights each time so that no cache keeps them; what is reported is one of them.
pub fn time_flop(criterion: &mut Criterion, gpu: &Gpu, group: &str, id: &str, flop: u64, plan: &Plan, count: usize) {
    time_per(criterion, gpu, group, id, Work::Multiply(flop), (plan, count), &|| {});
}

/// What a run does, and with it the peak that it is compared with.
#[derive(Clone, Copy, Debug)]
enum Work {
    /// Reads and writes bytes.
    Move(u64),
    /// Reads bytes.
    Read(u64),
    /// Computes so many operations.
    Multiply(u64),
}

impl Work {
    fn throughput(self) -> Throughput {
        match self {
            Work::Move(bytes) | Work::Read(bytes) => Throughput::Bytes(bytes),
            Work::Multiply(flop) => Throughput::Elements(flop),
        }
    }
}

fn time_per(
    criterion: &mut Criterion,
    gpu: &Gpu,
    group: &str,
    id: &str,
    work: Work,
    (plan, count): (&Plan, usize),
    reset: &dyn Fn(),
) {
    let name = format!("{group}/{id}");
    let (mut runs, mut best) = (0, f64::INFINITY);
    let mut group = criterion.benchmark_group(group);
    group.throughput(work.throughput());
    group.bench_function(BenchmarkId::from_parameter(id), |bencher| {
        bencher.iter_custom(|iterations| {
            let mut total = Duration::ZERO;
            let mut left = iterations;
            while left > 0 {
                let batch = left.min(MAX_BATCH as u64);
                reset();
                let micros = timing::device_micros(gpu, plan, batch as u32).expect("the device writes timestamps");
                let micros = micros / count as f64;
                total += Duration::from_nanos((micros * 1e3) as u64) * batch as u32;
                left -= batch;
                runs += batch;
                best = best.min(micros);
            }
            total
        });
    });
    group.finish();
    // A single run, as tests make it, says nothing.
    if runs > 1 {
        println!("{name:<40} {}", share(gpu, work, best));
    }
}

/// The rate of a run that took `micros`, and its share of the device's peak.
fn share(gpu: &Gpu, work: Work, micros: f64) -> String {
    static PEAKS: OnceLock<Peaks> = OnceLock::new();
    let half_products = gpu.caps().cooperative_matrices.is_some();
    let peaks = PEAKS.get_or_init(|| Peaks::measure(gpu, half_products).expect("the device writes timestamps"));
    let (amount, peak, done) = match work {
        Work::Move(bytes) => (bytes, peaks.copy_bytes_per_s, "copied"),
        Work::Read(bytes) => (bytes, peaks.read_bytes_per_s, "read"),
        Work::Multiply(flop) => (flop, peaks.matrix_flop_per_s, "multiplied"),
    };
    let (scale, unit, digits) = if matches!(work, Work::Multiply(_)) { (1e12, "TFLOP/s", 3) } else { (1e9, "GB/s", 1) };
    let rate = amount as f64 * 1e6 / micros;
    let share = 100.0 * rate / peak;
    let text = format!("{:.digits$} {unit}, {share:.1} % of {:.digits$} {done}", rate / scale, peak / scale);
    let Work::Read(bytes) = work else { return text };
    // What a kernel of this size could reach at best: small ones begin and end longer than they read.
    let alone = Peaks::read_bytes_per_s_of(gpu, bytes).expect("the device writes timestamps");
    format!("{text}, {:.1} % of {:.digits$} where that is all it does", 100.0 * rate / alone, alone / scale)
}

#[cfg(test)]
mod tests {
    use super::is_wanted_by;

    #[test]
    fn options_and_patterns_ask_for_all() {
        let is_wanted = |name, arguments: &[&str]| is_wanted_by(name, arguments.iter().map(|&word| word.to_owned()));
        for arguments in [&["--bench"][..], &["--sample-size", "20"], &["--save-baseline", "main"], &["linear/.*/512"]]
        {
            assert!(is_wanted("rms_norm/", arguments), "{arguments:?}");
        }
        let one = ["--bench", "linear/4096x4096"];
        assert!(is_wanted("linear/", &one) && is_wanted("linear/4096x4096x4096/half", &one));
        assert!(!is_wanted("linear_decode/", &one) && !is_wanted("linear/360m/qkv/512", &one));
    }
}
