//! Signals: SIGTERM, SIGINT and SIGUSR1 end a run after the step, with a checkpoint; no kill, at whatever moment, costs more than
//! the steps since the last one. What is resumed ends in the bytes of a run that was never disturbed.

mod command;

use command::{Place, essence};
use std::{
    process::{Child, Command},
    thread::sleep,
    time::{Duration, Instant},
};

/// Sends a signal.
fn signal(child: &Child, name: &str) {
    let sent = Command::new("kill").args(["-s", name, &child.id().to_string()]).status().unwrap();
    assert!(sent.success());
}

/// Waits until a run has logged a step.
fn wait_for_a_step(place: &Place, run: &str) {
    let metrics = place.join(run).join("metrics.jsonl");
    let start = Instant::now();
    while !std::fs::metadata(&metrics).is_ok_and(|m| m.len() > 0) {
        assert!(start.elapsed() < Duration::from_secs(60), "no step was made");
        sleep(Duration::from_millis(2));
    }
}

/// Steps of the newest checkpoint of a run, 0 if it has none.
fn newest(place: &Place, run: &str) -> u64 {
    let names = place.join(run).join("checkpoints");
    let names =
        std::fs::read_dir(names).into_iter().flatten().flatten().filter_map(|e| e.file_name().into_string().ok());
    names.filter_map(|name| name.strip_prefix("step-")?.parse().ok()).max().unwrap_or(0)
}

/// A run long enough to be hit in its midst, at any speed of the machine: it is resumed with as many steps as it has.
const STEPS: u64 = 3000;

fn train(run: &str) -> String {
    format!("train -c run.toml --set run={run} --set steps={STEPS} --set checkpoint.every=0 --set validation.every=500")
}

#[test]
fn a_signal_saves_and_resume_ends_in_the_same_bytes() {
    let place = Place::new();
    place.ok(&train("whole"));
    let whole = essence(&place.join("whole"), STEPS);
    assert!(whole.3.len() as u64 > STEPS, "every step and the validations are logged");
    for name in ["TERM", "INT", "USR1"] {
        let child = place.command(&train(name)).spawn().unwrap();
        wait_for_a_step(&place, name);
        signal(&child, name);
        let output = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(75), "{name}: {said}");
        let step = newest(&place, name);
        assert!((1..STEPS).contains(&step), "{name}: stopped at step {step}");
        for part in ["stopped by a signal", &format!("step {step}"), &format!("mupscale resume {name}")] {
            assert!(said.contains(part), "{name}: no `{part}` in {said}");
        }
        place.ok(&format!("resume {name}"));
        assert!(essence(&place.join(name), STEPS) == whole, "{name}: the resumed run ended elsewhere");
    }
}

#[test]
fn a_second_interrupt_ends_at_once() {
    let place = Place::new();
    // Saving a large model takes longer than sending a second signal: the first one is never answered in between.
    let line = "train -c run.toml --set run=r --set steps=1000000 --set model.layers=12 --set model.residual=256";
    let mut child = place.command(line).spawn().unwrap();
    wait_for_a_step(&place, "r");
    let start = Instant::now();
    signal(&child, "INT");
    signal(&child, "INT");
    assert_eq!(child.wait().unwrap().code(), Some(130), "after {:?}", start.elapsed());
    // What the save left behind does not hinder a new run.
    let said = place.run("train -c run.toml --set run=r --set steps=1 --force");
    assert_eq!(said.code, 0, "{}", said.err);
}

#[test]
fn kills_at_any_moment_cost_nothing_but_time() {
    // `tools/test --long` asks for more.
    let asked: u64 = std::env::var("MUPSCALE_KILLS").map_or(10, |kills| kills.parse().expect("a number of kills"));
    let steps = 30 * asked;
    let line = |run: &str| format!("train -c run.toml --set run={run} --set steps={steps} --set checkpoint.every=1");
    let place = Place::new();
    place.ok(&line("whole"));
    let whole = essence(&place.join("whole"), steps);
    // Times between kills from a fixed sequence, 30 to 150 ms: some saves lie in every one of them.
    let pauses = (1..=asked).map(|i| 30 + i * 7919 % 121);
    let (mut kills, mut next, mut before) = (0, line("killed"), 0);
    for pause in pauses {
        let mut child = place.command(&next).spawn().unwrap();
        let start = Instant::now();
        // Some progress first, on however slow a machine.
        while newest(&place, "killed") <= before && child.try_wait().unwrap().is_none() {
            assert!(start.elapsed() < Duration::from_secs(60), "no checkpoint appeared");
            sleep(Duration::from_millis(1));
        }
        sleep(Duration::from_millis(pause / 3));
        child.kill().unwrap();
        let status = child.wait().unwrap();
        if status.success() {
            break;
        }
        assert_eq!(status.code(), None, "it was not the kill that ended it");
        kills += 1;
        before = newest(&place, "killed");
        next = "resume killed".into();
    }
    assert!(kills >= asked / 2, "the run was over after {kills} kills");
    if newest(&place, "killed") < steps {
        place.ok("resume killed");
    }
    assert!(essence(&place.join("killed"), steps) == whole, "after {kills} kills the run ended elsewhere");
    let hidden: Vec<_> = place.names("killed/checkpoints").into_iter().filter(|n| n.starts_with('.')).collect();
    assert!(hidden.is_empty(), "left behind: {hidden:?}");
}
