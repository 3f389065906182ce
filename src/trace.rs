//! Where the time of some steps goes: spans on lanes, and a file of them for chrome://tracing or ui.perfetto.dev.
//!
//! What is traced lies in all layers, so the recorder is the process's own, as a log is. While nothing is recorded a
//! span costs the reading of a flag. The form of the file is Google's "Trace Event Format": complete events with times
//! in microseconds, a process for each rank, a thread for each lane.

use crate::{Error, Result};
use serde_json::{Value, json};
use std::{
    fmt::{self, Display},
    ops::RangeInclusive,
    path::{Path, PathBuf},
    str::FromStr,
    sync::{
        Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

/// Who is busy: the device's queues, and the threads of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lane {
    /// Ops.
    Compute,
    /// Sums between ranks, and what their hosts say to each other; waiting for the others is part of it.
    Communication,
    /// Copies between host and device.
    Copy,
    /// The thread that trains: batches, waiting.
    Host,
    /// Checkpoints.
    Saving,
}

impl Lane {
    const ALL: [Self; 5] = [Self::Compute, Self::Communication, Self::Copy, Self::Host, Self::Saving];

    fn name(self) -> &'static str {
        match self {
            Self::Compute => "compute",
            Self::Communication => "communication",
            Self::Copy => "copy",
            Self::Host => "host",
            Self::Saving => "saving",
        }
    }
}

/// Steps to trace, counted from 1 where this start of the run begins: `3..6` is four of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Steps(pub RangeInclusive<u64>);

impl FromStr for Steps {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (first, last) = text.split_once("..").unwrap_or((text, text));
        match (first.trim().parse(), last.trim().parse()) {
            (Ok(first), Ok(last)) if 1 <= first && first <= last => Ok(Self(first..=last)),
            _ => Err("write the first and the last step, from 1, as 3..6".into()),
        }
    }
}

impl fmt::Display for Steps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.0.start(), self.0.end())
    }
}

/// What the user wants to be traced.
#[derive(Clone, Debug)]
pub struct Request {
    /// The file to write.
    pub file: PathBuf,
    /// Which steps.
    pub steps: Steps,
}

static REQUEST: OnceLock<Request> = OnceLock::new();
static ON: AtomicBool = AtomicBool::new(false);
static EVENTS: Mutex<Option<Recording>> = Mutex::new(None);

struct Recording {
    start: Instant,
    events: Vec<Event>,
}

struct Event {
    lane: Lane,
    name: String,
    from: Stamp,
    to: Stamp,
}

/// A point in time.
pub enum Stamp {
    /// The host's.
    Now(Instant),
    /// A point in a device's queue, which is asked for once the queue has passed it; none if that fails.
    Later(Box<dyn FnOnce() -> Option<Instant> + Send>),
}

impl Stamp {
    fn time(self) -> Option<Instant> {
        match self {
            Self::Now(at) => Some(at),
            Self::Later(ask) => ask(),
        }
    }
}

/// Asks for a trace of the run that this process is about to train. The first request stands.
pub fn request(request: Request) {
    let _ = REQUEST.set(request);
}

/// What was asked for.
pub fn requested() -> Option<&'static Request> {
    REQUEST.get()
}

fn recording() -> MutexGuard<'static, Option<Recording>> {
    EVENTS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether spans are recorded now.
pub fn is_on() -> bool {
    ON.load(Ordering::Relaxed)
}

/// Begins to record. Ranks begin when they have just heard of each other, so that their clocks agree.
pub fn begin() {
    *recording() = Some(Recording { start: Instant::now(), events: Vec::new() });
    ON.store(true, Ordering::Relaxed);
}

/// Keeps a span whose ends are known.
pub fn note(lane: Lane, name: String, from: Stamp, to: Stamp) {
    if let Some(recording) = &mut *recording() {
        recording.events.push(Event { lane, name, from, to });
    }
}

/// Something that goes on, on the host, until this value is dropped.
pub struct Span(Option<(Lane, String, Instant)>);

/// Opens a span of the host.
pub fn span(lane: Lane, name: impl Display) -> Span {
    Span(is_on().then(|| (lane, name.to_string(), Instant::now())))
}

impl Drop for Span {
    fn drop(&mut self) {
        if let Some((lane, name, from)) = self.0.take() {
            note(lane, name, Stamp::Now(from), Stamp::Now(Instant::now()));
        }
    }
}

/// Ends the recording. Gives the events of this rank, as JSON objects divided by commas; `device` is it in words. All
/// that was enqueued on devices has run.
pub fn end(rank: usize, device: &str) -> String {
    ON.store(false, Ordering::Relaxed);
    let Some(Recording { start, events }) = recording().take() else { return String::new() };
    let named = |what: &str, lane: usize, name: &str| json!({"ph": "M", "name": what, "pid": rank, "tid": lane, "args": {"name": name}});
    let mut all = vec![named("process_name", 0, &format!("rank {rank}, {device}"))];
    all.extend(Lane::ALL.map(|lane| named("thread_name", lane as usize, lane.name())));
    let microseconds = |at: Instant| at.saturating_duration_since(start).as_secs_f64() * 1e6;
    all.extend(events.into_iter().filter_map(|Event { lane, name, from, to }| {
        let (from, to) = (microseconds(from.time()?), microseconds(to.time()?));
        let (pid, tid) = (rank, lane as usize);
        Some(json!({
            "ph": "X", "cat": lane.name(), "name": name, "pid": pid, "tid": tid, "ts": from, "dur": (to - from).max(0.0),
        }))
    }));
    all.iter().map(Value::to_string).collect::<Vec<_>>().join(",\n")
}

/// Writes what all ranks have recorded.
pub fn write(file: &Path, ranks: &[Vec<u8>]) -> Result<()> {
    let all: Vec<_> = ranks.iter().filter(|rank| !rank.is_empty()).map(|rank| String::from_utf8_lossy(rank)).collect();
    let text = format!("{{\"displayTimeUnit\": \"ms\", \"traceEvents\": [\n{}\n]}}\n", all.join(",\n"));
    std::fs::write(file, text).map_err(Error::io("write", file))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn steps_are_a_range_from_one() {
        assert_eq!("3..6".parse(), Ok(Steps(3..=6)));
        assert_eq!("2".parse(), Ok(Steps(2..=2)));
        for bad in ["", "0..3", "4..3", "a..b", "..", "-1..2"] {
            assert!(bad.parse::<Steps>().is_err(), "{bad}");
        }
    }

    /// The recorder is the process's own: one test says all of it.
    #[test]
    fn spans_become_events_while_it_is_on() {
        drop(span(Lane::Host, "before"));
        assert_eq!(end(0, "nothing"), "", "nothing is recorded yet");
        begin();
        drop(span(Lane::Host, format_args!("\"quoted\" {}", 1)));
        let now = Instant::now();
        note(Lane::Compute, "late".into(), Stamp::Now(now), Stamp::Later(Box::new(move || Some(now + SECOND))));
        note(Lane::Compute, "never".into(), Stamp::Now(now), Stamp::Later(Box::new(|| None)));
        let text = end(3, "CPU");
        drop(span(Lane::Host, "after"));
        let events: Vec<Value> = serde_json::from_str(&format!("[{text}]")).unwrap();
        assert_eq!(events[0]["args"]["name"], "rank 3, CPU");
        let spans: Vec<_> = events.iter().filter(|event| event["ph"] == "X").collect();
        assert_eq!(spans.len(), 2, "{text}");
        assert_eq!((&spans[0]["name"], &spans[0]["cat"]), (&json!("\"quoted\" 1"), &json!("host")));
        assert_eq!((&spans[1]["name"], &spans[1]["pid"]), (&json!("late"), &json!(3)));
        assert!((spans[1]["dur"].as_f64().unwrap() - 1e6).abs() < 1.0, "{text}");
    }

    const SECOND: Duration = Duration::from_secs(1);
}
