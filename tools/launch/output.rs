//! What processes print: whole lines, each with its rank, to the console, into logs, and the last ones kept.

use crate::options::Sinks;
use std::{
    collections::VecDeque,
    fs::File,
    io::{self, BufRead, BufReader, Read, Write},
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{self, Receiver, Sender},
    },
    thread,
    time::Duration,
};

/// Lines of a stream that are kept.
const KEPT: usize = 20;
/// Bytes of a kept line.
const KEPT_BYTES: usize = 400;
/// A longer line is passed on in pieces.
const LONGEST: u64 = 1 << 20;

/// A word of the launcher's own, on standard error.
pub fn say(text: &str) {
    for line in text.lines() {
        write_line(io::stderr(), b"mupscale-launch: ", line.as_bytes());
    }
}

/// One write for one line: lines of several launchers that share a terminal or a pipe stay whole too.
fn write_line(mut to: impl Write, prefix: &[u8], line: &[u8]) {
    let whole = [prefix, line, b"\n"].concat();
    // Where nobody reads any more the processes go on nevertheless.
    let _ = to.write_all(&whole).and_then(|()| to.flush());
}

/// The last lines of a stream.
#[derive(Clone, Default)]
pub struct Tail(Arc<Mutex<VecDeque<String>>>);

impl Tail {
    fn keep(&self, line: &[u8]) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() == KEPT {
            kept.pop_front();
        }
        kept.push_back(String::from_utf8_lossy(&line[..line.len().min(KEPT_BYTES)]).trim_end().into());
    }

    /// Oldest first.
    pub fn lines(&self) -> Vec<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }
}

/// Which stream of the launcher a process's stream is shown on.
#[derive(Clone, Copy, PartialEq)]
pub enum Console {
    /// Standard output.
    Out,
    /// Standard error.
    Err,
}

/// Where the lines of a stream go.
pub struct Path {
    /// `[rank 3] `
    pub prefix: String,
    /// Asked for.
    pub sinks: Sinks,
    /// The log, if one is kept.
    pub log: Option<File>,
    /// The launcher's own stream.
    pub console: Console,
    /// The last lines.
    pub tail: Tail,
}

/// Both streams of a process, followed until they end.
pub struct Pumps {
    ends: Receiver<()>,
    running: Sender<()>,
}

impl Pumps {
    /// For no stream yet.
    pub fn new() -> Self {
        let (running, ends) = mpsc::channel();
        Self { ends, running }
    }

    /// Follows a stream on a thread.
    pub fn follow(&self, stream: impl Read + Send + 'static, path: Path) -> io::Result<()> {
        let running = self.running.clone();
        let follow = move || {
            pump(stream, path);
            drop(running);
        };
        thread::Builder::new().name("output".into()).spawn(follow).map(drop)
    }

    /// Waits until all is read. A process that left the group may hold a stream open: it is not waited for.
    pub fn drain(self) {
        drop(self.running);
        let _ = self.ends.recv_timeout(Duration::from_secs(2));
    }
}

fn pump(stream: impl Read, mut path: Path) {
    let mut reader = BufReader::with_capacity(64 << 10, stream);
    let mut line = Vec::new();
    loop {
        line.clear();
        match (&mut reader).take(LONGEST).read_until(b'\n', &mut line) {
            Ok(0) => return,
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => return,
        }
        if let Some(log) = &mut path.log
            && let Err(error) = log.write_all(&line)
        {
            say(&format!("{}the log cannot be written any more ({error})", path.prefix));
            path.log = None;
        }
        let line = line.strip_suffix(b"\n").unwrap_or(&line);
        path.tail.keep(line);
        match path.console {
            _ if !path.sinks.console => {}
            Console::Out => write_line(io::stdout().lock(), path.prefix.as_bytes(), line),
            Console::Err => write_line(io::stderr().lock(), path.prefix.as_bytes(), line),
        }
    }
}
