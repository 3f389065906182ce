//! Every op's time at the sizes of a preset, with the bytes that it has to move and the arithmetic that it has to do,
//! beside what the same device reached in the same run on a plain copy and on a large matrix product.

use super::{Preset, median};
use crate::{
    DType, Error, Result,
    backend::{Stream, Tensor},
    model::{self, param::Table},
    ops::{
        Ops,
        activation::Activation,
        attention::{AttentionShape, HeadShape, Strided},
        embedding::EmbeddingShape,
        expand::{Noise, Source},
        head::{ReadoutGradients, ReadoutShape},
        linear::LinearShape,
        norm::{NormKind, NormShape, Residual},
        optimizer::{Arenas, Method},
        pieces::{self, Pieces},
        rotary::Rotation,
        scalars::{SCALAR_BYTES, SCALARS, Scalar, set},
    },
    rng,
    run::{Place, Work},
    state::Meaning,
    trainer::micro_batch,
};
use std::time::Instant;

/// Calls of an op between two looks at the clock.
const CALLS: usize = 10;

/// What to measure.
#[derive(Clone, Debug)]
pub struct OpsBench {
    /// Whose sizes.
    pub preset: Preset,
    /// Sequences of a micro-batch; 0: the preset's own.
    pub batch: usize,
    /// Only ops whose name contains this.
    pub only: String,
}

/// An op's speed.
#[derive(Clone, Debug, serde::Serialize)]
pub struct OpSpeed {
    /// The op.
    pub name: String,
    /// Median milliseconds of a call.
    pub ms: f64,
    /// Bytes that must be read and written at the least, in 10⁹ a second.
    pub gb_per_second: f64,
    /// Floating-point operations that must be done, in 10¹² a second; 0 where they do not count.
    pub tflops: f64,
    /// The larger of both as a share of what the copy and the product of this run reached.
    pub share: f64,
}

/// All of them.
#[derive(Clone, Debug, serde::Serialize)]
pub struct OpsSpeed {
    /// The device in words.
    pub device: String,
    /// Bytes read and written by a plain copy, in 10⁹ a second.
    pub copy_gb_per_second: f64,
    /// A large product of the compute type.
    pub product_tflops: f64,
    /// The ops.
    pub ops: Vec<OpSpeed>,
}

/// Times the ops on a device.
pub fn ops(place: Place, bench: OpsBench) -> Result<OpsSpeed> {
    place.run(bench)
}

impl Work for OpsBench {
    type Output = OpsSpeed;

    fn on<B: Ops>(self, backend: B) -> Result<OpsSpeed> {
        let (config, meaning) = self.preset.sizes().model(self.batch)?;
        let rows = micro_batch(&config, &meaning.spec).rows();
        let mut clock = Clock { backend: &backend, only: &self.only, measured: Vec::new() };
        let (copy, product) = limits(&mut clock)?;
        let sizes = Sizes::new(self.preset, rows);
        streams(&mut clock, sizes)?;
        products(&mut clock, sizes)?;
        attention(&mut clock, sizes)?;
        readout(&mut clock, sizes)?;
        parameters(&mut clock, &meaning)?;
        let share = |op: &Measured| (op.bytes / op.seconds / copy).max(op.flops / op.seconds / product);
        let speed = |op: &Measured| OpSpeed {
            name: op.name.clone(),
            ms: op.seconds * 1e3,
            gb_per_second: op.bytes / op.seconds / 1e9,
            tflops: op.flops / op.seconds / 1e12,
            share: share(op),
        };
        let ops = clock.measured.iter().map(speed).collect();
        let (device, copy_gb_per_second) = (backend.describe(), copy / 1e9);
        Ok(OpsSpeed { device, copy_gb_per_second, product_tflops: product / 1e12, ops })
    }
}

/// One op, measured.
struct Measured {
    name: String,
    seconds: f64,
    bytes: f64,
    flops: f64,
}

/// Runs ops and keeps their times.
struct Clock<'a, B: Ops> {
    backend: &'a B,
    only: &'a str,
    measured: Vec<Measured>,
}

impl<B: Ops> Clock<'_, B> {
    /// Times an op, which is recorded where the device can, so that launching does not count.
    fn time(&mut self, name: &str, bytes: usize, flops: usize, mut op: impl FnMut(&B)) -> Result<()> {
        if name.contains(self.only) {
            let (seconds, bytes, flops) = (self.seconds(&mut op)?, bytes as f64, flops as f64);
            self.measured.push(Measured { name: name.into(), seconds, bytes, flops });
        }
        Ok(())
    }

    /// Median seconds of a call.
    fn seconds(&self, op: &mut impl FnMut(&B)) -> Result<f64> {
        let mut graph = B::Graph::default();
        let mut times = Vec::new();
        for _ in 0..7 {
            let start = Instant::now();
            if self.backend.begin(&mut graph)? {
                (0..CALLS).for_each(|_| op(self.backend));
                self.backend.end(&mut graph, Ok(()))?;
            }
            self.backend.synchronize(&self.backend.record(Stream::Compute))?;
            times.push(start.elapsed().as_secs_f64() / CALLS as f64);
        }
        Ok(median(times.split_off(2)))
    }

    /// A tensor of normal numbers times 0.02: zeros would run faster than what training computes with.
    fn tensor(&self, dtype: DType, len: usize) -> Result<Tensor<B>> {
        let mut tensor = Tensor::new(self.backend, dtype, len)?;
        let noise = Noise { stream: rng::Stream::new(1, "bench"), amount: 0.02, paired: None };
        self.backend.fill(tensor.view_mut(), 0, 0.0, Some(&noise));
        Ok(tensor)
    }

    fn real(&self, len: usize) -> Result<Tensor<B>> {
        self.tensor(self.backend.compute(), len)
    }

    /// Integers below `below`, as `random` draws them.
    fn tokens(&self, len: usize, below: usize) -> Result<Tensor<B>> {
        let mut draws = rng::Stream::new(2, "bench").rng();
        let tokens: Vec<i32> = (0..len).map(|_| draws.below(below as u64) as i32).collect();
        Tensor::from_bytes(self.backend, DType::I32, bytemuck::cast_slice(&tokens))
    }
}

/// Bytes a second of a copy, and operations a second of a product that is large enough to take a millisecond.
fn limits<B: Ops>(clock: &mut Clock<'_, B>) -> Result<(f64, f64)> {
    const LEN: usize = 1 << 26;
    let (source, mut target) = (clock.tensor(DType::F32, LEN)?, clock.tensor(DType::F32, LEN)?);
    let copy = clock.seconds(&mut |b: &B| b.copy(Stream::Compute, source.view(), target.view_mut()))?;
    let mut side = 1024;
    loop {
        let (x, weight, mut y) = (clock.real(side * side)?, clock.real(side * side)?, clock.real(side * side)?);
        let shape = LinearShape { rows: side, inputs: side, outputs: side };
        let product = clock.seconds(&mut |b: &B| b.linear(y.view_mut(), x.view(), weight.view(), None, shape))?;
        if product > 1e-3 || side == 8192 {
            return Ok((8.0 * LEN as f64 / copy, 2.0 * (side as f64).powi(3) / product));
        }
        side *= 2;
    }
}

/// What the ops' shapes follow from.
#[derive(Clone, Copy)]
struct Sizes {
    rows: usize,
    width: usize,
    ffn: usize,
    heads: HeadShape,
    context: usize,
    vocab: usize,
    gated: bool,
}

impl Sizes {
    fn new(preset: Preset, rows: usize) -> Self {
        let sizes = preset.sizes();
        let (kv_heads, ffn) = sizes.llama.unwrap_or((sizes.heads, 4 * sizes.width));
        let heads = HeadShape { kv_heads, group: sizes.heads / kv_heads, head_dim: sizes.width / sizes.heads };
        let (width, context, vocab) = (sizes.width, sizes.context, sizes.vocab);
        Self { rows, width, ffn, heads, context, vocab, gated: sizes.llama.is_some() }
    }
}

/// What passes over activations.
fn streams<B: Ops>(clock: &mut Clock<'_, B>, sizes: Sizes) -> Result<()> {
    let Sizes { rows, width, ffn, heads, context, vocab, gated } = sizes;
    let size = clock.backend.compute().size();
    let len = rows * width;
    let (x, branch, mut sum, mut y) = (clock.real(len)?, clock.real(len)?, clock.real(len)?, clock.real(len)?);
    let mut statistics = clock.tensor(clock.backend.statistics(), 2 * rows)?;
    let (gain, bias) = (clock.real(width)?, clock.real(width)?);
    let kind = if gated { NormKind::Rms } else { NormKind::Layer };
    let shape = NormShape { rows, width, kind, eps: 1e-5 };
    clock.time("norm with residual", 4 * len * size, 0, |b| {
        let residual = Residual { sum: sum.view_mut(), branch: branch.view(), scale: 1.0 };
        b.norm(y.view_mut(), statistics.view_mut(), x.view(), Some(residual), gain.view(), Some(bias.view()), shape);
    })?;
    let gradient = clock.backend.gradient();
    let (mut dgain, mut dbias) = (clock.tensor(gradient, width)?, clock.tensor(gradient, width)?);
    clock.time("norm backward", 4 * len * size, 0, |b| {
        let (dx, dbias) = (y.view_mut(), Some(dbias.view_mut()));
        let (dgain, statistics) = (dgain.view_mut(), statistics.view());
        b.norm_backward(dx, dgain, dbias, branch.view(), x.view(), statistics, gain.view(), shape, false);
    })?;
    let (before, mut after) = (clock.real(rows * ffn * if gated { 2 } else { 1 })?, clock.real(rows * ffn)?);
    let mut d = clock.real(before.len())?;
    let moved = (before.len() + after.len()) * size;
    let kind = Activation::GeluTanh;
    clock.time("activation", moved, 0, |b| match gated {
        true => b.gate(after.view_mut(), before.view(), ffn),
        false => b.activate(after.view_mut(), before.view(), kind),
    })?;
    clock.time("activation backward", moved + before.len() * size, 0, |b| match gated {
        true => b.gate_backward(d.view_mut(), after.view(), before.view(), ffn),
        false => b.activate_backward(d.view_mut(), before.view(), kind),
    })?;
    let (tokens, weight) = (clock.tokens(rows, vocab)?, clock.real(vocab * width)?);
    let mut dweight = clock.tensor(gradient, vocab * width)?;
    let shape = EmbeddingShape { rows, width, sequence: context, start: 0, scale: 1.0 };
    clock.time("embedding", 2 * len * size, 0, |b| {
        b.embed(y.view_mut(), tokens.view(), weight.view(), None, shape);
    })?;
    let written = vocab * width * gradient.size();
    clock.time("embedding backward", len * size + written, 0, |b| {
        b.embed_backward(dweight.view_mut(), None, x.view(), tokens.view(), shape, false);
    })?;
    if gated {
        let mut qkv = clock.real(rows * heads.row())?;
        let table = clock.tensor(clock.backend.statistics(), context * heads.head_dim)?;
        let turned = rows * (heads.queries() + heads.keys()) * size;
        clock.time("rotary", 2 * turned, 0, |b| {
            let rotation = Rotation { table: table.view(), sequence: context, start: 0 };
            b.rotate(qkv.view_mut(), rotation, heads, false);
        })?;
        let (mut out, gain) = (clock.real(qkv.len())?, clock.real(heads.head_dim)?);
        let (mut dq, mut dk) = (clock.tensor(gradient, gain.len())?, clock.tensor(gradient, gain.len())?);
        let normed = heads.kv_heads * (heads.group + 1);
        let mut statistics = clock.tensor(clock.backend.statistics(), rows * normed)?;
        clock.time("Q/K norm and rotary", 2 * qkv.len() * size, 0, |b| {
            let rotation = Some(Rotation { table: table.view(), sequence: context, start: 0 });
            let (out, statistics) = (out.view_mut(), statistics.view_mut());
            b.head_norm(out, statistics, qkv.view(), gain.view(), gain.view(), rotation, heads, 1e-6);
        })?;
        clock.time("Q/K norm and rotary, backward", 3 * turned, 0, |b| {
            let rotation = Some(Rotation { table: table.view(), sequence: context, start: 0 });
            let (d, dq, dk, statistics) = (out.view_mut(), dq.view_mut(), dk.view_mut(), statistics.view());
            b.head_norm_backward(d, dq, dk, qkv.view(), statistics, gain.view(), gain.view(), rotation, heads);
        })?;
    }
    Ok(())
}

/// A block's linear layers.
fn products<B: Ops>(clock: &mut Clock<'_, B>, sizes: Sizes) -> Result<()> {
    let Sizes { rows, width, ffn, heads, gated, .. } = sizes;
    let up = if gated { 2 * ffn } else { ffn };
    for (name, inputs, outputs) in [("qkv", width, heads.row()), ("up", width, up), ("down", ffn, width)] {
        let shape = LinearShape { rows, inputs, outputs };
        let (x, weight, bias) = (clock.real(rows * inputs)?, clock.real(outputs * inputs)?, clock.real(outputs)?);
        let (mut y, mut dx) = (clock.real(rows * outputs)?, clock.real(rows * inputs)?);
        let gradient = clock.backend.gradient();
        let (mut dweight, mut dbias) = (clock.tensor(gradient, weight.len())?, clock.tensor(gradient, outputs)?);
        let size = clock.backend.compute().size();
        let (bytes, flops) = ((x.len() + weight.len() + y.len()) * size, 2 * rows * inputs * outputs);
        clock.time(&format!("linear {name}"), bytes, flops, |b| {
            b.linear(y.view_mut(), x.view(), weight.view(), Some(bias.view()), shape);
        })?;
        clock.time(&format!("linear {name} backward, input"), bytes, flops, |b| {
            b.linear_backward_input(dx.view_mut(), y.view(), weight.view(), shape);
        })?;
        clock.time(&format!("linear {name} backward, weight and bias"), bytes, flops, |b| {
            b.linear_backward_weight(dweight.view_mut(), Some(dbias.view_mut()), y.view(), x.view(), shape);
        })?;
    }
    if gated { Ok(()) } else { activated_products(clock, sizes) }
}

/// The linear layers of a plain MLP with its activation, forward behind the first and backward behind the second.
fn activated_products<B: Ops>(clock: &mut Clock<'_, B>, Sizes { rows, width, ffn, .. }: Sizes) -> Result<()> {
    let (x, weight, bias) = (clock.real(rows * width)?, clock.real(ffn * width)?, clock.real(ffn)?);
    let (mut before, mut after) = (clock.real(rows * ffn)?, clock.real(rows * ffn)?);
    let (size, flops, kind) = (clock.backend.compute().size(), 2 * rows * width * ffn, Activation::GeluTanh);
    let bytes = (x.len() + weight.len() + 2 * before.len()) * size;
    clock.time("linear up with activation", bytes, flops, |b| {
        let (shape, before) = (LinearShape { rows, inputs: width, outputs: ffn }, before.view_mut());
        b.linear_activate(after.view_mut(), before, x.view(), weight.view(), Some(bias.view()), shape, kind);
    })?;
    clock.time("linear down backward, input with activation", bytes, flops, |b| {
        let (shape, d) = (LinearShape { rows, inputs: ffn, outputs: width }, after.view_mut());
        b.linear_activate_backward(d, x.view(), weight.view(), before.view(), shape, kind);
    })
}

fn attention<B: Ops>(clock: &mut Clock<'_, B>, sizes: Sizes) -> Result<()> {
    let Sizes { rows, heads, context, .. } = sizes;
    let (queries, size) = (heads.kv_heads * heads.group, clock.backend.compute().size());
    let scale = 1.0 / (heads.head_dim as f64).sqrt();
    let shape = AttentionShape { heads, batch: rows / context, queries: context, keys: context, scale };
    let (qkv, mut dqkv) = (clock.real(rows * heads.row())?, clock.real(rows * heads.row())?);
    let (mut out, dout) = (clock.real(rows * heads.queries())?, clock.real(rows * heads.queries())?);
    let mut sums = clock.tensor(clock.backend.statistics(), rows * queries)?;
    // Two products of the lower half of the scores forward, five backward.
    let product = rows * context * heads.queries();
    let moved = (qkv.len() + out.len()) * size;
    clock.time("attention", moved, 2 * product, |b| {
        let part = |from: usize| Strided { view: qkv.slice(from..qkv.len()), stride: heads.row(), rows: context };
        let (q, k, v) = (part(0), part(heads.queries()), part(heads.queries() + heads.keys()));
        b.attention(out.view_mut(), sums.view_mut(), q, k, v, None, shape);
    })?;
    clock.time("attention backward", 2 * moved + dout.len() * size, 5 * product, |b| {
        b.attention_backward(dqkv.view_mut(), dout.view(), out.view(), sums.view(), qkv.view(), None, shape);
    })?;
    // As generation has it: one query of each sequence with all its keys.
    let shape = AttentionShape { queries: 1, ..shape };
    let cached = rows * 2 * heads.keys() * size;
    clock.time("attention, one query", cached, 0, |b| {
        let part = |from: usize| Strided { view: qkv.slice(from..qkv.len()), stride: heads.row(), rows: context };
        let (q, k, v) = (part(0), part(heads.queries()), part(heads.queries() + heads.keys()));
        let out = out.slice_mut(0..shape.batch * heads.queries());
        b.attention(out, sums.slice_mut(0..shape.batch * queries), q, k, v, None, shape);
    })
}

fn readout<B: Ops>(clock: &mut Clock<'_, B>, sizes: Sizes) -> Result<()> {
    let Sizes { rows, width, vocab, .. } = sizes;
    let padded = vocab.next_multiple_of(64);
    let shape = ReadoutShape { rows, width, classes: vocab, padded, scale: 1.0 };
    let (x, weight, mut dx) = (clock.real(rows * width)?, clock.real(padded * width)?, clock.real(rows * width)?);
    let mut dweight = clock.tensor(clock.backend.gradient(), weight.len())?;
    let (targets, mut losses) = (clock.tokens(rows, vocab)?, clock.tensor(clock.backend.statistics(), rows)?);
    let mut scratch = clock.real(clock.backend.cross_entropy_scratch(shape))?;
    let bytes = (x.len() + weight.len()) * clock.backend.compute().size();
    clock.time("readout and loss, with gradients", bytes, 6 * rows * width * padded, |b| {
        let (dx, dweight) = (dx.view_mut(), dweight.view_mut());
        let gradients = Some(ReadoutGradients { dx, dweight, dbias: None, scale: 1.0 / rows as f64 });
        let (losses, scratch) = (losses.view_mut(), scratch.view_mut());
        b.cross_entropy(losses, gradients, scratch, x.view(), weight.view(), None, targets.view(), shape);
    })
}

/// What passes over all parameters.
fn parameters<B: Ops>(clock: &mut Clock<'_, B>, meaning: &Meaning) -> Result<()> {
    let table: Table = model::table(&meaning.spec, &meaning.scaling);
    let (backend, arena) = (clock.backend, table.arena);
    let list = pieces::cut((0..table.rows.len()).map(|row| table.values(row)), 0..arena);
    let pieces = Pieces::new(backend, list, meaning.optimizer.settings(&table, &meaning.scaling))?;
    let (mut weights, gradients) = (clock.real(arena)?, clock.tensor(backend.gradient(), arena)?);
    let mut master = backend.master().map(|dtype| clock.tensor(dtype, arena)).transpose()?;
    let (mut first, mut second) = (clock.tensor(backend.moment(), arena)?, clock.tensor(backend.moment(), arena)?);
    let mut partials = clock.tensor(DType::F64, pieces.list.len())?;
    let mut inputs = vec![0; SCALAR_BYTES];
    for (scalar, value) in [(Scalar::LearningRate, 1e-9), (Scalar::Time, 10.0), (Scalar::Factor, 1.0)] {
        set(&mut inputs, scalar, value);
    }
    let scalars = Tensor::from_bytes(backend, DType::F64, &inputs)?;
    assert_eq!(scalars.len(), SCALARS);
    let count = table.parameters();
    clock.time("gradient norm", count * backend.gradient().size(), 0, |b| {
        b.square_norms(partials.view_mut(), gradients.view(), &pieces);
    })?;
    let updated = master.as_ref().map_or(0, |m| 2 * m.dtype().size()) + backend.compute().size();
    let plain = if master.is_some() { 0 } else { backend.compute().size() };
    let moved = updated + plain + 4 * backend.moment().size() + backend.gradient().size();
    let method = Method::Adam { beta1: 0.9, beta2: 0.95, coupled: false, amsgrad: false };
    clock.time("AdamW", count * moved, 0, |b| {
        let arenas = Arenas {
            weights: weights.view_mut(),
            master: master.as_mut().map(Tensor::view_mut),
            first: Some(first.view_mut()),
            second: Some(second.view_mut()),
            maximum: None,
            gradients: gradients.view(),
        };
        b.update(arenas, partials.view_mut(), scalars.view(), &pieces, method);
    })?;
    clock.time("cast", count * (backend.gradient().size() + backend.compute().size()), 0, |b| {
        b.accumulate(weights.view_mut(), gradients.view(), false);
    })?;
    expansion(clock)
}

/// Widening a matrix of 2,048 × 512 four times each way, with noise.
fn expansion<B: Ops>(clock: &mut Clock<'_, B>) -> Result<()> {
    const TIMES: usize = 4;
    let (rows, columns) = (2048, 512);
    let source = clock.tensor(DType::F32, rows * columns)?;
    let mut target = clock.tensor(DType::F32, source.len() * TIMES * TIMES)?;
    let map = |len: usize| -> Result<Tensor<B>> {
        let map: Vec<u32> = (0..len * TIMES).map(|i| (i / TIMES) as u32).collect();
        Tensor::from_bytes(clock.backend, DType::U32, bytemuck::cast_slice(&map))
    };
    let (rows_map, columns_map) = (map(rows)?, map(columns)?);
    let noise = Noise { stream: rng::Stream::new(1, "wide"), amount: 0.01, paired: None };
    for (name, noise) in [("expansion", None), ("expansion with noise", Some(&noise))] {
        clock.time(name, (source.len() + target.len()) * 4, 0, |b| {
            let source = Source {
                values: source.view(),
                columns,
                rows_map: rows_map.view(),
                columns_map: columns_map.view(),
                scale: 0.25,
            };
            b.expand(target.view_mut(), 0, columns * TIMES, source, noise);
        })?;
    }
    match clock.measured.is_empty() {
        true => Err(Error::config("--only", clock.only, "no op's name contains this")),
        false => Ok(()),
    }
}
