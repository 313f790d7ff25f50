//! Generation inside a device that a program renders with: every picture is what was drawn, the tokens are those of a device
//! of our own, and errors go to whoever made them.

#[allow(dead_code, reason = "the example's own `main`")]
#[path = "../examples/shared_device.rs"]
mod example;

use std::path::Path;
use std::sync::{Arc, Mutex};

use example::App;
use mor_kernels::{KernelError, parity, wgpu};
use mor_runtime::{
    Event, GenerateRequest, Gpu, GpuOptions, ModelSource, Precision, RuntimeError, SamplingParams, Session,
    SessionOptions, Summary,
};

fn options() -> SessionOptions {
    let gpu = GpuOptions { device: parity::device(), ..GpuOptions::default() };
    SessionOptions { gpu, precision: Some(Precision::F32), ..SessionOptions::default() }
}

fn source() -> ModelSource {
    ModelSource::Folder(Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/tinystories-mor-expert-5m"))
}

/// The adapter that `gpu` is on, seen through an instance as programs make them, validation included.
fn adapter_of(gpu: &str) -> wgpu::Adapter {
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle());
    let adapters = pollster::block_on(instance.enumerate_adapters(wgpu::Backends::PRIMARY));
    adapters.into_iter().find(|adapter| adapter.get_info().name == gpu).expect("the adapter is still there")
}

fn request(session: &Session, sampling: SamplingParams) -> GenerateRequest {
    let prompt = session.tokenizer().expect("there is one").encode("Once upon a time").expect("it is text");
    GenerateRequest { max_new_tokens: 40, sampling, ..GenerateRequest::new(prompt) }
}

fn finished(event: Event) -> Option<Summary> {
    if let Event::Finished(summary) = event { Some(summary) } else { None }
}

#[test]
fn nothing_is_lost_and_tokens_are_the_same() {
    let mut alone = Session::load(source(), options()).expect("the model loads");
    let adapter = adapter_of(&alone.device().name);
    let (app, gpu) = App::open(&adapter, &options().gpu).expect("a program can open a device");
    assert_eq!(gpu.caps(), alone.model().gpu().caps(), "the device offers what one of our own does");
    let mut shared = Session::load_on(gpu, source(), options()).expect("the model loads");
    let mut number = 0;
    for sampling in [SamplingParams::greedy(), SamplingParams { seed: 7, ..SamplingParams::default() }] {
        let request = request(&alone, sampling);
        let expected = alone.generate(&request).expect("the request is sound");
        let expected = expected.filter_map(|event| finished(event.expect("the device works"))).next().expect("an end");

        let handle = shared.submit(&request).expect("the request is sound");
        let mut summary = None;
        let first = number;
        while shared.step().expect("the device works") {
            assert!(app.frame(number).expect("a picture") == App::expected(number), "frame {number}");
            number += 1;
            summary = summary.or(std::iter::from_fn(|| handle.try_next()).find_map(finished));
        }
        let summary = summary.or(std::iter::from_fn(|| handle.try_next()).find_map(finished)).expect("an end");
        assert!(number > first + 1, "frames were drawn between steps");
        assert_eq!((summary.tokens, summary.depths), (expected.tokens, expected.depths));
        assert_eq!((summary.text, summary.kv_entries), (expected.text, expected.kv_entries));
    }
}

#[test]
fn errors_go_to_whoever_made_them() {
    let gpu = Gpu::open(&options().gpu).expect("a device");
    let (app, gpu) = App::open(&adapter_of(&gpu.summary().name), &options().gpu).expect("a program can open a device");
    let seen = Arc::new(Mutex::new(Vec::new()));
    let sink = Arc::clone(&seen);
    app.device.on_uncaptured_error(Arc::new(move |error: wgpu::Error| {
        sink.lock().expect("nothing panics here").push(error.to_string());
    }));
    let mut session = Session::load_on(gpu.clone(), source(), options()).expect("the model loads");
    let request = request(&session, SamplingParams::greedy());
    let handle = session.submit(&request).expect("the request is sound");
    // The program's mistake, in the middle of a generation.
    assert!(session.step().expect("the device works"));
    let too_much = wgpu::BufferDescriptor {
        label: Some("too much"),
        size: u64::MAX / 4,
        usage: wgpu::BufferUsages::COPY_DST,
        mapped_at_creation: false,
    };
    drop(app.device.create_buffer(&too_much));
    assert_eq!(seen.lock().expect("nothing panics here").len(), 1, "{seen:?}");
    while session.step().expect("the program's error is none of ours") {}
    let summary = std::iter::from_fn(|| handle.try_next()).find_map(finished).expect("an end");
    assert_eq!(summary.tokens.len(), 40);

    // Ours.
    let rejected = broken_kernel(&gpu).expect_err("the source is no WGSL");
    assert!(matches!(&rejected, KernelError::Shader { kernel, .. } if kernel == "broken"), "{rejected}");
    assert_eq!(seen.lock().expect("nothing panics here").len(), 1, "{seen:?}");

    // A device that goes away ends generations, and nothing hangs.
    let handle = session.submit(&request).expect("the request is sound");
    assert!(session.step().expect("the device works"));
    app.device.destroy();
    let end = std::iter::from_fn(|| Some(session.step())).find_map(Result::err).expect("an error, not an end");
    assert!(matches!(end, RuntimeError::Kernel(KernelError::Device { .. })), "{end}");
    assert!(std::iter::from_fn(|| handle.try_next()).find_map(finished).is_none());
}

fn broken_kernel(gpu: &Gpu) -> Result<(), KernelError> {
    use mor_kernels::caps::DeviceCaps;
    use mor_kernels::kernel::{Binding, Kernel};
    use mor_kernels::plan::{Grid, PlanBuilder};
    use mor_kernels::shader::Definitions;

    struct Broken;
    impl Kernel for Broken {
        const NAME: &'static str = "broken";
        const SOURCE: Option<&'static str> = Some("fn main() { nonsense }");
        type Params = u32;
        type Bindings<'a> = ();

        fn definitions(&self, _: &DeviceCaps) -> Definitions {
            Definitions::new()
        }

        fn bindings<'a>(&self, (): &Self::Bindings<'a>) -> Vec<Binding<'a>> {
            Vec::new()
        }

        fn workgroup_storage_bytes(&self, _: &DeviceCaps) -> u32 {
            0
        }
    }
    let mut plan = PlanBuilder::new(gpu)?;
    plan.dispatch(&Broken, &(), &0, Grid::Fixed([1, 1, 1]))?;
    plan.finish().map(|_| ())
}

#[test]
fn devices_with_too_little_are_refused() {
    let gpu = Gpu::open(&options().gpu).expect("a device");
    let adapter = adapter_of(&gpu.summary().name);
    let open = |descriptor: &wgpu::DeviceDescriptor<'_>| {
        let (device, queue) = pollster::block_on(adapter.request_device(descriptor)).expect("the adapter has that");
        Gpu::from_wgpu(&adapter, device, queue, &options().gpu)
    };
    // What a program gets that asks for nothing: WebGPU's defaults, which suffice, without subgroups.
    let plain = open(&wgpu::DeviceDescriptor::default()).expect("the defaults suffice");
    assert_eq!(plain.caps().subgroup_sizes, None);
    assert!(!plain.caps().timestamps && plain.caps().cooperative_matrices.is_none());
    assert!(plain.caps().max_storage_binding_bytes <= 128 << 20);

    let required_limits = wgpu::Limits {
        max_storage_buffers_per_shader_stage: 4,
        max_compute_workgroup_storage_size: 8 << 10,
        ..wgpu::Limits::default()
    };
    match open(&wgpu::DeviceDescriptor { required_limits, ..wgpu::DeviceDescriptor::default() }) {
        Err(error @ KernelError::UnfitDevice { .. }) => {
            let message = error.to_string();
            assert!(message.contains("max_storage_buffers_per_shader_stage of 8 (it has 4)"), "{message}");
            assert!(message.contains("max_compute_workgroup_storage_size of 16384 (it has 8192)"), "{message}");
            assert!(message.contains("create it with Gpu::device_descriptor"), "{message}");
        }
        other => panic!("{other:?}"),
    }
}
