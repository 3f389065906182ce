//! The work behind `data tokenize` and `data train-tokenizer`.

mod saved;

use saved::{Saved, SavedPart};

use super::{
    dataset::{DATASET_FILE, DatasetInfo, PartInfo, SplitKind, TOKENIZER_FILE, check_val_fraction, tail_len},
    order::{held_out_block, is_held_out},
    output::{Partial, write_synced},
    shard::{ShardWriter, TokenDtype},
    text::Corpus,
    tokenizer::{BYTES, Tokenizer},
};
use crate::error::{Error, Result};
use serde::Serialize;
use std::{fs, path::Path};

/// How far a command is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// What is being done, in words.
    pub stage: &'static str,
    /// Bytes of input done in this stage.
    pub done: u64,
    /// Bytes of input in this stage; 0 where it cannot be measured.
    pub total: u64,
}

/// Told now and then how far a command is; may be called from another thread.
pub type OnProgress<'a> = &'a mut (dyn FnMut(Progress) + Send);

/// Options of [`tokenize`].
#[derive(Debug, Clone)]
pub struct TokenizeOptions {
    /// The fraction to validate on, 0 to 0.5: one document of every 1 / fraction, or, where there are fewer documents
    /// than that, the last tokens.
    pub val_fraction: f64,
    /// Tokens in a file, 256 to 2³¹ - 1.
    pub shard_tokens: u64,
    /// Replace a dataset that is there already.
    pub force: bool,
    /// Bytes of text after which the work so far is saved, to go on from if it is interrupted.
    pub save_every: u64,
}

impl Default for TokenizeOptions {
    /// 5 % to validate on, files of 100 million tokens as llm.c's scripts make, nothing replaced, saved every 256 MiB.
    fn default() -> Self {
        Self { val_fraction: 0.05, shard_tokens: 100_000_000, force: false, save_every: 256 << 20 }
    }
}

/// Smallest files of tokens that may be asked for.
const MIN_SHARD_TOKENS: u64 = 256;

/// Text that is encoded at once; enough to keep all threads busy.
pub const BATCH_BYTES: usize = 4 << 20;

/// Turns text into a dataset folder: `train_000000.bin`, …, `val_000000.bin`, …, `tokenizer.json`, `dataset.json`.
/// After every document comes the tokenizer's end-of-text token, if it has one. The folder appears when it is complete.
///
/// What an interrupted call saved beside the folder is gone on with by a call for the same: the same files unchanged,
/// the same tokenizer and options. The result is the same, byte for byte.
///
/// # Errors
/// Those of [`Corpus::documents`]; a text without documents; an output that exists, or that holds the input, or that
/// another process is making.
pub fn tokenize(
    corpus: &Corpus,
    tokenizer: &Tokenizer,
    out: &Path,
    options: &TokenizeOptions,
    progress: OnProgress<'_>,
) -> Result<DatasetInfo> {
    check_val_fraction(options.val_fraction)?;
    if options.shard_tokens < MIN_SHARD_TOKENS {
        let why = format!("must be {MIN_SHARD_TOKENS} or more: every file would be mapped into memory");
        return Err(Error::config("shard_tokens", options.shard_tokens, why));
    }
    refuse_output_around_input(corpus, out)?;
    let json = tokenizer.to_json()?;
    let work = Saved::work(corpus, json.as_deref(), options)?;
    let mut partial = Partial::folder(out, options.force, DATASET_FILE)?;
    let mut documents = corpus.documents();
    let (mut parts, mut text_bytes) = match Saved::read(partial.path(), work.as_deref())? {
        Some(saved) => {
            for _ in 0..saved.documents {
                documents.next().transpose()?;
                progress(Progress { stage: "finding the place", done: documents.bytes_read(), total: corpus.bytes() });
            }
            // From here on an error leaves what an earlier call made.
            partial.stay();
            (Parts::go_on(partial.path(), tokenizer, options, &saved)?, saved.text_bytes)
        }
        None => (Parts::new(partial.path(), tokenizer, options), 0),
    };
    let mut unsaved = 0;
    loop {
        let mut texts: Vec<String> = Vec::new();
        let mut bytes = 0;
        while bytes < BATCH_BYTES.min(usize::try_from(options.save_every).unwrap_or(usize::MAX).max(1))
            && let Some(text) = documents.next()
        {
            texts.push(text?);
            bytes += texts[texts.len() - 1].len();
        }
        if texts.is_empty() {
            break;
        }
        text_bytes += bytes as u64;
        unsaved += bytes as u64;
        for mut ids in tokenizer.encode_batch(&texts)? {
            ids.extend(tokenizer.end_of_text());
            parts.push(ids)?;
        }
        progress(Progress { stage: "tokenizing", done: documents.bytes_read(), total: corpus.bytes() });
        if let Some(work) = &work
            && unsaved >= options.save_every
            && parts.save(work, text_bytes, partial.path())?
        {
            partial.stay();
            unsaved = 0;
        }
    }
    if text_bytes == 0 {
        return Err(Error::file(corpus.root(), "holds no text but white space: there is nothing to tokenize"));
    }
    let (split, train, val) = parts.finish()?;
    let info = DatasetInfo {
        format: 1,
        tokenizer: if json.is_some() { TOKENIZER_FILE } else { BYTES }.into(),
        vocab: tokenizer.vocab_size(),
        end_of_text: tokenizer.end_of_text(),
        dtype: TokenDtype::for_vocab(tokenizer.vocab_size()),
        text_bytes,
        split,
        val_fraction: options.val_fraction,
        train,
        val,
    };
    if let Some(json) = json {
        write_synced(&partial.path().join(TOKENIZER_FILE), json.as_bytes())?;
    }
    let description =
        serde_json::to_vec_pretty(&info).map_err(|e| Error::file(out.join(DATASET_FILE), e.to_string()))?;
    write_synced(&partial.path().join(DATASET_FILE), &description)?;
    Saved::remove(partial.path())?;
    partial.publish()?;
    Ok(info)
}

/// An output folder that is replaced must not hold the text that it is made from.
fn refuse_output_around_input(corpus: &Corpus, out: &Path) -> Result<()> {
    if let (Ok(root), Ok(out_path)) = (fs::canonicalize(corpus.root()), fs::canonicalize(out))
        && root.starts_with(&out_path)
    {
        let why = format!("is the output, but the input {} lies in it: choose another output", corpus.root().display());
        return Err(Error::file(out, why));
    }
    Ok(())
}

/// The training and the validation part while they are written.
struct Parts {
    val_fraction: f64,
    /// Documents kept back until there are enough of them to hold out whole ones; None from then on.
    kept: Option<Vec<Vec<u32>>>,
    next_index: u64,
    train: Part,
    val: Part,
}

struct Part {
    writer: ShardWriter,
    documents: u64,
    tokens: u64,
}

impl Parts {
    fn new(folder: &Path, tokenizer: &Tokenizer, options: &TokenizeOptions) -> Self {
        let dtype = TokenDtype::for_vocab(tokenizer.vocab_size());
        let part = |prefix| Part {
            writer: ShardWriter::new(folder, prefix, dtype, options.shard_tokens),
            documents: 0,
            tokens: 0,
        };
        let val_fraction = options.val_fraction;
        let kept = held_out_block(val_fraction).map(|_| Vec::new());
        Self { val_fraction, kept, next_index: 0, train: part("train"), val: part("val") }
    }

    /// The parts as they were saved.
    fn go_on(folder: &Path, tokenizer: &Tokenizer, options: &TokenizeOptions, saved: &Saved) -> Result<Self> {
        let dtype = TokenDtype::for_vocab(tokenizer.vocab_size());
        let part = |prefix, part: &SavedPart| {
            let writer = ShardWriter::go_on(folder, prefix, dtype, options.shard_tokens, &part.written)?;
            Ok::<_, Error>(Part { writer, documents: part.documents, tokens: part.tokens })
        };
        let (train, val) = (part("train", &saved.train)?, part("val", &saved.val)?);
        Ok(Self { val_fraction: options.val_fraction, kept: None, next_index: saved.documents, train, val })
    }

    /// Brings everything to the disk and notes how far it is; false while it is not certain how the text is divided.
    fn save(&mut self, work: &str, text_bytes: u64, folder: &Path) -> Result<bool> {
        if self.kept.is_some() {
            return Ok(false);
        }
        let part = |part: &mut Part| {
            let written = part.writer.save()?;
            Ok::<_, Error>(SavedPart { documents: part.documents, tokens: part.tokens, written })
        };
        let (train, val) = (part(&mut self.train)?, part(&mut self.val)?);
        Saved { work: work.into(), documents: self.next_index, text_bytes, train, val }.write(folder)?;
        Ok(true)
    }

    fn push(&mut self, document: Vec<u32>) -> Result<()> {
        let Some(kept) = &mut self.kept else { return self.push_whole(&document) };
        kept.push(document);
        if Some(kept.len() as u64) == held_out_block(self.val_fraction) {
            let kept = self.kept.take().unwrap_or_default();
            kept.iter().try_for_each(|document| self.push_whole(document))?;
        }
        Ok(())
    }

    fn push_whole(&mut self, document: &[u32]) -> Result<()> {
        let part = if is_held_out(self.next_index, self.val_fraction) { &mut self.val } else { &mut self.train };
        self.next_index += 1;
        part.push(document, true)
    }

    /// Writes what was kept back, with its last tokens as the validation part, and completes the files.
    fn finish(mut self) -> Result<(SplitKind, PartInfo, PartInfo)> {
        let split = match (&self.kept, held_out_block(self.val_fraction)) {
            (_, None) => SplitKind::None,
            (None, _) => SplitKind::Documents,
            (Some(_), _) => SplitKind::Tail,
        };
        let kept = self.kept.take().unwrap_or_default();
        let total: u64 = kept.iter().map(|document| document.len() as u64).sum();
        let mut left = total - tail_len(total, self.val_fraction);
        for document in &kept {
            let (head, tail) = document.split_at(document.len().min(usize::try_from(left).unwrap_or(usize::MAX)));
            left -= head.len() as u64;
            self.train.push(head, tail.is_empty())?;
            self.val.push(tail, !tail.is_empty())?;
        }
        Ok((split, self.train.finish()?, self.val.finish()?))
    }
}

impl Part {
    /// Appends a document or a piece of one; `ends` tells whether the document ends with it.
    fn push(&mut self, tokens: &[u32], ends: bool) -> Result<()> {
        self.documents += u64::from(ends);
        self.tokens += tokens.len() as u64;
        self.writer.push(tokens)
    }

    fn finish(self) -> Result<PartInfo> {
        Ok(PartInfo { documents: self.documents, tokens: self.tokens, shards: self.writer.finish()? })
    }
}

/// What [`train_tokenizer`] made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TrainedTokenizer {
    /// Tokens asked for.
    pub vocab_asked: usize,
    /// Tokens that the text yielded; fewer if it is short.
    pub vocab: usize,
    /// Bytes of text that were used.
    pub text_bytes: u64,
}

/// Trains byte-level BPE on a text. The first [`MAX_TRAINING_BYTES`](super::tokenizer::MAX_TRAINING_BYTES) are used.
pub fn train_tokenizer(
    corpus: &Corpus,
    vocab: usize,
    progress: OnProgress<'_>,
) -> Result<(Tokenizer, TrainedTokenizer)> {
    let mut text_bytes = 0;
    let total = corpus.bytes();
    let texts = corpus.documents().inspect(|text| {
        text_bytes += text.as_ref().map_or(0, |text| text.len() as u64);
        progress(Progress { stage: "counting words", done: text_bytes.min(total), total });
    });
    let tokenizer = Tokenizer::train_bpe(texts, vocab)?;
    let made = TrainedTokenizer { vocab_asked: vocab, vocab: tokenizer.vocab_size(), text_bytes };
    Ok((tokenizer, made))
}

#[cfg(test)]
mod tests;
