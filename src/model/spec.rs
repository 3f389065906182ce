//! What a model is: everything that fixes its function apart from the weights. Stored in checkpoints.

use crate::{
    Error, Result,
    dims::{Dims, MAX_LAYERS, MAX_SIZE, Width},
    mup::{AttentionRule, Parametrization, Rules},
    ops::{activation::Activation, norm::NormKind},
};
use serde::{Deserialize, Serialize};
use std::f64::consts::TAU;

/// An architecture at a shape.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "family", rename_all = "lowercase")]
pub enum Spec {
    /// A decoder-only transformer: gpt2 and llama are two choices of its parts.
    Decoder(DecoderSpec),
    /// A classifier on rows of numbers.
    Mlp(MlpSpec),
}

/// How a decoder knows where a token stands.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Positions {
    /// An embedding for each position.
    Learned,
    /// Rotary position embedding.
    Rope {
        /// θ: the slowest frequency is about 1 / θ.
        base: f64,
        /// Head size whose frequencies are used. Widening the head keeps it: frequency i of a head of size e is that of
        /// index i / (e / dim).
        dim: usize,
        /// How frequencies were changed for a longer context, if they were.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        scaling: Option<RopeScaling>,
    },
}

/// A change of RoPE's frequencies for a longer context, as models that others trained have it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum RopeScaling {
    /// All divided by `factor` (arXiv 2306.15595).
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3.1's: waves longer than `original_context / low` are divided by `factor`, those shorter than
    /// `original_context / high` stay, and between them the frequencies are interpolated.
    Llama3 {
        /// The divisor of the slowest.
        factor: f64,
        /// Waves of the original context below which a frequency is divided.
        low: f64,
        /// Waves of the original context above which a frequency stays.
        high: f64,
        /// Tokens of the context before.
        original_context: usize,
    },
}

impl RopeScaling {
    /// The changed frequency, in radians per token.
    pub fn apply(self, frequency: f64) -> f64 {
        match self {
            Self::Linear { factor } => frequency / factor,
            Self::Llama3 { factor, low, high, original_context } => {
                let waves = original_context as f64 * frequency / TAU;
                let kept = ((waves - low) / (high - low)).clamp(0.0, 1.0);
                frequency * (kept + (1.0 - kept) / factor)
            }
        }
    }

    fn check(self) -> Result<()> {
        match self {
            Self::Linear { factor } => positive("rope_scaling.factor", factor),
            Self::Llama3 { factor, low, high, original_context } => {
                positive("rope_scaling.factor", factor)?;
                positive("rope_scaling.low", low)?;
                positive("rope_scaling.high", high)?;
                size_of("rope_scaling.original_context", original_context)?;
                if high > low {
                    return Ok(());
                }
                Err(Error::config("model.rope_scaling.high", high, format!("must be over low, which is {low}")))
            }
        }
    }
}

impl Positions {
    /// RoPE's frequencies for a head of this size, one for each pair, in radians per token. A head of size e uses those
    /// of a head of size `dim`, base^(−2j/dim), each e/dim times.
    pub fn frequencies(&self, head_dim: usize) -> Option<Vec<f64>> {
        let Self::Rope { base, dim, scaling } = *self else { return None };
        let copies = head_dim / dim;
        let frequency = |i: usize| {
            let standard = base.powf(-((i / copies) as f64) / (dim / 2) as f64);
            scaling.map_or(standard, |scaling| scaling.apply(standard))
        };
        Some((0..head_dim / 2).map(frequency).collect())
    }
}

/// The MLP of a block.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum FeedForward {
    /// down(f(up(x))).
    Plain {
        /// f.
        activation: Activation,
    },
    /// SwiGLU: down(silu(gate(x)) · up(x)).
    Gated,
}

/// Fixed factors in the forward pass: μP's tunable α, Granite's multipliers. 1 unless chosen.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Alphas {
    /// On token embeddings.
    pub embedding: f64,
    /// On what each block's attention and MLP add to the residual stream.
    pub residual: f64,
    /// On attention scores.
    pub attention: f64,
    /// On logits.
    pub logits: f64,
}

impl Default for Alphas {
    fn default() -> Self {
        Self { embedding: 1.0, residual: 1.0, attention: 1.0, logits: 1.0 }
    }
}

/// A decoder-only transformer with pre-norm blocks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DecoderSpec {
    /// The name that the user chose: `gpt2` or `llama`.
    pub arch: String,
    /// Widths: residual, ffn, kv_heads, group, head_dim.
    pub dims: Dims,
    /// Blocks.
    pub layers: usize,
    /// Tokens of the vocabulary.
    pub vocab: usize,
    /// Longest sequence.
    pub context: usize,
    /// Norm of blocks and of the end.
    pub norm: NormKind,
    /// Whether norms have a bias.
    pub norm_bias: bool,
    /// Added to variances.
    pub norm_eps: f64,
    /// How positions enter.
    pub positions: Positions,
    /// The blocks' MLP.
    pub feed_forward: FeedForward,
    /// Whether Q, K and V have biases.
    pub qkv_bias: bool,
    /// Whether attention's output and the MLP have biases.
    pub bias: bool,
    /// Whether query and key heads are normalised (Qwen3).
    pub qk_norm: bool,
    /// Whether the readout is the token embedding.
    pub tied: bool,
    /// Standard deviation of initial matrices and embeddings, at the base shape.
    pub init_std: f64,
    /// Forward factors.
    pub alphas: Alphas,
}

/// A multilayer perceptron: input, hidden layers with ReLU, readout.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MlpSpec {
    /// Widths: hidden_1, hidden_2, …
    pub dims: Dims,
    /// Numbers of a row.
    pub inputs: usize,
    /// Classes.
    pub classes: usize,
    /// Whether layers have biases.
    pub bias: bool,
    /// Factor on initial standard deviations, which are √(2 / inputs) of a layer at the base shape (He, arXiv
    /// 1502.01852).
    pub init_gain: f64,
    /// Forward factor on logits.
    pub logits: f64,
}

impl Spec {
    /// The widths.
    pub fn dims(&self) -> &Dims {
        match self {
            Self::Decoder(d) => &d.dims,
            Self::Mlp(m) => &m.dims,
        }
    }

    /// The same model at other widths.
    pub fn with_dims(&self, dims: Dims) -> Self {
        let mut spec = self.clone();
        match &mut spec {
            Self::Decoder(d) => d.dims = dims,
            Self::Mlp(m) => m.dims = dims,
        }
        spec
    }

    /// Name of the architecture: `gpt2`, `llama` or `mlp`.
    pub fn arch(&self) -> &str {
        match self {
            Self::Decoder(d) => &d.arch,
            Self::Mlp(_) => "mlp",
        }
    }

    /// Classes of the readout: the vocabulary, or an mlp's classes.
    pub fn classes(&self) -> usize {
        match self {
            Self::Decoder(d) => d.vocab,
            Self::Mlp(m) => m.classes,
        }
    }

    /// Positions of one sample that bear a loss: the context, or 1.
    pub fn context(&self) -> usize {
        match self {
            Self::Decoder(d) => d.context,
            Self::Mlp(_) => 1,
        }
    }

    /// Refuses impossible shapes; the error names the field under `model`.
    pub fn check(&self) -> Result<()> {
        for (width, size) in self.dims().iter() {
            size_of(&width.to_string(), size)?;
        }
        match self {
            Self::Decoder(d) => d.check(),
            Self::Mlp(m) => m.check(),
        }
    }
}

/// Refuses a size that no model has; `field` lies under `model`.
pub fn size_of(field: &str, size: usize) -> Result<()> {
    at_most(MAX_SIZE, field, size)
}

fn at_most(largest: usize, field: &str, size: usize) -> Result<()> {
    if size == 0 || size > largest {
        return Err(Error::config(format!("model.{field}"), size, format!("must be between 1 and {largest}")));
    }
    Ok(())
}

fn positive(field: &str, value: f64) -> Result<()> {
    if value > 0.0 && value.is_finite() {
        return Ok(());
    }
    Err(Error::config(format!("model.{field}"), value, "must be a positive number"))
}

impl MlpSpec {
    fn check(&self) -> Result<()> {
        size_of("inputs", self.inputs)?;
        size_of("classes", self.classes)?;
        at_most(MAX_LAYERS, "hidden", self.dims.iter().count())?;
        positive("init_std", self.init_gain)?;
        positive("multipliers.logits", self.logits)
    }
}

impl DecoderSpec {
    /// Factor on attention scores.
    pub fn attention_scale(&self, scaling: &Scaling) -> f64 {
        self.alphas.attention * scaling.attention(&self.dims)
    }

    /// Factor on logits.
    pub fn readout_scale(&self, scaling: &Scaling) -> f64 {
        self.alphas.logits / self.dims.ratio(scaling.reference(&self.dims), Width::Residual)
    }

    fn check(&self) -> Result<()> {
        at_most(MAX_LAYERS, "layers", self.layers)?;
        size_of("vocab", self.vocab)?;
        size_of("context", self.context)?;
        let attention = [Width::KvHeads, Width::Group, Width::HeadDim].map(|w| self.dims.get(w) as u128);
        if attention.iter().product::<u128>() > MAX_SIZE as u128 {
            let why = format!("kv_heads × group × head_dim, {attention:?}, is over {MAX_SIZE}");
            return Err(Error::config("model.kv_heads", self.dims.get(Width::KvHeads), why));
        }
        if let Positions::Rope { base, dim, scaling } = self.positions {
            positive("rope_base", base)?;
            scaling.map_or(Ok(()), RopeScaling::check)?;
            let e = self.dims.get(Width::HeadDim);
            if !e.is_multiple_of(2) {
                return Err(Error::config("model.head_dim", e, "RoPE turns pairs: the head size must be even"));
            }
            if dim == 0 || !dim.is_multiple_of(2) || !e.is_multiple_of(dim) {
                let why = format!("must be even and divide head_dim, which is {e}");
                return Err(Error::config("model.rope_dim", dim, why));
            }
        }
        if !(self.norm_eps > 0.0 && self.norm_eps < 1.0) {
            return Err(Error::config("model.norm_eps", self.norm_eps, "must lie between 0 and 1, usually 1e-5"));
        }
        positive("init_std", self.init_std)?;
        let Alphas { embedding, residual, attention, logits } = self.alphas;
        positive("multipliers.embedding", embedding)?;
        positive("multipliers.residual", residual)?;
        positive("multipliers.attention", attention)?;
        positive("multipliers.logits", logits)
    }
}

/// A shape and what its hyperparameters are relative to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Scaling {
    /// Which rule.
    pub kind: Parametrization,
    /// The base shape: the one at which learning rate and initial values mean what the config says.
    pub base: Dims,
    /// Disputed rules, by name.
    #[serde(default, skip_serializing_if = "is_default")]
    pub rules: Rules,
}

fn is_default(rules: &Rules) -> bool {
    *rules == Rules::default()
}

impl Scaling {
    /// A base shape, with the default rules.
    pub fn new(kind: Parametrization, base: &Dims) -> Self {
        Self { kind, base: base.clone(), rules: Rules::default() }
    }

    /// The shape to which ratios are taken for a model of this shape: the base, or, in standard parametrisation, the
    /// shape itself.
    pub fn reference<'a>(&'a self, dims: &'a Dims) -> &'a Dims {
        match self.kind {
            Parametrization::Mup => &self.base,
            Parametrization::Standard => dims,
        }
    }

    /// Refuses a base that is no shape of this model.
    pub fn check(&self, spec: &Spec) -> Result<()> {
        if let Some((width, _)) = spec.dims().iter().find(|&(width, _)| !self.base.has(width)) {
            return Err(Error::config(format!("scaling.base.{width}"), "(absent)", "the base needs a size for it"));
        }
        for (width, size) in self.base.iter() {
            if !spec.dims().has(width) || size == 0 || size > MAX_SIZE {
                let why = format!("must be a positive size of a width that the model has: {}", spec.dims());
                return Err(Error::config(format!("scaling.base.{width}"), size, why));
            }
        }
        Ok(())
    }

    /// Whether the readout has a forward multiplier ∝ 1 / width.
    pub fn scaled_readout(&self) -> bool {
        self.kind == Parametrization::Mup
    }

    /// The factor on attention scores: 1/√e at the base shape, by default √e_base / e at others.
    pub fn attention(&self, dims: &Dims) -> f64 {
        let e = dims.get(Width::HeadDim) as f64;
        match self.rules.attention {
            AttentionRule::Inverse => (self.reference(dims).get(Width::HeadDim) as f64).sqrt() / e,
            AttentionRule::InverseSqrt => e.sqrt().recip(),
        }
    }

    /// Whether a head of another size changes what attention computes.
    pub fn fixes_head_dim(&self) -> bool {
        self.kind == Parametrization::Standard || self.rules.attention == AttentionRule::InverseSqrt
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llama3_scaling_keeps_fast_waves_and_divides_slow_ones() {
        let scaling = RopeScaling::Llama3 { factor: 8.0, low: 1.0, high: 4.0, original_context: 64 };
        let at = |waves: f64| scaling.apply(waves * TAU / 64.0) * 64.0 / TAU;
        assert_eq!(at(5.0), 5.0);
        assert!((at(0.5) - 0.5 / 8.0).abs() < 1e-15);
        // In the middle, half of either.
        assert!((at(2.5) - 2.5 * (0.5 + 0.5 / 8.0)).abs() < 1e-15);
        let refused = |low, high| RopeScaling::Llama3 { factor: 8.0, low, high, original_context: 64 }.check();
        assert!(refused(4.0, 4.0).unwrap_err().to_string().contains("rope_scaling.high = 4"));
    }

    #[test]
    fn what_was_stored_without_scaling_is_read() {
        let text = r#"{"kind":"rope","base":10000.0,"dim":4}"#;
        let positions: Positions = serde_json::from_str(text).unwrap();
        assert_eq!(positions, Positions::Rope { base: 1e4, dim: 4, scaling: None });
        assert_eq!(serde_json::to_string(&positions).unwrap(), text);
        assert_eq!(positions.frequencies(8).unwrap(), [1.0, 1.0, 0.01, 0.01]);
    }
}
