//! The sizes of the quickstart, and the configurations that they become.

use crate::{Error, Result, run::Place};
use std::path::{Path, PathBuf};

/// Everything that distinguishes a size of the quickstart. Lengths are in tokens, durations in steps.
#[derive(Clone, Copy, Debug)]
pub struct Recipe {
    /// Bytes of the generated corpus, about.
    pub corpus_bytes: u64,
    /// Tokens of the vocabulary.
    pub vocab: usize,
    /// Part of the documents that is held out.
    pub val_fraction: f64,
    /// Blocks.
    pub layers: usize,
    /// The base model's width; the MLP has four times that.
    pub residual: usize,
    /// Heads of the base model.
    pub heads: usize,
    /// Tokens of a sequence.
    pub context: usize,
    /// Sequences of a step.
    pub batch: usize,
    /// Deviation of initial matrices at the base shape.
    pub init_std: f64,
    /// Learning rate at the base shape.
    pub lr: f64,
    /// σ of the noise that breaks the symmetry.
    pub noise: f64,
    /// Steps of the base model.
    pub base_steps: u64,
    /// Steps of either wide model.
    pub wide_steps: u64,
    /// Steps between validations.
    pub validate_every: u64,
    /// Steps that narrow and wide model are compared over.
    pub equivalence_steps: u64,
}

/// How many times wider the wide models are.
pub const WIDTH: usize = 2;

impl Recipe {
    /// Seconds: for tests.
    pub const TINY: Self = Self {
        corpus_bytes: 400_000,
        vocab: 512,
        val_fraction: 0.05,
        layers: 2,
        residual: 32,
        heads: 2,
        context: 64,
        batch: 8,
        init_std: 0.1,
        lr: 8e-3,
        noise: 0.1,
        base_steps: 150,
        wide_steps: 120,
        validate_every: 30,
        equivalence_steps: 8,
    };

    /// About two minutes on two cores.
    pub const SMALL: Self = Self {
        corpus_bytes: 5_200_000,
        vocab: 1024,
        val_fraction: 0.01,
        layers: 3,
        residual: 64,
        heads: 4,
        context: 128,
        batch: 16,
        init_std: 0.08,
        lr: 8e-3,
        noise: 0.1,
        base_steps: 600,
        wide_steps: 400,
        validate_every: 50,
        equivalence_steps: 20,
    };
}

/// The files of a quickstart, all in one folder.
#[derive(Clone, Debug)]
pub struct Layout {
    /// The folder.
    pub out: PathBuf,
}

impl Layout {
    /// A file or folder in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.out.join(name)
    }

    /// The path as text for configurations and commands.
    ///
    /// # Errors
    /// A path that is not UTF-8, which no configuration can name.
    pub fn text(path: &Path) -> Result<&str> {
        path.to_str().ok_or_else(|| Error::file(path, "is not UTF-8, so no configuration can name it: use --out"))
    }

    /// The path as a TOML string.
    fn toml(&self, name: &str) -> Result<toml::Value> {
        Ok(toml::Value::String(Self::text(&self.path(name))?.into()))
    }
}

/// What the user chose that all three configurations share.
#[derive(Clone, Copy, Debug)]
pub struct Shared {
    /// Seed of initial values, order and noise.
    pub seed: u64,
    /// Where the models are trained, and in which type.
    pub place: Place,
    /// Micro-batches of a validation; 0: all held-out data.
    pub validation_batches: usize,
}

/// The text of `base.toml`: the narrow model, trained from new weights.
pub fn base(recipe: &Recipe, layout: &Layout, shared: Shared) -> Result<String> {
    let head = head(recipe, layout, shared, "base", recipe.base_steps, shared.seed)?;
    let comment = "# The base model: narrow, trained from new weights.\n";
    Ok(comment.to_string() + &head + &model(recipe, 1) + &optimizer(recipe))
}

/// The text of `widened.toml`: the base model widened, with noise, and trained on.
pub fn widened(recipe: &Recipe, layout: &Layout, shared: Shared) -> Result<String> {
    let comment = "# The base model, widened on the way in, and trained on. Shape, optimizer and its numbers come from the\n\
                   # checkpoint; schedule, step and data begin anew.\n";
    let head = head(recipe, layout, shared, "widened", recipe.wide_steps, second_seed(shared))?;
    let init = format!(
        "\n[init]\nfrom = {}\n\n[init.upscale]\nwidth = {WIDTH}\nnoise = {:?}  # breaks the symmetry between copies; with 0 the wide model trains as the narrow one\nseed = {}\n",
        layout.toml("base")?,
        recipe.noise,
        shared.seed
    );
    Ok(comment.to_string() + &head + &init)
}

/// The text of `scratch.toml`: the wide model from new weights, on the tokens that the widened one sees.
pub fn scratch(recipe: &Recipe, layout: &Layout, shared: Shared) -> Result<String> {
    let comment =
        "# The wide model from new weights, on the very tokens that the widened one sees, by the same schedule.\n";
    let head = head(recipe, layout, shared, "scratch", recipe.wide_steps, second_seed(shared))?;
    let base = format!(
        "\n[parametrization]  # the base model's shape: so both wide models have the same multipliers\nkind = \"mup\"\nbase = {{ residual = {}, ffn = {}, kv_heads = {} }}\n",
        recipe.residual,
        4 * recipe.residual,
        recipe.heads
    );
    Ok(comment.to_string() + &head + &model(recipe, WIDTH) + &base + &optimizer(recipe))
}

/// Seed of the order in which the wide models see the data: another one than the base model's.
fn second_seed(shared: Shared) -> u64 {
    shared.seed.wrapping_add(1)
}

/// The part of a configuration that does not depend on how the run starts.
fn head(recipe: &Recipe, layout: &Layout, shared: Shared, run: &str, steps: u64, order: u64) -> Result<String> {
    let Shared { seed, place, validation_batches } = shared;
    let (device, precision, threads) = (name(place.device), name(place.precision), place.threads);
    let (run, data) = (layout.toml(run)?, layout.toml("data")?);
    let (batch, every) = (recipe.batch, recipe.validate_every);
    Ok(format!(
        "run = {run}
steps = {steps}
seed = {seed}
device = \"{device}\"
precision = \"{precision}\"
threads = {threads}  # 0: all cores

[data]
path = {data}
seed = {order}  # of the order

[batch]
size = {batch}

[schedule]
kind = \"cosine\"
warmup = {warmup}
final = 0.1

[validation]
every = {every}
batches = {validation_batches}  # 0: all held-out data
",
        warmup = steps / 20
    ))
}

/// How a choice is written.
fn name(choice: impl clap::ValueEnum) -> String {
    choice.to_possible_value().map_or(String::new(), |value| value.get_name().to_string())
}

fn model(recipe: &Recipe, times: usize) -> String {
    let Recipe { layers, residual, heads, context, init_std, .. } = recipe;
    format!(
        "\n[model]\narch = \"gpt2\"\nlayers = {layers}\nresidual = {}\nkv_heads = {}\ncontext = {context}\ninit_std = {init_std:?}\n",
        residual * times,
        heads * times
    )
}

fn optimizer(recipe: &Recipe) -> String {
    format!("\n[optimizer]\nkind = \"adamw\"\nlr = {:?}\nweight_decay = 0.1\n", recipe.lr)
}
