//! `--verify`: logits of a checkpoint and of a foreign model on the same tokens, and how far they are apart.
//!
//! The checkpoint is computed by the library's own forward pass in f64, one block in memory at a time: a decoder of one
//! block, whose embedding is the residual stream so far.

use crate::{export::decoder, plain::Plain};
use mupscale::{
    DType, Error, Result,
    backend::{Backend, HostBuffer, Mut, Ref, Stream, Tensor, cpu::Cpu},
    dims::Width,
    model::{
        Batch, MicroBatch, Weights,
        decoder::{self, Activations, Decoder},
        plan::Plan,
        spec::{Alphas, DecoderSpec},
    },
    ops::{head::Head, head::ReadoutShape},
    upscale::Origin,
};
use std::{ops::Range, path::Path};

/// Tokens that are compared.
const TOKENS: usize = 16;
/// Elements moved at a time.
const CHUNK: usize = 1 << 20;
/// Rows of the readout computed at a time.
const CLASSES: usize = 1 << 12;

/// How far two models are apart.
#[derive(Clone, Copy, Debug)]
pub struct Difference {
    /// Largest |difference| of a logit.
    pub largest: f64,
    /// Largest |logit| of the foreign side.
    pub scale: f64,
    /// Allowed part of the largest: f32 holds what is folded to 1e-7, 16 bits to 1e-2.
    tolerance: f64,
}

/// Compares a checkpoint with a Hugging Face folder or a file of llm.c. What was just written or read whole is not
/// checked by its checksums again.
pub fn compare(checkpoint: &Path, foreign: &Path) -> Result<Difference> {
    let origin = Origin::open_to_stream(checkpoint)?;
    let spec = decoder(&origin)?;
    let tokens: Vec<i32> = (0..TOKENS.min(spec.context)).map(|i| (i * 7919 % spec.vocab) as i32).collect();
    let plain = if foreign.is_dir() { Plain::open(foreign)? } else { Plain::of_llmc(foreign)? };
    let theirs = plain.logits(&tokens)?.concat();
    let ours = logits(&origin, &tokens)?;
    let largest = |values: &mut dyn Iterator<Item = f64>| {
        values.fold(0.0, |m: f64, x| if x.is_nan() { x } else { m.max(x.abs()) })
    };
    let scale = largest(&mut theirs.iter().copied());
    let tolerance = if plain.is_short()? || origin.dtype()?.size() == 2 { 0.05 } else { 1e-5 };
    Ok(Difference { largest: largest(&mut ours.iter().zip(&theirs).map(|(a, b)| a - b)), scale, tolerance })
}

/// Logits of every position, positions × vocabulary.
pub fn logits(origin: &Origin, tokens: &[i32]) -> Result<Vec<f64>> {
    let backend = Cpu::<f64>::new(0)?;
    let (spec, scaling, length) = (decoder(origin)?, &origin.meaning.scaling, tokens.len());
    let mut one = DecoderSpec { layers: 1, vocab: length, context: length, tied: true, ..spec.clone() };
    let width = spec.dims.get(Width::Residual);
    let mut host = backend.host(CHUNK * DType::F64.size())?;
    let mut arena = Tensor::new(&backend, DType::F64, decoder::table(&one).0.arena)?;
    let (mut stream, mut end) = (Vec::new(), Vec::new());
    for l in 0..spec.layers {
        let model = Decoder::new(&backend, &one, scaling)?;
        for (i, row) in model.table.rows.iter().enumerate() {
            let first = model.table.values(i).start;
            let name = row.name.replacen("blocks.0.", &format!("blocks.{l}."), 1);
            let mut put = |name: &str, from: Range<usize>, to: usize| -> Result<()> {
                for start in from.clone().step_by(CHUNK) {
                    let part = start..(start + CHUNK).min(from.end);
                    let bytes = origin.reader.read(name, part.clone())?;
                    let at = first + to + start - from.start;
                    let target = arena.slice_mut(at..at + part.len());
                    upload(&backend, &mut host, &bytes, origin.reader.tensor(name)?.dtype, target)?;
                }
                origin.reader.release(name)
            };
            match (name.as_str(), l) {
                ("embedding.weight", 0) => {
                    for (r, &token) in tokens.iter().enumerate() {
                        put(&name, token as usize * width..(token as usize + 1) * width, r * width)?;
                    }
                }
                ("embedding.weight", _) => {
                    let target = arena.slice_mut(first..first + row.len());
                    upload(&backend, &mut host, bytemuck::cast_slice(&stream), DType::F64, target)?;
                }
                ("positions.weight", 1..) => {
                    let (zeros, target) = (vec![0.0f64; row.len()], arena.slice_mut(first..first + row.len()));
                    upload(&backend, &mut host, bytemuck::cast_slice(&zeros), DType::F64, target)?;
                }
                _ => put(&name, 0..row.len(), 0)?,
            }
        }
        (stream, end) = forward(&backend, &model, &arena, length)?;
        one.alphas = Alphas { embedding: 1.0, ..spec.alphas };
    }
    let readout = if spec.tied { "embedding.weight" } else { "readout.weight" };
    readout_logits(&backend, origin, readout, &end, (length, width, spec.vocab), spec.readout_scale(scaling))
}

/// The residual stream behind the block, and its norm, rows × residual.
fn forward(
    backend: &Cpu<f64>,
    model: &Decoder<Cpu<f64>>,
    arena: &Tensor<Cpu<f64>>,
    length: usize,
) -> Result<(Vec<f64>, Vec<f64>)> {
    let micro = MicroBatch { samples: 1, length };
    let mut plan = Plan::default();
    let slots = model.plan(backend, &mut plan, micro, None);
    let mut acts = Activations::new(slots, &mut plan.commit(backend)?);
    let rows: Vec<i32> = (0..length as i32).collect();
    let tokens = |backend| Tensor::from_bytes(backend, DType::I32, bytemuck::cast_slice(&rows));
    let batch = Batch { inputs: tokens(backend)?, targets: tokens(backend)?, first_key: None };
    let weights = Weights::new(&model.table, arena.view());
    let (stream, end) = model.hidden(backend, weights, &mut acts, &batch, micro);
    Ok((download(backend, stream)?, download(backend, end)?))
}

/// The readout, some classes at a time.
fn readout_logits(
    backend: &Cpu<f64>,
    origin: &Origin,
    name: &str,
    x: &[f64],
    (rows, width, vocab): (usize, usize, usize),
    scale: f64,
) -> Result<Vec<f64>> {
    let x = Tensor::from_bytes(backend, DType::F64, bytemuck::cast_slice(x))?;
    let stored = origin.reader.tensor(name)?.dtype;
    let mut all = vec![0.0; rows * vocab];
    for start in (0..vocab).step_by(CLASSES) {
        let classes = CLASSES.min(vocab - start);
        let values =
            crate::layout::floats(&origin.reader.read(name, start * width..(start + classes) * width)?, stored);
        let weight = Tensor::from_bytes(backend, DType::F64, bytemuck::cast_slice(&values))?;
        let mut part = Tensor::new(backend, DType::F64, rows * classes)?;
        let shape = ReadoutShape { rows, width, classes, padded: classes, scale };
        backend.logits(part.view_mut(), x.view(), weight.view(), None, shape);
        for (row, part) in all.chunks_exact_mut(vocab).zip(download(backend, part.view())?.chunks_exact(classes)) {
            row[start..start + classes].copy_from_slice(part);
        }
    }
    Ok(all)
}

fn upload(
    backend: &Cpu<f64>,
    host: &mut <Cpu<f64> as Backend>::Host,
    bytes: &[u8],
    from: DType,
    mut target: Mut<'_, Cpu<f64>>,
) -> Result<()> {
    let step = CHUNK * from.size();
    for (i, part) in bytes.chunks(step).enumerate() {
        let count = part.len() / from.size();
        let size = count * DType::F64.size();
        mupscale::dtype::convert(part, from, &mut host.bytes_mut()[..size], DType::F64);
        backend.upload(Stream::Compute, host, 0..size, target.reborrow().slice(i * CHUNK..i * CHUNK + count));
        backend.synchronize(&backend.record(Stream::Compute))?;
    }
    Ok(())
}

fn download(backend: &Cpu<f64>, from: Ref<'_, Cpu<f64>>) -> Result<Vec<f64>> {
    let size = from.len() * DType::F64.size();
    let mut values = vec![0.0f64; from.len()];
    let mut host = backend.host(size)?;
    backend.download(Stream::Compute, from, &mut host, 0);
    backend.synchronize(&backend.record(Stream::Compute))?;
    bytemuck::cast_slice_mut(&mut values).copy_from_slice(&host.bytes()[..size]);
    Ok(values)
}

impl Difference {
    /// Refuses a difference over what rounding explains; NaN too.
    pub fn check(self, path: &Path) -> Result<()> {
        let Self { largest, scale, tolerance } = self;
        if largest <= tolerance * scale {
            return Ok(());
        }
        let why = format!(
            "its logits differ by {largest:e} from the other side's, the largest of which is {scale:e}: do not use it, \
             and report this"
        );
        Err(Error::file(path, why))
    }
}
