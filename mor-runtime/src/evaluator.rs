//! [`Evaluator`]: full sequences in one step, with what they compute at every row.

use std::sync::Arc;

use mor_kernels::Result;
use mor_kernels::ops::{CrossEntropy, CrossEntropyBindings, CrossEntropyParams, TopkSequence};
use mor_kernels::plan::{Plan, PlanBuilder};
use mor_kernels::rows::NONE;
use mor_kernels::submit::{Readback, Submission};
use mor_kernels::tensor::{DType, Tensor};
use mor_kernels::writes::Writes;
use mor_model::{LogitRows, Mode, MorModel, Phase, Routing, SampleTensors, StepTensors};

use crate::kv_cache::KvCache;
use crate::runner::{Feed, write_rows};

/// What an [`Evaluator`] brings back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Capture {
    /// Everything: logits, hidden states, routing, block outputs.
    All,
    /// Depths and the negative log-likelihood of each row's label.
    Nll,
}

/// One evaluated row range of a sequence; see [`crate::SequenceOutput`] for the fields.
#[derive(Debug, Default)]
pub(crate) struct Captured {
    pub(crate) depth: Vec<u32>,
    pub(crate) nll: Vec<f32>,
    pub(crate) logits: Vec<f32>,
    pub(crate) hidden: Vec<f32>,
    pub(crate) router_logits: Vec<Vec<f32>>,
    pub(crate) router_weights: Vec<Vec<f32>>,
    pub(crate) aux_logits: Vec<Vec<f32>>,
    /// Per recursion, the main stream and for token choice the running one after it.
    pub(crate) streams: Vec<(Vec<f32>, Vec<f32>)>,
}

/// Runs full sequences and captures what they compute at every row.
#[derive(Debug)]
pub(crate) struct Evaluator {
    kv: KvCache,
    tensors: StepTensors,
    plan: Arc<Plan>,
    pub(crate) key: (Routing, Capture),
    labels: Tensor,
    nll: Tensor,
    captured: Vec<(Tensor, Tensor)>,
}

impl Evaluator {
    /// For `num_sequences` sequences of up to `max_positions` tokens, `capacity` rows at a time.
    pub(crate) fn new(
        model: &MorModel,
        num_sequences: usize,
        max_positions: usize,
        capacity: usize,
        (routing, capture): (Routing, Capture),
    ) -> Result<Self> {
        let gpu = model.gpu();
        let config = model.config();
        let kv = KvCache::for_all(model, num_sequences, max_positions)?;
        let tensors = model.step_tensors(capacity, capacity, None)?;
        let words = |label, shape: &[usize]| Tensor::zeros(gpu, label, DType::U32, shape);
        let sample = SampleTensors {
            sampling: words("sampling", &[1])?,
            seen: words("seen", &[1, 1])?,
            next_rows: words("next_rows", &[1, 4])?,
            results: words("results", &[1, 2])?,
        };
        let labels = words("labels", &[capacity])?;
        let nll = Tensor::zeros(gpu, "nll", DType::F32, &[capacity])?;
        let stream_rows = if capture == Capture::All && config.is_routed() { capacity } else { 0 };
        let stream = |label: &str| Tensor::zeros(gpu, label, DType::F32, &[stream_rows, config.hidden_size]);
        let captured = (0..config.num_recursions)
            .map(|r| Ok((stream(&format!("hidden.{r}"))?, stream(&format!("running.{r}"))?)))
            .collect::<Result<Vec<_>>>()?;

        let mut plan = PlanBuilder::new(gpu)?;
        let bytes = (4 * stream_rows * config.hidden_size) as u64;
        let mut copy_streams = |plan: &mut PlanBuilder<'_>, r: usize| {
            if bytes > 0 {
                plan.copy(&tensors.hidden, 0, &captured[r].0, 0, bytes);
                if config.mode == Mode::Token {
                    plan.copy(&tensors.running, 0, &captured[r].1, 0, bytes);
                }
            }
        };
        let how = (Phase::Prefill { num_splits: 1, num_ends: 1 }, routing, LogitRows::All);
        model.record_step(&mut plan, &tensors, &kv.tensors, &sample, how, &mut copy_streams)?;
        if capture == Capture::Nll {
            let bindings =
                CrossEntropyBindings { rows: &tensors.all, logits: &tensors.logits, labels: &labels, nll: &nll };
            let params = CrossEntropyParams {
                vocab_size: config.vocab_size as u32,
                logits_stride: model.logits_stride() as u32,
            };
            CrossEntropy::default().record(&mut plan, bindings, params)?;
        }
        let plan = Arc::new(plan.finish()?);
        Ok(Self { kv, tensors, plan, key: (routing, capture), labels, nll, captured })
    }

    /// Whether it has room for these sizes.
    pub(crate) fn fits(&self, num_sequences: usize, max_positions: usize, capacity: usize) -> bool {
        self.kv.num_slots >= num_sequences
            && self.kv.tensors.max_positions >= max_positions
            && self.tensors.capacity >= capacity
    }

    /// Forgets all sequences.
    pub(crate) fn clear(&self, model: &MorModel) {
        let mut writes = Writes::default();
        (0..self.kv.num_slots).for_each(|sequence| self.kv.clear(&mut writes, sequence));
        writes.flush(model.gpu());
    }

    /// Runs one step and waits for its results: per feed, what was captured of its rows. `labels` has one entry a
    /// row, in feed order, for [`Capture::Nll`].
    pub(crate) fn run(&self, model: &MorModel, feeds: &[Feed<'_>], labels: &[u32]) -> Result<Vec<Captured>> {
        let (gpu, config, tensors) = (model.gpu(), model.config(), &self.tensors);
        write_rows(model, tensors, feeds);
        let (routing, capture) = self.key;
        if capture == Capture::Nll {
            let mut padded = labels.to_vec();
            padded.resize(tensors.capacity, NONE);
            gpu.write(&self.labels, 0, bytemuck::cast_slice(&padded));
        }
        if routing == Routing::TopK {
            // Top-k routing ranks a whole sequence, so there is one a step.
            let num_rows = feeds[0].tokens.len();
            for (capacity, tensor) in config.capacity.iter().zip(&tensors.topk_sequences) {
                let k = ((capacity * num_rows as f64) as u32).max(1);
                let range = TopkSequence { first_row: 0, num_rows: num_rows as u32, k, reserved: 0 };
                gpu.write(tensor, 0, bytemuck::bytes_of(&range));
            }
        }
        let num_rows: usize = feeds.iter().map(|feed| feed.tokens.len()).sum();
        let mut submission = Submission::new(gpu);
        submission.plan(&self.plan);
        let mut reads = Vec::new();
        let mut read = |tensor: &Tensor, per_row: usize| -> Result<usize> {
            reads.push(submission.read(tensor, 0, (4 * num_rows * per_row) as u64)?);
            Ok(reads.len() - 1)
        };
        let depth = read(&tensors.depth, 1)?;
        let per_row = |tensor: &Tensor| tensor.num_elems() / tensors.capacity;
        let mut floats = Vec::new();
        if capture == Capture::Nll {
            floats.push(read(&self.nll, 1)?);
        } else {
            floats.push(read(&tensors.logits, model.logits_stride())?);
            floats.push(read(&tensors.normed, config.hidden_size)?);
            for list in [&tensors.router_logits, &tensors.router_weights, &tensors.aux_logits] {
                for tensor in list {
                    floats.push(read(tensor, per_row(tensor))?);
                }
            }
            if config.is_routed() {
                for (hidden, running) in &self.captured {
                    floats.push(read(hidden, config.hidden_size)?);
                    floats.push(read(running, if config.mode == Mode::Token { config.hidden_size } else { 0 })?);
                }
            }
        }
        submission.submit();
        let data = reads.into_iter().map(Readback::wait).collect::<Result<Vec<_>>>()?;
        let depth: Vec<u32> = bytemuck::pod_collect_to_vec(&data[depth][..4 * num_rows]);
        let mut floats = floats.into_iter().map(|index| bytemuck::pod_collect_to_vec::<u8, f32>(&data[index]));
        let mut next = || floats.next().expect("every read above has its taker below");

        let mut captured: Vec<Captured> = feeds.iter().map(|_| Captured::default()).collect();
        let mut first = 0;
        let ranges: Vec<_> = feeds
            .iter()
            .map(|feed| {
                first += feed.tokens.len();
                first - feed.tokens.len()..first
            })
            .collect();
        let each = |captured: &mut Vec<Captured>, values: &[f32], put: &dyn Fn(&mut Captured, Vec<f32>)| {
            let width = values.len() / num_rows;
            for (captured, range) in captured.iter_mut().zip(&ranges) {
                put(captured, values[range.start * width..range.end * width].to_vec());
            }
        };
        for (captured, range) in captured.iter_mut().zip(&ranges) {
            captured.depth = depth[range.clone()].to_vec();
        }
        if capture == Capture::Nll {
            each(&mut captured, &next(), &|captured, values| captured.nll = values);
            return Ok(captured);
        }
        let (stride, vocab_size) = (model.logits_stride(), config.vocab_size);
        each(&mut captured, &next(), &|captured, values| {
            captured.logits = values.chunks(stride).flat_map(|row| &row[..vocab_size]).copied().collect();
        });
        each(&mut captured, &next(), &|captured, values| captured.hidden = values);
        for _ in &tensors.router_logits {
            each(&mut captured, &next(), &|captured, values| captured.router_logits.push(values));
        }
        for _ in &tensors.router_weights {
            each(&mut captured, &next(), &|captured, values| captured.router_weights.push(values));
        }
        for _ in &tensors.aux_logits {
            each(&mut captured, &next(), &|captured, values| captured.aux_logits.push(values));
        }
        if config.is_routed() {
            for _ in &self.captured {
                let hidden = next();
                let running = next();
                each(&mut captured, &hidden, &|captured, values| captured.streams.push((values, Vec::new())));
                each(&mut captured, &running, &|captured, values| {
                    captured.streams.last_mut().expect("pushed above").1 = values;
                });
            }
        }
        Ok(captured)
    }
}
