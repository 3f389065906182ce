//! `mupscale train` under the launcher.

use crate::{
    command::{self, essence},
    job::begin,
};
use std::{
    process::{Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

const STEPS: u64 = 120;

#[test]
fn a_killed_rank_costs_nothing_but_time() {
    let place = command::Place::new();
    let line = |run: &str| {
        format!("train -c run.toml --resume auto --set run={run} --set steps={STEPS} --set checkpoint.every=5")
    };
    place.ok(&line("whole"));
    let mut launch = Command::new(env!("CARGO_BIN_EXE_mupscale-launch"));
    launch.args(["--standalone", "--max-restarts", "3", env!("CARGO_BIN_EXE_mupscale")]);
    launch.args(line("killed").split_whitespace()).current_dir(place.path()).stdin(Stdio::null());
    launch.stdout(Stdio::piped()).stderr(Stdio::piped());
    let job = begin(launch);
    // From outside, once a checkpoint is there.
    let start = Instant::now();
    let checkpoint = place.join("killed/checkpoints/step-00000005");
    while !checkpoint.exists() {
        assert!(start.elapsed() < Duration::from_secs(30), "no checkpoint");
        sleep(Duration::from_millis(1));
    }
    let children = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", job.id())).unwrap();
    let worker = children.split_whitespace().next().expect("a worker");
    assert!(Command::new("kill").args(["-s", "KILL", worker]).status().unwrap().success());
    let said = job.end();
    said.expect(0, &["rank 0", "SIGKILL", "restart 1 of 3"]);
    assert!(essence(&place.join("killed"), STEPS) == essence(&place.join("whole"), STEPS), "{}", said.err);
}
