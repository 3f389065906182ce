//! `data`: tokenize, train a tokenizer, generate a corpus, inspect.

use super::{print_json, show};
use crate::{
    Error, Result,
    data::{
        Tokenizer,
        dataset::DatasetInfo,
        inspect::{InspectOptions, inspect},
        output::Partial,
        shard::TokenDtype,
        statistics::Frequent,
        synth::{CorpusFormat, Synth},
        text::Corpus,
        tokenize::{self, TokenizeOptions},
    },
    report::{
        human,
        progress::{Progress, Show, Unit, WorkProgress},
        table::Table,
    },
};
use std::{
    fs::File,
    io::{BufWriter, Write},
    path::PathBuf,
};

/// Commands on data.
#[derive(clap::Subcommand)]
pub enum Command {
    /// Turn text (a file, a folder, JSONL) into a dataset folder: shards of tokens and a validation part. Interrupted, the
    /// same command goes on where it was
    Tokenize(TokenizeArgs),
    /// Train a byte-level BPE tokenizer on text
    TrainTokenizer(TrainArgs),
    /// Write a corpus of known entropy
    Synth(SynthArgs),
    /// Show what a text, tokenizer, shard, dataset folder, or file of rows holds
    Inspect(InspectArgs),
}

/// Arguments of `data tokenize`.
#[derive(clap::Args)]
pub struct TokenizeArgs {
    /// The text: a file, a folder, or JSONL, each also as .gz or .zst; - for standard input
    text: PathBuf,
    /// A tokenizer.json, or bytes
    #[arg(long, value_name = "FILE", default_value = "bytes")]
    tokenizer: PathBuf,
    /// The dataset folder
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Part of the documents to validate on
    #[arg(long, default_value_t = TokenizeOptions::default().val_fraction)]
    val_fraction: f64,
    /// Tokens in a file
    #[arg(long, default_value_t = TokenizeOptions::default().shard_tokens)]
    shard_tokens: u64,
    /// Field of JSONL lines that holds the text
    #[arg(long, default_value = "text")]
    field: String,
    /// Leave out JSONL lines that are bad, and count them, instead of failing at the first
    #[arg(long)]
    skip_bad: bool,
    /// Replace a dataset that exists
    #[arg(long)]
    force: bool,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// Arguments of `data train-tokenizer`.
#[derive(clap::Args)]
pub struct TrainArgs {
    /// The text: a file, a folder, or JSONL, each also as .gz or .zst; - for standard input
    text: PathBuf,
    /// Tokens of the vocabulary, with 256 bytes and the end-of-text token among them
    #[arg(long, default_value_t = 4096)]
    vocab: usize,
    /// The tokenizer.json to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Field of JSONL lines that holds the text
    #[arg(long, default_value = "text")]
    field: String,
    /// Replace a file that exists
    #[arg(long)]
    force: bool,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// Arguments of `data synth`.
#[derive(clap::Args)]
pub struct SynthArgs {
    /// The file to write; .jsonl has one document a line, anything else <|endoftext|> between documents
    out: PathBuf,
    /// Bytes, about
    #[arg(long, default_value_t = 4_000_000)]
    bytes: u64,
    /// Seed of the language
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Index of the first document
    #[arg(long, default_value_t = 0)]
    first: u64,
    /// Replace a file that exists
    #[arg(long)]
    force: bool,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// Arguments of `data inspect`.
#[derive(clap::Args)]
pub struct InspectArgs {
    /// What to look at
    path: PathBuf,
    /// Field of JSONL lines that holds the text
    #[arg(long, default_value = "text")]
    field: String,
    /// Type of the tokens of a .bin without header
    #[arg(long)]
    dtype: Option<Dtype>,
    /// Name of the label column of a CSV file
    #[arg(long)]
    label_column: Option<String>,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// Types of tokens.
#[derive(Clone, Copy, clap::ValueEnum)]
pub enum Dtype {
    /// 16 bits.
    Uint16,
    /// 32 bits.
    Uint32,
}

pub fn run(command: Command) -> Result<()> {
    match command {
        Command::Tokenize(args) => tokenize(args),
        Command::TrainTokenizer(args) => train_tokenizer(args),
        Command::Synth(args) => synth(args),
        Command::Inspect(args) => look(args),
    }
}

/// Shows the progress that the data module reports, one bar for each stage.
pub fn shown(show: Show) -> impl FnMut(tokenize::Progress) + Send {
    let mut bar: Option<(&'static str, u64, WorkProgress)> = None;
    move |progress| {
        if bar.as_ref().is_none_or(|(stage, ..)| *stage != progress.stage) {
            bar = Some((progress.stage, 0, WorkProgress::new(progress.stage, progress.total, Unit::Bytes, show)));
        }
        if let Some((_, done, bar)) = &mut bar {
            bar.advance(progress.done.saturating_sub(*done));
            *done = progress.done;
        }
    }
}

/// What `data tokenize --json` prints.
#[derive(serde::Serialize)]
struct Tokenized<'a> {
    #[serde(flatten)]
    info: &'a DatasetInfo,
    /// Bad lines that were left out.
    skipped_lines: u64,
}

fn tokenize(args: TokenizeArgs) -> Result<()> {
    let corpus = Corpus::open(&args.text, &args.field)?.skip_bad(args.skip_bad);
    let tokenizer = Tokenizer::load(&args.tokenizer)?;
    let options = TokenizeOptions {
        val_fraction: args.val_fraction,
        shard_tokens: args.shard_tokens,
        force: args.force,
        ..TokenizeOptions::default()
    };
    let info = tokenize::tokenize(&corpus, &tokenizer, &args.out, &options, &mut shown(show(args.json)))?;
    let skipped = corpus.skipped();
    if skipped.lines > 0 {
        let told = Progress::new("skipped", 0, 0, Show::Plain);
        skipped.first.iter().for_each(|line| told.line(line));
        told.line(&format!("{} bad lines were left out", skipped.lines));
    }
    if args.json {
        return print_json(&Tokenized { info: &info, skipped_lines: skipped.lines });
    }
    say!(
        "{} tokens to train on in {} documents, {} to validate on in {}; vocabulary {}; {}",
        human::count(info.train.tokens as f64),
        info.train.documents,
        human::count(info.val.tokens as f64),
        info.val.documents,
        info.vocab,
        args.out.display()
    )?;
    Ok(())
}

fn train_tokenizer(args: TrainArgs) -> Result<()> {
    if args.out.exists() && !args.force {
        return Err(Error::Exists { path: args.out });
    }
    let corpus = Corpus::open(&args.text, &args.field)?;
    let (tokenizer, trained) = tokenize::train_tokenizer(&corpus, args.vocab, &mut shown(show(args.json)))?;
    tokenizer.save(&args.out, args.force)?;
    if args.json {
        return print_json(&trained);
    }
    say!("vocabulary {} from {}; {}", trained.vocab, human::bytes(trained.text_bytes), args.out.display())?;
    Ok(())
}

/// What `data synth` wrote.
#[derive(serde::Serialize)]
struct Written {
    documents: usize,
    bytes: u64,
    /// −ln p of the text, nats.
    nats: f64,
    nats_per_byte: f64,
}

fn synth(args: SynthArgs) -> Result<()> {
    if args.bytes == 0 {
        return Err(Error::config("--bytes", 0, "must be 1 or more"));
    }
    let partial = Partial::file(&args.out, args.force)?;
    let jsonl = args.out.extension().is_some_and(|e| e == "jsonl");
    let format = if jsonl { CorpusFormat::Jsonl } else { CorpusFormat::Text };
    let mut out = BufWriter::new(File::create(partial.path()).map_err(Error::io("create", partial.path()))?);
    let stats = Synth::new(args.seed).write_corpus(&mut out, args.first, args.bytes, format);
    let stats = stats
        .and_then(|stats| out.flush().and_then(|()| out.get_ref().sync_all()).map(|()| stats))
        .map_err(Error::io("write", &args.out))?;
    drop(out);
    partial.publish()?;
    let nats: f64 = stats.document_nats.iter().sum();
    let written = Written {
        documents: stats.document_nats.len(),
        bytes: stats.bytes,
        nats,
        nats_per_byte: nats / stats.bytes as f64,
    };
    if args.json {
        return print_json(&written);
    }
    say!(
        "{} documents, {}, {:.4} nats a byte; {}",
        written.documents,
        human::bytes(written.bytes),
        written.nats_per_byte,
        args.out.display()
    )?;
    Ok(())
}

fn look(args: InspectArgs) -> Result<()> {
    let dtype = args.dtype.map(|dtype| match dtype {
        Dtype::Uint16 => TokenDtype::Uint16,
        Dtype::Uint32 => TokenDtype::Uint32,
    });
    let options = InspectOptions { field: args.field, dtype, label_column: args.label_column };
    let mut summary = inspect(&args.path, &options)?;
    if args.json {
        return print_json(&summary);
    }
    let frequent = summary.take_most_frequent();
    super::print(toml::to_string_pretty(&summary).map_err(|e| Error::file(&args.path, e.to_string()))?)?;
    if frequent.is_empty() {
        return Ok(());
    }
    let mut table = Table::new(["token", "count", "share", "text"]);
    for Frequent { token, text, count, share } in frequent {
        let share = format!("{:.2} %", 100.0 * share);
        table.row([token.to_string(), count.to_string(), share, text.map_or(String::new(), |t| format!("{t:?}"))]);
    }
    say!("\n{table}")
}
