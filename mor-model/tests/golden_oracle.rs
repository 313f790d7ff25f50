//! The CPU oracle, the layer layout and the K/V layout against every golden case.

#![cfg(feature = "oracle")]

use mor_model::{
    Checkpoint, KvLayout, LayerTensor, Mode, Routing, TensorName,
    golden::{GoldenCase, GoldenTensors},
    oracle::{Oracle, OracleOutput},
};

/// Golden ones, and those of relaxed models.
const NUM_CASES: usize = 23 + 6;

fn cases() -> Vec<GoldenCase> {
    let cases = GoldenCase::load_all().unwrap();
    assert_eq!(cases.len(), NUM_CASES);
    cases
}

/// Compares row by row, where `row_of(i)` is the row of the golden tensor that row i of `found` stands for.
#[track_caller]
fn assert_rows(what: &str, found: &[f32], expected: &[f32], width: usize, rows: impl Iterator<Item = (usize, usize)>) {
    for (found_row, expected_row) in rows {
        let found = &found[found_row * width..][..width];
        let expected = &expected[expected_row * width..][..width];
        for (column, (&found, &expected)) in found.iter().zip(expected).enumerate() {
            assert!(
                GoldenTensors::close(found, expected),
                "{what}: row {found_row}, column {column}: found {found}, expected {expected}"
            );
        }
    }
}

/// Checks one sequence of a forward pass against the tensors under `tag`, those that the case has.
fn check_forward(case: &GoldenCase, tag: &str, sequence: usize, out: &OracleOutput) {
    let config = case.checkpoint.config();
    let len = case.sequences[sequence].len();
    let base = sequence * case.padded_len;
    let expected = &case.expected;
    let what = |name: &str| format!("{} {tag}.{name} sequence {sequence}", case.name);
    let all = || (0..len).map(|t| (t, base + t));

    let logits = expected.f32(&format!("{tag}.logits")).unwrap();
    assert_rows(&what("logits"), &out.logits, logits, config.vocab_size, all());
    assert_eq!(out.depth, expected.ids(&format!("{tag}.depth")).unwrap()[base..base + len], "{}", what("depth"));
    if tag == "causal" {
        let hidden = expected.f32("causal.hidden").unwrap();
        assert_rows(&what("hidden"), &out.hidden, hidden, config.hidden_size, all());
    }
    if !config.is_routed() {
        assert!(out.selected.is_empty());
        return;
    }

    // Rows that take part in the decision at each step.
    let mut active = vec![true; len];
    for r in 0..config.num_recursions {
        let selected = expected.int(&format!("{tag}.selected.{r}")).unwrap();
        let selected: Vec<bool> = selected[base..base + len].iter().map(|&s| s != 0).collect();
        assert_eq!(out.selected[r], selected, "{}", what(&format!("selected.{r}")));

        let routers = [
            ("router_logits", &out.router_logits),
            ("router_weights", &out.router_weights),
            ("aux_logits", &out.aux_logits),
        ];
        for (kind, found) in routers {
            let name = format!("{tag}.{kind}.{r}");
            if !expected.contains(&name) {
                continue;
            }
            let rows = all().filter(|&(t, _)| active[t]);
            let width = config.router_outputs();
            assert_rows(&what(&name), &found[r], expected.f32(&name).unwrap(), width, rows);
        }
        if tag == "causal" {
            let block_out = expected.f32(&format!("causal.block_out.{r}")).unwrap();
            // A golden row of token choice that finished at an earlier step repeats the input of its last block, not
            // its result, so only rows that ran at this step are compared.
            let rows = all().filter(|&(t, _)| config.mode == Mode::Expert || selected[t]);
            let name = what(&format!("block_out.{r}"));
            assert_rows(&name, &out.block_out[r], block_out, config.hidden_size, rows);
        }
        active = selected;
    }
    assert_eq!(out.aux_logits.is_empty(), !config.has_aux_router());
}

#[test]
fn layout_matches_every_case() {
    for case in cases() {
        let layout = case.checkpoint.layout();
        let layers = || 0..layout.num_layers();
        assert_eq!(layers().map(|l| layout.owner(l)).collect::<Vec<_>>(), case.layout.layer_owner);
        assert_eq!(layers().map(|l| layout.recursion(l)).collect::<Vec<_>>(), case.layout.layer_recursion);
        assert_eq!(layers().map(|l| layout.prefix(l)).collect::<Vec<_>>(), case.layout.layer_prefix);
        let num_unshared = layout.unshared_layers().len();
        let num_shared: usize = (0..layout.num_recursions() as u32).map(|r| layout.block_layers(r).len()).sum();
        assert_eq!(num_unshared + num_shared, layout.num_layers(), "{}", case.name);
    }
}

#[test]
fn tied_layers_give_equal_ids_however_they_are_written() {
    let mut written = [0, 0];
    for case in cases() {
        written[usize::from(case.layout.tied_names_written)] += 1;
        let (checkpoint, layout) = (&case.checkpoint, case.checkpoint.layout());
        for layer in 0..layout.num_layers() {
            assert_eq!(checkpoint.layer(layer), checkpoint.layer(layout.owner(layer)), "{}", case.name);
            let name = TensorName::Layer { layer, tensor: LayerTensor::QProj };
            assert_eq!(checkpoint.id(name), Some(checkpoint.layer(layer).q_proj));
        }
        let tied = checkpoint.lm_head() == checkpoint.embed_tokens();
        assert_eq!(tied, case.name != "vanilla_mha_untied", "{}", case.name);
    }
    assert!(written.iter().all(|&count| count > 0), "both ways of writing ties are covered");
}

#[test]
fn causal_forward_matches_every_case() {
    for case in cases() {
        let oracle = Oracle::new(&case.checkpoint);
        for (i, tokens) in case.sequences.iter().enumerate() {
            let out = oracle.forward(tokens, Routing::Causal).unwrap();
            check_forward(&case, "causal", i, &out);
        }
    }
}

#[test]
fn topk_forward_matches_every_expert_case() {
    let mut num_checked = 0;
    for case in cases() {
        let is_expert = case.checkpoint.config().mode == Mode::Expert;
        assert_eq!(case.expected.contains("topk.logits"), is_expert, "{}", case.name);
        if !is_expert {
            continue;
        }
        num_checked += 1;
        let oracle = Oracle::new(&case.checkpoint);
        for (i, tokens) in case.sequences.iter().enumerate() {
            let out = oracle.forward(tokens, Routing::TopK).unwrap();
            check_forward(&case, "topk", i, &out);
        }
    }
    assert_eq!(num_checked, 11 + 2);
}

#[test]
fn greedy_decoding_matches_every_case() {
    for case in cases() {
        let oracle = Oracle::new(&case.checkpoint);
        let kv = KvLayout::new(case.checkpoint.config(), case.checkpoint.layout());
        let vocab_size = case.checkpoint.config().vocab_size;
        assert_eq!(case.prompts.len(), 2);
        for (i, prompt) in case.prompts.iter().enumerate() {
            let what = format!("{} decode.{i}", case.name);
            let tokens = case.expected.ids(&format!("decode.{i}.tokens")).unwrap();
            let found = oracle.generate(prompt, tokens.len()).unwrap();
            assert_eq!(found.tokens, tokens, "{what}.tokens");
            assert_eq!(found.depth, case.expected.ids(&format!("decode.{i}.depth")).unwrap(), "{what}.depth");

            // Later prompts record the last steps only.
            let logits = case.expected.f32(&format!("decode.{i}.logits")).unwrap();
            let num_recorded = logits.len() / vocab_size;
            let skipped = tokens.len() - num_recorded;
            let rows = (0..num_recorded).map(|row| (skipped + row, row));
            assert_rows(&format!("{what}.logits"), &found.logits, logits, vocab_size, rows);

            let entries = case.expected.ids(&format!("decode.{i}.cache_entries")).unwrap();
            let entries: Vec<usize> = entries.into_iter().map(|n| n as usize).collect();
            assert_eq!(found.cache_entries, entries, "{what}.cache_entries");
            assert_eq!(kv.entries_per_layer(&found.depth), entries, "{what}: K/V layout");
        }
    }
}

#[test]
fn any_split_of_a_sequence_gives_the_same_result() {
    for case in cases() {
        let oracle = Oracle::new(&case.checkpoint);
        let tokens = &case.sequences[0];
        let whole = oracle.forward(tokens, Routing::Causal).unwrap();
        let mut cache = oracle.new_cache();
        let mut logits = Vec::new();
        for part in [&tokens[..5], &tokens[5..5], &tokens[5..6], &tokens[6..]] {
            logits.extend(oracle.feed(&mut cache, part, Routing::Causal).unwrap().logits);
        }
        assert_eq!(logits, whole.logits, "{}", case.name);
        assert_eq!(cache.num_tokens(), tokens.len());
    }
}

#[test]
fn parameter_counts_follow_the_layout() {
    for case in cases() {
        let checkpoint = &case.checkpoint;
        let counts = checkpoint.parameter_counts();
        let is_shared = checkpoint.config().mode != Mode::Vanilla;
        assert_eq!(counts.unique() < counts.effective(), is_shared, "{}", case.name);
        let elems: u64 = checkpoint.tensor_ids().map(|id| checkpoint.to_f32(id).len() as u64).sum();
        assert_eq!(counts.unique(), elems, "{}", case.name);
        let config = checkpoint.config();
        let is_relaxed = config.lora.is_some() || config.recursion_encoding;
        assert_eq!(counts.relaxation > 0, is_relaxed, "{}", case.name);
    }
}

#[test]
fn embedded_bytes_open_like_the_directory() {
    let case = &cases()[0];
    let config = std::fs::read_to_string(case.dir.join("config.json")).unwrap();
    let bytes = std::fs::read(case.dir.join("model.safetensors")).unwrap();
    let embedded = Checkpoint::from_bytes(&config, bytes, "embedded model").unwrap();
    assert_eq!(embedded.config(), case.checkpoint.config());
    assert_eq!(embedded.num_tensors(), case.checkpoint.num_tensors());
    for id in embedded.tensor_ids() {
        assert_eq!(embedded.view(id).data, case.checkpoint.view(id).data);
    }
}
