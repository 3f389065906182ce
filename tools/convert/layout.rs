//! How another program's tensors are made of ours, and ours of theirs: one description for both ways.

use mupscale::{DType, Error, Result, checkpoint::Writer, dtype};
use std::path::Path;

/// A tensor of another program.
pub struct Foreign {
    /// Its name there.
    pub name: String,
    /// Its shape as stored.
    pub shape: Vec<usize>,
    /// Stored `[inputs, outputs]`, where ours are `[outputs, inputs]`.
    pub transposed: bool,
    /// What it is made of, end to end along its outputs.
    pub parts: Vec<Part>,
}

/// Some outputs of a foreign tensor.
pub struct Part {
    /// How many, copies counted.
    pub outputs: usize,
    /// Where they come from.
    pub source: Source,
}

/// Where outputs come from.
pub enum Source {
    /// We have no such thing: zeros.
    Zeros,
    /// A tensor of ours.
    Row {
        /// Its name.
        name: String,
        /// Factor on it, on the way out.
        scale: f64,
        /// On the way out, each run of `run` outputs is written `times` times (grouped K/V heads as full ones).
        times: usize,
        /// Outputs of a run.
        run: usize,
    },
}

/// Tensors of ours by name: type and elements.
pub trait Rows {
    /// Type of a tensor.
    fn dtype(&self, name: &str) -> Result<DType>;
    /// Does something with its bytes.
    fn with(&self, name: &str, work: &mut dyn FnMut(&[u8])) -> Result<()>;
}

/// Outputs that are moved at a time: a transposition reads and writes runs of this many.
const BLOCK: usize = 64;

impl Part {
    /// A tensor of ours with a factor.
    pub fn scaled(name: impl Into<String>, outputs: usize, scale: f64) -> Self {
        Self { outputs, source: Source::Row { name: name.into(), scale, times: 1, run: 1 } }
    }

    /// Zeros.
    pub fn zeros(outputs: usize) -> Self {
        Self { outputs, source: Source::Zeros }
    }
}

impl Foreign {
    /// One made of whole parts: a matrix with `inputs`, or a vector.
    pub fn new(name: impl Into<String>, inputs: Option<usize>, transposed: bool, parts: Vec<Part>) -> Self {
        let outputs: usize = parts.iter().map(|p| p.outputs).sum();
        let shape = match inputs {
            None => vec![outputs],
            Some(inputs) if transposed => vec![inputs, outputs],
            Some(inputs) => vec![outputs, inputs],
        };
        Self { name: name.into(), shape, transposed: transposed && inputs.is_some(), parts }
    }

    fn outputs(&self) -> usize {
        self.parts.iter().map(|p| p.outputs).sum()
    }

    fn inputs(&self) -> usize {
        self.shape.iter().product::<usize>() / self.outputs()
    }

    /// The widest type of its parts; `none` if they are all zeros.
    pub fn dtype(&self, rows: &impl Rows, none: DType) -> Result<DType> {
        let mut widest: Option<DType> = None;
        for part in &self.parts {
            if let Source::Row { name, .. } = &part.source {
                let dtype = rows.dtype(name)?;
                widest = Some(widest.filter(|w| w.size() >= dtype.size()).unwrap_or(dtype));
            }
        }
        Ok(widest.unwrap_or(none))
    }

    /// Its elements, from ours, in a type. `path` is for errors.
    pub fn assemble(&self, rows: &impl Rows, to: DType, path: &Path) -> Result<Vec<u8>> {
        let (inputs, outputs, size) = (self.inputs(), self.outputs(), to.size());
        let mut out = vec![0; inputs * outputs * size];
        let mut first = 0;
        for part in &self.parts {
            if let Source::Row { name, scale, times, run } = &part.source {
                let from = rows.dtype(name)?;
                let mut finite = true;
                rows.with(name, &mut |bytes| {
                    let width = inputs * from.size();
                    for (block, source) in bytes.chunks(BLOCK * width).enumerate() {
                        let values = convert(source, from, to, *scale);
                        finite &= to != DType::F16 || no_new_infinity(source, from, &values);
                        let count = source.len() / width;
                        for i in 0..*times {
                            let target = |o: usize| {
                                let source = block * BLOCK + o;
                                first + source / run * run * times + i * run + source % run
                            };
                            self.place(&mut out, &values, size, count, target);
                        }
                    }
                })?;
                if !finite {
                    return Err(self.too_large(path));
                }
            }
            first += part.outputs;
        }
        Ok(out)
    }

    fn too_large(&self, path: &Path) -> Error {
        Error::tensor(path, &self.name, "has numbers that are too large for f16: choose --dtype bf16 or f32")
    }

    /// Copies `count` outputs, `[count, inputs]`, to where they stand here.
    fn place(&self, out: &mut [u8], values: &[u8], size: usize, count: usize, target: impl Fn(usize) -> usize) {
        let (inputs, outputs) = (self.inputs(), self.outputs());
        if !self.transposed {
            for (o, row) in values.chunks_exact(inputs * size).enumerate() {
                out[target(o) * inputs * size..][..inputs * size].copy_from_slice(row);
            }
            return;
        }
        for c in 0..inputs {
            for o in 0..count {
                let element = &values[(o * inputs + c) * size..][..size];
                out[(c * outputs + target(o)) * size..][..size].copy_from_slice(element);
            }
        }
    }

    /// Hands its elements to ours. Parts that we have no place for must be zero.
    pub fn scatter(&self, bytes: &[u8], from: DType, to: DType, writer: &Writer, path: &Path) -> Result<()> {
        let (inputs, outputs, size) = (self.inputs(), self.outputs(), from.size());
        let mut first = 0;
        for part in &self.parts {
            for block in (0..part.outputs).step_by(BLOCK) {
                let count = BLOCK.min(part.outputs - block);
                let start = first + block;
                let values = if self.transposed {
                    let mut values = vec![0; count * inputs * size];
                    for c in 0..inputs {
                        for o in 0..count {
                            let element = &bytes[(c * outputs + start + o) * size..][..size];
                            values[(o * inputs + c) * size..][..size].copy_from_slice(element);
                        }
                    }
                    values
                } else {
                    bytes[start * inputs * size..][..count * inputs * size].to_vec()
                };
                match &part.source {
                    Source::Row { name, .. } => {
                        let converted = convert(&values, from, to, 1.0);
                        if to == DType::F16 && !no_new_infinity(&values, from, &converted) {
                            return Err(self.too_large(path));
                        }
                        writer.write(name, block * inputs, &converted)?;
                    }
                    Source::Zeros if all_zero(&values, from) => {}
                    Source::Zeros => {
                        let why = "has values, but mupscale's model has no such part: it cannot be taken over";
                        return Err(Error::tensor(path, &self.name, why));
                    }
                }
            }
            first += part.outputs;
        }
        Ok(())
    }
}

/// Elements in another type, times a factor; rounded once.
fn convert(source: &[u8], from: DType, to: DType, scale: f64) -> Vec<u8> {
    let count = source.len() / from.size();
    let mut out = vec![0; count * to.size()];
    if scale == 1.0 {
        dtype::convert(source, from, &mut out, to);
        return out;
    }
    let values: Vec<f64> = floats(source, from).into_iter().map(|x| x * scale).collect();
    dtype::convert(bytemuck::cast_slice(&values), DType::F64, &mut out, to);
    out
}

/// Elements as numbers.
pub fn floats(bytes: &[u8], from: DType) -> Vec<f64> {
    let mut values = vec![0.0f64; bytes.len() / from.size()];
    dtype::convert(bytes, from, bytemuck::cast_slice_mut(&mut values), DType::F64);
    values
}

/// Whether all elements are zero.
pub fn all_zero(bytes: &[u8], from: DType) -> bool {
    floats(bytes, from).iter().all(|&x| x == 0.0)
}

/// Whether the f16 `values` are infinite only where the source is.
fn no_new_infinity(source: &[u8], from: DType, values: &[u8]) -> bool {
    let infinite = |bytes: &[u8], dtype| floats(bytes, dtype).iter().filter(|x| x.is_infinite()).count();
    infinite(values, DType::F16) <= infinite(source, from)
}
