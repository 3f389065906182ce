//! Safetensors as the Hugging Face hub has them: one file, or shards with an index. Read and written a tensor at a time.

use crate::plain::Stored;
use mupscale::{DType, Error, Result};
use safetensors::{
    Dtype,
    tensor::{Metadata, TensorInfo},
};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, HashMap},
    fs::{self, File},
    io::{BufWriter, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

/// The only file of weights.
pub const SINGLE: &str = "model.safetensors";
/// Which shard holds which tensor.
pub const SHARDS: &str = "model.safetensors.index.json";

/// Bytes of the header's length.
const LENGTH: usize = 8;
/// The largest header that the safetensors format allows.
const MAX_HEADER: u64 = 100_000_000;
/// Elements that are compared at a time.
const CHUNK: usize = 1 << 20;
const DAMAGED: &str = "it is cut off or damaged; download or copy it again";

/// The weights in a folder.
pub struct TensorFiles {
    dir: PathBuf,
    tensors: BTreeMap<String, Located>,
}

/// A tensor in a file.
struct Located {
    file: usize,
    path: PathBuf,
    handle: std::sync::Arc<File>,
    dtype: DType,
    shape: Vec<usize>,
    start: u64,
}

#[derive(Serialize, Deserialize)]
struct Index {
    #[serde(default)]
    metadata: serde_json::Map<String, serde_json::Value>,
    weight_map: BTreeMap<String, String>,
}

impl TensorFiles {
    /// Opens the folder's weights: every header and file size is checked, and the index against the files.
    pub fn open(dir: &Path) -> Result<Self> {
        let mut files = Self { dir: dir.into(), tensors: BTreeMap::new() };
        let index = dir.join(SHARDS);
        if !index.exists() {
            if !dir.join(SINGLE).exists() {
                let why = format!("holds neither {SINGLE} nor {SHARDS}; pickled weights (.bin, .pt) are not read");
                return Err(Error::file(dir, why));
            }
            files.add(0, &dir.join(SINGLE), |_, _| true)?;
            return Ok(files);
        }
        let text = fs::read(&index).map_err(Error::io("read", &index))?;
        let Index { weight_map, .. } = serde_json::from_slice(&text)
            .map_err(|e| Error::file(&index, format!("is not an index of shards ({e}): {DAMAGED}")))?;
        let mut names: Vec<&String> = weight_map.values().collect();
        names.sort_unstable();
        names.dedup();
        for (i, name) in names.into_iter().enumerate() {
            if Path::new(name).file_name() != Some(name.as_ref()) {
                return Err(Error::file(&index, format!("names the shard {name:?}, which lies outside its folder")));
            }
            files.add(i, &dir.join(name), |tensor, _| weight_map.get(tensor) == Some(name))?;
        }
        match weight_map.keys().find(|name| !files.tensors.contains_key(*name)) {
            Some(name) => {
                let why = format!("{SHARDS} places it in {}, which has no such tensor: {DAMAGED}", weight_map[name]);
                Err(Error::tensor(dir, name, why))
            }
            None => Ok(files),
        }
    }

    /// Adds a file's tensors; `listed` says which of them its index places there.
    fn add(&mut self, number: usize, path: &Path, listed: impl Fn(&str, &TensorInfo) -> bool) -> Result<()> {
        let file = File::open(path).map_err(Error::io("read", path))?;
        let size = file.metadata().map_err(Error::io("read", path))?.len();
        let refuse = |why: String| Error::file(path, format!("{why}: {DAMAGED}"));
        let mut length = [0; LENGTH];
        file.read_exact_at(&mut length, 0).map_err(|_| refuse(format!("has {size} bytes, no safetensors header")))?;
        let header = u64::from_le_bytes(length);
        if header > MAX_HEADER || header + LENGTH as u64 > size {
            return Err(refuse(format!("its header says {header} bytes, but the file has {size}")));
        }
        let mut bytes = vec![0; LENGTH + header as usize];
        file.read_exact_at(&mut bytes, 0).map_err(Error::io("read", path))?;
        // Checks that tensors lie end to end and have the bytes that their shapes need.
        let metadata: Metadata =
            serde_json::from_slice(&bytes[LENGTH..]).map_err(|e| refuse(format!("its header cannot be read ({e})")))?;
        let data = bytes.len() as u64;
        let end = metadata.tensors().values().map(|info| info.data_offsets.1).max().unwrap_or(0) as u64;
        if data.checked_add(end) != Some(size) {
            return Err(refuse(format!("its header describes {end} bytes of data, but {} follow", size - data)));
        }
        let handle = std::sync::Arc::new(file);
        for (name, info) in metadata.tensors() {
            if !listed(&name, info) {
                return Err(Error::tensor(path, name, format!("{SHARDS} does not place it in this file: {DAMAGED}")));
            }
            let dtype = DType::from_safetensors_name(&format!("{:?}", info.dtype)).ok_or_else(|| {
                let why = format!("is of type {:?}; weights must be F64, F32, BF16 or F16", info.dtype);
                Error::tensor(path, &name, why)
            })?;
            let start = data + info.data_offsets.0 as u64;
            let handle = handle.clone();
            let located = Located { file: number, path: path.into(), handle, dtype, shape: info.shape.clone(), start };
            if let Some(twice) = self.tensors.insert(name.clone(), located) {
                return Err(Error::tensor(path, name, format!("is in {} too: {DAMAGED}", twice.path.display())));
            }
        }
        Ok(())
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// All names, in order of their place in the files.
    pub fn names(&self) -> Vec<&str> {
        let mut all: Vec<_> = self.tensors.iter().collect();
        all.sort_by_key(|(_, t)| (t.file, t.start));
        all.into_iter().map(|(name, _)| name.as_str()).collect()
    }

    /// Whether there is a tensor of this name.
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Type and shape of a tensor of floats.
    pub fn meta(&self, name: &str) -> Result<(DType, &[usize])> {
        let Located { path, dtype, shape, .. } = self.find(name)?;
        if !dtype.is_float() {
            let why = format!("is of type {dtype}; weights must be F64, F32, BF16 or F16");
            return Err(Error::tensor(path, name, why));
        }
        Ok((*dtype, shape))
    }

    /// The shape that a tensor must have; the error says what the configuration wants.
    pub fn expect(&self, name: &str, shape: &[usize]) -> Result<DType> {
        let (dtype, found) = self.meta(name)?;
        if found != shape {
            let why = format!("has shape {found:?}, but config.json describes one of {shape:?}");
            return Err(Error::tensor(&self.find(name)?.path, name, why));
        }
        Ok(dtype)
    }

    /// Elements of a tensor, in flat order.
    pub fn read(&self, name: &str, elements: std::ops::Range<usize>) -> Result<Vec<u8>> {
        let Located { path, handle, dtype, shape, start, .. } = self.find(name)?;
        assert!(elements.end <= shape.iter().product(), "{name}: elements {elements:?} of {shape:?}");
        let mut bytes = vec![0; elements.len() * dtype.size()];
        let start = start + (elements.start * dtype.size()) as u64;
        handle.read_exact_at(&mut bytes, start).map_err(Error::io("read", path))?;
        Ok(bytes)
    }

    /// A whole tensor.
    pub fn read_all(&self, name: &str) -> Result<Vec<u8>> {
        let count = self.find(name)?.shape.iter().product();
        self.read(name, 0..count)
    }

    /// Whether two tensors are the same bit for bit.
    pub fn same(&self, a: &str, b: &str) -> Result<bool> {
        if self.meta(a)? != self.meta(b)? {
            return Ok(false);
        }
        let count = self.meta(a)?.1.iter().product();
        for start in (0..count).step_by(CHUNK) {
            let part = start..(start + CHUNK).min(count);
            if self.read(a, part.clone())? != self.read(b, part)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn find(&self, name: &str) -> Result<&Located> {
        self.tensors.get(name).ok_or_else(|| {
            let nearest = self.tensors.keys().min_by_key(|known| strsim::levenshtein(known, name));
            let nearest = nearest.map_or(String::new(), |known| format!("; the nearest name is {known}"));
            Error::tensor(&self.dir, name, format!("is missing, but config.json describes it{nearest}"))
        })
    }
}

impl Stored for TensorFiles {
    fn place(&self) -> &Path {
        self.dir()
    }

    fn names(&self) -> Vec<&str> {
        TensorFiles::names(self)
    }

    fn has(&self, name: &str) -> bool {
        TensorFiles::has(self, name)
    }

    fn meta(&self, name: &str) -> Result<(DType, &[usize])> {
        TensorFiles::meta(self, name)
    }

    fn read(&self, name: &str, elements: std::ops::Range<usize>) -> Result<Vec<u8>> {
        TensorFiles::read(self, name, elements)
    }
}

/// A tensor that will be written.
pub struct Declared {
    /// Its name.
    pub name: String,
    /// Type of its elements.
    pub dtype: DType,
    /// Sizes of its axes.
    pub shape: Vec<usize>,
}

impl Declared {
    fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.size()
    }
}

/// Writes tensors into a folder, in the order in which [`TensorWriter::order`] gives them.
pub struct TensorWriter {
    dir: PathBuf,
    /// File and tensors of each shard.
    shards: Vec<(String, Vec<Declared>)>,
    at: (usize, usize),
    open: Option<(PathBuf, BufWriter<File>)>,
}

impl TensorWriter {
    /// Cuts the tensors into files of at most `limit` bytes; a tensor alone may be larger.
    pub fn new(dir: &Path, tensors: Vec<Declared>, limit: usize) -> Self {
        let mut shards: Vec<Vec<Declared>> = vec![Vec::new()];
        let mut size = 0;
        for tensor in tensors {
            let bytes = tensor.bytes();
            if size > 0 && size + bytes > limit {
                shards.push(Vec::new());
                size = 0;
            }
            size += bytes;
            shards.last_mut().expect("there is always one").push(tensor);
        }
        let count = shards.len();
        let name = |i: usize| match count {
            1 => SINGLE.to_string(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
        };
        let mut shards: Vec<_> = shards.into_iter().enumerate().map(|(i, tensors)| (name(i), tensors)).collect();
        for (_, tensors) in &mut shards {
            // The widest elements first, so that all are aligned.
            tensors.sort_by_key(|t| std::cmp::Reverse(t.dtype.size()));
        }
        Self { dir: dir.into(), shards, at: (0, 0), open: None }
    }

    /// Names in the order in which they must be written.
    pub fn order(&self) -> Vec<String> {
        self.shards.iter().flat_map(|(_, tensors)| tensors.iter().map(|t| t.name.clone())).collect()
    }

    /// Writes the next tensor.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        if self.open.is_none() {
            self.open = Some(self.start()?);
        }
        let (shard, index) = self.at;
        let tensor = &self.shards[shard].1[index];
        assert!(tensor.name == name && tensor.bytes() == bytes.len(), "{name} is not the next tensor");
        let (path, file) = self.open.as_mut().expect("opened above");
        file.write_all(bytes).map_err(Error::io("write", &*path))?;
        self.at.1 += 1;
        if self.at.1 == self.shards[shard].1.len() {
            let (path, mut file) = self.open.take().expect("opened above");
            file.flush().and_then(|()| file.get_ref().sync_all()).map_err(Error::io("write", &path))?;
            self.at = (shard + 1, 0);
        }
        Ok(())
    }

    /// Opens the next shard and writes its header.
    fn start(&self) -> Result<(PathBuf, BufWriter<File>)> {
        let (name, tensors) = &self.shards[self.at.0];
        let path = self.dir.join(name);
        let invalid = |e: &dyn std::fmt::Display| Error::file(&path, format!("no header can be made: {e}"));
        let mut end = 0;
        let infos = tensors.iter().map(|t| {
            let start = end;
            end += t.bytes();
            (t.name.clone(), TensorInfo { dtype: foreign(t.dtype), shape: t.shape.clone(), data_offsets: (start, end) })
        });
        // transformers asks for the mark.
        let mark = HashMap::from([("format".to_string(), "pt".to_string())]);
        let metadata = Metadata::new(Some(mark), infos.collect()).map_err(|e| invalid(&e))?;
        let mut json = serde_json::to_vec(&metadata).map_err(|e| invalid(&e))?;
        json.resize(json.len().next_multiple_of(LENGTH), b' ');
        let file = File::create_new(&path).map_err(Error::io("create", &path))?;
        let mut file = BufWriter::with_capacity(1 << 20, file);
        let length = (json.len() as u64).to_le_bytes();
        file.write_all(&length).and_then(|()| file.write_all(&json)).map_err(Error::io("write", &path))?;
        Ok((path, file))
    }

    /// Writes the index, if there are shards.
    pub fn finish(self) -> Result<()> {
        assert_eq!(self.at.0, self.shards.len(), "tensors are missing");
        if self.shards.len() == 1 {
            return Ok(());
        }
        let total: usize = self.shards.iter().flat_map(|(_, tensors)| tensors.iter().map(Declared::bytes)).sum();
        let places =
            self.shards.iter().flat_map(|(file, tensors)| tensors.iter().map(|t| (t.name.clone(), file.clone())));
        let mut metadata = serde_json::Map::new();
        metadata.insert("total_size".into(), total.into());
        write_json(&self.dir.join(SHARDS), &Index { metadata, weight_map: places.collect() })
    }
}

/// Writes a document.
pub fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_vec_pretty(value).map_err(|e| Error::file(path, format!("no JSON: {e}")))?;
    fs::write(path, text).map_err(Error::io("write", path))
}

fn foreign(dtype: DType) -> Dtype {
    match dtype {
        DType::F64 => Dtype::F64,
        DType::BF16 => Dtype::BF16,
        DType::F16 => Dtype::F16,
        _ => Dtype::F32,
    }
}
