//! Token and position embeddings.

use crate::backend::{Backend, Mut, Ref};

/// Sizes of an embedding.
#[derive(Clone, Copy, Debug)]
pub struct EmbeddingShape {
    /// Tokens: batch × sequence.
    pub rows: usize,
    /// Residual width.
    pub width: usize,
    /// Tokens of one sequence: row r stands at position `start + r % sequence`.
    pub sequence: usize,
    /// Position of the first token of each sequence (not 0 when generating with a cache).
    pub start: usize,
    /// Forward multiplier of the token embedding.
    pub scale: f64,
}

/// Embeddings.
pub trait Embedding: Backend {
    /// x[r] = scale · weight[tokens[r]] + positions[start + r % sequence].
    ///
    /// `x` is rows × width, `tokens` i32, each inside `weight`'s rows; without `positions` the second term is absent.
    fn embed(
        &self,
        x: Mut<'_, Self>,
        tokens: Ref<'_, Self>,
        weight: Ref<'_, Self>,
        positions: Option<Ref<'_, Self>>,
        shape: EmbeddingShape,
    );

    /// dweight[t] (+)= scale · Σ over r with tokens[r] = t of dx[r], in the order of r; without `accumulate` rows of
    /// tokens that do not occur become zero. dpositions[p] = Σ of dx[r] at position p, overwritten, zero beyond
    /// `sequence`; `start` is 0.
    fn embed_backward(
        &self,
        dweight: Mut<'_, Self>,
        dpositions: Option<Mut<'_, Self>>,
        dx: Ref<'_, Self>,
        tokens: Ref<'_, Self>,
        shape: EmbeddingShape,
        accumulate: bool,
    );
}
