//! Two hosts in network namespaces of this machine, joined by a cable that is cut: no connection is closed, no word
//! comes any more. Where the system makes no namespaces (`unshare -rn`), the tests say so and pass;
//! `MUPSCALE_REQUIRE_NAMESPACES=1` makes that a failure.

use crate::{
    command::{self, ranks::wait_for_a_step},
    job::{Job, Place, begin, gone},
};
use std::{
    path::Path,
    process::{Child, Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

/// The hosts' addresses, on a network of their own.
const ADDRESSES: [&str; 2] = ["10.77.0.1", "10.77.0.2"];

/// Makes the first host, and the second one within it, each with its end of the cable and its name; then waits.
const HOSTS: &str = r#"
set -e
ip link set lo up
ip link add name first type veth peer name second
unshare -nu sh -c 'hostname host-two; echo $$ > second.pid; exec sleep 120' &
while [ ! -s second.pid ]; do sleep 0.01; done
two=$(cat second.pid)
ip link set second netns "$two"
ip addr add 10.77.0.1/24 dev first
ip link set first up
nsenter -t "$two" -n sh -ec 'ip link set lo up; ip addr add 10.77.0.2/24 dev second; ip link set second up'
hostname host-one
echo $$ > first.pid
exec sleep 120
"#;

struct Hosts {
    first: Child,
    pids: [String; 2],
}

impl Hosts {
    /// None, with a word, where there can be none.
    fn new(folder: &Path) -> Option<Self> {
        let mut command = Command::new("unshare");
        command.args(["-rnu", "sh", "-c", HOSTS]).current_dir(folder).stderr(Stdio::piped());
        let refused = |why: String| {
            eprintln!("skipped: no network namespaces can be made here: {why}");
            assert!(std::env::var_os("MUPSCALE_REQUIRE_NAMESPACES").is_none(), "{why}");
            None
        };
        let mut first = match command.spawn() {
            Ok(first) => first,
            Err(error) => return refused(format!("unshare: {error}")),
        };
        let read = |name: &str| std::fs::read_to_string(folder.join(name)).unwrap_or_default().trim().to_string();
        while read("first.pid").is_empty() {
            if first.try_wait().unwrap().is_some() {
                end(&read("second.pid"));
                let said = first.wait_with_output().unwrap();
                return refused(String::from_utf8_lossy(&said.stderr).into_owned());
            }
            sleep(Duration::from_millis(5));
        }
        Some(Self { first, pids: [read("first.pid"), read("second.pid")] })
    }

    /// A command on one of the hosts.
    fn on(&self, host: usize, command: &Command) -> Command {
        let mut there = Command::new("nsenter");
        there.args(["-t", &self.pids[host], "-U", "-n", "-u", "--preserve-credentials", "--"]);
        there.arg(command.get_program()).args(command.get_args());
        there.current_dir(command.get_current_dir().unwrap()).stdin(Stdio::null());
        there.stdout(Stdio::piped()).stderr(Stdio::piped());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => there.env(name, value),
                None => there.env_remove(name),
            };
        }
        there
    }

    /// Cuts the cable.
    fn cut(&self) {
        let mut ip = Command::new("ip");
        ip.args(["link", "set", "first", "down"]).current_dir("/");
        assert!(self.on(0, &ip).status().unwrap().success());
    }
}

fn end(pid: &str) {
    if !pid.is_empty() {
        let _ = Command::new("kill").args(["-s", "KILL", pid]).status();
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        end(&self.pids[1]);
        let _ = self.first.kill();
        let _ = self.first.wait();
    }
}

const WORKER: &str = "trap 'exit 75' TERM; echo $$ > at.$RANK; while :; do sleep 0.02; done";

#[test]
fn a_host_that_is_cut_off_is_named_by_the_launchers() {
    let place = Place::new();
    let Some(hosts) = Hosts::new(place.path()) else { return };
    let launch = |rank: usize| -> Job {
        let conf = "join_timeout=20,keep_alive_interval=0.5,keep_alive_max_attempt=3";
        let options = format!(
            "--nnodes 2 --node-rank {rank} --master-addr {} --master-port 29400 --rdzv-id job --grace 2 \
             --monitor-interval 0.05 --rdzv-conf {conf}",
            ADDRESSES[0]
        );
        begin(hosts.on(rank, &place.command(&options, WORKER)))
    };
    let [one, two] = [0, 1].map(launch);
    place.wait_for(&["at.0", "at.1"]);
    hosts.cut();
    let start = Instant::now();
    one.end().expect(3, &["host-two", ADDRESSES[1], "is lost"]);
    // A lease of 1.5 s, and the grace.
    assert!(start.elapsed() < Duration::from_secs(8), "{:?}", start.elapsed());
    // The other one has lost the store.
    two.end().expect(3, &["the run ends", ADDRESSES[0], "is lost"]);
    ["at.0", "at.1"].iter().for_each(|name| gone(&place.read(name)));
}

#[test]
fn ranks_whose_network_stalls_name_each_other() {
    let place = command::Place::new();
    let Some(hosts) = Hosts::new(place.path()) else { return };
    let line = "train -c run.toml --set run=r --set steps=1000000 --set checkpoint.every=0 --set batch.micro_batches=2 \
                --set comm.timeout=2";
    let start = |rank: usize| -> Job {
        let mut command = place.command(line);
        for (name, value) in [("RANK", rank), ("WORLD_SIZE", 2), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)] {
            command.env(name, value.to_string());
        }
        begin(hosts.on(rank, command.env("MASTER_ADDR", ADDRESSES[0]).env("MASTER_PORT", "29500")))
    };
    let ranks = [0, 1].map(start);
    wait_for_a_step(&place, "r");
    hosts.cut();
    let start = Instant::now();
    for (rank, said) in ranks.map(Job::end).into_iter().enumerate() {
        said.expect(3, &[&format!("rank {} is lost: nothing was heard of it for 2 s", 1 - rank)]);
    }
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
}
