//! A save goes on behind training, is waited for where it must be, and fails on all ranks together.

use super::*;
use crate::{
    backend::cpu::Cpu,
    comm::{Solo, threads::Threads},
};
use std::sync::mpsc::{self, Receiver};

type Device = Cpu<f32>;

/// A rank whose save is at the stage that `job` makes.
fn saver(stage: Stage<Device>) -> Saver<Device> {
    let under_way = UnderWay { step: 7, begun: Instant::now(), pause: Duration::ZERO, stage };
    Saver {
        store: Store::new("nowhere"),
        keep: (usize::MAX, None),
        parts: Arc::new([]),
        memory: Memory::None(None),
        under_way: Some(under_way),
        cancelled: Arc::default(),
    }
}

fn written() -> Written<Device> {
    Written { writer: None, report: Vec::new(), host: None }
}

/// A thread that writes until it is told to end.
fn writing<T: Send + 'static>(until: Receiver<()>, result: impl FnOnce() -> Result<T> + Send + 'static) -> Job<T> {
    Job::spawn(move || {
        until.recv().unwrap();
        result()
    })
}

/// Lets ranks, as threads, do the same, each with its number.
fn ranks<T: Send>(work: impl Fn(usize, &dyn Comm<Device>) -> T + Sync) -> Vec<T> {
    thread::scope(|scope| {
        let work = &work;
        let start = |(rank, comm): (usize, Threads)| scope.spawn(move || work(rank, &comm));
        let ranks: Vec<_> = Threads::group(2).into_iter().enumerate().map(start).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

#[test]
fn training_goes_on_until_all_has_been_written() {
    let (release, until) = mpsc::channel();
    let mut saver = saver(Stage::Publishing(writing(until, || Ok(()))));
    for stop in [false, true, false] {
        let (stops, saved) = saver.meet(&Solo, stop).unwrap();
        assert!(stops == stop && saved.is_none());
    }
    release.send(()).unwrap();
    let saved = saver.finish(&Solo).unwrap().expect("the save that was under way");
    assert_eq!(saved.step, 7);
    assert!(saver.finish(&Solo).unwrap().is_none(), "there is nothing to wait for");
    assert!(saver.meet(&Solo, false).unwrap().1.is_none());
}

#[test]
fn a_stage_ends_when_the_last_rank_has_done_its_part() {
    let (release, until) = mpsc::channel();
    let until = std::sync::Mutex::new(Some(until));
    let turns = ranks(|rank, comm| {
        let job = match rank {
            0 => Job::Ended(Ok(written())),
            _ => writing(until.lock().unwrap().take().unwrap(), || Ok(written())),
        };
        let mut saver = saver(Stage::Writing(job));
        for turn in 0..5 {
            // Rank 0 wants to stop: all learn of it, and no stage is over.
            let (stop, saved) = saver.meet(comm, rank == 0 && turn == 2).unwrap();
            assert!(stop == (turn == 2) && saved.is_none());
            assert!(matches!(saver.under_way.as_ref().unwrap().stage, Stage::Writing(_)));
        }
        if rank == 1 {
            release.send(()).unwrap();
        }
        saver.finish(comm).unwrap().expect("both are done").step
    });
    assert_eq!(turns, [7, 7]);
}

#[test]
fn a_failure_ends_all_ranks_at_once_and_one_says_why() {
    for failing in [0, 1] {
        let errors = ranks(|rank, comm| {
            let full = || Err(Error::file("model.safetensors", "the disk is full"));
            // The other one's thread writes on for as long as it is not told to give up.
            let cancelled: Arc<AtomicBool> = Arc::default();
            let told = cancelled.clone();
            let slow = move || {
                while !told.load(Ordering::Relaxed) {
                    thread::sleep(Duration::from_millis(1));
                }
                Err(Error::Fault("the save was given up".into()))
            };
            let job = if rank == failing { Job::Ended(full()) } else { Job::spawn(slow) };
            let mut saver = saver(Stage::Writing(job));
            saver.cancelled = cancelled;
            saver.meet(comm, false).err().expect("the failure").to_string()
        });
        assert_eq!(errors[failing], "model.safetensors: the disk is full");
        assert_eq!(errors[1 - failing], "another rank says why");
    }
}

#[test]
fn a_thread_that_panics_is_an_error() {
    let mut saver = saver(Stage::Publishing(Job::spawn(|| panic!("on purpose"))));
    let error = saver.finish(&Solo).err().expect("a failure").to_string();
    assert!(error.contains("an error of ours"), "{error}");
}
