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

/// How far a [`ShardWriter`] is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Written {
    done: Vec<ShardFile>,
    /// Tokens in the file that is not full yet.
    open: u64,
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

    /// Brings everything to the disk, and tells where [`ShardWriter::go_on`] can go on.
    pub fn save(&mut self) -> Result<Written> {
        let mut open = 0;
        if let Some((path, file, tokens)) = &mut self.open {
            file.flush().and_then(|()| file.get_ref().sync_data()).map_err(Error::io("write", &*path))?;
            open = *tokens;
        }
        Ok(Written { done: self.done.clone(), open })
    }

    /// A writer that goes on in a folder; what was written there later is dropped.
    pub fn go_on(
        folder: &Path,
        prefix: &'static str,
        dtype: TokenDtype,
        limit: u64,
        written: &Written,
    ) -> Result<Self> {
        let mut writer = Self::new(folder, prefix, dtype, limit);
        writer.done = written.done.clone();
        for later in written.done.len().. {
            let path = folder.join(name(prefix, later));
            let is_open = later == written.done.len() && written.open > 0;
            if !is_open {
                if !path.exists() {
                    break;
                }
                std::fs::remove_file(&path).map_err(Error::io("remove", &path))?;
                continue;
            }
            let length = HEADER_BYTES as u64 + written.open * dtype.bytes() as u64;
            let open = || -> std::io::Result<File> {
                let mut file = File::options().write(true).open(&path)?;
                if file.metadata()?.len() < length {
                    return Err(std::io::ErrorKind::UnexpectedEof.into());
                }
                file.set_len(length)?;
                file.seek(SeekFrom::End(0))?;
                Ok(file)
            };
            let file = open().map_err(Error::io("go on with", &path))?;
            writer.open = Some((path, BufWriter::with_capacity(1 << 20, file), written.open));
        }
        Ok(writer)
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

fn name(prefix: &str, number: usize) -> String {
    format!("{prefix}_{number:06}.bin")
}

/// A new file, with a header that counts nothing and so is invalid until the file is complete.
fn start(folder: &Path, prefix: &str, number: usize) -> Result<(PathBuf, BufWriter<File>, u64)> {
    let path = folder.join(name(prefix, number));
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
