//! Whole-model timings: prefill of a prompt and greedy decoding at batch 1, as Markdown rows.
//!
//! `cargo bench -p mor-bench --bench model -- [--config JSON | --model DIR]... [--device NAME] [--dtype f32|f16]`
//! `[--quantize q8|q4] [--prompt N] [--new N] [--repetitions N] [--profile]`. Configurations get random weights. Run as a test it does one short
//! repetition on the smallest configuration.

use std::path::PathBuf;

use mor_model::{Dtype, MorConfig};
use mor_runtime::{
    DeviceSelector, Event, GenerateRequest, ModelSource, Precision, Quantization, SamplingParams, Session,
    SessionOptions, Summary,
};

struct Options {
    sources: Vec<(String, ModelSource)>,
    device: DeviceSelector,
    precision: Option<Precision>,
    quantize: Option<Quantization>,
    prompt: usize,
    new: usize,
    repetitions: usize,
    profile: bool,
}

fn main() {
    let options = parse(std::env::args().skip(1));
    println!(
        "| model | device | precision | prompt | prefill tokens/s | decode tokens/s | us/token | dispatches/token | mean depth | weights MB |"
    );
    println!("| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |");
    for (name, source) in &options.sources {
        bench(name, source, &options);
    }
}

fn bench(name: &str, source: &ModelSource, options: &Options) {
    let mut session_options = SessionOptions::default();
    session_options.gpu.device = options.device.clone();
    session_options.precision = options.precision;
    // Every run shall read its prompt.
    session_options.batch.share_prefixes = false;
    session_options.quantize = options.quantize;
    let mut session = Session::load(source.clone(), session_options).unwrap_or_else(|error| panic!("{name}: {error}"));
    let vocab_size = session.config().vocab_size as u32;
    let request = GenerateRequest {
        max_new_tokens: options.new,
        sampling: SamplingParams::greedy(),
        ignore_eos: true,
        ..GenerateRequest::new(
            (0..options.prompt as u32).map(|i| 1 + (i.wrapping_mul(2_654_435_761) >> 7) % (vocab_size - 1)).collect(),
        )
    };
    let mut runs: Vec<Summary> = Vec::new();
    // The first run compiles and lets the clock rise; it is not counted.
    for _ in 0..=options.repetitions {
        let generation = session.generate(&request).unwrap_or_else(|error| panic!("{name}: {error}"));
        let last = generation.last().expect("a generation ends").unwrap_or_else(|error| panic!("{name}: {error}"));
        if let Event::Finished(summary) = last {
            runs.push(summary);
        }
    }
    runs.remove(0);
    let median = |value: fn(&Summary) -> f64| {
        let mut values: Vec<f64> = runs.iter().map(value).collect();
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    if options.profile {
        print_profile(&mut session, options.prompt + options.new);
    }
    let decode = median(|summary| summary.decode_tokens_per_s);
    let dispatches = session.decode_dispatches(options.prompt + options.new);
    let dispatches = dispatches.unwrap_or_else(|error| panic!("{name}: {error}"));
    println!(
        "| {name} | {} | {} | {} | {:.0} | {:.1} | {:.1} | {} | {:.3} | {:.1} |",
        session.device().name,
        session.config().quantization.map_or(session.precision().as_str(), Quantization::as_str),
        options.prompt,
        median(|summary| summary.prefill_tokens_per_s),
        decode,
        1e6 / decode,
        dispatches,
        median(|summary| summary.mean_depth),
        session.model().weights().num_bytes() as f64 / 1e6,
    );
}

fn parse(mut arguments: impl Iterator<Item = String>) -> Options {
    let mut options = Options {
        sources: Vec::new(),
        device: DeviceSelector::Best,
        precision: None,
        quantize: None,
        prompt: 512,
        new: 128,
        repetitions: 5,
        profile: false,
    };
    let mut is_bench = false;
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().unwrap_or_else(|| panic!("{argument} needs a value"));
        match argument.as_str() {
            "--bench" => is_bench = true,
            "--profile" => options.profile = true,
            "--config" => {
                let path = value();
                let config = MorConfig::from_json_file(&path).unwrap_or_else(|error| panic!("{error}"));
                let name = PathBuf::from(&path).file_stem().map_or(path.clone(), |s| s.to_string_lossy().into_owned());
                options.sources.push((name, ModelSource::Random { config, seed: 0, dtype: Dtype::F16 }));
            }
            "--model" => {
                let path = PathBuf::from(value());
                let name = path.file_name().map_or(String::new(), |s| s.to_string_lossy().into_owned());
                options.sources.push((name, ModelSource::Folder(path)));
            }
            "--device" => options.device = DeviceSelector::Name(value()),
            "--dtype" => {
                options.precision = match value().as_str() {
                    "f32" => Some(Precision::F32),
                    "f16" => Some(Precision::F16),
                    other => panic!("--dtype is f32 or f16, not {other}"),
                }
            }
            "--quantize" => {
                options.quantize = match value().as_str() {
                    "q8" => Some(Quantization::Q8),
                    "q4" => Some(Quantization::Q4),
                    other => panic!("--quantize is q8 or q4, not {other}"),
                }
            }
            "--prompt" => options.prompt = value().parse().expect("--prompt is a number"),
            "--new" => options.new = value().parse().expect("--new is a number"),
            "--repetitions" => options.repetitions = value().parse().expect("--repetitions is a number"),
            other => eprintln!("ignoring {other}"),
        }
    }
    if options.sources.is_empty() {
        let embedded = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../models/tinystories-mor-expert-5m"));
        options.sources.push(("tinystories-mor-expert-5m".to_owned(), ModelSource::Folder(embedded)));
        if !is_bench {
            (options.prompt, options.new, options.repetitions) = (16, 8, 1);
        }
    }
    options
}

/// Time by kernel of a decode step, each dispatch in a pass of its own.
fn print_profile(session: &mut Session, context: usize) {
    let profile = session.profile_decode(1, context).unwrap_or_else(|error| panic!("{error}"));
    eprintln!("decode step: device {:.1} us, host {:.1} us", profile.device_micros, profile.host_micros);
    let mut by_kernel: std::collections::BTreeMap<&str, (usize, f64)> = std::collections::BTreeMap::new();
    for (label, micros) in profile.dispatches {
        let entry = by_kernel.entry(label).or_default();
        *entry = (entry.0 + 1, entry.1 + micros);
    }
    for (label, (count, micros)) in by_kernel {
        eprintln!("{label:<20} {count:>4} dispatches {micros:>10.1} us, {:.1} us each", micros / count as f64);
    }
}
