//! Chooses an adapter by a rule of one's own: the smallest memory that holds the model with room to spare, so that larger
//! cards stay free for larger models.
//!
//! `cargo run --release -p mor-runtime --example choose_adapter -- models/tinystories-mor-expert-5m`

use std::error::Error;

use mor_model::{Checkpoint, Precision};
use mor_runtime::{AdapterSummary, DeviceSelector, Gpu, GpuOptions, ModelSource, Session, SessionOptions};

fn main() -> Result<(), Box<dyn Error>> {
    let folder = std::env::args().nth(1).ok_or("expected a model folder")?;
    // Reads headers, not weights: those are memory-mapped.
    let needed = 2 * Checkpoint::open(&folder)?.device_bytes(Precision::F32, None);
    let adapters = Gpu::adapters();
    for adapter in &adapters {
        println!("{} {} ({}, {})", adapter.index, adapter.name, adapter.kind.name(), adapter.backend);
    }
    let fits = |adapter: &&AdapterSummary| adapter.memory_bytes.is_none_or(|bytes| bytes >= needed);
    // Hardware before software, and of that the smallest; Metal and DX12 do not tell how much there is.
    let best = adapters.iter().filter(fits).min_by_key(|adapter| (adapter.kind, adapter.memory_bytes));
    let best = best.ok_or_else(|| format!("no adapter has {needed} bytes"))?;
    let gpu = GpuOptions { device: DeviceSelector::Index(best.index), ..GpuOptions::default() };
    let session =
        Session::load(ModelSource::Folder(folder.into()), SessionOptions { gpu, ..SessionOptions::default() })?;
    println!("loaded onto {}", session.device().name);
    Ok(())
}
