//! `[init]`: how a run starts from a checkpoint, and `[init.upscale]`: widening on the way.

use crate::{
    Error, Result,
    dims::{Dims, Width},
};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// `[init]`: start from a checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InitConfig {
    /// The checkpoint, or a run folder, whose newest one is taken.
    pub from: PathBuf,
    /// Keep the source's step, schedule position and data cursor, instead of starting them anew.
    #[serde(default, rename = "continue")]
    pub keep_position: bool,
    /// Keep the optimizer's moments and t, or start them anew.
    #[serde(default)]
    pub moments: Moments,
    /// Widen on the way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upscale: Option<UpscaleConfig>,
}

/// What becomes of optimizer moments.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Moments {
    /// Taken over (widened exactly); Adam's t too.
    #[default]
    Keep,
    /// Zero; t starts anew.
    Reset,
}

/// Kind of symmetry-breaking noise (upscaling.md, "Noise").
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum NoiseKind {
    /// σ × the wide model's initial deviation, independent for each weight.
    #[default]
    Independent,
    /// As independent, less its mean over the copies of each input: the function is kept.
    Paired,
    /// σ × the tensor's own root mean square.
    Relative,
    /// The μpscaling code's: added before its 1/k rescale.
    Paper,
}

/// `[init.upscale]`, and the options of `mupscale upscale`: multiplicities and noise.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct UpscaleConfig {
    /// Residual, ffn and kv_heads (or all hidden layers) times this.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub width: Option<usize>,
    /// What `width` makes of heads: more of them, or larger ones.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub heads: Option<HeadGrowth>,
    /// Times residual.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub residual: Option<usize>,
    /// Times ffn.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ffn: Option<usize>,
    /// Times kv_heads.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kv_heads: Option<usize>,
    /// Times group.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group: Option<usize>,
    /// Times head_dim.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub head_dim: Option<usize>,
    /// Times each hidden layer of an mlp.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hidden: Option<Vec<usize>>,
    /// σ.
    pub noise: f64,
    /// What σ measures.
    pub noise_kind: NoiseKind,
    /// Seed of the noise.
    pub seed: u64,
}

/// What widening a whole model does to its heads. Both are exact.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum HeadGrowth {
    /// More heads of the same size.
    #[default]
    Count,
    /// As many heads, each larger (as the μpscaling code's GPT-2; the factor on scores then falls as 1/size).
    Size,
}

impl UpscaleConfig {
    /// Multiplicity of each width of a model of this shape.
    pub fn multiplicities(&self, dims: &Dims) -> Result<Dims> {
        let mut times = Dims::default();
        if let Some(k) = self.width {
            if k == 0 {
                return Err(Error::config("width", k, "a multiplicity must be 1 or more"));
            }
            let kept = match self.heads.unwrap_or_default() {
                HeadGrowth::Count => Width::HeadDim,
                HeadGrowth::Size => Width::KvHeads,
            };
            let widened = |w: Width| w != Width::Group && w != kept;
            dims.iter().filter(|&(w, _)| widened(w)).for_each(|(w, _)| times.set(w, k));
        }
        let unequal = [
            (Width::Residual, self.residual),
            (Width::Ffn, self.ffn),
            (Width::KvHeads, self.kv_heads),
            (Width::Group, self.group),
            (Width::HeadDim, self.head_dim),
        ];
        for (width, k) in unequal {
            k.into_iter().for_each(|k| times.set(width, k));
        }
        for (i, &k) in self.hidden.iter().flatten().enumerate() {
            times.set(Width::Hidden(u16::try_from(i + 1).unwrap_or(u16::MAX)), k);
        }
        if times.iter().next().is_none() {
            let why = "nothing to widen: give a width, for example width = 2 (or --width 2)";
            return Err(Error::config("init.upscale", "", why));
        }
        if !(self.noise >= 0.0 && self.noise.is_finite()) {
            return Err(Error::config("noise", self.noise, "σ must be 0 or a positive number"));
        }
        dims.times(&times)?;
        Ok(times)
    }
}
