//! Files of tokens: llm.c's `.bin` with 16-bit and 32-bit tokens, and nanoGPT's `.bin`, which has no header.
//!
//! llm.c's format: 256 little-endian int32 (magic, version, number of tokens, the rest 0), then the tokens. Magic and
//! version are 20240520 and 1 for uint16 (its GPT-2 data), 20240801 and 7 for uint32 (its Llama 3 data). The count is
//! an int32, so a file holds fewer than 2³¹ tokens.

mod writer;
pub use writer::{ShardFile, ShardWriter, Written};

use super::mapped::map_file;
use crate::error::{Error, Result};
use memmap2::Mmap;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::{
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
};

const _: () = assert!(cfg!(target_endian = "little"), "shards are little-endian and mapped without a copy");

/// Bytes before the first token of a file with a header.
const HEADER_BYTES: usize = 256 * 4;

/// The largest number of tokens that a header can count.
pub const MAX_SHARD_TOKENS: u64 = i32::MAX as u64;

/// The type of a token in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TokenDtype {
    /// Two bytes: vocabularies up to 65,536.
    Uint16,
    /// Four bytes.
    Uint32,
}

impl TokenDtype {
    /// The smaller type that holds every token below `vocab`.
    pub fn for_vocab(vocab: usize) -> Self {
        if vocab <= 1 << 16 { Self::Uint16 } else { Self::Uint32 }
    }

    /// Bytes of a token.
    pub fn bytes(self) -> usize {
        match self {
            Self::Uint16 => 2,
            Self::Uint32 => 4,
        }
    }

    /// llm.c's magic and version.
    fn header(self) -> [i32; 2] {
        match self {
            Self::Uint16 => [20240520, 1],
            Self::Uint32 => [20240801, 7],
        }
    }
}

impl fmt::Display for TokenDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Uint16 => "uint16",
            Self::Uint32 => "uint32",
        })
    }
}

impl FromStr for TokenDtype {
    type Err = Error;

    /// `uint16` or `uint32`.
    fn from_str(name: &str) -> Result<Self> {
        [Self::Uint16, Self::Uint32]
            .into_iter()
            .find(|dtype| dtype.to_string() == name)
            .ok_or_else(|| Error::config("dtype", name, "is not a type of tokens: write uint16 or uint32"))
    }
}

/// Tokens as they lie in a mapped file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tokens<'a> {
    /// 16 bits each.
    Uint16(&'a [u16]),
    /// 32 bits each.
    Uint32(&'a [u32]),
}

impl<'a> Tokens<'a> {
    /// How many.
    pub fn len(&self) -> usize {
        match self {
            Self::Uint16(tokens) => tokens.len(),
            Self::Uint32(tokens) => tokens.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The tokens, one by one.
    pub fn iter(self) -> impl Iterator<Item = u32> + use<'a> {
        let (short, long): (&[u16], &[u32]) = match self {
            Self::Uint16(tokens) => (tokens, &[]),
            Self::Uint32(tokens) => (&[], tokens),
        };
        short.iter().map(|&token| token.into()).chain(long.iter().copied())
    }

    /// The largest token; None if there are none.
    fn max(&self) -> Option<u32> {
        match self {
            Self::Uint16(tokens) => tokens.par_chunks(1 << 16).filter_map(|c| c.iter().max()).max().map(|&t| t.into()),
            Self::Uint32(tokens) => tokens.par_chunks(1 << 16).filter_map(|c| c.iter().max()).max().copied(),
        }
    }
}

/// One file of tokens, mapped into memory and checked.
#[derive(Debug)]
pub struct Shard {
    path: PathBuf,
    map: Mmap,
    dtype: TokenDtype,
    header_bytes: usize,
    max_token: Option<u32>,
}

impl Shard {
    /// Maps and checks a file: header, length, and (once, all of them) the tokens against `vocab` if it is given.
    /// `headerless` is the type of the tokens in a file without header.
    ///
    /// # Errors
    /// A file that is none of the formats, whose length is not what its header counts, or that holds a token which is
    /// not in the vocabulary; the message says which and where.
    pub fn open(path: &Path, headerless: Option<TokenDtype>, vocab: Option<usize>) -> Result<Self> {
        let map = map_file(path)?;
        let (dtype, header_bytes) = match (read_header(path, &map)?, headerless) {
            (Some(dtype), None) => (dtype, HEADER_BYTES),
            (None, Some(dtype)) => (check_headerless(path, &map, dtype)?, 0),
            (Some(dtype), Some(_)) => {
                let why = format!("has a header of llm.c's, which says {dtype}: leave out the dtype");
                return Err(Error::file(path, why));
            }
            (None, None) => return Err(not_a_shard(path, &map)),
        };
        let mut shard = Self { path: path.into(), map, dtype, header_bytes, max_token: None };
        shard.max_token = shard.tokens().max();
        if let (Some(vocab), Some(max)) = (vocab, shard.max_token)
            && max as usize >= vocab
        {
            return Err(shard.outside_vocabulary(vocab));
        }
        Ok(shard)
    }

    /// Where the file lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The type of its tokens.
    pub fn dtype(&self) -> TokenDtype {
        self.dtype
    }

    /// Whether it has llm.c's header.
    pub fn has_header(&self) -> bool {
        self.header_bytes > 0
    }

    /// The largest token in it; None if it is empty.
    pub fn max_token(&self) -> Option<u32> {
        self.max_token
    }

    /// All its tokens.
    pub fn tokens(&self) -> Tokens<'_> {
        // A map starts on a page, the header is 1,024 bytes long, and `open` compared the length with the dtype: the
        // casts, which check alignment and size, cannot fail.
        let bytes = &self.map[self.header_bytes..];
        match self.dtype {
            TokenDtype::Uint16 => Tokens::Uint16(bytemuck::cast_slice(bytes)),
            TokenDtype::Uint32 => Tokens::Uint32(bytemuck::cast_slice(bytes)),
        }
    }

    fn outside_vocabulary(&self, vocab: usize) -> Error {
        let (at, token) = (self.tokens().iter().enumerate())
            .find(|&(_, token)| token as usize >= vocab)
            .unwrap_or((0, self.max_token.unwrap_or(0)));
        Error::file(
            &self.path,
            format!(
                "token {token} at position {at} is outside the vocabulary of {vocab}: was the file made with another \
                 tokenizer? Use that tokenizer's vocabulary, or tokenize the text again"
            ),
        )
    }
}

/// The dtype that a header states; None where the file does not start with one of llm.c's magics.
fn read_header(path: &Path, bytes: &[u8]) -> Result<Option<TokenDtype>> {
    let field = |at: usize| bytes.get(at * 4..at * 4 + 4).map(|b| i32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    let Some(dtype) =
        [TokenDtype::Uint16, TokenDtype::Uint32].into_iter().find(|dtype| field(0) == Some(dtype.header()[0]))
    else {
        return Ok(None);
    };
    let [magic, version] = dtype.header();
    if bytes.len() < HEADER_BYTES {
        let why =
            format!("ends inside its header, after {} of {HEADER_BYTES} bytes: copy or make it again", bytes.len());
        return Err(Error::file(path, why));
    }
    let (found_version, count) = (field(1).unwrap_or(0), field(2).unwrap_or(0));
    if found_version != version {
        let why = format!("version {found_version} with magic {magic}: only version {version} is known");
        return Err(Error::file(path, why));
    }
    let body = bytes.len() - HEADER_BYTES;
    if u64::try_from(count).ok().map(|count| count * dtype.bytes() as u64) != Some(body as u64) {
        let why = format!(
            "its header counts {count} tokens of {dtype}, but {body} bytes follow ({} tokens): it is cut off or \
             damaged, copy or make it again",
            body as f64 / dtype.bytes() as f64
        );
        return Err(Error::file(path, why));
    }
    Ok(Some(dtype))
}

fn check_headerless(path: &Path, bytes: &[u8], dtype: TokenDtype) -> Result<TokenDtype> {
    if !bytes.len().is_multiple_of(dtype.bytes()) {
        let why = format!(
            "its {} bytes are not a whole number of {dtype} tokens: it is cut off or of another type",
            bytes.len()
        );
        return Err(Error::file(path, why));
    }
    Ok(dtype)
}

fn not_a_shard(path: &Path, bytes: &[u8]) -> Error {
    let start = match bytes.get(..4) {
        Some(b) => format!("starts with {} instead of a magic number", i32::from_le_bytes([b[0], b[1], b[2], b[3]])),
        None => format!("is only {} bytes long", bytes.len()),
    };
    Error::file(
        path,
        format!(
            "{start}: it is not a file of tokens in llm.c's form (magic 20240520 or 20240801). For a file without header, \
             as nanoGPT writes them, state the type: --dtype uint16. For text, run `mupscale data tokenize` first"
        ),
    )
}

#[cfg(test)]
mod tests;
