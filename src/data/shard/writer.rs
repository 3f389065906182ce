//! Writing tokens into as many files as they need.

use super::{HEADER_BYTES, MAX_SHARD_TOKENS, TokenDtype};
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::{
    fs::File,
    io::{BufWriter, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

/// A finished file of tokens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardFile {
    /// Its name in the folder.
    pub name: String,
    /// Tokens in it.
    pub tokens: u64,
}

/// Writes `PREFIX_000000.bin`, `PREFIX_000001.bin`, … in llm.c's form, a new file whenever one is full.
pub struct ShardWriter {
    folder: PathBuf,
    prefix: &'static str,
    dtype: TokenDtype,
    limit: u64,
    open: Option<(PathBuf, BufWriter<File>, u64)>,
    done: Vec<ShardFile>,
}

impl ShardWriter {
    /// A writer of files of at most `limit` tokens (1 to [`MAX_SHARD_TOKENS`]) in an existing folder.
    pub fn new(folder: &Path, prefix: &'static str, dtype: TokenDtype, limit: u64) -> Self {
        let limit = limit.clamp(1, MAX_SHARD_TOKENS);
        Self { folder: folder.into(), prefix, dtype, limit, open: None, done: Vec::new() }
    }

    /// Appends tokens, which must all fit the dtype.
    pub fn push(&mut self, mut tokens: &[u32]) -> Result<()> {
        while !tokens.is_empty() {
            let (path, file, count) = match &mut self.open {
                Some(open) => open,
                None => self.open.insert(start(&self.folder, self.prefix, self.done.len())?),
            };
            let room = usize::try_from(self.limit - *count).unwrap_or(usize::MAX);
            let (now, later) = tokens.split_at(tokens.len().min(room));
            write_tokens(file, self.dtype, now).map_err(Error::io("write", &*path))?;
            *count += now.len() as u64;
            tokens = later;
            if *count == self.limit {
                self.close()?;
            }
        }
        Ok(())
    }

    /// Completes the last file. No tokens, no files.
    pub fn finish(mut self) -> Result<Vec<ShardFile>> {
        self.close()?;
        Ok(self.done)
    }

    /// Writes the header, now that the count is known, and waits until the file is on the disk.
    fn close(&mut self) -> Result<()> {
        let Some((path, mut file, tokens)) = self.open.take() else { return Ok(()) };
        let [magic, version] = self.dtype.header();
        // `limit` is at most i32::MAX.
        let header = [magic, version, tokens as i32];
        file.seek(SeekFrom::Start(0))
            .and_then(|_| file.write_all(bytemuck::cast_slice(&header)))
            .and_then(|()| file.flush())
            .and_then(|()| file.get_ref().sync_all())
            .map_err(Error::io("write", &path))?;
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        self.done.push(ShardFile { name, tokens });
        Ok(())
    }
}

/// A new file, with a header that counts nothing and so is invalid until the file is complete.
fn start(folder: &Path, prefix: &str, number: usize) -> Result<(PathBuf, BufWriter<File>, u64)> {
    let path = folder.join(format!("{prefix}_{number:06}.bin"));
    let mut file = BufWriter::with_capacity(1 << 20, File::create_new(&path).map_err(Error::io("create", &path))?);
    file.write_all(&[0; HEADER_BYTES]).map_err(Error::io("write", &path))?;
    Ok((path, file, 0))
}

fn write_tokens(file: &mut impl Write, dtype: TokenDtype, tokens: &[u32]) -> std::io::Result<()> {
    match dtype {
        TokenDtype::Uint16 => tokens.iter().try_for_each(|&token| {
            debug_assert!(token <= u16::MAX.into(), "the dtype is chosen from the vocabulary");
            file.write_all(&(token as u16).to_le_bytes())
        }),
        TokenDtype::Uint32 => file.write_all(bytemuck::cast_slice(tokens)),
    }
}
