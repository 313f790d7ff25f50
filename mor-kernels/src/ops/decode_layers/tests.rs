//! Parity of `decode_layers`.

use super::*;
use crate::ops::GpuSampling;
use crate::oracle::decode_layers::{LayersState, decode_layers};
use crate::oracle::sample_partial::sample_parts;
use crate::oracle::sample_token::scores;
use crate::parity::{self, Output, Rng, Tolerance};
use crate::rows::{ActiveRow, KvTable, NONE, PAGE_SIZE, ROW_ACTIVE, ROW_FAILED, ROW_SAMPLE, Row};

/// As in the shader.
const FEW_TAGS_LEFT: u32 = 1 << 31;
const MAX_PAGES: usize = 12;
const NUM_PAGES: usize = 64;
const NUM_RECURSIONS: usize = 3;
const NUM_GROUPS: usize = 1 + NUM_RECURSIONS;
/// Odd, and more than a round of one workgroup.
const VOCAB_SIZE: u32 = 333;
const TOKEN: u32 = 291;
/// Most tokens drawn in a dispatch.
const NUM_TOKENS: usize = 5;

/// A model of a first layer, two layers that recur three times and a last layer, and one row of it.
struct Case {
    shape: LayersShape,
    params: DecodeLayersParams,
    steps: Vec<LayerStep>,
    row: Row,
    /// That was taken before the step.
    last_tag: u32,
    state: LayersState,
    weights: [Tensor; 6],
    router: Option<Tensor>,
}

fn shape(sizes: [u32; 5], dtypes: [DType; 2], kv_dtype: DType, routing: LayerRouting) -> LayersShape {
    let [hidden_size, mlp_dim, num_attention_heads, num_key_value_heads, head_dim] = sizes;
    let kv_table = KvTable::Pages;
    let attention = AttentionShape { num_attention_heads, num_key_value_heads, head_dim, kv_dtype, kv_table };
    let [layer_dtype, head_dtype] = dtypes;
    let router_dtype = if layer_dtype.is_quantized() { DType::F16 } else { layer_dtype };
    let vocab_size = VOCAB_SIZE;
    LayersShape { hidden_size, mlp_dim, vocab_size, attention, layer_dtype, head_dtype, router_dtype, routing }
}

impl Case {
    /// At `position`, with as many entries in the recursions' caches as `lengths` says.
    fn new(gpu: &Gpu, rng: &mut Rng, shape: LayersShape, position: usize, lengths: [usize; NUM_RECURSIONS]) -> Self {
        let (c, mlp_dim) = (shape.hidden_size as usize, shape.mlp_dim as usize);
        let head_dim = shape.attention.head_dim as usize;
        let (q_dim, kv_dim) = (
            shape.attention.num_attention_heads as usize * head_dim,
            shape.attention.num_key_value_heads as usize * head_dim,
        );
        let mut matrix = |rows: usize, columns: usize, dtype| parity::upload_weight(gpu, rng, rows, columns, dtype);
        let (layer_dtype, head_dtype) = (shape.layer_dtype, shape.head_dtype);
        let (qkv, qkv_proj) = matrix(4 * (q_dim + 2 * kv_dim), c, layer_dtype);
        let (o, o_proj) = matrix(4 * c, q_dim, layer_dtype);
        let (gate_up, gate_up_proj) = matrix(4 * 2 * mlp_dim, c, layer_dtype);
        let (down, down_proj) = matrix(4 * c, mlp_dim, layer_dtype);
        let (embed, embed_tokens) = matrix(VOCAB_SIZE as usize, c, head_dtype);
        let (head, lm_head) = matrix(VOCAB_SIZE as usize, c, head_dtype);
        let is_routed = shape.routing != LayerRouting::Fixed;
        let (router, router_values) = parity::upload_weight(gpu, rng, NUM_RECURSIONS, c, shape.router_dtype);

        let mut pages: Vec<u32> = (0..NUM_PAGES as u32).collect();
        for i in (1..pages.len()).rev() {
            pages.swap(i, rng.below(i + 1));
        }
        // The second of two sequences.
        pages.truncate(NUM_GROUPS * MAX_PAGES);
        let pages: Vec<u32> = std::iter::repeat_n(u32::MAX, pages.len()).chain(pages).collect();
        let mut kv_lengths = vec![7; NUM_GROUPS];
        kv_lengths.push(position as u32);
        kv_lengths.extend(lengths.map(|length| length as u32));
        let slot = |group: usize, key: usize| {
            let page = pages[(NUM_GROUPS + group) * MAX_PAGES + key / PAGE_SIZE as usize];
            page as usize * PAGE_SIZE as usize + key % PAGE_SIZE as usize
        };
        let cache_slots = NUM_PAGES * PAGE_SIZE as usize;
        let mut keys = vec![f32::NAN; 4 * cache_slots * kv_dim];
        let mut values = keys.clone();
        for (cache, groups) in [(0, 0..1), (1, 1..NUM_GROUPS), (2, 1..NUM_GROUPS), (3, 0..1)] {
            for group in groups {
                let stored = if group == 0 { position } else { lengths[group - 1] };
                for key in 0..stored {
                    for i in 0..kv_dim {
                        let at = (cache * cache_slots + slot(group, key)) * kv_dim + i;
                        for kv in [&mut keys, &mut values] {
                            let value = rng.normal();
                            let is_half = shape.attention.kv_dtype == DType::F16;
                            kv[at] = if is_half { half::f16::from_f32(value).to_f32() } else { value };
                        }
                    }
                }
            }
        }
        let row = Row { token: TOKEN, position: position as u32, sequence: 1, flags: ROW_ACTIVE | ROW_SAMPLE };
        let mut steps = Vec::new();
        // The layers of the block are tied; norms are stored once for each.
        for (layer, matrix) in [0, 1, 2, 1, 2, 1, 2, 3].into_iter().enumerate() {
            let in_block = (1..7).contains(&layer);
            let first = in_block && layer % 2 == 1;
            let recursion = if in_block { (layer as u32 - 1) / 2 } else { NONE };
            let is_token = matches!(shape.routing, LayerRouting::Token { .. });
            let input = match (first, in_block) {
                _ if !is_routed => 0,
                (true, _) if is_token && recursion > 0 => 1,
                (false, true) => 2,
                _ => 0,
            };
            let ends = in_block && !first;
            steps.push(LayerStep {
                qkv_proj: matrix,
                o_proj: 3 - matrix,
                gate_up_proj: matrix,
                down_proj: matrix,
                norms: layer as u32,
                first_slot: matrix * cache_slots as u32,
                input,
                output: if first && is_routed { 2 } else { 0 },
                recursion,
                flags: (BLOCK_BEGIN * u32::from(first)) | (BLOCK_END * u32::from(ends)),
                group: if in_block { 1 + recursion } else { 0 },
                reserved: 0,
            });
        }
        let params = DecodeLayersParams {
            num_steps: steps.len() as u32,
            trial_rounds: 0,
            poll_limit: GridExchange::POLL_LIMIT,
            num_groups: NUM_GROUPS as u32,
            max_pages: MAX_PAGES as u32,
            unshared_group: 0,
            additive: 0,
            max_depth: NUM_RECURSIONS as u32,
            num_recursions: NUM_RECURSIONS as u32,
            vocab_size: VOCAB_SIZE,
            logits_stride: VOCAB_SIZE.next_multiple_of(2),
            seen_words: VOCAB_SIZE.div_ceil(32),
            coda: 7,
            base_depth: 0,
            final_norm: 2 * steps.len() as u32,
            seed_low: 3,
            seed_high: 4,
            eps: 1e-5,
            attention_scale: shape.attention.scale(),
            input_scale: 0.5,
            alpha: 0.7,
            threshold: 0.0,
            depth_bias: 0.0,
            num_tokens: 0,
        };
        let state = LayersState {
            qkv_proj,
            o_proj,
            gate_up_proj,
            down_proj,
            embed_tokens,
            lm_head,
            norms: (0..(2 * steps.len() + 1) * c).map(|_| 1.0 + 0.1 * rng.normal()).collect(),
            rope: (0..(position + NUM_TOKENS) * head_dim / 2)
                .map(|i| [(i as f32 * 0.37).cos(), (i as f32 * 0.37).sin()])
                .collect(),
            pages,
            kv_lengths,
            keys,
            values,
            router: router_values,
            bias_or_shares: vec![0.6, 0.5, 0.4],
            depth: 0,
            blocks: 0,
            logits: Vec::new(),
        };
        let router = is_routed.then_some(router);
        Self { shape, params, steps, row, last_tag: 0, state, weights: [qkv, o, gate_up, down, embed, head], router }
    }

    /// Runs the kernel of `num_workgroups`; tokens are drawn as `sampling` says, after those of `is_seen`.
    fn run(
        &self,
        gpu: &Gpu,
        num_workgroups: u32,
        params: &DecodeLayersParams,
        (sampling, is_seen): (&GpuSampling, &[u32]),
    ) -> Ran {
        let max_steps = self.steps.len() as u32 + 3;
        let kernel = DecodeLayers::new(gpu.caps(), self.shape, max_steps, num_workgroups).expect("it fits");
        let caches = [&self.state.keys, &self.state.values].map(|cache| match self.shape.attention.kv_dtype {
            DType::F16 => {
                let halves: Vec<_> = cache.iter().map(|v| half::f16::from_f32(*v)).collect();
                Tensor::from_slice(gpu, "cache", DType::F16, &[halves.len()], &halves).expect("it fits")
            }
            _ => parity::upload(gpu, cache),
        });
        let logits = Output::new(gpu, VOCAB_SIZE.next_multiple_of(2) as usize);
        let mail = Output::from_words(gpu, &vec![0; 2 * kernel.mail_elems()]);
        let mut table = self.steps.clone();
        table.resize(max_steps as usize, LayerStep::default());
        let steps = Tensor::zeros_uniform(gpu, "steps", size_of_val(&table[..]) as u64).expect("it fits");
        gpu.write(&steps, 0, bytemuck::cast_slice(&table));
        let row = parity::upload_u32(gpu, bytemuck::cast_slice(&[self.row]));
        let sampled = RowSet::from_rows(gpu, "sampled", &[ActiveRow { row: 5, ..ActiveRow::ABSENT }]).expect("it fits");
        let kv_lengths = Output::from_words(gpu, &self.state.kv_lengths);
        let depth = Output::from_words(gpu, &[self.state.depth]);
        let seen_words = VOCAB_SIZE.div_ceil(32) as usize;
        let mut seen = vec![0; 2 * seen_words];
        for token in is_seen {
            seen[seen_words + *token as usize / 32] |= 1 << (token % 32);
        }
        let partials = Output::new(gpu, 4 * num_workgroups as usize);
        let results = Output::from_words(gpu, &[NONE; 2 * 2 * SampleToken::RESULTS as usize]);
        let control = Output::from_words(gpu, &[self.last_tag, 0, 0, 0, 0, 0, 0]);
        let extra = match self.shape.routing {
            LayerRouting::Expert { scripted: true, .. } | LayerRouting::Token { bias: true, .. } => {
                Some(parity::upload(gpu, &self.state.bias_or_shares))
            }
            _ => None,
        };
        let bindings = DecodeLayersBindings {
            steps: &steps,
            rows: &row,
            sampled: &sampled,
            qkv_proj: &self.weights[0],
            o_proj: &self.weights[1],
            gate_up_proj: &self.weights[2],
            down_proj: &self.weights[3],
            norms: &parity::upload(gpu, &self.state.norms),
            rope: &parity::upload(gpu, self.state.rope.as_flattened()),
            pages: &parity::upload_u32(gpu, &self.state.pages),
            kv_lengths: &kv_lengths.tensor,
            depth: &depth.tensor,
            keys: &caches[0],
            values: &caches[1],
            logits: &logits.tensor,
            mail: &mail.tensor,
            control: &control.tensor,
            embed_tokens: &self.weights[4],
            lm_head: &self.weights[5],
            sampling: &parity::upload_u32(gpu, bytemuck::cast_slice(&[GpuSampling::default(), *sampling])),
            seen: &parity::upload_u32(gpu, &seen),
            partials: &partials.tensor,
            results: &results.tensor,
            router: self.router.as_ref(),
            bias_or_shares: extra.as_ref(),
        };
        parity::run(gpu, |plan| plan.dispatch(&kernel, &bindings, params, Grid::Fixed([num_workgroups, 1, 1])));
        let values = |cache: &Tensor| -> Vec<f32> {
            if cache.dtype() == DType::F32 {
                return gpu.read(cache).expect("the device answers");
            }
            let halves: Vec<half::f16> = gpu.read(cache).expect("the device answers");
            halves.iter().map(|h| h.to_f32()).collect()
        };
        let rows: Vec<Row> = gpu.read(&row).expect("the device answers");
        let listed: Vec<ActiveRow> = gpu.read(&sampled.active).expect("the device answers");
        Ran {
            row: rows[0],
            listed: listed[0],
            kv_lengths: kv_lengths.read_u32(gpu),
            depth: depth.read_u32(gpu)[0],
            control: control.read_u32(gpu),
            mail: mail.read_u32(gpu),
            logits: logits.read(gpu)[..VOCAB_SIZE as usize].to_vec(),
            partials: partials.read_u32(gpu),
            results: results.read_u32(gpu),
            caches: [values(&caches[0]), values(&caches[1])],
        }
    }

    /// Of all slots that hold something by now.
    fn assert_caches(&self, what: &str, caches: &[Vec<f32>; 2], want: &LayersState) {
        for (name, got, want) in [("keys", &caches[0], &want.keys), ("values", &caches[1], &want.values)] {
            let at: Vec<usize> = (0..want.len()).filter(|i| !want[*i].is_nan()).collect();
            let [got, want] = [got, want].map(|list| at.iter().map(|i| list[*i]).collect::<Vec<f32>>());
            parity::assert_close(&format!("{what} {name}"), &got, &want, self.tolerance());
        }
    }

    /// Eight layers of f32 sums, and keys and values whose last bit may turn.
    fn tolerance(&self) -> Tolerance {
        match self.shape.attention.kv_dtype {
            DType::F16 => Tolerance::F16,
            _ => Tolerance { absolute: 1e-4, relative: 1e-4 },
        }
    }

    /// Tags that are taken after `num_tokens` steps from the first on.
    fn tags(&self, num_tokens: usize) -> u32 {
        self.last_tag + 1 + num_tokens as u32 * (5 * self.steps.len() as u32 + 2)
    }

    /// Compares a step of the kernel of `num_workgroups` with the oracle; with `fails`, that nothing has changed.
    fn check(&self, gpu: &Gpu, what: &str, num_workgroups: u32, fails: bool) -> u32 {
        let sampling = GpuSampling {
            temperature: 0.8,
            repetition_penalty: 2.0,
            seed_low: 7,
            seed_high: 9,
            ..GpuSampling::default()
        };
        let is_seen: Vec<u32> = (0..VOCAB_SIZE).step_by(3).collect();
        let mut params = self.params;
        if fails {
            // A GPU runs as many as there are; there it is the first poll that is in vain.
            params.poll_limit = 1;
        }
        let ran = self.run(gpu, num_workgroups, &params, (&sampling, &is_seen));
        if fails {
            assert_eq!(ran.row, Row { flags: ROW_FAILED, ..self.row }, "{what}: the row can be fed again");
            assert_eq!(ran.kv_lengths, self.state.kv_lengths, "{what}: lengths as before the step");
            assert_eq!(ran.control[1..], [0, 1, 0, 0, 0, 0], "{what}");
            assert_eq!(ran.listed, ActiveRow::ABSENT, "{what}: nothing to draw for");
            return 0;
        }
        let mut want = self.state.clone();
        decode_layers(&self.shape, &self.params, &self.steps, &self.row, &mut want);
        assert_eq!(ran.row, self.row, "{what}: the row stays");
        assert_eq!(ran.depth, want.depth, "{what}: depth");
        let (sequence, position) = (self.row.sequence, self.row.position);
        let drawn = ActiveRow { row: 0, sequence, position, recursion: want.depth, ..ActiveRow::ABSENT };
        assert_eq!(ran.listed, drawn, "{what}: what to draw for");
        assert_eq!(ran.kv_lengths, want.kv_lengths, "{what}: lengths");
        let took = |r: u32| u32::from(want.blocks > r);
        let tags = self.tags(1);
        let are_few = tags >= FEW_TAGS_LEFT;
        let tags = if are_few { 0 } else { tags };
        assert_eq!(ran.control, [tags, 0, 0, 0, took(0), took(1), took(2)], "{what}: counts");
        assert_eq!(ran.mail.iter().all(|word| *word == 0), are_few, "{what}: mail is cleared with the tags");
        let got = &ran.logits[..];
        parity::assert_close(&format!("{what} logits"), got, &want.logits, self.tolerance());
        let of_workgroup = |w: u32| -> Vec<usize> {
            let pairs = (w..VOCAB_SIZE.div_ceil(2)).step_by(num_workgroups as usize);
            pairs.flat_map(|pair| [2 * pair as usize, 2 * pair as usize + 1]).filter(|t| *t < got.len()).collect()
        };
        let parts: Vec<_> = (0..num_workgroups).map(of_workgroup).collect();
        let best = sample_parts(got, &sampling, &is_seen, position, &parts);
        let chances = scores(got, &sampling, &is_seen, position);
        for (w, (got, want)) in ran.partials.as_chunks::<4>().0.iter().zip(&best).enumerate() {
            assert_eq!(got[..2], want[..2], "{what}: most likely of workgroup {w}");
            // The logarithm of a device is off by some units in the last place.
            let as_good = got[3] == want[3] || chances[got[3] as usize] >= chances[want[3] as usize] - 1e-4;
            assert!(
                as_good && parts[w].contains(&(got[3] as usize)),
                "{what}: drawn of workgroup {w}: {got:?}, {want:?}"
            );
        }
        self.assert_caches(what, &ran.caches, &want);
        want.blocks
    }

    /// Compares steps of the kernel that draw their tokens as `sampling` says with steps of the oracle, and what is drawn with what these
    /// say of all tokens; the sequence ends at the limit of `sampling`.
    fn check_draws(&self, gpu: &Gpu, what: &str, num_workgroups: u32, sampling: &GpuSampling) {
        let params = DecodeLayersParams { num_tokens: NUM_TOKENS as u32, ..self.params };
        let ran = self.run(gpu, num_workgroups, &params, (sampling, &[]));
        let (mut want, mut row) = (self.state.clone(), self.row);
        let mut took = [0; NUM_RECURSIONS];
        let mut num_drawn = 0;
        while num_drawn < NUM_TOKENS && row.flags & ROW_ACTIVE != 0 {
            want.blocks = 0;
            decode_layers(&self.shape, &self.params, &self.steps, &row, &mut want);
            took.iter_mut().take(want.blocks as usize).for_each(|took| *took += 1);
            let ring = SampleToken::RESULTS as usize;
            let at = row.sequence as usize * ring + row.position as usize % ring;
            let [token, depth] = [ran.results[2 * at], ran.results[2 * at + 1]];
            assert_eq!(depth, want.depth, "{what}: depth at {}", row.position);
            // Sums and logarithms of a device are off by some units in the last place.
            let chances = scores(&want.logits, sampling, &[], row.position);
            let best = chances.iter().copied().fold(f64::MIN, f64::max);
            assert!(chances[token as usize] >= best - 1e-2, "{what}: token {token} at {}", row.position);
            num_drawn += 1;
            let is_end = sampling.eos.contains(&token) || row.position + 2 >= sampling.limit;
            let flags = if is_end { 0 } else { ROW_ACTIVE | ROW_SAMPLE };
            row = Row { token, position: row.position + 1, flags, ..row };
        }
        assert_eq!(ran.row, row, "{what}: the row that follows");
        assert_eq!(ran.results.iter().filter(|word| **word != NONE).count(), 2 * num_drawn, "{what}: results");
        assert_eq!(ran.depth, want.depth, "{what}: depth");
        let (sequence, position) = (row.sequence, row.position - 1);
        let last = ActiveRow { row: 0, sequence, position, recursion: want.depth, ..ActiveRow::ABSENT };
        assert_eq!(ran.listed, last, "{what}: the last row that was complete");
        assert_eq!(ran.kv_lengths, want.kv_lengths, "{what}: lengths");
        let [a, b, c] = took;
        assert_eq!(ran.control, [self.tags(NUM_TOKENS), 0, 0, 0, a, b, c], "{what}: counts");
        parity::assert_close(&format!("{what} logits"), &ran.logits, &want.logits, self.tolerance());
        self.assert_caches(what, &ran.caches, &want);
    }
}

/// What a run of the kernel leaves.
struct Ran {
    row: Row,
    listed: ActiveRow,
    kv_lengths: Vec<u32>,
    depth: u32,
    control: Vec<u32>,
    mail: Vec<u32>,
    logits: Vec<f32>,
    partials: Vec<u32>,
    results: Vec<u32>,
    caches: [Vec<f32>; 2],
}

/// Workgroups to test with: one where the shape lets it do all the work, and as many as run at a time, or some of them.
fn grids(gpu: &Gpu, shape: &LayersShape) -> Vec<u32> {
    let most = GridExchange::most_workgroups(gpu, gpu.caps().max_workgroup_size.min(512), 24 << 10);
    // Registers may leave room for half as many.
    let most = (most.expect("the device answers") / 2).clamp(1, shape.hidden_size / 2);
    let mut grids = vec![1, most.min(3), most];
    grids.retain(|num_workgroups| DecodeLayers::new(gpu.caps(), *shape, 1, *num_workgroups).is_ok());
    grids.dedup();
    grids
}

fn on_fit_profiles(mut test: impl FnMut(&Gpu, &str)) {
    parity::on_every_profile(|gpu, profile| {
        if gpu.caps().coherent_storage && gpu.caps().lanes().uses_subgroups() {
            test(gpu, profile);
        }
    });
}

const SIZES: [[u32; 5]; 3] = [[64, 96, 6, 2, 16], [72, 200, 3, 3, 24], [160, 440, 5, 1, 64]];

#[test]
fn matches_oracle() {
    on_fit_profiles(|gpu, profile| {
        let mut rng = Rng::new("decode_layers");
        let expert = |gate, scripted| LayerRouting::Expert { gate, scripted };
        let token = |gate, bias| LayerRouting::Token { gate, bias, num_recursions: NUM_RECURSIONS as u32 };
        let routings = [
            LayerRouting::Fixed,
            expert(ExpertGate::Sigmoid, false),
            expert(ExpertGate::Tanh, true),
            expert(ExpertGate::None, false),
            token(TokenGate::Softmax, false),
            token(TokenGate::Sigmoid, true),
        ];
        // Of layers and head: those of models, then others.
        let dtypes = [
            [DType::F16, DType::F16],
            [DType::F32, DType::F32],
            [DType::Q4, DType::Q8],
            [DType::BF16, DType::BF16],
            [DType::Q8, DType::Q8],
            [DType::F32, DType::BF16],
            [DType::Q4, DType::Q4],
            [DType::F16, DType::Q8],
            [DType::BF16, DType::F32],
            [DType::Q8, DType::F16],
        ];
        // Every type and every routing; a driver takes seconds to compile each.
        let cases = (0..if profile == "checked" { 3 } else { 10 }).map(|i| (dtypes[i], routings[i % 6], i));
        for (dtypes, routing, i) in cases {
            let kv_dtype = if i % 2 == 0 { DType::F16 } else { DType::F32 };
            let shape = shape(SIZES[i % 3], dtypes, kv_dtype, routing);
            let (position, lengths) = [(300, [300, 200, 33]), (0, [0, 0, 0]), (40, [40, 31, 2]), (1, [1, 0, 0])][i % 4];
            let mut case = Case::new(gpu, &mut rng, shape, position, lengths);
            case.params.additive = (i / 2 % 2) as u32;
            for num_workgroups in grids(gpu, &shape) {
                let what = format!("{profile} {shape:?} position {position} x{num_workgroups}");
                let blocks = case.check(gpu, &what, num_workgroups, false);
                println!("{what}: {blocks} blocks");
            }
        }
    });
}

#[test]
fn draws_tokens_one_after_the_other() {
    on_fit_profiles(|gpu, profile| {
        let mut rng = Rng::new("decode_layers draws");
        let expert = LayerRouting::Expert { gate: ExpertGate::Sigmoid, scripted: true };
        let token =
            LayerRouting::Token { gate: TokenGate::Softmax, bias: false, num_recursions: NUM_RECURSIONS as u32 };
        let greedy = GpuSampling { top_k: 3, top_p: 0.5, ..GpuSampling::default() };
        let random = GpuSampling { temperature: 0.8, seed_low: 7, seed_high: 9, ..GpuSampling::default() };
        assert!(greedy.is_plain() && random.is_plain());
        // A driver takes seconds to compile each.
        let most = if profile == "unchecked" { 3 } else { 1 };
        for (i, routing) in [LayerRouting::Fixed, expert, token].into_iter().enumerate().take(most) {
            let kv_dtype = if i == 1 { DType::F16 } else { DType::F32 };
            let shape = shape(SIZES[i], [[DType::F32; 2], [DType::F16; 2], [DType::F32; 2]][i], kv_dtype, routing);
            // Across a page's end.
            let position = 2 * PAGE_SIZE as usize - 2;
            let case = Case::new(gpu, &mut rng, shape, position, [position, 40, 2]);
            for num_workgroups in grids(gpu, &shape) {
                for sampling in [greedy, random] {
                    // Never in these steps; in the third of them.
                    for limit in [u32::MAX, position as u32 + 4] {
                        let sampling = GpuSampling { limit, ..sampling };
                        let what = format!("{profile} {routing:?} x{num_workgroups} {sampling:?}");
                        case.check_draws(gpu, &what, num_workgroups, &sampling);
                    }
                }
            }
        }
    });
}

#[test]
fn exits_at_every_depth() {
    on_fit_profiles(|gpu, profile| {
        let mut rng = Rng::new("decode_layers depth");
        let routing = LayerRouting::Expert { gate: ExpertGate::Sigmoid, scripted: true };
        let shape = shape(SIZES[0], [DType::F32; 2], DType::F32, routing);
        let grid = *grids(gpu, &shape).last().expect("one workgroup does");
        for shares in [[0.0, 1.0, 1.0], [1.0, 0.0, 1.0], [1.0, 1.0, 0.0], [1.0, 1.0, 1.0]] {
            let mut case = Case::new(gpu, &mut rng, shape, 50, [50, 40, 3]);
            case.state.bias_or_shares = shares.to_vec();
            let depth = shares.iter().take_while(|share| **share > 0.0).count() as u32;
            assert_eq!(case.check(gpu, &format!("{profile} {shares:?}"), grid, false), depth, "{profile} {shares:?}");
        }
        // Capacity 1 takes every row, whatever the script says.
        let mut case = Case::new(gpu, &mut rng, shape, 50, [50, 40, 3]);
        case.state.bias_or_shares = vec![0.0; 3];
        case.steps[1].flags |= ALWAYS;
        assert_eq!(case.check(gpu, "always", grid, false), 1);
    });
}

#[test]
fn tags_are_counted_anew() {
    on_fit_profiles(|gpu, profile| {
        let mut rng = Rng::new("decode_layers tags");
        let shape = shape(SIZES[0], [DType::F32; 2], DType::F32, LayerRouting::Fixed);
        let mut case = Case::new(gpu, &mut rng, shape, 50, [50, 40, 3]);
        let grid = *grids(gpu, &shape).last().expect("one workgroup does");
        for below in [1000, 10, 0] {
            case.last_tag = FEW_TAGS_LEFT - below;
            case.check(gpu, &format!("{profile} {below} tags"), grid, false);
        }
    });
}

#[test]
fn a_wait_in_vain_leaves_the_row_as_it_was() {
    on_fit_profiles(|gpu, profile| {
        let mut rng = Rng::new("decode_layers failure");
        let shape = shape(SIZES[0], [DType::F16; 2], DType::F16, LayerRouting::Fixed);
        let case = Case::new(gpu, &mut rng, shape, 50, [50, 40, 3]);
        case.check(gpu, profile, 32, true);
    });
}

#[test]
fn says_why_it_cannot() {
    let caps = parity::gpu().caps().clone();
    let shape = shape([64, 8192, 4, 4, 16], [DType::F32; 2], DType::F32, LayerRouting::Fixed);
    let message = |caps: &DeviceCaps, shape, workgroups| {
        DecodeLayers::new(caps, shape, 8, workgroups).expect_err("must be refused").to_string()
    };
    let without = DeviceCaps { coherent_storage: false, ..caps.clone() };
    assert!(message(&without, shape, 4).contains("coherent storage and subgroups"));
    assert!(message(&caps, shape, 1).contains("pairs of outputs of a workgroup"));
    assert!(message(&caps, shape, 0).contains("workgroups"));
}
