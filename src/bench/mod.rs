//! Measurements of speed that anyone can repeat: each op, a training step, widening, sums over ranks, and tokenizing.

mod comm;
mod ops;
mod preset;
mod tokenize;
mod train;
mod upscale;

pub use comm::{CommBench, CommSpeed, SizeSpeed, comm};
pub use ops::{OpSpeed, OpsBench, OpsSpeed, ops};
pub use preset::Preset;
pub use tokenize::{TokenizeBench, TokenizeSpeed, tokenize};
pub use train::{Hotspot, TrainBench, TrainSpeed, train};
pub use upscale::{UpscaleBench, UpscaleSpeed, upscale};

use crate::{Error, Result};
use std::{
    fs,
    path::{Path, PathBuf},
};

/// A folder for a benchmark's files, removed at its end.
struct Folder(PathBuf);

impl Folder {
    /// The name of one in `place` that no other process uses. Whoever writes makes it.
    fn new(place: &Path) -> Result<Self> {
        fs::create_dir_all(place).map_err(Error::io("create", place))?;
        Ok(Self(place.join(format!("mupscale-bench-{}", std::process::id()))))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // What cannot be removed stays behind; the measurement stands all the same.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The middle value; the upper one of an even number of values. Infinite of none.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::INFINITY)
}
