//! `upscale`: a wide checkpoint from a narrow one.

use super::print_json;
use crate::{
    DType, Error, Result,
    checkpoint::{CONFIG, STATE, Writer},
    config::{Device, GrowthMethod, HeadGrowth, Moments, NoiseKind, Precision, UpscaleConfig},
    data::dataset::TOKENIZER_FILE,
    model::{self, plan::Plan},
    ops::Ops,
    report::human,
    run::{self, Place, Work},
    state::{Meaning, Position, Progress, State},
    upscale::{self, Growth, Origin},
};
use std::path::PathBuf;

/// Multiplicities and noise, as options.
#[derive(clap::Args)]
pub struct GrowthArgs {
    /// What becomes of each tensor
    #[arg(long, default_value = "mupscale")]
    method: GrowthMethod,
    /// Multiply the blocks (stack, llama-pro)
    #[arg(long, value_name = "K")]
    layers: Option<usize>,
    /// Multiply residual, ffn and kv_heads (an mlp's hidden layers), keeping group and head_dim
    #[arg(long, value_name = "K")]
    width: Option<usize>,
    /// What --width makes of heads: more of them, or larger ones (head_dim instead of kv_heads)
    #[arg(long)]
    heads: Option<HeadGrowth>,
    /// Multiply the residual stream's width
    #[arg(long, value_name = "K")]
    residual: Option<usize>,
    /// Multiply the MLP's hidden width
    #[arg(long, value_name = "K")]
    ffn: Option<usize>,
    /// Multiply the key/value heads
    #[arg(long, value_name = "K")]
    kv_heads: Option<usize>,
    /// Multiply the query heads of each key/value head
    #[arg(long, value_name = "K")]
    group: Option<usize>,
    /// Multiply the size of each head
    #[arg(long, value_name = "K")]
    head_dim: Option<usize>,
    /// Multiply each hidden layer of an mlp by its own factor, for example 2,3
    #[arg(long, value_name = "K,K,…", value_delimiter = ',')]
    hidden: Option<Vec<usize>>,
    /// σ of the symmetry-breaking noise; without noise the wide model trains as the narrow one for ever
    #[arg(long, value_name = "σ", default_value_t = 0.0)]
    noise: f64,
    /// What σ measures
    #[arg(long, default_value = "independent")]
    noise_kind: NoiseKind,
    /// Seed of the noise
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

impl From<GrowthArgs> for UpscaleConfig {
    fn from(a: GrowthArgs) -> Self {
        Self {
            method: a.method,
            layers: a.layers,
            width: a.width,
            heads: a.heads,
            residual: a.residual,
            ffn: a.ffn,
            kv_heads: a.kv_heads,
            group: a.group,
            head_dim: a.head_dim,
            hidden: a.hidden,
            noise: a.noise,
            noise_kind: a.noise_kind,
            seed: a.seed,
        }
    }
}

/// Arguments of `upscale`.
#[derive(clap::Args)]
pub struct Args {
    /// The narrow checkpoint, or a run folder, whose newest one is taken
    checkpoint: PathBuf,
    /// Folder of the wide checkpoint
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    #[command(flatten)]
    growth: GrowthArgs,
    /// What becomes of the optimizer's moments
    #[arg(long, default_value = "keep")]
    moments: Moments,
    /// Replace the output if it exists
    #[arg(long)]
    force: bool,
    /// Where to compute
    #[arg(long, default_value = "auto")]
    device: Device,
    /// CPU threads; 0: all cores
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Print the outcome as JSON
    #[arg(long)]
    json: bool,
}

/// What was written.
#[derive(serde::Serialize)]
struct Outcome {
    checkpoint: PathBuf,
    parameters: usize,
    narrow_parameters: usize,
    shape: crate::dims::Dims,
    seconds: f64,
}

pub fn run(args: Args) -> Result<()> {
    // Refused before the work rather than after it.
    if args.out.exists() && !args.force {
        return Err(Error::Exists { path: args.out });
    }
    let origin = Origin::open(&run::checkpoint_path(&args.checkpoint)?)?;
    let growth = Growth::new(&origin.meaning, &args.growth.into())?;
    let start = std::time::Instant::now();
    let writer = Writer::create(&args.out, args.force)?;
    // Weights are written as they are stored: f32, or f64 as the base has them.
    let precision = if origin.dtype()? == DType::F64 { Precision::F64 } else { Precision::F32 };
    let place = Place { device: args.device, precision, threads: args.threads, ..Place::default() };
    let wide = place.run(Widening { origin: &origin, growth: &growth, moments: args.moments, writer })?;
    let outcome = Outcome {
        checkpoint: args.out,
        parameters: model::table(&wide.spec, &wide.scaling).parameters(),
        narrow_parameters: model::table(&origin.meaning.spec, &origin.meaning.scaling).parameters(),
        shape: wide.spec.dims().clone(),
        seconds: start.elapsed().as_secs_f64(),
    };
    if args.json {
        return print_json(&outcome);
    }
    let (from, to) = (human::count(outcome.narrow_parameters as f64), human::count(outcome.parameters as f64));
    say!(
        "{from} → {to} parameters ({}) in {}; {}",
        outcome.shape,
        human::seconds(outcome.seconds),
        outcome.checkpoint.display()
    )?;
    Ok(())
}

struct Widening<'a> {
    origin: &'a Origin,
    growth: &'a Growth,
    moments: Moments,
    writer: Writer,
}

impl Work for Widening<'_> {
    type Output = Meaning;

    fn on<B: Ops>(self, backend: B) -> Result<Meaning> {
        write(&backend, self.origin, self.growth, self.moments, self.writer)
    }
}

/// Widens into a state on a device, by the code that `train` uses, and writes that.
fn write<B: Ops>(
    backend: &B,
    origin: &Origin,
    growth: &Growth,
    moments: Moments,
    mut writer: Writer,
) -> Result<Meaning> {
    let wide = upscale::meaning(&origin.meaning, Some(growth))?;
    let table = model::table(&wide.spec, &wide.scaling);
    let optimizer = (moments != Moments::Reset && origin.has_moments()).then_some(&wide.optimizer);
    let mut plan = Plan::default();
    let slots = State::plan(backend, &mut plan, &table, optimizer);
    let mut state = State::new(slots, &mut plan.commit(backend)?);
    upscale::load(backend, origin, Some(growth), &mut state, &wide, optimizer, moments)?;
    let old = &origin.progress;
    let time = if optimizer.is_some() { old.position.time } else { 0 };
    writer.json(CONFIG, &wide)?;
    writer.json(STATE, &Progress { position: Position { time, ..old.position }, config: None, ..old.clone() })?;
    if let Some(tokenizer) = origin.tokenizer()? {
        writer.bytes(TOKENIZER_FILE, &tokenizer)?;
    }
    state.save(backend, &table, optimizer, &mut writer)?;
    writer.commit()?;
    Ok(wide)
}
