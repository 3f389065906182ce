//! `widen-tensors`: a state dict of any model, widened, and what its optimizer needs to know.

use crate::{
    Error, Result,
    mup::Rule,
    widen::{Growth, Role, Spec, TensorFile, Tensors, fits},
};
use serde_json::{Map, Value, json};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

/// Arguments of `widen-tensors`.
#[derive(clap::Args)]
pub struct Args {
    /// The weights (.safetensors)
    tensors: PathBuf,
    /// The file to write
    #[arg(short, long)]
    out: PathBuf,
    /// What each tensor's axes are (.toml)
    #[arg(long, required_unless_present = "infer", conflicts_with = "infer")]
    spec: Option<PathBuf>,
    /// Take the axes' growth from the shapes in two files of the same model, narrow and wide
    #[arg(long, num_args = 2, value_names = ["NARROW", "WIDE"])]
    infer: Option<Vec<PathBuf>>,
    /// With --infer: tensors whose rows are picked or added, such as token embeddings; * stands for anything
    #[arg(long, value_name = "PATTERN")]
    embedding: Vec<String>,
    /// The optimizer, whose multipliers are printed
    #[arg(long, default_value = "adamw")]
    optimizer: Optimizer,
    /// Its moments (.safetensors): exp_avg.NAME, exp_avg_sq.NAME, max_exp_avg_sq.NAME, momentum_buffer.NAME
    #[arg(long, requires = "moments_out")]
    moments: Option<PathBuf>,
    /// The file to write the moments to
    #[arg(long, requires = "moments")]
    moments_out: Option<PathBuf>,
    /// Replace what is there
    #[arg(long)]
    force: bool,
}

/// Optimizers of PyTorch.
#[derive(Clone, Copy, clap::ValueEnum)]
enum Optimizer {
    /// torch.optim.SGD
    Sgd,
    /// torch.optim.Adam
    Adam,
    /// torch.optim.AdamW
    Adamw,
}

pub fn run(args: Args) -> Result<()> {
    let rule = match args.optimizer {
        Optimizer::Sgd => Rule::Sgd,
        Optimizer::Adam => Rule::Adam,
        Optimizer::Adamw => Rule::AdamW,
    };
    let file = TensorFile::open(&args.tensors)?;
    let tensors = file.tensors()?;
    let growths = growths(&args, &tensors)?;
    if let Some(exists) = [Some(&args.out), args.moments_out.as_ref()].into_iter().flatten().find(|p| p.exists())
        && !args.force
    {
        return Err(Error::Exists { path: exists.into() });
    }
    if let (Some(path), Some(out)) = (&args.moments, &args.moments_out) {
        TensorFile::open(path)?.tensors()?.widen(&growths, Some(rule), out, args.force)?;
    }
    tensors.widen(&growths, None, &args.out, args.force)?;
    let multipliers = growths.iter().map(|(name, growth)| {
        let (ratios, factors) = (growth.ratios, growth.ratios.factors(rule));
        let value = json!({
            "shape": growth.shape(), "lr": factors.lr, "weight_decay": factors.decay, "eps": factors.eps,
            "weight": ratios.s(), "gradient": ratios.gamma(),
        });
        (name.clone(), value)
    });
    super::print_json(&Value::Object(multipliers.collect::<Map<_, _>>()))
}

/// How each tensor grows, by the spec or by two shapes.
fn growths(args: &Args, tensors: &Tensors<'_>) -> Result<BTreeMap<String, Growth>> {
    let shapes = tensors.shapes();
    let (Some(pair), None) = (&args.infer, &args.spec) else {
        let spec = Spec::read(args.spec.as_deref().unwrap_or(Path::new("")))?;
        return shapes.into_iter().map(|(name, shape)| Ok((name.clone(), spec.growth(&name, &shape)?))).collect();
    };
    let (narrow_path, wide_path) = (&pair[0], &pair[1]);
    let narrow = TensorFile::open(narrow_path)?.tensors()?.shapes();
    let wide = TensorFile::open(wide_path)?.tensors()?.shapes();
    let of = |name: &String, shape: &Vec<usize>| {
        let missing =
            |path: &Path| Error::tensor(path, name, format!("is missing, but {} has it", args.tensors.display()));
        let base = narrow.get(name).ok_or_else(|| missing(narrow_path))?;
        let grown = wide.get(name).ok_or_else(|| missing(wide_path))?;
        if base != shape {
            let why = format!("has shape {base:?}, in {} it is {shape:?}", args.tensors.display());
            return Err(Error::tensor(narrow_path, name, why));
        }
        let embedding = args.embedding.iter().any(|pattern| fits(pattern, name));
        Growth::between(name, base, grown, if embedding { Role::Embedding } else { Role::Weight })
    };
    shapes.iter().map(|(name, shape)| Ok((name.clone(), of(name, shape)?))).collect()
}
