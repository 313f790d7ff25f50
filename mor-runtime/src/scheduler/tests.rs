//! Random requests through a [`Scheduler`] and a [`Device`] that checks every entry: each sequence is what it is alone.

use std::collections::VecDeque;

use mor_kernels::parity::Rng;
use mor_model::{LayerLayout, MorConfig};

use super::test_device::{Device, GROUPS, RECURSIONS, next_token};
use super::*;

fn options(kv: &str, num_slots: usize, pages: usize) -> SchedulerOptions {
    let text = format!(
        r#"{{ "vocab_size": 97, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 5,
            "num_attention_heads": 4, "rms_norm_eps": 1e-5,
            "mor": {{ "mode": "expert", "sharing": "middle_cycle", "num_recursion": 3, "kv": "{kv}" }} }}"#
    );
    let config = MorConfig::from_json_str(&text, "test").expect("the configuration is valid");
    let layout = KvLayout::new(&config, &LayerLayout::new(&config));
    let has_entries = |group| layout.group_holds(group, RECURSIONS as u32);
    let class_of_group = (0..GROUPS).map(|group| has_entries(group).then_some(usize::from(group > 0))).collect();
    SchedulerOptions {
        layout,
        class_of_group,
        pages_in_class: vec![pages, RECURSIONS * pages],
        num_slots,
        prefill_rows: 64,
        ticks: 2,
        ticks_of_token: RECURSIONS,
        share_prefixes: true,
        first_id: 0,
    }
}

#[test]
fn late_steps_shorten_later_ones() {
    let mut scheduler = Scheduler::new(options("recursion_wise", 1, 100));
    scheduler.submit(vec![1; 400], 410);
    let rows = |step: &Step| step.chunks.iter().map(|chunk| chunk.len).sum::<usize>();
    let long = scheduler.plan().expect("there is a prompt");
    assert_eq!(rows(&long), 64);
    assert!(!scheduler.learn(&long, true), "one alone may be late");
    assert!(!scheduler.learn(&long, false));
    assert!(!scheduler.learn(&long, true), "not in a row");
    assert!(scheduler.learn(&long, true));
    assert!(!scheduler.learn(&long, true), "it was planned before");
    let short = scheduler.plan().expect("there is more");
    assert_eq!(rows(&short), 32);
    assert!(scheduler.learn(&short, true), "the one before was late too");
    let decodes = Step { ticks: 2, ..Step::default() };
    assert!(!scheduler.learn(&decodes, true), "of another kind");
    assert!(scheduler.learn(&decodes, true));
    assert!(!scheduler.learn(&Step { ticks: 1, ..Step::default() }, true), "less than one is none");
    assert_eq!((scheduler.prefill_rows(), scheduler.ticks()), (16, 1));
    let least = Step { chunks: scheduler.plan().expect("there is more").chunks, ..Step::default() };
    assert!(!scheduler.learn(&least, true));
    assert_eq!((rows(&least), scheduler.prefill_rows()), (16, 16));
}

#[test]
fn prompts_are_drawn_for_where_they_end() {
    let mut scheduler = Scheduler::new(options("recursion_wise", 20, 100));
    for i in 0..20 {
        scheduler.submit(vec![i + 1; 3], 10);
    }
    let step = scheduler.plan().expect("there are prompts");
    assert!(step.chunks.len() == 20 && step.chunks.iter().all(|chunk| chunk.draws && chunk.len == 3), "{step:?}");
    assert_eq!((step.entries.len(), step.ticks), (0, 0), "nothing is to come before the first tokens");
    // Then all of them decode.
    let next = scheduler.plan().expect("they go on");
    assert!(next.chunks.is_empty() && next.ticks > 0, "{next:?}");
}

/// Runs `requests` of (tokens, limit, cancelled after so many new tokens) with several steps under way; returns the
/// tokens of each and the order in which they ended.
fn run(
    scheduler: &mut Scheduler,
    requests: &[(Vec<u32>, usize, Option<usize>)],
    rng: &mut Rng,
) -> (Vec<Vec<u32>>, Vec<u64>) {
    let limits: Vec<usize> = requests.iter().map(|request| request.1).collect();
    let mut device = Device::new(&scheduler.options);
    let mut results: Vec<Vec<u32>> = requests.iter().map(|request| request.0.clone()).collect();
    let (mut ended, mut in_flight, mut submitted) = (Vec::new(), VecDeque::new(), 0);
    while ended.len() < requests.len() {
        while submitted < requests.len() && (submitted < 4 || rng.below(3) == 0) {
            let (tokens, limit, _) = &requests[submitted];
            assert_eq!(scheduler.submit(tokens.clone(), *limit), submitted as u64);
            submitted += 1;
        }
        while in_flight.len() < 4 {
            let Some(step) = scheduler.plan() else { break };
            // The device runs later than the plan, but in order: its results are those of now.
            let results = device.run(&step, scheduler, &limits);
            in_flight.push_back((step, results));
        }
        let Some((step, (depths, drawn))) = in_flight.pop_front() else {
            assert!(submitted < requests.len(), "nothing to do, but {} of {} ended", ended.len(), requests.len());
            continue;
        };
        let take = |slot: usize, from: usize| {
            let new: Vec<_> = drawn[slot].iter().filter(|outcome| outcome.position >= from).copied().collect();
            assert_eq!(new.len(), drawn[slot].len());
            new
        };
        for progress in scheduler.complete(&step, &depths, &take) {
            let (prompt, limit, cancel) = &requests[progress.id as usize];
            let tokens = &mut results[progress.id as usize];
            let mut end = progress.depths.len() + progress.position == *limit;
            let mut on_device = false;
            for outcome in progress.outcomes {
                assert_eq!(outcome.position + 1, tokens.len());
                tokens.push(outcome.next_token);
                end |= outcome.next_token == 0 || tokens.len() == *limit;
                if !end && *cancel == Some(tokens.len() - prompt.len()) {
                    (end, on_device) = (true, true);
                }
                if end {
                    break;
                }
            }
            if end {
                scheduler.finish(progress.id, on_device);
                ended.push(progress.id);
            }
        }
    }
    (results, ended)
}

fn alone((prompt, limit, cancel): &(Vec<u32>, usize, Option<usize>)) -> Vec<u32> {
    let mut tokens = prompt.clone();
    while tokens.len() < *limit {
        tokens.push(next_token(&tokens));
        if tokens.last() == Some(&0) || *cancel == Some(tokens.len() - prompt.len()) {
            break;
        }
    }
    tokens
}

fn requests(rng: &mut Rng, count: usize, longest: usize) -> Vec<(Vec<u32>, usize, Option<usize>)> {
    let request = |_| {
        // Few tokens, so that many begin alike.
        let common = rng.below(longest / 2);
        let own = 1 + rng.below(longest / 4);
        let tokens: Vec<u32> = (0..common as u32).map(|i| 1 + i % 3).chain((0..own).map(|_| 1)).collect();
        let limit = (tokens.len() + rng.below(longest / 4)).min(longest);
        let cancel = (rng.below(5) == 0).then(|| 1 + rng.below(8));
        (tokens, limit, cancel)
    };
    (0..count).map(request).collect()
}

#[test]
fn any_batch_is_each_sequence_alone() {
    for (i, kv) in ["recursion_wise", "sharing", "hybrid"].into_iter().cycle().take(24).enumerate() {
        let mut rng = Rng::new(&format!("scheduler {i}"));
        let (slots, pages) = (1 + rng.below(6), 5 + rng.below(12));
        let mut scheduler = Scheduler::new(options(kv, slots, pages));
        let requests = requests(&mut rng, 40, 150);
        let (results, ended) = run(&mut scheduler, &requests, &mut rng);
        for (result, request) in results.iter().zip(&requests) {
            assert_eq!(*result, alone(request), "{kv}, {slots} slots, {pages} pages");
        }
        let mut sorted = ended.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..40).collect::<Vec<_>>(), "each ends once");
        // Every page returns once the kept beginnings are given up.
        let prefixes = scheduler.prefixes.as_mut().expect("they are kept");
        while prefixes.evict(&mut scheduler.pool) {}
        for class in 0..2 {
            assert_eq!(scheduler.pool.num_free(class), scheduler.pool.num_pages(class), "{kv}, class {class}");
        }
    }
}

#[test]
fn memory_for_few_displaces_the_youngest_and_loses_nothing() {
    let mut rng = Rng::new("preemption");
    let mut scheduler = Scheduler::new(SchedulerOptions {
        // Sequences that grow from nothing to five pages in a pool of eight.
        share_prefixes: false,
        ..options("recursion_wise", 4, 8)
    });
    let requests: Vec<_> = (0..12).map(|i| (vec![1 + i % 4, i], 150, None)).collect();
    let long: Vec<_> = requests.iter().filter(|request| alone(request).len() > 40).collect();
    let (results, _) = run(&mut scheduler, &requests, &mut rng);
    for (result, request) in results.iter().zip(&requests) {
        assert_eq!(*result, alone(request));
    }
    println!("{} long sequences, {} preemptions", long.len(), scheduler.num_preemptions());
}

#[test]
fn a_common_beginning_is_read_once() {
    let mut rng = Rng::new("prefix");
    let mut scheduler = Scheduler::new(options("recursion_wise", 2, 40));
    let prompt: Vec<u32> = (0..100).map(|i| 1 + i % 4).collect();
    let requests: Vec<_> = (0..5).map(|_| (prompt.clone(), 101, None)).collect();
    run(&mut scheduler, &requests, &mut rng);
    // Two start before anything is known, then three blocks of 32 of each prompt are there.
    assert_eq!(scheduler.num_reused(), 3 * 96);
}

#[test]
fn the_order_of_arrivals_decides_everything() {
    let plans = || {
        let mut rng = Rng::new("order");
        let mut scheduler = Scheduler::new(options("hybrid", 3, 9));
        let requests = requests(&mut rng, 20, 120);
        run(&mut scheduler, &requests, &mut rng).1
    };
    assert_eq!(plans(), plans());
}

#[test]
fn what_never_fits_is_known() {
    let scheduler = Scheduler::new(options("recursion_wise", 1, 4));
    assert_eq!(scheduler.never_fits(128), None);
    assert_eq!(scheduler.never_fits(129), Some((0, 5, 4)));
}
