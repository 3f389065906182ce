//! Texts that a model writes, token by token: for `generate`, and with the weights of the moment for a run's `[samples]`.

use crate::{
    Error, Result,
    config::SamplesConfig,
    data::Tokenizer,
    model::{
        Weights,
        decoder::{Decoder, Generator},
    },
    ops::Ops,
    rng,
};

/// How tokens are drawn.
#[derive(Clone, Debug, PartialEq)]
pub struct Drawing {
    /// Tokens to add, at most.
    pub tokens: usize,
    /// Divides logits: 0 takes the likeliest token, 1 samples as the model says.
    pub temperature: f64,
    /// Sample among this many likeliest tokens; 0: all.
    pub top_k: usize,
    /// Sample among the likeliest tokens that have this probability together.
    pub top_p: f64,
    /// Seed of the draws.
    pub seed: u64,
    /// Texts that end a text before them.
    pub stop: Vec<String>,
}

impl From<&SamplesConfig> for Drawing {
    fn from(config: &SamplesConfig) -> Self {
        let SamplesConfig { tokens, temperature, top_k, top_p, seed, .. } = *config;
        Self { tokens, temperature, top_k, top_p, seed, stop: config.stop.clone() }
    }
}

impl Drawing {
    /// Refuses what cannot be drawn by; `name` makes a field's name that of the option or key that the user wrote.
    pub fn check(&self, name: impl Fn(&str) -> String) -> Result<()> {
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            return Err(Error::config(name("temperature"), self.temperature, "must be 0 or a positive number"));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(Error::config(name("top_p"), self.top_p, "must be above 0 and at most 1"));
        }
        if self.stop.iter().any(String::is_empty) {
            return Err(Error::config(name("stop"), "", "must not be empty: every text begins with it"));
        }
        Ok(())
    }

    /// A token drawn from logits: `u` is uniform in [0, 1).
    fn draw(&self, logits: &[f64], u: f64) -> i32 {
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
        if self.temperature == 0.0 {
            return order[0] as i32;
        }
        if self.top_k > 0 {
            order.truncate(self.top_k);
        }
        let top = logits[order[0]];
        let mut weights: Vec<f64> = order.iter().map(|&i| ((logits[i] - top) / self.temperature).exp()).collect();
        let total: f64 = weights.iter().sum();
        let mut kept = 0.0;
        let nucleus = weights.iter().position(|w| {
            kept += w / total;
            kept >= self.top_p
        });
        weights.truncate(nucleus.map_or(weights.len(), |last| last + 1));
        let mut left = u * weights.iter().sum::<f64>();
        let chosen = weights.iter().position(|w| {
            left -= w;
            left < 0.0
        });
        order[chosen.unwrap_or(weights.len() - 1)] as i32
    }
}

/// A text that was written.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Written<'a> {
    /// What was given.
    pub prompt: &'a str,
    /// What was added, up to a stop string.
    pub text: String,
    /// Tokens that were drawn, those of a stop string included.
    pub tokens: usize,
    /// `length`, `stop` (a stop string), or `end` (of the document).
    pub ended: &'static str,
}

/// A model that goes on with texts, one after another.
pub struct Author<'a, B: Ops> {
    /// The device.
    pub backend: &'a B,
    /// The model.
    pub decoder: &'a Decoder<B>,
    /// Its weights.
    pub weights: Weights<'a, B>,
    /// What its tokens stand for.
    pub tokenizer: &'a Tokenizer,
    /// How they are drawn.
    pub drawing: &'a Drawing,
}

impl<B: Ops> Author<'_, B> {
    /// Goes on with a prompt, and gives each new piece of text to `show` as soon as it is certain. The `index` makes
    /// the draws of each prompt its own, whatever stands before it.
    pub fn go_on<'p>(
        &self,
        generator: &mut Generator<B>,
        prompt: &'p str,
        index: usize,
        mut show: impl FnMut(&str) -> Result<()>,
    ) -> Result<Written<'p>> {
        let Self { drawing, decoder, .. } = *self;
        let context = decoder.spec.context;
        let mut tokens = encode(self.tokenizer, decoder.spec.vocab, prompt)?;
        let mut draws = rng::Stream::new(drawing.seed.wrapping_add(index as u64), "generate").rng();
        generator.clear();
        let (mut added, mut text, mut shown, mut ended) = (Vec::new(), String::new(), 0, "length");
        let mut fresh = tokens[tokens.len().saturating_sub(context)..].to_vec();
        for _ in 0..drawing.tokens {
            if generator.length() + fresh.len() > context {
                // The window is full: go on from its second half.
                generator.clear();
                fresh = tokens[tokens.len() - (context / 2).max(1)..].to_vec();
            }
            let mut logits = generator.extend(self.backend, decoder, self.weights, &fresh)?;
            logits.truncate(self.tokenizer.vocab_size());
            let token = drawing.draw(&logits, draws.uniform());
            if Some(token as u32) == self.tokenizer.end_of_text() {
                ended = "end";
                break;
            }
            tokens.push(token);
            added.push(token as u32);
            fresh = vec![token];
            text = self.tokenizer.decode(&added)?;
            if let Some(at) = drawing.stop.iter().filter_map(|stop| text.find(stop.as_str())).min() {
                text.truncate(at);
                ended = "stop";
                break;
            }
            let certain = certain(&text, &drawing.stop);
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
}

/// The tokens of a prompt, at least one, all below `vocab`.
pub fn encode(tokenizer: &Tokenizer, vocab: usize, prompt: &str) -> Result<Vec<i32>> {
    let mut tokens: Vec<i32> = tokenizer.encode(prompt)?.into_iter().map(|t| t as i32).collect();
    if tokens.is_empty() {
        // What stands before a document's first token in training.
        tokens.push(tokenizer.end_of_text().unwrap_or(0) as i32);
    }
    match tokens.iter().find(|&&t| t as usize >= vocab) {
        None => Ok(tokens),
        Some(token) => {
            let why = "give the tokenizer that it was trained with";
            Err(Error::Usage(format!("gives token {token}, but the model's vocabulary is {vocab}: {why}")))
        }
    }
}

/// How much of a text stays as it is, whatever comes: not the bytes of a character that may be incomplete (it decodes
/// to U+FFFD until it is not), nor what may be the beginning of a stop string.
fn certain(text: &str, stops: &[String]) -> usize {
    let whole = text.trim_end_matches('\u{fffd}');
    let begins = |at: usize| stops.iter().any(|stop| stop.starts_with(&whole[at..]));
    whole.char_indices().map(|(at, _)| at).find(|&at| begins(at)).unwrap_or(whole.len())
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
