//! Text, tokens and batches.

pub mod synth;
