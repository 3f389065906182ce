//! Processes that train, some at a time.

use crate::{Error, Result, machine};
use std::{
    collections::VecDeque,
    fs::{self, File, TryLockError},
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

/// Times that a process is started again after a signal killed it.
const RESTARTS: usize = 2;
/// How often processes are looked at.
const LOOK: Duration = Duration::from_millis(20);

/// A run to train.
pub struct Job {
    /// Its name.
    pub name: String,
    /// Its configuration.
    pub config: PathBuf,
    /// Its folder.
    pub folder: PathBuf,
}

/// Where processes run.
pub struct Pool {
    /// The program that trains.
    pub program: PathBuf,
    /// One for each process at a time: its GPU, or none.
    pub workers: Vec<Option<u32>>,
}

/// How a process ended: its job's name, its exit code (none: a signal killed it), what it said on standard error.
type End = Result<(String, Option<i32>, String)>;

/// Told of a job's end: its name, its exit code (none: a signal killed it), its last line on standard error.
pub type Ended<'a> = dyn FnMut(&str, Option<i32>, &str) -> Result<()> + 'a;

impl Pool {
    /// Runs all jobs; `ended` is told of each, in the order in which they end.
    ///
    /// # Errors
    /// After SIGINT, SIGTERM or SIGUSR1, when all processes have saved and ended: [`Error::Elsewhere`] with 75. Those of
    /// `ended`; a program that cannot be started.
    pub fn run(&self, jobs: Vec<Job>, ended: &mut Ended<'_>) -> Result<()> {
        let stop = machine::stop_flag()?;
        let (queue, quit) = (Mutex::new(VecDeque::from(jobs)), AtomicBool::new(false));
        let stopping = || stop.load(Ordering::Relaxed) || quit.load(Ordering::Relaxed);
        let (sender, ends) = mpsc::channel::<End>();
        thread::scope(|scope| {
            for gpu in &self.workers {
                let (sender, queue, stopping) = (sender.clone(), &queue, &stopping);
                scope.spawn(move || {
                    while !stopping() {
                        let Some(job) = queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front() else {
                            return;
                        };
                        let end = self.train(&job, *gpu, stopping);
                        let Some(end) = end.transpose() else { return };
                        let _ = sender.send(end.map(|(code, message)| (job.name, code, message)));
                    }
                });
            }
            drop(sender);
            let told = ends.into_iter().try_for_each(|end| {
                let (name, code, message) = end?;
                ended(&name, code, &message)
            });
            quit.store(true, Ordering::Relaxed);
            told
        })?;
        if stop.load(Ordering::Relaxed) { Err(Error::Elsewhere { code: 75 }) } else { Ok(()) }
    }

    /// Trains one run; None if it was told to stop.
    fn train(&self, job: &Job, gpu: Option<u32>, stopping: &dyn Fn() -> bool) -> Result<Option<(Option<i32>, String)>> {
        fs::create_dir_all(&job.folder).map_err(Error::io("create", &job.folder))?;
        let (log, path) = (job.config.with_extension("log"), job.config.with_extension("lock"));
        let lock = File::create(&path).map_err(Error::io("create", &path))?;
        // Another shard may train the same base, or a process outlive a sweep that was killed.
        loop {
            match lock.try_lock() {
                Ok(()) => break,
                Err(TryLockError::Error(e)) => return Err(Error::io("lock", &path)(e)),
                Err(TryLockError::WouldBlock) if stopping() => return Ok(None),
                Err(TryLockError::WouldBlock) => thread::sleep(LOOK),
            }
        }
        for _ in 0..=RESTARTS {
            let mut child = self.start(job, gpu, &log, &lock)?;
            let mut told = false;
            let status = loop {
                if let Some(status) = child.try_wait().map_err(Error::io("wait for", &self.program))? {
                    break status;
                }
                if stopping() && !told {
                    told = true;
                    terminate(&child);
                }
                thread::sleep(LOOK);
            };
            if stopping() {
                return Ok(None);
            }
            if status.code().is_some() {
                let said = fs::read_to_string(&log).unwrap_or_default();
                return Ok(Some((status.code(), said.lines().last().unwrap_or_default().to_string())));
            }
        }
        Ok(Some((None, format!("killed by a signal {} times", RESTARTS + 1))))
    }

    fn start(&self, job: &Job, gpu: Option<u32>, log: &PathBuf, lock: &File) -> Result<Child> {
        let file = File::create(log).map_err(Error::io("create", log))?;
        let lock = lock.try_clone().map_err(Error::io("share the lock of", &job.folder))?;
        let mut command = Command::new(&self.program);
        command.args(["train", "--resume", "auto", "--json", "-c"]).arg(&job.config);
        // The lock is held until the last process that has it open ends.
        command.stdin(Stdio::from(lock)).stdout(Stdio::null()).stderr(Stdio::from(file));
        if let Some(gpu) = gpu {
            command.env("CUDA_VISIBLE_DEVICES", gpu.to_string());
        }
        command.spawn().map_err(Error::io("start", &self.program))
    }
}

/// Asks a process to save and end.
fn terminate(child: &Child) {
    if let Some(process) = i32::try_from(child.id()).ok().and_then(rustix::process::Pid::from_raw) {
        // It may have ended by itself in the meantime.
        let _ = rustix::process::kill_process(process, rustix::process::Signal::TERM);
    }
}
