//! Where the time of a step goes: [`Session::profile_decode`], [`Session::profile_prefill`].

use std::time::{Duration, Instant};

use mor_kernels::Gpu;
use mor_kernels::ops::GpuSampling;
use mor_kernels::plan::Plan;
use mor_kernels::rows::{ROW_ACTIVE, ROW_SAMPLE, Row};
use mor_kernels::submit::Submission;
use mor_kernels::timing::{self, DispatchTime};

use super::Session;
use crate::engine::most_prefill_rows;
use crate::error::Result;
use crate::runner::{Feed, Runner, RunnerOptions, Work};

/// Where the time of a step goes; see [`Session::profile_decode`] and [`Session::profile_prefill`].
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq)]
pub struct StepProfile {
    /// Tokens of each sequence that the step reads: of a prompt the last ones, as many as it takes at a time.
    pub num_tokens: usize,
    /// Device time of a step among others like it.
    pub device_micros: f64,
    /// Host time to record and submit a step.
    pub host_micros: f64,
    /// Device time of each of the [`PARTS`](mor_model::PARTS) of a step among others like it, in the order in which they run.
    pub parts: Vec<(&'static str, f64)>,
    /// Every dispatch with its mean device time, each in a pass of its own; more than `device_micros` in all.
    pub dispatches: Vec<DispatchTime>,
}

impl Session {
    /// Where the time of a decode step or tick of `num_sequences` sequences goes, from about half of `context` positions on.
    /// Caches are made anew for it; sequences under way are lost.
    ///
    /// # Errors
    /// [`RuntimeError::Kernel`](crate::RuntimeError::Kernel) if the device writes no timestamps, or refuses the caches.
    pub fn profile_decode(&mut self, num_sequences: usize, context: usize) -> Result<StepProfile> {
        const TICKS_PER_SUBMIT: usize = 2;
        let middle = (context / 2).max(1);
        let mut runner = self.profiled_runner(num_sequences, context + 5 * PROFILED_STEPS, 16)?;
        let model = &self.model;
        let tick = |runner: &mut Runner, ticks| -> Result<usize> {
            let work = Work { ticks, max_context: context, ..Work::default() };
            let reply = runner.submit(model, &work)?.wait()?;
            Ok((0..num_sequences).map(|slot| reply.drawn(slot, 0).count()).sum())
        };
        // Sequences start one after the other, lest their tokens go through the recursions in step.
        let period = model.config().num_recursions;
        for turn in 0..period {
            for slot in (turn..num_sequences).step_by(period) {
                let limit = runner.max_positions() as u32;
                let sampling = GpuSampling { temperature: 1.0, seed_low: slot as u32, limit, ..GpuSampling::default() };
                runner.start(slot, &sampling, [], None);
                let flags = ROW_ACTIVE | ROW_SAMPLE;
                runner.set_next_row(Row { token: 1, position: 0, sequence: slot as u32, flags });
            }
            tick(&mut runner, 1)?;
        }
        // No token takes more than a tick a recursion, and one to be drawn.
        for _ in 0..(period + 1) * middle {
            if tick(&mut runner, TICKS_PER_SUBMIT)? >= num_sequences * middle {
                break;
            }
        }
        let plan = runner.decode_plan(model, num_sequences, context)?;
        profile(model.gpu(), &plan, 1)
    }

    /// Where the time of a prefill step goes that reads the same number of tokens of each of `num_sequences` sequences, the last
    /// of `context` tokens: as many as fit [`BatchOptions::prefill_rows`](crate::BatchOptions::prefill_rows), or as the device is
    /// given at a time. It draws the token after each prompt, as where nobody decodes yet. Caches are made anew for
    /// it; sequences under way are lost.
    ///
    /// # Errors
    /// As [`Session::profile_decode`].
    ///
    /// # Panics
    /// For more sequences than rows of a step.
    pub fn profile_prefill(&mut self, num_sequences: usize, context: usize) -> Result<StepProfile> {
        let prefill_rows = self.batch.prefill_rows;
        assert!((1..=prefill_rows).contains(&num_sequences), "{num_sequences} sequences in {prefill_rows} rows");
        let most = most_prefill_rows(&self.model, 0, self.batch.batch_invariant);
        let prefill_rows = prefill_rows.min(most).max(num_sequences);
        let context = context.max(1);
        let chunk = (prefill_rows / num_sequences).min(context);
        let mut runner = self.profiled_runner(num_sequences, context, prefill_rows)?;
        let model = &self.model;
        for slot in 0..num_sequences {
            runner.start(slot, &GpuSampling::default(), [], None);
        }
        let tokens = self.measured_prompt(context);
        let feeds = |begin: usize, end: usize| -> Vec<Feed<'_>> {
            let sample = end == context;
            let feed = |sequence| Feed { sequence, position: begin, tokens: &tokens[begin..end], sample };
            (0..num_sequences).map(feed).collect()
        };
        let last = context - chunk;
        for begin in (0..last).step_by(chunk) {
            let end = last.min(begin + chunk);
            runner.submit(model, &Work { feeds: &feeds(begin, end), max_context: end, ..Work::default() })?.wait()?;
        }
        let plan = runner.repeatable_prefill(model, &feeds(last, context))?;
        let start = Instant::now();
        while start.elapsed() < WARM_UP {
            timing::device_micros(model.gpu(), &plan, 1)?;
        }
        profile(model.gpu(), &plan, chunk)
    }

    /// `len` tokens to measure prompts with, the same ones for every length. They look like none in particular: of tokens in the
    /// vocabulary's order random routers take fewer recursions.
    pub fn measured_prompt(&self, len: usize) -> Vec<u32> {
        let token = |i: u32| (i.wrapping_mul(2_654_435_761) >> 7) % self.config().vocab_size as u32;
        (0..len as u32).map(token).collect()
    }

    /// A runner for measurements, in place of the engine.
    fn profiled_runner(&mut self, num_slots: usize, max_positions: usize, prefill_rows: usize) -> Result<Runner> {
        self.forget_engine();
        let options = RunnerOptions {
            num_slots,
            max_positions,
            prefill_rows,
            batching: self.batch.batching,
            pages_in_class: None,
            batch_invariant: self.batch.batch_invariant,
            persistent: self.batch.persistent,
        };
        Ok(Runner::new(&self.model, &options)?)
    }
}

/// For how long a step is repeated before it is measured: the clock of a GPU falls while weights are read or quantised, and takes up to a
/// second to rise again.
const WARM_UP: Duration = Duration::from_secs(1);
/// Most steps of one measurement; a profile makes four, and one more step. The other room that is left for them is for
/// sequences ahead of others.
const PROFILED_STEPS: usize = 32;
/// A measurement of slow steps has fewer, so that it takes about so many microseconds.
const PROFILED_MICROS: f64 = 1e6;

fn profile(gpu: &Gpu, plan: &Plan, num_tokens: usize) -> Result<StepProfile> {
    let of_one = timing::device_micros(gpu, plan, 1)?;
    let steps = (PROFILED_MICROS / of_one.max(1.0)).clamp(1.0, PROFILED_STEPS as f64) as u32;
    let device_micros = timing::device_micros(gpu, plan, steps)?;
    let parts = timing::parts(gpu, plan, steps)?;
    let start = Instant::now();
    for _ in 0..steps {
        let mut submission = Submission::new(gpu);
        submission.plan(plan);
        submission.submit();
    }
    let host_micros = start.elapsed().as_secs_f64() * 1e6 / f64::from(steps);
    gpu.wait_idle()?;
    let dispatches = timing::profile(gpu, plan, steps)?;
    Ok(StepProfile { num_tokens, device_micros, host_micros, parts, dispatches })
}
