//! RMSNorm of each query and key head with one gain for all query heads and one for all key heads (Qwen3).

use super::attention::HeadShape;
use crate::backend::{Backend, Mut, Ref};

/// Q/K norm.
pub trait HeadNorm: Backend {
    /// out = qkv with each query head and key head normalised and multiplied by its gain; values are copied.
    /// `qkv` and `out` are rows × [`HeadShape::row`], `statistics` rows × (heads + kv_heads): 1/deviation.
    fn head_norm(
        &self,
        out: Mut<'_, Self>,
        statistics: Mut<'_, Self>,
        qkv: Ref<'_, Self>,
        q_gain: Ref<'_, Self>,
        k_gain: Ref<'_, Self>,
        shape: HeadShape,
        eps: f64,
    );

    /// Turns the gradient by `out` into the gradient by `qkv`, in place; dq_gain and dk_gain are overwritten, summed in
    /// a fixed order.
    fn head_norm_backward(
        &self,
        d: Mut<'_, Self>,
        dq_gain: Mut<'_, Self>,
        dk_gain: Mut<'_, Self>,
        qkv: Ref<'_, Self>,
        statistics: Ref<'_, Self>,
        q_gain: Ref<'_, Self>,
        k_gain: Ref<'_, Self>,
        shape: HeadShape,
    );
}
