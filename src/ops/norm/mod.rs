//! LayerNorm (arXiv 1607.06450) and RMSNorm (arXiv 1910.07467), fused with the residual add before them.

mod cpu;
mod cuda;
#[cfg(test)]
mod tests;

pub(super) use cpu::add_up;
pub(super) use cuda::add_up_partials;

use crate::backend::{Backend, Mut, Ref};
use serde::{Deserialize, Serialize};

/// Which norm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NormKind {
    /// (x − mean) / √(variance + eps) · gain + bias.
    Layer,
    /// x / √(mean of squares + eps) · gain.
    Rms,
}

/// Sizes of a norm.
#[derive(Clone, Copy, Debug)]
pub struct NormShape {
    /// Tokens.
    pub rows: usize,
    /// Elements that are normalised together.
    pub width: usize,
    /// Which norm.
    pub kind: NormKind,
    /// Added to the variance.
    pub eps: f64,
}

/// A branch to add to the residual stream before normalising.
pub struct Residual<'a, B: Backend> {
    /// The sum: `x + scale · branch`, rows × width.
    pub sum: Mut<'a, B>,
    /// What a block's attention or MLP returned, rows × width.
    pub branch: Ref<'a, B>,
    /// Multiplier of residual branches.
    pub scale: f64,
}

/// Norms over the last axis.
pub trait Norm: Backend {
    /// y = norm(x), or, with `residual`, first sum = x + scale · branch and then y = norm(sum).
    ///
    /// `statistics` is rows × 2 (mean, 1/deviation; mean 0 for RMSNorm) in the backend's statistics type, kept for
    /// backward. `bias` may be absent with either kind.
    fn norm(
        &self,
        y: Mut<'_, Self>,
        statistics: Mut<'_, Self>,
        x: Ref<'_, Self>,
        residual: Option<Residual<'_, Self>>,
        gain: Ref<'_, Self>,
        bias: Option<Ref<'_, Self>>,
        shape: NormShape,
    );

    /// Adds the gradient by the normalised input (`x`, or the sum) to `dx`, which already holds the gradient that
    /// flows past the norm (or, with `overwrite`, replaces it). dgain and dbias are overwritten; they are summed over
    /// fixed blocks of rows, then over blocks, in order.
    fn norm_backward(
        &self,
        dx: Mut<'_, Self>,
        dgain: Mut<'_, Self>,
        dbias: Option<Mut<'_, Self>>,
        dy: Ref<'_, Self>,
        x: Ref<'_, Self>,
        statistics: Ref<'_, Self>,
        gain: Ref<'_, Self>,
        shape: NormShape,
        overwrite: bool,
    );

    /// target = x + scale · branch, all of the same length.
    fn add(&self, target: Mut<'_, Self>, x: Ref<'_, Self>, branch: Ref<'_, Self>, scale: f64);

    /// x = scale · x.
    fn scale(&self, x: Mut<'_, Self>, scale: f64);
}
