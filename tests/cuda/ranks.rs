//! Ranks on emulated GPUs, whose sums go over a stand-in for NCCL between the processes.

use super::{
    Place, Said,
    command::{
        essence,
        ranks::{end, losses, start_ranks, wait_for_a_step},
    },
};
use std::{
    process::{Child, Command},
    time::{Duration, Instant},
};

/// A run in f32 on GPUs, with as many micro-batches as the most ranks here.
fn train(run: &str, more: &str) -> String {
    format!(
        "train -c run.toml --set run={run} --set device=cuda --set precision=f32 --set batch.micro_batches=4 \
         --set validation.every=2 --set checkpoint.keep_last=0 --set comm.timeout=300 {more}"
    )
}

/// Starts ranks on a machine with this many GPUs.
fn start(place: &Place, line: &str, world: usize, gpus: usize, options: &[(&str, &str)]) -> Vec<Child> {
    start_ranks(world, |_| {
        let mut command = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tools/with-emulated-gpus"));
        command.arg(gpus.to_string()).arg(env!("CARGO_BIN_EXE_mupscale")).args(line.split_whitespace());
        command.current_dir(place.path()).envs(options.iter().copied());
        command
    })
}

fn ok(place: &Place, line: &str, world: usize, options: &[(&str, &str)]) {
    for (rank, said) in start(place, line, world, world, options).into_iter().map(end).enumerate() {
        assert_eq!(said.code, 0, "rank {rank} of {world}: {}", said.err);
    }
}

/// Both curves, step for step, as close as f32 sums in another order are.
fn assert_close(one: &[f64], many: &[f64]) {
    assert!(!one.is_empty() && one.len() == many.len(), "{one:?} {many:?}");
    for (a, b) in one.iter().zip(many) {
        assert!((a - b).abs() <= 1e-5 * a.abs(), "{one:?} {many:?}");
    }
}

#[test]
fn ranks_train_as_one_gpu_does() {
    let place = Place::new();
    ok(&place, &train("one", ""), 1, &[]);
    let one = losses(&place, "one");
    for world in [2, 4] {
        let run = format!("w{world}");
        ok(&place, &train(&run, ""), world, &[]);
        assert_close(&one, &losses(&place, &run));
    }
    // Devices that work only when somebody waits for them: a missing event would show.
    ok(&place, &train("lazy", ""), 2, &[("MUPSCALE_EMULATED_STREAMS", "lazy"), ("MUPSCALE_EMULATED_SEED", "3")]);
    assert_eq!(losses(&place, "lazy"), losses(&place, "w2"));
    // Every rank updates all weights: the same sums, which the stand-in for NCCL adds in one order.
    ok(&place, &train("whole", "--set comm.zero=false"), 2, &[]);
    assert_eq!(losses(&place, "whole"), losses(&place, "w2"));
}

/// Master weights in f32 beside working weights in bf16, each rank its part, by both kinds of update; and gradients
/// that travel as bf16 change what is learned by no more than bf16 does.
#[test]
fn ranks_train_in_bf16() {
    let place = Place::new();
    for optimizer in ["adamw", "muon"] {
        let run = |name: &str, more: &str| {
            let more = format!("--set precision=bf16 --set optimizer.kind={optimizer} {more}");
            ok(&place, &train(&format!("{optimizer}-{name}"), &more), 2, &[]);
            losses(&place, &format!("{optimizer}-{name}"))
        };
        let whole = run("whole", "--set comm.zero=false");
        assert_eq!(run("parts", ""), whole);
        let moments = "--set memory.moments=bf16 --set memory.gradients=bf16";
        assert_eq!(run("half-parts", moments), run("half-whole", &format!("{moments} --set comm.zero=false")));
        let travels = run("travels", "--set comm.reduction=bf16");
        assert!(travels != whole, "f32 or bf16 on the way made no difference");
        assert_eq!(run("travels-whole", "--set comm.reduction=bf16 --set comm.zero=false"), travels);
        // Each addition and each way there and back rounds by 2⁻⁹ at most.
        let close = travels.iter().zip(&whole).all(|(a, b)| (a - b).abs() <= 4.0 * 2f64.powi(-9) * b);
        assert!(close, "{travels:?} {whole:?}");
    }
}

#[test]
fn a_run_is_resumed_with_any_number_of_gpus() {
    let place = Place::new();
    let longer = "--set steps=6";
    ok(&place, &train("one", longer), 1, &[]);
    ok(&place, &train("many", longer), 4, &[]);
    for (world, step) in [(2, 4), (3, 2)] {
        for later in step + 1..=6 {
            let _ = std::fs::remove_dir_all(place.join(&format!("many/checkpoints/step-{later:08}")));
        }
        ok(&place, "resume many", world, &[]);
        assert_close(&losses(&place, "one"), &losses(&place, "many"));
    }
}

#[test]
fn a_killed_rank_ends_all_others_which_name_it() {
    for killed in [0, 1] {
        let place = Place::new();
        let line = train("r", "--set steps=1000000 --set checkpoint.every=0 --set validation.every=0");
        let mut ranks = start(&place, &line, 2 + killed, 2 + killed, &[]);
        wait_for_a_step(&place, "r");
        ranks[killed].kill().unwrap();
        let start = Instant::now();
        for (rank, child) in ranks.into_iter().enumerate().filter(|(rank, _)| *rank != killed) {
            let said = end(child);
            assert_eq!(said.code, 3, "rank {rank}: {}", said.err);
            assert!(said.err.contains(&format!("rank {killed} is lost")), "rank {rank}: {}", said.err);
        }
        // Long before the timeout.
        assert!(start.elapsed() < Duration::from_secs(30), "{:?}", start.elapsed());
    }
}

/// A rank that stops (as a GPU that hangs stops it) is waited for no longer than it was said.
#[test]
fn a_rank_that_hangs_is_not_waited_for_for_ever() {
    let place = Place::new();
    let line = train("r", "--set steps=1000000 --set checkpoint.every=0").replace("timeout=300", "timeout=2");
    let mut ranks = start(&place, &line, 2, 2, &[]);
    wait_for_a_step(&place, "r");
    let pid = ranks[1].id().to_string();
    assert!(Command::new("kill").args(["-s", "STOP", &pid]).status().unwrap().success());
    let said = end(ranks.remove(0));
    ranks[0].kill().unwrap();
    ranks[0].wait().unwrap();
    assert_eq!(said.code, 3, "{}", said.err);
    assert!(said.err.contains("hangs") && said.err.contains("comm.timeout"), "{}", said.err);
}

/// Ranks that must be refused, with one message.
fn refused(place: &Place, world: usize, gpus: usize, options: &[(&str, &str)], part: &str) {
    let said: Vec<Said> = start(place, &train("r", ""), world, gpus, options).into_iter().map(end).collect();
    assert!(said.iter().all(|said| said.code == 2), "{:?}", said.iter().map(|s| (s.code, &s.err)).collect::<Vec<_>>());
    let spoken: Vec<_> = said.iter().filter(|said| !said.err.is_empty()).map(|said| &said.err).collect();
    assert!(spoken.len() == 1 && spoken[0].contains(part), "one message with `{part}`: {spoken:?}");
    assert!(!place.join("r").exists(), "nothing was begun");
}

#[test]
fn ranks_without_a_gpu_of_their_own_are_refused() {
    let place = Place::new();
    refused(&place, 3, 2, &[], "ranks on a host = 3: more than the 2 GPUs");
    refused(&place, 2, 1, &[], "ranks 0 and 1 have the same GPU");
}

/// Rank 0 measures the algorithms of products for all, and resuming takes them over.
#[test]
fn tuned_ranks_compute_with_the_same_algorithms() {
    let place = Place::new();
    let line = train("tuned", "--set autotune=true --set checkpoint.every=2");
    let ranks = start(&place, &line, 2, 2, &[("MUPSCALE_LOG", "debug")]);
    let chosen = |said: Said| {
        assert_eq!(said.code, 0, "{}", said.err);
        let (_, text) = said.err.split_once("algorithms: {").expect(&said.err);
        text.split_once("\n}").unwrap().0.to_string()
    };
    let [first, second] = <[_; 2]>::try_from(ranks).unwrap().map(|rank| chosen(end(rank)));
    assert!(first.matches("size:").count() > 5 && first == second, "{first}\n{second}");
    let kept = String::from_utf8(place.read("tuned/tuning.json")).unwrap();
    assert!(kept.contains(&first), "{kept}\n{first}");
    let whole = essence(&place.join("tuned"), 4);
    std::fs::remove_dir_all(place.join("tuned/checkpoints/step-00000004")).unwrap();
    ok(&place, "resume tuned", 2, &[]);
    assert!(essence(&place.join("tuned"), 4) == whole, "resuming differs");
}

/// A GPU's own times, of its queues.
#[test]
fn a_trace_shows_what_gpus_do() {
    let place = Place::new();
    ok(&place, &train("r", "--trace trace.json --trace-steps 3..4"), 2, &[]);
    let trace: serde_json::Value = serde_json::from_slice(&place.read("trace.json")).unwrap();
    let count = |rank: usize, lane: &str, name: &str| {
        let events = trace["traceEvents"].as_array().unwrap().iter();
        let named = |e: &&serde_json::Value| e["name"].as_str().unwrap().starts_with(name);
        events.filter(|e| e["ph"] == "X" && e["pid"] == rank && e["cat"] == lane).filter(named).count()
    };
    for rank in 0..2 {
        // Updates are recorded by then; micro-batches with sums over ranks never are.
        assert!(count(rank, "compute", "recorded work") >= 2, "rank {rank}");
        assert!(count(rank, "compute", "backward of block 0") >= 2 && count(rank, "copy", "batch") >= 4);
        // A sum for each of three groups, one of which has two owners, for the losses and for two norms; validation is
        // after the fourth step, and gathers weights as the beginning of that step did.
        assert_eq!(count(rank, "communication", "sum of"), 2 * (4 + 3) + 1);
        assert_eq!(count(rank, "communication", "copy of"), 2 * 4);
    }
}

#[test]
fn sums_over_gpus_are_measured() {
    let place = Place::empty();
    let line = "bench comm --device cuda --smallest 65536 --largest 65536 --calls 2 --json";
    let said: Vec<Said> = start(&place, line, 2, 2, &[]).into_iter().map(end).collect();
    assert!(said.iter().all(|said| said.code == 0), "{}{}", said[0].err, said[1].err);
    let found = said[0].json();
    assert!(found["over"] == "nccl" && found["sizes"][0]["ms"].as_f64().unwrap() > 0.0, "{found}");
}
