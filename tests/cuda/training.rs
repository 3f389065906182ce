//! The whole program on the emulated GPU.

use super::{Place, emulated_ok};
use crate::command::essence;
use std::fs;

const GPT2: &str = "arch = 'gpt2'\nlayers = 2\nresidual = 32\nkv_heads = 2\ncontext = 16\n";
const LLAMA: &str = "arch = 'llama'\nlayers = 2\nresidual = 32\nkv_heads = 2\ngroup = 2\ncontext = 16\nffn = 48\n\
                     qk_norm = true\nqkv_bias = true\n";

/// A configuration on the tokens of `data`, or on `rows.csv`.
fn config(place: &Place, name: &str, keys: &str, sections: &str) {
    let data = if sections.contains("'mlp'") { "rows.csv" } else { "data" };
    let text = format!("run = '{name}'\nthreads = 1\n{keys}\n[data]\npath = '{data}'\n{sections}\n");
    place.write(&format!("{name}.toml"), text);
}

fn losses(place: &Place, run: &str) -> Vec<f64> {
    let text = String::from_utf8(place.read(&format!("{run}/metrics.jsonl"))).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    // Lines of validations have no learning rate.
    lines.filter(|line| line["lr"].is_number()).map(|line| line["loss"].as_f64().unwrap()).collect()
}

fn model(place: &Place, run: &str, step: u64) -> [Vec<u8>; 2] {
    ["model", "optimizer"].map(|file| place.read(&format!("{run}/checkpoints/step-{step:08}/{file}.safetensors")))
}

/// The largest difference of two loss curves, which must be as long as `steps`.
fn apart(a: &[f64], b: &[f64], steps: usize) -> f64 {
    assert_eq!((a.len(), b.len()), (steps, steps));
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

/// Every architecture, with several optimizers, accumulation and clipping: 20 steps in f32 stay within rounding of the
/// CPU's, and those in bf16 within bf16's.
#[test]
fn training_is_the_cpus() {
    let place = Place::new();
    let mlp = "arch = 'mlp'\nhidden = [24, 16]\n";
    for (name, model, optimizer) in [
        ("gpt2", GPT2, "kind = 'adamw'\nlr = 0.003"),
        ("llama", LLAMA, "kind = 'muon'\nlr = 0.003"),
        ("mlp", mlp, "kind = 'sgd'\nmomentum = 0.9\nlr = 0.01"),
        ("lion", LLAMA, "kind = 'lion'\nlr = 0.0003"),
    ] {
        let sections =
            format!("[batch]\nsize = 2\nmicro_batches = 2\n[optimizer]\n{optimizer}\nclip = 1.0\n[model]\n{model}");
        config(&place, name, "steps = 20", &sections);
        place.ok(&format!("train -c {name}.toml --device cpu --set run={name}-cpu"));
        emulated_ok(
            &place,
            &format!("train -c {name}.toml --device cuda --set run={name}-f32 --set precision=f32"),
            &[],
        );
        emulated_ok(&place, &format!("train -c {name}.toml --device cuda --set run={name}-bf16"), &[]);
        let curve = |kind: &str| losses(&place, &format!("{name}-{kind}"));
        let (cpu, single, half) = (curve("cpu"), curve("f32"), curve("bf16"));
        let moved = (cpu[0] - cpu[19]).abs();
        assert!(moved > 0.05, "{name}: nothing was learnt, {cpu:?}");
        // Both run in f32 from the same bits. A relative error of 2^-24 a rounding, some thousand roundings in a step's
        // chain of sums, and 20 steps.
        let bound = 20.0 * 1000.0 * 2f64.powi(-24);
        assert!(apart(&cpu, &single, 20) < bound, "{name} in f32: {cpu:?}\n{single:?}");
        // In bf16 every activation is rounded by up to 2^-8 of itself; a loss averages over 64 tokens or more.
        let bound = 2f64.powi(-8) * cpu[0] * 2.0;
        let gap = apart(&cpu, &half, 20);
        assert!(gap < bound && gap > 0.0, "{name} in bf16: {gap}, {cpu:?}\n{half:?}");
    }
}

/// Steps recorded whole or by micro-batches, and steps launched kernel by kernel; recomputation; another GPU: the same
/// bits.
#[test]
fn how_a_step_runs_changes_no_bit() {
    let place = Place::new();
    config(&place, "run", "steps = 6", &format!("[batch]\nsize = 2\nmicro_batches = 3\n[model]\n{LLAMA}"));
    let train = |name: &str, sets: &str, options: &[(&str, &str)]| {
        let log = place.join(&format!("{name}.log"));
        let options = [options, &[("LOG", log.to_str().unwrap())]].concat();
        emulated_ok(&place, &format!("train -c run.toml --device cuda --set run={name} {sets}"), &options);
        let log = fs::read_to_string(log).unwrap();
        let calls = log.lines().filter(|line| *line == "cuGraphLaunch").count();
        (model(&place, name, 6), calls)
    };
    // Each part of the ring: one step is launched kernel by kernel, later ones as one graph.
    let (recorded, launches) = train("recorded", "", &[]);
    assert_eq!(launches, 4);
    for (name, sets, expected) in [
        // 18 micro-batches and 6 updates, but for the first of each kind: both parts, and three ways to add.
        ("micro", "--set graph=micro", 18 - 6 + 6 - 1),
        ("eager", "--set graph=none", 0),
        ("block", "--set memory.recompute=block", 4),
        // Texts are written between steps, and a recorded step stays as it is.
        ("writing", "--set samples.every=4 --set samples.tokens=2", 4),
        // Between steps the ring goes on by the micro-batches of validation.
        ("validated", "--set validation.every=1 --set validation.batches=1", 0),
    ] {
        let (model, launches) = train(name, sets, &[]);
        assert!(model == recorded, "{name} differs");
        assert!(launches == expected || name == "validated", "{name}: {launches} graphs launched");
    }
    assert!(train("small", "", &[("MULTIPROCESSORS", "3")]).0 == recorded, "a smaller GPU differs");
}

/// Streams as lazy as can be, and a compute or copy stream that all others run ahead of: tokens are neither read before
/// they are there, nor overwritten before they are read.
#[test]
fn streams_wait_for_each_other() {
    let place = Place::new();
    config(&place, "run", "steps = 6", &format!("[batch]\nsize = 2\nmicro_batches = 3\n[model]\n{GPT2}"));
    let train = |graph: &str, streams: &str, seed: &str| {
        let name = format!("{graph}-{streams}-{seed}");
        let line = format!("train -c run.toml --device cuda --set run={name} --set graph={graph}");
        emulated_ok(&place, &line, &[("STREAMS", streams), ("SEED", seed)]);
        model(&place, &name, 6)
    };
    let eager = train("none", "eager", "0");
    for graph in ["step", "micro", "none"] {
        // The backend's streams: 0 compute, 1 communication, 2 copies.
        for (streams, seed) in [("lazy", "0"), ("lazy", "5"), ("slow-0", "0"), ("slow-2", "0")] {
            assert!(train(graph, streams, seed) == eager, "graph = {graph}, {streams} streams, seed {seed}");
        }
    }
}

/// GELU and the gradients of biases are taken along by the products in bf16, unless that is turned off; the curves are
/// those of bf16 either way. Recorded, recomputed or launched one by one, steps with epilogues have the same bits.
#[test]
fn products_have_epilogues() {
    let place = Place::new();
    config(&place, "run", "steps = 6", &format!("[batch]\nsize = 2\nmicro_batches = 3\n[model]\n{GPT2}bias = true\n"));
    let replaced = ["activate_bf16", "activate_backward_bf16", "partial_column_sums_bf16"];
    let train = |name: &str, sets: &str, options: &[(&str, &str)]| {
        let log = place.join(&format!("{name}.log"));
        let options = [options, &[("LOG", log.to_str().unwrap())]].concat();
        emulated_ok(&place, &format!("train -c run.toml --device cuda --set run={name} {sets}"), &options);
        let log = fs::read_to_string(log).unwrap();
        (model(&place, name, 6), replaced.map(|kernel| log.contains(kernel)))
    };
    let (fused, kernels) = train("fused", "", &[]);
    assert_eq!(kernels, [false; 3], "{replaced:?} ran beside epilogues");
    let (apart_from_products, kernels) = train("unfused", "--set unfused=true", &[]);
    assert_eq!(kernels, [true; 3], "of {replaced:?}");
    assert!(apart_from_products != fused, "the same rounding: were there epilogues?");
    let (with, without) = (losses(&place, "fused"), losses(&place, "unfused"));
    assert!(apart(&with, &without, 6) < 2f64.powi(-8) * with[0], "{with:?}\n{without:?}");
    assert!(train("eager", "--set graph=none", &[("STREAMS", "lazy")]).0 == fused, "eager differs");
    for recompute in ["mlp", "block"] {
        let set = format!("--set memory.recompute={recompute}");
        assert!(train(recompute, &set, &[]).0 == fused, "recomputing {recompute} differs");
    }
}

/// Twelve steps, a stop and eight more are twenty steps, bit for bit; and so on the CPU from the GPU's checkpoint, to
/// rounding.
#[test]
fn resumed_is_never_stopped() {
    let place = Place::new();
    for precision in ["f32", "bf16"] {
        let keys = format!("steps = 20\nprecision = '{precision}'");
        let sections = format!("[checkpoint]\nevery = 12\nkeep_last = 0\n[batch]\nsize = 2\n[model]\n{GPT2}");
        let name = format!("whole-{precision}");
        config(&place, &name, &keys, &sections);
        emulated_ok(&place, &format!("train -c {name}.toml --device cuda"), &[]);
        let whole = essence(&place.join(&name), 20);
        fs::remove_dir_all(place.join(&format!("{name}/checkpoints/step-00000020"))).unwrap();
        let parts = place.join("parts");
        crate::command::copy(&place.join(&name), &parts);
        emulated_ok(&place, "resume parts --device cuda", &[]);
        assert!(essence(&parts, 20) == whole, "{precision}: resuming differs");
        fs::remove_dir_all(&parts).unwrap();
        if precision == "f32" {
            let before = losses(&place, &name);
            place.ok(&format!("resume {name} --device cpu"));
            let after = losses(&place, &name);
            assert!(apart(&before[..20], &after[..20], 20) < 1e-4, "{before:?}\n{after:?}");
        }
    }
}

/// Gradients and moments in bf16, with one micro-batch and with several, by elementwise rules and Muon: within bf16's band
/// of the CPU; recorded, launched one by one, resumed: the same bits; the plan says what is saved.
#[test]
fn gradients_and_moments_in_bf16() {
    let place = Place::new();
    for (name, model, micro_batches, optimizer) in
        [("adamw", GPT2, 1, "kind = 'adamw'\nlr = 0.003"), ("muon", LLAMA, 2, "kind = 'muon'\nlr = 0.003")]
    {
        let sections = format!(
            "[checkpoint]\nevery = 12\nkeep_last = 0\n[batch]\nsize = 4\nmicro_batches = {micro_batches}\n\
             [optimizer]\n{optimizer}\nclip = 1.0\n[model]\n{model}"
        );
        config(&place, name, "steps = 20", &sections);
        place.ok(&format!("train -c {name}.toml --device cpu --set run={name}-cpu"));
        let narrow = "--device cuda --set memory.gradients=bf16 --set memory.moments=bf16";
        let train = |run: &str, sets: &str| {
            emulated_ok(&place, &format!("train -c {name}.toml --set run={name}-{run} {narrow} {sets}"), &[]);
        };
        train("half", "");
        let said = String::from_utf8(place.read(&format!("{name}-half/log.txt"))).unwrap();
        assert!(said.contains("gradients bf16, sums of them f32; moments bf16, rounded stochastically"), "{said}");
        for planned in ["bf16  gradients", "bf16  first moments"] {
            assert!(said.contains(planned), "{planned} is not in {said}");
        }
        assert_eq!(said.contains("f32   gradient sums"), micro_batches > 1, "{said}");
        let curve = |kind: &str| losses(&place, &format!("{name}-{kind}"));
        let (cpu, half) = (curve("cpu"), curve("half"));
        let gap = apart(&cpu, &half, 20);
        // As `training_is_the_cpus`; a gradient and a moment are rounded once more, in either direction.
        assert!(gap < 2f64.powi(-8) * cpu[0] * 2.0 && cpu[0] - cpu[19] > 0.05, "{name}: {gap}, {cpu:?}\n{half:?}");

        let run = format!("{name}-half");
        let (whole, stored) = (essence(&place.join(&run), 20), moment_bytes(&place, &run));
        emulated_ok(&place, &format!("train -c {name}.toml --set run={name}-plain --device cuda"), &[]);
        assert!(stored < moment_bytes(&place, &format!("{name}-plain")) * 6 / 10, "moments take as much as in f32");
        train("single", "--set graph=none");
        assert!(
            self::model(&place, &format!("{name}-single"), 20) == self::model(&place, &run, 20),
            "unrecorded differs"
        );
        fs::remove_dir_all(place.join(&format!("{run}/checkpoints/step-00000020"))).unwrap();
        emulated_ok(&place, &format!("resume {run} --device cuda"), &[]);
        assert!(essence(&place.join(&run), 20) == whole, "{name}: resuming differs");
    }
}

/// Bytes of a run's moments.
fn moment_bytes(place: &Place, run: &str) -> usize {
    model(place, run, 20)[1].len()
}

/// Measured algorithms are kept with the run, and taken over by resuming.
#[test]
fn tuned_is_resumed_with_the_same_algorithms() {
    let place = Place::new();
    let sections = format!("[checkpoint]\nevery = 3\nkeep_last = 0\n[batch]\nsize = 2\n[model]\n{GPT2}");
    config(&place, "tuned", "steps = 6\nautotune = true", &sections);
    emulated_ok(&place, "train -c tuned.toml --device cuda", &[]);
    let (whole, tuning) = (essence(&place.join("tuned"), 6), place.read("tuned/tuning.json"));
    let text = String::from_utf8(tuning.clone()).unwrap();
    assert!(text.contains("Emulated GPU") && text.matches("size:").count() > 5, "{text}");
    fs::remove_dir_all(place.join("tuned/checkpoints/step-00000006")).unwrap();
    emulated_ok(&place, "resume tuned --device cuda", &[]);
    assert!(essence(&place.join("tuned"), 6) == whole, "resuming differs");
    assert!(place.read("tuned/tuning.json") == tuning, "measured again");
    // An algorithm that is not the library's is refused: the file is read, and used.
    let broken = text.replace('[', "[\n      9,").replacen(',', ", ", 1);
    place.write("tuned/tuning.json", broken);
    fs::remove_dir_all(place.join("tuned/checkpoints/step-00000006")).unwrap();
    let said = emulated_ok(&place, "resume tuned --device cuda", &[]);
    assert!(said.err.contains("measured anew"), "{}", said.err);
}

/// A model widened without noise trains as the narrow one does.
#[test]
fn widened_is_narrow() {
    let place = Place::new();
    for (name, model) in [("gpt2", GPT2), ("llama", LLAMA)] {
        config(&place, name, "steps = 5\nprecision = 'f32'", &format!("[batch]\nsize = 2\n[model]\n{model}"));
        emulated_ok(&place, &format!("train -c {name}.toml --device cuda"), &[]);
        let curve = |width: usize| {
            let run = format!("{name}-{width}");
            let init = format!("[batch]\nsize = 2\n[init]\nfrom = '{name}'\n[init.upscale]\nwidth = {width}\n");
            config(&place, &run, "steps = 15\nprecision = 'f32'", &init);
            emulated_ok(&place, &format!("train -c {run}.toml --device cuda"), &[]);
            losses(&place, &run)
        };
        let (narrow, wide) = (curve(1), curve(3));
        assert!(narrow[0] - narrow[14] > 0.01, "{name}: nothing was learnt");
        assert!(apart(&narrow, &wide, 15) < 1e-4, "{name}: {narrow:?}\n{wide:?}");
    }
}

/// Widening on the GPU writes the CPU's file, noise included, bit for bit.
#[test]
fn widening_is_the_cpus() {
    let place = Place::new();
    for kind in ["independent", "paired", "relative"] {
        let line = |out: &str, device: &str| {
            format!("upscale base --out {out} --width 2 --noise 0.3 --noise-kind {kind} --device {device} --force")
        };
        place.ok(&line("cpu", "cpu"));
        emulated_ok(&place, &line("gpu", "cuda"), &[]);
        for file in ["model", "optimizer"] {
            let [cpu, gpu] = ["cpu", "gpu"].map(|out| place.read(&format!("{out}/{file}.safetensors")));
            assert!(cpu == gpu, "{kind}: {file} differs");
        }
    }
}

/// Measuring and generating from the same checkpoint.
#[test]
fn eval_and_generate_are_the_cpus() {
    let place = Place::new();
    let loss = |said: crate::command::Said| said.json()["loss"].as_f64().unwrap();
    let cpu = loss(place.ok("eval base data --json --device cpu"));
    let single = loss(emulated_ok(&place, "eval base data --json --device cuda --precision f32", &[]));
    let half = loss(emulated_ok(&place, "eval base data --json --device cuda", &[]));
    assert!((cpu - single).abs() < 1e-5, "{cpu} {single}");
    assert!((cpu - half).abs() < 2f64.powi(-8) * cpu && cpu != half, "{cpu} {half}");
    let line = "generate base --prompt the --tokens 20 --seed 3 --json";
    let text = place.ok(&format!("{line} --device cpu")).out;
    assert_eq!(emulated_ok(&place, &format!("{line} --device cuda --precision f32"), &[]).out, text);
    // Token by token in the kernel for few queries, and in bf16 the same at every run.
    let log = place.join("generate.log");
    let written = |options: &[(&str, &str)]| emulated_ok(&place, &format!("{line} --device cuda"), options).out;
    let once = written(&[("LOG", log.to_str().unwrap())]);
    assert!(fs::read_to_string(log).unwrap().contains("attention_decode_bf16"));
    assert_eq!(written(&[("SEED", "2"), ("STREAMS", "lazy")]), once);
}

/// The first thing that anybody runs.
#[test]
fn quickstart() {
    let place = Place::new();
    let said = emulated_ok(&place, "quickstart --size tiny --device cuda --json", &[]);
    let apart = said.json()["equivalence_max_loss_difference"].as_f64().unwrap();
    assert!(apart < 1e-5, "{}", said.out);
}
