//! `sweep`: many runs over axes of hyperparameters.

use super::print_json;
use crate::{
    Error, Result,
    report::{human, table::Table},
    transfer::sweep::{
        Runner, Shard,
        config::SweepConfig,
        optima::{Found, optima},
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
    let report = Report { optima: optima(&outcomes), outcomes };
    if args.json { print_json(&report) } else { show(&report) }
}

/// What is printed as JSON.
#[derive(serde::Serialize)]
struct Report {
    outcomes: Vec<Outcome>,
    optima: Vec<Found>,
}

/// The best first, then those that diverged or failed.
fn show(Report { outcomes, optima }: &Report) -> Result<()> {
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
    if !optima.is_empty() {
        show_optima(optima)?;
    }
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

/// Where the loss is least along each axis, and what is uncertain about it.
fn show_optima(optima: &[Found]) -> Result<()> {
    let mut table = Table::new(["axis", "at", "best value", "90 % of seeds", "loss", ""]);
    for Found { axis, at, optimum } in optima {
        let at: Vec<_> = at.iter().map(|(key, value)| format!("{key}={value}")).collect();
        let Some(optimum) = optimum else {
            table.row([axis.clone(), at.join(","), "none".into(), String::new(), "diverged".into()]);
            continue;
        };
        let range = |[low, high]: [f64; 2]| format!("{} to {}", human::number(low), human::number(high));
        let edge =
            optimum.edge.as_ref().map_or(String::new(), |edge| format!("at the edge: try {}", range(edge.try_next)));
        let interval = optimum.interval.map_or("one seed".into(), range);
        let (x, loss) = (human::number(optimum.x), format!("{:.4}", optimum.loss));
        table.row([axis.clone(), at.join(","), x, interval, loss, edge]);
    }
    say!("\nOptima: a parabola in the logarithm near the best value, and a bootstrap over seeds")?;
    super::print(table)
}
