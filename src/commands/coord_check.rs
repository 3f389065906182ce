//! `coord-check`: whether the changes that training makes grow with width.

use super::print_json;
use crate::{
    Error, Result,
    config::ConfigText,
    mup::Parametrization,
    report::{
        chart::{self, Chart, Series, Style},
        human,
        table::Table,
    },
    transfer::coordinates::{Check, Options, THRESHOLD, Widen, check},
};
use serde::Serialize;
use std::{fs, path::PathBuf};

/// Arguments of `coord-check`.
#[derive(clap::Args)]
pub struct Args {
    /// A run's configuration (TOML); its model is made as wide as --widths says
    #[arg(short, long)]
    config: PathBuf,
    /// The widths, rising: of the residual stream, or of an mlp's first layer. The first is the base shape
    #[arg(long, value_delimiter = ',', required = true, value_name = "N,N,…")]
    widths: Vec<usize>,
    /// The parametrisation to check; the configuration's if left out. For μP, standard is run beside it as a control
    #[arg(long)]
    parametrization: Option<Parametrization>,
    /// Without the control: a rate so low that standard parametrisation would pass too is not found out
    #[arg(long)]
    no_control: bool,
    /// Steps
    #[arg(long, default_value_t = 4)]
    steps: usize,
    /// Seeds, over which sizes are averaged
    #[arg(long, default_value_t = 2)]
    seeds: u64,
    /// Learning rate, instead of the configuration's
    #[arg(long)]
    lr: Option<f64>,
    /// Check models that were widened this many times instead of new ones
    #[arg(long, value_name = "K")]
    widen: Option<usize>,
    /// σ of the widening's noise
    #[arg(long, default_value_t = 0.1, requires = "widen")]
    noise: f64,
    /// Steps that the narrow models are trained for before they are widened
    #[arg(long, default_value_t = 20, requires = "widen")]
    base_steps: u64,
    /// Exponent of width over which growth fails
    #[arg(long, default_value_t = THRESHOLD)]
    threshold: f64,
    /// Write a picture (SVG)
    #[arg(short, long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Print everything as JSON
    #[arg(long)]
    json: bool,
    /// Set a key of the configuration, as for train
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
}

/// What is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Verdict {
    /// Changes do not grow, and a control shows that they could have been seen to.
    Passes,
    /// They grow.
    Grows,
    /// They do not grow, but neither do they in standard parametrisation: the rate is too low.
    CannotTell,
}

#[derive(Serialize)]
struct Report {
    verdict: Verdict,
    threshold: f64,
    checks: Vec<Check>,
}

pub fn run(args: Args) -> Result<()> {
    let mut sets = args.sets.clone();
    sets.extend(args.lr.map(|lr| format!("optimizer.lr={lr:?}")));
    let kind = match args.parametrization {
        Some(kind) => kind,
        None => ConfigText::read(&args.config, &sets)?.resolve()?.parametrization.unwrap_or_default().kind,
    };
    if args.steps == 0 || args.seeds == 0 {
        return Err(Error::config("--steps and --seeds", 0, "must be 1 or more"));
    }
    let folder = tempfile::tempdir().map_err(Error::io("create", "a temporary folder"))?;
    let widen = args.widen.map(|times| Widen {
        times,
        noise: args.noise,
        steps: args.base_steps,
        folder: folder.path().join("base"),
    });
    let (widths, threshold) = (args.widths.clone(), args.threshold);
    let options = Options { config: args.config, sets, widths, steps: args.steps, seeds: args.seeds, widen, threshold };
    let mut checks = vec![check(&options, kind)?];
    if kind == Parametrization::Mup && !args.no_control {
        checks.push(check(&options, Parametrization::Standard)?);
    }
    let verdict = match &checks[..] {
        [checked, ..] if !checked.passes => Verdict::Grows,
        [_, control] if control.passes => Verdict::CannotTell,
        _ => Verdict::Passes,
    };
    if let Some(path) = &args.out {
        fs::write(path, picture(&checks, &options)).map_err(Error::io("write", path))?;
    }
    let report = Report { verdict, threshold: args.threshold, checks };
    if args.json {
        print_json(&report)?;
    } else {
        show(&report)?;
    }
    end(&report)
}

/// The verdict as an exit code: 1 unless the check passes.
fn end(report: &Report) -> Result<()> {
    let name = |kind| if kind == Parametrization::Mup { "μP" } else { "standard parametrisation" };
    let checked = &report.checks[0];
    match report.verdict {
        Verdict::Passes => Ok(()),
        Verdict::Grows => {
            let worst = checked.slopes.iter().max_by(|a, b| a.slope.total_cmp(&b.slope));
            let worst = worst.map_or(String::new(), |s| {
                format!("{} changes as width^{:.2} after {} steps", s.layer, s.slope, s.step)
            });
            Err(Error::Failed(format!(
                "{}: {worst}, over the threshold of {}",
                name(checked.parametrization),
                report.threshold
            )))
        }
        Verdict::CannotTell => Err(Error::Failed(
            "the check cannot tell: standard parametrisation passes too; raise --lr, or take wider --widths".into(),
        )),
    }
}

fn show(report: &Report) -> Result<()> {
    for check in &report.checks {
        let last = check.coordinates.iter().map(|c| c.step).max().unwrap_or(0);
        let widths: Vec<usize> = {
            let mut widths: Vec<_> = check.coordinates.iter().map(|c| c.width).collect();
            widths.sort_unstable();
            widths.dedup();
            widths
        };
        say!(
            "{:?} parametrisation: mean |x_t − x_0| after {last} steps, and its growth with width\n",
            check.parametrization
        )?;
        let header = ["layer".to_string()].into_iter().chain(widths.iter().map(ToString::to_string));
        let mut table =
            Table::new(header.chain(["|x_0| ~ width^", "change ~ width^", "at step", "verdict"].map(Into::into)));
        for slope in &check.slopes {
            let change = |width: usize| {
                let here = |c: &&crate::transfer::coordinates::Coordinate| {
                    c.layer == slope.layer && c.width == width && c.step == last
                };
                check.coordinates.iter().find(here).map_or(String::new(), |c| human::number(c.change))
            };
            let verdict = if slope.slope <= report.threshold { "ok" } else { "GROWS" };
            let mut cells = vec![slope.layer.clone()];
            cells.extend(widths.iter().map(|&w| change(w)));
            cells.extend([format!("{:.2}", slope.initial), format!("{:.2}", slope.slope), slope.step.to_string()]);
            table.row(cells.into_iter().chain([verdict.into()]));
        }
        super::print(table)?;
        say!("")?;
    }
    let verdict = match report.verdict {
        Verdict::Passes => "passes",
        Verdict::Grows => "fails",
        Verdict::CannotTell => "cannot tell",
    };
    say!("verdict: {verdict} (threshold {})", report.threshold)
}

/// A panel for each parametrisation: the changes after the last step against width.
fn picture(checks: &[Check], options: &Options) -> String {
    let panels = checks.iter().map(|check| {
        let series = check.slopes.iter().enumerate().map(|(i, slope)| {
            let here = check.coordinates.iter().filter(|c| c.layer == slope.layer && c.step == options.steps);
            let points = here.map(|c| (c.width as f64, c.change)).collect();
            let style = if i < 6 { Style::Solid } else { Style::Dashed };
            Series::new(slope.layer.clone(), i, style, points)
        });
        Chart {
            title: format!("{:?} parametrisation", check.parametrization),
            x_label: "width".into(),
            y_label: format!("mean |x_t − x_0| after {} steps", options.steps),
            x_log: true,
            y_log: true,
            series: series.collect(),
        }
    });
    chart::render(&panels.collect::<Vec<_>>())
}
