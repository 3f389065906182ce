//! Measurements of speed that anyone can repeat: a training step, and widening.

mod train;
mod upscale;

pub use train::{Place, Preset, TrainSpeed, train};
pub use upscale::{UpscaleBench, UpscaleSpeed, upscale};

/// The middle value; the upper one of an even number of values. Infinite of none.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::INFINITY)
}
