//! Rotary position embedding (RoPE, arXiv 2104.09864), in the rotate-half form of Llama.

use super::attention::HeadShape;
use crate::backend::{Backend, Mut, Ref};

/// RoPE.
pub trait Rotary: Backend {
    /// Rotates the queries and keys of `qkv` in place. `qkv` is rows × [`HeadShape::row`]; row r stands at position
    /// `start + r % sequence`. In a head of size e, elements i and i + e/2 are turned by the angle of `table`, positions
    /// × e/2 × (cos, sin). `backward` turns the other way, which is the gradient.
    fn rotate(
        &self,
        qkv: Mut<'_, Self>,
        table: Ref<'_, Self>,
        shape: HeadShape,
        rows: usize,
        sequence: usize,
        start: usize,
        backward: bool,
    );
}
