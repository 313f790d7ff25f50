//! Generation inside a program that renders: both share one device and one queue of the program's.
//!
//! The program draws a picture between the steps of a generation and reads it back. In real life it would present it; the
//! order of things is the same.
//!
//! `cargo run --release -p mor-runtime --example shared_device -- models/tinystories-mor-expert-5m "Once upon a time"`

use std::error::Error;

// The very version of the library that mor uses: a device of another one is another type.
use mor_kernels::wgpu;
use mor_runtime::{Event, GenerateRequest, Gpu, GpuOptions, ModelSource, Session, SessionOptions};

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(folder), Some(prompt)) = (args.next(), args.next()) else {
        return Err("expected a model folder and a prompt".into());
    };
    let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
    // Saves a check of each indirect dispatch; see `Gpu::from_wgpu`.
    descriptor.flags -= wgpu::InstanceFlags::VALIDATION_INDIRECT_CALL;
    let instance = wgpu::Instance::new(descriptor);
    let adapter = pollster::block_on(instance.request_adapter(&wgpu::RequestAdapterOptions::default()))?;
    let (app, gpu) = App::open(&adapter, &GpuOptions::default())?;

    let mut session = Session::load_on(gpu, ModelSource::Folder(folder.into()), SessionOptions::default())?;
    let tokens = session.tokenizer().ok_or("the model has no tokenizer.json")?.encode(&prompt)?;
    let handle = session.submit(&GenerateRequest::new(tokens))?;
    let mut num_frames = 0;
    while session.step()? {
        if app.frame(num_frames)? != App::expected(num_frames) {
            return Err(format!("frame {num_frames} is not what was drawn").into());
        }
        num_frames += 1;
        while let Some(event) = handle.try_next() {
            if let Event::Token { text, .. } = event {
                print!("{text}");
            }
        }
    }
    println!("\n{num_frames} frames drawn meanwhile");
    Ok(())
}

/// A program that draws on a device of its own.
pub(crate) struct App {
    pub(crate) device: wgpu::Device,
    queue: wgpu::Queue,
    pipeline: wgpu::RenderPipeline,
    frame: wgpu::Buffer,
    bind_group: wgpu::BindGroup,
    target: wgpu::Texture,
}

/// Every pixel says where it is and which frame it belongs to.
const SHADER: &str = "
@group(0) @binding(0) var<uniform> frame: vec4u;

@vertex
fn corner(@builtin(vertex_index) i: u32) -> @builtin(position) vec4f {
    return vec4f(f32(i & 1u) * 4.0 - 1.0, f32(i >> 1u) * 4.0 - 1.0, 0.0, 1.0);
}

@fragment
fn pixel(@builtin(position) at: vec4f) -> @location(0) vec4f {
    return vec4f(floor(at.xy), f32(frame.x), 255.0) / 255.0;
}
";

impl App {
    /// Width and height of the picture: a row is 256 bytes, what copies from textures are aligned to.
    const SIZE: u32 = 64;

    /// Opens a device for the program and for mor, and shares it.
    pub(crate) fn open(adapter: &wgpu::Adapter, options: &GpuOptions) -> Result<(Self, Gpu), Box<dyn Error>> {
        // What mor would ask for; the program adds the features it needs itself.
        let descriptor = wgpu::DeviceDescriptor { label: Some("app"), ..Gpu::device_descriptor(adapter, options) };
        let (device, queue) = pollster::block_on(adapter.request_device(&descriptor))?;
        let gpu = Gpu::from_wgpu(adapter, device.clone(), queue.clone(), options)?;
        Ok((Self::new(device, queue), gpu))
    }

    fn new(device: wgpu::Device, queue: wgpu::Queue) -> Self {
        let module = device.create_shader_module(wgpu::ShaderModuleDescriptor {
            label: Some("app"),
            source: wgpu::ShaderSource::Wgsl(SHADER.into()),
        });
        let format = wgpu::TextureFormat::Rgba8Unorm;
        let pipeline = device.create_render_pipeline(&wgpu::RenderPipelineDescriptor {
            label: Some("app"),
            layout: None,
            vertex: wgpu::VertexState {
                module: &module,
                entry_point: Some("corner"),
                compilation_options: wgpu::PipelineCompilationOptions::default(),
                buffers: &[],
            },
            primitive: wgpu::PrimitiveState::default(),
            depth_stencil: None,
            multisample: wgpu::MultisampleState::default(),
            fragment: Some(wgpu::FragmentState {
                module: &module,
                entry_point: Some("pixel"),
                compilation_options: wgpu::PipelineCompilationOptions::default(),
                targets: &[Some(format.into())],
            }),
            multiview_mask: None,
            cache: None,
        });
        let frame = device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("frame"),
            size: 16,
            usage: wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        let bind_group = device.create_bind_group(&wgpu::BindGroupDescriptor {
            label: Some("frame"),
            layout: &pipeline.get_bind_group_layout(0),
            entries: &[wgpu::BindGroupEntry { binding: 0, resource: frame.as_entire_binding() }],
        });
        let target = device.create_texture(&wgpu::TextureDescriptor {
            label: Some("picture"),
            size: wgpu::Extent3d { width: Self::SIZE, height: Self::SIZE, depth_or_array_layers: 1 },
            mip_level_count: 1,
            sample_count: 1,
            dimension: wgpu::TextureDimension::D2,
            format,
            usage: wgpu::TextureUsages::RENDER_ATTACHMENT | wgpu::TextureUsages::COPY_SRC,
            view_formats: &[],
        });
        Self { device, queue, pipeline, frame, bind_group, target }
    }

    /// Draws frame `number` and reads it back: rows of RGBA.
    pub(crate) fn frame(&self, number: u32) -> Result<Vec<u8>, Box<dyn Error>> {
        self.queue.write_buffer(&self.frame, 0, &(number % 256).to_le_bytes());
        let picture = self.device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("picture"),
            size: u64::from(4 * Self::SIZE * Self::SIZE),
            usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        let mut encoder = self.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        let view = self.target.create_view(&wgpu::TextureViewDescriptor::default());
        let attachment = wgpu::RenderPassColorAttachment {
            view: &view,
            depth_slice: None,
            resolve_target: None,
            ops: wgpu::Operations::default(),
        };
        let mut pass = encoder.begin_render_pass(&wgpu::RenderPassDescriptor {
            color_attachments: &[Some(attachment)],
            ..wgpu::RenderPassDescriptor::default()
        });
        pass.set_pipeline(&self.pipeline);
        pass.set_bind_group(0, &self.bind_group, &[]);
        pass.draw(0..3, 0..1);
        drop(pass);
        let layout =
            wgpu::TexelCopyBufferLayout { offset: 0, bytes_per_row: Some(4 * Self::SIZE), rows_per_image: None };
        encoder.copy_texture_to_buffer(
            self.target.as_image_copy(),
            wgpu::TexelCopyBufferInfo { buffer: &picture, layout },
            self.target.size(),
        );
        self.queue.submit([encoder.finish()]);
        picture.map_async(wgpu::MapMode::Read, .., |_| {});
        // Waits for the steps before it too: one queue, one order.
        self.device.poll(wgpu::PollType::wait_indefinitely())?;
        let pixels = picture.get_mapped_range(..)?.to_vec();
        Ok(pixels)
    }

    /// What [`App::frame`] is to return.
    pub(crate) fn expected(number: u32) -> Vec<u8> {
        let pixel = |i: u32| [i % Self::SIZE, i / Self::SIZE, number, 255].map(|value| value as u8);
        (0..Self::SIZE * Self::SIZE).flat_map(pixel).collect()
    }
}
