//! Measurements of speed that anyone can repeat: each op, a training step, widening, and sums over ranks.

mod comm;
mod ops;
mod preset;
mod train;
mod upscale;

pub use comm::{CommBench, CommSpeed, SizeSpeed, comm};
pub use ops::{OpSpeed, OpsBench, OpsSpeed, ops};
pub use preset::Preset;
pub use train::{Hotspot, TrainBench, TrainSpeed, train};
pub use upscale::{UpscaleBench, UpscaleSpeed, upscale};

/// The middle value; the upper one of an even number of values. Infinite of none.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::INFINITY)
}
