//! `sweep`: many runs over axes of hyperparameters.

use super::print_json;
use crate::{
    Error, Result,
    report::{human, table::Table},
    transfer::sweep::{
        Runner, Shard,
        config::SweepConfig,
        results::{Outcome, Status},
        run as run_sweep,
    },
};
use std::{
    io::{self, Write},
    path::PathBuf,
};

/// Rows of the table.
const SHOWN: usize = 20;

/// Arguments of `sweep`.
#[derive(clap::Args)]
pub struct Args {
    /// The sweep (TOML): configuration, axes, search
    #[arg(short, long)]
    config: PathBuf,
    /// Run only this part of the points, for array jobs: i/n, i from 0
    #[arg(long, value_name = "i/n")]
    shard: Option<Shard>,
    /// Print the outcomes as JSON
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> Result<()> {
    let sweep = SweepConfig::read(&args.config)?;
    let program = std::env::current_exe().map_err(Error::io("find", "this program"))?;
    // Progress that nobody reads is no reason to end.
    let say = &mut |line: &str| drop(writeln!(io::stderr(), "{line}"));
    let outcomes = run_sweep(&sweep, args.shard, &mut Runner { program, say })?;
    if args.json { print_json(&outcomes) } else { show(&outcomes) }
}

/// The best first, then those that diverged or failed.
fn show(outcomes: &[Outcome]) -> Result<()> {
    let mut sorted: Vec<&Outcome> = outcomes.iter().collect();
    sorted.sort_by(|a, b| {
        let key = |o: &Outcome| o.score().unwrap_or(f64::INFINITY);
        key(a).total_cmp(&key(b))
    });
    let mut table = Table::new(["run", "loss", "training loss", "seconds"]);
    for outcome in sorted.iter().take(SHOWN) {
        let loss = match (outcome.status, outcome.score()) {
            (Status::Done, Some(score)) => format!("{score:.4}"),
            (Status::Failed, _) => "failed".into(),
            _ => "diverged".into(),
        };
        let training = outcome.loss.map_or(String::new(), |loss| format!("{loss:.4}"));
        table.row([outcome.name.clone(), loss, training, human::number(outcome.seconds)]);
    }
    super::print(table)?;
    let count = |status| outcomes.iter().filter(|o| o.status == status).count();
    let (done, diverged, failed) = (count(Status::Done), count(Status::Diverged), count(Status::Failed));
    let rest = outcomes.len().saturating_sub(SHOWN);
    let rest = if rest > 0 { format!("; {rest} more in the results") } else { String::new() };
    say!("{done} done, {diverged} diverged, {failed} failed{rest}")?;
    match failed {
        0 => Ok(()),
        _ => Err(Error::Failed(format!("{failed} runs failed: the same command tries them again"))),
    }
}
