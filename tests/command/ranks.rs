//! Ranks of a run as processes of this machine, connected over 127.0.0.1.

use super::{Place, Said};
use std::{
    net::TcpListener,
    process::{Child, Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

/// Nothing here takes longer, however slow the machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// A port that was free just now.
pub fn port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// A command as torchrun starts it as one of `world` ranks.
pub fn as_rank(mut command: Command, rank: usize, world: usize, port: u16) -> Command {
    for (name, value) in [("RANK", rank), ("WORLD_SIZE", world), ("LOCAL_RANK", rank), ("LOCAL_WORLD_SIZE", world)] {
        command.env(name, value.to_string());
    }
    command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", port.to_string());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Starts a command for each of `world` ranks.
pub fn start_ranks(world: usize, command: impl Fn(usize) -> Command) -> Vec<Child> {
    let port = port();
    (0..world).map(|r| as_rank(command(r), r, world, port).spawn().unwrap()).collect()
}

/// Waits for a process, for a bounded time.
pub fn end(mut child: Child) -> Said {
    let start = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if start.elapsed() > PATIENCE {
            child.kill().unwrap();
            panic!("a rank does not end: {:?}", child.wait_with_output().unwrap());
        }
        sleep(Duration::from_millis(5));
    }
    Said::new(child.wait_with_output().unwrap())
}

/// Losses of a run, of steps and validations, as logged.
pub fn losses(place: &Place, run: &str) -> Vec<f64> {
    let text = String::from_utf8(place.read(&format!("{run}/metrics.jsonl"))).unwrap();
    let loss = |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap()["loss"].as_f64().unwrap();
    text.lines().map(loss).collect()
}

/// Waits until a run has logged something.
pub fn wait_for_a_step(place: &Place, run: &str) {
    let metrics = place.join(run).join("metrics.jsonl");
    let start = Instant::now();
    while !std::fs::metadata(&metrics).is_ok_and(|m| m.len() > 0) {
        assert!(start.elapsed() < PATIENCE, "no step was made");
        sleep(Duration::from_millis(2));
    }
}
