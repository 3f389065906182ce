//! Checkpoints: folders of named tensors and JSON documents, format 1.
//!
//! | file | content |
//! |---|---|
//! | `model.safetensors`, `optimizer.safetensors` | the tensors' elements, each an ordinary safetensors file |
//! | `config.json`, `state.json`, others | documents that belong to the caller |
//! | `index.json` | for each logical tensor its dtype, shape, axes, and the pieces (file, flat start, length) it lies in |
//! | `manifest.json` | the size of every other file and BLAKE3 checksums that cover all their bytes, then its own |
//!
//! A [`Writer`] fills a hidden folder beside the target: files, fsync, manifest, fsync, then one rename, fsync of the
//! parent. So a folder under its own name is complete, whenever the writer died. A [`Reader`] distrusts every field,
//! maps the files into memory and lends ranges of tensors. [`Store`] keeps a run's checkpoints in order.
//!
//! Checksums are those of *spans*, stretches of a file as they were written: a tensor filled from front to back is
//! one span, a tensor filled by many threads in any order is as many as there were beginnings. So no byte is read again
//! to be checked in. Spans lie end to end and cover each file, and [`Reader::verify`] hashes them in parallel.
//!
//! Several processes can write one checkpoint: its owner makes the files, all write elements at their places in them,
//! and the owner commits once the others have said what they wrote ([`Writer::join`]).
//!
//! This module knows bytes, names and documents; it knows no model, device, configuration or rank.

mod disk;
mod format;
mod header;
mod merge;
mod place;
mod read;
mod store;
mod write;

#[cfg(test)]
mod tests;

pub use format::{Axis, Block, TensorMeta};
pub use merge::merge;
pub use read::Reader;
pub use store::Store;
pub use write::Writer;

/// The model's configuration.
pub const CONFIG: &str = "config.json";
/// Weights.
pub const MODEL: &str = "model.safetensors";
/// Moments of the optimizer, and whatever else it keeps per parameter.
pub const OPTIMIZER: &str = "optimizer.safetensors";
/// Step, tokens, data cursor, seeds, schedule, base shape, versions.
pub const STATE: &str = "state.json";
/// Where each logical tensor lies.
pub const INDEX: &str = "index.json";
/// Sizes and checksums, written last: a folder without it is no checkpoint.
pub const MANIFEST: &str = "manifest.json";
/// The version of the format that this crate writes, and the newest that it reads.
pub const FORMAT: u32 = 1;
