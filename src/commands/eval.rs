//! `eval`: the loss of a checkpoint on data, and its choices in multiple-choice tasks.

use super::{print_json, show, tasks};
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
    run::{self, Model, Work},
    upscale::Origin,
};
use std::{
    f64::consts::LN_2,
    path::{Path, PathBuf},
};

/// Arguments of `eval`.
#[derive(clap::Args)]
pub struct Args {
    /// The checkpoint, or a run folder, whose newest one is taken
    checkpoint: PathBuf,
    /// A dataset folder, a .bin shard, text (a file or folder), or for an mlp a CSV file
    #[arg(required_unless_present = "tasks")]
    data: Option<PathBuf>,
    /// Multiple-choice tasks instead of data: JSONL in HellaSwag's form, {"ctx": "…", "endings": ["…"], "label": 0}
    #[arg(long, value_name = "FILE", conflicts_with = "data")]
    tasks: Option<PathBuf>,
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
    /// Print the result as JSON: loss (nats per token), perplexity, tokens, bits per byte; or the accuracies
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
    args.place.for_weights(origin.dtype()?).run(Evaluating { origin: &origin, args: &args })
}

struct Evaluating<'a> {
    origin: &'a Origin,
    args: &'a Args,
}

impl Work for Evaluating<'_> {
    type Output = ();

    fn on<B: Ops>(self, backend: B) -> Result<()> {
        let Self { origin, args } = self;
        match (&args.tasks, &args.data) {
            (Some(file), _) => choose(backend, origin, file, args),
            (None, Some(data)) => measure(backend, origin, data, args),
            (None, None) => Err(Error::Usage("name the data to evaluate on, or --tasks".into())),
        }
    }
}

/// Multiple-choice tasks.
fn choose<B: Ops>(backend: B, origin: &Origin, file: &Path, args: &Args) -> Result<()> {
    if !matches!(origin.meaning.spec, Spec::Decoder(_)) {
        return Err(Error::file(&args.checkpoint, "is a classifier: it cannot score endings of a text"));
    }
    let (tokenizer, model) = (tokenizer(origin, args)?, Model::load(backend, origin)?);
    let progress = |endings| WorkProgress::new("eval", endings, Unit::Count("endings"), show(args.json));
    let score = tasks::score(&model, &tokenizer, file, args.batch, progress)?;
    if args.json {
        return print_json(&score);
    }
    say!(
        "accuracy {:.4}, by probability per byte {:.4}, per token {:.4}; guessing {:.4}; {} tasks",
        score.accuracy,
        score.accuracy_per_byte,
        score.accuracy_per_token,
        score.chance,
        score.tasks
    )
}

/// The loss on data.
fn measure<B: Ops>(backend: B, origin: &Origin, data: &Path, args: &Args) -> Result<()> {
    let spec = &origin.meaning.spec;
    let micro = MicroBatch { samples: args.batch, length: spec.context() };
    let mut tokens_per_byte = None;
    let samples: Box<dyn Samples> = match spec {
        Spec::Decoder(_) => {
            let (tokens, per_byte) = tokens(origin, data, args)?;
            tokens_per_byte = per_byte;
            tokens.order(micro.length, None)?;
            let (first, rules) = (tokens.clone(), BatchRules::default());
            Box::new(TokenSamples::new(first, Some(tokens), micro, None, rules)?)
        }
        Spec::Mlp(m) => {
            let rows = RowData::read_csv(data, args.label_column.as_deref())?;
            if rows.inputs != m.inputs || rows.classes > m.classes {
                let why = format!(
                    "has {} inputs and {} classes; the model has {} and {}",
                    rows.inputs, rows.classes, m.inputs, m.classes
                );
                return Err(Error::file(data, why));
            }
            Box::new(RowSamples::new(rows.clone(), Some(rows), micro, None)?)
        }
    };
    let model = Model::load(backend, origin)?;
    let progress = WorkProgress::new("eval", samples.held_out(), Unit::Count("windows"), show(args.json));
    let mut result = model.evaluate(samples, micro, |n| progress.advance(n))?;
    result.bits_per_byte = tokens_per_byte.map(|per_byte| result.loss / LN_2 * per_byte);
    progress.finish();
    if args.json {
        return print_json(&result);
    }
    let bits = result.bits_per_byte.map_or(String::new(), |bits| format!(", {bits:.4} bits per byte"));
    say!("loss {:.6} nats, perplexity {:.4}{bits}, {} tokens", result.loss, result.perplexity, result.tokens)
}

/// The tokens to evaluate on, and how many stand for a byte of text where that is known.
fn tokens(origin: &Origin, path: &Path, args: &Args) -> Result<(TokenData, Option<f64>)> {
    let vocab = origin.meaning.spec.classes();
    let bin = path.extension().is_some_and(|e| e == "bin");
    if bin || path.join(DATASET_FILE).exists() {
        let dataset = Dataset::open(path, &DatasetOptions { vocab: Some(vocab), ..Default::default() })?;
        let info = dataset.info.as_ref().filter(|info| info.text_bytes > 0);
        let per_byte = info.map(|info| (info.train.tokens + info.val.tokens) as f64 / info.text_bytes as f64);
        let part = match (args.part, bin) {
            (Part::Val, false) => dataset.val.ok_or_else(crate::feed::no_held_out)?,
            _ => dataset.train,
        };
        return Ok((part, per_byte));
    }
    text_tokens(path, &tokenizer(origin, args)?, vocab)
}

/// The tokenizer that was named, or the checkpoint's own.
fn tokenizer(origin: &Origin, args: &Args) -> Result<Tokenizer> {
    args.tokenizer.as_ref().map_or_else(|| run::tokenizer(origin), Tokenizer::load)
}

/// The tokens of a text, documents ended by the end-of-text token where there is one, and how many stand for a byte.
fn text_tokens(path: &Path, tokenizer: &Tokenizer, vocab: usize) -> Result<(TokenData, Option<f64>)> {
    let (mut tokens, mut bytes) = (Vec::new(), 0);
    for document in Corpus::open(path, "text")?.documents() {
        let document = document?;
        bytes += document.len();
        tokens.extend(tokenizer.encode(&document)?);
        tokens.extend(tokenizer.end_of_text());
    }
    if let Some(&token) = tokens.iter().find(|&&t| t as usize >= vocab) {
        let why = format!(
            "token {token} is not in the model's vocabulary of {vocab}: use the tokenizer that it was trained with"
        );
        return Err(Error::file(path, why));
    }
    let per_byte = tokens.len() as f64 / bytes.max(1) as f64;
    Ok((TokenData::from_tokens(tokens), Some(per_byte)))
}
