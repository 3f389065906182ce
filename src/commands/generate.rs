//! `generate`: continue a text.

use super::print_json;
use crate::{
    Error, Result,
    data::Tokenizer,
    model::{Network, decoder::Generator},
    ops::Ops,
    rng,
    run::{self, Model, Work},
    upscale::Origin,
};
use std::path::PathBuf;

/// Arguments of `generate`.
#[derive(clap::Args)]
pub struct Args {
    /// The checkpoint, or a run folder, whose newest one is taken
    checkpoint: PathBuf,
    /// The text to continue; the start of a document if left out
    #[arg(long, default_value = "")]
    prompt: String,
    /// Tokens to add, at most
    #[arg(long, default_value_t = 200)]
    tokens: usize,
    /// Divides logits: 0 takes the likeliest token, 1 samples as the model says
    #[arg(long, default_value_t = 0.8)]
    temperature: f64,
    /// Sample among this many likeliest tokens; 0: all
    #[arg(long, default_value_t = 0)]
    top_k: usize,
    /// Sample among the likeliest tokens that have this probability together
    #[arg(long, default_value_t = 1.0)]
    top_p: f64,
    /// Seed of the draws
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// The tokenizer, if the checkpoint carries none: a tokenizer.json, or bytes
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
    #[command(flatten)]
    place: super::PlaceArgs,
    /// Print prompt and text as JSON when done, instead of the text as it comes
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> Result<()> {
    if !(args.temperature >= 0.0 && args.temperature.is_finite()) {
        return Err(Error::config("--temperature", args.temperature, "must be 0 or a positive number"));
    }
    if !(args.top_p > 0.0 && args.top_p <= 1.0) {
        return Err(Error::config("--top-p", args.top_p, "must be above 0 and at most 1"));
    }
    let origin = Origin::open(&run::checkpoint_path(&args.checkpoint)?)?;
    let tokenizer = match &args.tokenizer {
        Some(path) => Tokenizer::load(path)?,
        None => run::tokenizer(&origin)?,
    };
    let place = args.place.for_weights(origin.dtype()?);
    place.run(Generating { origin: &origin, tokenizer: &tokenizer, args: &args })
}

struct Generating<'a> {
    origin: &'a Origin,
    tokenizer: &'a Tokenizer,
    args: &'a Args,
}

impl Work for Generating<'_> {
    type Output = ();

    fn on<B: Ops>(self, backend: B) -> Result<()> {
        generate(backend, self.origin, self.tokenizer, self.args)
    }
}

fn generate<B: Ops>(backend: B, origin: &Origin, tokenizer: &Tokenizer, args: &Args) -> Result<()> {
    let model = Model::load(backend, origin)?;
    let Network::Decoder(decoder) = &model.network else {
        return Err(Error::file(&args.checkpoint, "is a classifier: it has no text to continue"));
    };
    let mut tokens: Vec<i32> = tokenizer.encode(&args.prompt)?.into_iter().map(|t| t as i32).collect();
    if tokens.is_empty() {
        // What stands before a document's first token in training.
        tokens.push(tokenizer.end_of_text().unwrap_or(0) as i32);
    }
    let vocab = decoder.spec.vocab;
    if let Some(token) = tokens.iter().find(|&&t| t as usize >= vocab) {
        let why =
            format!("gives token {token}, but the model's vocabulary is {vocab}: give the one it was trained with");
        let path = args.tokenizer.as_ref().unwrap_or(&args.checkpoint);
        return Err(Error::config("--tokenizer", path.display(), why));
    }
    let mut generator = Generator::new(&model.backend, decoder)?;
    let mut draws = rng::Stream::new(args.seed, "generate").rng();
    let (mut added, mut shown) = (Vec::new(), 0);
    let context = decoder.spec.context;
    let mut fresh = tokens[tokens.len().saturating_sub(context)..].to_vec();
    for _ in 0..args.tokens {
        if generator.length() + fresh.len() > context {
            // The window is full: go on from its second half.
            generator.clear();
            fresh = tokens[tokens.len() - (context / 2).max(1)..].to_vec();
        }
        let mut logits = generator.extend(&model.backend, decoder, model.weights(), &fresh)?;
        logits.truncate(tokenizer.vocab_size());
        let token = sample(&logits, args, draws.uniform());
        if Some(token as u32) == tokenizer.end_of_text() {
            break;
        }
        tokens.push(token);
        added.push(token as u32);
        fresh = vec![token];
        if !args.json {
            shown = print_new(tokenizer, &added, shown)?;
        }
    }
    let text = tokenizer.decode(&added)?;
    if args.json {
        return print_json(&serde_json::json!({ "prompt": args.prompt, "text": text, "tokens": added.len() }));
    }
    say!("{}", &text[shown.min(text.len())..])
}

/// Prints the part of the decoded text that is new and complete; returns how much has been printed.
fn print_new(tokenizer: &Tokenizer, added: &[u32], shown: usize) -> Result<usize> {
    let text = tokenizer.decode(added)?;
    // A character of several bytes may still be incomplete: it decodes to U+FFFD until it is not.
    let end = text.trim_end_matches('\u{fffd}').len();
    if end > shown && text.is_char_boundary(shown) {
        super::print(&text[shown..end])?;
        return Ok(end);
    }
    Ok(shown)
}

/// A token drawn from logits: `u` is uniform in [0, 1).
fn sample(logits: &[f64], args: &Args, u: f64) -> i32 {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
    if args.temperature == 0.0 {
        return order[0] as i32;
    }
    if args.top_k > 0 {
        order.truncate(args.top_k);
    }
    let top = logits[order[0]];
    let mut weights: Vec<f64> = order.iter().map(|&i| ((logits[i] - top) / args.temperature).exp()).collect();
    let total: f64 = weights.iter().sum();
    let mut kept = 0.0;
    let nucleus = weights.iter().position(|w| {
        kept += w / total;
        kept >= args.top_p
    });
    weights.truncate(nucleus.map_or(weights.len(), |last| last + 1));
    let mut left = u * weights.iter().sum::<f64>();
    let chosen = weights.iter().position(|w| {
        left -= w;
        left < 0.0
    });
    order[chosen.unwrap_or(weights.len() - 1)] as i32
}
