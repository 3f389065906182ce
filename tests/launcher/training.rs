//! `mupscale train` under the launcher: ranks that are killed, and all stopped by a signal, and the command repeated.

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
    start(place, "--nproc-per-node 2 --max-restarts 3", &line("killed"))
}

fn start(place: &command::Place, options: &str, line: &str) -> Job {
    let mut launch = Command::new(env!("CARGO_BIN_EXE_mupscale-launch"));
    launch.arg("--standalone").args(options.split_whitespace()).arg(env!("CARGO_BIN_EXE_mupscale"));
    launch.args(line.split_whitespace()).current_dir(place.path()).env("CUDA_VISIBLE_DEVICES", "");
    launch.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    begin(launch)
}

/// Steps of the newest checkpoint, 0 if there is none.
fn newest(place: &command::Place) -> u64 {
    let names = fs::read_dir(place.join("killed/checkpoints")).into_iter().flatten();
    let steps = names.filter_map(|entry| entry.ok()?.file_name().to_str()?.strip_prefix("step-")?.parse().ok());
    steps.max().unwrap_or(0)
}

/// The processes that a launcher has started.
fn workers(job: &Job) -> Vec<String> {
    let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", job.id())).unwrap_or_default();
    children.split_whitespace().map(String::from).collect()
}

/// Waits for a checkpoint of at least this step. Returns its step.
fn wait_for_step(place: &command::Place, least: u64) -> u64 {
    let start = Instant::now();
    loop {
        let step = newest(place);
        if step >= least {
            return step;
        }
        assert!(start.elapsed() < Duration::from_secs(30), "no checkpoint of step {least}");
        sleep(Duration::from_millis(1));
    }
}

fn kill(process: &str) {
    assert!(Command::new("kill").args(["-s", "KILL", process]).status().unwrap().success());
}

#[test]
fn a_killed_rank_and_a_preemption_cost_nothing_but_time() {
    let place = command::Place::new();
    place.ok(&line("whole"));
    let job = launch(&place);
    let at = wait_for_step(&place, 20);
    kill(&workers(&job)[0]);
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

#[test]
fn kills_of_any_rank_at_any_moment_cost_nothing_but_time() {
    const RANKS: usize = 4;
    // `tools/test --long` asks for more.
    let asked: u64 = std::env::var("MUPSCALE_KILLS").map_or(10, |kills| kills.parse().expect("a number of kills"));
    let steps = 4 * asked + 60;
    // With every step saved a save is under way at every moment.
    let line = |run: &str, every: u64| {
        format!(
            "train -c run.toml --resume auto --set run={run} --set steps={steps} --set checkpoint.every={every} \
             --set batch.micro_batches=4 --set comm.timeout=20 --set validation.every=0"
        )
    };
    let place = command::Place::new();
    place.ok(&line("whole", 0));
    let options = format!("--nproc-per-node {RANKS} --max-restarts {asked} --monitor-interval 0.02");
    let job = start(&place, &options, &line("killed", 1));
    let mut old: Vec<String> = Vec::new();
    // Ranks, and milliseconds after a checkpoint appeared, from a fixed sequence.
    for (rank, pause) in (1..=asked as usize).map(|i| (i * 5 % 7 % RANKS, (i * 7919 % 41) as u64)) {
        let start = Instant::now();
        let now = loop {
            let now = workers(&job);
            if now.len() == RANKS && now.iter().all(|worker| !old.contains(worker)) {
                break now;
            }
            assert!(start.elapsed() < Duration::from_secs(30), "no new workers after {old:?}: {now:?}");
            sleep(Duration::from_millis(1));
        };
        wait_for_step(&place, newest(&place) + 1);
        sleep(Duration::from_millis(pause));
        assert!(newest(&place) < steps, "the run was over before its last kill");
        kill(&now[rank]);
        old = now;
    }
    job.end().expect(0, &["was killed by SIGKILL", &format!("restart {asked} of {asked}")]);
    assert!(essence(&place.join("killed"), steps) == essence(&place.join("whole"), steps), "it ended elsewhere");
    let hidden: Vec<_> = place.names("killed/checkpoints").into_iter().filter(|n| n.starts_with('.')).collect();
    assert!(hidden.is_empty(), "left behind: {hidden:?}");
}
