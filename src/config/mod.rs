//! A run's configuration: what the user writes (TOML, `--set`), checked and resolved before anything happens.
//!
//! [`Config`] mirrors the file, with defaults. [`ConfigText`] reads it; unknown keys are errors that name the nearest
//! known one. What depends on data or on a checkpoint (vocabulary, shape) is resolved by [`crate::run`].

mod model;
mod read;
#[cfg(test)]
mod tests;

pub use model::{Arch, DataShape, ModelConfig, resolve_model};
pub use read::{ConfigText, set_value};

use crate::{
    Error, Result,
    dims::{Dims, Width},
    model::decoder::Recompute,
    mup::Parametrization,
    ops::optimizer::Method,
};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Everything about a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Run folder: everything that the run writes.
    pub run: PathBuf,
    /// Optimizer steps of the run.
    pub steps: u64,
    /// `auto`, `cpu` or `cuda`.
    #[serde(default)]
    pub device: Device,
    /// CPU threads; 0: all cores.
    #[serde(default)]
    pub threads: usize,
    /// Type that the CPU computes in.
    #[serde(default)]
    pub precision: Precision,
    /// Seed of initial values and, unless given there, of the data order.
    #[serde(default = "one")]
    pub seed: u64,
    /// The network; may be left out where `init.from` brings one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<ModelConfig>,
    /// How hyperparameters depend on width; a checkpoint that the run starts from brings its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parametrization: Option<ParametrizationConfig>,
    /// Where samples come from.
    pub data: DataConfig,
    /// Samples of a step.
    #[serde(default)]
    pub batch: BatchConfig,
    /// The update.
    #[serde(default)]
    pub optimizer: OptimizerConfig,
    /// Learning rate over time.
    #[serde(default)]
    pub schedule: ScheduleConfig,
    /// How the run starts: from new weights if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init: Option<InitConfig>,
    /// What is saved.
    #[serde(default)]
    pub checkpoint: CheckpointConfig,
    /// What is measured on held-out data.
    #[serde(default)]
    pub validation: ValidationConfig,
    /// What is kept and what computed again.
    #[serde(default)]
    pub memory: MemoryConfig,
    /// At a loss or gradient that is not finite.
    #[serde(default)]
    pub on_nan: OnNan,
}

fn one() -> u64 {
    1
}

/// Where to compute.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Device {
    /// A GPU if there is one that works, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
}

/// Type of weights, activations and moments on the CPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 32-bit floats.
    #[default]
    F32,
    /// 64-bit floats: for proofs.
    F64,
}

/// What to do when something is not finite.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum OnNan {
    /// Stop, with the weights before the step saved.
    #[default]
    Stop,
    /// Leave the step's update out and go on.
    Skip,
}

/// `[parametrization]`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ParametrizationConfig {
    /// `mup` or `standard`.
    pub kind: Parametrization,
    /// Widths of the base shape; those left out are the model's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub base: Option<Dims>,
}

/// `[data]`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    /// A dataset folder (`mupscale data tokenize`), a `.bin` shard, or for an mlp a CSV or .npy file of rows.
    pub path: PathBuf,
    /// Labels (.npy) of an mlp's rows, where the rows are .npy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub labels: Option<PathBuf>,
    /// Name of the label column of a CSV file; the last one if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label_column: Option<String>,
    /// Scale each column of rows to mean 0 and deviation 1 over the training rows.
    #[serde(default)]
    pub standardize: bool,
    /// Part of an mlp's rows that is held out.
    #[serde(default = "default_fraction")]
    pub validation_fraction: f64,
    /// `shuffle` or `sequential`.
    #[serde(default)]
    pub order: Order,
    /// Seed of the order; the run's if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// Attention does not look across the start of a document.
    #[serde(default)]
    pub reset_attention: bool,
    /// A token whose prediction is not counted (padding).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ignore: Option<u32>,
    /// Type of a headerless `.bin`: `uint16` or `uint32`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dtype: Option<String>,
}

fn default_fraction() -> f64 {
    0.1
}

/// Order of samples.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Order {
    /// A new permutation each epoch.
    #[default]
    Shuffle,
    /// As they lie.
    Sequential,
}

/// `[batch]`: a step takes `micro_batches` × `size` samples.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BatchConfig {
    /// Sequences, or rows, of a micro-batch.
    pub size: usize,
    /// Micro-batches of a step, over all ranks.
    pub micro_batches: usize,
}

impl Default for BatchConfig {
    fn default() -> Self {
        Self { size: 8, micro_batches: 1 }
    }
}

/// An optimizer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerKind {
    /// SGD; weight decay coupled.
    Sgd,
    /// Adam; weight decay coupled (L2).
    Adam,
    /// AdamW; weight decay decoupled.
    #[default]
    AdamW,
    /// Lion.
    Lion,
    /// Muon for hidden matrices, AdamW for the rest.
    Muon,
}

/// Muon's factor on the learning rate from a matrix's shape, taken at the base shape.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ShapeFactor {
    /// 1.
    #[default]
    None,
    /// √max(1, rows / columns).
    Spectral,
    /// 0.2 √max(rows, columns): updates as large as AdamW's (arXiv 2502.16982).
    Rms,
}

/// Which gradient norm clipping measures.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ClipNorm {
    /// ‖g‖² = Σ (s/γ) ‖g_p‖²: the same for a widened model.
    #[default]
    Mup,
    /// ‖g‖² = Σ ‖g_p‖².
    Plain,
}

/// `[optimizer]`. Numbers hold at the base shape.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OptimizerConfig {
    /// Which one.
    pub kind: OptimizerKind,
    /// Learning rate at the top of the schedule.
    pub lr: f64,
    /// β₁, β₂ of Adam, AdamW (0.9, 0.95) and Lion (0.9, 0.99).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub betas: Option<[f64; 2]>,
    /// Epsilon of Adam and AdamW.
    pub eps: f64,
    /// Weight decay of matrices and embeddings.
    pub weight_decay: f64,
    /// Momentum of SGD.
    pub momentum: f64,
    /// Dampening of SGD.
    pub dampening: f64,
    /// Nesterov momentum of SGD.
    pub nesterov: bool,
    /// Adam's and AdamW's amsgrad.
    pub amsgrad: bool,
    /// Muon's epsilon beside the Frobenius norm.
    pub muon_eps: f64,
    /// Muon's factor from a matrix's shape.
    pub shape_factor: ShapeFactor,
    /// Largest gradient norm; 0: no clipping.
    pub clip: f64,
    /// Which norm.
    pub clip_norm: ClipNorm,
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        Self {
            kind: OptimizerKind::AdamW,
            lr: 1e-3,
            betas: None,
            eps: 1e-8,
            weight_decay: 0.1,
            momentum: 0.9,
            dampening: 0.0,
            nesterov: false,
            amsgrad: false,
            muon_eps: 1e-7,
            shape_factor: ShapeFactor::None,
            clip: 1.0,
            clip_norm: ClipNorm::Mup,
        }
    }
}

impl OptimizerConfig {
    /// The elementwise rule: of all tensors, or of those that Muon leaves.
    pub fn method(&self) -> Method {
        let [beta1, beta2] = self.betas.unwrap_or(match self.kind {
            OptimizerKind::Lion => [0.9, 0.99],
            _ => [0.9, 0.95],
        });
        match self.kind {
            OptimizerKind::Sgd => {
                Method::Sgd { momentum: self.momentum, dampening: self.dampening, nesterov: self.nesterov }
            }
            OptimizerKind::Lion => Method::Lion { beta1, beta2 },
            kind => Method::Adam { beta1, beta2, coupled: kind == OptimizerKind::Adam, amsgrad: self.amsgrad },
        }
    }
}

/// `[schedule]`: the learning rate's factor over the run's steps.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ScheduleConfig {
    /// Its form.
    pub kind: ScheduleKind,
    /// Steps over which the rate rises from 0 to its top.
    pub warmup: u64,
    /// The rate at the end, as a part of the top.
    #[serde(rename = "final")]
    pub end: f64,
    /// Steps of the decay at the end, for warmup-stable-decay; a fifth of the run if left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decay: Option<u64>,
}

/// Forms of a schedule.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScheduleKind {
    /// The top all the way.
    #[default]
    Constant,
    /// A straight line down.
    Linear,
    /// Half a cosine down.
    Cosine,
    /// Warmup-stable-decay: the top, then a straight line down over the last steps.
    Wsd,
}

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

impl UpscaleConfig {
    /// Multiplicity of each width of a model of this shape.
    pub fn multiplicities(&self, dims: &Dims) -> Result<Dims> {
        let mut times = Dims::default();
        if let Some(k) = self.width {
            if k == 0 {
                return Err(Error::config("width", k, "a multiplicity must be 1 or more"));
            }
            let widened = |w: Width| !matches!(w, Width::Group | Width::HeadDim);
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

/// `[checkpoint]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CheckpointConfig {
    /// Save every so many steps; 0: only at the end.
    pub every: u64,
    /// Keep this many of the newest; 0: all.
    pub keep_last: usize,
    /// Keep those whose step is a multiple of this for ever; 0: none.
    pub keep_every: u64,
}

impl Default for CheckpointConfig {
    fn default() -> Self {
        Self { every: 0, keep_last: 2, keep_every: 0 }
    }
}

/// `[validation]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ValidationConfig {
    /// Measure every so many steps, and at the end; 0: never.
    pub every: u64,
    /// Micro-batches of a measurement; 0: all of the held-out data.
    pub batches: usize,
}

impl Default for ValidationConfig {
    fn default() -> Self {
        Self { every: 100, batches: 8 }
    }
}

/// `[memory]`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MemoryConfig {
    /// `none`, `mlp`, `block`, or `auto`: the least that fits `limit`.
    pub recompute: RecomputeChoice,
    /// MiB that the run may use; 0: 80 % of what the machine has free.
    pub limit: usize,
}

/// What backward computes again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RecomputeChoice {
    /// What fits in memory.
    #[default]
    Auto,
    /// Nothing.
    None,
    /// The MLP's hidden layer.
    Mlp,
    /// All of a block but its input.
    Block,
}

impl RecomputeChoice {
    /// The choices to try, cheapest first.
    pub fn candidates(self) -> &'static [Recompute] {
        match self {
            Self::Auto => &[Recompute::None, Recompute::Mlp, Recompute::Block],
            Self::None => &[Recompute::None],
            Self::Mlp => &[Recompute::Mlp],
            Self::Block => &[Recompute::Block],
        }
    }
}
