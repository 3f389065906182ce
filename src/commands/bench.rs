//! `bench`: speed, measured as anyone can repeat it.

use super::print_json;
use crate::{
    Result,
    bench::{self, CommBench, OpsBench, Preset, TokenizeBench, TrainBench, UpscaleBench},
    config::{KeptIn, Recording},
    machine,
    model::decoder::Recompute,
    report::{human, table::Table},
    run::Place,
};
use std::path::PathBuf;

/// Benchmarks.
#[derive(clap::Subcommand)]
pub enum Command {
    /// Time every op at the sizes of a model, beside what the device reaches on a copy and a large product
    Ops(OpsArgs),
    /// Time a training step on random tokens
    Train(TrainArgs),
    /// Time the widening of a GPT-2 with its optimizer moments, from a checkpoint into memory
    Upscale(UpscaleArgs),
    /// Time sums over ranks: start it as the ranks of a run are, `mupscale-launch … mupscale bench comm`
    Comm(CommArgs),
    /// Time `data tokenize` beside the tokenizers crate's own batch encoding
    Tokenize(TokenizeArgs),
}

/// What gradients and moments are kept in, as in `[memory]`.
#[derive(clap::Args)]
struct KeptArgs {
    /// Type of gradients
    #[arg(long, default_value = "f32")]
    gradients: KeptIn,
    /// Type of moments
    #[arg(long, default_value = "f32")]
    moments: KeptIn,
}

impl KeptArgs {
    fn at(&self, place: Place) -> Place {
        Place { gradients: self.gradients, moments: self.moments, ..place }
    }
}

/// Arguments of `bench ops`.
#[derive(clap::Args)]
pub struct OpsArgs {
    /// The model whose sizes are taken
    #[arg(long, default_value = "w256")]
    preset: Preset,
    /// Sequences of a micro-batch; 0: the preset's own
    #[arg(long, default_value_t = 0)]
    batch: usize,
    /// Only ops whose name contains this
    #[arg(long, default_value = "")]
    only: String,
    #[command(flatten)]
    place: super::PlaceArgs,
    /// On a GPU, apply GELU and sum bias gradients in kernels of their own
    #[arg(long)]
    unfused: bool,
    #[command(flatten)]
    kept: KeptArgs,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// Arguments of `bench train`.
#[derive(clap::Args)]
pub struct TrainArgs {
    /// The model
    #[arg(long, default_value = "w256")]
    preset: Preset,
    /// Sequences of a micro-batch; 0: the preset's own
    #[arg(long, default_value_t = 0)]
    batch: usize,
    /// Steps to time, after 7 that are not
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    steps: u32,
    /// What backward computes again
    #[arg(long, default_value = "none")]
    recompute: Recompute,
    #[command(flatten)]
    place: super::PlaceArgs,
    /// On a GPU, apply GELU and sum bias gradients in kernels of their own
    #[arg(long)]
    unfused: bool,
    #[command(flatten)]
    kept: KeptArgs,
    /// What a GPU records of a step
    #[arg(long, default_value = "auto")]
    graph: Recording,
    /// Measure where a step's time goes, too
    #[arg(long)]
    profile: bool,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// Arguments of `bench upscale`. Defaults are GPT-2 with 124 million parameters, twice as wide.
#[derive(clap::Args)]
pub struct UpscaleArgs {
    /// Width of the narrow model, a multiple of 64
    #[arg(long, default_value_t = 768)]
    width: usize,
    /// Its layers
    #[arg(long, default_value_t = 12)]
    layers: usize,
    /// Its vocabulary
    #[arg(long, default_value_t = 50257)]
    vocab: usize,
    /// How many times wider it gets
    #[arg(long, default_value_t = 2)]
    times: usize,
    /// σ of the noise
    #[arg(long, value_name = "σ", default_value_t = 0.1)]
    noise: f64,
    #[command(flatten)]
    place: super::PlaceArgs,
    /// Folder for the narrow checkpoint (1.5 GB by default), which is removed at the end; the system's temporary
    /// folder if left out
    #[arg(long, value_name = "DIR")]
    folder: Option<PathBuf>,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// Arguments of `bench comm`.
#[derive(clap::Args)]
pub struct CommArgs {
    /// Bytes of a rank's values, at first; each further size is four times as large
    #[arg(long, default_value_t = 64 << 10)]
    smallest: usize,
    /// Bytes, at most
    #[arg(long, default_value_t = 256 << 20)]
    largest: usize,
    /// Calls to time at each size, after 3 that are not
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    calls: u32,
    #[command(flatten)]
    place: super::PlaceArgs,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// Arguments of `bench tokenize`.
#[derive(clap::Args)]
pub struct TokenizeArgs {
    /// The text: a file, a folder, or JSONL; a generated corpus if left out
    text: Option<PathBuf>,
    /// Bytes of the generated corpus
    #[arg(long, default_value_t = 50_000_000, value_parser = clap::value_parser!(u64).range(1..))]
    bytes: u64,
    /// A tokenizer.json; one is trained on the text if left out
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
    /// Vocabulary of the tokenizer that is trained
    #[arg(long, default_value_t = 8192)]
    vocab: usize,
    /// How often both are measured, in turns
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    pairs: u32,
    /// Folder for what is made, and removed at the end; the system's temporary folder if left out
    #[arg(long, value_name = "DIR")]
    folder: Option<PathBuf>,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

pub fn run(command: Command) -> Result<()> {
    match command {
        Command::Ops(args) => ops(args),
        Command::Train(args) => train(args),
        Command::Upscale(args) => upscale(args),
        Command::Comm(args) => comm(args),
        Command::Tokenize(args) => tokenize(args),
    }
}

fn comm(args: CommArgs) -> Result<()> {
    let CommArgs { smallest, largest, calls, place, json } = args;
    let bench = CommBench { smallest, largest, calls: calls as usize };
    let Some(speed) = bench::comm(place.place(), bench)? else { return Ok(()) };
    if json {
        return print_json(&speed);
    }
    let (ranks, here) = (speed.ranks, speed.ranks_on_host);
    say!("ranks: {ranks}, on a host {here}, over {}; {}; values of {}", speed.over, speed.device, speed.dtype)?;
    let mut table = Table::new(["operation", "size", "ms", "algorithm GB/s", "bus GB/s"]);
    for size in &speed.sizes {
        let [ms, algorithm, bus] = [size.ms, size.algorithm_gb_per_second, size.bus_gb_per_second];
        let cells = [format!("{ms:.3}"), format!("{algorithm:.3}"), format!("{bus:.3}")];
        table.row([size.operation.to_string(), machine::size(size.bytes)].into_iter().chain(cells));
    }
    super::print(table)
}

fn ops(args: OpsArgs) -> Result<()> {
    let OpsArgs { preset, batch, only, place, kept, unfused, json } = args;
    let place = Place { unfused, ..kept.at(place.place()) };
    let speed = bench::ops(place, OpsBench { preset, batch, only })?;
    if json {
        return print_json(&speed);
    }
    let (copy, product) = (speed.copy_gb_per_second, speed.product_tflops);
    say!("{}: a copy reaches {copy:.0} GB/s, a large product {product:.2} TFLOP/s", speed.device)?;
    let mut table = Table::new(["op", "ms", "GB/s", "TFLOP/s", "share"]);
    for op in &speed.ops {
        let share = format!("{:.0} %", op.share * 100.0);
        let number = |x: f64, digits: usize| format!("{x:.digits$}");
        table.row([op.name.clone(), number(op.ms, 4), number(op.gb_per_second, 1), number(op.tflops, 3), share]);
    }
    super::print(table)
}

fn train(args: TrainArgs) -> Result<()> {
    let TrainArgs { preset, batch, steps, recompute, unfused, graph, profile, .. } = args;
    let bench = TrainBench { preset, batch, steps: steps as usize, recompute, graph, profile };
    let place = Place { eager: graph == Recording::None, unfused, ..args.kept.at(args.place.place()) };
    let speed = bench::train(place, bench)?;
    if args.json {
        return print_json(&speed);
    }
    say!(
        "width {}, {} parameters, {}: {:.1} ms a step (best {:.1}), {}, {:.3} TFLOP/s",
        speed.width,
        human::count(speed.parameters as f64),
        speed.device,
        speed.ms_per_step,
        speed.ms_best,
        human::rate(speed.tokens_per_second, "tokens"),
        speed.tflops
    )?;
    for place in speed.profile.iter().flatten() {
        say!("  {:8.2} ms  {:5.1} ×  {}", place.ms, place.calls, place.place)?;
    }
    Ok(())
}

fn upscale(args: UpscaleArgs) -> Result<()> {
    let bench = UpscaleBench {
        width: args.width,
        layers: args.layers,
        vocab: args.vocab,
        times: args.times,
        noise: args.noise,
        folder: args.folder.unwrap_or_else(std::env::temp_dir),
    };
    let speed = bench::upscale(args.place.place(), &bench)?;
    if args.json {
        return print_json(&speed);
    }
    let count = |n: usize| human::count(n as f64);
    say!("{} → {} parameters, σ = {}", count(speed.parameters), count(speed.wide_parameters), speed.noise)?;
    say!("  open and verify     {:.3} s", speed.open_seconds)?;
    say!("  into fresh memory   {:.3} s", speed.first_touch_seconds)?;
    say!(
        "  into touched memory {:.3} s, {:.2} GB/s (best {:.2}); a plain fill runs at {:.2} GB/s",
        speed.seconds,
        speed.gb_per_second,
        speed.gb_per_second_best,
        speed.fill_gb_per_second
    )?;
    if let Some(most) = speed.anonymous_over_wide {
        say!("  anonymous memory    {most:.3} × the wide state")?;
    }
    Ok(())
}

fn tokenize(args: TokenizeArgs) -> Result<()> {
    let TokenizeArgs { text, bytes, tokenizer, vocab, pairs, folder, json } = args;
    let folder = folder.unwrap_or_else(std::env::temp_dir);
    let speed = bench::tokenize(&TokenizeBench { text, bytes, tokenizer, vocab, pairs: pairs as usize, folder })?;
    if json {
        return print_json(&speed);
    }
    say!(
        "{} in {} documents, {} tokens of {}, {} threads",
        human::bytes(speed.text_bytes),
        speed.documents,
        human::count(speed.tokens as f64),
        speed.vocab,
        speed.threads
    )?;
    say!("  data tokenize, file to dataset   {:7.1} MB/s", speed.mb_per_second)?;
    say!("  the crate's encode_batch_fast    {:7.1} MB/s", speed.crate_mb_per_second)?;
    say!("  ratio                            {:7.2} (median of {} pairs)", speed.ratio, speed.ratios.len())
}
