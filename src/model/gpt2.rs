//! GPT-2 (Radford et al. 2019): LayerNorm, learned positions, GELU, tied embedding.

use super::spec::{Alphas, DecoderSpec, FeedForward, Positions};
use crate::{
    dims::Dims,
    ops::{activation::Activation, norm::NormKind},
};

/// What may be chosen of a GPT-2.
#[derive(Clone, Copy, Debug)]
pub struct Gpt2 {
    /// Biases of linear layers and norms.
    pub bias: bool,
    /// GELU's form.
    pub activation: Activation,
    /// Readout = token embedding.
    pub tied: bool,
}

/// The decoder that is a GPT-2 at this shape.
pub fn spec(dims: Dims, layers: usize, vocab: usize, context: usize, parts: Gpt2) -> DecoderSpec {
    DecoderSpec {
        arch: "gpt2".into(),
        dims,
        layers,
        vocab,
        context,
        norm: NormKind::Layer,
        norm_bias: parts.bias,
        norm_eps: 1e-5,
        positions: Positions::Learned,
        feed_forward: FeedForward::Plain { activation: parts.activation },
        qkv_bias: parts.bias,
        bias: parts.bias,
        qk_norm: false,
        tied: parts.tied,
        init_std: 0.02,
        alphas: Alphas::default(),
    }
}
