//! Many short requests through a small pool: each is answered once, and memory stays flat. In a file of its own, because it
//! looks at the memory of its process. `MOR_TEST_DEVICE` chooses the adapter.

use mor_kernels::parity::{self, Rng};
use mor_model::Precision;
use mor_model::golden::GoldenCase;
use mor_runtime::kv_cache::{kv_bytes, pages_for_all};
use mor_runtime::{BatchOptions, Event, FinishReason, GenerateRequest, SequenceHandle, Session};

#[test]
fn many_short_requests_leave_nothing_behind() {
    const REQUESTS: usize = 10_000;
    let mut rng = Rng::new("soak");
    let case = GoldenCase::load_all().expect("readable").into_iter().find(|case| case.name == "expert_cycle_r2");
    let checkpoint = case.expect("the case is there").checkpoint;
    let session = Session::on_gpu(parity::gpu().clone(), &checkpoint, Precision::F32).expect("it fits");
    let one = kv_bytes(session.model(), &pages_for_all(session.model(), 1, 32));
    let batch =
        BatchOptions { max_sequences: 32, kv_bytes: Some(one * 20), max_context: Some(32), ..BatchOptions::default() };
    let mut session = session.with_batch(batch).expect("sizes of something");
    let mut running: Vec<(usize, SequenceHandle)> = Vec::new();
    let mut answers = vec![0; REQUESTS];
    let (mut submitted, mut cancelled, mut memory) = (0, 0, None);
    while submitted < REQUESTS || !running.is_empty() {
        while submitted < REQUESTS && running.len() < 64 {
            let prompt = (0..1 + rng.below(6)).map(|_| rng.below(97) as u32).collect();
            let request = GenerateRequest { max_new_tokens: 1 + rng.below(4), ..GenerateRequest::new(prompt) };
            running.push((submitted, session.submit(&request).expect("the request is sound")));
            submitted += 1;
        }
        if rng.below(4) == 0 {
            running[rng.below(running.len())].1.cancel();
        }
        session.step().expect("the device works");
        running.retain(|(index, handle)| {
            while let Some(event) = handle.try_next() {
                if let Event::Finished(summary) = event {
                    answers[*index] += 1;
                    cancelled += usize::from(summary.finish_reason == FinishReason::Cancelled);
                    return false;
                }
            }
            true
        });
        if memory.is_none() && submitted > REQUESTS / 4 {
            memory = resident_bytes();
        }
    }
    assert!(answers.iter().all(|answers| *answers == 1), "every request is answered once");
    let statistics = session.statistics();
    println!("{cancelled} cancelled, {} displaced, occupancy {:.2}", statistics.preemptions, statistics.occupancy());
    assert_eq!(statistics.finished, REQUESTS as u64);
    assert_eq!(statistics.kv.held_bytes, statistics.kv.kept_bytes, "every page returns");
    if let (Some(before), Some(after)) = (memory, resident_bytes()) {
        assert!(after < before + (32 << 20), "memory grew from {before} to {after} bytes");
    }
}

/// Memory of this process, where the system tells.
fn resident_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/statm").ok()?;
    Some(text.split_whitespace().nth(1)?.parse::<u64>().ok()? * 4096)
}
