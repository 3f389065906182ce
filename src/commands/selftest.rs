//! `selftest`: whether a GPU computes what the CPU does.

use super::print_json;
use crate::{
    Error, Result,
    backend::Backend,
    config::{Device, KeptIn, Precision},
    report::table::Table,
    run::Place,
    selftest,
};

/// Arguments of `selftest`.
#[derive(clap::Args)]
pub struct Args {
    /// What to check
    #[arg(long, default_value = "cuda")]
    device: Device,
    /// Compute types to check; bf16 also with gradients and moments in bf16
    #[arg(long, value_delimiter = ',', default_value = "f32,bf16")]
    precision: Vec<Precision>,
    /// Only checks whose name contains this
    #[arg(long, default_value = "")]
    only: String,
    /// Show every comparison, not only those that fail
    #[arg(long)]
    verbose: bool,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

#[derive(serde::Serialize)]
struct Verdict {
    device: String,
    checks: Vec<(String, selftest::Row)>,
    failed: usize,
    ok: bool,
}

pub fn run(args: Args) -> Result<()> {
    if args.device == Device::Cpu {
        return Err(Error::config("--device", "cpu", "is what others are compared with: `cargo test` checks it"));
    }
    let (mut device, mut checks) = (String::new(), Vec::new());
    for &precision in &args.precision {
        let kept: &[KeptIn] = if precision == Precision::Bf16 { &[KeptIn::F32, KeptIn::Bf16] } else { &[KeptIn::F32] };
        for &kept in kept {
            let cuda = Place { device: Device::Cuda, precision, gradients: kept, moments: kept, ..Place::default() };
            let cuda = cuda.gpu()?;
            device = cuda.properties().name.clone();
            let all = if kept == KeptIn::Bf16 { ", gradients and moments too" } else { "" };
            let types = format!("{}{all}", cuda.compute());
            checks.extend(selftest::run(&cuda, &args.only)?.into_iter().map(|row| (types.clone(), row)));
        }
    }
    let failed = checks.iter().filter(|(_, row)| !row.ok).count();
    let verdict = Verdict { device, checks, failed, ok: failed == 0 };
    if args.json {
        print_json(&verdict)?;
    } else {
        show(&verdict, args.verbose)?;
    }
    match verdict.ok {
        true => Ok(()),
        false => Err(Error::Fault(format!("{failed} checks failed: this device's results cannot be trusted"))),
    }
}

fn show(verdict: &Verdict, all: bool) -> Result<()> {
    let mut table = Table::new(["check", "type", "elements", "difference / bound", ""]);
    for (types, row) in verdict.checks.iter().filter(|(_, row)| all || !row.ok) {
        let verdict = if row.ok { "ok".to_string() } else { format!("FAILED at {}", row.at) };
        table.row([row.name.clone(), types.clone(), row.elements.to_string(), format!("{:.3}", row.worst), verdict]);
    }
    if all || !verdict.ok {
        super::print(table)?;
    }
    let count = verdict.checks.len();
    say!("{}: {} of {count} checks passed", verdict.device, count - verdict.failed)
}
