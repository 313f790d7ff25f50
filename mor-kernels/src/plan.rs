//! [`Plan`]: an ordered list of dispatches recorded once and encoded every step.
//!
//! A plan has no branches and takes no arguments: what varies from step to step (tokens, positions, counts)
//! lies in device buffers, and grids that depend on a count are indirect. The host branches by choosing a plan.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use crate::error::{KernelError, Result};
use crate::gpu::Gpu;
use crate::kernel::{self, Access, Binding, CompiledKernel, Kernel};
use crate::rows::{MAX_GRIDS, RowSet};
use crate::tensor::{DType, Tensor};

/// How many workgroups a dispatch has.
#[derive(Clone, Copy, Debug)]
pub enum Grid<'a> {
    /// Known when the plan is recorded.
    Fixed([u32; 3]),
    /// Known to the device: `(x, ceil(rows / rows_per_workgroup), z)`, and no workgroup at all for no rows. Of a
    /// [`fixed`](RowSet::fixed) set, known when the plan is recorded.
    Rows {
        /// The set whose count decides.
        set: &'a RowSet,
        /// Workgroups along x.
        x: u32,
        /// Rows one workgroup handles.
        rows_per_workgroup: u32,
        /// Workgroups along z.
        z: u32,
    },
}

impl<'a> Grid<'a> {
    /// `(x, ceil(rows of set / rows_per_workgroup), 1)`.
    pub fn rows(set: &'a RowSet, x: u32, rows_per_workgroup: u32) -> Self {
        Grid::Rows { set, x, rows_per_workgroup, z: 1 }
    }
}

#[derive(Debug)]
enum Workgroups {
    Direct([u32; 3]),
    Indirect { buffer: wgpu::Buffer, offset: u64 },
}

#[derive(Debug)]
enum Step {
    Dispatch {
        label: &'static str,
        pipeline: wgpu::ComputePipeline,
        bind_group: wgpu::BindGroup,
        workgroups: Workgroups,
        weight_bytes: u64,
    },
    Copy {
        from: wgpu::Buffer,
        from_offset: u64,
        to: wgpu::Buffer,
        to_offset: u64,
        bytes: u64,
    },
}

impl Step {
    /// Encodes a dispatch; copies are not for passes.
    fn encode(&self, pass: &mut wgpu::ComputePass<'_>) {
        let Step::Dispatch { pipeline, bind_group, workgroups, .. } = self else { return };
        pass.set_pipeline(pipeline);
        pass.set_bind_group(0, bind_group, &[]);
        match workgroups {
            Workgroups::Direct([x, y, z]) => pass.dispatch_workgroups(*x, *y, *z),
            Workgroups::Indirect { buffer, offset } => pass.dispatch_workgroups_indirect(buffer, *offset),
        }
    }
}

/// One dispatch of a [`Plan`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dispatch {
    /// [`Kernel::NAME`].
    pub kernel: &'static str,
    /// Name of the part it belongs to; see [`PlanBuilder::part`].
    pub part: &'static str,
    /// Bytes of the weights that it reads as a whole, unless its grid is empty; 0 of kernels without such a weight.
    pub weight_bytes: u64,
}

/// A recorded list of steps over its own parameter arena.
#[derive(Debug)]
pub struct Plan {
    steps: Vec<Step>,
    /// Name and first step of each part, ascending; the first one starts at 0.
    parts: Vec<(&'static str, usize)>,
    description: Vec<String>,
    ahead: Mutex<Ahead>,
}

/// The first steps of a plan, recorded for the next time that it is handed over.
#[derive(Debug, Default)]
pub(crate) struct Ahead {
    pub(crate) pieces: Vec<wgpu::CommandBuffer>,
    pub(crate) num_steps: usize,
}

impl Plan {
    /// Number of dispatches, those with an empty grid included.
    pub fn num_dispatches(&self) -> usize {
        self.steps.iter().filter(|step| matches!(step, Step::Dispatch { .. })).count()
    }

    /// One line per step: kernel, grid, tensors.
    pub fn describe(&self) -> String {
        self.description.join("\n")
    }

    /// The dispatches, in order.
    pub fn dispatches(&self) -> impl Iterator<Item = Dispatch> {
        let mut parts = self.parts.iter().peekable();
        let mut part = "";
        self.steps.iter().enumerate().filter_map(move |(index, step)| {
            while let Some((name, _)) = parts.next_if(|(_, start)| *start <= index) {
                part = name;
            }
            match step {
                Step::Dispatch { label, weight_bytes, .. } => {
                    Some(Dispatch { kernel: label, part, weight_bytes: *weight_bytes })
                }
                Step::Copy { .. } => None,
            }
        })
    }

    /// Names of the parts, in order; see [`PlanBuilder::part`].
    pub fn parts(&self) -> impl Iterator<Item = &'static str> {
        self.parts.iter().map(|(name, _)| *name)
    }

    /// Encodes all steps, in one compute pass unless copies stand between dispatches.
    pub(crate) fn encode(&self, encoder: &mut wgpu::CommandEncoder, steps: Range<usize>) {
        Self::encode_steps(&self.steps[steps], encoder);
    }

    /// Records the next of the first pieces that [`Submission::plan_at_once`](crate::submit::Submission::plan_at_once) hands over,
    /// for the next time; `false` if they are there. Takes some 0.1 ms (`benches/runs/2026-11-30-nvidia-h200/host-timeline.txt`).
    pub fn record_ahead(&self, gpu: &Gpu) -> bool {
        // The device is busy with these while the others are recorded.
        const MOST_PIECES: usize = 2;
        let mut ahead = self.ahead.lock().unwrap_or_else(PoisonError::into_inner);
        let piece = self.piece(ahead.num_steps);
        // The last piece is recorded together with what comes behind it.
        if ahead.pieces.len() == MOST_PIECES || piece.end == self.num_steps() {
            return false;
        }
        ahead.num_steps = piece.end;
        ahead.pieces.push(gpu.catch(|device, _| {
            let mut encoder =
                device.create_command_encoder(&wgpu::CommandEncoderDescriptor { label: Some("mor ahead") });
            self.encode(&mut encoder, piece);
            encoder.finish()
        }));
        true
    }

    /// The steps from `start` on, 0 or where a piece ends, that a device which idles is given at a time. Each piece costs a submit, and
    /// the device is busy with all before it.
    pub(crate) fn piece(&self, start: usize) -> Range<usize> {
        const FIRST_PIECE: usize = 8;
        start..(3 * start + FIRST_PIECE).min(self.num_steps())
    }

    /// What is recorded so.
    pub(crate) fn take_ahead(&self) -> Ahead {
        std::mem::take(&mut *self.ahead.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Number of steps, copies included.
    pub(crate) fn num_steps(&self) -> usize {
        self.steps.len()
    }

    /// As [`Plan::encode`], with passes that end where parts end. Part i lies between queries `first + i` and
    /// `first + i + 1`.
    pub(crate) fn encode_parts(&self, encoder: &mut wgpu::CommandEncoder, queries: &wgpu::QuerySet, first: u32) {
        encoder.write_timestamp(queries, first);
        let ends = self.parts.iter().skip(1).map(|(_, start)| *start).chain([self.steps.len()]);
        for (i, ((_, start), end)) in (1..).zip(self.parts.iter().zip(ends)) {
            Self::encode_steps(&self.steps[*start..end], encoder);
            encoder.write_timestamp(queries, first + i);
        }
    }

    fn encode_steps(steps: &[Step], encoder: &mut wgpu::CommandEncoder) {
        let mut steps = steps.iter().peekable();
        while let Some(step) = steps.peek() {
            if let Step::Copy { from, from_offset, to, to_offset, bytes } = step {
                encoder.copy_buffer_to_buffer(from, *from_offset, to, *to_offset, *bytes);
                steps.next();
                continue;
            }
            let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
            while let Some(step @ Step::Dispatch { .. }) = steps.peek() {
                step.encode(&mut pass);
                steps.next();
            }
        }
    }

    /// Encodes the dispatches `range`, the i-th of it in a pass of its own between queries `2 i` and `2 i + 1`, and the copies
    /// before each. Copies the grids of those that the device sizes to `12 i` in `grids`.
    pub(crate) fn encode_timed(
        &self,
        encoder: &mut wgpu::CommandEncoder,
        queries: &wgpu::QuerySet,
        grids: &wgpu::Buffer,
        range: Range<usize>,
    ) {
        let mut next = 0;
        for step in &self.steps {
            let is_dispatch = matches!(step, Step::Dispatch { .. });
            if !is_dispatch && range.contains(&next) {
                Self::encode_steps(std::slice::from_ref(step), encoder);
            }
            if is_dispatch && range.contains(&next) {
                let i = next - range.start;
                encoder.write_timestamp(queries, 2 * i as u32);
                step.encode(&mut encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default()));
                encoder.write_timestamp(queries, 2 * i as u32 + 1);
                if let Step::Dispatch { workgroups: Workgroups::Indirect { buffer, offset }, .. } = step {
                    encoder.copy_buffer_to_buffer(buffer, *offset, grids, 12 * i as u64, 12);
                }
            }
            next += usize::from(is_dispatch);
        }
    }
}

/// Records a [`Plan`].
#[derive(Debug)]
pub struct PlanBuilder<'g> {
    gpu: &'g Gpu,
    pending: Vec<Pending>,
    parts: Vec<(&'static str, usize)>,
    params: Vec<u8>,
    grids: Vec<[u32; 4]>,
    grid_table: Tensor,
    description: Vec<String>,
}

#[derive(Debug)]
enum Pending {
    Dispatch {
        label: &'static str,
        kernel: Arc<CompiledKernel>,
        entries: Vec<(u32, Resource)>,
        params: std::ops::Range<u64>,
        workgroups: Workgroups,
        weight_bytes: u64,
    },
    Copy {
        from: wgpu::Buffer,
        from_offset: u64,
        to: wgpu::Buffer,
        to_offset: u64,
        bytes: u64,
    },
}

/// What a [`Binding`] hands to the device.
#[derive(Debug)]
enum Resource {
    Buffer { buffer: wgpu::Buffer, offset: u64, bytes: u64 },
    Texels(wgpu::TextureView),
}

impl Binding<'_> {
    fn resource(&self) -> Resource {
        match &self.tensor.texels {
            Some(view) if self.access == Access::Texels => Resource::Texels(view.clone()),
            _ => Resource::Buffer {
                buffer: self.tensor.buffer.clone(),
                offset: self.tensor.offset,
                bytes: self.tensor.num_bytes(),
            },
        }
    }
}

impl<'g> PlanBuilder<'g> {
    /// An empty plan for `gpu`.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`].
    pub fn new(gpu: &'g Gpu) -> Result<Self> {
        let grid_table = Tensor::zeros_uniform(gpu, "grid_table", 16 + 16 * MAX_GRIDS as u64)?;
        Ok(Self {
            gpu,
            pending: Vec::new(),
            parts: Vec::new(),
            params: Vec::new(),
            grids: Vec::new(),
            grid_table,
            description: Vec::new(),
        })
    }

    /// The device the plan is for.
    pub fn gpu(&self) -> &'g Gpu {
        self.gpu
    }

    /// The plan's table of row grids, filled by [`PlanBuilder::finish`]; `tokens_compact` binds it.
    pub fn grid_table(&self) -> Tensor {
        self.grid_table.clone()
    }

    /// Adds `[x, rows per workgroup, z, 0]` to the table, for tests of the kernel that fills it.
    #[cfg(test)]
    pub(crate) fn intern_grid(&mut self, grid: [u32; 4]) -> Result<()> {
        self.grid_index("test", grid).map(|_| ())
    }

    /// Names the steps recorded from here on, for measurements; see [`timing::parts`](crate::timing::parts). A plan that names
    /// none is one part, `all`.
    pub fn part(&mut self, name: &'static str) {
        if self.parts.last().is_none_or(|(last, _)| *last != name) {
            self.parts.push((name, self.pending.len()));
        }
    }

    /// Records one dispatch.
    ///
    /// # Errors
    /// [`KernelError::Limit`] if the grid or the kernel is over a device limit.
    pub fn dispatch<K: Kernel>(
        &mut self,
        kernel: &K,
        bindings: &K::Bindings<'_>,
        params: &K::Params,
        grid: Grid<'_>,
    ) -> Result<()> {
        let bindings = kernel.bindings(bindings);
        for binding in &bindings {
            let limit = self.gpu.caps().max_storage_binding_bytes;
            if binding.access.is_storage() && binding.tensor.num_bytes() > limit {
                return Err(KernelError::Limit {
                    kernel: K::NAME,
                    what: "bytes of one binding",
                    found: binding.tensor.num_bytes(),
                    limit,
                    why: format!("\"{}\" can bind", self.gpu.summary().name),
                    advice: "split the tensor",
                });
            }
        }
        let kernel = kernel::prepare(self.gpu, kernel, &bindings)?;
        let workgroups = match grid {
            Grid::Fixed(counts) => {
                self.check_grid(K::NAME, counts)?;
                Workgroups::Direct(counts)
            }
            Grid::Rows { set, x, rows_per_workgroup, z } => {
                let counts = [x, (set.capacity as u32).div_ceil(rows_per_workgroup), z];
                self.check_grid(K::NAME, counts)?;
                if set.is_fixed {
                    Workgroups::Direct(counts)
                } else {
                    let index = self.grid_index(K::NAME, [x, rows_per_workgroup, z, 0])?;
                    // Row sets are no parts of anything.
                    Workgroups::Indirect { buffer: set.dispatch.buffer.clone(), offset: 16 + 12 * index as u64 }
                }
            }
        };
        let names: Vec<_> = bindings.iter().map(|b| format!("{}{:?}", b.tensor.label(), b.tensor.shape())).collect();
        self.description.push(format!("{:<18} {grid} {}", K::NAME, names.join(" "), grid = describe_grid(&grid)));
        let start = self.params.len();
        self.params.extend_from_slice(bytemuck::bytes_of(params));
        let end = start + (self.params.len() - start).next_multiple_of(16).max(16);
        let alignment = self.gpu.caps().uniform_alignment.max(16) as usize;
        self.params.resize(end.next_multiple_of(alignment), 0);
        self.pending.push(Pending::Dispatch {
            label: K::NAME,
            kernel,
            entries: bindings.iter().map(|b| (b.index, b.resource())).collect(),
            params: start as u64..end as u64,
            workgroups,
            weight_bytes: bindings.iter().filter(|b| b.is_weight).map(|b| b.tensor.num_bytes()).sum(),
        });
        Ok(())
    }

    /// Records a copy of `bytes` bytes; it ends the compute pass, so hot plans have none.
    pub fn copy(&mut self, from: &Tensor, from_offset: u64, to: &Tensor, to_offset: u64, bytes: u64) {
        self.description.push(format!("copy {} -> {} ({bytes} bytes)", from.label(), to.label()));
        let (from_offset, to_offset) = (from.offset + from_offset, to.offset + to_offset);
        let (from, to) = (from.buffer.clone(), to.buffer.clone());
        self.pending.push(Pending::Copy { from, from_offset, to, to_offset, bytes });
    }

    /// Compiles the kernels that are new, uploads the parameters and makes the bind groups.
    ///
    /// # Errors
    /// [`KernelError::Shader`] if a kernel does not compile; [`KernelError::OutOfMemory`]; [`KernelError::Device`] if a bind
    /// group is refused: a bug of ours.
    pub fn finish(self) -> Result<Plan> {
        kernel::compile(
            self.gpu,
            self.pending.iter().filter_map(|pending| match pending {
                Pending::Dispatch { kernel, .. } => Some(kernel),
                Pending::Copy { .. } => None,
            }),
        )?;
        let arena = Tensor::zeros_uniform(self.gpu, "params", self.params.len().max(16) as u64)?;
        self.gpu.write(&arena, 0, &self.params);
        let mut table = vec![[self.grids.len() as u32, 0, 0, 0]];
        table.extend_from_slice(&self.grids);
        self.gpu.write(&self.grid_table, 0, bytemuck::cast_slice(&table));
        let mut steps = Vec::with_capacity(self.pending.len());
        for pending in self.pending {
            steps.push(match pending {
                Pending::Copy { from, from_offset, to, to_offset, bytes } => {
                    Step::Copy { from, from_offset, to, to_offset, bytes }
                }
                Pending::Dispatch { label, kernel, entries, params, workgroups, weight_bytes } => {
                    let mut group = vec![wgpu::BindGroupEntry {
                        binding: 0,
                        resource: wgpu::BindingResource::Buffer(wgpu::BufferBinding {
                            buffer: &arena.buffer,
                            offset: params.start,
                            size: std::num::NonZeroU64::new(params.end - params.start),
                        }),
                    }];
                    group.extend(entries.iter().map(|(binding, resource)| wgpu::BindGroupEntry {
                        binding: *binding,
                        resource: match resource {
                            Resource::Buffer { buffer, offset, bytes } => {
                                wgpu::BindingResource::Buffer(wgpu::BufferBinding {
                                    buffer,
                                    offset: *offset,
                                    size: std::num::NonZeroU64::new(*bytes),
                                })
                            }
                            Resource::Texels(view) => wgpu::BindingResource::TextureView(view),
                        },
                    }));
                    let descriptor =
                        wgpu::BindGroupDescriptor { label: Some(label), layout: &kernel.layout, entries: &group };
                    let bind_group = self.gpu.catch(|device, _| device.create_bind_group(&descriptor));
                    let pipeline = kernel.pipeline().clone();
                    Step::Dispatch { label, pipeline, bind_group, workgroups, weight_bytes }
                }
            });
        }
        self.gpu.check()?;
        let mut parts = self.parts;
        if parts.first().is_none_or(|(_, start)| *start > 0) {
            parts.insert(0, ("all", 0));
        }
        Ok(Plan { steps, parts, description: self.description, ahead: Mutex::default() })
    }

    fn check_grid(&self, kernel: &'static str, counts: [u32; 3]) -> Result<()> {
        let limit = self.gpu.caps().max_workgroups;
        match counts.into_iter().find(|count| *count > limit) {
            None => Ok(()),
            Some(found) => Err(KernelError::Limit {
                kernel,
                what: "workgroups in one dimension",
                found: u64::from(found),
                limit: u64::from(limit),
                why: format!("\"{}\" dispatches", self.gpu.summary().name),
                advice: "use fewer rows at a time",
            }),
        }
    }

    fn grid_index(&mut self, kernel: &'static str, grid: [u32; 4]) -> Result<usize> {
        if let Some(index) = self.grids.iter().position(|known| *known == grid) {
            return Ok(index);
        }
        if self.grids.len() == MAX_GRIDS {
            return Err(KernelError::Limit {
                kernel,
                what: "different row grids in one plan",
                found: MAX_GRIDS as u64 + 1,
                limit: MAX_GRIDS as u64,
                why: "the grid table holds".to_owned(),
                advice: "raise MAX_GRIDS",
            });
        }
        self.grids.push(grid);
        Ok(self.grids.len() - 1)
    }
}

impl Tensor {
    /// A uniform buffer of `bytes` zero bytes.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`].
    pub fn zeros_uniform(gpu: &Gpu, label: &str, bytes: u64) -> Result<Self> {
        use wgpu::BufferUsages as U;
        let buffer = gpu.create_buffer(label, bytes, U::UNIFORM | U::COPY_DST)?;
        Ok(Self::from_parts(buffer, bytes, label, DType::U32, &[bytes as usize / 4]))
    }
}

fn describe_grid(grid: &Grid<'_>) -> String {
    match grid {
        Grid::Fixed([x, y, z]) => format!("({x}, {y}, {z})"),
        Grid::Rows { x, rows_per_workgroup, z, .. } => format!("({x}, rows/{rows_per_workgroup}, {z})"),
    }
}
