//! Where documents come from: a UTF-8 text file, JSONL, or a folder of them, packed (`.gz`, `.zst`) or not; or standard
//! input, which is JSONL if it begins with `{`.
//!
//! A text file holds one document, or several with `<|endoftext|>` between them (a line end directly after it belongs
//! to it). A JSONL file holds one document a line, in a field of a JSON object. One document at a time is in memory.

use super::{
    packed::{self, STDIN},
    tokenizer::END_OF_TEXT,
};
use crate::error::{Error, Result};
use std::{
    fs,
    io::{self, BufRead},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

/// Names that mark a file in a folder as text; a file that is named itself may have any.
pub const TEXT_EXTENSIONS: [&str; 32] = [
    "txt", "text", "md", "markdown", "rst", "org", "adoc", "tex", "html", "htm", "xml", "srt", "jsonl", "ndjson", "rs",
    "py", "c", "h", "cc", "cpp", "hpp", "cu", "js", "ts", "java", "go", "rb", "sh", "sql", "toml", "yaml", "yml",
];

/// The field of a JSONL line that holds the document, unless another is named.
pub const DEFAULT_FIELD: &str = "text";

/// Files of text, in a fixed order.
#[derive(Debug)]
pub struct Corpus {
    root: PathBuf,
    files: Vec<PathBuf>,
    bytes: u64,
    field: String,
    /// Where bad lines are noted that are to be left out.
    skipped: Option<Mutex<Skipped>>,
}

/// Lines of JSONL that were left out, because no document could be read from them.
#[derive(Debug, Clone, Default)]
pub struct Skipped {
    /// How many.
    pub lines: u64,
    /// What is wrong with the first of them.
    pub first: Vec<String>,
}

impl Skipped {
    /// So many are told one by one.
    const TOLD: usize = 10;
}

impl Corpus {
    /// The text in a file, or in all files of a folder and its folders that bear one of [`TEXT_EXTENSIONS`], sorted by
    /// path; hidden files and linked folders are left out. `field` holds the text in JSONL files.
    ///
    /// # Errors
    /// A path that cannot be read, and a folder without text.
    pub fn open(path: &Path, field: &str) -> Result<Self> {
        let mut files = Vec::new();
        if path.is_dir() {
            collect(path, &mut files)?;
            files.sort();
            if files.is_empty() {
                let why = format!("holds no text: no file ends in one of .{}", TEXT_EXTENSIONS.join(" ."));
                return Err(Error::file(path, why));
            }
        } else {
            files.push(path.to_path_buf());
        }
        let mut bytes = 0;
        for file in files.iter().filter(|file| file.as_os_str() != STDIN) {
            bytes += file.metadata().map_err(Error::io("read", file))?.len();
        }
        Ok(Self { root: path.into(), files, bytes, field: field.into(), skipped: None })
    }

    /// Leaves out lines of JSONL that are bad instead of failing at the first, and notes them.
    pub fn skip_bad(self, skip: bool) -> Self {
        Self { skipped: skip.then(Mutex::default), ..self }
    }

    /// How documents are read, in words.
    pub(super) fn reading(&self) -> String {
        format!("{} {}", self.field, self.skipped.is_some())
    }

    /// The lines that were left out so far.
    pub fn skipped(&self) -> Skipped {
        let skipped = self.skipped.as_ref().map(|s| s.lock().unwrap_or_else(PoisonError::into_inner).clone());
        skipped.unwrap_or_default()
    }

    /// The file or folder that was opened.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Its files.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// The size of all files as they lie, in bytes; 0 for standard input.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The documents in order; documents without anything but white space are left out. After an error nothing follows.
    ///
    /// # Errors
    /// Of each document: a file that cannot be read; invalid UTF-8 (with the byte offset in the file); a JSONL line
    /// that is not an object with a string in the field (with the line).
    pub fn documents(&self) -> Documents<'_> {
        Documents { corpus: self, next_file: 0, open: None, bytes_read: Arc::default(), failed: false }
    }
}

/// All files with a name of text under a folder.
fn collect(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder).map_err(Error::io("read", folder))? {
        let path = entry.map_err(Error::io("read", folder))?.path();
        if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.')) {
            continue;
        }
        if path.is_dir() {
            // A linked folder could lead in a circle.
            if !path.is_symlink() {
                collect(&path, files)?;
            }
        } else if has_extension(&packed::unpacked_name(&path), &TEXT_EXTENSIONS) {
            files.push(path);
        }
    }
    Ok(())
}

fn has_extension(path: &Path, extensions: &[&str]) -> bool {
    path.extension().is_some_and(|found| extensions.iter().any(|extension| found.eq_ignore_ascii_case(extension)))
}

/// The documents of a [`Corpus`].
pub struct Documents<'a> {
    corpus: &'a Corpus,
    next_file: usize,
    open: Option<OpenFile>,
    bytes_read: Arc<AtomicU64>,
    failed: bool,
}

impl Documents<'_> {
    /// Bytes of files read so far, of [`Corpus::bytes`].
    pub fn bytes_read(&self) -> u64 {
        self.bytes_read.load(Ordering::Relaxed)
    }

    fn next_document(&mut self) -> Result<Option<String>> {
        loop {
            if self.open.is_none() {
                let Some(path) = self.corpus.files.get(self.next_file) else { return Ok(None) };
                self.next_file += 1;
                self.open = Some(OpenFile::open(path, &self.corpus.field, self.bytes_read.clone())?);
            }
            let Some(file) = &mut self.open else { continue };
            match file.next_document(&self.corpus.field, self.corpus.skipped.as_ref())? {
                Some(text) if text.trim().is_empty() => {}
                Some(text) => return Ok(Some(text)),
                None => self.open = None,
            }
        }
    }
}

impl Iterator for Documents<'_> {
    type Item = Result<String>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        let document = self.next_document();
        self.failed = document.is_err();
        document.transpose()
    }
}

/// A file being read, a line at a time.
struct OpenFile {
    path: PathBuf,
    reader: Box<dyn BufRead + Send>,
    /// Bytes and lines read.
    offset: u64,
    line: u64,
    is_jsonl: bool,
    /// The line of a text file that is being divided, and how far it is used.
    current: String,
    used: usize,
    /// Nothing can be read any more.
    ended: bool,
}

impl OpenFile {
    fn open(path: &Path, field: &str, read: Arc<AtomicU64>) -> Result<Self> {
        let mut reader = packed::open(path, field, read).map_err(|error| unreadable(path, 0, error))?;
        let is_jsonl = match path.as_os_str() == STDIN {
            true => reader.fill_buf().map_err(Error::io("read", path))?.first() == Some(&b'{'),
            false => has_extension(&packed::unpacked_name(path), &["jsonl", "ndjson"]),
        };
        Ok(Self {
            path: path.into(),
            reader,
            offset: 0,
            line: 0,
            is_jsonl,
            current: String::new(),
            used: 0,
            ended: false,
        })
    }

    fn next_document(&mut self, field: &str, skipped: Option<&Mutex<Skipped>>) -> Result<Option<String>> {
        if !self.is_jsonl {
            return self.next_text();
        }
        loop {
            match (self.next_jsonl(field), skipped) {
                (Err(error @ Error::File { .. }), Some(skipped)) if !self.ended => {
                    let mut skipped = skipped.lock().unwrap_or_else(PoisonError::into_inner);
                    skipped.lines += 1;
                    if skipped.first.len() < Skipped::TOLD {
                        skipped.first.push(error.to_string());
                    }
                }
                (document, _) => return document,
            }
        }
    }

    fn next_text(&mut self) -> Result<Option<String>> {
        let mut document: Option<String> = None;
        loop {
            if self.used == self.current.len() {
                match self.read_line()? {
                    Some(line) => (self.current, self.used) = (line, 0),
                    None => return Ok(document),
                }
            }
            let (text, rest) = (document.get_or_insert_default(), &self.current[self.used..]);
            let Some((before, after)) = rest.split_once(END_OF_TEXT) else {
                text.push_str(rest);
                self.used = self.current.len();
                continue;
            };
            text.push_str(before);
            let after = after.strip_prefix("\r\n").or(after.strip_prefix('\n')).unwrap_or(after);
            self.used = self.current.len() - after.len();
            return Ok(document);
        }
    }

    fn next_jsonl(&mut self, field: &str) -> Result<Option<String>> {
        let line = loop {
            match self.read_line()? {
                None => return Ok(None),
                Some(line) if line.trim().is_empty() => {}
                Some(line) => break line,
            }
        };
        let refuse = |why: String| Error::file(&self.path, format!("line {}: {why}", self.line));
        let mut object: serde_json::Map<String, serde_json::Value> =
            serde_json::from_str(&line).map_err(|e| refuse(format!("is not a JSON object: {e}")))?;
        match object.remove(field) {
            Some(serde_json::Value::String(text)) => Ok(Some(text)),
            Some(other) => {
                Err(refuse(format!("the field `{field}` is not a string but {}", shortened(&other.to_string()))))
            }
            None => {
                let names = object.keys().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
                Err(refuse(format!("has no field `{field}`; its fields are {names}: name the one with the text")))
            }
        }
    }

    /// The next line with its end, checked to be UTF-8; without the byte order mark that some editors put first.
    fn read_line(&mut self) -> Result<Option<String>> {
        let mut bytes = Vec::new();
        let read = self.reader.read_until(b'\n', &mut bytes).map_err(|error| {
            self.ended = true;
            unreadable(&self.path, self.line, error)
        })?;
        if read == 0 {
            return Ok(None);
        }
        let start = self.offset;
        self.offset += read as u64;
        self.line += 1;
        let line = String::from_utf8(bytes).map_err(|e| self.invalid_utf8(start, &e))?;
        Ok(Some(match line.strip_prefix('\u{feff}') {
            Some(rest) if start == 0 => rest.to_owned(),
            _ => line,
        }))
    }

    fn invalid_utf8(&self, start: u64, error: &std::string::FromUtf8Error) -> Error {
        let at = error.utf8_error().valid_up_to();
        let advice = if has_extension(&self.path, &["xz", "bz2", "zip", "bin", "npy"]) {
            "it is not a text file: unpack or convert it first"
        } else {
            "convert the file to UTF-8, for example with iconv"
        };
        Error::file(
            &self.path,
            format!("invalid UTF-8 at byte {} (0x{:02x}): {advice}", start + at as u64, error.as_bytes()[at]),
        )
    }
}

/// A file that the system cannot read, or that cannot be unpacked after a line.
fn unreadable(path: &Path, line: u64, error: io::Error) -> Error {
    match packed::packing(path) {
        Some(_) if error.raw_os_error().is_none() => {
            Error::file(path, format!("cannot be unpacked after line {line}: {error}; is it cut off or damaged?"))
        }
        _ => Error::io("read", path)(error),
    }
}

/// At most 60 characters, for messages.
fn shortened(text: &str) -> String {
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests;
