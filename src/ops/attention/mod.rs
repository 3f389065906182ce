//! Causal attention with grouped key/value heads; T × T scores never exist in memory.

mod cpu;
mod cuda;
#[cfg(test)]
mod tests;

use crate::backend::{Backend, Mut, Ref};

/// Heads of an attention layer. A token's projections lie side by side in one row: query heads `[kv_heads, group,
/// head_dim]`, key heads `[kv_heads, head_dim]`, value heads `[kv_heads, head_dim]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadShape {
    /// Key/value heads.
    pub kv_heads: usize,
    /// Query heads per key/value head.
    pub group: usize,
    /// Size of one head.
    pub head_dim: usize,
}

impl HeadShape {
    /// Elements of a token's queries (and of its attention output).
    pub fn queries(&self) -> usize {
        self.kv_heads * self.group * self.head_dim
    }

    /// Elements of a token's keys (and of its values).
    pub fn keys(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Elements of a token's row.
    pub fn row(&self) -> usize {
        self.queries() + 2 * self.keys()
    }
}

/// Sizes of an attention.
#[derive(Clone, Copy, Debug)]
pub struct AttentionShape {
    /// The heads.
    pub heads: HeadShape,
    /// Sequences.
    pub batch: usize,
    /// Queries of each sequence.
    pub queries: usize,
    /// Keys of each sequence. Query i stands at key position `keys - queries + i` and sees keys up to there.
    pub keys: usize,
    /// Factor on the scores.
    pub scale: f64,
}

/// Attention.
pub trait Attention: Backend {
    /// The largest size of a head.
    const LARGEST_HEAD: usize = usize::MAX;

    /// out = softmax(scale · q kᵀ, causal) · v. `out` is (batch · queries) × [`HeadShape::queries`].
    ///
    /// `q`, `k` and `v` are rows of `queries()`, `keys()` and `keys()` elements inside of wider ones (see [`Strided`]).
    /// `log_sum_exp`, (batch · queries) × query heads in the statistics type, is kept for backward. `first_key` (i32,
    /// batch · queries), if given, hides keys before that position of the sequence from a query; a query that sees no
    /// key at all gets out = 0, log_sum_exp = −∞ and no gradient. A hidden key has a probability of exactly zero.
    fn attention(
        &self,
        out: Mut<'_, Self>,
        log_sum_exp: Mut<'_, Self>,
        q: Strided<'_, Self>,
        k: Strided<'_, Self>,
        v: Strided<'_, Self>,
        first_key: Option<Ref<'_, Self>>,
        shape: AttentionShape,
    );

    /// dqkv from dout, for queries = keys. `qkv` and `dqkv` are (batch · queries) × [`HeadShape::row`], `dout` and `out`
    /// as in [`Attention::attention`]; dqkv is overwritten. Sums run in a fixed order.
    fn attention_backward(
        &self,
        dqkv: Mut<'_, Self>,
        dout: Ref<'_, Self>,
        out: Ref<'_, Self>,
        log_sum_exp: Ref<'_, Self>,
        qkv: Ref<'_, Self>,
        first_key: Option<Ref<'_, Self>>,
        shape: AttentionShape,
    );
}

/// Rows inside of wider ones: part of a fused projection, or of a key/value cache. Row r of sequence b starts at element
/// (b · rows + r) · stride.
pub struct Strided<'a, B: Backend> {
    /// From the first element of the first row on, at least to the last element of the last row.
    pub view: Ref<'a, B>,
    /// Elements from one row to the next.
    pub stride: usize,
    /// Rows from one sequence to the next, at least those that the op reads.
    pub rows: usize,
}
