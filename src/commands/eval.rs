//! `eval`: the loss of a checkpoint on data.

use super::{print_json, show};
use crate::{
    Error, Result,
    data::{
        Dataset, RowData, TokenData, Tokenizer,
        dataset::{BatchRules, DATASET_FILE, DatasetOptions},
        text::Corpus,
    },
    feed::{RowSamples, Samples, TokenSamples},
    model::{MicroBatch, spec::Spec},
    ops::Ops,
    report::progress::{Unit, WorkProgress},
    run::{self, Evaluation, Model, Work},
    upscale::Origin,
};
use std::path::{Path, PathBuf};

/// Arguments of `eval`.
#[derive(clap::Args)]
pub struct Args {
    /// The checkpoint, or a run folder, whose newest one is taken
    checkpoint: PathBuf,
    /// A dataset folder, a .bin shard, text (a file or folder), or for an mlp a CSV file
    data: PathBuf,
    /// Part of a dataset folder
    #[arg(long, default_value = "val")]
    part: Part,
    /// The tokenizer for text, if the checkpoint carries none: a tokenizer.json, or bytes
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
    /// Name of the label column of a CSV file; the last one if left out
    #[arg(long)]
    label_column: Option<String>,
    /// Sequences (rows) computed at a time
    #[arg(long, default_value_t = 8)]
    batch: usize,
    #[command(flatten)]
    place: super::PlaceArgs,
    /// Print the result as JSON: loss (nats per token), perplexity, tokens
    #[arg(long)]
    json: bool,
}

/// Most sequences at a time: far more than keep a machine busy.
const MAX_BATCH: usize = 1 << 12;

/// Part of a dataset.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// What training does not see.
    Val,
    /// What training sees.
    Train,
}

pub fn run(args: Args) -> Result<()> {
    if args.batch == 0 || args.batch > MAX_BATCH {
        return Err(Error::config("--batch", args.batch, format!("must be between 1 and {MAX_BATCH}")));
    }
    let origin = Origin::open(&run::checkpoint_path(&args.checkpoint)?)?;
    let result = args.place.for_weights(origin.dtype()?).run(Evaluating { origin: &origin, args: &args })?;
    if args.json {
        return print_json(&result);
    }
    say!("loss {:.6} nats, perplexity {:.4}, {} tokens", result.loss, result.perplexity, result.tokens)?;
    Ok(())
}

struct Evaluating<'a> {
    origin: &'a Origin,
    args: &'a Args,
}

impl Work for Evaluating<'_> {
    type Output = Evaluation;

    fn on<B: Ops>(self, backend: B) -> Result<Evaluation> {
        evaluate(backend, self.origin, self.args)
    }
}

fn evaluate<B: Ops>(backend: B, origin: &Origin, args: &Args) -> Result<Evaluation> {
    let spec = &origin.meaning.spec;
    let micro = MicroBatch { samples: args.batch, length: spec.context() };
    let samples: Box<dyn Samples> = match spec {
        Spec::Decoder(_) => {
            let data = tokens(origin, args)?;
            data.order(micro.length, None)?;
            let (first, rules) = (data.clone(), BatchRules::default());
            Box::new(TokenSamples::new(first, Some(data), micro, None, rules)?)
        }
        Spec::Mlp(m) => {
            let rows = RowData::read_csv(&args.data, args.label_column.as_deref())?;
            if rows.inputs != m.inputs || rows.classes > m.classes {
                let why = format!(
                    "has {} inputs and {} classes; the model has {} and {}",
                    rows.inputs, rows.classes, m.inputs, m.classes
                );
                return Err(Error::file(&args.data, why));
            }
            Box::new(RowSamples::new(rows.clone(), Some(rows), micro, None)?)
        }
    };
    let model = Model::load(backend, origin)?;
    let progress = WorkProgress::new("eval", samples.held_out(), Unit::Count("windows"), show(args.json));
    let result = model.evaluate(samples, micro, |n| progress.advance(n))?;
    progress.finish();
    Ok(result)
}

/// The tokens to evaluate on.
fn tokens(origin: &Origin, args: &Args) -> Result<TokenData> {
    let (path, vocab) = (&args.data, origin.meaning.spec.classes());
    let bin = path.extension().is_some_and(|e| e == "bin");
    if bin || path.join(DATASET_FILE).exists() {
        let dataset = Dataset::open(path, &DatasetOptions { vocab: Some(vocab), ..Default::default() })?;
        return match (args.part, bin) {
            (Part::Val, false) => dataset.val.ok_or_else(crate::feed::no_held_out),
            _ => Ok(dataset.train),
        };
    }
    let tokenizer = match &args.tokenizer {
        Some(path) => Tokenizer::load(path)?,
        None => run::tokenizer(origin)?,
    };
    text_tokens(path, &tokenizer, vocab)
}

/// The tokens of a text, documents ended by the end-of-text token where there is one.
fn text_tokens(path: &Path, tokenizer: &Tokenizer, vocab: usize) -> Result<TokenData> {
    let mut tokens = Vec::new();
    for document in Corpus::open(path, "text")?.documents() {
        tokens.extend(tokenizer.encode(&document?)?);
        tokens.extend(tokenizer.end_of_text());
    }
    if let Some(&token) = tokens.iter().find(|&&t| t as usize >= vocab) {
        let why = format!(
            "token {token} is not in the model's vocabulary of {vocab}: use the tokenizer that it was trained with"
        );
        return Err(Error::file(path, why));
    }
    Ok(TokenData::from_tokens(tokens))
}
