//! `compare-growth`: growth operators side by side, from one base.

use super::{print_json, show};
use crate::{
    Error, Result,
    report::human,
    transfer::growth::{GrowthPlan, PICTURE, RESULTS},
};
use std::{fs, path::PathBuf};

/// Arguments of `compare-growth`.
#[derive(clap::Args)]
pub struct Args {
    /// The plan (TOML): base, growth, operators
    #[arg(short, long, value_name = "FILE")]
    config: PathBuf,
    /// Print the results as JSON, and no progress
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> Result<()> {
    let plan = GrowthPlan::read(&args.config)?;
    let mut say = |name: &str| {
        if !args.json {
            // It may be lost, the results may not.
            let _ = say!("\n## {name}");
        }
    };
    let results = plan.run(show(args.json), &mut say)?;
    let text = serde_json::to_string_pretty(&results).map_err(|e| Error::Usage(format!("no JSON: {e}")))?;
    for (name, text) in [(RESULTS, text), (PICTURE, results.picture())] {
        let path = plan.out.join(name);
        fs::write(&path, text).map_err(Error::io("write", &path))?;
    }
    if args.json {
        return print_json(&results);
    }
    say!("")?;
    super::print(results.table())?;
    let (flops, counted) = (human::count(results.equal_flops), human::count(results.equal_flops_with_base));
    say!("\nequal FLOPs: {flops}, with the base's {counted}; {}", plan.out.join(PICTURE).display())
}
