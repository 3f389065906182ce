//! `train` and `resume`.

use super::{print_json, show};
use crate::{
    Result,
    config::{Device, OnNan},
    report::human,
    run::{self, Outcome},
    trace::{self, Request},
};
use std::path::PathBuf;

/// Options that say how to compute, not what.
#[derive(clap::Args)]
pub struct HowArgs {
    /// Set any key of the configuration, for example --set optimizer.lr=0.002; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// Where to compute
    #[arg(long)]
    device: Option<Device>,
    /// CPU threads; 0: all cores
    #[arg(long)]
    threads: Option<usize>,
    /// At a loss or gradient that is not finite: stop, with the weights before the step saved, or skip the update
    #[arg(long)]
    on_nan: Option<OnNan>,
    /// Write where the time of some steps goes, on all ranks: for ui.perfetto.dev or chrome://tracing
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// The first and the last step of the trace, counted from where this process begins
    #[arg(long, value_name = "FIRST..LAST", default_value = "3..6", requires = "trace")]
    trace_steps: trace::Steps,
    /// Print the outcome as JSON, and no progress
    #[arg(long)]
    json: bool,
}

impl HowArgs {
    /// Asks for the trace, if one is wanted.
    fn request_trace(&self) {
        if let Some(file) = self.trace.clone() {
            trace::request(Request { file, steps: self.trace_steps.clone() });
        }
    }

    /// All of them as assignments.
    fn assignments(&self) -> Vec<String> {
        let mut sets = self.sets.clone();
        sets.extend(self.device.map(|d| format!("device={}", name(d))));
        sets.extend(self.threads.map(|t| format!("threads={t}")));
        sets.extend(self.on_nan.map(|n| format!("on_nan={}", name(n))));
        sets
    }
}

/// How a choice is written.
fn name(choice: impl clap::ValueEnum) -> String {
    choice.to_possible_value().map_or(String::new(), |value| value.get_name().to_string())
}

/// Arguments of `train`.
#[derive(clap::Args)]
pub struct TrainArgs {
    /// The configuration, TOML
    #[arg(short, long, value_name = "FILE")]
    config: PathBuf,
    /// Replace the run folder if it exists
    #[arg(long, conflicts_with = "resume")]
    force: bool,
    /// auto: go on with the run folder's newest complete checkpoint, if there is one; for launchers and queues, which
    /// start the same command again
    #[arg(long, value_name = "auto")]
    resume: Option<WhenThere>,
    #[command(flatten)]
    how: HowArgs,
}

/// When a run goes on instead of beginning.
#[derive(Clone, Copy, clap::ValueEnum)]
enum WhenThere {
    /// When it can.
    Auto,
}

/// Arguments of `resume`.
#[derive(clap::Args)]
pub struct ResumeArgs {
    /// The run folder
    run: PathBuf,
    #[command(flatten)]
    how: HowArgs,
}

pub fn train(args: TrainArgs) -> Result<()> {
    args.how.request_trace();
    let (sets, show) = (args.how.assignments(), show(args.how.json));
    let outcome = match args.resume {
        Some(WhenThere::Auto) => run::train_or_resume(&args.config, &sets, show)?,
        None => run::train_file(&args.config, &sets, args.force, show)?,
    };
    report(&outcome, args.how.json)
}

pub fn resume(args: ResumeArgs) -> Result<()> {
    args.how.request_trace();
    report(&run::resume(&args.run, &args.how.assignments(), show(args.how.json))?, args.how.json)
}

fn report(outcome: &Outcome, json: bool) -> Result<()> {
    if outcome.rank > 0 {
        return Ok(());
    }
    if json {
        return print_json(outcome);
    }
    let validation = outcome.validation_loss.map_or(String::new(), |loss| format!(", validation loss {loss:.4}"));
    say!(
        "{} steps, {} tokens in {}; loss {:.4}{validation}; {}",
        outcome.steps,
        human::count(outcome.tokens as f64),
        human::seconds(outcome.seconds),
        outcome.loss,
        outcome.checkpoint.display()
    )?;
    Ok(())
}
