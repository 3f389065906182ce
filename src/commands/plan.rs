//! `plan`: what a training will take.

use super::{print_json, upscale::GrowthArgs};
use crate::{
    Error, Result,
    config::{Config, ConfigText, UpscaleConfig},
    run,
    state::Meaning,
    transfer::plan::{Question, Speed},
    upscale::{self, Growth, Origin},
};
use std::path::{Path, PathBuf};

/// Arguments of `plan`.
#[derive(clap::Args)]
pub struct Args {
    /// The base: a checkpoint, a run folder, or a configuration (.toml)
    base: PathBuf,
    /// What to train, as a configuration (.toml), instead of a growth of the base
    #[arg(long, value_name = "FILE")]
    target: Option<PathBuf>,
    #[command(flatten)]
    growth: GrowthArgs,
    /// Tokens to train on
    #[arg(long)]
    tokens: u64,
    /// GPUs
    #[arg(long, default_value_t = 1)]
    gpus: usize,
    /// Sequences of a micro-batch; the base's own if left out
    #[arg(long)]
    batch: Option<usize>,
    /// Tokens a second of the target, on all GPUs together
    #[arg(long, value_name = "TOKENS", conflicts_with = "measured")]
    throughput: Option<f64>,
    /// What `bench train --json` printed
    #[arg(long, value_name = "FILE")]
    measured: Option<PathBuf>,
    /// Runs of the search for hyperparameters
    #[arg(long, default_value_t = 20)]
    trials: u64,
    /// How many times narrower the proxy is: 8, 4 or 2 if left out
    #[arg(long, value_name = "K")]
    shrink: Option<usize>,
    /// Print the plan as JSON
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> Result<()> {
    let (base, trained, config) = read(&args.base)?;
    let asked = UpscaleConfig::from(args.growth);
    let (target, mut config) = match &args.target {
        Some(_) if asked != UpscaleConfig::default() => {
            return Err(Error::config("--target", "set", "is a model of its own: leave the multiplicities out"));
        }
        Some(path) => {
            let (target, _, config) = read(path)?;
            (target, config)
        }
        None => (upscale::meaning(&base, Some(&Growth::new(&base, &asked)?))?, config),
    };
    if let Some(size) = args.batch {
        config.batch.size = size;
        config.check()?;
    }
    let measured = args.measured.as_deref().map(Speed::read).transpose()?;
    let plan = Question {
        base: (&base, trained),
        target: &target,
        config: &config,
        tokens: args.tokens,
        gpus: args.gpus,
        speed: args.throughput.map(Speed::TokensPerSecond).or(measured),
        trials: args.trials,
        shrink: args.shrink,
    }
    .answer()?;
    if args.json { print_json(&plan) } else { super::print(plan) }
}

/// A model, the tokens that it has been trained on, and the configuration of its training (its batch, above all; that
/// of a checkpoint that holds none is the default).
fn read(path: &Path) -> Result<(Meaning, u64, Config)> {
    if path.extension().is_some_and(|e| e == "toml") {
        let prepared = run::prepare(path, &[])?;
        return Ok((prepared.meaning, 0, prepared.config));
    }
    let origin = Origin::open(&run::checkpoint_path(path)?)?;
    let nothing = || ConfigText::parse("run = 'plan'\nsteps = 1\ndata.path = 'plan'", &[], path)?.resolve();
    let config = origin.progress.config.clone().map_or_else(nothing, Ok)?;
    Ok((origin.meaning.clone(), origin.progress.position.tokens, config))
}
