//! `transfer`: tune small, use large.

use super::print_json;
use crate::{
    Error, Result,
    report::human,
    transfer::{
        recipe::{Done, PICTURE, REPORT, Report, TransferPlan, Verdict},
        sweep::Runner,
    },
};
use std::{
    fs,
    io::{self, Write},
    path::PathBuf,
};

/// Arguments of `transfer`.
#[derive(clap::Args)]
pub struct Args {
    /// The plan (TOML): base, upscale, sizes, what is tuned
    #[arg(short, long, value_name = "FILE")]
    config: PathBuf,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> Result<()> {
    let plan = TransferPlan::read(&args.config)?;
    let program = std::env::current_exe().map_err(Error::io("find", "this program"))?;
    // Progress that nobody reads is no reason to end.
    let say = &mut |line: &str| drop(writeln!(io::stderr(), "{line}"));
    let report = match plan.run(&mut Runner { program, say })? {
        Done::Report(report) => report,
        Done::Job(job) => {
            let job = job.display();
            return say!("The large upscale is for a queue: sbatch {job}\nThen the same command reports.");
        }
    };
    let text = serde_json::to_string_pretty(&*report).map_err(|e| Error::Usage(format!("no JSON: {e}")))?;
    for (name, text) in [(REPORT, text), (PICTURE, report.picture())] {
        let path = plan.run.join(name);
        fs::write(&path, text).map_err(Error::io("write", &path))?;
    }
    if args.json { print_json(&*report) } else { show(&report, &plan) }
}

fn show(report: &Report, plan: &TransferPlan) -> Result<()> {
    super::print(report.table())?;
    for line in &report.lines {
        let said = match line.verdict {
            Verdict::Holds => "it moves by at most √2",
            Verdict::Moves => "it moves by more than √2",
            Verdict::NotResolved => "whether it moves by more than √2 is not resolved",
        };
        say!("{}: largest optimum over smallest {}: {said}", line.parametrization, human::number(line.factor))?;
    }
    let loss = report.loss().map_or("diverged".into(), |loss| format!("loss {loss:.4}"));
    let lost = report.lost.map_or(String::new(), |lost| format!(", {lost:+.4} against the best value run there"));
    say!("large upscale (base {} wide), mean of {} seeds: {loss}{lost}", plan.sizes.large, report.large.len())?;
    let part = human::number(report.full_size_flops / report.tuning_flops);
    let (small, full) = (human::count(report.tuning_flops), human::count(report.full_size_flops));
    say!("tuning: {small} FLOPs; at full size {full}, {part} times as many")?;
    say!("{}", plan.run.join(PICTURE).display())
}
