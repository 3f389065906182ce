//! A synthetic corpus whose entropy is known.
//!
//! A [`Synth`] is a language: invented words, a grammar and hundreds of preference tables, all drawn from a seed. Its
//! documents read like this:
//!
//! > Tales of Shalia.
//! > Swurka is a trurk from Thilmford with vudad ropims. Swoma is a tenat from Proltby with vaton wehors.
//! > Swoma, the tenat from Proltby, clits the potor bupon in Thilmford. He clits his vaton wehors, because he brams a
//! > vepum. Some soval plers brulmly shur the pulat dadid in Staltby, while Swurka shendly hadolins every pudum.
//!
//! *What there is to learn:* frequencies by Zipf's law; which verbs, adjectives and prepositions go with each noun, which
//! objects and adverbs with each verb, which nouns, names and towns with each land; agreement of verbs across nested
//! modifiers; the gender of names; and what was said of a character, which later mentions repeat word for word.
//! The tables are far from low rank, so that a wider model keeps more of them.
//!
//! *The entropy:* every choice is a draw from an explicit distribution, and a text has exactly one derivation, so that
//! −ln p(text) = Σ −ln p(draw), the [`Document::nats`]. [`Synth::score`] reads the draws back from a text.
//!
//! *The floor* of a validation set, in nats per token, is the sum of its documents' nats / the number of its predicted
//! tokens ([`entropy_floor`]). The end of a document is one of its draws, "no further sentence" (p = 1/10 after each; the
//! fortieth ends without one), so the end-of-text token counts as predicted and its cost is in the document's nats.
//!
//! It is a lower bound on the expected loss of a model of any size, and out of reach: it knows a document from its first
//! word, whereas a window may begin inside one, its title and characters unseen; and it gives each text one spelling,
//! whereas a model may spread probability over several tokenisations. On one finite set a model may lie below it by
//! chance, as far as the set's draws stray from their mean. Tokens past the last whole window are paid for and not
//! predicted: negligible unless the set is a few windows long.

mod draw;
mod grammar;
mod lexicon;
#[cfg(test)]
mod tests;

use std::io::{self, Write};

use draw::{Dist, Random};
use grammar::{Choices, Derivation, Tables};
use lexicon::{Lexicon, Word};

/// The separator that [`CorpusFormat::Text`] writes after each document.
pub const END_OF_TEXT: &str = "<|endoftext|>";

/// A language: a pure function of its seed.
pub struct Synth {
    seed: u64,
    lexicon: Lexicon,
    tables: Tables,
}

/// A text of the language.
#[derive(Clone, Debug, PartialEq)]
pub struct Document {
    /// ASCII; begins and ends without white space.
    pub text: String,
    /// −ln p of the text and of its end.
    pub nats: f64,
}

/// How [`Synth::write_corpus`] separates documents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CorpusFormat {
    /// Each document is followed by `<|endoftext|>` and a newline.
    Text,
    /// One JSON object a line, with the fields `text` and `nats`.
    Jsonl,
}

/// What [`Synth::write_corpus`] wrote.
#[derive(Clone, Debug, PartialEq)]
pub struct CorpusStats {
    /// Bytes written, separators included.
    pub bytes: u64,
    /// −ln p of each document, in the order written; as many as there are documents.
    pub document_nats: Vec<f64>,
}

impl Synth {
    /// The language of `seed`. Takes some milliseconds.
    pub fn new(seed: u64) -> Self {
        let lexicon = Lexicon::new(&mut Random::new(seed, 0));
        let tables = Tables::new(&mut Random::new(seed, 1));
        Self { seed, lexicon, tables }
    }

    /// Document `index`, a pure function of seed and index. The documents of different indices are independent draws, so
    /// disjoint ranges are a fair training and validation set.
    pub fn document(&self, index: u64) -> Document {
        let mut writer = Writer::new(self, index);
        Derivation::document(&self.tables, &mut writer).expect("a draw is always within its distribution");
        Document { text: writer.text.text, nats: writer.nats }
    }

    /// −ln p of a document, read back from its text; None if the language has no such text. White space around it,
    /// which readers of separated files may leave, is not part of it.
    pub fn score(&self, text: &str) -> Option<f64> {
        let text = text.trim();
        let words = self.lexicon.words(text)?;
        let mut reader = Reader { words: &words, nats: 0.0, text: Text::new(&self.lexicon) };
        Derivation::document(&self.tables, &mut reader)?;
        (reader.words.is_empty() && reader.text.text == text).then_some(reader.nats)
    }

    /// Writes documents `first`, `first + 1`, … until there are at least `bytes` bytes. Fails only where `out` does.
    pub fn write_corpus(
        &self,
        out: &mut impl Write,
        first: u64,
        bytes: u64,
        format: CorpusFormat,
    ) -> io::Result<CorpusStats> {
        let mut stats = CorpusStats { bytes: 0, document_nats: Vec::new() };
        while stats.bytes < bytes {
            let Document { text, nats } = self.document(first + stats.document_nats.len() as u64);
            let record = match format {
                CorpusFormat::Text => text + END_OF_TEXT + "\n",
                CorpusFormat::Jsonl => format!("{}\n", serde_json::json!({ "text": text, "nats": nats })),
            };
            out.write_all(record.as_bytes())?;
            stats.bytes += record.len() as u64;
            stats.document_nats.push(nats);
        }
        Ok(stats)
    }
}

/// The floor under the loss, in nats per token: what the documents cost / the tokens predicted, end-of-text tokens
/// included (see the module's text for what it bounds).
pub fn entropy_floor(document_nats: &[f64], predicted_tokens: u64) -> f64 {
    document_nats.iter().sum::<f64>() / predicted_tokens as f64
}

/// Spells words out: spaces between words, capitals at the beginning of sentences.
struct Text<'a> {
    lexicon: &'a Lexicon,
    text: String,
    sentence_begins: bool,
}

impl<'a> Text<'a> {
    fn new(lexicon: &'a Lexicon) -> Self {
        Self { lexicon, text: String::with_capacity(1024), sentence_begins: true }
    }

    fn push(&mut self, word: Word) {
        let mark = matches!(word, Word::Plain("." | "," | "\n"));
        if !mark && !self.text.is_empty() && !self.text.ends_with('\n') {
            self.text.push(' ');
        }
        let at = self.text.len();
        self.text.push_str(self.lexicon.spell(word));
        if self.sentence_begins {
            self.text[at..=at].make_ascii_uppercase();
        }
        self.sentence_begins = matches!(word, Word::Plain("." | "\n"));
    }
}

/// Draws the choices.
struct Writer<'a> {
    random: Random,
    nats: f64,
    text: Text<'a>,
}

impl<'a> Writer<'a> {
    fn new(synth: &'a Synth, index: u64) -> Self {
        Self { random: Random::new(!synth.seed, index), nats: 0.0, text: Text::new(&synth.lexicon) }
    }
}

impl Choices for Writer<'_> {
    fn choose(&mut self, dist: &Dist, _: impl Fn(&dyn Fn(usize) -> Option<Word>) -> Option<usize>) -> Option<usize> {
        let option = dist.draw(&mut self.random);
        self.nats += dist.nats(option)?;
        Some(option)
    }

    fn say(&mut self, word: Word) -> Option<()> {
        self.text.push(word);
        Some(())
    }
}

/// Reads the choices back. The text is spelt out once more, to be compared with the one read.
struct Reader<'a> {
    /// Words not yet said.
    words: &'a [Word],
    nats: f64,
    text: Text<'a>,
}

impl Choices for Reader<'_> {
    fn choose(&mut self, dist: &Dist, read: impl Fn(&dyn Fn(usize) -> Option<Word>) -> Option<usize>) -> Option<usize> {
        let option = read(&|ahead| self.words.get(ahead).copied())?;
        self.nats += dist.nats(option)?;
        Some(option)
    }

    fn say(&mut self, word: Word) -> Option<()> {
        let (&next, rest) = self.words.split_first()?;
        self.words = rest;
        self.text.push(word);
        (next == word).then_some(())
    }
}
