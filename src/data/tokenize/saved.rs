//! How far an interrupted [`tokenize`](super::tokenize) came.

use crate::{
    data::{output::write_synced, packed::STDIN, shard::Written, text::Corpus, tokenize::TokenizeOptions},
    error::{Error, Result},
};
use serde::{Deserialize, Serialize};
use std::{fs, io, path::Path, time::UNIX_EPOCH};

/// Its file in the unfinished folder.
const FILE: &str = "unfinished.json";

/// How far the work is.
#[derive(Serialize, Deserialize)]
pub(super) struct Saved {
    /// [`Saved::work`] of what is being done.
    pub work: String,
    /// Documents that are written.
    pub documents: u64,
    /// Bytes of their text.
    pub text_bytes: u64,
    pub train: SavedPart,
    pub val: SavedPart,
}

/// How far a part is.
#[derive(Serialize, Deserialize)]
pub(super) struct SavedPart {
    pub documents: u64,
    pub tokens: u64,
    pub written: Written,
}

impl Saved {
    /// A hash of everything that the result depends on: each file's name, size and time, the tokenizer, the options.
    /// None for what cannot be read twice.
    pub fn work(corpus: &Corpus, tokenizer: Option<&str>, options: &TokenizeOptions) -> Result<Option<String>> {
        if corpus.root().as_os_str() == STDIN {
            return Ok(None);
        }
        let mut hasher = blake3::Hasher::new();
        let mut add = |part: &[u8]| {
            hasher.update(&(part.len() as u64).to_le_bytes()).update(part);
        };
        add(format!("{} {}", options.val_fraction, options.shard_tokens).as_bytes());
        add(format!("{} {}", env!("CARGO_PKG_VERSION"), corpus.reading()).as_bytes());
        add(tokenizer.unwrap_or_default().as_bytes());
        for file in corpus.files() {
            let meta = file.metadata().map_err(Error::io("read", file))?;
            let changed = meta.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
            add(file.as_os_str().as_encoded_bytes());
            add(format!("{} {changed:?}", meta.len()).as_bytes());
        }
        Ok(Some(hasher.finalize().to_hex().to_string()))
    }

    /// What was saved of this work. What was left of other work, or cannot be gone on with, is removed.
    pub fn read(folder: &Path, work: Option<&str>) -> Result<Option<Self>> {
        let saved: Option<Self> = match fs::read(folder.join(FILE)) {
            Ok(bytes) => serde_json::from_slice(&bytes).ok(),
            Err(e) if e.kind() == io::ErrorKind::NotFound => None,
            Err(e) => return Err(Error::io("read", folder.join(FILE))(e)),
        };
        if let Some(saved) = saved.filter(|saved| Some(saved.work.as_str()) == work) {
            return Ok(Some(saved));
        }
        for entry in fs::read_dir(folder).map_err(Error::io("read", folder))? {
            let path = entry.map_err(Error::io("read", folder))?.path();
            if path.extension().is_some_and(|e| e == "bin" || e == "json" || e == "new") {
                fs::remove_file(&path).map_err(Error::io("remove", &path))?;
            }
        }
        Ok(None)
    }

    /// Replaces what was saved before.
    pub fn write(&self, folder: &Path) -> Result<()> {
        let (path, beside) = (folder.join(FILE), folder.join(FILE).with_extension("new"));
        let json = serde_json::to_vec(self).map_err(|e| Error::file(&path, e.to_string()))?;
        write_synced(&beside, &json)?;
        fs::rename(&beside, &path).map_err(Error::io("rename", &beside))
    }

    /// The work is done.
    pub fn remove(folder: &Path) -> Result<()> {
        let path = folder.join(FILE);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::io("remove", &path)(e)),
            _ => Ok(()),
        }
    }
}
