//! Tokens on disk as windows of a fixed length, divided into a training and a validation part, and batches of them.

mod batch;
pub use batch::{BatchRules, TokenBatch};

use super::{
    order::Order,
    shard::{Shard, ShardFile, TokenDtype, Tokens},
    tokenizer::{BYTES, Tokenizer},
};
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

/// The file that describes a dataset folder which `data tokenize` wrote.
pub const DATASET_FILE: &str = "dataset.json";

/// The tokenizer's file in a dataset folder.
pub const TOKENIZER_FILE: &str = "tokenizer.json";

/// What `dataset.json` says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DatasetInfo {
    /// The version of this description: 1.
    pub format: u32,
    /// `tokenizer.json` (beside this file) or `bytes`.
    pub tokenizer: String,
    /// Every token is below this.
    pub vocab: usize,
    /// The token after every document, if the tokenizer has one.
    pub end_of_text: Option<u32>,
    /// The type of the tokens.
    pub dtype: TokenDtype,
    /// Bytes of UTF-8 that became tokens.
    pub text_bytes: u64,
    /// How the validation part was chosen.
    pub split: SplitKind,
    /// The fraction asked for.
    pub val_fraction: f64,
    /// The training part.
    pub train: PartInfo,
    /// The validation part; empty without one.
    pub val: PartInfo,
}

/// How a validation part was chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SplitKind {
    /// Whole documents, by [`is_held_out`](super::order::is_held_out) of their index.
    Documents,
    /// The last tokens: there were too few documents.
    Tail,
    /// There is no validation part.
    None,
}

/// One part of a dataset.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartInfo {
    /// Documents that end in this part.
    pub documents: u64,
    /// Tokens, those after the documents included.
    pub tokens: u64,
    /// The files that hold them, in order.
    pub shards: Vec<ShardFile>,
}

impl DatasetInfo {
    /// Reads the description of a dataset folder; None if the folder has none.
    pub fn read(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join(DATASET_FILE);
        if !path.exists() {
            return Ok(None);
        }
        let json = fs::read(&path).map_err(Error::io("read", &path))?;
        let info: Self = serde_json::from_slice(&json)
            .map_err(|e| Error::file(&path, format!("is not a dataset's description: {e}; tokenize the text again")))?;
        if info.format != 1 {
            return Err(Error::file(&path, format!("format {}: this program knows format 1", info.format)));
        }
        Ok(Some(info))
    }

    /// The tokenizer that the folder was made with.
    pub fn load_tokenizer(&self, folder: &Path) -> Result<Tokenizer> {
        match self.tokenizer.as_str() {
            BYTES => Ok(Tokenizer::bytes()),
            _ => Tokenizer::load(folder.join(TOKENIZER_FILE)),
        }
    }
}

/// How to open a [`Dataset`].
#[derive(Debug, Clone, Default)]
pub struct DatasetOptions {
    /// The model's vocabulary, which all tokens are checked against. Without it that of `dataset.json`, and without
    /// that the largest token + 1.
    pub vocab: Option<usize>,
    /// The type of the tokens of files without header.
    pub dtype: Option<TokenDtype>,
    /// A file or folder to validate on, in place of one found beside the training part.
    pub val: Option<PathBuf>,
    /// Where there is no validation part: the fraction of the last tokens to validate on; 0 for none, at most 0.5.
    pub val_fraction: f64,
}

/// Tokens to train on and tokens to validate on.
#[derive(Debug, Clone)]
pub struct Dataset {
    /// To train on.
    pub train: TokenData,
    /// To validate on.
    pub val: Option<TokenData>,
    /// Every token is below this.
    pub vocab: usize,
    /// The description, in a folder that `data tokenize` wrote.
    pub info: Option<DatasetInfo>,
}

impl Dataset {
    /// Opens one `.bin` file, or a folder of them. In a folder without `dataset.json` the files with `train` as a part
    /// of their name are the training part and those with `val` the validation part, as llm.c's and nanoGPT's scripts
    /// write them.
    pub fn open(path: &Path, options: &DatasetOptions) -> Result<Self> {
        check_val_fraction(options.val_fraction)?;
        let info = DatasetInfo::read(path)?;
        let vocab = options.vocab.or(info.as_ref().map(|info| info.vocab));
        let open = |files: Vec<PathBuf>| TokenData::open_files(&files, options.dtype, vocab);
        let (mut train, mut val) = match &info {
            Some(info) => (open_part(path, &info.train, vocab)?, open_part(path, &info.val, vocab)?),
            None if path.is_dir() => {
                let train = shard_files(path, &["train"])?;
                if train.is_empty() {
                    let why = "holds no dataset.json and no file of tokens with `train` in its name, like \
                               train_000000.bin: make them with `mupscale data tokenize`, or name one file";
                    return Err(Error::file(path, why));
                }
                (open(train)?, open(shard_files(path, &["val", "valid", "validation"])?)?)
            }
            None => (open(vec![path.to_path_buf()])?, TokenData::default()),
        };
        if let Some(path) = &options.val {
            val = TokenData::open(path, options.dtype, vocab)?;
        } else if val.tokens() == 0 && options.val_fraction > 0.0 {
            (train, val) = train.split_tail(options.val_fraction);
        }
        let largest = train.max_token().max(val.max_token()).map_or(0, |token| token as usize + 1);
        let val = (val.tokens() > 0).then_some(val);
        Ok(Self { train, val, vocab: vocab.unwrap_or(largest), info })
    }
}

/// The part of a described folder, compared with its description.
fn open_part(folder: &Path, part: &PartInfo, vocab: Option<usize>) -> Result<TokenData> {
    let files: Vec<PathBuf> = part.shards.iter().map(|shard| folder.join(&shard.name)).collect();
    let data = TokenData::open_files(&files, None, vocab)?;
    for (shard, span) in part.shards.iter().zip(&data.spans) {
        if span.len as u64 != shard.tokens {
            let why =
                format!("holds {} tokens, but {DATASET_FILE} says {}: tokenize the text again", span.len, shard.tokens);
            return Err(Error::file(folder.join(&shard.name), why));
        }
    }
    Ok(data)
}

/// The `.bin` files in a folder one of whose name's words is among `words`, sorted; all of them for no words.
fn shard_files(folder: &Path, words: &[&str]) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).map_err(Error::io("read", folder))? {
        let path = entry.map_err(Error::io("read", folder))?.path();
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        let named =
            words.is_empty() || stem.split(|c: char| !c.is_ascii_alphabetic()).any(|word| words.contains(&word));
        if named && path.extension().is_some_and(|e| e == "bin") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// Refuses a validation fraction that is neither 0 nor within 0.00001 to 0.5. (One document of every 1 / fraction is
/// held out, and that many are kept in memory at first.)
pub(super) fn check_val_fraction(fraction: f64) -> Result<()> {
    if fraction == 0.0 || (1e-5..=0.5).contains(&fraction) {
        return Ok(());
    }
    Err(Error::config("val_fraction", fraction, "must be 0 (no validation part) or lie between 0.00001 and 0.5"))
}

/// Tokens in order, in mapped files or in memory, cut into windows that do not cross from one file into the next.
#[derive(Debug, Clone, Default)]
pub struct TokenData {
    spans: Vec<Span>,
}

/// A stretch of one file.
#[derive(Debug, Clone)]
struct Span {
    source: Arc<Source>,
    start: usize,
    len: usize,
}

#[derive(Debug)]
enum Source {
    File(Shard),
    Memory(Vec<u32>),
}

impl Span {
    fn whole(source: Source) -> Self {
        let mut span = Self { source: Arc::new(source), start: 0, len: 0 };
        span.len = span.all().len();
        span
    }

    fn all(&self) -> Tokens<'_> {
        match &*self.source {
            Source::File(shard) => shard.tokens(),
            Source::Memory(tokens) => Tokens::Uint32(tokens),
        }
    }

    /// Full windows: each needs one token more than the context, which the next one shares.
    fn windows(&self, context: usize) -> u64 {
        (self.len.saturating_sub(1) / context) as u64
    }
}

impl TokenData {
    /// Opens a file of tokens, or all the files of tokens in a folder, in the order of their names.
    pub fn open(path: &Path, dtype: Option<TokenDtype>, vocab: Option<usize>) -> Result<Self> {
        let files = if path.is_dir() { shard_files(path, &[])? } else { vec![path.to_path_buf()] };
        if files.is_empty() {
            return Err(Error::file(path, "holds no .bin file of tokens: make one with `mupscale data tokenize`"));
        }
        Self::open_files(&files, dtype, vocab)
    }

    fn open_files(files: &[PathBuf], dtype: Option<TokenDtype>, vocab: Option<usize>) -> Result<Self> {
        let open = |path: &PathBuf| Shard::open(path, dtype, vocab).map(|shard| Span::whole(Source::File(shard)));
        Ok(Self { spans: files.iter().map(open).collect::<Result<_>>()? })
    }

    /// Tokens in memory.
    pub fn from_tokens(tokens: Vec<u32>) -> Self {
        Self { spans: vec![Span::whole(Source::Memory(tokens))] }
    }

    /// How many tokens there are.
    pub fn tokens(&self) -> u64 {
        self.spans.iter().map(|span| span.len as u64).sum()
    }

    /// The largest token of the files that these tokens lie in.
    pub fn max_token(&self) -> Option<u32> {
        let max = |span: &Span| match &*span.source {
            Source::File(shard) => shard.max_token(),
            Source::Memory(tokens) => tokens.iter().copied().max(),
        };
        self.spans.iter().filter_map(max).max()
    }

    /// All tokens, in order.
    pub(super) fn all(&self) -> impl Iterator<Item = u32> {
        self.spans.iter().flat_map(|span| span.all().iter().skip(span.start).take(span.len))
    }

    /// At most the first `count` tokens of the first file.
    pub(super) fn first_tokens(&self, count: usize) -> Vec<u32> {
        let first = |span: &Span| span.all().iter().skip(span.start).take(count.min(span.len)).collect();
        self.spans.first().map(first).unwrap_or_default()
    }

    /// How many windows of `context` inputs, and as many targets one token further, there are. Window w of a file
    /// covers the tokens w·context to w·context + context, both included.
    pub fn windows(&self, context: usize) -> u64 {
        self.spans.iter().map(|span| span.windows(context)).sum()
    }

    /// The order of windows in training: shuffled by a seed, or sequential without one.
    ///
    /// # Errors
    /// Fewer tokens than one window needs.
    pub fn order(&self, context: usize, seed: Option<u64>) -> Result<Order> {
        match (self.windows(context), seed) {
            (0, _) => Err(self.too_short(context)),
            (windows, Some(seed)) => Ok(Order::shuffled(windows, seed)),
            (windows, None) => Ok(Order::sequential(windows)),
        }
    }

    /// The tokens divided in two: the last `fraction` of them is the second part.
    pub fn split_tail(self, fraction: f64) -> (Self, Self) {
        let mut left = self.tokens() - tail_len(self.tokens(), fraction);
        let (mut head, mut tail) = (Self::default(), Self::default());
        for span in self.spans {
            let keep = span.len.min(usize::try_from(left).unwrap_or(usize::MAX));
            left -= keep as u64;
            let rest = Span { source: span.source.clone(), start: span.start + keep, len: span.len - keep };
            head.spans.extend((keep > 0).then_some(Span { len: keep, ..span }));
            tail.spans.extend((rest.len > 0).then_some(rest));
        }
        (head, tail)
    }

    fn too_short(&self, context: usize) -> Error {
        let place = match self.spans.first().map(|span| &*span.source) {
            Some(Source::File(shard)) => shard.path().to_path_buf(),
            _ => PathBuf::from("the tokens in memory"),
        };
        let why = format!(
            "{} tokens are too few: one window of context {context} needs {}. Use more text, or a smaller context",
            self.tokens(),
            context + 1
        );
        Error::file(place, why)
    }
}

/// How many of `tokens` the last `fraction` is.
pub(super) fn tail_len(tokens: u64, fraction: f64) -> u64 {
    ((tokens as f64 * fraction).round() as u64).min(tokens)
}

#[cfg(test)]
mod tests;
