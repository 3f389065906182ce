//! `[model]`: from what the user writes to a [`Spec`].

use crate::{
    Error, Result,
    dims::{Dims, Width},
    model::{
        gpt2::{self, Gpt2},
        llama::{self, Llama},
        spec::{Alphas, DecoderSpec, MlpSpec, Spec, size_of},
    },
    ops::activation::Activation,
};
use serde::{Deserialize, Serialize};

/// Architectures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Arch {
    /// LayerNorm, learned positions, GELU, tied embedding.
    Gpt2,
    /// RMSNorm, RoPE, SwiGLU, grouped K/V heads.
    Llama,
    /// Input, hidden layers with ReLU, readout.
    Mlp,
}

/// `[model]`. Which keys apply depends on `arch`; a key that does not apply is an error.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// The architecture.
    pub arch: Arch,
    /// Blocks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layers: Option<usize>,
    /// Model width.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub residual: Option<usize>,
    /// Hidden width of the MLP; 4 × residual if left out (llama: 8/3 × residual, rounded up to a multiple of 8).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ffn: Option<usize>,
    /// Key/value heads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_heads: Option<usize>,
    /// Query heads per key/value head; 1 if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<usize>,
    /// Size of a head; residual / (kv_heads × group) if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub head_dim: Option<usize>,
    /// Longest sequence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub context: Option<usize>,
    /// Tokens; the dataset's if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vocab: Option<usize>,
    /// gpt2, mlp: biases. True if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bias: Option<bool>,
    /// llama: biases of Q, K and V.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub qkv_bias: Option<bool>,
    /// llama: norm of query and key heads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub qk_norm: Option<bool>,
    /// Readout = token embedding. gpt2: true if left out; llama: false.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tied: Option<bool>,
    /// gpt2: `gelu-tanh` or `gelu-exact`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub activation: Option<Activation>,
    /// llama: θ of RoPE; 10000 if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_base: Option<f64>,
    /// llama: head size whose frequencies RoPE uses; head_dim if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_dim: Option<usize>,
    /// Added to variances in norms; 1e-5 if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub norm_eps: Option<f64>,
    /// Deviation of initial matrices and embeddings at the base shape; 0.02 if left out. mlp: factor on √(2/inputs).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init_std: Option<f64>,
    /// mlp: widths of the hidden layers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hidden: Option<Vec<usize>>,
    /// Fixed factors in the forward pass.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub multipliers: Option<Alphas>,
}

impl ModelConfig {
    /// Hidden width of a decoder's MLP, for a residual stream of this width where it is not given.
    pub fn hidden_width(&self, residual: usize) -> usize {
        self.ffn.unwrap_or(match self.arch {
            Arch::Llama => (residual * 8).div_ceil(3).next_multiple_of(8),
            Arch::Gpt2 | Arch::Mlp => 4 * residual,
        })
    }
}

/// What the data says of a model.
#[derive(Clone, Copy, Debug)]
pub enum DataShape {
    /// Tokens of a vocabulary.
    Tokens {
        /// Its size.
        vocab: usize,
    },
    /// Rows of numbers.
    Rows {
        /// Numbers of a row.
        inputs: usize,
        /// Classes.
        classes: usize,
    },
}

/// The model that a configuration and a dataset describe, checked.
pub fn resolve_model(config: &ModelConfig, data: DataShape) -> Result<Spec> {
    let spec = match (config.arch, data) {
        (Arch::Mlp, DataShape::Rows { inputs, classes }) => Spec::Mlp(mlp(config, inputs, classes)?),
        (Arch::Gpt2 | Arch::Llama, DataShape::Tokens { vocab }) => Spec::Decoder(decoder(config, vocab)?),
        (Arch::Mlp, _) => {
            let why = "an mlp reads rows of numbers: data.path must be a .csv or .npy file";
            return Err(Error::config("model.arch", "mlp", why));
        }
        _ => {
            let why = "a language model reads tokens: data.path must be a dataset folder or a .bin shard (see `mupscale data tokenize`)";
            return Err(Error::config("model.arch", format!("{:?}", config.arch).to_lowercase(), why));
        }
    };
    spec.check()?;
    Ok(spec)
}

/// Refuses keys that the architecture does not have.
fn refuse(config: &ModelConfig, keys: &[&str]) -> Result<()> {
    let written = toml::Table::try_from(config).unwrap_or_default();
    for key in keys {
        if let Some(value) = written.get(*key) {
            let arch = format!("{:?}", config.arch).to_lowercase();
            return Err(Error::config(format!("model.{key}"), value, format!("{arch} has no such part: leave it out")));
        }
    }
    Ok(())
}

fn needed(field: &str, value: Option<usize>) -> Result<usize> {
    value.ok_or_else(|| Error::config(format!("model.{field}"), "(absent)", "is needed: give it in [model]"))
}

fn decoder(c: &ModelConfig, vocab: usize) -> Result<DecoderSpec> {
    let llama = c.arch == Arch::Llama;
    refuse(
        c,
        if llama {
            &["bias", "activation", "hidden"]
        } else {
            &["qkv_bias", "qk_norm", "rope_base", "rope_dim", "hidden"]
        },
    )?;
    let (residual, kv_heads) = (needed("residual", c.residual)?, needed("kv_heads", c.kv_heads)?);
    // Before other sizes are computed from it.
    size_of("residual", residual)?;
    let group = c.group.unwrap_or(1);
    let heads = kv_heads.checked_mul(group).filter(|&h| h > 0);
    let heads = heads.ok_or_else(|| {
        Error::config("model.kv_heads", kv_heads, "kv_heads × group must be 1 or more, and not beyond all machines")
    })?;
    let head_dim = match c.head_dim {
        Some(e) => e,
        None if residual.is_multiple_of(heads) => residual / heads,
        None => {
            let why =
                format!("does not divide into {heads} heads: choose a multiple of {heads}, or give model.head_dim");
            return Err(Error::config("model.residual", residual, why));
        }
    };
    let ffn = c.hidden_width(residual);
    let dims = Dims::from_iter([
        (Width::Residual, residual),
        (Width::Ffn, ffn),
        (Width::KvHeads, kv_heads),
        (Width::Group, group),
        (Width::HeadDim, head_dim),
    ]);
    let vocab = match c.vocab {
        Some(v) if v < vocab => {
            return Err(Error::config(
                "model.vocab",
                v,
                format!("the dataset's vocabulary is {vocab}: give at least that"),
            ));
        }
        other => other.unwrap_or(vocab),
    };
    let (layers, context) = (needed("layers", c.layers)?, needed("context", c.context)?);
    let mut spec = if llama {
        let parts = Llama {
            qkv_bias: c.qkv_bias.unwrap_or(false),
            qk_norm: c.qk_norm.unwrap_or(false),
            tied: c.tied.unwrap_or(false),
            rope_base: c.rope_base.unwrap_or(10_000.0),
            rope_dim: c.rope_dim,
        };
        llama::spec(dims, layers, vocab, context, parts)
    } else {
        let activation = c.activation.unwrap_or(Activation::GeluTanh);
        gpt2::spec(
            dims,
            layers,
            vocab,
            context,
            Gpt2 { bias: c.bias.unwrap_or(true), activation, tied: c.tied.unwrap_or(true) },
        )
    };
    spec.norm_eps = c.norm_eps.unwrap_or(spec.norm_eps);
    spec.init_std = c.init_std.unwrap_or(spec.init_std);
    spec.alphas = c.multipliers.unwrap_or_default();
    Ok(spec)
}

fn mlp(c: &ModelConfig, inputs: usize, classes: usize) -> Result<MlpSpec> {
    let keys = [
        "layers",
        "residual",
        "ffn",
        "kv_heads",
        "group",
        "head_dim",
        "context",
        "vocab",
        "qkv_bias",
        "qk_norm",
        "tied",
        "activation",
        "rope_base",
        "rope_dim",
        "norm_eps",
    ];
    refuse(c, &keys)?;
    let hidden = c.hidden.as_deref().unwrap_or_default();
    if hidden.is_empty() {
        return Err(Error::config(
            "model.hidden",
            "(absent)",
            "is needed: the widths of the hidden layers, for example [64, 64]",
        ));
    }
    let dims = hidden.iter().enumerate().map(|(i, &n)| (Width::Hidden(i as u16 + 1), n)).collect();
    let logits = c.multipliers.unwrap_or_default().logits;
    Ok(MlpSpec { dims, inputs, classes, bias: c.bias.unwrap_or(true), init_gain: c.init_std.unwrap_or(1.0), logits })
}
