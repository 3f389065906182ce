//! The agent of a node: starts and ends its processes as the leader decides, and tells the leader what becomes of them.

use crate::{
    leader::signal_name,
    meeting::Member,
    messages::{Round, STOPPED, Step, Word, read, say as tell, step_key},
    options::{Meeting, Options},
    output::say,
    workers::Workers,
};
use mupscale::{Error, Result, comm::store::Client};
use signal_hook::iterator::Signals;
use std::{
    io,
    process::ExitStatus,
    sync::mpsc::{self, Receiver, RecvTimeoutError, Sender},
    thread,
    time::{Duration, Instant},
};

/// A signal that reaches several nodes at once is passed on once in this time.
const ECHO: Duration = Duration::from_secs(5);
/// A node that leaves before a round waits so long for a word of the leader's.
const PARTING: Duration = Duration::from_secs(2);

/// A process's connections break before the system tells of its end, so others that fail because of it may be seen to
/// end first: the cause is looked for among all that fail within this time.
const SETTLE: Duration = Duration::from_millis(200);

/// What an agent reacts to.
pub enum Event {
    /// A process of a round ended.
    Ended {
        /// The round.
        round: usize,
        /// The process.
        local: usize,
        /// How.
        status: io::Result<ExitStatus>,
    },
    /// The launcher was sent a signal.
    Signal(i32),
    /// The leader decided.
    Step(Step),
    /// The store is gone.
    Lost(Error),
}

/// A round on this node.
struct Running {
    number: usize,
    workers: Workers,
    /// The processes that failed by themselves.
    failures: Vec<(usize, ExitStatus)>,
    /// Whether the leader knows how it ended.
    told: bool,
    /// Whether the processes were told to end because of what happened elsewhere; how they do does not matter.
    closing: bool,
}

/// See the module.
pub struct Agent<'a> {
    options: &'a Options,
    member: &'a Member,
    processors: Vec<Vec<usize>>,
    port: Option<u16>,
    events: (Sender<Event>, Receiver<Event>),
    running: Option<Running>,
    /// When processes that were told to end are killed.
    kill_at: Option<Instant>,
    /// When it is decided which of the processes that failed is the cause.
    settle_at: Option<Instant>,
    /// The signal that this node leaves because of, and until when it waits for the leader.
    leaving: Option<(i32, Instant)>,
    /// The exit code, once the run is over for this node.
    over: Option<i32>,
    /// Whether the leader said so to all.
    decided: bool,
    /// Signals that were passed on, when, and whether another node had them first.
    passed: Vec<(i32, Instant, bool)>,
}

impl<'a> Agent<'a> {
    /// The agent of a node that has joined.
    pub fn new(options: &'a Options, meeting: &Meeting, member: &'a Member, processors: Vec<Vec<usize>>) -> Self {
        // Between nodes the port is where the agents meet.
        let port = options.master_port.filter(|_| *meeting == Meeting::Alone);
        let events = mpsc::channel();
        Self {
            options,
            member,
            processors,
            port,
            events,
            running: None,
            kill_at: None,
            settle_at: None,
            leaving: None,
            over: None,
            decided: false,
            passed: Vec::new(),
        }
    }

    /// Works until the run is over. Returns the launcher's exit code, and whether all nodes were told how it ended.
    pub fn work(mut self) -> Result<(i32, bool)> {
        self.listen()?;
        self.get_ready()?;
        loop {
            let event = match self.deadline() {
                Some(end) => self.events.1.recv_timeout(end.saturating_duration_since(Instant::now())),
                None => self.events.1.recv().map_err(|_| RecvTimeoutError::Disconnected),
            };
            if let Err(error) = self.react(event.ok()) {
                // Whatever cannot be said: the processes end, and then the launcher.
                self.lose(&error);
            }
            if let Some(code) = self.finished() {
                return Ok((code, self.decided));
            }
        }
    }

    fn deadline(&self) -> Option<Instant> {
        self.kill_at.into_iter().chain(self.settle_at).chain(self.leaving.map(|(_, until)| until)).min()
    }

    fn react(&mut self, event: Option<Event>) -> Result<()> {
        match event {
            Some(Event::Ended { round, local, status }) => self.ended(round, local, status)?,
            Some(Event::Signal(signal)) => self.signal(signal)?,
            Some(Event::Step(step)) => self.step(step)?,
            Some(Event::Lost(error)) => self.lose(&error),
            None => {}
        }
        if self.settle_at.is_some_and(|end| end <= Instant::now()) {
            self.settle()?;
        }
        if self.kill_at.is_some_and(|end| end <= Instant::now()) {
            self.kill_at = None;
            if let Some(running) = &self.running {
                let grace = self.options.grace.as_secs_f64();
                say(&format!("processes still run {grace} s after they were told to end: they are killed (--grace)"));
                running.workers.signal(libc::SIGKILL);
            }
        }
        Ok(())
    }

    /// The exit code, if nothing is left to be done.
    fn finished(&self) -> Option<i32> {
        let idle = self.running.as_ref().is_none_or(|running| running.workers.all_ended());
        let parted = self.leaving.filter(|(_, until)| *until <= Instant::now()).map(|(signal, _)| 128 + signal);
        self.over.or(parted).filter(|_| idle)
    }

    /// Threads that bring events: signals, and the leader's steps.
    fn listen(&self) -> Result<()> {
        let refused = |e| Error::Device(format!("a thread was refused ({e})"));
        let mut signals = Signals::new(&self.options.signals_to_handle.0)
            .map_err(|e| Error::Device(format!("signal handlers cannot be set: {e}")))?;
        let events = self.events.0.clone();
        let forward = move || signals.forever().for_each(|signal| drop(events.send(Event::Signal(signal))));
        thread::Builder::new().name("signals".into()).spawn(forward).map_err(refused)?;
        let (store, events) = (self.member.store.another()?, self.events.0.clone());
        let follow = move || {
            if let Err(error) = follow(&store, &events) {
                let _ = events.send(Event::Lost(error));
            }
        };
        thread::Builder::new().name("steps".into()).spawn(follow).map_err(refused).map(drop)
    }

    fn tell(&self, word: Word) -> Result<()> {
        tell(&self.member.store, self.member.agent, word)
    }

    fn get_ready(&mut self) -> Result<()> {
        (self.running, self.kill_at, self.settle_at) = (None, None, None);
        let port = self.member.free_port(self.port)?;
        self.tell(Word::Ready { port })
    }

    fn step(&mut self, step: Step) -> Result<()> {
        match step {
            Step::Begin(round) => self.begin(round),
            Step::Signal(signal, by) if by != self.member.agent => {
                if !self.heard(signal, true) {
                    say(&format!("{} was sent to node {by}: passed on", signal_name(signal)));
                    self.pass_on(signal);
                }
                Ok(())
            }
            Step::Refuse { agent, why } if agent == self.member.agent => Err(Error::Usage(why)),
            Step::Signal(..) | Step::Refuse { .. } => Ok(()),
            Step::Again(why) => {
                say(&format!("starting again: {why}"));
                if let Some((signal, _)) = self.leaving {
                    self.over = Some(self.running.as_ref().map_or(128 + signal, |running| running.workers.code()));
                }
                self.close();
                // A node that had no place waits on.
                let ended = self.running.as_ref().is_some_and(|running| running.workers.all_ended());
                if ended && self.over.is_none() { self.get_ready() } else { Ok(()) }
            }
            Step::Over { code, why, lines } => {
                // Nobody listens any more if the host was quicker.
                let _ = self.member.store.set(&format!("read/{}", self.member.agent), b"");
                if !why.is_empty() {
                    let lines = lines.iter().map(|line| format!("\n    {line}")).collect::<String>();
                    let last = if lines.is_empty() { "" } else { "; its last lines:" };
                    say(&format!("the run ends: {why}{last}{lines}"));
                }
                (self.over, self.decided) = (Some(code), true);
                self.close();
                Ok(())
            }
        }
    }

    fn begin(&mut self, round: Round) -> Result<()> {
        let nodes = round.places.len();
        if !round.places.iter().any(|place| place.agent == self.member.agent) {
            say(&format!("{nodes} nodes run already: waiting for a place"));
            return Ok(());
        }
        let (master, port) = round.master;
        let on = if nodes > 1 { format!(" on {nodes} nodes") } else { String::new() };
        say(&format!("{} processes{on}, master {master} port {port}, run {}", round.world, self.member.run));
        let workers = Workers::start(self.options, self.member, &round, &self.processors, &self.events.0)?;
        self.running =
            Some(Running { number: round.number, workers, failures: Vec::new(), told: false, closing: false });
        Ok(())
    }

    fn ended(&mut self, round: usize, local: usize, status: io::Result<ExitStatus>) -> Result<()> {
        let Some(running) = self.running.as_mut().filter(|running| running.number == round) else { return Ok(()) };
        let status = status.map_err(|e| Error::Device(format!("a process cannot be waited for ({e})")))?;
        let code = running.workers.ended(local, status);
        let all = running.workers.all_ended();
        if running.closing {
            return if all && self.over.is_none() { self.get_ready() } else { Ok(()) };
        }
        if running.told {
            return Ok(());
        }
        if code != 0 && code != STOPPED && self.leaving.is_none() {
            running.failures.push((local, status));
            self.settle_at.get_or_insert(Instant::now() + SETTLE);
        }
        if code == STOPPED && !all && self.kill_at.is_none() {
            // They agreed to stop: the others are about to.
            self.kill_at = Some(Instant::now() + self.options.grace);
        }
        if !all {
            return Ok(());
        }
        if self.settle_at.is_some() {
            return self.settle();
        }
        running.told = true;
        let code = running.workers.code();
        self.tell(Word::Ended { round, code })
    }

    /// Says which process failed, and ends the others.
    fn settle(&mut self) -> Result<()> {
        self.settle_at = None;
        let Some(running) = self.running.as_mut().filter(|running| !running.told) else { return Ok(()) };
        let causes = running.failures.iter().map(|(local, status)| running.workers.cause(*local, *status));
        // The first of the most telling ones.
        let Some(cause) = causes.rev().max_by_key(|cause| cause.weight) else { return Ok(()) };
        running.told = true;
        let round = running.number;
        if !running.workers.all_ended() && self.kill_at.is_none() {
            running.workers.signal(libc::SIGTERM);
            self.kill_at = Some(Instant::now() + self.options.grace);
        }
        self.tell(Word::Failed { round, cause })
    }

    /// Ends the processes of a round whose end is decided.
    fn close(&mut self) {
        let Some(running) = &mut self.running else { return };
        if self.kill_at.is_none() && !running.workers.all_ended() {
            running.workers.signal(libc::SIGTERM);
            self.kill_at = Some(Instant::now() + self.options.grace);
        }
        (running.closing, running.told) = (true, true);
    }

    /// Whether this very signal was passed on a moment ago because another node, or this one, had it.
    fn heard(&mut self, signal: i32, echo: bool) -> bool {
        self.passed.retain(|(_, at, _)| at.elapsed() < ECHO);
        let same = self.passed.iter().position(|(other, _, was_echo)| *other == signal && (echo || *was_echo));
        match same {
            // A second one from the same source is meant.
            Some(at) if !echo => drop(self.passed.remove(at)),
            Some(_) => {}
            None => self.passed.push((signal, Instant::now(), echo)),
        }
        same.is_some()
    }

    fn signal(&mut self, signal: i32) -> Result<()> {
        if !self.heard(signal, false) {
            say(&format!("{}: passed on to all processes", signal_name(signal)));
            self.pass_on(signal);
        }
        if ends(signal) && self.leaving.is_none() {
            let wait = if self.running.is_some() { self.options.grace + PARTING * 2 } else { PARTING };
            self.leaving = Some((signal, Instant::now() + wait));
        }
        self.tell(Word::Signal(signal))
    }

    fn pass_on(&mut self, signal: i32) {
        if let Some(running) = &self.running {
            running.workers.signal(signal);
            if ends(signal) && self.kill_at.is_none() && !running.workers.all_ended() {
                self.kill_at = Some(Instant::now() + self.options.grace);
            }
        }
    }

    /// Ends this node's part of a run that cannot be led any more.
    fn lose(&mut self, error: &Error) {
        if self.over.is_none() {
            say(&format!("the run ends: {error}"));
            self.over = Some(error.exit_code().into());
        }
        self.close();
    }
}

/// Whether a signal asks processes to end.
pub fn ends(signal: i32) -> bool {
    ![libc::SIGUSR1, libc::SIGUSR2].contains(&signal)
}

/// Brings the leader's steps, until the last one.
fn follow(store: &Client, events: &Sender<Event>) -> Result<()> {
    for number in 1.. {
        let step = loop {
            if let Some(step) = store.watch(&step_key(number), None, Duration::from_secs(3600))? {
                break read::<Step>(&step)?;
            }
        };
        let over = matches!(step, Step::Over { .. });
        if events.send(Event::Step(step)).is_err() || over {
            break;
        }
    }
    Ok(())
}
