//! A kernel of one's own beside those of mor: its WGSL, what Rust says of it, and a plan that runs it.
//!
//! `cargo run --release -p mor-kernels --example custom_kernel`

use std::error::Error;

use mor_kernels::caps::DeviceCaps;
use mor_kernels::gpu::{Gpu, GpuOptions};
use mor_kernels::kernel::{Binding, Kernel};
use mor_kernels::plan::{Grid, PlanBuilder};
use mor_kernels::shader::Definitions;
use mor_kernels::tensor::{DType, Tensor};

/// `y += a x`. Fields are what the shader is specialised for; another value is another compiled kernel.
struct Axpy {
    workgroup_size: u32,
}

/// Mirrors `struct Params` of the shader.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct AxpyParams {
    len: u32,
    a: f32,
}

/// Tensors have names, so that none is bound in another's place.
struct AxpyBindings<'a> {
    x: &'a Tensor,
    y: &'a Tensor,
}

impl Kernel for Axpy {
    const NAME: &'static str = "axpy";
    const SOURCE: Option<&'static str> = Some(include_str!("custom_kernel.wgsl"));
    type Params = AxpyParams;
    type Bindings<'a> = AxpyBindings<'a>;

    fn definitions(&self, _: &DeviceCaps) -> Definitions {
        Definitions::new().u32("WORKGROUP_SIZE", self.workgroup_size)
    }

    fn bindings<'a>(&self, b: &Self::Bindings<'a>) -> Vec<Binding<'a>> {
        vec![Binding::read(1, b.x), Binding::write(2, b.y)]
    }

    fn workgroup_storage_bytes(&self, _: &DeviceCaps) -> u32 {
        0
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let gpu = Gpu::open(&GpuOptions::default())?;
    let len = 1000_u32;
    let values: Vec<f32> = (0..len).map(|i| i as f32).collect();
    let x = Tensor::from_slice(&gpu, "x", DType::F32, &[len as usize], &values)?;
    let y = Tensor::zeros(&gpu, "y", DType::F32, &[len as usize])?;

    let axpy = Axpy { workgroup_size: 64 };
    let mut plan = PlanBuilder::new(&gpu)?;
    let grid = Grid::Fixed([len.div_ceil(axpy.workgroup_size), 1, 1]);
    plan.dispatch(&axpy, &AxpyBindings { x: &x, y: &y }, &AxpyParams { len, a: 0.5 }, grid)?;
    let plan = plan.finish()?;
    println!("{}", plan.describe());
    // Recorded once, run as often as one likes.
    gpu.run(&plan)?;
    gpu.run(&plan)?;
    assert_eq!(gpu.read::<f32>(&y)?, values, "twice a half of x");
    println!("y[999] = {}", gpu.read::<f32>(&y)?[999]);
    Ok(())
}
