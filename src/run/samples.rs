//! `[samples]`: what the model of a run under way writes, for people to read.

use super::author::{Author, Drawing, encode};
use crate::{
    Error, Result,
    config::Config,
    data::{Tokenizer, tokenizer::BYTES},
    model::decoder::Generator,
    ops::Ops,
    report::metrics::SampleRecord,
    state::{Meaning, Position},
    trainer::Trainer,
};

/// What writing takes: made before the first step, so that nothing is allocated between steps.
pub(super) struct Sampler<B: Ops> {
    generator: Generator<B>,
    tokenizer: Tokenizer,
    drawing: Drawing,
    prompts: Vec<String>,
    /// The step whose model wrote last.
    written: Option<u64>,
}

impl<B: Ops> Sampler<B> {
    /// None where nothing shall be written. The prompts are checked against the vocabulary.
    ///
    /// # Errors
    /// A model of no text, and data that name no tokenizer.
    pub(super) fn new(
        trainer: &Trainer<B>,
        config: &Config,
        meaning: &Meaning,
        tokenizer: Option<&[u8]>,
    ) -> Result<Option<Self>> {
        let config = &config.samples;
        if config.every == 0 {
            return Ok(None);
        }
        let refuse = |why: &str| Error::config("samples.every", config.every, format!("{why}: leave [samples] out"));
        let decoder = trainer.network.decoder().ok_or_else(|| refuse("a classifier writes no text"))?;
        let tokenizer = match (meaning.tokenizer.as_deref(), tokenizer) {
            (Some(BYTES), _) => Tokenizer::bytes(),
            (Some(_), Some(json)) => Tokenizer::from_json(json)?,
            _ => return Err(refuse("the data name no tokenizer, so nothing can be read or written")),
        };
        for prompt in &config.prompts {
            encode(&tokenizer, decoder.spec.vocab, prompt)
                .map_err(|e| Error::config("samples.prompts", prompt, format!("the data's tokenizer {e}")))?;
        }
        let generator = Generator::new(&trainer.backend, decoder)?;
        let (drawing, prompts) = (config.into(), config.prompts.clone());
        Ok(Some(Self { generator, tokenizer, drawing, prompts, written: None }))
    }

    /// A text for each prompt by the weights as they are; none where they have written already. The draws are the same
    /// each time, so that what changes is the model.
    pub(super) fn write(&mut self, trainer: &Trainer<B>, seconds: f64) -> Result<Vec<SampleRecord>> {
        let Position { step, tokens, .. } = trainer.position;
        let Some(decoder) = trainer.network.decoder().filter(|_| self.written != Some(step)) else {
            return Ok(Vec::new());
        };
        self.written = Some(step);
        let Self { generator, tokenizer, drawing, prompts, .. } = self;
        let author = Author { backend: &trainer.backend, decoder, weights: trainer.weights(), tokenizer, drawing };
        let write = |(index, prompt): (usize, &String)| {
            let text = author.go_on(generator, prompt, index, |_| Ok(()))?.text;
            Ok(SampleRecord { step, tokens, seconds, index: index as u64, prompt: prompt.clone(), text })
        };
        prompts.iter().enumerate().map(write).collect()
    }
}
