//! A small key/value store over TCP, through which the processes of a run find each other and wait for each other.
//!
//! One process runs a [`Server`] (the launcher's agent, or rank 0 under another launcher); all others, and it, are
//! [`Client`]s. A run has a token, and a client with another one is refused: it belongs to a run that is over. The
//! token tells runs apart; it is no secret, and the store is for networks whose members trust each other.
//!
//! A frame is its length (u32, little-endian), a kind (one byte), and fields, each with its length (u32). Lengths are
//! checked before memory is taken for them, and no frame is longer than [`MAX_FRAME`].

mod client;
mod server;
#[cfg(test)]
mod tests;

pub use client::{Client, Lease};
pub(super) use client::{Refusal, name_ranks};
pub use server::Server;

use std::{
    io::{self, Read, Write},
    time::Duration,
};

/// Longest frame, in bytes.
pub const MAX_FRAME: usize = 4 << 20;
/// Longest key, in bytes.
pub const MAX_KEY: usize = 1 << 10;
/// Bytes of keys and values that a server holds at most.
pub const MAX_HELD: usize = 256 << 20;
/// Fields of a frame at most.
const MAX_FIELDS: usize = 1 << 16;
/// Longest first frame: nobody has shown a token yet.
const MAX_HELLO: usize = 4 << 10;
/// What a client says first, with the token.
const MAGIC: &[u8] = b"mupscale store 1";
/// A server answers a waiting client at least this often, so each soon knows when the other is gone.
const SLICE: Duration = Duration::from_secs(1);

/// What a client asks.
mod ask {
    pub const SET: u8 = 1;
    pub const LOOK: u8 = 2;
    pub const ADD: u8 = 3;
    pub const SWAP: u8 = 4;
    pub const WAIT: u8 = 5;
    pub const WATCH: u8 = 6;
    pub const DELETE: u8 = 7;
    pub const KEYS: u8 = 8;
    pub const LEASE: u8 = 9;
    pub const HEARTBEAT: u8 = 10;
}

/// What a server answers.
mod answer {
    pub const DONE: u8 = 0;
    /// One field: why not.
    pub const REFUSED: u8 = 1;
    /// The token is another run's. One field: this run's.
    pub const STRANGER: u8 = 2;
}

/// A message: its kind and fields.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Frame {
    pub kind: u8,
    pub fields: Vec<Vec<u8>>,
}

/// Writes a frame at once.
pub(super) fn write_frame(to: &mut impl Write, kind: u8, fields: &[&[u8]]) -> io::Result<()> {
    let length = 1 + fields.iter().map(|field| 4 + field.len()).sum::<usize>();
    if length > MAX_FRAME || fields.len() > MAX_FIELDS {
        let why = format!("a message of {length} bytes: at most {MAX_FRAME} are sent");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
    }
    let mut bytes = Vec::with_capacity(4 + length);
    bytes.extend((length as u32).to_le_bytes());
    bytes.push(kind);
    for field in fields {
        bytes.extend((field.len() as u32).to_le_bytes());
        bytes.extend(*field);
    }
    to.write_all(&bytes)
}

/// Reads a frame of at most `limit` bytes. Memory is taken as bytes arrive, not as a length promises.
pub(super) fn read_frame(from: &mut impl Read, limit: usize) -> io::Result<Frame> {
    let bad = |why: String| io::Error::new(io::ErrorKind::InvalidData, why);
    let mut length = [0; 4];
    from.read_exact(&mut length)?;
    let length = u32::from_le_bytes(length) as usize;
    if length == 0 || length > limit {
        return Err(bad(format!("a message of {length} bytes; from 1 to {limit} are allowed")));
    }
    let mut bytes = Vec::new();
    from.take(length as u64).read_to_end(&mut bytes)?;
    if bytes.len() < length {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let kind = bytes[0];
    let (mut rest, mut fields) = (&bytes[1..], Vec::new());
    while let Some((size, after)) = rest.split_first_chunk::<4>() {
        let size = u32::from_le_bytes(*size) as usize;
        if fields.len() == MAX_FIELDS {
            return Err(bad(format!("a message of more than {MAX_FIELDS} fields")));
        }
        let field = after.get(..size).ok_or_else(|| bad(format!("a field of {size} bytes is cut short")))?;
        fields.push(field.to_vec());
        rest = &after[size..];
    }
    if !rest.is_empty() {
        return Err(bad("a field without its length".into()));
    }
    Ok(Frame { kind, fields })
}

/// A number as a field.
fn number(value: i64) -> [u8; 8] {
    value.to_le_bytes()
}

/// A time as a field: milliseconds.
fn milliseconds(time: Duration) -> [u8; 8] {
    number(i64::try_from(time.as_millis()).unwrap_or(i64::MAX))
}

/// The number in a field.
fn as_number(field: &[u8]) -> Option<i64> {
    field.try_into().ok().map(i64::from_le_bytes)
}

/// The time in a field; none if it holds no sensible one.
fn as_time(field: &[u8]) -> Duration {
    let milliseconds = as_number(field).and_then(|number| u64::try_from(number).ok());
    Duration::from_millis(milliseconds.unwrap_or_default())
}
