//! `checkpoint`: what is done to checkpoints as files.

use crate::{Result, checkpoint, data::output::Partial, machine, run, state::Moment};
use std::{fs, path::PathBuf};

/// Commands on checkpoints.
#[derive(clap::Subcommand)]
pub enum Command {
    /// Write all tensors of a checkpoint, or of sharded safetensors, to one file
    Merge(MergeArgs),
}

/// Arguments of `checkpoint merge`.
#[derive(clap::Args)]
pub struct MergeArgs {
    /// A checkpoint, a run folder (its newest checkpoint), or a folder of shards (.safetensors)
    folder: PathBuf,
    /// The file to write (.safetensors)
    #[arg(short, long)]
    out: PathBuf,
    /// Leave out the optimizer's moments
    #[arg(long)]
    weights: bool,
    /// Replace the file if it exists
    #[arg(long)]
    force: bool,
}

pub fn run(command: Command) -> Result<()> {
    let Command::Merge(args) = command;
    let is_moment = |name: &str| Moment::ALL.iter().any(|moment| name.starts_with(&moment.name("")));
    let partial = Partial::file(&args.out, args.force)?;
    let folder = run::checkpoint_path(&args.folder)?;
    let tensors = checkpoint::merge(&folder, partial.path(), |name| !(args.weights && is_moment(name)))?;
    let bytes = fs::metadata(partial.path()).map_or(0, |found| found.len());
    partial.publish()?;
    say!("{}: {tensors} tensors, {}", args.out.display(), machine::size(bytes as usize))
}
