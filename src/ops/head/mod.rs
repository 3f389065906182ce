//! The readout with its cross-entropy: logits = scale · (x · Wᵀ) + b, taken in chunks of tokens so that all logits
//! never exist at once, and turned into their gradient where they lie.

mod cpu;
mod cuda;
#[cfg(test)]
mod tests;

use crate::backend::{Backend, Mut, Ref};

/// Sizes of a readout.
#[derive(Clone, Copy, Debug)]
pub struct ReadoutShape {
    /// Tokens.
    pub rows: usize,
    /// Input features.
    pub width: usize,
    /// Classes (vocabulary).
    pub classes: usize,
    /// Rows of the weight in memory, at least `classes`; what is beyond is zero, gets no probability and no gradient.
    pub padded: usize,
    /// Forward multiplier a of the readout.
    pub scale: f64,
}

/// Gradients of a readout, each overwritten.
pub struct ReadoutGradients<'a, B: Backend> {
    /// rows × width.
    pub dx: Mut<'a, B>,
    /// padded × width; its padding becomes zero.
    pub dweight: Mut<'a, B>,
    /// padded.
    pub dbias: Option<Mut<'a, B>>,
    /// Factor on the loss of each token: 1 / (tokens of the global step).
    pub scale: f64,
}

/// Readout and loss.
pub trait Head: Backend {
    /// Elements of scratch, in the compute type, that [`Head::cross_entropy`] needs: a chunk of logits and what belongs
    /// to it.
    fn cross_entropy_scratch(&self, shape: ReadoutShape) -> usize;

    /// losses[r] = −ln softmax(logits[r])[targets[r]] (statistics type; 0 where the target is negative: ignored), and
    /// with `gradients` those of scale · Σ losses. `x` is rows × width, `weight` padded × width, `bias` padded,
    /// `targets` i32, below `classes`; `scratch` has at least [`Head::cross_entropy_scratch`] elements, and its contents
    /// do not matter. Rows that are ignored get a gradient of zero and give none, whatever they hold.
    fn cross_entropy(
        &self,
        losses: Mut<'_, Self>,
        gradients: Option<ReadoutGradients<'_, Self>>,
        scratch: Mut<'_, Self>,
        x: Ref<'_, Self>,
        weight: Ref<'_, Self>,
        bias: Option<Ref<'_, Self>>,
        targets: Ref<'_, Self>,
        shape: ReadoutShape,
    );

    /// logits, rows × classes (dense, padding left out).
    fn logits(
        &self,
        logits: Mut<'_, Self>,
        x: Ref<'_, Self>,
        weight: Ref<'_, Self>,
        bias: Option<Ref<'_, Self>>,
        shape: ReadoutShape,
    );
}
