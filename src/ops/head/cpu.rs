//! The readout on the CPU.
//!
//! Logits are taken in chunks of tokens. A chunk goes through two rounds of tasks. The first takes a few tokens each,
//! whose logits stay in the cache of a core: logits, their maxima, exponentials e and sums S, the loss, and dx. The
//! second takes a block of classes each, and adds the chunk to their rows of dweight, in the order of chunks. How much
//! a task takes depends on the shape alone.
//!
//! A task's logits are kept transposed, classes × tokens. The weights, which stream through the cache, are then read as
//! they lie by every product, and maxima, exponentials and sums go down the columns, a vector of tokens at a time.
//!
//! Probabilities are never formed. With c the factor on a token's loss, its dlogits are (e − S·onehot) · c/S, so S is
//! subtracted at the target, and the factor goes into dx after its product and into x before that of dweight.

use super::{Head, ReadoutGradients, ReadoutShape};
use crate::{
    backend::{
        Mut, Ref,
        cpu::{
            Cpu, Real,
            gemm::{gemm, gemm_on},
            parallel::{RowsMut, scratch as scratch_of_thread},
        },
    },
    ops::softmax::numerators,
};
use std::ops::Range;

/// Logits of a task of the first round: what the cache of a core holds.
const TASK_LOGITS: usize = 1 << 19;
/// Tokens of a task, at the most.
const TASK_TOKENS: usize = 64;
/// Tasks of the first round in a chunk.
const CHUNK_TASKS: usize = 8;
/// Classes of a task of the second round.
const CLASS_BLOCK: usize = 512;

/// How tokens are divided.
#[derive(Clone, Copy)]
struct Chunks {
    /// Tokens of a task.
    task: usize,
    /// Elements of scratch of a task.
    memory: usize,
    /// Tokens of a chunk.
    chunk: usize,
}

impl Chunks {
    fn new(shape: ReadoutShape) -> Self {
        let task = (TASK_LOGITS / shape.padded).clamp(8, TASK_TOKENS) / 8 * 8;
        Self { task, memory: task * (shape.padded + shape.width + 1), chunk: task * CHUNK_TASKS }
    }
}

/// Scratch of a task.
struct Memory<'a, F> {
    /// Logits, then e − S·onehot; classes × tokens.
    e: &'a mut [F],
    /// x times the token's factor; tokens × width.
    scaled: &'a mut [F],
    /// The factor of a token.
    factors: &'a mut [F],
}

impl<'a, F> Memory<'a, F> {
    fn new(memory: &'a mut [F], tokens: usize, shape: ReadoutShape) -> Self {
        let (e, rest) = memory.split_at_mut(tokens * shape.padded);
        let (scaled, rest) = rest.split_at_mut(tokens * shape.width);
        Self { e: &mut e[..tokens * shape.classes], scaled, factors: &mut rest[..tokens] }
    }
}

/// What the tasks read.
#[derive(Clone, Copy)]
struct Readout<'a, F> {
    x: &'a [F],
    weight: &'a [F],
    bias: Option<&'a [F]>,
    targets: &'a [i32],
    shape: ReadoutShape,
    /// Factor on the loss of a token.
    loss_scale: f64,
}

impl<F: Real> Head for Cpu<F> {
    fn cross_entropy_scratch(&self, shape: ReadoutShape) -> usize {
        let chunks = Chunks::new(shape);
        chunks.memory * shape.rows.div_ceil(chunks.task).min(CHUNK_TASKS)
    }

    fn cross_entropy(
        &self,
        losses: Mut<'_, Self>,
        gradients: Option<ReadoutGradients<'_, Self>>,
        scratch: Mut<'_, Self>,
        x: Ref<'_, Self>,
        weight: Ref<'_, Self>,
        bias: Option<Ref<'_, Self>>,
        targets: Ref<'_, Self>,
        shape: ReadoutShape,
    ) {
        let (width, padded) = (shape.width, shape.padded);
        let Chunks { task, memory, chunk } = Chunks::new(shape);
        let readout = Readout {
            x: &x.as_slice()[..shape.rows * width],
            weight: &weight.as_slice()[..padded * width],
            bias: bias.map(|b| &b.as_slice()[..padded]),
            targets: targets.as_slice(),
            shape,
            loss_scale: gradients.as_ref().map_or(0.0, |g| g.scale),
        };
        let scratch = scratch.into_slice::<F>();
        let losses = losses.into_slice::<F>();
        let mut gradients =
            gradients.map(|g| (g.dx.into_slice::<F>(), g.dweight.into_slice::<F>(), g.dbias.map(Mut::into_slice::<F>)));
        for (start, losses) in (0..shape.rows).step_by(chunk).zip(losses.chunks_mut(chunk)) {
            let tokens = losses.len();
            let scratch = &mut scratch[..tokens.div_ceil(task) * memory];
            let (memories, losses) = (RowsMut::new(scratch, memory), RowsMut::blocks(losses, task));
            let Some((dx, dweight, dbias)) = &mut gradients else {
                self.pool().for_rows((memories, losses), 1, |i, (memory, losses)| {
                    let memory = &mut Memory::new(memory, losses.len(), shape);
                    readout.losses(start + i.start * task, memory, losses);
                });
                continue;
            };
            let dx = RowsMut::blocks(&mut dx[start * width..][..tokens * width], task * width);
            self.pool().for_rows((memories, losses, dx), 1, |i, (memory, losses, dx)| {
                let memory = &mut Memory::new(memory, losses.len(), shape);
                readout.losses(start + i.start * task, memory, losses);
                readout.input_gradient(memory, dx);
            });
            let add = if start == 0 { F::ZERO } else { F::ONE };
            let tasks = |i: usize| task.min(tokens - i * task);
            self.pool().for_rows(RowsMut::new(dweight, width), CLASS_BLOCK, |classes, dweight| {
                for (i, memory) in scratch.chunks(memory).enumerate() {
                    let add = if i == 0 { add } else { F::ONE };
                    readout.weight_gradient(classes.clone(), memory, tasks(i), add, dweight);
                }
            });
            if let Some(dbias) = dbias {
                self.pool().for_rows(RowsMut::new(dbias, 1), CLASS_BLOCK, |classes, dbias| {
                    if start == 0 {
                        dbias.fill(F::ZERO);
                    }
                    for (i, memory) in scratch.chunks(memory).enumerate() {
                        readout.bias_gradient(classes.clone(), memory, tasks(i), dbias);
                    }
                });
            }
        }
    }

    fn logits(
        &self,
        logits: Mut<'_, Self>,
        x: Ref<'_, Self>,
        weight: Ref<'_, Self>,
        bias: Option<Ref<'_, Self>>,
        shape: ReadoutShape,
    ) {
        let ReadoutShape { width, classes, scale, .. } = shape;
        let (x, weight) = (x.as_slice::<F>(), weight.as_slice::<F>());
        let logits = logits.into_slice::<F>();
        let size = (shape.rows, classes, width);
        let product = (&mut *logits, (classes, 1));
        let (x, weight) = ((x, (width, 1)), (weight, (1, width)));
        gemm_on(self.pool(), size, F::from_f64(scale), x, weight, F::ZERO, product);
        if let Some(bias) = bias.map(Ref::as_slice::<F>) {
            for row in logits.chunks_mut(classes) {
                row.iter_mut().zip(bias).for_each(|(z, &b)| *z += b);
            }
        }
    }
}

impl<F: Real> Readout<'_, F> {
    /// Losses of the tokens from `first` on. Leaves in memory e − S·onehot, x · loss_scale·scale/S, and loss_scale/S; all
    /// zero for ignored tokens.
    fn losses(&self, first: usize, memory: &mut Memory<F>, losses: &mut [F]) {
        let ReadoutShape { width, classes, scale, .. } = self.shape;
        let tokens = losses.len();
        let x = &self.x[first * width..][..tokens * width];
        let targets = &self.targets[first..][..tokens];
        let Memory { e, scaled, factors } = memory;
        let by_class = (&mut **e, (tokens, 1));
        gemm(
            (classes, tokens, width),
            F::from_f64(scale),
            (self.weight, (width, 1)),
            (x, (1, width)),
            F::ZERO,
            by_class,
        );
        if let Some(bias) = self.bias {
            for (row, &b) in e.chunks_exact_mut(tokens).zip(bias) {
                row.iter_mut().for_each(|z| *z += b);
            }
        }
        let target = |i: usize| usize::try_from(targets[i]).ok();
        // Until the sums are there: the logits at the targets.
        for (i, loss) in losses.iter_mut().enumerate() {
            *loss = target(i).map_or(F::ZERO, |target| e[target * tokens + i]);
        }
        let (mut max, mut total) = ([F::ZERO; TASK_TOKENS], [0.0; TASK_TOKENS]);
        let (max, total) = (&mut max[..tokens], &mut total[..tokens]);
        numerators(e, max, total);
        for i in 0..tokens {
            let (row, x) = (&mut scaled[i * width..][..width], &x[i * width..][..width]);
            let Some(target) = target(i) else {
                e.iter_mut().skip(i).step_by(tokens).for_each(|e| *e = F::ZERO);
                row.fill(F::ZERO);
                (losses[i], factors[i]) = (F::ZERO, F::ZERO);
                continue;
            };
            losses[i] = F::from_f64(total[i].ln() + max[i].to_f64() - losses[i].to_f64());
            let at_target = &mut e[target * tokens + i];
            *at_target = F::from_f64(at_target.to_f64() - total[i]);
            let factor = self.loss_scale / total[i];
            let by_input = F::from_f64(factor * scale);
            row.iter_mut().zip(x).for_each(|(scaled, &x)| *scaled = x * by_input);
            factors[i] = F::from_f64(factor);
        }
    }

    /// dx of a task's tokens, from what [`Self::losses`] left.
    fn input_gradient(&self, memory: &Memory<F>, dx: &mut [F]) {
        let ReadoutShape { width, classes, scale, .. } = self.shape;
        let tokens = memory.factors.len();
        scratch_of_thread(width * tokens, |transposed: &mut [F]| {
            let (weight, e) = ((self.weight, (1, width)), (&*memory.e, (tokens, 1)));
            gemm((width, tokens, classes), F::ONE, weight, e, F::ZERO, (&mut *transposed, (tokens, 1)));
            for (i, (dx, &factor)) in dx.chunks_exact_mut(width).zip(&*memory.factors).enumerate() {
                let factor = factor * F::from_f64(scale);
                for (dx, column) in dx.iter_mut().zip(transposed.chunks_exact(tokens)) {
                    *dx = column[i] * factor;
                }
            }
        });
    }

    /// Adds to `add` times what is there the dweight of some classes from a task's tokens.
    fn weight_gradient(&self, classes: Range<usize>, memory: &[F], tokens: usize, add: F, dweight: &mut [F]) {
        let ReadoutShape { width, padded, .. } = self.shape;
        let real = self.real(&classes);
        let (dweight, padding) = dweight.split_at_mut(real * width);
        let e = (&memory[classes.start * tokens..padded * tokens], (tokens, 1));
        let x = (&memory[padded * tokens..], (width, 1));
        gemm((real, width, tokens), F::ONE, e, x, add, (dweight, (width, 1)));
        padding.fill(F::ZERO);
    }

    /// The same for dbias, which holds what to add to.
    fn bias_gradient(&self, classes: Range<usize>, memory: &[F], tokens: usize, dbias: &mut [F]) {
        let ReadoutShape { width, padded, .. } = self.shape;
        let factors = &memory[(padded + width) * tokens..][..tokens];
        let e = memory[classes.start * tokens..].chunks_exact(tokens);
        let real = self.real(&classes);
        for (dbias, e) in dbias[..real].iter_mut().zip(e) {
            *dbias = e.iter().zip(factors).fold(*dbias, |sum, (&e, &factor)| sum + e * factor);
        }
    }

    /// How many of these classes are no padding.
    fn real(&self, classes: &Range<usize>) -> usize {
        classes.len().min(self.shape.classes.saturating_sub(classes.start))
    }
}
