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
        self.kill_at.into_iter().chain(self.leaving.map(|(_, until)| until)).min()
    }

    fn react(&mut self, event: Option<Event>) -> Result<()> {
        match event {
            Some(Event::Ended { round, local, status }) => self.ended(round, local, status)?,
            Some(Event::Signal(signal)) => self.signal(signal)?,
            Some(Event::Step(step)) => self.step(step)?,
            Some(Event::Lost(error)) => self.lose(&error),
            None => {}
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
        self.running = None;
        self.kill_at = None;
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
            Step::Signal(..) => Ok(()),
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
        self.running = Some(Running { number: round.number, workers, told: false, closing: false });
        Ok(())
    }

    fn ended(&mut self, round: usize, local: usize, status: io::Result<ExitStatus>) -> Result<()> {
        let Some(running) = self.running.as_mut().filter(|running| running.number == round) else { return Ok(()) };
        let status = status.map_err(|e| Error::Device(format!("a process cannot be waited for ({e})")))?;
        let code = running.workers.ended(local, status);
        let (all, stopping) = (running.workers.all_ended(), self.leaving.is_some());
        let number = running.number;
        if running.closing {
            let again = all && self.over.is_none() && running.told;
            return if again { self.get_ready() } else { Ok(()) };
        }
        let mut words = Vec::new();
        if code != 0 && code != STOPPED && !stopping && !running.told {
            let cause = running.workers.cause(local, status);
            running.told = true;
            words.push(Word::Failed { round, cause });
        }
        if all && !running.told {
            running.told = true;
            words.push(Word::Ended { round: number, code: running.workers.code() });
        }
        // The others have nothing to wait for.
        if code != 0 && !all && self.kill_at.is_none() {
            if code != STOPPED {
                running.workers.signal(libc::SIGTERM);
            }
            self.kill_at = Some(Instant::now() + self.options.grace);
        }
        words.into_iter().try_for_each(|word| self.tell(word))
    }

    /// Ends the processes of a round whose end is decided.
    fn close(&mut self) {
        let Some(running) = &mut self.running else { return };
        if !running.closing && !running.workers.all_ended() {
            if self.kill_at.is_none() {
                running.workers.signal(libc::SIGTERM);
                self.kill_at = Some(Instant::now() + self.options.grace);
            }
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
