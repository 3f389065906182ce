//! Saving behind training. A step pauses while the state is copied to host memory; a thread writes the copy to the disk
//! as training goes on. Where there is no room for a copy, the step waits until all is written.
//!
//! Every rank writes the part of the checkpoint that it owns, into files that rank 0 has made. A save has two stages,
//! each of which ends once all ranks have said so in what they exchange after every step anyway: all parts are written;
//! rank 0 has given the checkpoint its name. So no rank waits for another one's disk, and whatever dies in between,
//! there is no checkpoint.

#[cfg(test)]
mod tests;

use super::ranks::agree;
use crate::{
    Error, Result,
    backend::{Backend, HostBuffer},
    checkpoint::{Store, Writer},
    comm::{Comm, environment::World},
    config::{Background, Config},
    machine::{self, size},
    model::param::Table,
    ops::Ops,
    state::{Meaning, Part, snapshot_bytes},
    trace::{self, Lane},
    trainer::Trainer,
};
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

/// Bytes that are written before a thread looks whether it is to stop.
const BLOCK: usize = 8 << 20;
/// Longest pause between looks at a save that is waited for.
const PAUSE: Duration = Duration::from_millis(5);

/// What ranks tell each other after a step, in one byte.
const STOP: u8 = 1;
const ENDED: u8 = 2;
const FAILED: u8 = 4;

/// Host memory that a rank may take: what is free, shared among the ranks of the host.
pub fn host_memory(world: &World) -> usize {
    // The rest is for the page cache, which files are written through.
    machine::available_memory().map_or(usize::MAX, |free| free / 5 * 4 / world.local_world.max(1))
}

/// A run's saves, as one of its ranks sees them.
pub struct Saver<B: Backend> {
    store: Store,
    keep: (usize, Option<u64>),
    parts: Arc<[Part]>,
    memory: Memory<B>,
    under_way: Option<UnderWay<B>>,
    cancelled: Arc<AtomicBool>,
}

/// Where a copy of the state goes.
enum Memory<B: Backend> {
    /// Here, unless a thread has it.
    Own(Option<B::Host>),
    /// No copy is made, and why if that is worth a word.
    None(Option<String>),
}

struct UnderWay<B: Backend> {
    step: u64,
    begun: Instant,
    pause: Duration,
    stage: Stage<B>,
}

enum Stage<B: Backend> {
    /// This rank's part goes to the disk.
    Writing(Job<Written<B>>),
    /// Rank 0 makes the checkpoint visible.
    Publishing(Job<()>),
}

/// What is left of a part that was written: for rank 0 the checkpoint, for others their reports.
struct Written<B: Backend> {
    writer: Option<Writer>,
    report: Vec<u8>,
    host: Option<B::Host>,
}

/// A checkpoint that is complete.
pub struct Saved {
    /// After which step.
    pub step: u64,
    /// How long training waited for this rank's copy, or for the whole where none is made.
    pub pause: Duration,
    /// From the first byte to the last, on all ranks.
    pub whole: Duration,
}

impl<B: Ops> Saver<B> {
    /// `free`: bytes of host memory that this rank might have taken before it took any.
    ///
    /// # Errors
    /// Memory is refused; ranks do not see the same run folder.
    pub fn new(trainer: &Trainer<B>, config: &Config, meaning: &Meaning, free: usize) -> Result<Self> {
        let (comm, table) = (&*trainer.comm, trainer.network.table());
        let parts: Arc<[Part]> = trainer.state.parts(table, Some(&meaning.optimizer), trainer.saves()).into();
        let store = Store::new(&config.run);
        agree(comm, shared(comm, &store, trainer.position.step))?;
        let memory = agree(comm, Memory::new(trainer, config, snapshot_bytes(&parts), free))?;
        let checkpoint = &config.checkpoint;
        let last = if checkpoint.keep_last == 0 { usize::MAX } else { checkpoint.keep_last };
        let keep = (last, (checkpoint.keep_every > 0).then_some(checkpoint.keep_every));
        Ok(Self { store, keep, parts, memory, under_way: None, cancelled: Arc::default() })
    }

    /// How this rank saves, for the log.
    pub fn describe(&self) -> Option<String> {
        match &self.memory {
            Memory::Own(_) => {
                let bytes = size(snapshot_bytes(&self.parts));
                Some(format!("checkpoints are written behind training, from a copy of {bytes} in host memory"))
            }
            Memory::None(why) => Some(format!("training waits while a checkpoint is written: {}", why.as_ref()?)),
        }
    }

    /// Begins to save the state as it is. `documents` writes those, on rank 0. Nothing may be under way.
    pub fn begin(
        &mut self,
        trainer: &Trainer<B>,
        meaning: &Meaning,
        documents: impl Fn(&mut Writer) -> Result<()>,
    ) -> Result<()> {
        let begun = Instant::now();
        let (comm, step) = (&*trainer.comm, trainer.position.step);
        let declare = |writer: &mut Writer| {
            let table: &Table = trainer.network.table();
            trainer.state.declare(table, Some(&meaning.optimizer), writer)
        };
        let create = || {
            let mut writer = self.store.create(step)?;
            documents(&mut writer)?;
            declare(&mut writer)?;
            Ok(writer)
        };
        let own = agree(comm, if comm.rank() == 0 { create().map(Some) } else { Ok(None) })?;
        let folder = folder_of_all(comm, own.as_ref())?;
        let writer = own.map_or_else(
            || {
                let mut writer = self.store.join(step, &folder)?;
                declare(&mut writer)?;
                Ok(writer)
            },
            Ok,
        );
        // What fails on one rank is told where all look.
        let job = writer.map_or_else(|error| Job::Ended(Err(error)), |writer| self.write(trainer, writer, comm.rank()));
        self.under_way = Some(UnderWay { step, begun, pause: begun.elapsed(), stage: Stage::Writing(job) });
        Ok(())
    }

    /// Writes this rank's part, or lets a thread do so.
    fn write(&mut self, trainer: &Trainer<B>, writer: Writer, rank: usize) -> Job<Written<B>> {
        let (parts, backend) = (self.parts.clone(), &trainer.backend);
        let Memory::Own(memory) = &mut self.memory else {
            let written = trainer.state.stream(backend, &parts, &writer);
            return Job::Ended(written.and_then(|()| Written::new(writer, rank, None)));
        };
        let _copying = trace::span(Lane::Saving, "copy of the state");
        let copied = memory.take().map_or_else(|| backend.host(snapshot_bytes(&parts)), Ok).and_then(|mut host| {
            trainer.state.snapshot(backend, &parts, &mut host)?;
            Ok(host)
        });
        match copied {
            Err(error) => Job::Ended(Err(error)),
            Ok(host) => {
                let cancelled = self.cancelled.clone();
                Job::spawn(move || {
                    write_copy(&parts, host.bytes(), &writer, &cancelled)?;
                    Written::new(writer, rank, Some(host))
                })
            }
        }
    }

    /// Lets ranks tell each other after a step whether any of them is to stop, and how far the save under way has come.
    /// Returns whether to stop, and what is complete now.
    ///
    /// # Errors
    /// That of a save on any rank: there its own, [`Error::Elsewhere`] on others.
    pub fn meet(&mut self, comm: &dyn Comm<B>, stop: bool) -> Result<(bool, Option<Saved>)> {
        let mine = self.under_way.as_mut().map_or(ENDED, |save| save.stage.status());
        let all = comm.exchange(&[mine | if stop { STOP } else { 0 }])?;
        let has = |flag: u8| move |said: &Vec<u8>| said.first().is_some_and(|byte| byte & flag != 0);
        let stop = all.iter().any(has(STOP));
        let Some(save) = self.under_way.take() else { return Ok((stop, None)) };
        if all.iter().any(has(FAILED)) {
            self.cancelled.store(true, Ordering::Relaxed);
            // Given up here, or failed.
            let ended = save.stage.end();
            agree(comm, if mine & FAILED != 0 { ended } else { Ok(()) })?;
            return Err(Error::Fault("a save failed on no rank: an error of ours".into()));
        }
        if !all.iter().all(has(ENDED)) {
            self.under_way = Some(save);
            return Ok((stop, None));
        }
        let UnderWay { step, begun, pause, stage } = save;
        match stage {
            Stage::Writing(job) => {
                let stage = Stage::Publishing(self.publish(comm, job.end()?)?);
                self.under_way = Some(UnderWay { step, begun, pause, stage });
                Ok((stop, None))
            }
            Stage::Publishing(job) => {
                job.end()?;
                Ok((stop, Some(Saved { step, pause, whole: begun.elapsed() })))
            }
        }
    }

    /// Rank 0 takes the reports, and lets a thread do the rest.
    fn publish(&mut self, comm: &dyn Comm<B>, written: Written<B>) -> Result<Job<()>> {
        let reports = comm.exchange(&written.report)?;
        if let Memory::Own(memory) = &mut self.memory {
            *memory = written.host;
        }
        let Some(mut writer) = written.writer else { return Ok(Job::Ended(Ok(()))) };
        let (store, (last, every)) = (self.store.clone(), self.keep);
        Ok(Job::spawn(move || {
            reports[1..].iter().try_for_each(|report| writer.admit(report))?;
            writer.commit()?;
            store.prune(last, every).map(|_| ())
        }))
    }

    /// Waits for the save under way, if there is one. Returns what is complete then.
    pub fn finish(&mut self, comm: &dyn Comm<B>) -> Result<Option<Saved>> {
        let (mut saved, mut pause) = (None, Duration::from_micros(500));
        while self.under_way.is_some() {
            // A rank that waits is heard of at each turn, however slow the disk of another.
            thread::sleep(pause);
            pause = (pause * 2).min(PAUSE);
            saved = self.meet(comm, false)?.1;
        }
        Ok(saved)
    }
}

impl<B: Backend> Drop for Saver<B> {
    /// What a thread still writes is no checkpoint, and goes; one that is being named is finished.
    fn drop(&mut self) {
        self.cancelled.store(true, Ordering::Relaxed);
        if let Some(save) = self.under_way.take() {
            let _ = save.stage.end();
        }
    }
}

impl<B: Ops> Memory<B> {
    /// Memory for a copy of `bytes`, where the configuration wants one and there is room.
    fn new(trainer: &Trainer<B>, config: &Config, bytes: usize, free: usize) -> Result<Self> {
        let (every, background) = (config.checkpoint.every, config.checkpoint.background);
        if every == 0 || every >= config.steps {
            // Nothing goes on after the only save.
            return Ok(Self::None(None));
        }
        if background == Background::Never {
            return Ok(Self::None(Some("checkpoint.background = false".into())));
        }
        let (limit, planned) = match (trainer.backend.in_host_memory(), config.memory.limit) {
            (false, _) => (free, 0),
            (true, 0) => (free, trainer.plan.bytes()),
            (true, mebibytes) => (free.min(mebibytes << 20), trainer.plan.bytes()),
        };
        let room = limit.saturating_sub(planned);
        if background == Background::Auto && bytes > room {
            return Ok(Self::None(Some(format!("a copy takes {}, there is room for {}", size(bytes), size(room)))));
        }
        match trainer.backend.host(bytes) {
            Err(error) if background == Background::Auto => Ok(Self::None(Some(error.to_string()))),
            host => Ok(Self::Own(Some(host?))),
        }
    }
}

impl<B: Backend> Written<B> {
    fn new(writer: Writer, rank: usize, host: Option<B::Host>) -> Result<Self> {
        Ok(match rank {
            0 => Self { writer: Some(writer), report: Vec::new(), host },
            _ => Self { writer: None, report: writer.report()?, host },
        })
    }
}

/// Writes a copy of the state to the disk.
fn write_copy(parts: &[Part], copy: &[u8], writer: &Writer, cancelled: &AtomicBool) -> Result<()> {
    let _writing = trace::span(Lane::Saving, "checkpoint");
    for part in parts {
        let (elements, bytes) = (part.elements(), &copy[part.bytes.clone()]);
        let size = bytes.len() / elements;
        for start in (0..elements).step_by(BLOCK / size) {
            if cancelled.load(Ordering::Relaxed) {
                return Err(Error::Fault("the save was given up".into()));
            }
            let end = (start + BLOCK / size).min(elements);
            writer.write(&part.name, part.start + start, &bytes[start * size..end * size])?;
        }
    }
    Ok(())
}

/// Makes sure, before the first step, that what rank 0 begins to save is seen by all.
fn shared<B: Backend>(comm: &dyn Comm<B>, store: &Store, step: u64) -> Result<()> {
    if comm.world() == 1 {
        return Ok(());
    }
    let own = agree(comm, if comm.rank() == 0 { store.create(step).map(Some) } else { Ok(None) })?;
    let folder = folder_of_all(comm, own.as_ref())?;
    let seen = store.dir().join(&folder).is_dir();
    // Rank 0 has it until all have looked.
    agree(comm, Ok(()))?;
    if seen {
        return Ok(());
    }
    let why = format!(
        "rank {} does not see what rank 0 writes here: all ranks write a checkpoint together, so `run` must be a folder \
         that all hosts share",
        comm.rank()
    );
    Err(Error::file(store.dir(), why))
}

/// The name of the folder that rank 0 writes in, on all ranks.
fn folder_of_all<B: Backend>(comm: &dyn Comm<B>, own: Option<&Writer>) -> Result<String> {
    let names = comm.exchange(own.map(Writer::folder).unwrap_or_default().as_bytes())?;
    Ok(String::from_utf8_lossy(&names[0]).into_owned())
}

/// Work of a thread, or what came of it.
enum Job<T> {
    Busy(JoinHandle<Result<T>>),
    Ended(Result<T>),
}

impl<T: Send + 'static> Job<T> {
    fn spawn(work: impl FnOnce() -> Result<T> + Send + 'static) -> Self {
        match thread::Builder::new().name("saving".into()).spawn(work) {
            Ok(thread) => Self::Busy(thread),
            Err(error) => Self::Ended(Err(Error::Device(format!("a thread for saving was refused ({error})")))),
        }
    }

    /// [`ENDED`] and [`FAILED`], as far as they are so.
    fn status(&mut self) -> u8 {
        if let Self::Busy(thread) = self
            && thread.is_finished()
        {
            let ended = std::mem::replace(self, Self::Ended(Err(gone()))).end();
            *self = Self::Ended(ended);
        }
        match self {
            Self::Busy(_) => 0,
            Self::Ended(Ok(_)) => ENDED,
            Self::Ended(Err(_)) => FAILED,
        }
    }

    fn end(self) -> Result<T> {
        match self {
            Self::Busy(thread) => thread.join().unwrap_or_else(|_| Err(gone())),
            Self::Ended(result) => result,
        }
    }
}

fn gone() -> Error {
    Error::Fault("the thread that saves ended: an error of ours".into())
}

impl<B: Backend> Stage<B> {
    fn status(&mut self) -> u8 {
        match self {
            Self::Writing(job) => job.status(),
            Self::Publishing(job) => job.status(),
        }
    }

    fn end(self) -> Result<()> {
        match self {
            Self::Writing(job) => job.end().map(|_| ()),
            Self::Publishing(job) => job.end(),
        }
    }
}
