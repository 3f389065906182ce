//! `generate`: continue a text, or many.

use super::print_json;
use crate::{
    Error, Result,
    data::Tokenizer,
    model::{Network, decoder::Generator},
    ops::Ops,
    run::{self, Author, Drawing, Model, Work},
    upscale::Origin,
};
use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// Arguments of `generate`.
#[derive(clap::Args)]
pub struct Args {
    /// The checkpoint, or a run folder, whose newest one is taken
    checkpoint: PathBuf,
    /// The text to continue; the start of a document if left out
    #[arg(long, default_value = "")]
    prompt: String,
    /// Continue many texts: JSONL with a "prompt" in each line, or - for standard input; prints JSONL
    #[arg(long, value_name = "FILE", conflicts_with = "prompt")]
    prompts: Option<PathBuf>,
    /// End before this text where the model writes it; may be repeated
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
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
    let Args { tokens, temperature, top_k, top_p, seed, .. } = args;
    let drawing = Drawing { tokens, temperature, top_k, top_p, seed, stop: args.stop.clone() };
    drawing.check(|field| format!("--{}", field.replace('_', "-")))?;
    let origin = Origin::open(&run::checkpoint_path(&args.checkpoint)?)?;
    let tokenizer = match &args.tokenizer {
        Some(path) => Tokenizer::load(path)?,
        None => run::tokenizer(&origin)?,
    };
    let place = args.place.for_weights(origin.dtype()?);
    place.run(Generating { origin: &origin, tokenizer: &tokenizer, drawing: &drawing, args: &args })
}

struct Generating<'a> {
    origin: &'a Origin,
    tokenizer: &'a Tokenizer,
    drawing: &'a Drawing,
    args: &'a Args,
}

impl Work for Generating<'_> {
    type Output = ();

    fn on<B: Ops>(self, backend: B) -> Result<()> {
        let Self { origin, tokenizer, drawing, args } = self;
        let prompts = args.prompts.as_deref().map_or_else(|| Ok(vec![args.prompt.clone()]), read_prompts)?;
        let model = Model::load(backend, origin)?;
        let (backend, weights) = (&model.backend, model.weights());
        let Network::Decoder(decoder) = &model.network else {
            return Err(Error::file(&args.checkpoint, "is a classifier: it has no text to continue"));
        };
        let path = args.tokenizer.as_ref().unwrap_or(&args.checkpoint);
        let fits = |prompt: &String| run::encode(tokenizer, decoder.spec.vocab, prompt);
        let named = |e: Error| Error::config("--tokenizer", path.display(), e.to_string());
        prompts.iter().try_for_each(|prompt| fits(prompt).map(drop).map_err(named))?;
        let mut generator = Generator::new(backend, decoder)?;
        let author = Author { backend, decoder, weights, tokenizer, drawing };
        if args.prompts.is_some() {
            for (index, prompt) in prompts.iter().enumerate() {
                let written = author.go_on(&mut generator, prompt, index, |_| Ok(()))?;
                let line = serde_json::to_string(&written).map_err(|e| Error::Usage(format!("no JSON: {e}")))?;
                say!("{line}")?;
            }
            return Ok(());
        }
        if args.json {
            return print_json(&author.go_on(&mut generator, &args.prompt, 0, |_| Ok(()))?);
        }
        author.go_on(&mut generator, &args.prompt, 0, |text| super::print(text))?;
        say!("")
    }
}

/// The prompts of a JSONL file, or of standard input for `-`.
fn read_prompts(path: &Path) -> Result<Vec<String>> {
    #[derive(serde::Deserialize)]
    struct Line {
        prompt: String,
    }
    let text = match path.to_str() {
        Some("-") => io::read_to_string(io::stdin()),
        _ => fs::read_to_string(path),
    };
    let text = text.map_err(Error::io("read", path))?;
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let prompts = lines.map(|(i, line)| match serde_json::from_str(line) {
        Ok(Line { prompt }) => Ok(prompt),
        Err(e) => {
            Err(Error::file(path, format!("line {}: {e}; a line is {{\"prompt\": \"the text to continue\"}}", i + 1)))
        }
    });
    prompts.collect()
}
