//! TensorBoard's event files: the numbers and texts of `metrics.jsonl` once more, for `tensorboard --logdir RUN`.
//!
//! A file is a row of TFRecords, each an `Event` message in protobuf's wire format. Both are small enough to write by
//! hand. Sources: tensorflow/core/lib/io/record_writer.h (records), tensorboard/compat/proto/event.proto, summary.proto
//! and tensor.proto (field numbers), tensorboard/plugins/text/metadata.py (the name of texts).

use std::{
    fs::{self, File, OpenOptions},
    io::Write,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use super::metrics::{Record, SampleRecord};
use crate::{Error, Result};

/// How TensorBoard knows such a file.
const PREFIX: &str = "events.out.tfevents.";

/// An event file of a running run.
#[derive(Debug)]
pub(super) struct EventFile {
    path: PathBuf,
    file: File,
}

impl EventFile {
    /// A new file for a run that goes on after `step` (0 for a new run). Of what earlier files say, TensorBoard then
    /// forgets all later steps.
    pub(super) fn open(run_dir: &Path, step: u64) -> Result<Self> {
        // TensorBoard reads a folder's files by their names' order.
        let path = run_dir.join(format!("{PREFIX}{:010}.{step:08}", now() as u64));
        let file = OpenOptions::new().create(true).append(true).open(&path).map_err(Error::io("create", &path))?;
        let mut events = Self { path, file };
        events.write(Message::event(0).text(3, "brain.Event:2"))?;
        if step > 0 {
            let started = Message::default().varint(1, 1);
            events.write(Message::event(step + 1).message(7, &started))?;
        }
        Ok(events)
    }

    /// Writes one record, which other programs see at once.
    pub(super) fn append(&mut self, record: &Record) -> Result<()> {
        let mut summary = Message::default();
        for (tag, value) in scalars(record) {
            summary = summary.message(1, &Message::default().text(1, tag).float(2, value as f32));
        }
        if let Record::Sample(sample) = record {
            summary = summary.message(1, &written(sample));
        }
        self.write(Message::event(record.step()).message(5, &summary))
    }

    fn write(&mut self, event: Message) -> Result<()> {
        (&self.file).write_all(&framed(&event.0)).map_err(Error::io("write", &self.path))
    }
}

/// Removes the event files of a run that is made anew.
pub fn remove(run_dir: &Path) -> Result<()> {
    for entry in fs::read_dir(run_dir).map_err(Error::io("read", run_dir))? {
        let path = entry.map_err(Error::io("read", run_dir))?.path();
        if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(PREFIX)) {
            fs::remove_file(&path).map_err(Error::io("remove", &path))?;
        }
    }
    Ok(())
}

/// A record's numbers under TensorBoard's names: what stands before the slash is a group of charts.
fn scalars(record: &Record) -> Vec<(&'static str, f64)> {
    match record {
        Record::Step(r) => vec![
            ("train/loss", r.loss),
            ("train/lr", r.lr),
            ("train/grad_norm", r.grad_norm),
            ("train/update_norm", r.update_norm),
            ("speed/tokens_per_second", r.tokens_per_second),
            ("speed/memory_bytes", r.memory as f64),
            ("progress/tokens", r.tokens as f64),
        ],
        Record::Validation(r) => vec![("validation/loss", r.loss)],
        Record::Sample(_) => Vec::new(),
    }
}

/// A text, which TensorBoard shows under "Text": a tensor of one string, with the name of the plugin that reads it.
fn written(sample: &SampleRecord) -> Message {
    const STRING: u64 = 7;
    let one = Message::default().message(2, &Message::default().varint(1, 1));
    let text = format!("{}{}", sample.prompt, sample.text);
    let tensor = Message::default().varint(1, STRING).message(2, &one).text(8, &text);
    let plugin = Message::default().message(1, &Message::default().text(1, "text"));
    Message::default().text(1, &format!("samples/{}", sample.index)).message(8, &tensor).message(9, &plugin)
}

/// Seconds since 1970.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

/// A protobuf message under construction.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    /// An `Event` of this moment.
    fn event(step: u64) -> Self {
        let mut event = Self::default();
        event.key(1, 1);
        event.0.extend(now().to_le_bytes());
        event.varint(2, step)
    }

    /// A field's number and wire type.
    fn key(&mut self, field: u8, wire: u8) {
        self.0.push(field << 3 | wire);
    }

    fn length(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    fn varint(mut self, field: u8, value: u64) -> Self {
        self.key(field, 0);
        self.length(value);
        self
    }

    fn float(mut self, field: u8, value: f32) -> Self {
        self.key(field, 5);
        self.0.extend(value.to_le_bytes());
        self
    }

    fn bytes(mut self, field: u8, value: &[u8]) -> Self {
        self.key(field, 2);
        self.length(value.len() as u64);
        self.0.extend(value);
        self
    }

    fn text(self, field: u8, value: &str) -> Self {
        self.bytes(field, value.as_bytes())
    }

    fn message(self, field: u8, value: &Self) -> Self {
        self.bytes(field, &value.0)
    }
}

/// A TFRecord: the length, its checksum, the data, its checksum.
fn framed(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    [&length[..], &masked(crc32c(&length)).to_le_bytes(), data, &masked(crc32c(data)).to_le_bytes()].concat()
}

/// A checksum of data that may itself hold checksums.
fn masked(crc: u32) -> u32 {
    crc.rotate_right(15).wrapping_add(0xa282_ead8)
}

/// CRC-32C (Castagnoli; RFC 3720, appendix B.4), bit by bit: records are small.
fn crc32c(data: &[u8]) -> u32 {
    let step = |crc: u32, byte: &u8| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 })
    };
    !data.iter().fold(!0, step)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::metrics::ValidationRecord;

    #[test]
    fn checksums_are_those_of_the_standard() {
        // RFC 3720, appendix B.4, and the customary check value.
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn messages_are_in_wire_format() {
        // The examples of protobuf.dev/programming-guides/encoding: 150, a string, a submessage.
        assert_eq!(Message::default().varint(1, 150).0, [0x08, 0x96, 0x01]);
        assert_eq!(Message::default().text(2, "testing").0, b"\x12\x07testing");
        let inner = Message::default().varint(1, 150);
        assert_eq!(Message::default().message(3, &inner).0, [0x1a, 0x03, 0x08, 0x96, 0x01]);
    }

    /// The data of each record of a file, checksums checked.
    fn records(path: &Path) -> Vec<Vec<u8>> {
        let (content, mut at, mut found) = (fs::read(path).unwrap(), 0, Vec::new());
        while at < content.len() {
            let length = u64::from_le_bytes(content[at..at + 8].try_into().unwrap()) as usize;
            found.push(content[at + 12..at + 12 + length].to_vec());
            assert_eq!(content[at..at + 16 + length], framed(&found[found.len() - 1]));
            at += 16 + length;
        }
        found
    }

    #[test]
    fn a_file_opens_with_its_version_and_a_resumed_run_with_its_start() {
        let dir = tempfile::tempdir().unwrap();
        let fresh = EventFile::open(dir.path(), 0).unwrap();
        let mut resumed = EventFile::open(dir.path(), 7).unwrap();
        assert_ne!(fresh.path, resumed.path);
        let validation = ValidationRecord { step: 300, tokens: 5, loss: 1.5, batches: 1, seconds: 2.0 };
        resumed.append(&Record::Validation(validation)).unwrap();
        assert_eq!(records(&fresh.path).len(), 1);
        let written = records(&resumed.path);
        // Nine bytes of time, then the step.
        assert_eq!(written[0][9..], *b"\x10\x00\x1a\x0dbrain.Event:2");
        assert_eq!(written[1][9..], [0x10, 8, 0x3a, 2, 0x08, 1]);
        assert_eq!(written[2][9..], *b"\x10\xac\x02\x2a\x18\x0a\x16\x0a\x0fvalidation/loss\x15\0\0\xc0\x3f");
        remove(dir.path()).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
