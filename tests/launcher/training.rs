//! `mupscale train` under the launcher: two ranks, one killed, then all stopped by a signal, and the command repeated.

use crate::{
    command::{self, essence},
    job::{Job, begin},
};
use std::{
    fs,
    process::{Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

const STEPS: u64 = 1000;

fn line(run: &str) -> String {
    format!(
        "train -c run.toml --resume auto --set run={run} --set steps={STEPS} --set checkpoint.every=20 \
         --set batch.micro_batches=2 --set comm.timeout=20"
    )
}

fn launch(place: &command::Place) -> Job {
    let mut launch = Command::new(env!("CARGO_BIN_EXE_mupscale-launch"));
    launch.args(["--standalone", "--nproc-per-node", "2", "--max-restarts", "3", env!("CARGO_BIN_EXE_mupscale")]);
    launch.args(line("killed").split_whitespace()).current_dir(place.path()).env("CUDA_VISIBLE_DEVICES", "");
    launch.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    begin(launch)
}

/// Waits for a checkpoint of at least this step. Returns its step.
fn wait_for_step(place: &command::Place, least: u64) -> u64 {
    let start = Instant::now();
    loop {
        let names = fs::read_dir(place.join("killed/checkpoints")).into_iter().flatten();
        let steps = names.filter_map(|entry| entry.ok()?.file_name().to_str()?.strip_prefix("step-")?.parse().ok());
        if let Some(step) = steps.max().filter(|step| *step >= least) {
            return step;
        }
        assert!(start.elapsed() < Duration::from_secs(30), "no checkpoint of step {least}");
        sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_killed_rank_and_a_preemption_cost_nothing_but_time() {
    let place = command::Place::new();
    place.ok(&line("whole"));
    let job = launch(&place);
    let at = wait_for_step(&place, 20);
    let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", job.id())).unwrap();
    let worker = children.split_whitespace().next().expect("a worker");
    assert!(Command::new("kill").args(["-s", "KILL", worker]).status().unwrap().success());
    wait_for_step(&place, at + 40);
    job.signal("USR1");
    let said = job.end();
    said.expect(
        75,
        &["was killed by SIGKILL", "restart 1 of 3", "SIGUSR1: passed on", "stopped by a signal after step"],
    );
    assert!(!place.join(&format!("killed/checkpoints/step-{STEPS:08}")).exists(), "it was over before the signal");
    launch(&place).end().expect(0, &[]);
    assert!(essence(&place.join("killed"), STEPS) == essence(&place.join("whole"), STEPS), "it ended elsewhere");
    // Complete: nothing is left to be done, on any rank.
    launch(&place).end().expect(0, &["2 processes"]);
}
