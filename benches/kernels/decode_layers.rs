//! `decode_layers`: four layers of every shape, embedding and head at two positions, f16, q8 and q4 weights (whose head is q8), f16
//! caches, on as many workgroups as the device runs at a time; throughput counts the bytes of the weights. Four layers of a small
//! shape stay in a large GPU's cache, where a whole model's do not.

use criterion::Criterion;
use mor_bench::{SHAPES, Shape, is_wanted, record, time_read};
use mor_kernels::gpu::Gpu;
use mor_kernels::ops::{
    AttentionShape, DecodeLayers, DecodeLayersBindings, DecodeLayersParams, GpuSampling, GridExchange, LayerRouting,
    LayerStep, LayersShape, SampleToken,
};
use mor_kernels::oracle::decode_layers::{LayersState, decode_layers};
use mor_kernels::parity::{self, Output, Rng, Tolerance};
use mor_kernels::plan::{Grid, PlanBuilder};
use mor_kernels::rows::{KvTable, NONE, PAGE_SIZE, ROW_ACTIVE, ROW_SAMPLE, Row, RowSet};
use mor_kernels::tensor::{DType, Tensor};

const NUM_LAYERS: u32 = 4;
const POSITIONS: [u32; 2] = [128, 2000];
/// Rows of a stack of matrices that differ, as in `linear_decode`.
const DISTINCT_ROWS: usize = 251;
/// Rounds of a trial of the kernel itself.
const TRIAL_ROUNDS: u32 = 100;

/// What one workgroup can do alone: CPUs run no two at a time.
const ON_CPU: &[Shape] = &[Shape {
    name: "small",
    hidden_size: 128,
    intermediate_size: 352,
    num_attention_heads: 2,
    num_key_value_heads: 1,
    head_dim: 64,
    vocab_size: 4096,
}];

pub(crate) fn bench(criterion: &mut Criterion, gpu: &Gpu) {
    let caps = gpu.caps();
    // Of layers and head: those of models.
    let types = [([DType::F16; 2], "f16"), ([DType::Q8; 2], "q8"), ([DType::Q4, DType::Q8], "q4")];
    // Compilers of CPUs take seconds for each.
    let (shapes, types) = if caps.is_cpu { (ON_CPU, &types[..1]) } else { (SHAPES, &types[..]) };
    for sizes in shapes {
        for &([layer_dtype, head_dtype], suffix) in types {
            let what = format!("{}/{suffix}", sizes.name);
            let attention = AttentionShape {
                num_attention_heads: sizes.num_attention_heads,
                num_key_value_heads: sizes.num_key_value_heads,
                head_dim: sizes.head_dim,
                kv_dtype: DType::F16,
                kv_table: KvTable::Pages,
            };
            let shape = LayersShape {
                hidden_size: sizes.hidden_size,
                mlp_dim: sizes.intermediate_size,
                vocab_size: sizes.vocab_size,
                attention,
                layer_dtype,
                head_dtype,
                router_dtype: DType::F32,
                routing: LayerRouting::Fixed,
            };
            if !is_wanted(&format!("decode_layers/{what}")) {
                continue;
            }
            let bytes = stack_bytes(sizes, &shape).into_iter().max().unwrap_or(0);
            if bytes > caps.max_storage_binding_bytes {
                eprintln!("{what} skipped: {bytes} bytes of weights are more than one binding holds");
                continue;
            }
            layers(criterion, gpu, &what, sizes, shape);
        }
    }
}

/// Outputs, inputs and types of the four products of all layers, and of the head.
fn products(sizes: &Shape, shape: &LayersShape) -> [(usize, usize, DType); 5] {
    let (c, mlp) = (sizes.hidden_size as usize, sizes.intermediate_size as usize);
    let q_dim = (sizes.num_attention_heads * sizes.head_dim) as usize;
    let kv_dim = (sizes.num_key_value_heads * sizes.head_dim) as usize;
    let layers = [[q_dim + 2 * kv_dim, c], [c, q_dim], [2 * mlp, c], [c, mlp]];
    let [qkv, o, gate_up, down] =
        layers.map(|[rows, columns]| (NUM_LAYERS as usize * rows, columns, shape.layer_dtype));
    [qkv, o, gate_up, down, (sizes.vocab_size as usize, c, shape.head_dtype)]
}

fn stack_bytes(sizes: &Shape, shape: &LayersShape) -> [u64; 5] {
    products(sizes, shape).map(|(rows, columns, dtype)| (rows * dtype.row_bytes(columns)) as u64)
}

/// Checks and times the layers of one shape.
fn layers(criterion: &mut Criterion, gpu: &Gpu, what: &str, sizes: &Shape, shape: LayersShape) {
    let mut rng = Rng::new(what);
    let stack = |(rows, k, dtype): (usize, usize, DType), rng: &mut Rng| {
        let (distinct, values) = parity::upload_weight(gpu, rng, DISTINCT_ROWS, k, dtype);
        let packed: Vec<u8> = gpu.read(&distinct).expect("the device answers");
        let packed: Vec<u8> = packed.into_iter().cycle().take(rows * dtype.row_bytes(k)).collect();
        let weight = Tensor::from_slice(gpu, "stack", dtype, &[rows, k], &packed).expect("the caller asked");
        let values: Vec<f32> = values.into_iter().cycle().take(rows * k).collect();
        (weight.into_weight(gpu).expect("a texture of as many bytes fits"), values)
    };
    let [(qkv, qkv_proj), (o, o_proj), (gate_up, gate_up_proj), (down, down_proj), (head, lm_head)] =
        products(sizes, &shape).map(|product| stack(product, &mut rng));

    let (c, head_dim) = (sizes.hidden_size as usize, sizes.head_dim as usize);
    let kv_dim = sizes.num_key_value_heads as usize * head_dim;
    let max_pages = POSITIONS[1] / PAGE_SIZE + 1;
    let num_slots = (max_pages * PAGE_SIZE) as usize;
    let pages: Vec<u32> = (0..max_pages).rev().collect();
    let mut cache = || -> Vec<half::f16> {
        let values = rng.normals(NUM_LAYERS as usize * num_slots * kv_dim);
        values.into_iter().map(half::f16::from_f32).collect()
    };
    let (keys, values) = (cache(), cache());
    let upload = |cache: &[half::f16]| Tensor::from_slice(gpu, "cache", DType::F16, &[cache.len()], cache);
    let (Ok(keys_gpu), Ok(values_gpu)) = (upload(&keys), upload(&values)) else {
        eprintln!("{what} skipped: the device has no memory for its caches");
        return;
    };
    let floats = |cache: Vec<half::f16>| cache.into_iter().map(half::f16::to_f32).collect();
    let mut state = LayersState {
        qkv_proj,
        o_proj,
        gate_up_proj,
        down_proj,
        embed_tokens: lm_head.clone(),
        lm_head,
        norms: rng.normals((2 * NUM_LAYERS as usize + 1) * c).into_iter().map(|v| 1.0 + 0.1 * v).collect(),
        rope: (0..(POSITIONS[1] as usize + 1) * head_dim / 2)
            .map(|i| [(i as f32 * 0.37).cos(), (i as f32 * 0.37).sin()])
            .collect(),
        pages,
        kv_lengths: vec![POSITIONS[0]],
        keys: floats(keys),
        values: floats(values),
        router: Vec::new(),
        bias_or_shares: Vec::new(),
        depth: 0,
        blocks: 0,
        logits: Vec::new(),
    };
    let steps: Vec<_> = (0..NUM_LAYERS)
        .map(|layer| LayerStep {
            qkv_proj: layer,
            o_proj: layer,
            gate_up_proj: layer,
            down_proj: layer,
            norms: layer,
            first_slot: layer * num_slots as u32,
            recursion: NONE,
            ..LayerStep::default()
        })
        .collect();
    let table = Tensor::zeros_uniform(gpu, "steps", size_of_val(&steps[..]) as u64).expect("a small buffer fits");
    gpu.write(&table, 0, bytemuck::cast_slice(&steps));
    let [norms, rope] = [&state.norms, state.rope.as_flattened()].map(|values| parity::upload(gpu, values));
    let pages = parity::upload_u32(gpu, &state.pages);
    let (kv_lengths, depth) = (parity::upload_u32(gpu, &state.kv_lengths), parity::upload_u32(gpu, &[0]));
    let sampled = RowSet::new(gpu, "sampled", 1).expect("a small buffer fits");
    let logits = Output::new(gpu, sizes.vocab_size as usize);
    let sampling = parity::upload_u32(gpu, bytemuck::cast_slice(&[GpuSampling::default()]));
    let seen = parity::upload_u32(gpu, &vec![0; sizes.vocab_size.div_ceil(32) as usize]);

    for position in POSITIONS {
        let id = format!("{what}/{position}");
        let row = Row { token: 1, position, sequence: 0, flags: ROW_ACTIVE | ROW_SAMPLE };
        let rows = parity::upload_u32(gpu, bytemuck::cast_slice(&[row]));
        let params = DecodeLayersParams {
            num_steps: NUM_LAYERS,
            poll_limit: GridExchange::POLL_LIMIT,
            num_groups: 1,
            max_pages,
            vocab_size: sizes.vocab_size,
            logits_stride: sizes.vocab_size,
            seen_words: sizes.vocab_size.div_ceil(32),
            base_depth: 1,
            final_norm: 2 * NUM_LAYERS,
            eps: 1e-5,
            attention_scale: shape.attention.scale(),
            ..DecodeLayersParams::default()
        };
        let most = (shape.hidden_size / 2).min(shape.mlp_dim);
        let largest = match DecodeLayers::new(gpu.caps(), shape, NUM_LAYERS, most) {
            Ok(largest) => largest,
            Err(error) => {
                eprintln!("{id} skipped: {error}");
                return;
            }
        };
        let mail = Tensor::zeros(gpu, "mail", DType::U32, &[largest.mail_elems(), 2]).expect("a small buffer fits");
        let control = Output::from_words(gpu, &[0; 4]);
        let partials = parity::upload_u32(gpu, &vec![0; 4 * most as usize]);
        let results = parity::upload_u32(gpu, &[0; 2 * SampleToken::RESULTS as usize]);
        let mut numbers = largest.workgroups_to_try(gpu).expect("the device answers").into_iter();
        let bindings = DecodeLayersBindings {
            steps: &table,
            rows: &rows,
            sampled: &sampled,
            qkv_proj: &qkv,
            o_proj: &o,
            gate_up_proj: &gate_up,
            down_proj: &down,
            norms: &norms,
            rope: &rope,
            pages: &pages,
            kv_lengths: &kv_lengths,
            depth: &depth,
            keys: &keys_gpu,
            values: &values_gpu,
            logits: &logits.tensor,
            mail: &mail,
            control: &control.tensor,
            embed_tokens: &head,
            lm_head: &head,
            sampling: &sampling,
            seen: &seen,
            partials: &partials,
            results: &results,
            router: None,
            bias_or_shares: None,
        };
        let (plan, num_workgroups) = loop {
            let Some(num_workgroups) = numbers.next() else {
                eprintln!("{id} skipped: too few workgroups run at a time");
                return;
            };
            let kernel = match DecodeLayers::new(gpu.caps(), shape, NUM_LAYERS, num_workgroups) {
                Ok(kernel) => kernel,
                Err(error) => {
                    eprintln!("{id} skipped: {error}");
                    return;
                }
            };
            let grid = Grid::Fixed([num_workgroups, 1, 1]);
            let dispatch = |params| move |plan: &mut PlanBuilder<'_>| plan.dispatch(&kernel, &bindings, &params, grid);
            let trial = DecodeLayersParams { trial_rounds: TRIAL_ROUNDS, ..params };
            let Some(trial) = record(gpu, &id, dispatch(trial)) else { return };
            gpu.run(&trial).expect("the device answers");
            if control.read_u32(gpu)[2] == 0 {
                let Some(plan) = record(gpu, &id, dispatch(params)) else { return };
                break (plan, num_workgroups);
            }
            gpu.write(&control.tensor, 8, &[0; 4]);
        };
        // A run has a key more than the one before.
        let reset = || gpu.write(&kv_lengths, 0, bytemuck::bytes_of(&position));
        reset();
        gpu.run(&plan).expect("the device answers");
        assert_eq!(control.read_u32(gpu)[2], 0, "{id}: no workgroup waited in vain");
        state.kv_lengths = vec![position];
        decode_layers(&shape, &params, &steps, &row, &mut state);
        // Keys and values are stored as halves.
        parity::assert_close(&id, &logits.read(gpu), &state.logits, Tolerance::F16);
        let bytes = stack_bytes(sizes, &shape).iter().sum();
        time_read(criterion, gpu, "decode_layers", &format!("{id}/{num_workgroups}"), bytes, &plan, &reset);
    }
}
