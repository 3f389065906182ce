//! Reading a checkpoint: every size, offset and name is checked at opening, every byte by [`Reader::verify`].
#![allow(unsafe_code, reason = "files are mapped into memory")]

use std::{
    borrow::Cow,
    collections::BTreeMap,
    fs::{self, File},
    ops::Range,
    path::{Path, PathBuf},
};

use blake3::Hasher;
use memmap2::Mmap;
use rayon::prelude::*;
use serde::de::DeserializeOwned;

use super::{
    INDEX, MANIFEST, MODEL, STATE, TensorMeta,
    format::{self, DAMAGED, FileEntry, Index, IndexEntry, Manifest, Span, check_file_name},
    header::{self, Located},
    place,
};
use crate::{Error, Result, data::mapped::release};

/// Bytes that are hashed before their pages are given back.
const VERIFY_BYTES: usize = 32 << 20;

/// A checkpoint, mapped into memory. Its files must not be changed while it is open; this crate never does.
pub struct Reader {
    dir: PathBuf,
    files: BTreeMap<String, Mapped>,
    tensors: BTreeMap<String, Tensor>,
}

/// A file of the checkpoint.
struct Mapped {
    path: PathBuf,
    map: Mmap,
    spans: Vec<Span>,
}

struct Tensor {
    meta: TensorMeta,
    /// In order, end to end.
    pieces: Vec<Piece>,
}

struct Piece {
    file: String,
    /// Elements of the tensor.
    range: Range<usize>,
    /// Where their bytes lie in the file.
    bytes: Range<usize>,
}

impl Reader {
    /// Opens a checkpoint's folder. Checks all but the tensors' elements: the manifest, the size of every file, the
    /// documents' checksums, the headers, and that index and headers tell the same. If the folder is missing because
    /// its replacement by a new one was cut off, the old one is read.
    ///
    /// # Errors
    /// [`Error::File`] or [`Error::Tensor`] with what is wrong and the remedy.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = locate(dir.as_ref())?;
        let path = dir.join(MANIFEST);
        let manifest = Manifest::parse(&path, &map(&path)?)?;
        let mut files = BTreeMap::new();
        for (name, FileEntry { size, spans }) in manifest.files.0 {
            let path = dir.join(&name);
            let map = map(&path)?;
            if map.len() != size {
                let how = if map.len() < size { "truncated" } else { "oversized" };
                let why = format!("it is {how}: {} bytes instead of {size}: {DAMAGED}", map.len());
                return Err(Error::file(path, why));
            }
            files.insert(name, Mapped { path, map, spans });
        }
        let headers = files.iter().filter(|(name, _)| holds_tensors(name));
        let headers: BTreeMap<_, _> =
            headers.map(|(name, file)| Ok((name.clone(), file.header()?))).collect::<Result<_>>()?;
        let documents = files.iter().filter(|(name, _)| !holds_tensors(name));
        documents.flat_map(|(_, file)| file.spans()).try_for_each(|(range, span, file)| {
            if file.is_intact(range, span) { Ok(()) } else { Err(file.wrong_checksum()) }
        })?;
        // The manifest was refused if it did not list the index.
        let index = &files[INDEX];
        let tensors = join(&index.path, format::versioned(&index.path, &index.map)?, &files, headers)?;
        Ok(Self { dir, files, tensors })
    }

    /// The folder that is read.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// All tensors, by name.
    pub fn tensors(&self) -> impl Iterator<Item = &TensorMeta> {
        self.tensors.values().map(|tensor| &tensor.meta)
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, tensor: &str) -> bool {
        self.tensors.contains_key(tensor)
    }

    /// A tensor's type, shape and axes.
    ///
    /// # Errors
    /// If there is none of this name.
    pub fn tensor(&self, name: &str) -> Result<&TensorMeta> {
        self.find(name).map(|tensor| &tensor.meta)
    }

    /// Elements of a tensor in flat order: lent from the mapped file if they lie in one piece. The bytes need not be
    /// aligned to the elements.
    ///
    /// # Errors
    /// If there is no such tensor, or it has no such elements.
    pub fn read(&self, name: &str, elements: Range<usize>) -> Result<Cow<'_, [u8]>> {
        let Tensor { meta, pieces } = self.find(name)?;
        let size = meta.dtype.size();
        let count = pieces.last().map_or(0, |piece| piece.range.end);
        if elements.start > elements.end || elements.end > count {
            let why =
                format!("the elements {elements:?} were asked for, but it has {count}; its shape is {:?}", meta.shape);
            return Err(Error::tensor(&self.dir, name, why));
        }
        let first = pieces.partition_point(|piece| piece.range.end <= elements.start);
        let parts = pieces[first..].iter().take_while(|piece| piece.range.start < elements.end).map(|piece| {
            let part = elements.start.max(piece.range.start)..elements.end.min(piece.range.end);
            let begin = piece.bytes.start + (part.start - piece.range.start) * size;
            &self.files[&piece.file].map[begin..begin + part.len() * size]
        });
        let parts: Vec<&[u8]> = parts.collect();
        Ok(match parts[..] {
            [part] => Cow::Borrowed(part),
            _ => Cow::Owned(parts.concat()),
        })
    }

    /// Gives a tensor's pages back to the system, for those who stream through a checkpoint larger than memory; read
    /// again, they come from the file again.
    pub fn release(&self, name: &str) -> Result<()> {
        for piece in &self.find(name)?.pieces {
            self.files[&piece.file].release(piece.bytes.clone());
        }
        Ok(())
    }

    /// Whether there is a file of this name.
    pub fn has_file(&self, file: &str) -> bool {
        self.files.contains_key(file)
    }

    /// A file's content; that of a document was checked at opening.
    ///
    /// # Errors
    /// If the checkpoint has no such file.
    pub fn bytes(&self, file: &str) -> Result<&[u8]> {
        let why = "the checkpoint has no such file; use a checkpoint that was saved with it";
        Ok(&self.files.get(file).ok_or_else(|| Error::file(self.dir.join(file), why))?.map)
    }

    /// A document.
    ///
    /// # Errors
    /// If the checkpoint has no such file, or it is no `T`.
    pub fn json<T: DeserializeOwned>(&self, file: &str) -> Result<T> {
        serde_json::from_slice(self.bytes(file)?).map_err(|error| {
            let why = format!("{error}; it was written by another version of this program, or is another document");
            Error::file(self.dir.join(file), why)
        })
    }

    /// Checks every byte against its checksum, on all threads of rayon's pool, and gives the pages back as it goes.
    ///
    /// # Errors
    /// The first file or tensor whose bytes are not those that were written.
    pub fn verify(&self) -> Result<()> {
        let spans: Vec<_> = self.files.values().flat_map(Mapped::spans).collect();
        let wrong = spans.into_par_iter().find_first(|(range, span, file)| !file.is_intact(range.clone(), span));
        let Some((range, _, file)) = wrong else { return Ok(()) };
        let of_span = |piece: &Piece| self.files[&piece.file].path == file.path && piece.bytes.contains(&range.start);
        let damaged = self.tensors.values().find(|tensor| tensor.pieces.iter().any(of_span));
        Err(damaged.map_or_else(|| file.wrong_checksum(), |tensor| file.wrong_tensor(&tensor.meta.name)))
    }

    /// Checks the bytes of one tensor against their checksums, and keeps its pages for whoever reads it next: so a
    /// checkpoint that is streamed is read once.
    ///
    /// # Errors
    /// If there is no such tensor, or its bytes are not those that were written.
    pub fn verify_tensor(&self, name: &str) -> Result<()> {
        for piece in &self.find(name)?.pieces {
            let file = &self.files[&piece.file];
            let within = |range: &Range<usize>| range.start < piece.bytes.end && piece.bytes.start < range.end;
            let mut spans = file.spans().filter(|(range, ..)| within(range));
            if !spans.all(|(range, span, _)| digest(&file.map[range]) == span.blake3) {
                return Err(file.wrong_tensor(name));
            }
        }
        Ok(())
    }

    fn find(&self, name: &str) -> Result<&Tensor> {
        let known = || self.tensors.keys().map(|known| (strsim::levenshtein(known, name), known)).min();
        self.tensors.get(name).ok_or_else(|| {
            let nearest = known().map_or(String::new(), |(_, known)| format!("; the nearest name is {known}"));
            Error::tensor(&self.dir, name, format!("the checkpoint has no tensor of this name (missing){nearest}"))
        })
    }
}

impl Mapped {
    /// The file's spans and the bytes that they cover.
    fn spans(&self) -> impl Iterator<Item = (Range<usize>, &Span, &Self)> {
        // The manifest was refused if they did not cover the file, whose size is the map's.
        self.spans.iter().scan(0, move |end, span| {
            let start = *end;
            *end += span.bytes;
            Some((start..*end, span, self))
        })
    }

    fn is_intact(&self, range: Range<usize>, span: &Span) -> bool {
        let mut hasher = Hasher::new();
        let mut start = range.start;
        while start < range.end {
            let end = range.end.min(start + VERIFY_BYTES);
            hasher.update_rayon(&self.map[start..end]);
            self.release(start..end);
            start = end;
        }
        hasher.finalize().to_hex().as_str() == span.blake3
    }

    fn wrong_tensor(&self, name: &str) -> Error {
        Error::tensor(&self.path, name, format!("its checksum is wrong: {DAMAGED}"))
    }

    fn wrong_checksum(&self) -> Error {
        Error::file(&self.path, format!("its checksum is wrong: {DAMAGED}"))
    }

    fn release(&self, bytes: Range<usize>) {
        // Ends come from pieces and spans that were checked against the map's length.
        release(&self.map, bytes);
    }

    /// Reads a safetensors header, after its checksum.
    fn header(&self) -> Result<BTreeMap<String, Located>> {
        let (end, tensors) = header::parse(&self.path, &self.map)?;
        match self.spans().next() {
            Some((range, span, _)) if range.end == end && self.is_intact(range.clone(), span) => Ok(tensors),
            _ => Err(self.wrong_checksum()),
        }
    }
}

/// Finds the pieces of the index in the files' headers; each must be there, and nothing else.
fn join(
    index_path: &Path,
    index: Index,
    files: &BTreeMap<String, Mapped>,
    mut headers: BTreeMap<String, BTreeMap<String, Located>>,
) -> Result<BTreeMap<String, Tensor>> {
    let mut tensors = BTreeMap::new();
    for (name, entry) in index.tensors.0 {
        let refuse = |why: String| Error::tensor(index_path, &name, format!("{why}: {DAMAGED}"));
        format::check_pieces(&entry).map_err(refuse)?;
        let IndexEntry { dtype, shape, axes, pieces: entries } = entry;
        let meta = TensorMeta { name: name.clone(), dtype, shape, axes };
        meta.check().map_err(refuse)?;
        let whole = entries.len() == 1;
        let mut pieces = Vec::with_capacity(entries.len());
        for entry in entries {
            check_file_name(index_path, &entry.file)?;
            let Some(header) = headers.get_mut(&entry.file) else {
                return Err(refuse(format!("it lies in {}, which is no file of tensors here", entry.file)));
            };
            let file = &files[&entry.file].path;
            let located = header.remove(&name).ok_or_else(|| {
                Error::tensor(file, &name, format!("it is missing here, or named twice in {INDEX}: {DAMAGED}"))
            })?;
            let shape = if whole { meta.shape.clone() } else { vec![entry.length] };
            if located.dtype != meta.dtype || located.shape != shape {
                let found = format!("{} of shape {:?}", located.dtype, located.shape);
                let why = format!("it is {found}, but {INDEX} says {} of shape {shape:?}: {DAMAGED}", meta.dtype);
                return Err(Error::tensor(file, &name, why));
            }
            // The pieces lie end to end, so this sum was made before.
            let range = entry.start..entry.start + entry.length;
            pieces.push(Piece { file: entry.file, range, bytes: located.bytes });
        }
        tensors.insert(name, Tensor { meta, pieces });
    }
    for (file, rest) in headers {
        if let Some(extra) = rest.keys().next() {
            let why = format!("it is extra, {INDEX} does not list it: {DAMAGED}");
            return Err(Error::tensor(&files[&file].path, extra, why));
        }
    }
    Ok(tensors)
}

/// A checksum as the manifest has it.
fn digest(bytes: &[u8]) -> String {
    Hasher::new().update_rayon(bytes).finalize().to_hex().to_string()
}

fn holds_tensors(file: &str) -> bool {
    file.ends_with(".safetensors")
}

/// Maps a file of a checkpoint, or one that is to become a part of such, into memory.
pub(super) fn map(path: &Path) -> Result<Mmap> {
    let found = fs::metadata(path).map_err(Error::io("read", path))?;
    if !found.is_file() {
        return Err(Error::file(path, format!("it is no ordinary file: {DAMAGED}")));
    }
    let file = File::open(path).map_err(Error::io("read", path))?;
    // SAFETY: the map is only read. This program never changes a checkpoint's files once their folder has its name:
    // folders are renamed and removed, which leaves mapped files as they are. That nobody else does so while a
    // checkpoint is open is asked of the user where `Reader` is described.
    unsafe { Mmap::map(&file) }.map_err(Error::io("map", path))
}

/// The folder to read for the checkpoint `dir`, or why there is none.
fn locate(dir: &Path) -> Result<PathBuf> {
    if dir.join(MANIFEST).exists() {
        return Ok(dir.into());
    }
    let aside = place::replaced(dir);
    if !place::exists(dir)? && aside.join(MANIFEST).exists() {
        tracing::warn!("the replacement of {} was cut off; the old checkpoint is read", dir.display());
        return Ok(aside);
    }
    let why = if !dir.exists() {
        "there is no such checkpoint; give the folder of one, for example RUN/checkpoints/step-00000020"
    } else if !dir.is_dir() {
        "it is no folder; give the folder of a checkpoint, for example RUN/checkpoints/step-00000020"
    } else if [INDEX, STATE].iter().any(|name| dir.join(name).exists()) {
        "it is an incomplete checkpoint, without manifest.json: the copy or the save was cut off; use another one"
    } else if dir.join(MODEL).exists() {
        "it holds model.safetensors as other programs write it, but is no checkpoint of mupscale, which has a \
         manifest.json and an index.json with each tensor's axes; give a folder that mupscale wrote"
    } else {
        "it is no checkpoint, without manifest.json; give the folder of one, for example \
         RUN/checkpoints/step-00000020"
    };
    Err(Error::file(dir, why))
}
