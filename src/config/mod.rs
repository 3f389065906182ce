//! A run's configuration: what the user writes (TOML, `--set`), checked and resolved before anything happens.
//!
//! [`Config`] mirrors the file, with defaults. [`ConfigText`] reads it; unknown keys are errors that name the nearest
//! known one. What depends on data or on a checkpoint (vocabulary, shape) is resolved by [`crate::run`].

mod init;
mod model;
mod optimizer;
mod read;
#[cfg(test)]
mod tests;

pub use init::{GrowthMethod, HeadGrowth, InitConfig, Moments, NoiseKind, UpscaleConfig};
pub use model::{Arch, DataShape, ModelConfig, resolve_model};
pub use optimizer::{ClipNorm, OptimizerConfig, OptimizerKind, ScheduleConfig, ScheduleKind, ShapeFactor};
pub use read::{ConfigText, set_value};

use crate::{
    DType,
    dims::Dims,
    model::decoder::Recompute,
    mup::{Parametrization, Rules},
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
    /// Type of activations and of the weights that they are computed from.
    #[serde(default)]
    pub precision: Precision,
    /// How steps are recorded on a GPU: `auto`, `step`, `micro` or `none`; the same numbers with each.
    #[serde(default)]
    pub graph: Recording,
    /// On a GPU, measure the algorithms of matrix products at their first use and keep the fastest, in `tuning.json` of
    /// the run's folder, which resuming takes over. Otherwise the library's first choice is taken.
    #[serde(default)]
    pub autotune: bool,
    /// On a GPU, apply GELU and sum the gradients of biases in kernels of their own, also where matrix products in bf16
    /// could do it on the way: to measure what that is worth. It rounds differently.
    #[serde(default)]
    pub unfused: bool,
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
    /// Texts that the model writes on the way.
    #[serde(default)]
    pub samples: SamplesConfig,
    /// What is kept and what computed again.
    #[serde(default)]
    pub memory: MemoryConfig,
    /// How ranks deal with each other.
    #[serde(default)]
    pub comm: CommConfig,
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

/// Type of activations and of the weights that they are computed from. (On a GPU the weights that the optimizer updates
/// are f32 with either type; for gradients and moments see [`MemoryConfig`].)
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// bf16 on a GPU, f32 on a CPU.
    #[default]
    Auto,
    /// 16-bit floats with f32's range, on GPUs only.
    Bf16,
    /// 32-bit floats.
    F32,
    /// 64-bit floats: for proofs.
    F64,
}

/// What a GPU records and replays, instead of launching kernel by kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Recording {
    /// Whole steps of small models on one GPU, otherwise micro-batches.
    #[default]
    Auto,
    /// Whole steps, on one GPU; micro-batches on several.
    Step,
    /// Each micro-batch, and the update.
    Micro,
    /// Nothing: every kernel is launched by itself, which is slower.
    None,
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
    /// Disputed rules, by name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rules: Option<Rules>,
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
    /// Write while training goes on, from a copy in host memory: `"auto"` (where there is room for it), `true`, `false`.
    pub background: Background,
}

impl Default for CheckpointConfig {
    fn default() -> Self {
        Self { every: 0, keep_last: 2, keep_every: 0, background: Background::Auto }
    }
}

/// Whether checkpoints are written while training goes on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "toml::Value", into = "toml::Value")]
pub enum Background {
    /// Where host memory has room for a copy of the state.
    #[default]
    Auto,
    /// Yes; a copy that is refused ends the run.
    Always,
    /// No: the step waits.
    Never,
}

impl TryFrom<toml::Value> for Background {
    type Error = String;

    fn try_from(value: toml::Value) -> Result<Self, String> {
        match &value {
            toml::Value::Boolean(true) => Ok(Self::Always),
            toml::Value::Boolean(false) => Ok(Self::Never),
            toml::Value::String(word) if word == "auto" => Ok(Self::Auto),
            other => Err(format!("{other} is none of \"auto\", true and false")),
        }
    }
}

impl From<Background> for toml::Value {
    fn from(background: Background) -> Self {
        match background {
            Background::Auto => "auto".into(),
            Background::Always => true.into(),
            Background::Never => false.into(),
        }
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

/// `[samples]`: texts that the model writes while it is trained, for people to read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SamplesConfig {
    /// Write every so many steps, and at the end; 0: never.
    pub every: u64,
    /// What to go on with; an empty text is the start of a document.
    pub prompts: Vec<String>,
    /// Tokens of a text, at most.
    pub tokens: usize,
    /// Divides logits: 0 takes the likeliest token, 1 samples as the model says.
    pub temperature: f64,
    /// Sample among this many likeliest tokens; 0: all.
    pub top_k: usize,
    /// Sample among the likeliest tokens that have this probability together.
    pub top_p: f64,
    /// Seed of the draws, which are the same each time.
    pub seed: u64,
    /// End before one of these texts.
    pub stop: Vec<String>,
}

impl Default for SamplesConfig {
    fn default() -> Self {
        Self {
            every: 0,
            prompts: vec![String::new()],
            tokens: 100,
            temperature: 0.8,
            top_k: 0,
            top_p: 1.0,
            seed: 0,
            stop: Vec::new(),
        }
    }
}

/// `[comm]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CommConfig {
    /// Seconds: a rank that is missing, or silent, for so long ends the run.
    pub timeout: u64,
    /// ZeRO stage 1: each rank updates a part of the weights, and keeps master weights and moments of that part alone.
    /// The same numbers, in less memory, with no more bytes between ranks; so it is on.
    pub zero: bool,
    /// Type in which gradients travel between GPUs, and are summed on the way. (Ranks on CPUs sum in f64.)
    pub reduction: Reduction,
}

/// Type of sums over GPUs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reduction {
    /// 32-bit floats.
    #[default]
    F32,
    /// 16-bit floats with f32's range: half the bytes; each addition over ranks rounds.
    Bf16,
}

impl Default for CommConfig {
    fn default() -> Self {
        Self { timeout: 600, zero: true, reduction: Reduction::F32 }
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
    /// Type of the gradients of a micro-batch: `f32`, or `bf16` on a GPU that computes in bf16. Their sums over
    /// micro-batches and ranks are f32 either way.
    pub gradients: KeptIn,
    /// Type of the optimizer's moments: `f32`, or `bf16`, updated in f32 and rounded stochastically. Copies of a unit do
    /// not stay equal then: a widened model trains as the narrow one in the mean only.
    pub moments: KeptIn,
}

/// A type that something is kept in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum KeptIn {
    /// 32-bit floats (64-bit with `precision = "f64"`).
    #[default]
    F32,
    /// 16-bit floats with f32's range.
    Bf16,
}

impl KeptIn {
    /// The type.
    pub fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 => DType::BF16,
        }
    }
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
