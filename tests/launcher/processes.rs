//! One node: failures, restarts, signals, the grace period, binding.

use crate::job::{Place, gone};
use std::{
    collections::BTreeSet,
    thread::{available_parallelism, sleep},
    time::{Duration, Instant},
};

#[test]
fn the_first_failure_is_the_cause() {
    let place = Place::new();
    // Rank 0 fails too, because it is told to end; its many lines are not the cause's.
    let script = "if [ $RANK = 1 ]; then sleep 0.3; seq 1 50; echo the cause >&2; exit 7; fi; \
                  trap 'echo a consequence; exit 5' TERM; while :; do sleep 0.05; done";
    let said = place.run("--nproc-per-node 3", script);
    said.expect(7, &["rank 1 (local rank 1, process ", "exit code 7; its last lines:"]);
    let kept: Vec<_> = said.err.lines().filter_map(|line| line.strip_prefix("mupscale-launch:     ")).collect();
    // Many lines on one stream do not hide the other's.
    let expected: Vec<_> = (31..=50).map(|i| i.to_string()).chain(["the cause".into()]).collect();
    assert_eq!(kept, expected);

    let said = place.run("--nproc-per-node 2", "[ $RANK = 0 ] && kill -KILL $$; sleep 30");
    said.expect(137, &["rank 0", "SIGKILL", "memory"]);
    // A rank that only lost another one, with the code that says so, is no cause, even if it is seen to end first.
    let script = "[ $RANK = 0 ] && exit 3; sleep 0.05; exit 8";
    place.run("--nproc-per-node 2", script).expect(8, &["the run ends: rank 1"]);
    place.run("", "kill -SEGV $$").expect(139, &["SIGSEGV"]);
}

#[test]
fn all_processes_start_again_until_it_works() {
    let place = Place::new();
    let script = "echo $RANK $TORCHELASTIC_RESTART_COUNT $MUPSCALE_STORE_TOKEN; \
                  [ $RANK = 1 ] && [ $TORCHELASTIC_RESTART_COUNT -lt 2 ] && exit 9; \
                  [ $TORCHELASTIC_RESTART_COUNT = 2 ] || sleep 30";
    let said = place.run("--nproc-per-node 2 --max-restarts 5 --rdzv-id r --log-dir logs", script);
    said.expect(0, &["exit code 9; restart 1 of 5", "restart 2 of 5"]);
    let all = (0..3).flat_map(|n| (0..2).map(move |rank| format!("[rank {rank}] {rank} {n} r/{}", n + 1)));
    assert_eq!(
        said.lines().into_iter().collect::<BTreeSet<_>>(),
        all.collect::<Vec<_>>().iter().map(|s| &**s).collect()
    );
    assert_eq!(place.read("logs/r/attempt_2/1/stdout.log"), "1 2 r/3\n");
    place.run("--max-restarts 2", "exit 4").expect(4, &["exit code 4, after 2 restarts"]);
}

/// Waits for signals and writes down which came.
const LISTENER: &str = "for s in USR1 USR2; do trap \"echo x > $s.$RANK\" $s; done; \
                        for s in TERM INT HUP; do trap \"echo x > $s.$RANK; exit 75\" $s; done; \
                        echo x > up.$RANK; while :; do sleep 0.02; done";

#[test]
fn signals_reach_every_process() {
    for last in ["TERM", "INT", "HUP"] {
        let place = Place::new();
        let job = place.start("--nproc-per-node 3 --max-restarts 3", LISTENER);
        for signal in ["up", "USR1", "USR2"] {
            if signal != "up" {
                job.signal(signal);
            }
            place.wait_for(&["0", "1", "2"].map(|rank| format!("{signal}.{rank}")).each_ref().map(String::as_str));
        }
        job.signal(last);
        // 75: stopped because it was asked to. It is not started again.
        let said = job.end();
        said.expect(75, &["SIGUSR1: passed on", &format!("SIG{last}: passed on"), &format!("stopped by SIG{last}")]);
        assert!((0..3).all(|rank| place.has(&format!("{last}.{rank}"))), "{}", said.err);
    }
    // Also where nobody but a process was told.
    Place::new().run("--nproc-per-node 2 --max-restarts 3", "exit 75").expect(75, &["exit code 75"]);
}

#[test]
fn who_does_not_end_in_time_is_killed_with_all_it_started() {
    let place = Place::new();
    let script =
        "trap '' TERM; sleep 60 & echo $! > child.$RANK; echo $$ > parent.$RANK; wait; while :; do sleep 1; done";
    let job = place.start("--nproc-per-node 2 --grace 0.5", script);
    place.wait_for(&["parent.0", "parent.1"]);
    let start = Instant::now();
    job.signal("TERM");
    job.end().expect(137, &["0.5 s", "killed (--grace)"]);
    assert!((500..10_000).contains(&start.elapsed().as_millis()), "{:?}", start.elapsed());
    for name in ["child.0", "child.1", "parent.0", "parent.1"] {
        gone(&place.read(name));
    }
}

#[test]
fn what_a_shell_started_has_its_time_too() {
    let place = Place::new();
    // The shell dies of the signal at once; the program that it started saves its work.
    let inner = "trap 'sleep 0.5; echo x > saved; exit 75' TERM; echo x > up; while :; do sleep 0.02; done";
    place.write("inner.sh", inner);
    let job = place.start("", "sh inner.sh; echo never");
    place.wait_for(&["up"]);
    job.signal("TERM");
    assert_eq!(job.end().code, 143);
    assert!(place.has("saved"), "it was killed before its time");
}

#[test]
fn a_launcher_that_is_killed_leaves_nothing_behind() {
    let place = Place::new();
    let job = place.start("--nproc-per-node 2", "echo $$ > pid.$RANK; exec sleep 60");
    place.wait_for(&["pid.0", "pid.1"]);
    sleep(Duration::from_millis(50));
    let pids = [place.read("pid.0"), place.read("pid.1")];
    drop(job);
    pids.iter().for_each(|pid| gone(pid));
}

#[test]
fn processes_are_bound_to_their_cores() {
    let place = Place::new();
    let script = "sed -n 's/Cpus_allowed_list:[^0-9]*//p' /proc/self/status";
    let processors = available_parallelism().unwrap().get();
    let said = place.run("--nproc-per-node 2 --bind cores", script);
    let shares: BTreeSet<_> = said.out.lines().map(|line| line.split("] ").nth(1).unwrap()).collect();
    match said.code {
        0 => assert_eq!(shares.len(), 2, "{shares:?}"),
        // One core, perhaps with two threads.
        _ => assert!(processors <= 2 && said.err.contains("--bind"), "{}", said.err),
    }
    let said = place.run("--nproc-per-node 2 --bind numa", script);
    assert_eq!((said.code, said.out.lines().count()), (0, 2), "{}", said.err);
    place.run("--nproc-per-node 4000 --bind cores", "true").expect(2, &["4000 processes", "--bind none"]);
}
