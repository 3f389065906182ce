//! `generate`: continue a text, or many.

use super::print_json;
use crate::{
    Error, Result,
    data::Tokenizer,
    model::{
        Network,
        decoder::{Decoder, Generator},
    },
    ops::Ops,
    rng,
    run::{self, Model, Work},
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
    if !(args.temperature >= 0.0 && args.temperature.is_finite()) {
        return Err(Error::config("--temperature", args.temperature, "must be 0 or a positive number"));
    }
    if !(args.top_p > 0.0 && args.top_p <= 1.0) {
        return Err(Error::config("--top-p", args.top_p, "must be above 0 and at most 1"));
    }
    if args.stop.iter().any(String::is_empty) {
        return Err(Error::config("--stop", "", "must not be empty: every text begins with it"));
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
    let prompts = args.prompts.as_deref().map(read_prompts).transpose()?;
    let model = Model::load(backend, origin)?;
    let Network::Decoder(decoder) = &model.network else {
        return Err(Error::file(&args.checkpoint, "is a classifier: it has no text to continue"));
    };
    let generator = Generator::new(&model.backend, decoder)?;
    let mut author = Author { model: &model, decoder, generator, tokenizer, args };
    if let Some(prompts) = prompts {
        for (index, prompt) in prompts.iter().enumerate() {
            let written = author.go_on(prompt, index, |_| Ok(()))?;
            let line = serde_json::to_string(&written).map_err(|e| Error::Usage(format!("no JSON: {e}")))?;
            say!("{line}")?;
        }
        return Ok(());
    }
    if args.json {
        return print_json(&author.go_on(&args.prompt, 0, |_| Ok(()))?);
    }
    author.go_on(&args.prompt, 0, |text| super::print(text))?;
    say!("")
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

/// What `--json` and `--prompts` print of a text.
#[derive(serde::Serialize)]
struct Written<'a> {
    prompt: &'a str,
    /// What was added, up to a stop string.
    text: String,
    /// Tokens that were drawn, those of a stop string included.
    tokens: usize,
    /// `length`, `stop` (a stop string), or `end` (of the document).
    ended: &'static str,
}

/// A model that goes on with texts, one after another.
struct Author<'a, B: Ops> {
    model: &'a Model<B>,
    decoder: &'a Decoder<B>,
    generator: Generator<B>,
    tokenizer: &'a Tokenizer,
    args: &'a Args,
}

impl<B: Ops> Author<'_, B> {
    /// Goes on with a prompt, and gives each new piece of text to `show` as soon as it is certain. The `index` makes
    /// the draws of each prompt its own, whatever stands before it.
    fn go_on<'p>(
        &mut self,
        prompt: &'p str,
        index: usize,
        mut show: impl FnMut(&str) -> Result<()>,
    ) -> Result<Written<'p>> {
        let (args, decoder, model) = (self.args, self.decoder, self.model);
        let context = decoder.spec.context;
        let mut tokens = self.encode(prompt)?;
        let mut draws = rng::Stream::new(args.seed.wrapping_add(index as u64), "generate").rng();
        self.generator.clear();
        let (mut added, mut text, mut shown, mut ended) = (Vec::new(), String::new(), 0, "length");
        let mut fresh = tokens[tokens.len().saturating_sub(context)..].to_vec();
        for _ in 0..args.tokens {
            if self.generator.length() + fresh.len() > context {
                // The window is full: go on from its second half.
                self.generator.clear();
                fresh = tokens[tokens.len() - (context / 2).max(1)..].to_vec();
            }
            let mut logits = self.generator.extend(&model.backend, decoder, model.weights(), &fresh)?;
            logits.truncate(self.tokenizer.vocab_size());
            let token = sample(&logits, args, draws.uniform());
            if Some(token as u32) == self.tokenizer.end_of_text() {
                ended = "end";
                break;
            }
            tokens.push(token);
            added.push(token as u32);
            fresh = vec![token];
            text = self.tokenizer.decode(&added)?;
            if let Some(at) = args.stop.iter().filter_map(|stop| text.find(stop.as_str())).min() {
                text.truncate(at);
                ended = "stop";
                break;
            }
            let certain = certain(&text, &args.stop);
            if certain > shown && text.is_char_boundary(shown) {
                show(&text[shown..certain])?;
                shown = certain;
            }
        }
        if text.is_char_boundary(shown) {
            show(&text[shown.min(text.len())..])?;
        }
        Ok(Written { prompt, text, tokens: added.len(), ended })
    }

    /// The tokens of a prompt, at least one.
    fn encode(&self, prompt: &str) -> Result<Vec<i32>> {
        let mut tokens: Vec<i32> = self.tokenizer.encode(prompt)?.into_iter().map(|t| t as i32).collect();
        if tokens.is_empty() {
            // What stands before a document's first token in training.
            tokens.push(self.tokenizer.end_of_text().unwrap_or(0) as i32);
        }
        let vocab = self.decoder.spec.vocab;
        if let Some(token) = tokens.iter().find(|&&t| t as usize >= vocab) {
            let why =
                format!("gives token {token}, but the model's vocabulary is {vocab}: give the one it was trained with");
            let path = self.args.tokenizer.as_ref().unwrap_or(&self.args.checkpoint);
            return Err(Error::config("--tokenizer", path.display(), why));
        }
        Ok(tokens)
    }
}

/// How much of a text stays as it is, whatever comes: not the bytes of a character that may be incomplete (it decodes
/// to U+FFFD until it is not), nor what may be the beginning of a stop string.
fn certain(text: &str, stops: &[String]) -> usize {
    let whole = text.trim_end_matches('\u{fffd}');
    let begins = |at: usize| stops.iter().any(|stop| stop.starts_with(&whole[at..]));
    whole.char_indices().map(|(at, _)| at).find(|&at| begins(at)).unwrap_or(whole.len())
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

#[cfg(test)]
mod tests {
    use super::certain;

    #[test]
    fn what_may_become_a_stop_string_is_kept_back() {
        let stops = ["\n\n".to_string(), "END".to_string()];
        for (text, certain_text) in
            [("ab", "ab"), ("ab\n", "ab"), ("ab\nc", "ab\nc"), ("abE", "ab"), ("abEN", "ab"), ("aé\u{fffd}", "aé")]
        {
            assert_eq!(certain(text, &stops), certain_text.len(), "{text}");
        }
        assert_eq!(certain("any\n", &[]), 4);
    }
}
