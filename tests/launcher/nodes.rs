//! Several nodes: launchers that meet on 127.0.0.1.

use crate::job::{Job, Place, free_port, gone};
use std::{
    thread::sleep,
    time::{Duration, Instant},
};

/// Quick to notice a loss.
const QUICK: &str = "--grace 5 --monitor-interval 0.05 --rdzv-conf \
                     join_timeout=20,last_call_timeout=0.3,keep_alive_interval=0.5,keep_alive_max_attempt=3";

fn numbered(rank: usize, port: u16) -> String {
    format!("--nnodes 2 --node-rank {rank} --master-addr 127.0.0.1 --master-port {port} --rdzv-id job {QUICK}")
}

/// Says where it is, and goes on until a file says otherwise.
const WORKER: &str = "trap 'exit 75' TERM; echo $$ > at.$WORLD_SIZE.$RANK.$TORCHELASTIC_RESTART_COUNT; \
                      while [ ! -e finish ]; do sleep 0.02; done";

#[test]
fn numbered_nodes_share_out_the_ranks() {
    let (place, port) = (Place::new(), free_port());
    let script = "echo $RANK $WORLD_SIZE $LOCAL_RANK $LOCAL_WORLD_SIZE $GROUP_RANK $MASTER_ADDR";
    // The second one is there first, and has fewer processes.
    let second = place.start(&format!("{} --nproc-per-node 1", numbered(1, port)), script);
    sleep(Duration::from_millis(200));
    let first = place.start(&format!("{} --nproc-per-node 2", numbered(0, port)), script);
    let [first, second] = [first, second].map(Job::end);
    assert_eq!((first.code, second.code), (0, 0), "{}{}", first.err, second.err);
    assert_eq!(first.lines(), ["[rank 0] 0 3 0 2 0 127.0.0.1", "[rank 1] 1 3 1 2 0 127.0.0.1"]);
    assert_eq!(second.lines(), ["[rank 2] 2 3 0 1 1 127.0.0.1"]);
}

#[test]
fn a_failure_on_one_node_ends_all_with_its_code() {
    let (place, port) = (Place::new(), free_port());
    let script = "[ $RANK = 1 ] && echo it broke && exit 6; sleep 30";
    let jobs = [0, 1].map(|rank| place.start(&numbered(rank, port), script));
    for said in jobs.map(Job::end) {
        said.expect(6, &["rank 1 (local rank 0", "exit code 6", "    it broke"]);
    }
}

#[test]
fn a_lost_node_is_replaced() {
    let (place, port) = (Place::new(), free_port());
    let first = place.start(&format!("{} --max-restarts 1", numbered(0, port)), WORKER);
    let second = place.start(&numbered(1, port), WORKER);
    place.wait_for(&["at.2.0.0", "at.2.1.0"]);
    drop(second);
    gone(&place.read("at.2.1.0"));
    let third = place.start(&numbered(1, port), WORKER);
    place.wait_for(&["at.2.0.1", "at.2.1.1"]);
    place.write("finish", "");
    first.end().expect(0, &["is lost", "restart 1 of 1"]);
    third.end().expect(0, &[]);
}

#[test]
fn the_host_of_the_store_stays_until_all_know_how_the_run_ended() {
    let (place, port) = (Place::new(), free_port());
    let script = "echo x > up.$RANK; [ $RANK = 1 ] && sleep 30; while [ ! -e fail ]; do sleep 0.02; done; exit 6";
    // A launcher that stalls for a moment is not lost.
    let options = |rank| numbered(rank, port).replace("keep_alive_interval=0.5", "keep_alive_interval=5");
    let [first, second] = [0, 1].map(|rank| place.start(&options(rank), script));
    place.wait_for(&["up.0", "up.1"]);
    second.signal("STOP");
    place.write("fail", "");
    // By now the end is decided, and has been read where the store is.
    sleep(Duration::from_millis(2500));
    second.signal("CONT");
    for said in [first, second].map(Job::end) {
        said.expect(6, &["rank 0 (local rank 0", "exit code 6"]);
    }
}

#[test]
fn nodes_come_and_go_between_min_and_max() {
    let (place, port) = (Place::new(), free_port());
    let options = format!("--nnodes 1:2 --rdzv-endpoint 127.0.0.1:{port} --rdzv-id job {QUICK}");
    // Rounds of one world size differ by their token.
    let worker = format!("echo x > \"$(basename $MUPSCALE_STORE_TOKEN).$WORLD_SIZE.$RANK\"; {WORKER}");
    let first = place.start(&options, &worker);
    place.wait_for(&["1.1.0"]);
    let second = place.start(&options, &worker);
    place.wait_for(&["2.2.0", "2.2.1"]);
    // A third one has no place, until another is gone.
    let third = place.start(&options, &worker);
    drop(second);
    place.wait_for(&["3.2.0", "3.2.1"]);
    // One that is told to leave stops all, so that they save together; the others go on without it.
    third.signal("TERM");
    third.end().expect(75, &["SIGTERM: passed on"]);
    place.wait_for(&["4.1.0"]);
    place.write("finish", "");
    first.end().expect(0, &["joins", "is lost", "was told to leave"]);
}

#[test]
fn a_signal_to_one_node_stops_all() {
    let (place, port) = (Place::new(), free_port());
    let jobs = [0, 1].map(|rank| place.start(&format!("{} --max-restarts 3", numbered(rank, port)), WORKER));
    place.wait_for(&["at.2.0.0", "at.2.1.0"]);
    jobs[1].signal("TERM");
    let [first, second] = jobs.map(Job::end);
    first.expect(75, &["sent to node", "stopped by SIGTERM"]);
    second.expect(75, &["stopped by SIGTERM"]);
}

#[test]
fn losing_the_host_of_the_store_ends_the_run() {
    let (place, port) = (Place::new(), free_port());
    let [first, second] = [0, 1].map(|rank| place.start(&format!("{} --max-restarts 3", numbered(rank, port)), WORKER));
    place.wait_for(&["at.2.0.0", "at.2.1.0"]);
    let start = Instant::now();
    drop(first);
    second.end().expect(3, &["the run ends", "is lost", &port.to_string()]);
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    gone(&place.read("at.2.1.0"));
}

#[test]
fn who_does_not_belong_is_told_so() {
    let (place, port) = (Place::new(), free_port());
    let first = place.start(&numbered(0, port), WORKER);
    // A run of another name, and a node that is there already.
    sleep(Duration::from_millis(300));
    let other = numbered(1, port).replace("--rdzv-id job", "--rdzv-id yesterday");
    place.run(&other, "true").expect(2, &["yesterday", "stale rendezvous id", "job"]);
    let twin = place.start(&numbered(0, port), "true");
    twin.end().expect(2, &["the port is in use"]);
    let second = place.start(&numbered(1, port), WORKER);
    place.wait_for(&["at.2.0.0", "at.2.1.0"]);
    place.run(&numbered(1, port), "echo x > started").expect(2, &["--node-rank 1 was given to"]);
    assert!(!place.has("started"));
    place.write("finish", "");
    [first, second].map(Job::end).iter().for_each(|said| said.expect(0, &[]));
}

#[test]
fn a_missing_node_is_waited_for_in_vain() {
    let (place, port) = (Place::new(), free_port());
    let options = numbered(0, port).replace("join_timeout=20", "join_timeout=0.5");
    place.run(&options, "echo x > started").expect(3, &["1 of 2 nodes came", "join_timeout"]);
    let options = numbered(1, port).replace("join_timeout=20", "join_timeout=0.5");
    place.run(&options, "echo x > started").expect(3, &[&port.to_string(), "no store answers"]);
    let options = options.replace("127.0.0.1", "no-such-host.invalid");
    place.run(&options, "echo x > started").expect(3, &["no-such-host.invalid", "does not resolve"]);
    assert!(!place.has("started"));
}
