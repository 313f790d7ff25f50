// Tiles of linear in workgroup memory: how many loads of a thread fill them, where these go, and what results travel through after
// them.

const X_COLUMNS: u32 = TILE_K / X_UNIT;
const TILE_UNITS: u32 = TILE_K / 8u;
// Of what is loaded at once.
const TILE_RUNS: u32 = TILE_UNITS / RUN;
// Of a thread; some may have one less.
const X_LOADS: u32 = (TILE_M * X_COLUMNS + THREADS - 1u) / THREADS;
const W_LOADS: u32 = (TILE_N * TILE_RUNS + THREADS - 1u) / THREADS;

// 16 bytes of padding a row: an odd stride spreads the rows that lanes read at once over all banks.
#if COOPERATIVE
// Rows that together are as wide as all banks, which is what lanes write at once. Rows next to each other would overlap by
// their padding; these do not.
const WRITTEN: u32 = max(64u / TILE_K, 1u);

// Row of a tile of `columns` loads a row that load `i` of the tile belongs to.
fn tile_row(i: u32, columns: u32) -> u32 {
    let in_8 = i % (8u * columns);
    return i / (8u * columns) * 8u + in_8 / (WRITTEN * columns) + in_8 / columns % WRITTEN * (8u / WRITTEN);
}

#if EDGE_8
// Metal loads matrices from arrays of their elements, not of vectors.
alias TileUnit = f16;
const STRIDE: u32 = TILE_K + 8u;
// Units of an edge of a matrix.
const EDGE_UNITS: u32 = EDGE;
#else
alias TileUnit = vec4<f16>;
const STRIDE: u32 = TILE_K / 4u + 2u;
const EDGE_UNITS: u32 = EDGE / 4u;
#endif
const W_TILE: u32 = TILE_M * STRIDE;
// The tile of x, then that of w.
var<workgroup> tiles: array<TileUnit, (TILE_M + TILE_N) * STRIDE>;

// Four elements of the row of a tile that begins at `row`.
fn stage_quad(row: u32, quad: u32, values: vec4<f16>) {
#if EDGE_8
    let at = row + 4u * quad;
    tiles[at] = values.x;
    tiles[at + 1u] = values.y;
    tiles[at + 2u] = values.z;
    tiles[at + 3u] = values.w;
#else
    tiles[row + quad] = values;
#endif
}

#if X_F16
fn stage_x(m: u32, c: u32, value: XUnit) {
    let low = vec4<f32>(unpack2x16float(value.x), unpack2x16float(value.y));
    let high = vec4<f32>(unpack2x16float(value.z), unpack2x16float(value.w));
    stage_quad(m * STRIDE, 2u * c, vec4<f16>(low));
    stage_quad(m * STRIDE, 2u * c + 1u, vec4<f16>(high));
}
#else
fn stage_x(m: u32, c: u32, value: XUnit) {
    stage_quad(m * STRIDE, c, vec4<f16>(value));
}
#endif

#if WIDE_LOADS
fn stage_w(n: u32, run: u32, value: LoadUnit) {
    let row = W_TILE + n * STRIDE;
    let weights = unpack(value);
    stage_quad(row, 4u * run, weights[0]);
    stage_quad(row, 4u * run + 1u, weights[1]);
    stage_quad(row, 4u * run + 2u, weights[2]);
    stage_quad(row, 4u * run + 3u, weights[3]);
}
#else
fn stage_w(n: u32, unit: u32, value: LoadUnit) {
    let row = W_TILE + n * STRIDE;
    let weights = unpack(value);
    stage_quad(row, 2u * unit, vec4<f16>(weights[0]));
    stage_quad(row, 2u * unit + 1u, vec4<f16>(weights[1]));
}
#endif

// Who holds which element of a matrix is the driver's secret: sums reach the epilogue through workgroup memory, one
// fragment of each subgroup at a time.
const RESULT: u32 = EDGE * EDGE;
const RESULTS: u32 = SPLIT_K * SLICE * RESULT;
// Columns of a row of it.
const ROW_COLUMNS: u32 = EDGE / WIDTH;
// Places of Columns in a fragment, and in one fragment of each subgroup of a slice.
const PLACES: u32 = RESULT / WIDTH;
const SLICE_PLACES: u32 = SLICE * PLACES;
// How many of these are a thread's to add up and store.
const OWN: u32 = (PLACES + SPLIT_K * SUBGROUP_WIDTH - 1u) / (SPLIT_K * SUBGROUP_WIDTH);
#if PARTED
// Of a tile.
const TILE_PLACES: u32 = FRAGMENTS_M * FRAGMENTS_N * OWN * THREADS;
// Of which one element counts: drivers put variables next to each other, and matrices are loaded from multiples of 16 bytes.
var<workgroup> arrived: vec4<u32>;

// Where a thread's columns of fragment j in row m lie among those of a tile's part.
fn part_place(m: u32, j: u32, i: u32, thread: u32) -> u32 {
    return ((m * FRAGMENTS_N + j) * OWN + i) * THREADS + thread;
}
#endif
#else
fn tile_row(i: u32, columns: u32) -> u32 {
    return i / columns;
}

const STRIDE: u32 = TILE_K / 4u + 1u;
const W_TILE: u32 = TILE_M * STRIDE;
alias TileUnit = vec4<f32>;
// The tile of x, then that of w: even columns first, then odd ones, so that neighbouring lanes read neighbouring rows.
var<workgroup> tiles: array<TileUnit, (TILE_M + TILE_N) * STRIDE>;

fn stage_x(m: u32, c: u32, value: XUnit) {
    tiles[m * STRIDE + c] = value;
}

fn stage_w(n: u32, unit: u32, value: LoadUnit) {
    let to = W_TILE + (n / 2u + n % 2u * (TILE_N / 2u)) * STRIDE + 2u * unit;
    let weights = unpack(value);
    tiles[to] = weights[0];
    tiles[to + 1u] = weights[1];
}
#endif
#if NORM
// Sums of squares of each column of the tiles of x, and what becomes of them: the inverse root mean square of each row.
const SQUARES_STRIDE: u32 = TILE_K / 4u + 1u;
const SQUARES: u32 = TILE_M * SQUARES_STRIDE;
var<workgroup> factors: array<f32, TILE_M>;
#endif
#if EDGE_8
var<workgroup> results: array<f32, RESULTS>;

fn result_columns(place: u32) -> Columns {
    let at = place * WIDTH;
#if QUADS
    return Columns(results[at], results[at + 1u], results[at + 2u], results[at + 3u]);
#else
    return Columns(results[at], results[at + 1u]);
#endif
}
#if NORM
var<workgroup> scratch: array<Columns, (SQUARES + WIDTH - 1u) / WIDTH>;
#elif SCALED
var<workgroup> scratch: array<Columns, (TILE_M + WIDTH - 1u) / WIDTH>;
#endif
#elif COOPERATIVE
#if NORM
var<workgroup> scratch: array<Columns, (max(SQUARES, RESULTS) + WIDTH - 1u) / WIDTH>;
#else
var<workgroup> scratch: array<Columns, RESULTS / WIDTH>;
#endif
#elif NORM
var<workgroup> scratch: array<Columns, (SQUARES + WIDTH - 1u) / WIDTH>;
#endif
