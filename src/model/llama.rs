//! Llama (arXiv 2302.13971) and its kin: RMSNorm, RoPE, SwiGLU, grouped K/V heads; Qwen2's QKV bias, Qwen3's Q/K norm.

use super::spec::{Alphas, DecoderSpec, FeedForward, Positions};
use crate::{
    dims::{Dims, Width},
    ops::norm::NormKind,
};

/// What may be chosen of a Llama.
#[derive(Clone, Copy, Debug)]
pub struct Llama {
    /// Biases of Q, K and V.
    pub qkv_bias: bool,
    /// Norm of query and key heads.
    pub qk_norm: bool,
    /// Readout = token embedding.
    pub tied: bool,
    /// θ of RoPE.
    pub rope_base: f64,
    /// Head size whose frequencies RoPE uses; the head size itself if not given.
    pub rope_dim: Option<usize>,
}

/// The decoder that is a Llama at this shape.
pub fn spec(dims: Dims, layers: usize, vocab: usize, context: usize, parts: Llama) -> DecoderSpec {
    let dim = parts.rope_dim.unwrap_or(dims.get(Width::HeadDim));
    DecoderSpec {
        arch: "llama".into(),
        dims,
        layers,
        vocab,
        context,
        norm: NormKind::Rms,
        norm_bias: false,
        norm_eps: 1e-5,
        positions: Positions::Rope { base: parts.rope_base, dim, scaling: None },
        feed_forward: FeedForward::Gated,
        qkv_bias: parts.qkv_bias,
        bias: false,
        qk_norm: parts.qk_norm,
        tied: parts.tied,
        init_std: 0.02,
        alphas: Alphas::default(),
    }
}
