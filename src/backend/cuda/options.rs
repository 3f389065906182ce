//! What a user decides about a GPU.

use crate::DType;

/// How a GPU is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Number among the visible GPUs.
    pub ordinal: u32,
    /// Type of activations and working weights: f32 or bf16.
    pub compute: DType,
    /// Type of the gradients of parameters: f32, or bf16 where `compute` is.
    pub gradient: DType,
    /// Type of moments: f32, or bf16, rounded stochastically.
    pub moment: DType,
    /// Launch every kernel by itself instead of replaying recorded steps.
    pub eager: bool,
    /// Measure the algorithms of matrix products instead of taking the library's word.
    pub autotune: bool,
    /// Apply GELU and sum the gradients of biases in kernels of our own instead of in matrix products.
    pub unfused: bool,
}
