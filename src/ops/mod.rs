//! The operations, one file each: contract (a small trait with its shapes), CPU implementation, tests.
//!
//! Ops write into memory that they are given, allocate nothing, and return nothing: a device reports its faults when
//! the host synchronises. Arguments are the same at every step; what changes lies in [`scalars::StepScalars`]. Shapes
//! are the caller's promise: a wrong one is an error of ours and panics.
//!
//! Names: `_rc` would be a rows × columns matrix, row-major and dense unless a stride is given; `d` before a name is
//! the loss's gradient by it. "accumulate" adds to what the output holds; otherwise it is overwritten.

pub mod activation;
pub mod attention;
mod convert;
pub mod embedding;
pub mod expand;
pub mod gradient;
pub mod head;
pub mod head_norm;
pub mod linear;
pub mod linear_activation;
pub mod muon;
pub mod norm;
pub mod optimizer;
pub mod pieces;
pub mod rotary;
pub mod scalars;
mod softmax;
mod stochastic;

#[cfg(test)]
mod tests;

use crate::backend::Backend;

/// All operations: what a backend must offer to train every architecture with every optimizer.
pub trait Ops:
    Backend
    + activation::Activate
    + attention::Attention
    + embedding::Embedding
    + expand::Expand
    + gradient::Gradient
    + head::Head
    + head_norm::HeadNorm
    + linear::Linear
    + linear_activation::LinearActivation
    + muon::Muon
    + norm::Norm
    + optimizer::Optimizer
    + rotary::Rotary
{
}

impl<B> Ops for B where
    B: Backend
        + activation::Activate
        + attention::Attention
        + embedding::Embedding
        + expand::Expand
        + gradient::Gradient
        + head::Head
        + head_norm::HeadNorm
        + linear::Linear
        + linear_activation::LinearActivation
        + muon::Muon
        + norm::Norm
        + optimizer::Optimizer
        + rotary::Rotary
{
}
