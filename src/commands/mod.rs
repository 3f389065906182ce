//! The command line: one file for each command, which turns arguments into calls of the library and results into text.
//!
//! Results go to standard output, progress and messages to standard error.

/// `println!`, but what goes wrong is an error: see [`print`].
macro_rules! say {
    ($($text:tt)*) => { super::print(format_args!("{}\n", format_args!($($text)*))) };
}

mod bench;
mod checkpoint;
mod compare_growth;
mod coord_check;
mod data;
mod doctor;
mod eval;
mod generate;
mod inspect;
mod plan;
mod quickstart;
mod report;
mod selftest;
mod sweep;
mod tasks;
mod train;
mod transfer;
mod upscale;
mod widen_tensors;

use crate::{
    DType, Error, Result,
    config::{Device, Precision},
    error::FAULT,
    report::progress::Show,
    run::Place,
};
use clap::{CommandFactory, Parser, Subcommand};
use std::{
    fmt::Display,
    fs,
    io::{self, IsTerminal, Write},
    path::PathBuf,
    process::ExitCode,
};

/// Train a small transformer, widen it exactly - weights and optimizer state -, and go on training.
#[derive(Parser)]
#[command(name = "mupscale", version = env!("MUPSCALE_VERSION"), propagate_version = true, max_term_width = 100)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// The whole method in three minutes: corpus, tokenizer, base model, exact widening, a comparison, a picture
    Quickstart(quickstart::Args),
    /// Train a model as a configuration file says
    Train(train::TrainArgs),
    /// Go on with a run from its newest checkpoint, as if it had never stopped
    Resume(train::ResumeArgs),
    /// Widen a checkpoint: weights, optimizer moments, and the shape that hyperparameters follow
    Upscale(upscale::Args),
    /// Widen the tensors of a model that mupscale cannot train, such as a PyTorch state dict
    WidenTensors(widen_tensors::Args),
    /// Continue a text
    Generate(generate::Args),
    /// Measure a checkpoint's loss on data
    Eval(eval::Args),
    /// Show a checkpoint or a configuration: shape, parameters, and every tensor's axes and multipliers
    Inspect(inspect::Args),
    /// Handle checkpoints as files
    #[command(subcommand)]
    Checkpoint(checkpoint::Command),
    /// Show a run under way on the terminal
    Watch(report::WatchArgs),
    /// Write runs as one HTML page: curves, norms, throughput, settings, samples
    Report(report::ReportArgs),
    /// Check that changes of activations do not grow with width, for μP and for standard parametrisation
    CoordCheck(coord_check::Args),
    /// Train many runs over axes of hyperparameters, packed on the cores or GPUs at hand
    Sweep(sweep::Args),
    /// Tune hyperparameters on a small upscale and use them on a large one, with the evidence
    Transfer(transfer::Args),
    /// Compare growth operators, and training from scratch, on equal tokens and equal FLOPs, from one base
    CompareGrowth(compare_growth::Args),
    /// Say what a training will take: parameters, memory, FLOPs, time, tuning, and what is known of such a growth
    Plan(plan::Args),
    /// Make and look at training data
    #[command(subcommand)]
    Data(data::Command),
    /// Measure speed
    #[command(subcommand)]
    Bench(bench::Command),
    /// Show what this machine offers: GPUs, driver, libraries; what is missing, and the fix
    Doctor(doctor::Args),
    /// Check that a GPU computes what the CPU does
    Selftest(selftest::Args),
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Write the manual pages, one for each command, for man(1)
    Man {
        /// The folder to write them to
        folder: PathBuf,
    },
}

/// Runs the command that the arguments name.
pub fn main() -> ExitCode {
    log();
    let args = Args::parse();
    match args.run() {
        Ok(()) => ExitCode::SUCCESS,
        // As if by SIGPIPE: who closed the pipe has seen enough.
        Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::BrokenPipe => ExitCode::from(141),
        Err(Error::Elsewhere { code }) => end(code),
        Err(error) => {
            // Where nobody reads the message the code still tells.
            let _ = writeln!(io::stderr(), "error: {error}");
            end(error.exit_code())
        }
    }
}

/// The exit code; at once after a fault, since the libraries of a device that failed, or that still waits for a lost rank,
/// may hang or crash in what they do when a process ends.
fn end(code: u8) -> ExitCode {
    if code == FAULT {
        signal_hook::low_level::exit(i32::from(code));
    }
    ExitCode::from(code)
}

/// Shows warnings on standard error; `MUPSCALE_LOG=debug` shows more.
fn log() {
    let level = std::env::var("MUPSCALE_LOG").ok().and_then(|level| level.parse().ok());
    let lines = tracing_subscriber::fmt().with_max_level(level.unwrap_or(tracing::Level::WARN));
    let lines = lines.with_writer(io::stderr).with_ansi(io::stderr().is_terminal());
    lines.without_time().with_target(false).init();
}

impl Args {
    fn run(self) -> Result<()> {
        match self.command {
            Command::Quickstart(args) => quickstart::run(args),
            Command::Train(args) => train::train(args),
            Command::Resume(args) => train::resume(args),
            Command::Upscale(args) => upscale::run(args),
            Command::WidenTensors(args) => widen_tensors::run(args),
            Command::Generate(args) => generate::run(args),
            Command::Eval(args) => eval::run(args),
            Command::Inspect(args) => inspect::run(args),
            Command::Checkpoint(command) => checkpoint::run(command),
            Command::Watch(args) => report::watch(args),
            Command::Report(args) => report::report(args),
            Command::CoordCheck(args) => coord_check::run(args),
            Command::Sweep(args) => sweep::run(args),
            Command::Transfer(args) => transfer::run(args),
            Command::CompareGrowth(args) => compare_growth::run(args),
            Command::Plan(args) => plan::run(args),
            Command::Data(command) => data::run(command),
            Command::Bench(command) => bench::run(command),
            Command::Doctor(args) => doctor::run(args),
            Command::Selftest(args) => selftest::run(args),
            Command::Completions { shell } => {
                let mut script = Vec::new();
                clap_complete::generate(shell, &mut Args::command(), "mupscale", &mut script);
                print(String::from_utf8_lossy(&script))
            }
            Command::Man { folder } => {
                fs::create_dir_all(&folder).map_err(Error::io("create", &folder))?;
                clap_mangen::generate_to(Args::command(), &folder).map_err(Error::io("write", &folder))
            }
        }
    }
}

/// Prints on standard output, at once. A pipe that was closed is an error like any other, where `print!` would panic.
fn print(text: impl Display) -> Result<()> {
    let mut out = io::stdout().lock();
    write!(out, "{text}").and_then(|()| out.flush()).map_err(Error::io("write", "standard output"))
}

/// Where to compute, as options of a command.
#[derive(clap::Args)]
struct PlaceArgs {
    /// Where to compute
    #[arg(long, default_value = "auto")]
    device: Device,
    /// Type to compute in
    #[arg(long, default_value = "auto")]
    precision: Precision,
    /// CPU threads; 0: all cores
    #[arg(long, default_value_t = 0)]
    threads: usize,
}

impl PlaceArgs {
    /// The place for weights that are stored in this type: `auto` means f64 for f64.
    fn for_weights(&self, stored: DType) -> Place {
        let f64_as_stored = self.precision == Precision::Auto && stored == DType::F64 && self.device != Device::Cuda;
        let precision = if f64_as_stored { Precision::F64 } else { self.precision };
        Place { precision, ..self.place() }
    }

    /// The place as it was asked for.
    fn place(&self) -> Place {
        Place { device: self.device, precision: self.precision, threads: self.threads, ..Place::default() }
    }
}

/// Prints a value as JSON on standard output.
fn print_json(value: &impl serde::Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value).map_err(|e| Error::Usage(format!("no JSON: {e}")))?;
    print(text + "\n")
}

/// How progress is shown beside a result that may be JSON.
fn show(json: bool) -> Show {
    Show::detect(json)
}
