//! Runs of several processes, connected over 127.0.0.1: what they compute, and what becomes of them when one is lost.

mod command;

use command::{
    Place, Said, essence,
    ranks::{as_rank, end, losses, port, start_ranks, wait_for_a_step},
};
use std::{
    process::{Child, Command},
    time::{Duration, Instant},
};

/// A rank of `world` processes.
fn rank(place: &Place, line: &str, rank: usize, world: usize, port: u16) -> Command {
    as_rank(place.command(line), rank, world, port)
}

fn start(place: &Place, line: &str, world: usize) -> Vec<Child> {
    start_ranks(world, |_| place.command(line))
}

/// Runs ranks that must succeed.
fn ok(place: &Place, line: &str, world: usize) -> Vec<Said> {
    let said: Vec<_> = start(place, line, world).into_iter().map(end).collect();
    for (rank, said) in said.iter().enumerate() {
        assert_eq!(said.code, 0, "rank {rank} of {world}: {}", said.err);
        assert_eq!(said.out.is_empty(), rank > 0, "rank 0 alone speaks: {}", said.out);
    }
    said
}

const STEPS: u64 = 4;

/// Eight micro-batches a step, so that every world size has some; the timeout is short, should one be lost.
fn train(run: &str, more: &str) -> String {
    format!(
        "train -c run.toml --set run={run} --set batch.micro_batches=8 --set validation.every=2 \
         --set checkpoint.keep_last=0 --set comm.timeout=60 {more}"
    )
}

#[test]
fn powers_of_two_of_processes_are_one_process_bit_for_bit() {
    let place = Place::new();
    place.ok(&train("one", ""));
    let one = essence(&place.join("one"), STEPS);
    assert!(one.3.len() as u64 > STEPS);
    for world in [1, 2, 4, 8] {
        let run = format!("w{world}");
        ok(&place, &train(&run, ""), world);
        assert!(essence(&place.join(&run), STEPS) == one, "{world} ranks end elsewhere");
    }
}

#[test]
fn three_processes_agree_to_rounding() {
    let place = Place::new();
    place.ok(&train("one", "--set precision=f64"));
    ok(&place, &train("three", "--set precision=f64"), 3);
    let (one, three) = (losses(&place, "one"), losses(&place, "three"));
    assert_eq!(one.len(), three.len());
    for (a, b) in one.iter().zip(&three) {
        assert!((a - b).abs() <= 1e-12 * a.abs(), "{a} and {b}");
    }
    let [a, b] = ["one", "three"].map(|run| essence(&place.join(run), STEPS).0);
    assert_eq!(a.len(), b.len());
    assert!(a != b, "three ranks add in another order; should that ever not show, this test shows nothing");
}

/// Ranks that each update a part of the weights end where ranks do that update all of them, and so do their checkpoints.
#[test]
fn zero_changes_nothing() {
    let place = Place::new();
    for (optimizer, world) in [("adamw", 3), ("muon", 2), ("lion", 4)] {
        let [on, off] = ["true", "false"].map(|zero| {
            let run = format!("{optimizer}-{zero}");
            // Texts that rank 0 writes show whether it has everybody's weights.
            let samples = "--set samples.every=1 --set samples.tokens=40 --set samples.temperature=1.5";
            let more =
                format!("--set optimizer.kind={optimizer} --set comm.zero={zero} --set validation.every=3 {samples}");
            let said = ok(&place, &train(&run, &more), world);
            assert_eq!(said[0].err.contains("ZeRO: of"), zero == "true", "{}", said[0].err);
            essence(&place.join(&run), STEPS)
        });
        assert!(on == off, "{optimizer} on {world} ranks");
    }
}

#[test]
fn a_run_is_resumed_with_any_number_of_ranks() {
    let place = Place::new();
    place.ok(&train("one", "--set precision=f64 --set steps=6"));
    // Stopped after two steps: by taking away what came later.
    ok(&place, &train("many", "--set precision=f64 --set steps=6"), 4);
    let keep = |step: u64| {
        for later in step + 1..=6 {
            let _ = std::fs::remove_dir_all(place.join(&format!("many/checkpoints/step-{later:08}")));
        }
    };
    keep(4);
    ok(&place, "resume many --set comm.zero=false", 2);
    let same = |a: &str, b: &str| {
        losses(&place, a).iter().map(|l| l.to_bits()).eq(losses(&place, b).iter().map(|l| l.to_bits()))
    };
    let [one, many] = ["one", "many"].map(|run| essence(&place.join(run), 6));
    assert!((&one.0, &one.1) == (&many.0, &many.1), "4, then 2 ranks end where one does");
    keep(2);
    ok(&place, "resume many --set comm.zero=true", 3);
    let [a, b] = ["one", "many"].map(|run| losses(&place, run));
    assert_eq!(a.len(), b.len());
    assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() <= 1e-12 * a.abs()), "{a:?} {b:?}");
    assert!(!same("one", "many"), "three ranks add in another order");
}

#[test]
fn a_killed_rank_ends_all_others_which_name_it() {
    for killed in [0, 1, 3] {
        let place = Place::new();
        let mut ranks = start(&place, &train("r", "--set steps=1000000 --set checkpoint.every=50"), 4);
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

#[test]
fn a_signal_to_one_rank_stops_all_after_the_same_step() {
    let place = Place::new();
    let ranks = start(&place, &train("r", "--set steps=1000000 --set checkpoint.every=0"), 3);
    wait_for_a_step(&place, "r");
    let sent = Command::new("kill").args(["-s", "TERM", &ranks[1].id().to_string()]).status().unwrap();
    assert!(sent.success());
    for (rank, child) in ranks.into_iter().enumerate() {
        let said = end(child);
        assert_eq!(said.code, 75, "rank {rank}: {}", said.err);
        assert_eq!(said.err.contains("stopped by a signal"), rank == 0, "rank {rank}: {}", said.err);
    }
    assert_eq!(place.names("r/checkpoints").len(), 1);
}

/// Ranks that are started with different command lines; all end with code 2, and one says why.
fn refused(places: [&Place; 3], lines: [&str; 3], parts: &[&str]) {
    let port = port();
    let ranks = places.iter().zip(lines).enumerate();
    let ranks: Vec<_> = ranks.map(|(r, (place, line))| rank(place, line, r, 3, port).spawn().unwrap()).collect();
    let said: Vec<_> = ranks.into_iter().map(end).collect();
    assert!(said.iter().all(|said| said.code == 2), "{:?}", said.iter().map(|s| (s.code, &s.err)).collect::<Vec<_>>());
    let messages: Vec<_> = said.iter().filter(|said| !said.err.is_empty()).collect();
    assert_eq!(messages.len(), 1, "one message: {:?}", said.iter().map(|s| &s.err).collect::<Vec<_>>());
    for part in parts {
        assert!(messages[0].err.contains(part), "no `{part}` in {}", messages[0].err);
    }
}

#[test]
fn ranks_that_differ_are_refused_with_one_message() {
    let place = Place::new();
    let good = train("r", "");
    let other = train("r", "--set optimizer.lr=0.02");
    let here = [&place; 3];
    refused(here, [&good, &good, &other], &["rank 2 has another configuration", "lr = 0.02", "lr = 0.01"]);
    // A host whose data have the same name and other contents.
    let elsewhere = Place::new();
    elsewhere.ok("data synth other.txt --bytes 20000 --seed 9");
    std::fs::remove_dir_all(elsewhere.join("data")).unwrap();
    elsewhere.ok("data tokenize other.txt --out data");
    refused([&place, &elsewhere, &place], [&good; 3], &["rank 1 has another fingerprint of the data than rank 0"]);
    let few = train("r", "--set batch.micro_batches=2");
    refused(here, [&few; 3], &["batch.micro_batches = 2", "3 ranks"]);
    // This one is found only when the rank is about to compute.
    let many = train("r", "--set threads=100000");
    refused(here, [&good, &many, &good], &["threads = 100000"]);
    let broken = train("r", "--set data.path=nowhere");
    refused(here, [&good, &broken, &good], &["nowhere"]);
    let half = train("r", "--set comm.reduction=bf16");
    refused(here, [&half; 3], &["comm.reduction = bf16", "for GPUs"]);
    let used = train("base", "");
    refused(here, [&used; 3], &["base exists already"]);
    assert!(!place.join("r").exists(), "nothing was begun");
}

#[test]
fn ranks_on_disks_of_their_own_are_refused() {
    let (place, other) = (Place::new(), Place::new());
    refused([&place, &place, &other], [&train("r", ""); 3], &["r/checkpoints", "rank 2 does not see", "hosts share"]);
    assert_eq!(place.names("r/checkpoints"), [""; 0]);
}

#[test]
fn a_rank_that_never_comes_is_named() {
    let place = Place::new();
    let line = train("r", "").replace("comm.timeout=60", "comm.timeout=2");
    let port = port();
    let ranks: Vec<_> = [0, 2].map(|r| rank(&place, &line, r, 3, port).spawn().unwrap()).into();
    let said: Vec<_> = ranks.into_iter().map(end).collect();
    assert!(said.iter().all(|said| said.code == 3), "{} {}", said[0].err, said[1].err);
    assert!(said[0].err.contains("rank 1 of 3 missing after 2 s"), "{}", said[0].err);
    assert!(!place.join("r").exists(), "nothing was begun");
}

#[test]
fn variables_that_make_no_sense_are_named() {
    let place = Place::new();
    let line = train("r", "");
    let mut command = rank(&place, &line, 0, 2, 1);
    let said = Said::new(command.env_remove("LOCAL_RANK").output().unwrap());
    assert_eq!(said.code, 2);
    assert!(said.err.contains("LOCAL_RANK = (not set)") && said.err.contains("PyTorchJob"), "{}", said.err);
}

/// The spans of a trace on one lane of a rank: name, beginning and end in seconds, in the order of their beginnings.
fn spans(trace: &serde_json::Value, rank: usize, lane: &str) -> Vec<(String, f64, f64)> {
    let events = trace["traceEvents"].as_array().unwrap().iter();
    let here = events.filter(|e| e["ph"] == "X" && e["pid"] == rank && e["cat"] == lane);
    let span = |e: &serde_json::Value| {
        let (at, long) = (e["ts"].as_f64().unwrap() / 1e6, e["dur"].as_f64().unwrap() / 1e6);
        (e["name"].as_str().unwrap().to_string(), at, at + long)
    };
    let mut spans: Vec<_> = here.map(span).collect();
    spans.sort_by(|a, b| a.1.total_cmp(&b.1));
    spans
}

#[test]
fn a_trace_shows_sums_beside_backward() {
    let place = Place::new();
    let model = "--set model.layers=4 --set model.residual=128 --set batch.size=16 --set validation.every=0";
    let traced = format!("{model} --set steps=6 --trace trace.json --trace-steps 2..4");
    ok(&place, &train("r", &traced), 2);
    let trace: serde_json::Value = serde_json::from_slice(&place.read("trace.json")).unwrap();
    for rank in 0..2 {
        let named = |lane: &str, name: &str| {
            let all = spans(&trace, rank, lane);
            all.into_iter().filter(|span| span.0.starts_with(name)).collect::<Vec<_>>()
        };
        let mut backward = named("compute", "backward");
        backward.retain(|span| span.0 == "backward");
        let sums = named("communication", "sum of");
        // Three steps of four micro-batches; a sum for each of six groups, one of which has two owners, for the losses and
        // for two norms; and the weights of each part, sent to the other rank.
        assert_eq!((backward.len(), sums.len()), (3 * 4, 3 * (7 + 3)), "rank {rank}");
        assert_eq!(named("communication", "copy of").len(), 3 * 7, "rank {rank}");
        assert_eq!(named("compute", "update").len(), 3);
        assert!(!named("copy", "batch").is_empty() && !named("saving", "checkpoint").is_empty());
        let last = backward.chunks(4).map(|step| (step[0].1, step[3].1, step[3].2));
        let within = |from: f64, to: f64| sums.iter().filter(|sum| sum.1 > from && sum.1 < to).count();
        let beside = last.clone().filter(|&(_, begin, end)| within(begin, end) > 0).count();
        // One at least, however late a busy machine wakes the thread that communicates.
        assert!(beside > 0, "rank {rank}: no sum begins within a backward pass: {backward:?} {sums:?}");
        let early = last.map(|(first, begin, _)| within(first, begin)).sum::<usize>();
        assert_eq!(early, 0, "micro-batches are summed here before ranks are");
    }
}

#[test]
fn sums_over_ranks_are_measured() {
    let place = Place::empty();
    let line = "bench comm --device cpu --threads 1 --smallest 4096 --largest 65536 --calls 2 --json";
    let said = ok(&place, line, 3);
    let found = said[0].json();
    assert_eq!((&found["ranks"], &found["over"]), (&3.into(), &"tcp".into()), "{found}");
    let sizes = found["sizes"].as_array().unwrap();
    assert_eq!(sizes.iter().map(|size| size["bytes"].as_u64().unwrap()).collect::<Vec<_>>(), [4096, 16384, 65536]);
    for size in sizes {
        let number = |name: &str| size[name].as_f64().unwrap();
        let speed = number("bytes") / number("ms") / 1e6;
        assert!((number("algorithm_gb_per_second") / speed - 1.0).abs() < 1e-9, "{size}");
        // nccl-tests: 2(n-1)/n.
        assert!((number("bus_gb_per_second") / speed - 4.0 / 3.0).abs() < 1e-9, "{size}");
    }
    assert!(
        place
            .ok("bench comm --device cpu --threads 1 --largest 65536 --calls 1")
            .out
            .contains("ranks: 1, on a host 1, over nothing")
    );
    place.refuses("bench comm --device cpu --smallest 4", &["--smallest = 4"]);
}
