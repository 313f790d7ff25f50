//! Packs keys and values of the active rows into caches of 8 bits an element.

use crate::caps::DeviceCaps;
use crate::error::{KernelError, Result};
use crate::kernel::{Binding, Kernel};
use crate::kv_blocks::BLOCK;
use crate::plan::{Grid, PlanBuilder};
use crate::rows::RowSet;
use crate::shader::Definitions;
use crate::tensor::{DType, Tensor};

/// `k_cache[slot] = k[i]`, `v_cache[slot] = v[i]` in [blocks](crate::kv_blocks), for the active rows that have a slot.
///
/// # Source
/// Rouhani et al. 2023, Microscaling Data Formats, arXiv 2310.10537.
#[derive(Clone, Copy, Debug)]
pub struct KvPack {
    /// Threads of a workgroup, a block each.
    pub workgroup_size: u32,
}

/// Constants of a call. Mirrors `struct Params` of the shader.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub struct KvPackParams {
    /// Blocks of a row of keys.
    pub num_units: u32,
}

/// Tensors of a call.
#[derive(Clone, Copy, Debug)]
pub struct KvPackBindings<'a> {
    /// The rows to pack, n of them.
    pub rows: &'a RowSet,
    /// `[n, kv_dim]` f16.
    pub k: &'a Tensor,
    /// As `k`.
    pub v: &'a Tensor,
    /// `[slots, kv_dim]` of [`DType::Block8`], written.
    pub k_cache: &'a Tensor,
    /// As `k_cache`.
    pub v_cache: &'a Tensor,
}

impl Default for KvPack {
    fn default() -> Self {
        Self { workgroup_size: 64 }
    }
}

impl KvPack {
    /// Records the kernel over all active rows.
    ///
    /// # Errors
    /// [`KernelError::Shape`] if a tensor has another type or too few elements; as [`PlanBuilder::dispatch`].
    pub fn record(&self, plan: &mut PlanBuilder<'_>, b: KvPackBindings<'_>, p: KvPackParams) -> Result<()> {
        let row = p.num_units as usize * BLOCK;
        for (what, tensor, dtype, least) in [
            ("k", b.k, DType::F16, b.rows.capacity * row),
            ("v", b.v, DType::F16, b.rows.capacity * row),
            ("k_cache", b.k_cache, DType::Block8, row),
            ("v_cache", b.v_cache, DType::Block8, row),
        ] {
            if tensor.dtype() != dtype || tensor.num_elems() < least {
                let found = format!("{} elements of {:?}", tensor.num_elems(), tensor.dtype());
                let expected = format!("at least {least} of {dtype:?}");
                return Err(KernelError::Shape { kernel: Self::NAME, what, found, expected });
            }
        }
        plan.dispatch(self, &b, &p, Grid::rows(b.rows, self.columns(p), 1))
    }

    /// Workgroups of a row.
    pub fn columns(&self, p: KvPackParams) -> u32 {
        (2 * p.num_units).div_ceil(self.workgroup_size)
    }
}

impl Kernel for KvPack {
    const NAME: &'static str = "kv_pack";
    type Params = KvPackParams;
    type Bindings<'a> = KvPackBindings<'a>;

    fn definitions(&self, _: &DeviceCaps) -> Definitions {
        Definitions::new().u32("WORKGROUP_SIZE", self.workgroup_size)
    }

    fn bindings<'a>(&self, b: &Self::Bindings<'a>) -> Vec<Binding<'a>> {
        vec![
            Binding::read(1, &b.rows.active),
            Binding::read(2, b.k),
            Binding::read(3, b.v),
            Binding::write(4, b.k_cache),
            Binding::write(5, b.v_cache),
        ]
    }

    fn workgroup_storage_bytes(&self, _: &DeviceCaps) -> u32 {
        0
    }
}

#[cfg(all(test, feature = "oracle"))]
mod tests {
    use super::*;
    use crate::oracle::kv_pack::kv_pack;
    use crate::parity::{self, Rng};
    use crate::rows::NONE;

    #[test]
    fn matches_oracle() {
        parity::on_every_profile(|gpu, profile| {
            let mut rng = Rng::new("kv_pack");
            for (num_active, kv_dim) in [(0, 8), (1, 64), (7, 320), (65, 24)] {
                let num_slots = num_active + 5;
                let mut active = parity::some_rows(&mut rng, num_active + 3, num_active);
                for (i, entry) in active.iter_mut().enumerate() {
                    entry.kv_slot = if i % 5 == 3 { NONE } else { (num_slots - 1 - i) as u32 };
                }
                // Large, small and zero blocks beside each other.
                let sizes = [1.0, 1e-6, 3e-4, 900.0, 0.0, 65504.0];
                let mut halves = || -> Vec<half::f16> {
                    let normals = rng.normals(num_active.max(1) * kv_dim);
                    let sized =
                        normals.iter().enumerate().map(|(i, v)| (v * sizes[i / BLOCK % 6]).clamp(-65504.0, 65504.0));
                    sized.map(half::f16::from_f32).collect()
                };
                let (k, v) = (halves(), halves());
                let upload = |data: &[half::f16]| {
                    Tensor::from_slice(gpu, "kv", DType::F16, &[data.len() / kv_dim, kv_dim], data).expect("it fits")
                };
                let before = vec![0xa5a5_a5a5_u32; num_slots * kv_dim / 4];
                let cache = || {
                    let shape = [num_slots, kv_dim];
                    Tensor::from_slice(gpu, "cache", DType::Block8, &shape, &before).expect("it fits")
                };
                let (k_cache, v_cache) = (cache(), cache());
                let rows = parity::row_set(gpu, &active);
                let bindings = KvPackBindings {
                    rows: &rows,
                    k: &upload(&k),
                    v: &upload(&v),
                    k_cache: &k_cache,
                    v_cache: &v_cache,
                };
                let params = KvPackParams { num_units: (kv_dim / BLOCK) as u32 };
                let kernel = KvPack::default();
                let grid = Grid::Fixed([kernel.columns(params), num_active as u32, 1]);
                parity::run(gpu, |plan| plan.dispatch(&kernel, &bindings, &params, grid));
                for (what, data, cache) in [("k", &k, &k_cache), ("v", &v, &v_cache)] {
                    let floats: Vec<f32> = data.iter().map(|v| v.to_f32()).collect();
                    let mut want: Vec<u64> = bytemuck::cast_slice(&before).to_vec();
                    kv_pack(&active, &floats, kv_dim, &mut want);
                    let got: Vec<u64> = gpu.read(cache).expect("the device answers");
                    assert_eq!(got, want, "kv_pack {profile} {what} n={num_active} D={kv_dim}");
                }
            }
        });
    }
}
