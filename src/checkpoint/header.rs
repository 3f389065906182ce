//! The header of a safetensors file: eight bytes of length, then JSON that says where each tensor lies.

use std::{collections::BTreeMap, ops::Range, path::Path};

use safetensors::tensor::{Metadata, TensorInfo};
use serde::Deserialize;

use super::format::{DAMAGED, RESERVED, UniqueMap, element_count};
use crate::{DType, Error, Result};

/// The largest header that the `safetensors` crate reads.
const MAX_HEADER_BYTES: usize = 100_000_000;
/// Bytes of the header's length, and the border that the data begins on.
const LENGTH_BYTES: usize = 8;

/// A tensor in a file.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Located {
    pub dtype: DType,
    pub shape: Vec<usize>,
    /// Its bytes, counted from the beginning of the file.
    pub bytes: Range<usize>,
}

/// What the JSON says of a tensor.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawEntry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (usize, usize),
}

/// A file's header with its length in front, and where each tensor lies; in the order that the format wants, the
/// widest elements first (which aligns them all), then by name.
pub(super) fn build(
    path: &Path,
    tensors: Vec<(String, DType, Vec<usize>)>,
) -> Result<(Vec<u8>, BTreeMap<String, Located>)> {
    let mut entries = Vec::with_capacity(tensors.len());
    for (name, dtype, shape) in tensors {
        let count = element_count(&shape, dtype).map_err(|why| Error::tensor(path, &name, why))?;
        let foreign = foreign_dtype(dtype);
        entries.push((foreign, name, dtype, shape, count * dtype.size()));
    }
    entries.sort_by(|a, b| b.0.cmp(&a.0).then_with(|| a.1.cmp(&b.1)));
    let mut end = 0usize;
    let mut located = BTreeMap::new();
    let mut infos = Vec::with_capacity(entries.len());
    for (foreign, name, dtype, shape, size) in entries {
        let begin = end;
        end = begin.checked_add(size).ok_or_else(|| Error::file(path, "its tensors are too large for this machine"))?;
        infos.push((name.clone(), TensorInfo { dtype: foreign, shape: shape.clone(), data_offsets: (begin, end) }));
        if name == RESERVED || located.insert(name.clone(), Located { dtype, shape, bytes: begin..end }).is_some() {
            return Err(Error::tensor(path, name, "the name is reserved or there twice; rename the tensor"));
        }
    }
    let invalid = |error: &dyn std::fmt::Display| Error::file(path, format!("no header can be made: {error}"));
    let metadata = Metadata::new(None, infos).map_err(|error| invalid(&error))?;
    let mut json = serde_json::to_vec(&metadata).map_err(|error| invalid(&error))?;
    json.resize(json.len().next_multiple_of(LENGTH_BYTES), b' ');
    if json.len() > MAX_HEADER_BYTES {
        return Err(invalid(&"it has too many tensors, divide them among more files"));
    }
    let mut header = (json.len() as u64).to_le_bytes().to_vec();
    header.append(&mut json);
    for place in located.values_mut() {
        place.bytes = place.bytes.start + header.len()..place.bytes.end + header.len();
    }
    Ok((header, located))
}

/// Reads the header at the beginning of `file`, the whole content of `path`: its length with the eight bytes in
/// front, and the tensors, which lie end to end and fill the rest of the file.
pub(super) fn parse(path: &Path, file: &[u8]) -> Result<(usize, BTreeMap<String, Located>)> {
    let why = |why: String| Error::file(path, format!("{why}: {DAMAGED}"));
    let Some((length, rest)) = file.split_first_chunk::<LENGTH_BYTES>() else {
        return Err(why(format!("it has {} bytes, too few for a safetensors file", file.len())));
    };
    let length = u64::from_le_bytes(*length);
    let json = usize::try_from(length)
        .ok()
        .filter(|&length| length <= MAX_HEADER_BYTES)
        .and_then(|length| rest.get(..length))
        .ok_or_else(|| {
            why(format!("its header says {length} bytes, but {} follow (at most {MAX_HEADER_BYTES})", rest.len()))
        })?;
    let raw: UniqueMap<RawEntry> =
        serde_json::from_slice(json).map_err(|error| why(format!("its header cannot be read ({error})")))?;
    let data_start = LENGTH_BYTES + json.len();
    let data_bytes = rest.len() - json.len();
    let mut tensors = BTreeMap::new();
    for (name, entry) in raw.0 {
        let located = locate(entry, data_start, data_bytes)
            .map_err(|why| Error::tensor(path, &name, format!("{why}: {DAMAGED}")))?;
        tensors.insert(name, located);
    }
    check_tiling(path, &tensors, data_start, file.len())?;
    Ok((data_start, tensors))
}

/// Checks one entry by itself.
fn locate(entry: RawEntry, data_start: usize, data_bytes: usize) -> Result<Located, String> {
    let RawEntry { dtype, shape, data_offsets: (begin, end) } = entry;
    let dtype = DType::from_safetensors_name(&dtype).ok_or_else(|| format!("the dtype {dtype:?} is unknown"))?;
    let bytes = element_count(&shape, dtype)? * dtype.size();
    if begin > end || end > data_bytes {
        return Err(format!("its offsets {begin}..{end} lie outside the {data_bytes} bytes of data"));
    }
    if end - begin != bytes {
        return Err(format!("it has {} bytes, but {dtype} of shape {shape:?} takes {bytes}", end - begin));
    }
    Ok(Located { dtype, shape, bytes: data_start + begin..data_start + end })
}

/// Checks that tensors neither overlap nor leave bytes between them or behind them.
fn check_tiling(path: &Path, tensors: &BTreeMap<String, Located>, start: usize, end: usize) -> Result<()> {
    let mut by_place: Vec<_> = tensors.iter().collect();
    by_place.sort_by_key(|(_, located)| (located.bytes.start, located.bytes.end));
    let mut reached = start;
    for (name, located) in by_place {
        if located.bytes.start != reached {
            let how = if located.bytes.start < reached { "overlaps" } else { "leaves a hole behind" };
            let (at, due) = (located.bytes.start - start, reached - start);
            let why = format!("it begins at byte {at} instead of {due} and {how} the tensor before it: {DAMAGED}");
            return Err(Error::tensor(path, name, why));
        }
        reached = located.bytes.end;
    }
    if reached != end {
        return Err(Error::file(path, format!("it has {} bytes after its last tensor: {DAMAGED}", end - reached)));
    }
    Ok(())
}

/// The type in the words of the `safetensors` crate.
pub(super) fn foreign_dtype(dtype: DType) -> safetensors::Dtype {
    match dtype {
        DType::F64 => safetensors::Dtype::F64,
        DType::F32 => safetensors::Dtype::F32,
        DType::BF16 => safetensors::Dtype::BF16,
        DType::F16 => safetensors::Dtype::F16,
        DType::I64 => safetensors::Dtype::I64,
        DType::I32 => safetensors::Dtype::I32,
        DType::U32 => safetensors::Dtype::U32,
        DType::U16 => safetensors::Dtype::U16,
        DType::U8 => safetensors::Dtype::U8,
    }
}
