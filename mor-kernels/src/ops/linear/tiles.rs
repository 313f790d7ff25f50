//! How products of many rows are divided among workgroups, and which division serves which shape.

use super::PrologueKind;
use crate::caps::DeviceCaps;
use crate::rows::ROW_PADDING;

/// Lanes of a subgroup for which the shader spells out its broadcasts: those of 256-bit vectors.
const BROADCAST_LANES: u32 = 8;
/// Rows, columns and depth of the matrices that [`COOPERATIVE_TILES`] are made of, and those of Metal.
const EDGE: u32 = 16;
const SMALL_EDGE: u32 = 8;

/// Rows of a tile from which on the loop over inputs is kept short, rather than written out by compilers: instructions that ran a layer
/// ago have to be fetched again, and prompts of 2,047 tokens take 2 to 4 % less so. Small tiles have few turns, of which one more is
/// staged for nothing: batches of 32 sequences decode 6 % slower with all loops short
/// (`benches/runs/2026-11-29-nvidia-h200/steps-short-loops.txt`, `prefill-short-loops.txt`).
pub(super) const SHORT_LOOP_ROWS: u32 = 64;

/// Processors of an H200.
const PROCESSORS: u32 = 132;
/// Fields of [`LinearTile::Cooperative`] from `tile_m` to `ahead`, and about as many microseconds as a product with 960 inputs
/// takes an H200 of which every processor has one such tile, and two. Two take much less than twice as long where both fit: NVIDIA's
/// driver gives a processor 48 KiB of workgroup memory in all. Fitted to the products of 360M with so many inputs, of 16 to 2,048 rows;
/// they differ from it by 2 to 8 %, in the root mean square. Those are here that together served layers of 135M, 360M and 1.7B best: of
/// [`SHORT_LOOP_ROWS`] rows and more of 98 tiles and numbers of stages (`benches/runs/2026-11-29-nvidia-h200/linear-short-loops-tiles.txt`),
/// and of 30 with other widths (`benches/runs/2026-11-30-nvidia-h200/linear-uneven-tiles.txt`), of fewer of 79 (`linear-tiles-by-rows.txt`
/// beside the first). The first three, which have registers for one stage alone, were timed inside steps, and are fitted to these
/// (`steps-large-tiles.txt` beside the second).
pub(super) const COOPERATIVE_TILES: [([u32; 7], [f32; 2]); 25] = [
    ([256, 160, 32, 4, 2, 1, 1], [44.5, 82.8]),
    ([176, 256, 32, 1, 8, 1, 1], [44.9, 83.0]),
    ([128, 144, 64, 2, 3, 1, 1], [25.9, 49.5]),
    ([128, 128, 32, 2, 2, 1, 2], [29.3, 34.5]),
    ([128, 128, 64, 4, 2, 1, 2], [20.7, 37.8]),
    ([128, 112, 64, 4, 1, 2, 2], [20.3, 35.4]),
    ([96, 160, 32, 2, 2, 1, 2], [28.5, 33.7]),
    ([96, 144, 64, 3, 3, 1, 2], [20.2, 37.2]),
    ([96, 128, 32, 2, 2, 1, 2], [25.8, 29.5]),
    ([96, 128, 64, 2, 4, 1, 2], [18.5, 32.2]),
    ([96, 96, 32, 2, 2, 1, 2], [23.5, 26.1]),
    ([96, 96, 64, 3, 2, 1, 2], [17.1, 29.0]),
    ([64, 96, 64, 4, 2, 1, 2], [14.6, 24.0]),
    ([64, 80, 128, 4, 1, 2, 2], [13.2, 22.5]),
    ([64, 64, 64, 2, 2, 1, 2], [13.5, 15.2]),
    ([64, 64, 128, 2, 2, 2, 2], [11.1, 18.4]),
    ([64, 48, 128, 4, 1, 2, 2], [10.5, 17.2]),
    ([64, 32, 128, 2, 1, 4, 3], [9.2, 14.7]),
    ([48, 96, 128, 1, 2, 4, 1], [12.6, 20.2]),
    ([32, 64, 64, 1, 2, 2, 1], [11.4, 11.5]),
    ([32, 48, 128, 2, 1, 4, 1], [8.5, 12.5]),
    ([32, 32, 256, 1, 2, 4, 1], [6.5, 9.6]),
    ([16, 32, 128, 1, 2, 4, 4], [6.9, 7.2]),
    ([16, 32, 256, 1, 1, 8, 2], [5.6, 8.2]),
    ([16, 16, 512, 1, 1, 8, 1], [4.9, 6.0]),
];
/// Microseconds of these that a dispatch takes whatever its tiles.
const DISPATCH_MICROS: f32 = 2.0;
/// Inputs of the products that they were timed with, and microseconds of their times that other numbers of inputs do not change.
const TIMED_INPUTS: f32 = 960.0;
const ENDS_MICROS: f32 = 3.0;
/// Into how many parts inputs may be divided; microseconds that a workgroup takes for each part more than for its product, to leave
/// sums or to add them up; and what share of the time without parts a product must be expected to take to be worth it. Fitted to
/// steps with and without (`benches/runs/2026-11-30-nvidia-h200/linear-parts-of-inputs.txt`).
const PARTS: std::ops::RangeInclusive<u32> = 2..=4;
const PART_MICROS: f32 = 2.25;
const WORTH_PARTS: f32 = 0.98;
/// Fields of [`LinearTile::Cooperative`] from `tile_m` to `ahead` for matrices of [`SMALL_EDGE`], with the workgroups that an output must
/// have to be worth the tile. Not timed, for want of a device: the first three are what Apple's MLX has for many results, in f32 and in
/// f16, and for fewer (<https://github.com/ml-explore/mlx/blob/main/mlx/backend/metal/matmul.cpp>), the others for fewer rows than these.
pub(super) const SMALL_TILES: [([u32; 7], u32); 5] = [
    ([64, 64, 32, 2, 2, 1, 1], 256),
    ([64, 32, 32, 2, 2, 1, 1], 256),
    ([32, 32, 64, 2, 2, 1, 1], 80),
    ([16, 32, 64, 1, 2, 2, 1], 0),
    ([8, 32, 64, 1, 2, 2, 1], 0),
];
/// Fields of [`LinearTile::Staged`] in their order, with the workgroups that an output must have to be worth the tile, which is to
/// say the GPU filled: measured on an H200 and an H100, see `benches/runs`. Tiles that WebGPU's default limits exclude have a smaller one
/// after them.
const STAGED_TILES: [([u32; 7], u32); 9] = [
    ([128, 64, 16, 8, 8, 1, 2], 600),
    ([64, 64, 32, 8, 4, 2, 2], 200),
    ([64, 64, 16, 8, 4, 1, 2], 200),
    ([64, 32, 32, 8, 4, 2, 2], 160),
    ([32, 32, 64, 4, 4, 4, 2], 120),
    ([32, 32, 32, 4, 4, 2, 2], 120),
    ([16, 32, 64, 4, 2, 4, 2], 160),
    ([16, 32, 128, 4, 2, 8, 2], 0),
    ([16, 32, 64, 4, 2, 4, 2], 0),
];

/// How [`Linear`](super::Linear) divides the product among workgroups and threads. All variants bind the same tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LinearTile {
    /// Tiles of x and w go through workgroup memory; f32 multiply-add in registers.
    Staged {
        /// Rows of a workgroup, at most [`ROW_PADDING`].
        tile_m: u32,
        /// Columns of a workgroup.
        tile_n: u32,
        /// Inputs staged at a time; a multiple of 8.
        tile_k: u32,
        /// Rows of a thread.
        thread_m: u32,
        /// Columns of a thread; even.
        thread_n: u32,
        /// Slices of the staged inputs, each multiplied by threads of its own.
        split_k: u32,
        /// Stages whose loads are on their way, each to registers of its own.
        ahead: u32,
    },
    /// Tiles of x and w go through workgroup memory as f16; cooperative matrices, sums in f32.
    Cooperative {
        /// Rows, columns and depth of a matrix.
        edge: u32,
        /// Rows of a workgroup, at most [`ROW_PADDING`].
        tile_m: u32,
        /// Columns of a workgroup.
        tile_n: u32,
        /// Inputs staged at a time.
        tile_k: u32,
        /// Subgroups that share the rows.
        subgroups_m: u32,
        /// Subgroups that share the columns.
        subgroups_n: u32,
        /// Slices of the staged inputs, each multiplied by subgroups of its own.
        split_k: u32,
        /// Stages whose loads are on their way, each to registers of its own.
        ahead: u32,
        /// Columns of a row that a lane stores at a time: 2, or 4 where all numbers of columns are multiples of 4.
        lane_columns: u32,
        /// Parts of all inputs, each multiplied by a workgroup of its own; with several,
        /// [`LinearBindings::parts`](super::LinearBindings::parts) are needed.
        parts: u32,
    },
    /// Every thread reads for itself: for software rasterisers, whose lanes share the loads of x.
    Direct {
        /// Rows of a workgroup and of each thread, at most [`ROW_PADDING`].
        tile_m: u32,
        /// Columns of a workgroup.
        tile_n: u32,
        /// Columns of a thread; even.
        thread_n: u32,
    },
}

pub(super) fn cooperative_tile(edge: u32, fields: [u32; 7], lane_columns: u32) -> LinearTile {
    let [tile_m, tile_n, tile_k, subgroups_m, subgroups_n, split_k, ahead] = fields;
    LinearTile::Cooperative {
        edge,
        tile_m,
        tile_n,
        tile_k,
        subgroups_m,
        subgroups_n,
        split_k,
        ahead,
        lane_columns,
        parts: 1,
    }
}

/// [`SMALL_TILES`] for so many columns of a weight; none without such matrices.
fn small_tiles(caps: &DeviceCaps, num_outputs: u32) -> impl Iterator<Item = (LinearTile, u32)> {
    let lane_columns = lane_columns(caps, SMALL_EDGE, num_outputs);
    SMALL_TILES
        .iter()
        .filter(|_| caps.cooperative_matrices == Some(SMALL_EDGE))
        .map(move |&(tile, min_workgroups)| (cooperative_tile(SMALL_EDGE, tile, lane_columns), min_workgroups))
}

/// Columns of a row that a lane stores at a time, for so many columns of a weight and matrices of `edge`, if all numbers of columns are
/// multiples of 4 where that one is.
fn lane_columns(caps: &DeviceCaps, edge: u32, num_outputs: u32) -> u32 {
    if num_outputs.is_multiple_of(4) && subgroup_width(caps) <= edge * edge / 4 { 4 } else { 2 }
}

/// [`STAGED_TILES`].
fn staged_tiles() -> impl Iterator<Item = (LinearTile, u32)> {
    STAGED_TILES.iter().map(|&(tile, min_workgroups)| {
        let [tile_m, tile_n, tile_k, thread_m, thread_n, split_k, ahead] = tile;
        let tile = LinearTile::Staged { tile_m, tile_n, tile_k, thread_m, thread_n, split_k, ahead };
        (tile, min_workgroups)
    })
}

/// [`COOPERATIVE_TILES`] that suit `num_rows` rows and `num_outputs` columns of a weight, with their times; none without such matrices.
fn timed_tiles(
    caps: &DeviceCaps,
    [num_rows, num_outputs]: [u32; 2],
) -> impl Iterator<Item = (LinearTile, [f32; 2])> + '_ {
    let lane_columns = lane_columns(caps, EDGE, num_outputs);
    COOPERATIVE_TILES
        .iter()
        .filter(|_| caps.cooperative_matrices == Some(EDGE))
        .map(move |&(tile, times)| (cooperative_tile(EDGE, tile, lane_columns), times))
        .filter(move |(tile, _)| tile.suits(caps, num_rows))
}

/// Microseconds until the last of `workgroups` has ended, of a tile that takes a processor so long for one of them or for two, without
/// `once` of these: a processor takes its workgroups two at a time, the last perhaps alone.
fn waves(workgroups: u32, [one, two]: [f32; 2], once: f32) -> f32 {
    let each = workgroups.div_ceil(PROCESSORS);
    (each / 2) as f32 * (two - once) + (each % 2) as f32 * (one - once)
}

/// The one of [`timed_tiles`] whose waves are expected to end first, with its times.
fn fastest_tile(caps: &DeviceCaps, shape: [u32; 2]) -> Option<(LinearTile, [f32; 2])> {
    let micros = |(tile, times): &(LinearTile, [f32; 2])| waves(tile.num_tiles(shape), *times, DISPATCH_MICROS);
    timed_tiles(caps, shape).min_by(|a, b| micros(a).total_cmp(&micros(b)))
}

/// Size of all subgroups, where matrices are multiplied.
pub(super) fn subgroup_width(caps: &DeviceCaps) -> u32 {
    caps.subgroup_sizes.map_or(1, |(min, _)| min)
}

impl LinearTile {
    /// Most tiles of a product that is computed in parts: [`PartSums::arrivals`](super::PartSums::arrivals) of all.
    pub const MOST_PARTED_TILES: usize = 1024;
    /// Most sums of all its parts together: [`PartSums::sums`](super::PartSums::sums) of all.
    pub const MOST_PART_SUMS: usize = 8 << 20;

    /// The tile for a `shape` of about so many rows and so many columns on a device with `caps`: of those that multiply cooperative
    /// matrices of 16x16 the one that is expected to end first, of others the largest that fills a GPU. `half_products` allows activations and
    /// weights to be rounded to f16, where the device has cooperative matrices.
    pub fn for_shape(caps: &DeviceCaps, shape: [u32; 2], half_products: bool) -> Self {
        if caps.is_cpu {
            return match caps.subgroup_sizes {
                Some((BROADCAST_LANES, BROADCAST_LANES)) => {
                    LinearTile::Direct { tile_m: BROADCAST_LANES, tile_n: 64, thread_n: 4 }
                }
                _ => LinearTile::Direct { tile_m: 4, tile_n: 32, thread_n: 4 },
            };
        }
        if let Some((tile, _)) = fastest_tile(caps, shape).filter(|_| half_products) {
            return tile;
        }
        small_tiles(caps, shape[1])
            .filter(|_| half_products)
            .chain(staged_tiles())
            .find(|&(tile, enough)| tile.num_tiles(shape) >= enough && tile.suits(caps, shape[0]))
            .expect("the last tile fits every device within WebGPU's limits")
            .0
    }

    /// A tile for a `shape` of about so many rows and so many columns whose workgroups multiply parts of `in_features` inputs each, where
    /// that is expected to end sooner than [`LinearTile::for_shape`] for halves: few tiles leave processors idle, and take long for many
    /// inputs. With room in [`PartSums`](super::PartSums) for `most_rows` rows.
    pub fn in_parts(caps: &DeviceCaps, shape: [u32; 2], most_rows: u32, in_features: u32) -> Option<Self> {
        let micros = |tile: Self, times, parts| {
            let workgroups = tile.num_tiles(shape) * parts;
            waves(workgroups, times, DISPATCH_MICROS + ENDS_MICROS) * in_features as f32 / TIMED_INPUTS / parts as f32
                + if parts > 1 { PART_MICROS * parts as f32 } else { 0.0 }
        };
        let (tile, times) = fastest_tile(caps, shape)?;
        let whole = micros(tile, times, 1);
        let parted = |(mut tile, times): (Self, [f32; 2]), num_parts: u32| {
            if let Self::Cooperative { parts, .. } = &mut tile {
                *parts = num_parts;
            }
            let most_tiles = tile.num_tiles([most_rows, shape[1]]);
            // One a processor: in waves, parts only make more of them.
            let is_fit = tile.num_tiles(shape) * num_parts <= PROCESSORS
                && most_tiles as usize <= Self::MOST_PARTED_TILES
                && tile.part_sums(caps, most_tiles) <= Self::MOST_PART_SUMS
                && in_features.div_ceil(tile.tile_k()) >= num_parts;
            (tile.fits(caps) && is_fit).then(|| (tile, micros(tile, times, num_parts)))
        };
        timed_tiles(caps, shape)
            .flat_map(|timed| PARTS.map(move |parts| (timed, parts)))
            .filter_map(|(timed, parts)| parted(timed, parts))
            .min_by(|(_, a), (_, b)| a.total_cmp(b))
            .filter(|(_, micros)| *micros < WORTH_PARTS * whole)
            .map(|(tile, _)| tile)
    }

    /// The tiles that [`LinearTile::for_shape`] chooses from on a GPU with `caps`, for multiples of 4 columns.
    pub fn candidates(caps: &DeviceCaps) -> Vec<Self> {
        let cooperative = COOPERATIVE_TILES.iter().filter(|_| caps.cooperative_matrices == Some(EDGE));
        let cooperative = cooperative.map(|&(tile, _)| cooperative_tile(EDGE, tile, lane_columns(caps, EDGE, 4)));
        let small = small_tiles(caps, 4).map(|(tile, _)| tile);
        let staged = staged_tiles().map(|(tile, _)| tile);
        staged.chain(cooperative).chain(small).filter(|tile| tile.fits(caps)).collect()
    }

    /// Whether a device with `caps` has tiles that [`LinearTile::in_parts`] may choose: they take coherent storage, and barriers of the
    /// device, which are SPIR-V's, as matrices of 16x16 are.
    pub fn has_parts(caps: &DeviceCaps) -> bool {
        caps.cooperative_matrices == Some(EDGE) && caps.coherent_storage
    }

    /// Tiles of a product of so many rows and columns.
    pub(super) fn num_tiles(self, [num_rows, num_outputs]: [u32; 2]) -> u32 {
        let [tile_m, tile_n] = self.size();
        num_rows.div_ceil(tile_m) * num_outputs.div_ceil(tile_n)
    }

    /// Whether a device with `caps` can run it, and it is no higher than `num_rows` need: more would multiply padding.
    fn suits(self, caps: &DeviceCaps, num_rows: u32) -> bool {
        let unit = if let LinearTile::Cooperative { edge, .. } = self { edge } else { EDGE };
        self.size()[0] <= num_rows.next_multiple_of(unit).max(unit) && self.fits(caps)
    }

    /// Whether a device with `caps` can run it, whatever it reads and ends with.
    pub(super) fn fits(self, caps: &DeviceCaps) -> bool {
        self.is_valid(caps) && self.storage_bytes(PrologueKind::Norm) <= caps.max_workgroup_storage_bytes
    }

    /// Whether [`PrologueKind::Norm`](crate::ops::PrologueKind::Norm) is possible. Elsewhere every thread would compute the norm for
    /// itself.
    pub fn fuses_norm(self) -> bool {
        !matches!(self, LinearTile::Direct { .. })
    }

    /// Whether x is rounded to f16, so that whoever makes it may round it as well and to the same effect.
    pub fn multiplies_halves(self) -> bool {
        matches!(self, LinearTile::Cooperative { .. })
    }

    /// Parts in which [`Epilogue::Scaled`](crate::epilogue::Epilogue::Scaled) leaves the sums of squares of rows of `num_outputs`
    /// columns, one for each subgroup that shares them: no more than `num_outputs / 16 + 8`. `None` if the tile has no such end.
    pub fn num_norm_parts(self, num_outputs: u32) -> Option<u32> {
        match self {
            LinearTile::Cooperative { tile_n, subgroups_n, .. } => Some(num_outputs.div_ceil(tile_n) * subgroups_n),
            _ => None,
        }
    }

    /// Whether each lane of a subgroup loads one row of x and broadcasts it: there must be as many rows as lanes,
    /// and no lane may be missing.
    pub(super) fn broadcasts(self, caps: &DeviceCaps) -> bool {
        let LinearTile::Direct { tile_m, tile_n, thread_n } = self else { return false };
        tile_m == BROADCAST_LANES
            && (tile_n / thread_n).is_multiple_of(BROADCAST_LANES)
            && caps.subgroup_sizes == Some((BROADCAST_LANES, BROADCAST_LANES))
    }

    /// Rows and columns of a workgroup.
    pub fn size(self) -> [u32; 2] {
        match self {
            LinearTile::Staged { tile_m, tile_n, .. }
            | LinearTile::Cooperative { tile_m, tile_n, .. }
            | LinearTile::Direct { tile_m, tile_n, .. } => [tile_m, tile_n],
        }
    }

    /// Parts of all inputs, each multiplied by a workgroup of its own.
    pub fn parts(self) -> u32 {
        if let LinearTile::Cooperative { parts, .. } = self { parts } else { 1 }
    }

    /// Inputs staged at a time.
    pub(super) fn tile_k(self) -> u32 {
        match self {
            LinearTile::Staged { tile_k, .. } | LinearTile::Cooperative { tile_k, .. } => tile_k,
            LinearTile::Direct { .. } => 8,
        }
    }

    /// Elements of [`PartSums::sums`](super::PartSums::sums) that `tiles` tiles need: a thread's places of every fragment, the last
    /// perhaps of no use.
    pub(super) fn part_sums(self, caps: &DeviceCaps, tiles: u32) -> usize {
        let LinearTile::Cooperative { edge, split_k, lane_columns, parts, .. } = self else { return 0 };
        let places = edge * edge / lane_columns;
        let threads = self.threads(caps);
        let own = places.div_ceil(split_k * subgroup_width(caps));
        tiles as usize * parts as usize * (self.fragments() * own * threads * lane_columns) as usize
    }

    /// Matrices of results that a subgroup has; none without cooperative matrices.
    fn fragments(self) -> u32 {
        let LinearTile::Cooperative { edge, tile_m, tile_n, subgroups_m, subgroups_n, .. } = self else { return 0 };
        tile_m * tile_n / (edge * edge) / (subgroups_m * subgroups_n)
    }

    /// Threads of a workgroup.
    fn threads(self, caps: &DeviceCaps) -> u32 {
        match self {
            LinearTile::Staged { tile_m, tile_n, thread_m, thread_n, split_k, .. } => {
                (tile_m / thread_m) * (tile_n / thread_n) * split_k
            }
            LinearTile::Cooperative { subgroups_m, subgroups_n, split_k, .. } => {
                subgroups_m * subgroups_n * split_k * subgroup_width(caps)
            }
            LinearTile::Direct { tile_n, thread_n, .. } => tile_n / thread_n,
        }
    }

    /// Whether the shader's divisions come out whole, and its sums fit where they are to go.
    pub(super) fn is_valid(self, caps: &DeviceCaps) -> bool {
        let divides = |n: u32, parts: u32, unit: u32| parts > 0 && n > 0 && n.is_multiple_of(parts * unit);
        let whole = match self {
            LinearTile::Staged { tile_m, tile_n, tile_k, thread_m, thread_n, split_k, ahead } => {
                let sums_travel = (thread_m * thread_n).is_multiple_of(4)
                    && 4 * tile_m * tile_n <= self.storage_bytes(PrologueKind::Compact);
                divides(tile_m, thread_m, 1)
                    && divides(tile_n, thread_n, 1)
                    && divides(thread_n, 2, 1)
                    && divides(tile_k, 8, 1)
                    && divides(tile_k, split_k, 4)
                    && ahead > 0
                    && (split_k == 1 || sums_travel)
            }
            LinearTile::Cooperative {
                edge,
                tile_m,
                tile_n,
                tile_k,
                subgroups_m,
                subgroups_n,
                split_k,
                ahead,
                lane_columns,
                parts,
            } => {
                matches!(edge, SMALL_EDGE | EDGE)
                    && divides(tile_m, subgroups_m, edge)
                    && divides(tile_n, subgroups_n, edge)
                    && divides(tile_k, split_k, edge)
                    && ahead > 0
                    && parts > 0
                    && (parts == 1 || Self::has_parts(caps))
                    && matches!(lane_columns, 2 | 4)
                    && lane_columns * subgroup_width(caps) <= edge * edge
            }
            LinearTile::Direct { tile_n, thread_n, .. } => divides(tile_n, thread_n, 1) && divides(thread_n, 2, 1),
        };
        if !whole || self.size()[0] > ROW_PADDING {
            return false;
        }
        let threads = self.threads(caps);
        let sums_squares = match self {
            LinearTile::Direct { .. } => true,
            // A thread loads one column of the tile of x.
            LinearTile::Staged { tile_k, .. } | LinearTile::Cooperative { tile_k, .. } => {
                divides(threads, tile_k / 4, 1)
            }
        };
        sums_squares && (1..=caps.max_workgroup_size).contains(&threads)
    }

    /// Workgroup memory, in bytes, with a `prologue`: [`PrologueKind::Norm`] takes the most.
    pub(super) fn storage_bytes(self, prologue: PrologueKind) -> u32 {
        let (tile_m, tile_n, tile_k) = match self {
            LinearTile::Staged { tile_m, tile_n, tile_k, .. }
            | LinearTile::Cooperative { tile_m, tile_n, tile_k, .. } => (tile_m, tile_n, tile_k),
            LinearTile::Direct { .. } => return 0,
        };
        let norm = prologue == PrologueKind::Norm;
        // In vectors of 16 bytes.
        let squares = if norm { (4 * tile_m * (tile_k / 4 + 1)).next_multiple_of(16) } else { 0 };
        let factors = if norm { 4 * tile_m } else { 0 };
        factors
            + match self {
                LinearTile::Cooperative { edge, subgroups_m, subgroups_n, split_k, .. } => {
                    let results = 4 * split_k * subgroups_m * subgroups_n * edge * edge;
                    let scratch = match prologue {
                        // Whose results are no vectors, and have memory of their own.
                        PrologueKind::Scaled { .. } if edge == SMALL_EDGE => results + 4 * tile_m,
                        _ if edge == SMALL_EDGE => results + squares,
                        _ => results.max(squares),
                    };
                    8 * (tile_m + tile_n) * (tile_k / 4 + 2) + scratch
                }
                _ => 16 * (tile_m + tile_n) * (tile_k / 4 + 1) + squares,
            }
    }
}
