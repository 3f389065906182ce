//! From text to token ids and back: raw bytes, or any `tokenizer.json` through the `tokenizers` crate.

use super::output::Partial;
use crate::error::{Error, Result};
use rayon::prelude::*;
use std::{fs, ops::Range, path::Path};
use tokenizers::{
    AddedToken,
    decoders::byte_level::ByteLevel as ByteLevelDecoder,
    models::{
        TrainerWrapper,
        bpe::{BPE, BpeTrainer},
    },
    pre_tokenizers::byte_level::ByteLevel,
};

/// The token that ends a document in tokenizers of our own training, and what separates documents in a text file.
pub const END_OF_TEXT: &str = "<|endoftext|>";

/// Names of the token that ends a document in common tokenizers, by preference.
const END_OF_TEXT_NAMES: [&str; 6] = [END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eot_id|>", "<|im_end|>"];

/// The word that stands for raw bytes in place of a tokenizer file.
pub const BYTES: &str = "bytes";

/// Most text that a tokenizer is trained on. The `tokenizers` crate counts pairs in an i32, which overflows beyond 2
/// GiB.
pub const MAX_TRAINING_BYTES: u64 = 1 << 30;

/// Largest vocabulary that is trained: more than any language model has.
const MAX_TRAINED_VOCAB: usize = 1 << 20;

/// Long documents are encoded in pieces of about this many bytes: by several threads, in bounded memory.
const PIECE_BYTES: usize = 1 << 16;

/// Bytes on both sides of a cut that are encoded with and without it.
const NEIGHBOURHOOD: usize = 128;

/// Turns text into token ids and back.
pub struct Tokenizer {
    /// None for raw bytes.
    model: Option<Box<tokenizers::Tokenizer>>,
    vocab_size: usize,
    end_of_text: Option<u32>,
}

impl Tokenizer {
    /// Raw bytes: a vocabulary of 256, no end-of-text token, no file.
    pub fn bytes() -> Self {
        Self { model: None, vocab_size: 256, end_of_text: None }
    }

    /// Reads a `tokenizer.json`, or gives [`Tokenizer::bytes`] for the word `bytes`.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        if path.as_os_str() == BYTES {
            return Ok(Self::bytes());
        }
        let json = fs::read(path).map_err(Error::io("read", path))?;
        Self::from_json(&json).map_err(|e| Error::file(path, e.to_string()))
    }

    /// The tokenizer of a `tokenizer.json`'s content.
    pub fn from_json(json: &[u8]) -> Result<Self> {
        let model = tokenizers::Tokenizer::from_bytes(json)
            .map_err(|e| Error::Usage(format!("is not a tokenizer.json that the tokenizers crate reads: {e}")))?;
        Self::from_model(model)
    }

    /// Trains byte-level BPE: 256 bytes, `<|endoftext|>` (id 0), and merges up to `vocab` tokens; fewer if the text
    /// does not hold that many pairs. The same texts give the same tokenizer. At most [`MAX_TRAINING_BYTES`] are used.
    pub fn train_bpe(texts: impl Iterator<Item = Result<String>> + Send, vocab: usize) -> Result<Self> {
        if vocab < 257 {
            return Err(Error::config(
                "vocab",
                vocab,
                "is too small for 256 bytes and <|endoftext|>: write at least 257",
            ));
        }
        if vocab > MAX_TRAINED_VOCAB {
            return Err(Error::config("vocab", vocab, format!("must be at most {MAX_TRAINED_VOCAB}")));
        }
        let trainer = BpeTrainer::builder()
            .vocab_size(vocab)
            .show_progress(false)
            .special_tokens(vec![AddedToken::from(END_OF_TEXT, true)])
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .build();
        let mut model = tokenizers::Tokenizer::new(BPE::default());
        model.with_pre_tokenizer(Some(ByteLevel::default().add_prefix_space(false)));
        model.with_decoder(Some(ByteLevelDecoder::default()));
        let mut failure = None;
        let mut left = MAX_TRAINING_BYTES;
        let pieces = texts
            .map_while(|text| text.map_err(|e| failure = Some(e)).ok())
            .flat_map(|text| pieces(&text, |_| true).into_iter().map(|r| text[r].to_owned()).collect::<Vec<_>>())
            .take_while(|piece| {
                let fits = piece.len() as u64 <= left;
                left = left.saturating_sub(piece.len() as u64);
                fits
            });
        model.train(&mut TrainerWrapper::from(trainer), pieces).map_err(failed)?;
        match failure {
            Some(error) => Err(error),
            None if left == MAX_TRAINING_BYTES => Err(Error::Usage("there is no text to train a tokenizer on".into())),
            None => Self::from_model(model),
        }
    }

    fn from_model(mut model: tokenizers::Tokenizer) -> Result<Self> {
        // A tokenizer.json may ask to cut and pad every input, as suits a server; a corpus must be left whole.
        model.with_truncation(None).map_err(failed)?;
        model.with_padding(None);
        // Ids may have gaps, so the vocabulary is what lies below the largest id, not the number of tokens.
        let vocab_size = model.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1);
        if vocab_size == 0 {
            return Err(Error::Usage("the tokenizer's vocabulary is empty".into()));
        }
        let end_of_text = END_OF_TEXT_NAMES.iter().find_map(|name| model.token_to_id(name));
        Ok(Self { model: Some(Box::new(model)), vocab_size, end_of_text })
    }

    /// Every token is below this.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The token that ends a document, if the vocabulary has one of the usual names for it.
    pub fn end_of_text(&self) -> Option<u32> {
        self.end_of_text
    }

    /// Whether these are raw bytes.
    pub fn is_bytes(&self) -> bool {
        self.model.is_none()
    }

    /// The ids of a text, without any token added before or after.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let Some(model) = &self.model else { return Ok(text.bytes().map(u32::from).collect()) };
        let ids = |text: &str| model.encode_fast(text, false).map(|encoding| encoding.get_ids().to_vec());
        // A long text is cut only where the tokenizer itself shows, on the neighbourhood, that a cut changes nothing.
        let harmless = |cut: usize| {
            let is_boundary = |&at: &usize| text.is_char_boundary(at);
            let start = (0..cut).rev().skip(NEIGHBOURHOOD).find(is_boundary).unwrap_or(0);
            let end = (cut..text.len()).skip(NEIGHBOURHOOD).find(is_boundary).unwrap_or(text.len());
            match (ids(&text[start..end]), ids(&text[start..cut]), ids(&text[cut..end])) {
                (Ok(whole), Ok(left), Ok(right)) => whole == [left, right].concat(),
                _ => false,
            }
        };
        let encoded: Result<Vec<Vec<u32>>, _> =
            pieces(text, harmless).into_par_iter().map(|range| ids(&text[range])).collect();
        encoded.map(|pieces| pieces.concat()).map_err(failed)
    }

    /// The ids of many texts, encoded by all threads.
    pub fn encode_batch<T: AsRef<str> + Sync>(&self, texts: &[T]) -> Result<Vec<Vec<u32>>> {
        texts.par_iter().map(|text| self.encode(text.as_ref())).collect()
    }

    /// The text of ids, special tokens included; bytes that are no UTF-8 become U+FFFD, ids without a token nothing.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        match &self.model {
            Some(model) => model.decode(ids, false).map_err(failed),
            None => {
                let bytes: Vec<u8> = ids.iter().filter_map(|&id| u8::try_from(id).ok()).collect();
                Ok(String::from_utf8_lossy(&bytes).into_owned())
            }
        }
    }

    /// The `tokenizer.json`; None for raw bytes.
    pub(super) fn to_json(&self) -> Result<Option<String>> {
        self.model.as_ref().map(|model| model.to_string(true).map_err(failed)).transpose()
    }

    /// Writes a `tokenizer.json`; an existing file is refused without `force`. Raw bytes have no file: that is an
    /// error.
    pub fn save(&self, path: &Path, force: bool) -> Result<()> {
        let json = self
            .to_json()?
            .ok_or_else(|| Error::file(path, "raw bytes need no tokenizer file: write `bytes` in its place"))?;
        Partial::write_file(path, force, json.as_bytes())
    }
}

fn failed(error: tokenizers::Error) -> Error {
    Error::Usage(format!("the tokenizer failed: {error}"))
}

/// Divides a text into ranges of about [`PIECE_BYTES`], at spaces and line ends between words where `harmless` agrees;
/// a text without such places stays whole. The pre-tokenizers of the GPT-2 and Llama 3 kind always start a word there.
fn pieces(text: &str, harmless: impl Fn(usize) -> bool) -> Vec<Range<usize>> {
    const TRIES: usize = 16;
    let (bytes, mut start, mut ranges) = (text.as_bytes(), 0, Vec::new());
    let graphic = |at: usize| bytes.get(at).is_some_and(|&b| b.is_ascii_alphanumeric() || b >= 0x80);
    while text.len() - start > 2 * PIECE_BYTES {
        let cut = (start + PIECE_BYTES..text.len())
            .filter(|&at| graphic(at - 1) && graphic(at + 1))
            .filter_map(|at| match bytes[at] {
                b' ' => Some(at),
                b'\n' => Some(at + 1),
                _ => None,
            })
            .take(TRIES)
            .find(|&cut| harmless(cut));
        let Some(cut) = cut else { break };
        ranges.push(start..cut);
        start = cut;
    }
    ranges.push(start..text.len());
    ranges
}

#[cfg(test)]
mod tests;
