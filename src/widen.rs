//! Widening of tensors that belong to a model we cannot train: a PyTorch state dict, and its optimizer's moments.
//!
//! A [`Spec`] says what the axes of each tensor are made of; the rest follows as for our own models ([`crate::mup`]), with
//! one difference: a foreign forward pass has no multipliers, so a = 1 everywhere.

use crate::{
    DType, Error, Result,
    data::{
        mapped::{map_file, release},
        output::Partial,
    },
    dtype::convert,
    mup::{Factors, Ratios, Rule},
};
use memmap2::Mmap;
use safetensors::{
    SafeTensors,
    tensor::{Metadata, TensorInfo, TensorView},
};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, BufWriter, Write},
    ops::Range,
    path::{Path, PathBuf},
};

/// What a matrix does, where its shape does not tell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// `[outputs, inputs, …]`: linear layers and convolutions. A vector has outputs alone.
    #[default]
    Weight,
    /// `[inputs, outputs, …]`: GPT-2's Conv1D, transposed convolutions.
    Transposed,
    /// Rows that are picked or added, the last axis is the output: tokens, positions, class tokens.
    Embedding,
}

/// The axes of the tensors whose name fits.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// A name; `*` stands for any characters.
    pub pattern: String,
    /// For each axis its blocks, outermost first, divided by commas: `name` or `name:size`, one of them without size. A
    /// name in `[widths]` grows; any other is fixed.
    pub axes: Vec<String>,
    /// What it does.
    #[serde(default)]
    pub role: Role,
}

/// A widening.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spec {
    /// Multiplicities by name.
    pub widths: BTreeMap<String, usize>,
    /// The first that fits a tensor's name holds for it.
    pub tensors: Vec<Entry>,
}

/// How one tensor grows.
#[derive(Clone, Debug, PartialEq)]
pub struct Growth {
    /// For each axis: (size, multiplicity) of its blocks, outermost first.
    axes: Vec<Vec<(usize, usize)>>,
    /// Growth of outputs and inputs.
    pub ratios: Ratios,
}

/// Largest multiplicity.
const MAX_TIMES: usize = 1 << 16;

impl Spec {
    /// Reads a TOML file.
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).map_err(Error::io("read", path))?;
        let spec: Self = toml::from_str(&text).map_err(|e| Error::file(path, e.to_string()))?;
        match spec.widths.iter().find(|(_, times)| !(1..=MAX_TIMES).contains(*times)) {
            Some((name, times)) => {
                Err(Error::config(format!("widths.{name}"), times, format!("must be between 1 and {MAX_TIMES}")))
            }
            None => Ok(spec),
        }
    }

    /// How the tensor `name` of this shape grows.
    pub fn growth(&self, name: &str, shape: &[usize]) -> Result<Growth> {
        let refuse = |value: &str, why: String| Error::config(format!("the axes of {name}"), value, why);
        let Some(entry) = self.tensors.iter().find(|entry| fits(&entry.pattern, name)) else {
            return Err(refuse("(absent)", "no pattern of the spec fits this name: add one".into()));
        };
        if entry.axes.len() != shape.len() {
            let why = format!("{} axes are described, its shape is {shape:?}", entry.axes.len());
            return Err(refuse(&entry.pattern, why));
        }
        let axes = entry.axes.iter().zip(shape).map(|(text, &size)| {
            self.blocks(text, size).map_err(|why| refuse(text, format!("{why} (the axis has {size})")))
        });
        Growth::new(axes.collect::<Result<_>>()?, entry.role).map_err(|why| refuse(&entry.pattern, why))
    }

    fn blocks(&self, text: &str, size: usize) -> Result<Vec<(usize, usize)>, String> {
        let mut blocks = Vec::new();
        let mut open = None;
        for (i, block) in text.split(',').map(str::trim).enumerate() {
            let (name, size) = match block.split_once(':') {
                None => (block, None),
                Some((name, size)) => {
                    let size = size.parse().ok().filter(|&n: &usize| n > 0);
                    (name, Some(size.ok_or_else(|| format!("{block} has no positive size"))?))
                }
            };
            if size.is_none() && open.replace(i).is_some() {
                return Err("only one block may be without a size".into());
            }
            blocks.push((size.unwrap_or(1), self.widths.get(name).copied().unwrap_or(1)));
        }
        let known = blocks.iter().try_fold(1usize, |product, &(size, _)| product.checked_mul(size));
        let known = known.filter(|&known| size.is_multiple_of(known) && (open.is_some() || known == size));
        let known = known.ok_or("its blocks do not multiply to the axis")?;
        if let Some(i) = open {
            blocks[i].0 = size / known;
        }
        Ok(blocks)
    }
}

/// Whether a name fits a pattern with `*`.
pub fn fits(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == name,
        Some((start, rest)) => name.strip_prefix(start).is_some_and(|tail| {
            tail.char_indices().map(|(i, _)| i).chain([tail.len()]).any(|i| fits(rest, &tail[i..]))
        }),
    }
}

impl Growth {
    fn new(axes: Vec<Vec<(usize, usize)>>, role: Role) -> Result<Self, String> {
        let times = |axis: usize| axes.get(axis).map_or(1, |blocks| blocks.iter().map(|b| b.1).product::<usize>());
        let last = axes.len().saturating_sub(1);
        let (output, input) = match role {
            Role::Weight => (0, 1),
            Role::Transposed => (1, 0),
            Role::Embedding => (last, axes.len()),
        };
        if let Some(axis) = (0..axes.len()).find(|&a| a != output && a != input && times(a) > 1) {
            return Err(format!("axis {axis} grows, but is neither output nor input of a {role:?}"));
        }
        let ratios = Ratios { k_out: times(output) as f64, k_in: times(input) as f64, a: 1.0 };
        Ok(Self { axes, ratios })
    }

    /// The growth of one shape to another: whole multiples, each axis one block.
    pub fn between(name: &str, narrow: &[usize], wide: &[usize], role: Role) -> Result<Self> {
        let refuse = |why: String| Error::config(format!("the shape of {name}"), format!("{wide:?}"), why);
        if narrow.len() != wide.len() {
            return Err(refuse(format!("the narrow one has {} axes: {narrow:?}", narrow.len())));
        }
        let axis = |(&n, &w): (&usize, &usize)| match n > 0 && w > 0 && w.is_multiple_of(n) && w / n <= MAX_TIMES {
            true => Ok(vec![(n, w / n)]),
            false => Err(refuse(format!("is no whole multiple of the narrow one, {narrow:?}"))),
        };
        let axes = narrow.iter().zip(wide).map(axis).collect::<Result<_>>()?;
        Self::new(axes, role).map_err(refuse)
    }

    /// The wide shape.
    pub fn shape(&self) -> Vec<usize> {
        self.axes.iter().map(|blocks| blocks.iter().map(|b| b.0 * b.1).product()).collect()
    }

    /// Whether nothing grows.
    pub fn is_none(&self) -> bool {
        self.axes.iter().flatten().all(|b| b.1 == 1)
    }

    /// Writes factor · repeat(values), in their own type, a chunk at a time.
    fn widen(&self, bytes: &[u8], dtype: DType, factor: f64, out: &mut impl Write) -> io::Result<()> {
        let blocks: Vec<_> = self.axes.iter().flatten().copied().collect();
        let (size, mut chunk) = (dtype.size(), Vec::with_capacity(CHUNK));
        runs(&blocks, 0, &mut |elements, times| {
            let source = &bytes[elements.start * size..elements.end * size];
            match times {
                1 => chunk.extend_from_slice(source),
                _ => source.chunks_exact(size).for_each(|x| (0..times).for_each(|_| chunk.extend_from_slice(x))),
            }
            if chunk.len() >= CHUNK {
                scale(&mut chunk, dtype, factor);
                out.write_all(&chunk)?;
                chunk.clear();
            }
            Ok(())
        })?;
        scale(&mut chunk, dtype, factor);
        out.write_all(&chunk)
    }
}

/// Bytes that are widened before they are written.
const CHUNK: usize = 1 << 20;
/// Elements of a run, at most.
const RUN: usize = 1 << 10;

/// Tells which elements stand in the wide tensor, in flat order: runs of elements, each of them so many times in a row.
fn runs(
    blocks: &[(usize, usize)],
    base: usize,
    tell: &mut impl FnMut(Range<usize>, usize) -> io::Result<()>,
) -> io::Result<()> {
    match blocks {
        [] => tell(base..base + 1, 1),
        [(size, times)] => {
            (0..*size).step_by(RUN).try_for_each(|i| tell(base * size + i..base * size + (i + RUN).min(*size), *times))
        }
        [(size, times), rest @ ..] => (0..size * times).try_for_each(|i| runs(rest, base * size + i / times, tell)),
    }
}

/// Multiplies elements, rounded once.
fn scale(bytes: &mut [u8], dtype: DType, factor: f64) {
    if factor != 1.0 {
        let mut values = vec![0.0f64; bytes.len() / dtype.size()];
        convert(bytes, dtype, bytemuck::cast_slice_mut(&mut values), DType::F64);
        values.iter_mut().for_each(|x| *x *= factor);
        convert(bytemuck::cast_slice(&values), DType::F64, bytes, dtype);
    }
}

/// PyTorch's names of an optimizer's state, as prefixes of a tensor's name.
const MOMENTS: [(&str, Factor); 4] = [
    ("exp_avg.", |f| f.first),
    ("momentum_buffer.", |f| f.first),
    ("exp_avg_sq.", |f| f.second),
    ("max_exp_avg_sq.", |f| f.second),
];

/// Which factor a moment takes.
type Factor = fn(&Factors) -> f64;

/// A safetensors file, mapped into memory.
pub struct TensorFile {
    path: PathBuf,
    map: Mmap,
}

impl TensorFile {
    /// Maps a file.
    pub fn open(path: &Path) -> Result<Self> {
        Ok(Self { path: path.into(), map: map_file(path)? })
    }

    /// Its tensors.
    pub fn tensors(&self) -> Result<Tensors<'_>> {
        let tensors = SafeTensors::deserialize(&self.map).map_err(|e| {
            Error::file(&self.path, format!("is no whole safetensors file ({e}); save or copy it again"))
        })?;
        Ok(Tensors { file: self, path: &self.path, tensors })
    }
}

/// Tensors of a safetensors file. They are read one by one, and their pages given back.
pub struct Tensors<'a> {
    file: &'a TensorFile,
    path: &'a Path,
    tensors: SafeTensors<'a>,
}

impl Tensors<'_> {
    /// Names and shapes, sorted by name.
    pub fn shapes(&self) -> BTreeMap<String, Vec<usize>> {
        self.tensors.iter().map(|(name, view)| (name.to_string(), view.shape().to_vec())).collect()
    }

    /// Writes all of them widened: weights, or with a `rule` the moments of an optimizer. `growths` by the names of
    /// weights. A tensor of no moment's name (a step count) is copied.
    pub fn widen(&self, growths: &BTreeMap<String, Growth>, rule: Option<Rule>, out: &Path, force: bool) -> Result<()> {
        let mut jobs = Vec::new();
        for (name, view) in self.tensors.iter() {
            let plan = match rule {
                None => growths.get(name).map(|g| (g, g.ratios.s())),
                Some(rule) => {
                    let moment = MOMENTS.iter().find_map(|(prefix, get)| Some((name.strip_prefix(prefix)?, get)));
                    let of = |weight: &str| {
                        let why = format!("is a moment of {weight}, which the weights do not have");
                        growths.get(weight).ok_or_else(|| Error::tensor(self.path, name, why))
                    };
                    moment.map(|(weight, get)| Ok((of(weight)?, get(&of(weight)?.ratios.factors(rule))))).transpose()?
                }
            };
            jobs.push(self.job(name, &view, plan)?);
        }
        // The widest elements first, so that all are aligned.
        jobs.sort_by(|a, b| b.info.dtype.cmp(&a.info.dtype).then_with(|| a.name.cmp(b.name)));
        let mut end = 0;
        for job in &mut jobs {
            let start = end;
            end += job.info.shape.iter().product::<usize>() * job.info.dtype.bitsize() / 8;
            job.info.data_offsets = (start, end);
        }
        self.write(&jobs, out, force)
    }

    fn job<'j>(&self, name: &'j str, view: &TensorView<'_>, plan: Option<(&'j Growth, f64)>) -> Result<Job<'j>> {
        let dtype = DType::from_safetensors_name(&format!("{:?}", view.dtype()));
        let dtype = dtype.filter(|d| d.is_float() || plan.is_none_or(|(growth, _)| growth.is_none()));
        let Some(dtype) = dtype else {
            let why = format!("is of type {:?}, which does not widen: only F64, F32, BF16 and F16 do", view.dtype());
            return Err(Error::tensor(self.path, name, why));
        };
        let shape = plan.map_or(view.shape().to_vec(), |(growth, _)| growth.shape());
        let narrow = |(growth, _): (&Growth, f64)| -> Vec<usize> {
            growth.axes.iter().map(|blocks| blocks.iter().map(|b| b.0).product()).collect()
        };
        if let Some(wanted) = plan.map(narrow).filter(|wanted| wanted != view.shape()) {
            let why = format!("has shape {:?}, its weight {wanted:?}", view.shape());
            return Err(Error::tensor(self.path, name, why));
        }
        Ok(Job { name, dtype, plan, info: TensorInfo { dtype: view.dtype(), shape, data_offsets: (0, 0) } })
    }

    fn write(&self, jobs: &[Job<'_>], out: &Path, force: bool) -> Result<()> {
        let partial = Partial::file(out, force)?;
        let path = partial.path();
        let infos = jobs.iter().map(|job| (job.name.to_string(), job.info.clone())).collect();
        let invalid = |e: &dyn std::fmt::Display| Error::file(out, format!("no header can be made: {e}"));
        let metadata = Metadata::new(None, infos).map_err(|e| invalid(&e))?;
        let mut json = serde_json::to_vec(&metadata).map_err(|e| invalid(&e))?;
        json.resize(json.len().next_multiple_of(8), b' ');
        let mut file = BufWriter::with_capacity(1 << 20, File::create(path).map_err(Error::io("create", path))?);
        let length = (json.len() as u64).to_le_bytes();
        file.write_all(&length).and_then(|()| file.write_all(&json)).map_err(Error::io("write", path))?;
        for job in jobs {
            let view = self.tensors.tensor(job.name).map_err(|e| invalid(&e))?;
            let written = match job.plan {
                Some((growth, factor)) => growth.widen(view.data(), job.dtype, factor, &mut file),
                None => file.write_all(view.data()),
            };
            written.map_err(Error::io("write", path))?;
            let start = view.data().as_ptr() as usize - self.file.map.as_ptr() as usize;
            release(&self.file.map, start..start + view.data().len());
        }
        file.flush().and_then(|()| file.get_ref().sync_all()).map_err(Error::io("write", path))?;
        partial.publish()
    }
}

/// One tensor to write.
struct Job<'a> {
    name: &'a str,
    dtype: DType,
    plan: Option<(&'a Growth, f64)>,
    info: TensorInfo,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tensor_is_widened_in_chunks_as_at_once() {
        // Larger than a chunk, runs longer than RUN, and rows that are repeated.
        let (rows, columns) = (3, 5000);
        let growth = Growth::between("x", &[rows, columns], &[6, 15000], Role::Weight).unwrap();
        let values: Vec<f64> = (0..rows * columns).map(|i| i as f64).collect();
        let mut written = Vec::new();
        growth.widen(bytemuck::cast_slice(&values), DType::F64, 1.0, &mut written).unwrap();
        let expected: Vec<f64> =
            (0..6).flat_map(|r| (0..15000).map(move |c| (r / 2 * columns + c / 3) as f64)).collect();
        assert!(bytemuck::pod_collect_to_vec::<u8, f64>(&written) == expected);
        // A vector that stays as it is, longer than a run.
        let growth = Growth::between("x", &[5000], &[5000], Role::Weight).unwrap();
        let mut written = Vec::new();
        growth.widen(bytemuck::cast_slice(&values[..5000]), DType::F64, 1.0, &mut written).unwrap();
        assert!(written == bytemuck::cast_slice::<f64, u8>(&values[..5000]));
    }

    #[test]
    fn patterns_fit_whole_names() {
        for (pattern, name) in [("a", "a"), ("*", ""), ("a*c", "abc"), ("a*c", "ac"), ("*.b.*", "a.b.c"), ("*ö", "äö")]
        {
            assert!(fits(pattern, name), "{pattern} {name}");
        }
        for (pattern, name) in [("a", "ab"), ("a*c", "abd"), ("*b", "abc"), ("", "a")] {
            assert!(!fits(pattern, name), "{pattern} {name}");
        }
    }

    #[test]
    fn blocks_repeat_each_by_its_own_multiplicity() {
        let spec: Spec = toml::from_str(
            "widths = { heads = 2, size = 3 }\n[[tensors]]\npattern = '*'\naxes = ['qkv:2, heads, size:2', 'in']",
        )
        .unwrap();
        let growth = spec.growth("x", &[4, 1]).unwrap();
        assert_eq!((growth.shape(), growth.ratios.k_out, growth.ratios.k_in), (vec![24, 1], 6.0, 1.0));
        let wide = [0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 2, 2, 2, 3, 3, 3];
        let mut written = Vec::new();
        let values: [f32; 4] = [0.0, 1.0, 2.0, 3.0];
        growth.widen(bytemuck::cast_slice(&values), DType::F32, 0.5, &mut written).unwrap();
        assert_eq!(bytemuck::pod_collect_to_vec::<u8, f32>(&written), wide.map(|x| x as f32 / 2.0));
        for shape in [&[3, 1][..], &[4], &[4, 1, 1]] {
            assert!(spec.growth("x", shape).unwrap_err().to_string().contains("the axes of x"));
        }
    }
}
