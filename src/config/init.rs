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
    /// Taken over for the units that were there, zero for their new copies; t too. It needs a learning rate that is
    /// warmed up again. (After SPARKLING, arXiv 2602.02472, which resets what is new and warms up the rate of what is
    /// new; the rate here is that of the whole model.)
    Asymmetric,
}

/// What becomes of a tensor when the model grows: each a choice of index maps and factors for one expansion.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum GrowthMethod {
    /// Every unit repeated; exact for the whole of training without noise (arXiv 2602.10545).
    #[default]
    Mupscale,
    /// Every unit repeated, with noise that cancels over the copies of an input (HyperCloning, arXiv 2409.12903).
    Hypercloning,
    /// Units copied at random, what reads them divided by the number of copies (Net2Net, arXiv 1511.05641).
    Net2net,
    /// Every unit repeated, the new copies with the weights of the block above (bert2BERT's AKI, arXiv 2110.07143).
    Aki,
    /// New units are zero, all then perturbed by the noise (arXiv 2605.13405 studies such an operator).
    Zero,
    /// The whole stack of blocks repeated `layers` times (G_stack, arXiv 2405.15319).
    Stack,
    /// After each block `layers` − 1 copies of it that add nothing yet (LLaMA-Pro, arXiv 2401.02415, which trains those
    /// alone; here all is trained).
    LlamaPro,
}

impl GrowthMethod {
    /// Whether it makes more blocks.
    pub fn deepens(self) -> bool {
        matches!(self, Self::Stack | Self::LlamaPro)
    }

    /// The name in configurations.
    pub fn name(self) -> String {
        clap::ValueEnum::to_possible_value(&self).map_or(String::new(), |value| value.get_name().into())
    }
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
    /// What becomes of each tensor.
    pub method: GrowthMethod,
    /// Times the blocks, for the methods that make more of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers: Option<usize>,
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
        if times.iter().next().is_none() && self.layers.is_none() {
            let why = "nothing to grow: give a width, for example width = 2 (or --width 2)";
            return Err(Error::config("init.upscale", "", why));
        }
        if !(self.noise >= 0.0 && self.noise.is_finite()) {
            return Err(Error::config("noise", self.noise, "σ must be 0 or a positive number"));
        }
        dims.times(&times)?;
        Ok(times)
    }
}
