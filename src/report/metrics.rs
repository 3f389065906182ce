//! `metrics.jsonl` in the run folder: one JSON object a line, written as the run goes.
//!
//! A line is a [`Record`], told apart by its `kind` (`train`, `validation` or `sample`). A number that is not finite is
//! written as null and read back as NaN. Keys that a reader does not know are ignored, so fields can be added.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, BufRead, BufReader, BufWriter, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Deserializer, Serialize};

use super::tensorboard::EventFile;
use crate::{Error, Result};

/// Name of the file in the run folder.
pub const FILE_NAME: &str = "metrics.jsonl";

/// One line of `metrics.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind")]
pub enum Record {
    /// A training step.
    #[serde(rename = "train")]
    Step(StepRecord),
    /// A pass over the validation tokens.
    #[serde(rename = "validation")]
    Validation(ValidationRecord),
    /// A text that the model wrote.
    #[serde(rename = "sample")]
    Sample(SampleRecord),
}

impl Record {
    /// Steps finished when the record was made.
    pub fn step(&self) -> u64 {
        match self {
            Self::Step(r) => r.step,
            Self::Validation(r) => r.step,
            Self::Sample(r) => r.step,
        }
    }

    /// Seconds since the run's start, summed over resumes.
    pub fn seconds(&self) -> f64 {
        match self {
            Self::Step(r) => r.seconds,
            Self::Validation(r) => r.seconds,
            Self::Sample(r) => r.seconds,
        }
    }
}

/// What a training step reports.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// Steps finished, this one included.
    pub step: u64,
    /// Training tokens seen since the run's start.
    pub tokens: u64,
    /// Nats per token, mean over the step's counted tokens.
    #[serde(deserialize_with = "null_as_nan")]
    pub loss: f64,
    /// Learning rate of the step, before the multipliers of the tensors.
    #[serde(deserialize_with = "null_as_nan")]
    pub lr: f64,
    /// Norm of the gradient before clipping, as clipping measures it.
    #[serde(deserialize_with = "null_as_nan")]
    pub grad_norm: f64,
    /// Euclidean norm of the change of all weights.
    #[serde(deserialize_with = "null_as_nan")]
    pub update_norm: f64,
    /// Training tokens a second in this step.
    #[serde(deserialize_with = "null_as_nan")]
    pub tokens_per_second: f64,
    /// Seconds since the run's start, summed over resumes.
    #[serde(deserialize_with = "null_as_nan")]
    pub seconds: f64,
    /// Bytes that the run's tensors take, as planned.
    pub memory: u64,
}

/// What a validation reports.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ValidationRecord {
    /// Training steps finished before it.
    pub step: u64,
    /// Training tokens seen before it.
    pub tokens: u64,
    /// Nats per token, mean over the counted validation tokens.
    #[serde(deserialize_with = "null_as_nan")]
    pub loss: f64,
    /// Validation batches.
    pub batches: u64,
    /// Seconds since the run's start, summed over resumes.
    #[serde(deserialize_with = "null_as_nan")]
    pub seconds: f64,
}

/// A text of `[samples]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SampleRecord {
    /// Training steps finished before it.
    pub step: u64,
    /// Training tokens seen before it.
    pub tokens: u64,
    /// Seconds since the run's start, summed over resumes.
    #[serde(deserialize_with = "null_as_nan")]
    pub seconds: f64,
    /// Which of the prompts, from 0.
    pub index: u64,
    /// What the model was given.
    pub prompt: String,
    /// What it added.
    pub text: String,
}

/// JSON has no NaN: the writer puts null for it.
fn null_as_nan<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

/// The open `metrics.jsonl` of a running run, and beside it the same numbers for TensorBoard.
#[derive(Debug)]
pub struct MetricsLog {
    path: PathBuf,
    file: File,
    events: EventFile,
    seconds: f64,
}

impl MetricsLog {
    /// Starts the file of a new run; [`Error::Exists`] if the folder has one.
    pub fn create(run_dir: &Path) -> Result<Self> {
        let path = run_dir.join(FILE_NAME);
        let file =
            OpenOptions::new().append(true).create_new(true).open(&path).map_err(|error| match error.kind() {
                io::ErrorKind::AlreadyExists => Error::Exists { path: path.clone() },
                _ => Error::io("create", &path)(error),
            })?;
        Ok(Self { path, file, events: EventFile::open(run_dir, 0)?, seconds: 0.0 })
    }

    /// Goes on with the file of a run resumed after `step`: later lines, and a last line that was torn, are
    /// dropped; the lines kept are kept to the byte. The folder may lack the file.
    pub fn resume(run_dir: &Path, step: u64) -> Result<Self> {
        let path = run_dir.join(FILE_NAME);
        if !path.exists() {
            return Self::create(run_dir);
        }
        let beside = run_dir.join(format!("{FILE_NAME}.partial"));
        let seconds = copy_up_to(step, &path, &beside).inspect_err(|_| {
            // The error to report is the one before; a copy that cannot be removed does no harm.
            let _ = fs::remove_file(&beside);
        })?;
        fs::rename(&beside, &path).map_err(Error::io("rename", &beside))?;
        let file = OpenOptions::new().append(true).open(&path).map_err(Error::io("write", &path))?;
        Ok(Self { path, file, events: EventFile::open(run_dir, step)?, seconds })
    }

    /// Seconds of the last record, at which the clock of a resumed run goes on; 0 for a new run.
    pub fn seconds(&self) -> f64 {
        self.seconds
    }

    /// Writes one line, which other programs see at once.
    pub fn append(&mut self, record: &Record) -> Result<()> {
        let write = || -> io::Result<()> {
            let mut line = serde_json::to_vec(record)?;
            line.push(b'\n');
            (&self.file).write_all(&line)
        };
        write().map_err(Error::io("write", &self.path))?;
        self.events.append(record)?;
        self.seconds = record.seconds();
        Ok(())
    }
}

/// Copies the lines of steps up to `step`, to the byte, and returns the last one's seconds.
fn copy_up_to(step: u64, from: &Path, to: &Path) -> Result<f64> {
    let mut copy = BufWriter::new(File::create(to).map_err(Error::io("create", to))?);
    let mut seconds = 0.0;
    for_each_line(from, |line, record| {
        if record.step() > step {
            return Ok(());
        }
        seconds = record.seconds();
        copy.write_all(line).and_then(|()| copy.write_all(b"\n")).map_err(Error::io("write", to))
    })?;
    let written = copy.into_inner().map_err(io::IntoInnerError::into_error);
    written.and_then(|file| file.sync_all()).map_err(Error::io("write", to))?;
    Ok(seconds)
}

/// All records of a `metrics.jsonl`. A bad line is an error with its number, but for a last line without its end
/// (the run was killed, or is writing it now), which is left out.
pub fn read(path: &Path) -> Result<Vec<Record>> {
    let mut records = Vec::new();
    for_each_line(path, |_, record| {
        records.push(record);
        Ok(())
    })?;
    Ok(records)
}

/// Reads a `metrics.jsonl` that grows.
#[derive(Debug)]
pub struct Tail {
    path: PathBuf,
    /// Bytes that have been read.
    read: u64,
}

impl Tail {
    /// Nothing has been read.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), read: 0 }
    }

    /// The records of the lines that were completed since the last call. A file that became shorter is one that a
    /// resumed run wrote anew: it is read from its start.
    pub fn news(&mut self) -> Result<Vec<Record>> {
        let io = |error| Error::io("read", &self.path)(error);
        let mut file = File::open(&self.path).map_err(io)?;
        let size = file.metadata().map_err(io)?.len();
        if size < self.read {
            self.read = 0;
        }
        file.seek(SeekFrom::Start(self.read)).map_err(io)?;
        let mut text = Vec::new();
        file.take(size - self.read).read_to_end(&mut text).map_err(io)?;
        text.truncate(text.iter().rposition(|byte| *byte == b'\n').map_or(0, |last| last + 1));
        let lines = text.split_inclusive(|byte| *byte == b'\n');
        let records = lines.map(|line| {
            serde_json::from_slice(line).map_err(|e| Error::file(&self.path, format!("is not a metrics file: {e}")))
        });
        let records = records.collect::<Result<Vec<_>>>()?;
        self.read += text.len() as u64;
        Ok(records)
    }
}

/// Calls `keep` with every line (without its end) and the record in it; the file is streamed.
fn for_each_line(path: &Path, mut keep: impl FnMut(&[u8], Record) -> Result<()>) -> Result<()> {
    let mut reader = BufReader::new(File::open(path).map_err(Error::io("read", path))?);
    let mut line = Vec::new();
    for number in 1.. {
        line.clear();
        if reader.read_until(b'\n', &mut line).map_err(Error::io("read", path))? == 0 {
            break;
        }
        let ended = line.pop_if(|last| *last == b'\n').is_some();
        match serde_json::from_slice(&line) {
            Ok(record) => keep(&line, record)?,
            Err(_) if !ended => break,
            Err(error) => {
                let why = format!("line {number} is not a metrics record ({error}): repair or delete that line");
                return Err(Error::file(path, why));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn train(step: u64) -> Record {
        Record::Step(StepRecord {
            step,
            tokens: step * 512,
            loss: 4.25 - step as f64 * 0.125,
            lr: 1e-3,
            grad_norm: 0.5,
            update_norm: 0.0625,
            tokens_per_second: 45_000.0,
            seconds: step as f64 * 0.5,
            memory: 1 << 20,
        })
    }

    fn validation(step: u64) -> Record {
        let seconds = step as f64 * 0.5 + 0.25;
        Record::Validation(ValidationRecord { step, tokens: step * 512, loss: 4.5, batches: 8, seconds })
    }

    fn sample(step: u64) -> Record {
        let (prompt, text) = ("A \"b\"\n".into(), "ç\u{2028}".into());
        Record::Sample(SampleRecord { step, tokens: step * 512, seconds: 1.25, index: 0, prompt, text })
    }

    /// A run folder with steps 1 to 4 and a validation after step 2, and texts after steps 2 and 4.
    fn run_of_four() -> (tempfile::TempDir, PathBuf, Vec<Record>) {
        let dir = tempfile::tempdir().unwrap();
        let records = vec![train(1), train(2), validation(2), sample(2), train(3), train(4), sample(4)];
        let mut log = MetricsLog::create(dir.path()).unwrap();
        for record in &records {
            log.append(record).unwrap();
        }
        let path = dir.path().join(FILE_NAME);
        (dir, path, records)
    }

    fn add(path: &Path, bytes: &[u8]) {
        OpenOptions::new().append(true).open(path).unwrap().write_all(bytes).unwrap();
    }

    #[test]
    fn records_come_back_as_they_were_written() {
        let (_dir, path, records) = run_of_four();
        assert_eq!(read(&path).unwrap(), records);
    }

    #[test]
    fn a_line_has_the_documented_keys() {
        let keys = |record: &Record| {
            let value = serde_json::to_value(record).unwrap();
            let mut keys: Vec<String> = value.as_object().unwrap().keys().cloned().collect();
            keys.sort();
            (value["kind"].as_str().unwrap().to_owned(), keys.join(" "))
        };
        let (kind, names) = keys(&train(1));
        assert_eq!(kind, "train");
        assert_eq!(names, "grad_norm kind loss lr memory seconds step tokens tokens_per_second update_norm");
        let (kind, names) = keys(&validation(1));
        assert_eq!(kind, "validation");
        assert_eq!(names, "batches kind loss seconds step tokens");
        let (kind, names) = keys(&sample(1));
        assert_eq!(kind, "sample");
        assert_eq!(names, "index kind prompt seconds step text tokens");
    }

    #[test]
    fn a_loss_that_is_not_finite_is_null_in_the_file_and_nan_when_read() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = MetricsLog::create(dir.path()).unwrap();
        let Record::Step(step) = train(1) else { unreachable!() };
        log.append(&Record::Step(StepRecord { loss: f64::NAN, grad_norm: f64::INFINITY, ..step })).unwrap();
        let path = dir.path().join(FILE_NAME);
        assert!(fs::read_to_string(&path).unwrap().contains(r#""loss":null"#));
        let Record::Step(step) = &read(&path).unwrap()[0] else { panic!("a validation") };
        assert!(step.loss.is_nan() && step.grad_norm.is_nan());
        assert_eq!(step.lr, 1e-3);
    }

    #[test]
    fn resume_drops_what_came_after_the_step_and_goes_on() {
        let (dir, path, records) = run_of_four();
        let before = fs::read_to_string(&path).unwrap();
        let mut log = MetricsLog::resume(dir.path(), 2).unwrap();
        assert_eq!(log.seconds(), 1.25);
        let kept = fs::read_to_string(&path).unwrap();
        assert_eq!(kept.lines().count(), 4);
        assert!(before.starts_with(&kept), "kept lines changed");
        log.append(&records[4]).unwrap();
        assert_eq!(read(&path).unwrap(), records[..5]);
        assert!(!dir.path().join(format!("{FILE_NAME}.partial")).exists());
    }

    #[test]
    fn a_torn_last_line_is_dropped() {
        let (dir, path, records) = run_of_four();
        add(&path, br#"{"kind":"train","step":5,"tok"#);
        assert_eq!(read(&path).unwrap(), records);
        let mut log = MetricsLog::resume(dir.path(), 9).unwrap();
        log.append(&train(5)).unwrap();
        assert_eq!(read(&path).unwrap()[5..], [train(4), sample(4), train(5)]);
    }

    #[test]
    fn a_bad_line_is_named_and_the_file_kept() {
        let (dir, path, _) = run_of_four();
        add(&path, b"{\"kind\":\"train\"}\n");
        add(&path, &[0xff, b'\n']);
        let before = fs::read(&path).unwrap();
        for error in [read(&path).unwrap_err(), MetricsLog::resume(dir.path(), 9).unwrap_err()] {
            let message = error.to_string();
            assert!(message.contains(FILE_NAME) && message.contains("line 8"), "{message}");
        }
        assert_eq!(fs::read(&path).unwrap(), before);
        assert!(!dir.path().join(format!("{FILE_NAME}.partial")).exists());
    }

    #[test]
    fn a_tail_gives_each_whole_line_once() {
        let (dir, path, records) = run_of_four();
        let mut tail = Tail::new(&path);
        assert_eq!(tail.news().unwrap(), records);
        assert_eq!(tail.news().unwrap(), []);
        let line = serde_json::to_vec(&train(5)).unwrap();
        add(&path, &line[..20]);
        assert_eq!(tail.news().unwrap(), []);
        add(&path, &line[20..]);
        add(&path, b"\n");
        assert_eq!(tail.news().unwrap(), [train(5)]);
        MetricsLog::resume(dir.path(), 2).unwrap();
        assert_eq!(tail.news().unwrap(), records[..4]);
        add(&path, b"not a record\n");
        assert!(tail.news().is_err());
    }

    #[test]
    fn create_replaces_nothing_and_resume_starts_a_missing_file() {
        let (dir, ..) = run_of_four();
        assert!(matches!(MetricsLog::create(dir.path()), Err(Error::Exists { .. })));
        let empty = tempfile::tempdir().unwrap();
        assert_eq!(MetricsLog::resume(empty.path(), 3).unwrap().seconds(), 0.0);
        assert!(read(&empty.path().join(FILE_NAME)).unwrap().is_empty());
    }
}
