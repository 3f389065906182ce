//! Writing a checkpoint: tensors by range in any order and from any thread, documents, then all of it at once. Other
//! processes may write a part of it: [`Writer::join`].

mod together;

use std::{
    collections::BTreeMap,
    fs::File,
    mem,
    ops::Range,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use blake3::Hasher;
use serde::Serialize;

use super::{
    FORMAT, INDEX, MANIFEST, TensorMeta,
    disk::Disk,
    format::{self, FileEntry, Index, IndexEntry, Manifest, PieceEntry, Span, UniqueMap, check_file_name, document},
    header, place,
};
use crate::{Error, Result};

/// Bytes that are hashed and written at a time, so that the second finds them in the cache.
const BLOCK_BYTES: usize = 1 << 18;

/// A checkpoint that is being written. Nothing is seen under its name before [`Self::commit`]; dropped without it, it
/// leaves nothing behind.
pub struct Writer {
    disk: Disk,
    target: PathBuf,
    force: bool,
    partial: PathBuf,
    /// Held as long as the partial folder is ours; none where another process has made it.
    lock: Option<File>,
    files: Vec<OpenFile>,
    tensors: BTreeMap<String, OpenTensor>,
    committed: bool,
}

/// A file in the partial folder.
struct OpenFile {
    name: String,
    path: PathBuf,
    file: File,
    size: usize,
    /// Checksums so far, with the byte each begins at; those of tensors come at the end.
    spans: Vec<(usize, Span)>,
}

struct OpenTensor {
    meta: TensorMeta,
    pieces: Vec<OpenPiece>,
}

/// A range of a tensor in a file.
struct OpenPiece {
    /// Index into [`Writer::files`].
    file: usize,
    /// Elements of the tensor.
    range: Range<usize>,
    /// Where its bytes lie in the file.
    bytes: Range<usize>,
    /// What has been written, by its first byte in the file; no two overlap.
    written: Mutex<BTreeMap<usize, OpenSpan>>,
}

struct OpenSpan {
    /// The byte after the last.
    end: usize,
    checksum: Checksum,
}

/// The checksum of all of a span.
enum Checksum {
    /// A thread is writing it, or has failed to.
    Busy,
    /// So far: what follows on goes in as well.
    Open(Box<Hasher>),
    /// Of what another process wrote, as it says.
    Told(String),
}

impl Checksum {
    /// As the manifest writes it.
    fn digest(self) -> Option<String> {
        match self {
            Self::Busy => None,
            Self::Open(hasher) => Some(hasher.finalize().to_hex().to_string()),
            Self::Told(digest) => Some(digest),
        }
    }
}

impl Writer {
    /// Begins a checkpoint that will be the folder `dir`. With `force` it will replace a checkpoint of that name,
    /// which stays whole until the new one is.
    ///
    /// # Errors
    /// [`Error::Exists`] without `force`; [`Error::File`] if what would be replaced is no checkpoint.
    pub fn create(dir: impl AsRef<Path>, force: bool) -> Result<Self> {
        Self::create_on(Disk::default(), dir.as_ref(), force)
    }

    pub(super) fn create_on(disk: Disk, dir: &Path, force: bool) -> Result<Self> {
        if let Some(own) = dir.file_name().and_then(|name| name.to_str()) {
            place::clean(&disk, place::parent(dir), |name| name == own)?;
        }
        place::check_target(dir, force)?;
        let (partial, lock) = place::partial(&disk, dir)?;
        Ok(Self {
            disk,
            target: dir.into(),
            force,
            partial,
            lock: Some(lock),
            files: Vec::new(),
            tensors: BTreeMap::new(),
            committed: false,
        })
    }

    /// Writes a document as JSON.
    pub fn json(&mut self, file: &str, value: &impl Serialize) -> Result<()> {
        let mut bytes = serde_json::to_vec_pretty(value)
            .map_err(|error| Error::file(self.target.join(file), format!("it cannot be written as JSON: {error}")))?;
        bytes.push(b'\n');
        self.bytes(file, &bytes)
    }

    /// Writes a file of the caller's own, for example `tokenizer.json`.
    pub fn bytes(&mut self, file: &str, content: &[u8]) -> Result<()> {
        let opened = self.create_file(file, content.len())?;
        self.write_block(opened, 0, content)
    }

    /// Declares the tensors of a safetensors file, each whole. Their elements follow through [`Self::write`].
    ///
    /// # Errors
    /// If a name is not new, a shape cannot be, or its axes do not describe it; if the disk has no room for the file.
    pub fn tensors(&mut self, file: &str, tensors: Vec<TensorMeta>) -> Result<()> {
        let path = self.target.join(file);
        let whole = |meta: TensorMeta| match meta.elements() {
            Ok(count) => Ok((meta, 0..count)),
            Err(why) => Err(Error::tensor(&path, meta.name, why)),
        };
        let pieces = tensors.into_iter().map(whole).collect::<Result<_>>()?;
        self.pieces(file, pieces)
    }

    /// Declares pieces of tensors that lie in one safetensors file: ranges of their elements in flat order. All pieces
    /// of a tensor, in whatever files, must cover it.
    ///
    /// # Errors
    /// As [`Self::tensors`].
    pub fn pieces(&mut self, file: &str, pieces: Vec<(TensorMeta, Range<usize>)>) -> Result<()> {
        let path = self.target.join(file);
        if !file.ends_with(".safetensors") {
            return Err(Error::file(path, "a file of tensors must be called *.safetensors; choose such a name"));
        }
        let mut entries = Vec::with_capacity(pieces.len());
        for (meta, range) in &pieces {
            let refuse = |why: String| Error::tensor(&path, &meta.name, why);
            meta.check().map_err(refuse)?;
            let count = meta.elements().map_err(refuse)?;
            if range.start > range.end || range.end > count || range.is_empty() && count > 0 {
                return Err(refuse(format!("the piece {range:?} is no part of its {count} elements")));
            }
            let clashes =
                |known: &OpenTensor| known.meta != *meta || known.pieces.iter().any(|piece| piece.meets(range));
            if self.tensors.get(&meta.name).is_some_and(clashes) {
                return Err(refuse("it is declared twice (a duplicate); every tensor needs a name of its own".into()));
            }
            let shape = if range.len() == count { meta.shape.clone() } else { vec![range.len()] };
            entries.push((meta.name.clone(), meta.dtype, shape));
        }
        let (header, mut located) = header::build(&path, entries)?;
        let size = located.values().map(|place| place.bytes.end).max().unwrap_or(header.len());
        let opened = self.create_file(file, size)?;
        self.write_block(opened, 0, &header)?;
        for (meta, range) in pieces {
            // The header was built from these very names, each there once.
            let bytes = located.remove(&meta.name).expect("located by its name").bytes;
            let piece = OpenPiece { file: opened, range, bytes, written: Mutex::default() };
            let tensor = self.tensors.entry(meta.name.clone());
            tensor.or_insert_with(|| OpenTensor { meta, pieces: Vec::new() }).pieces.push(piece);
        }
        Ok(())
    }

    /// Writes elements of a declared tensor, the first of them at `start` in flat order. Every element is written
    /// once, in any order, from any thread; what follows on from what is there shares its checksum.
    ///
    /// # Errors
    /// If the tensor is not declared, or the elements lie outside it or were written before.
    pub fn write(&self, tensor: &str, start: usize, elements: &[u8]) -> Result<()> {
        let refuse = |why: String| Error::tensor(&self.target, tensor, why);
        let OpenTensor { meta, pieces } =
            self.tensors.get(tensor).ok_or_else(|| refuse("it was not declared for this checkpoint".into()))?;
        let size = meta.dtype.size();
        let end = start.checked_add(elements.len() / size).filter(|_| elements.len().is_multiple_of(size));
        let range = start..end.ok_or_else(|| refuse(format!("{} bytes are no elements of it", elements.len())))?;
        let common = |piece: &OpenPiece| range.start.max(piece.range.start)..range.end.min(piece.range.end);
        if pieces.iter().map(|piece| common(piece).len()).sum::<usize>() != range.len() {
            return Err(refuse(format!("the elements {range:?} are no part of what was declared of it")));
        }
        for piece in pieces {
            let part = common(piece);
            if !part.is_empty() {
                let begin = piece.bytes.start + (part.start - piece.range.start) * size;
                let content = &elements[(part.start - start) * size..(part.end - start) * size];
                self.write_piece(tensor, piece, begin, content)?;
            }
        }
        Ok(())
    }

    /// Writes `content` into a piece, at the byte `begin` of its file, and takes its checksum.
    fn write_piece(&self, tensor: &str, piece: &OpenPiece, begin: usize, content: &[u8]) -> Result<()> {
        let OpenFile { path, file, .. } = &self.files[piece.file];
        let end = begin + content.len();
        let (first, mut hasher) = piece.reserve(begin, end).ok_or_else(|| {
            let within = begin - piece.bytes.start..end - piece.bytes.start;
            Error::tensor(path, tensor, format!("some of the bytes {within:?} of this piece were written before"))
        })?;
        let mut at = begin;
        for block in content.chunks(BLOCK_BYTES) {
            hasher.update(block);
            self.disk.write_at(file, path, block, at)?;
            at += block.len();
        }
        if let Some(span) = piece.lock().get_mut(&first) {
            span.checksum = Checksum::Open(hasher);
        }
        Ok(())
    }

    /// Makes the checkpoint complete and visible: files to the disk, manifest, folder, name, parent.
    ///
    /// # Errors
    /// If a part of a tensor was never written, or the system refuses. Then the checkpoint that was to be replaced is
    /// still there.
    pub fn commit(mut self) -> Result<()> {
        self.collect_spans()?;
        let index = document(&self.index()?);
        self.bytes(INDEX, &index)?;
        for OpenFile { file, path, .. } in &self.files {
            self.disk.sync(file, path)?;
        }
        let entries = self.files.iter_mut().map(|OpenFile { name, size, spans, .. }| {
            spans.sort_unstable_by_key(|&(start, _)| start);
            let spans = mem::take(spans).into_iter().map(|(_, span)| span).collect();
            (name.clone(), FileEntry { size: *size, spans })
        });
        let manifest = document(&Manifest::new(entries.collect()));
        let path = self.partial.join(MANIFEST);
        let file = self.disk.create(&path, manifest.len())?;
        self.disk.write_at(&file, &path, &manifest, 0)?;
        self.disk.sync(&file, &path)?;
        self.disk.sync_dir(&self.partial)?;
        self.publish()
    }

    /// Gives the finished folder its name.
    fn publish(&mut self) -> Result<()> {
        place::check_target(&self.target, self.force)?;
        let replaces = place::exists(&self.target)?;
        let aside = place::replaced(&self.target);
        if replaces {
            self.disk.rename(&self.target, &aside)?;
        }
        if let Err(error) = self.disk.rename(&self.partial, &self.target) {
            if replaces {
                // If this fails too, the old checkpoint is found where it lies.
                let _ = self.disk.rename(&aside, &self.target);
            }
            return Err(error);
        }
        self.committed = true;
        self.disk.sync_dir(place::parent(&self.target))?;
        if replaces && let Err(error) = place::discard(&self.disk, &aside, &self.target) {
            tracing::warn!("the checkpoint is saved; the one that it replaced stays on the disk: {error}");
        }
        Ok(())
    }

    /// Moves the tensors' checksums to their files.
    fn collect_spans(&mut self) -> Result<()> {
        for (name, tensor) in &self.tensors {
            for piece in &tensor.pieces {
                let OpenFile { path, spans, .. } = &mut self.files[piece.file];
                let mut reached = piece.bytes.start;
                for (start, OpenSpan { end, checksum }) in mem::take(&mut *piece.lock()) {
                    let Some(blake3) = checksum.digest().filter(|_| start == reached) else { break };
                    spans.push((start, Span { bytes: end - start, blake3 }));
                    reached = end;
                }
                if reached != piece.bytes.end {
                    let element = piece.range.start + (reached - piece.bytes.start) / tensor.meta.dtype.size();
                    let why = format!("its element {element} was never written, so this is no complete checkpoint");
                    return Err(Error::tensor(&*path, name, why));
                }
            }
        }
        Ok(())
    }

    /// Says where each tensor lies; its pieces must cover it.
    fn index(&mut self) -> Result<Index> {
        let mut tensors = BTreeMap::new();
        for (name, tensor) in &mut self.tensors {
            tensor.pieces.sort_by_key(|piece| piece.range.start);
            let pieces = tensor.pieces.iter().map(|piece| PieceEntry {
                file: self.files[piece.file].name.clone(),
                start: piece.range.start,
                length: piece.range.len(),
            });
            let TensorMeta { dtype, shape, axes, .. } = tensor.meta.clone();
            let entry = IndexEntry { dtype, shape, axes, pieces: pieces.collect() };
            format::check_pieces(&entry).map_err(|why| Error::tensor(&self.target, name, why))?;
            tensors.insert(name.clone(), entry);
        }
        Ok(Index { format: FORMAT, tensors: UniqueMap(tensors) })
    }

    /// Makes a file in the partial folder, or opens what its owner has made, and gives its index.
    fn create_file(&mut self, name: &str, size: usize) -> Result<usize> {
        check_file_name(&self.target, name)?;
        let path = self.partial.join(name);
        if name == MANIFEST || self.files.iter().any(|file| file.name == name) {
            return Err(Error::file(path, "the checkpoint has this file already; choose another name"));
        }
        let file = match &self.lock {
            Some(_) => self.disk.create(&path, size)?,
            None => self.disk.open(&path, size)?,
        };
        self.files.push(OpenFile { name: name.into(), path, file, size, spans: Vec::new() });
        Ok(self.files.len() - 1)
    }

    /// Writes a document or a header, a span of its own, which is its owner's to write.
    fn write_block(&mut self, file: usize, start: usize, content: &[u8]) -> Result<()> {
        let OpenFile { path, file, spans, .. } = &mut self.files[file];
        if !content.is_empty() && self.lock.is_some() {
            self.disk.write_at(file, path, content, start)?;
            spans.push((start, Span { bytes: content.len(), blake3: format::digest(content) }));
        }
        Ok(())
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if self.lock.is_some()
            && !self.committed
            && let Err(error) = self.disk.remove(&self.partial)
        {
            tracing::warn!("an unfinished checkpoint stays on the disk: {error}");
        }
    }
}

impl OpenPiece {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<usize, OpenSpan>> {
        // A thread that panicked left the map as it was before or after one insertion.
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether an element of `range` is in this piece; an empty tensor has one piece only.
    fn meets(&self, range: &Range<usize>) -> bool {
        range.is_empty() || range.start < self.range.end && self.range.start < range.end
    }

    /// Claims the bytes `begin..end`: the first byte of the span that they belong to, and its hasher; none if some
    /// of them are taken.
    fn reserve(&self, begin: usize, end: usize) -> Option<(usize, Box<Hasher>)> {
        let mut written = self.lock();
        if is_taken(&written, begin, end) {
            return None;
        }
        if let Some((&first, span)) = written.range_mut(..begin).next_back()
            && span.end == begin
        {
            match mem::replace(&mut span.checksum, Checksum::Busy) {
                Checksum::Open(hasher) => {
                    span.end = end;
                    return Some((first, hasher));
                }
                kept => span.checksum = kept,
            }
        }
        written.insert(begin, OpenSpan { end, checksum: Checksum::Busy });
        Some((begin, Box::default()))
    }
}

/// Whether some of the bytes `begin..end` are those of a span.
fn is_taken(written: &BTreeMap<usize, OpenSpan>, begin: usize, end: usize) -> bool {
    written.range(begin..).next().is_some_and(|(&next, _)| next < end)
        || written.range(..begin).next_back().is_some_and(|(_, span)| span.end > begin)
}
