//! The documents that make a folder a checkpoint: the index and the manifest.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    fmt,
    marker::PhantomData,
    path::{Component, Path},
};

use serde::{
    Deserialize, Deserializer, Serialize,
    de::{Error as _, IgnoredAny, MapAccess, Visitor},
};

use super::{FORMAT, INDEX, MANIFEST};
use crate::{DType, Error, Result};

/// A factor of an axis: something that has a name and may have a width, for example `kv_heads`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Block {
    /// What the block counts.
    pub name: String,
    /// How many of them.
    pub size: usize,
}

/// An axis of a tensor as its blocks, outermost first; its size is their product.
pub type Axis = Vec<Block>;

/// A logical tensor, wherever its elements lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorMeta {
    /// Unique in the checkpoint, over all files.
    pub name: String,
    /// Type of the elements.
    pub dtype: DType,
    /// Sizes of the axes, outermost first; empty for a scalar.
    pub shape: Vec<usize>,
    /// What each axis of `shape` is made of.
    pub axes: Vec<Axis>,
}

impl TensorMeta {
    /// The number of elements.
    ///
    /// # Errors
    /// In words, if the number or that of the bytes is too large for the machine.
    pub fn elements(&self) -> Result<usize, String> {
        element_count(&self.shape, self.dtype)
    }

    /// Whether the axes describe the shape.
    pub(super) fn check(&self) -> Result<(), String> {
        self.elements()?;
        if self.axes.len() != self.shape.len() {
            return Err(format!("{} axes are described for the shape {:?}", self.axes.len(), self.shape));
        }
        for (axis, &size) in self.axes.iter().zip(&self.shape) {
            if axis.iter().try_fold(1usize, |product, block| product.checked_mul(block.size)) != Some(size) {
                let blocks: Vec<_> = axis.iter().map(|block| format!("{} {}", block.name, block.size)).collect();
                return Err(format!("the blocks [{}] do not multiply to the axis of {size}", blocks.join(", ")));
            }
        }
        Ok(())
    }
}

/// The number of elements of a shape, if that of the bytes can be counted too.
pub(super) fn element_count(shape: &[usize], dtype: DType) -> Result<usize, String> {
    // A zero makes the product zero, but the other sizes must be possible nevertheless.
    let nonzero = shape.iter().filter(|&&size| size != 0);
    let bytes = nonzero.copied().try_fold(dtype.size(), usize::checked_mul);
    if bytes.is_none_or(|bytes| isize::try_from(bytes).is_err()) {
        return Err(format!("the shape {shape:?} has more elements than this machine can address"));
    }
    Ok(shape.iter().product())
}

/// `index.json`.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Index {
    pub format: u32,
    pub tensors: UniqueMap<IndexEntry>,
}

/// A tensor in the index, under its name.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct IndexEntry {
    pub dtype: DType,
    pub shape: Vec<usize>,
    pub axes: Vec<Axis>,
    /// In order, end to end, covering the tensor.
    pub pieces: Vec<PieceEntry>,
}

/// A range of a tensor's elements in flat (row-major) order, which lies in `file` under the tensor's name: with the
/// tensor's own shape if it is all of it, as a vector otherwise.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PieceEntry {
    pub file: String,
    pub start: usize,
    pub length: usize,
}

/// `manifest.json`.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Manifest {
    pub format: u32,
    /// The program that wrote the checkpoint.
    pub writer: String,
    pub files: UniqueMap<FileEntry>,
    /// BLAKE3 of this document with an empty string in this place.
    pub blake3: String,
}

/// A file in the manifest, under its name.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FileEntry {
    /// Bytes.
    pub size: usize,
    /// End to end, covering the file.
    pub spans: Vec<Span>,
}

/// Consecutive bytes of a file and their checksum.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Span {
    pub bytes: usize,
    /// 64 hexadecimal digits.
    pub blake3: String,
}

impl Manifest {
    /// The manifest of these files, with its own checksum.
    pub fn new(files: BTreeMap<String, FileEntry>) -> Self {
        let writer = concat!("mupscale ", env!("CARGO_PKG_VERSION")).into();
        let mut manifest = Self { format: FORMAT, writer, files: UniqueMap(files), blake3: String::new() };
        manifest.blake3 = digest(&document(&manifest));
        manifest
    }

    /// Reads a manifest, which must be byte for byte what its writer made.
    pub fn parse(path: &Path, bytes: &[u8]) -> Result<Self> {
        let found: Self = versioned(path, bytes)?;
        let sealed = Self { blake3: String::new(), ..found };
        let checksum = digest(&document(&sealed));
        let manifest = Self { blake3: checksum, ..sealed };
        if document(&manifest) != bytes {
            return Err(Error::file(path, format!("its checksum is wrong: {DAMAGED}")));
        }
        for (name, file) in &manifest.files.0 {
            check_file_name(path, name)?;
            let covered = file.spans.iter().try_fold(0usize, |sum, span| sum.checked_add(span.bytes));
            if name == MANIFEST || covered != Some(file.size) {
                let why = format!("its checksums cover {covered:?} of the {} bytes of {name}: {DAMAGED}", file.size);
                return Err(Error::file(path, why));
            }
        }
        if !manifest.files.0.contains_key(INDEX) {
            return Err(Error::file(path, format!("it lists no {INDEX}: {DAMAGED}")));
        }
        Ok(manifest)
    }
}

/// The remedy for content that no writer of ours leaves behind.
pub(super) const DAMAGED: &str =
    "the file was damaged or changed after it was written; use another checkpoint or a copy";

/// Parses a document that states its format, after making sure that it is ours.
pub(super) fn versioned<T: for<'de> Deserialize<'de>>(path: &Path, bytes: &[u8]) -> Result<T> {
    #[derive(Deserialize)]
    struct Version {
        format: u64,
    }
    let invalid = |error: serde_json::Error| Error::file(path, format!("it cannot be read ({error}): {DAMAGED}"));
    let Version { format } = serde_json::from_slice(bytes).map_err(invalid)?;
    if format != u64::from(FORMAT) {
        let why = format!("it is of format {format}, this program reads format {FORMAT}: use a newer mupscale");
        return Err(Error::file(path, why));
    }
    serde_json::from_slice(bytes).map_err(invalid)
}

/// A document's bytes: indented JSON with a newline at the end.
pub(super) fn document(value: &impl Serialize) -> Vec<u8> {
    // Ours are structures of strings, numbers, lists and string-keyed maps, which JSON can always hold.
    let mut bytes = serde_json::to_vec_pretty(value).expect("a document of ours is JSON");
    bytes.push(b'\n');
    bytes
}

/// BLAKE3 as the manifest writes it.
pub(super) fn digest(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex().to_string()
}

/// Accepts the name of a file that lies in the checkpoint's own folder, in sight.
pub(super) fn check_file_name(path: &Path, name: &str) -> Result<()> {
    let mut parts = Path::new(name).components();
    let plain = matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None));
    if !plain || name.starts_with('.') || name.contains(['/', '\\', '\0']) {
        let why = format!("it names the file {name:?}, but a checkpoint's files lie in its own folder: {DAMAGED}");
        return Err(Error::file(path, why));
    }
    Ok(())
}

/// A JSON object with no key twice. The key `__metadata__`, which safetensors reserves for remarks, is passed over.
pub(super) struct UniqueMap<V>(pub BTreeMap<String, V>);

impl<V: Serialize> Serialize for UniqueMap<V> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(serializer)
    }
}

impl<'de, V: Deserialize<'de>> Deserialize<'de> for UniqueMap<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Unique<V>(PhantomData<V>);
        impl<'de, V: Deserialize<'de>> Visitor<'de> for Unique<V> {
            type Value = UniqueMap<V>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Self::Value, A::Error> {
                let mut map = BTreeMap::new();
                while let Some(key) = access.next_key::<String>()? {
                    if key == RESERVED {
                        access.next_value::<IgnoredAny>()?;
                        continue;
                    }
                    match map.entry(key) {
                        Entry::Vacant(place) => {
                            let name = place.key().clone();
                            let value = access.next_value();
                            place.insert(value.map_err(|error| A::Error::custom(format!("{name}: {error}")))?);
                        }
                        Entry::Occupied(place) => {
                            return Err(A::Error::custom(format!("{} is there twice (a duplicate)", place.key())));
                        }
                    }
                }
                Ok(UniqueMap(map))
            }
        }
        deserializer.deserialize_map(Unique(PhantomData))
    }
}

/// The key in a safetensors header that names no tensor.
pub(super) const RESERVED: &str = "__metadata__";

/// Checks that the pieces of a tensor, in order, lie end to end and cover it.
pub(super) fn check_pieces(entry: &IndexEntry) -> Result<(), String> {
    let count = element_count(&entry.shape, entry.dtype)?;
    let mut reached = 0usize;
    for piece in &entry.pieces {
        if piece.start != reached || piece.length == 0 && count != 0 {
            return Err(format!("its pieces do not lie end to end: one begins at {}, not {reached}", piece.start));
        }
        reached = reached.checked_add(piece.length).ok_or("its pieces are longer than any tensor")?;
    }
    if reached != count || entry.pieces.is_empty() {
        return Err(format!("its pieces hold {reached} of its {count} elements"));
    }
    Ok(())
}
