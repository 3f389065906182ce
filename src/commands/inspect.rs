//! `inspect`: what a checkpoint or a configuration is, tensor by tensor.

use super::print_json;
use crate::{
    Result,
    model::{
        self,
        param::{Init, Row, Table},
    },
    mup::Ratios,
    optim,
    report::{human, table},
    run,
    state::{Meaning, Position},
    upscale::Origin,
};
use serde::Serialize;
use std::path::PathBuf;

/// Arguments of `inspect`.
#[derive(clap::Args)]
pub struct Args {
    /// A checkpoint, a run folder, or a configuration (.toml)
    path: PathBuf,
    /// Print everything as JSON
    #[arg(long)]
    json: bool,
    /// Set a key of the configuration, as for train
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
}

/// Everything that is printed.
#[derive(Serialize)]
struct Report {
    #[serde(flatten)]
    meaning: Meaning,
    parameters: usize,
    position: Option<Position>,
    tensors: Vec<TensorReport>,
}

/// One tensor. Ratios are to the base shape.
#[derive(Serialize)]
struct TensorReport {
    name: String,
    shape: Vec<usize>,
    axes: Vec<String>,
    elements: usize,
    /// Factor on weights, s = 1 / (k_in · a).
    s: f64,
    /// Factor on gradients, γ = a / k_out.
    gamma: f64,
    /// Forward multiplier's ratio a.
    a: f64,
    /// Learning rate: the factor, and with the configured rate.
    lr_factor: f64,
    lr: f64,
    weight_decay: f64,
    eps: f64,
    init_std: f64,
    /// Weight in the gradient norm.
    clip_weight: f64,
}

pub fn run(args: Args) -> Result<()> {
    let (meaning, position) = if args.path.extension().is_some_and(|e| e == "toml") {
        (run::prepare(&args.path, &args.sets)?.meaning, None)
    } else {
        let origin = Origin::open(&run::checkpoint_path(&args.path)?)?;
        (origin.meaning.clone(), Some(origin.progress.position))
    };
    let report = describe(meaning, position);
    if args.json {
        return print_json(&report);
    }
    print(&report)
}

fn describe(meaning: Meaning, position: Option<Position>) -> Report {
    let table = model::table(&meaning.spec, &meaning.scaling);
    let tensors = table.rows.iter().zip(meaning.optimizer.settings(&table, &meaning.scaling));
    let tensors = tensors.map(|(row, settings)| {
        let ratios: Ratios = optim::ratios(row, &table, &meaning.scaling);
        TensorReport {
            name: row.name.clone(),
            shape: row.shape(),
            axes: row.axes.iter().map(ToString::to_string).collect(),
            elements: row.len(),
            s: ratios.s(),
            gamma: ratios.gamma(),
            a: ratios.a,
            lr_factor: settings.lr,
            lr: settings.lr * meaning.optimizer.lr,
            weight_decay: settings.decay,
            eps: settings.eps,
            init_std: init_std(row, &table, &meaning),
            clip_weight: settings.clip,
        }
    });
    let tensors = tensors.collect();
    Report { parameters: table.parameters(), position, tensors, meaning }
}

/// Deviation of initial values; 0 for constants.
fn init_std(row: &Row, table: &Table, meaning: &Meaning) -> f64 {
    match row.init {
        Init::Normal(_) => optim::init_std(row, table, &meaning.scaling),
        Init::Ones | Init::Zeros => 0.0,
    }
}

fn print(report: &Report) -> Result<()> {
    let Meaning { spec, scaling, optimizer, tokenizer } = &report.meaning;
    say!("{}: {} parameters; {}", spec.arch(), human::count(report.parameters as f64), spec.dims())?;
    say!("{:?} parametrisation, base {}", scaling.kind, scaling.base)?;
    let exact = if scaling.rules.exact() { "" } else { " (a widened model does not train as the narrow one would)" };
    say!("rules: {}{exact}", scaling.rules)?;
    say!("optimizer {:?}, lr {}, weight decay {}", optimizer.kind, optimizer.lr, optimizer.weight_decay)?;
    if let Some(tokenizer) = tokenizer {
        say!("tokenizer {tokenizer}")?;
    }
    if let Some(p) = report.position {
        say!("step {}, {} tokens, t = {}", p.step, human::count(p.tokens as f64), p.time)?;
    }
    say!("\nFactors are ratios to the base shape; lr, wd and eps are the values in use.\n")?;
    let mut rows = table::Table::new(["tensor", "axes", "s", "gamma", "lr", "wd", "eps", "init std", "clip"]);
    for t in &report.tensors {
        let number = |x: f64| human::number(x);
        rows.row([
            t.name.clone(),
            t.axes.join(", "),
            number(t.s),
            number(t.gamma),
            number(t.lr),
            number(t.weight_decay),
            number(t.eps),
            number(t.init_std),
            number(t.clip_weight),
        ]);
    }
    super::print(rows)
}
