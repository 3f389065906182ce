//! The processes of one round on this node.

use crate::{
    agent::{Event, ends},
    leader::{signal_name, token},
    meeting::Member,
    messages::{Cause, LOST, Round},
    options::Options,
    output::{Console, Path, Pumps, Tail},
    system,
};
use mupscale::{Error, Result};
use std::{
    env,
    fs::{self, File},
    io,
    os::unix::process::ExitStatusExt,
    path::PathBuf,
    process::{Child, Command, ExitStatus, Stdio},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc::Sender,
    },
    thread,
    time::{Duration, Instant},
};

/// What a process leaves behind when it ends by itself has so long to end too.
const LEFT_BEHIND: Duration = Duration::from_secs(1);

/// A process that was started.
struct Worker {
    rank: usize,
    pid: u32,
    /// Whether its id is still its own. Held while a signal is sent, or the id given back.
    alive: Arc<Mutex<bool>>,
    /// Whether it was told to end: the launcher then gives all of its group the same grace.
    told: Arc<AtomicBool>,
    /// Of standard output and standard error: where an error stands, many lines on the other do not hide it.
    tails: [Tail; 2],
    ended: Option<i32>,
}

/// All of them.
pub struct Workers {
    workers: Vec<Worker>,
    host: String,
}

impl Workers {
    /// Starts the processes of a round, one for each share of the processors, on the thread that has to outlive them. Ends are told to `events`.
    pub fn start(
        options: &Options,
        member: &Member,
        round: &Round,
        processors: &[Vec<usize>],
        events: &Sender<Event>,
    ) -> Result<Self> {
        let mut all = Self { workers: Vec::new(), host: member.node.name.clone() };
        for (local, processors) in processors.iter().enumerate() {
            match start(options, member, round, local, processors, events) {
                Ok(worker) => all.workers.push(worker),
                Err(error) => {
                    all.signal(libc::SIGKILL);
                    return Err(error);
                }
            }
        }
        Ok(all)
    }

    /// Sends a signal to every process that has not ended, and to what it started.
    pub fn signal(&self, signal: i32) {
        for worker in &self.workers {
            let alive = worker.alive.lock().unwrap_or_else(PoisonError::into_inner);
            if *alive {
                worker.told.fetch_or(ends(signal), Ordering::SeqCst);
                system::signal_group(worker.pid, signal);
            }
        }
    }

    /// Notes that a process has ended. Returns its code: 128 + the signal that ended it.
    pub fn ended(&mut self, local: usize, status: ExitStatus) -> i32 {
        let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
        self.workers[local].ended = Some(code);
        code
    }

    /// Whether no process is left.
    pub fn all_ended(&self) -> bool {
        self.workers.iter().all(|worker| worker.ended.is_some())
    }

    /// The first code that is not 0.
    pub fn code(&self) -> i32 {
        self.workers.iter().filter_map(|worker| worker.ended).find(|code| *code != 0).unwrap_or(0)
    }

    /// How a process failed.
    pub fn cause(&self, local: usize, status: ExitStatus) -> Cause {
        let worker = &self.workers[local];
        let how = match status.signal() {
            Some(libc::SIGKILL) => "was killed by SIGKILL (by the system if memory ran out: see dmesg)".into(),
            Some(signal) => format!("was ended by {}", signal_name(signal)),
            None => format!("ended with exit code {}", status.code().unwrap_or(0)),
        };
        let what = format!("rank {} (local rank {local}, process {} on {}) {how}", worker.rank, worker.pid, self.host);
        let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
        let weight = match status.code() {
            None => 2,
            Some(LOST) => 0,
            Some(_) => 1,
        };
        Cause { what, code, weight, lines: worker.tails.iter().flat_map(Tail::lines).collect() }
    }
}

fn start(
    options: &Options,
    member: &Member,
    round: &Round,
    local: usize,
    processors: &[usize],
    events: &Sender<Event>,
) -> Result<Worker> {
    let first = round.places.iter().find(|place| place.agent == member.agent).map_or(0, |place| place.first);
    let rank = first + local;
    let mut command = Command::new(&options.program[0]);
    command.args(&options.program[1..]).envs(variables(options, member, round, local, rank));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    system::tie(&mut command, processors);
    let logs = [Console::Out, Console::Err].map(|console| log(options, member, round, local, rank, console));
    let [out, err] = logs;
    let (out, err) = (out?, err?);
    let program = options.program[0].to_string_lossy();
    let mut child =
        command.spawn().map_err(|e| Error::config("program", &program, format!("cannot be started ({e})")))?;
    let (pid, tails) = (child.id(), [Tail::default(), Tail::default()]);
    let pumps = Pumps::new();
    let prefix = if round.world > 1 { format!("[rank {rank}] ") } else { String::new() };
    let [out_sinks, err_sinks] = options.streams(local);
    let path = |sinks, log, console| Path {
        prefix: prefix.clone(),
        sinks,
        log,
        console,
        tail: tails[console as usize].clone(),
    };
    let followed = [
        child.stdout.take().map(|stream| pumps.follow(stream, path(out_sinks, out, Console::Out))),
        child.stderr.take().map(|stream| pumps.follow(stream, path(err_sinks, err, Console::Err))),
    ];
    let (alive, told) = (Arc::new(Mutex::new(true)), Arc::new(AtomicBool::new(false)));
    let watch = {
        let (alive, told, events, round) = (alive.clone(), told.clone(), events.clone(), round.number);
        let grace = options.grace;
        move || {
            let status = reap(child, &alive, &told, grace);
            pumps.drain();
            // The launcher ends only after its processes: somebody listens.
            let _ = events.send(Event::Ended { round, local, status });
        }
    };
    let watched = thread::Builder::new().name("worker".into()).spawn(watch).map(drop);
    match followed.into_iter().flatten().chain([watched]).find_map(io::Result::err) {
        Some(e) => {
            system::signal_group(pid, libc::SIGKILL);
            Err(Error::Device(format!("a thread was refused ({e})")))
        }
        None => Ok(Worker { rank, pid, alive, told, tails, ended: None }),
    }
}

/// Waits for the end of a process, ends what is left of its group, and gives its id back. A shell dies of a signal
/// while what it started still saves its work: that has the grace that the shell had.
fn reap(mut child: Child, alive: &Mutex<bool>, told: &AtomicBool, grace: Duration) -> io::Result<ExitStatus> {
    if system::wait_for_end(child.id()).is_ok() && system::has_members(child.id()) {
        system::signal_group(child.id(), libc::SIGTERM);
        let start = Instant::now();
        let time = || if told.load(Ordering::SeqCst) { grace } else { LEFT_BEHIND };
        while start.elapsed() < time() && system::has_members(child.id()) {
            thread::sleep(Duration::from_millis(20));
        }
        system::signal_group(child.id(), libc::SIGKILL);
    }
    let mut alive = alive.lock().unwrap_or_else(PoisonError::into_inner);
    *alive = false;
    child.wait()
}

/// What a process is told by its environment: torchrun's variables, and where our store is.
fn variables(options: &Options, member: &Member, round: &Round, local: usize, rank: usize) -> Vec<(String, String)> {
    let group = round.places.iter().position(|place| place.agent == member.agent).unwrap_or(0);
    let (world, locals) = (round.world.to_string(), member.node.processes.to_string());
    let (host, port) = round.master;
    let all = [
        ("RANK", rank.to_string()),
        ("WORLD_SIZE", world.clone()),
        ("LOCAL_RANK", local.to_string()),
        ("LOCAL_WORLD_SIZE", locals),
        ("GROUP_RANK", group.to_string()),
        ("GROUP_WORLD_SIZE", round.places.len().to_string()),
        ("ROLE_NAME", options.role.clone()),
        ("ROLE_RANK", rank.to_string()),
        ("ROLE_WORLD_SIZE", world),
        ("MASTER_ADDR", host.to_string()),
        ("MASTER_PORT", port.to_string()),
        ("TORCHELASTIC_RUN_ID", member.run.clone()),
        ("TORCHELASTIC_RESTART_COUNT", round.restarts.to_string()),
        ("TORCHELASTIC_MAX_RESTARTS", options.max_restarts.to_string()),
        // The agents' store speaks our protocol, not PyTorch's.
        ("TORCHELASTIC_USE_AGENT_STORE", "False".into()),
        ("MUPSCALE_STORE", round.store.clone()),
        ("MUPSCALE_STORE_TOKEN", token(&member.run, round.number)),
    ];
    let mut all: Vec<_> = all.map(|(name, value)| (name.to_string(), value)).into();
    let mut default = |name: &str, value: &str| {
        if env::var_os(name).is_none() {
            all.push((name.into(), value.into()));
        }
    };
    default("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1");
    if member.node.processes > 1 {
        default("OMP_NUM_THREADS", "1");
    }
    all
}

/// Opens the log of a stream, if one is kept.
fn log(
    options: &Options,
    member: &Member,
    round: &Round,
    local: usize,
    rank: usize,
    console: Console,
) -> Result<Option<File>> {
    let name = if console == Console::Out { "stdout.log" } else { "stderr.log" };
    if !options.streams(local)[console as usize].log {
        return Ok(None);
    }
    let dir = log_folder(options, &member.run).join(format!("attempt_{}/{rank}", round.number - 1));
    fs::create_dir_all(&dir).map_err(Error::io("create", &dir))?;
    let path = dir.join(name);
    // A run that is queued again under its name goes on where it was.
    File::options().create(true).append(true).open(&path).map(Some).map_err(Error::io("write", &path))
}

/// Where the logs of a run are.
pub fn log_folder(options: &Options, run: &str) -> PathBuf {
    let base = options.log_dir.clone().unwrap_or_else(|| env::temp_dir().join("mupscale-launch"));
    base.join(run.replace(['/', '\0'], "_"))
}
