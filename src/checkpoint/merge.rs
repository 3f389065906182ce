//! One safetensors file of all that a folder holds in several: a checkpoint, or shards as other programs write them.

use super::{MANIFEST, Reader, format::UniqueMap, header, read};
use crate::{Error, Result};
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors, View};
use serde::Deserialize;
use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet, HashMap},
    fs::{self, File},
    path::{Path, PathBuf},
};

/// The ending of the index that lists the shards of a file of this name.
const SHARDS: &str = ".safetensors.index.json";
/// Remarks that safetensors files may carry.
type Remarks = HashMap<String, String>;

/// A tensor to write.
struct Tensor<'a> {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: usize,
    from: From<'a>,
}

/// Where its elements are.
enum From<'a> {
    Checkpoint(&'a Reader),
    Shard(&'a [u8]),
}

impl View for &Tensor<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        match self.from {
            From::Shard(bytes) => Cow::Borrowed(bytes),
            // Name and range are the reader's own.
            From::Checkpoint(reader) => {
                reader.read(&self.name, 0..self.shape.iter().product()).expect("a tensor that the reader lists")
            }
        }
    }
    fn data_len(&self) -> usize {
        self.bytes
    }
}

/// Writes the tensors of a folder, those whose names `wanted` takes, to the new file `out`: of a checkpoint, after all
/// its checksums; else of the shards that `*.safetensors.index.json` lists, or of all `*.safetensors`. Returns how many
/// there are. `out` is incomplete until this returns: give a name that is renamed then.
///
/// # Errors
/// A file is missing or damaged; two hold a tensor of one name; nothing is left to write.
pub fn merge(folder: &Path, out: &Path, wanted: impl Fn(&str) -> bool) -> Result<usize> {
    if folder.join(MANIFEST).exists() {
        let reader = Reader::open(folder)?;
        reader.verify()?;
        let tensor = |meta: &super::TensorMeta| Tensor {
            name: meta.name.clone(),
            dtype: header::foreign_dtype(meta.dtype),
            bytes: meta.shape.iter().product::<usize>() * meta.dtype.size(),
            shape: meta.shape.clone(),
            from: From::Checkpoint(&reader),
        };
        let tensors = reader.tensors().filter(|meta| wanted(&meta.name)).map(tensor).collect();
        return write(folder, tensors, None, out);
    }
    let files = shards(folder)?;
    let maps = files.iter().map(|path| Ok((path, read::map(path)?))).collect::<Result<Vec<_>>>()?;
    let (mut tensors, mut remarks, mut homes) = (Vec::new(), Remarks::new(), BTreeMap::new());
    for (path, map) in &maps {
        let (found, file) = parse(path, map)?;
        remarks.extend(found);
        for (name, view) in file.iter().filter(|(name, _)| wanted(name)) {
            if let Some(home) = homes.insert(name.to_string(), path) {
                return Err(Error::tensor(path, name, format!("is in {} too: which one is meant?", home.display())));
            }
            // The view borrows the header that was parsed; its bytes are the map's.
            let begin = view.data().as_ptr() as usize - map.as_ptr() as usize;
            let from = From::Shard(&map[begin..begin + view.data_len()]);
            let (dtype, shape, bytes) = (view.dtype(), view.shape().to_vec(), view.data_len());
            tensors.push(Tensor { name: name.into(), dtype, shape, bytes, from });
        }
    }
    write(folder, tensors, (!remarks.is_empty()).then_some(remarks), out)
}

/// The files to merge: each must hold what the index, if there is one, places in it.
fn shards(folder: &Path) -> Result<Vec<PathBuf>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: UniqueMap<String>,
    }
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(folder).map_err(Error::io("read", folder))? {
        names.insert(entry.map_err(Error::io("read", folder))?.file_name().to_string_lossy().into_owned());
    }
    let indices: Vec<_> = names.iter().filter(|name| name.ends_with(SHARDS)).collect();
    let (path, text) = match indices[..] {
        [] => {
            let files: Vec<_> = names.iter().filter(|name| name.ends_with(".safetensors")).collect();
            if files.is_empty() {
                return Err(Error::file(folder, "holds no checkpoint and no *.safetensors"));
            }
            return Ok(files.into_iter().map(|name| folder.join(name)).collect());
        }
        [index] => {
            let path = folder.join(index);
            let text = fs::read(&path).map_err(Error::io("read", &path))?;
            (path, text)
        }
        [first, second, ..] => {
            let why = format!("holds {first} and {second}: move the shards that are not meant elsewhere");
            return Err(Error::file(folder, why));
        }
    };
    let Index { weight_map } = serde_json::from_slice(&text)
        .map_err(|e| Error::file(&path, format!("is no index of shards ({e}); download or copy it again")))?;
    let mut files: BTreeMap<&String, Vec<&String>> = BTreeMap::new();
    for (tensor, file) in &weight_map.0 {
        if Path::new(file).file_name() != Some(file.as_ref()) {
            return Err(Error::tensor(&path, tensor, format!("lies in {file:?}, which is outside this folder")));
        }
        files.entry(file).or_default().push(tensor);
    }
    for (file, tensors) in &files {
        let shard = folder.join(file);
        let map = read::map(&shard)?;
        let (_, found) = parse(&shard, &map)?;
        if let Some(missing) = tensors.iter().find(|name| found.tensor(name).is_err()) {
            let why = format!("is missing, though {} places it here; download or copy it again", path.display());
            return Err(Error::tensor(&shard, *missing, why));
        }
    }
    Ok(files.into_keys().map(|name| folder.join(name)).collect())
}

/// A shard's remarks and tensors.
fn parse<'a>(path: &Path, map: &'a Mmap) -> Result<(Remarks, SafeTensors<'a>)> {
    let damaged = |e| Error::file(path, format!("is no whole safetensors file ({e}); download or copy it again"));
    let (_, metadata) = SafeTensors::read_metadata(map).map_err(damaged)?;
    Ok((metadata.metadata().clone().unwrap_or_default(), SafeTensors::deserialize(map).map_err(damaged)?))
}

fn write(folder: &Path, tensors: Vec<Tensor>, remarks: Option<Remarks>, out: &Path) -> Result<usize> {
    if tensors.is_empty() {
        return Err(Error::file(folder, "holds no such tensor, so there is nothing to write"));
    }
    let refused = |e: safetensors::SafeTensorError| match e {
        safetensors::SafeTensorError::IoError(source) => Error::io("write", out)(source),
        other => Error::file(out, format!("cannot be written ({other})")),
    };
    let named = tensors.iter().map(|tensor| (tensor.name.as_str(), tensor));
    safetensors::serialize_to_file(named, remarks, out).map_err(refused)?;
    File::open(out).and_then(|file| file.sync_all()).map_err(Error::io("write", out))?;
    Ok(tensors.len())
}
