//! The quickstart: the whole method on one small example, by the calls that the ordinary commands make.
//!
//! 1. a corpus of known entropy ([`crate::data::synth`]), or the user's own text; a tokenizer; a dataset;
//! 2. a narrow base model;
//! 3. the base model widened without noise, trained for some steps beside the narrow one: the losses are equal;
//! 4. the base model widened with noise, trained on;
//! 5. the same wide model from new weights, on the tokens that the widened one saw;
//! 6. a table, a picture, `summary.json`.
//!
//! Every step is announced with the command that repeats it.
//!
//! The held-out documents are whole documents of the corpus, chosen by their index
//! ([`crate::data::order::is_held_out`]); their draws are independent of all others. The floor is what they cost,
//! Σ −ln p of their draws, over their number of tokens. (The tokenizer sees all documents: how a text is cut into
//! tokens helps no model to predict it.)

pub mod comparison;
pub mod recipe;

use crate::{
    Error, Result,
    config::Precision,
    data::{
        Tokenizer,
        dataset::{DatasetInfo, SplitKind},
        order::is_held_out,
        synth::{CorpusFormat, Synth, entropy_floor},
        text::{Corpus, DEFAULT_FIELD},
        tokenize::{self, OnProgress, TokenizeOptions, train_tokenizer},
    },
    report::progress::Show,
    run::{self, Place},
};
use comparison::{Equivalence, RunSummary, Summary};
use recipe::{Layout, Recipe, Shared, WIDTH};
use std::{
    fs,
    io::{BufWriter, Write},
    path::{Path, PathBuf},
    time::Instant,
};

/// The picture's file.
pub const PICTURE: &str = "report.svg";
/// The summary's file.
pub const SUMMARY: &str = "summary.json";
/// The file that is written first, by which a quickstart's folder is known.
const MARK: &str = "base.toml";

/// Micro-batches of a validation on a user's text, whose held-out part may be of any size.
const TEXT_VALIDATION_BATCHES: usize = 24;

/// What the user chose.
#[derive(Clone, Debug)]
pub struct Options {
    /// Name of the size.
    pub size: &'static str,
    /// The size.
    pub recipe: Recipe,
    /// The user's own text instead of the generated corpus.
    pub text: Option<PathBuf>,
    /// The folder for everything.
    pub out: PathBuf,
    /// Replace what an earlier quickstart left in `out`.
    pub force: bool,
    /// Where the models are trained, and in which type.
    pub place: Place,
    /// Seed of everything.
    pub seed: u64,
    /// How the program was called, for the commands that are printed.
    pub program: String,
}

/// Who is told what happens.
pub struct Audience<'a> {
    /// How progress of training is shown.
    pub show: Show,
    /// Takes what is to be printed.
    pub say: &'a mut dyn FnMut(&str),
    /// Told how far work on text is.
    pub progress: OnProgress<'a>,
}

/// Does everything, and leaves it in `options.out`.
///
/// # Errors
/// An output folder that exists (without `force`) or that no quickstart made; a text too short to hold out a part of
/// it; those of the commands that it stands for.
pub fn run(options: &Options, audience: &mut Audience<'_>) -> Result<Summary> {
    let start = Instant::now();
    let quickstart = Quickstart { options, recipe: &options.recipe, layout: Layout { out: options.out.clone() } };
    let own_text = options.text.as_deref().map(|text| Corpus::open(text, DEFAULT_FIELD)).transpose()?;
    quickstart.prepare_folder()?;
    let entropy_floor = quickstart.data(audience, own_text)?;
    quickstart.heading(audience, &format!("Base model, width {}", options.recipe.residual));
    quickstart.train(audience, "base", &[], audience.show)?;
    let equivalence = quickstart.equivalence(audience)?;
    quickstart.heading(audience, &format!("Widened {WIDTH} times with noise {}, trained on", options.recipe.noise));
    quickstart.train(audience, "widened", &[], audience.show)?;
    quickstart.heading(audience, "The same wide model from scratch, on the tokens that the widened one saw");
    quickstart.train(audience, "scratch", &[], audience.show)?;
    let read = |name, base| RunSummary::read(name, &quickstart.layout.path(name), base);
    let base = read("base", None)?;
    let (widened, scratch) = (read("widened", Some(&base))?, read("scratch", None)?);
    let summary = Summary {
        size: options.size,
        seed: options.seed,
        equivalence_max_loss_difference: equivalence.max_difference(),
        equivalence_steps: equivalence.steps.len(),
        base_loss: base.validation_loss,
        widened_loss: widened.validation_loss,
        scratch_loss: scratch.validation_loss,
        entropy_floor,
        noise: options.recipe.noise,
        seconds: start.elapsed().as_secs_f64(),
        runs: [base, widened, scratch],
    };
    quickstart.report(audience, &summary)?;
    Ok(summary)
}

struct Quickstart<'a> {
    options: &'a Options,
    recipe: &'a Recipe,
    layout: Layout,
}

impl Quickstart<'_> {
    /// Makes the folder and its three configurations.
    fn prepare_folder(&self) -> Result<()> {
        let out = &self.options.out;
        let taken = out.is_file() || fs::read_dir(out).is_ok_and(|mut entries| entries.next().is_some());
        if taken && !self.options.force {
            return Err(Error::Exists { path: out.clone() });
        }
        if taken && !out.join(MARK).is_file() {
            let why = format!("no quickstart made this (it holds no {MARK}): --force does not write into it");
            return Err(Error::file(out, why));
        }
        fs::create_dir_all(out).map_err(Error::io("create", out))?;
        let own_text = self.options.text.is_some();
        let shared = Shared {
            seed: self.options.seed,
            place: self.options.place,
            validation_batches: if own_text { TEXT_VALIDATION_BATCHES } else { 0 },
        };
        self.write(MARK, &recipe::base(self.recipe, &self.layout, shared)?)?;
        self.write("widened.toml", &recipe::widened(self.recipe, &self.layout, shared)?)?;
        self.write("scratch.toml", &recipe::scratch(self.recipe, &self.layout, shared)?)
    }

    fn write(&self, name: &str, text: &str) -> Result<()> {
        let path = self.layout.path(name);
        fs::write(&path, text).map_err(Error::io("write", &path))
    }

    /// Corpus, tokenizer, dataset. Returns the floor, which the user's own text has none of.
    fn data(&self, audience: &mut Audience<'_>, own_text: Option<Corpus>) -> Result<Option<f64>> {
        let (corpus, nats) = match own_text {
            Some(corpus) => (corpus, None),
            None => {
                let path = self.layout.path("corpus.jsonl");
                let nats = self.corpus(audience, &path)?;
                (Corpus::open(&path, DEFAULT_FIELD)?, Some(nats))
            }
        };
        let (tokenizer, data) = (self.layout.path("tokenizer.json"), self.layout.path("data"));
        self.heading(audience, "Tokenizer and tokens");
        self.tokenizer(audience, &corpus, &tokenizer)?;
        let info = self.tokenize(audience, &corpus, &tokenizer, &data)?;
        let needed = self.recipe.context as u64;
        if info.val.tokens <= needed || info.train.tokens <= needed {
            let why = format!(
                "is too short: it gives {} tokens to train on and {} to validate on, and a window takes {}",
                info.train.tokens,
                info.val.tokens,
                needed + 1
            );
            return Err(Error::file(corpus.root(), why));
        }
        debug_assert!(nats.is_none() || info.split == SplitKind::Documents, "the corpus has enough documents");
        Ok(nats.map(|nats| entropy_floor(&nats, info.val.tokens)))
    }

    /// Writes the generated corpus; returns −ln p of each held-out document.
    fn corpus(&self, audience: &mut Audience<'_>, path: &Path) -> Result<Vec<f64>> {
        self.heading(audience, "A corpus of known entropy");
        let (bytes, seed) = (self.recipe.corpus_bytes, self.options.seed);
        let arguments = format!("--bytes {bytes} --seed {seed} --force");
        (audience.say)(&self.command("data synth", &[path], &arguments)?);
        let file = fs::File::create(path).map_err(Error::io("create", path))?;
        let mut out = BufWriter::new(file);
        let stats = Synth::new(seed).write_corpus(&mut out, 0, bytes, CorpusFormat::Jsonl);
        let stats = stats.and_then(|stats| out.flush().map(|()| stats)).map_err(Error::io("write", path))?;
        let held_out = |(index, nats)| is_held_out(index as u64, self.recipe.val_fraction).then_some(nats);
        Ok(stats.document_nats.into_iter().enumerate().filter_map(held_out).collect())
    }

    fn tokenizer(&self, audience: &mut Audience<'_>, corpus: &Corpus, path: &Path) -> Result<()> {
        let vocab = self.recipe.vocab;
        let arguments = format!("--vocab {vocab} --out {} --force", quoted(Layout::text(path)?));
        (audience.say)(&self.command("data train-tokenizer", &[corpus.root()], &arguments)?);
        let (tokenizer, _) = train_tokenizer(corpus, vocab, audience.progress)?;
        tokenizer.save(path, self.options.force)
    }

    fn tokenize(
        &self,
        audience: &mut Audience<'_>,
        corpus: &Corpus,
        tokenizer: &Path,
        data: &Path,
    ) -> Result<DatasetInfo> {
        let val_fraction = self.recipe.val_fraction;
        let (tokenizer_text, data_text) = (quoted(Layout::text(tokenizer)?), quoted(Layout::text(data)?));
        let arguments = format!("--tokenizer {tokenizer_text} --out {data_text} --val-fraction {val_fraction} --force");
        (audience.say)(&self.command("data tokenize", &[corpus.root()], &arguments)?);
        let options =
            TokenizeOptions { val_fraction, force: self.options.force && data.exists(), ..Default::default() };
        tokenize::tokenize(corpus, &Tokenizer::load(tokenizer)?, data, &options, audience.progress)
    }

    /// Trains as one of the configurations says, with changes.
    fn train(&self, audience: &mut Audience<'_>, name: &str, sets: &[String], show: Show) -> Result<()> {
        let config = self.layout.path(&format!("{name}.toml"));
        let sets_text: String = sets.iter().map(|set| format!(" --set {}", quoted(set))).collect();
        (audience.say)(&self.command("train -c", &[&config], &format!("--force{sets_text}"))?);
        run::train_file(&config, sets, self.options.force, show).map(drop)
    }

    /// Trains the base model and its noiseless widening on the same batches.
    fn equivalence(&self, audience: &mut Audience<'_>) -> Result<Equivalence> {
        let steps = self.recipe.equivalence_steps;
        let text =
            format!("Widened {WIDTH} times without noise: {steps} more training steps of both, on the same batches");
        self.heading(audience, &text);
        let folder = |name: &str| self.layout.path("equivalence").join(name);
        for (name, width) in [("narrow", 1), ("wide", WIDTH)] {
            let run = folder(name);
            // In bf16 each weight's rounding would be seen, not the exactness of widening.
            let precision = if self.options.place.precision == Precision::F64 { "f64" } else { "f32" };
            let sets = [
                format!("precision={precision}"),
                format!("run={}", toml::Value::String(Layout::text(&run)?.into())),
                format!("steps={steps}"),
                format!("init.upscale.width={width}"),
                "init.upscale.noise=0.0".into(),
                "validation.every=0".into(),
                // At the top all the way: a warmup would be over only when the comparison is.
                "schedule.kind=constant".into(),
                "schedule.warmup=0".into(),
            ];
            self.train(audience, "widened", &sets, Show::Quiet)?;
        }
        let equivalence = Equivalence::read(&folder("narrow"), &folder("wide"))?;
        (audience.say)(&format!(
            "\n{}\nlargest difference over {} steps: {:.1e} nats",
            equivalence.table(),
            equivalence.steps.len(),
            equivalence.max_difference()
        ));
        Ok(equivalence)
    }

    /// Table, picture, summary, and what to try next.
    fn report(&self, audience: &mut Audience<'_>, summary: &Summary) -> Result<()> {
        self.write(PICTURE, &summary.picture())?;
        let json = serde_json::to_string_pretty(summary).map_err(|e| Error::Usage(format!("no JSON: {e}")))?;
        self.write(SUMMARY, &(json + "\n"))?;
        self.heading(audience, "Comparison");
        (audience.say)(&summary.table().to_string());
        let (picture, json) = (self.layout.path(PICTURE), self.layout.path(SUMMARY));
        (audience.say)(&format!("picture: {}\nsummary: {}", picture.display(), json.display()));
        let (widened, data) = (self.layout.path("widened"), self.layout.path("data"));
        self.heading(audience, "Now try");
        (audience.say)(&self.command("eval", &[&widened, &data], "")?);
        (audience.say)(&self.command("generate", &[&widened], "")?);
        (audience.say)(&self.command("inspect", &[&widened], "")?);
        Ok(())
    }

    fn heading(&self, audience: &mut Audience<'_>, text: &str) {
        (audience.say)(&format!("\n{text}"));
    }

    /// A command line that a shell takes, from the folder where the quickstart was called.
    fn command(&self, name: &str, paths: &[&Path], arguments: &str) -> Result<String> {
        let mut line = format!("  {} {name}", quoted(&self.options.program));
        for path in paths {
            line = line + " " + &quoted(Layout::text(path)?);
        }
        Ok(if arguments.is_empty() { line } else { line + " " + arguments })
    }
}

/// A word as a POSIX shell reads it.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-./=+:,@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) { word.into() } else { format!("'{}'", word.replace('\'', r"'\''")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_reaches_the_program_through_a_shell() {
        for word in ["quickstart/base.toml", "my runs", "run=\"a b\"", "it's", "", "$HOME `id` \\"] {
            let line = format!("printf %s {}", quoted(word));
            let output = std::process::Command::new("sh").args(["-c", &line]).output().unwrap();
            assert_eq!(String::from_utf8_lossy(&output.stdout), word);
        }
    }
}
