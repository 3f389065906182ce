//! The readout on the CPU.
//!
//! Logits are taken in chunks of tokens. A chunk goes through two rounds of tasks. The first takes a few tokens each,
//! whose logits stay in the cache of a core: logits, their maxima, exponentials e and sums S, the loss, and dx. The
//! second takes a block of classes each, and adds the chunk to their rows of dweight, in the order of chunks. How much
//! a task takes depends on the shape alone.
//!
//! Probabilities are never formed. With c the factor on a token's loss, its dlogits are (e − S·onehot) · c/S, so S is
//! subtracted at the target, and the factor goes into dx after its product and into x before that of dweight.

use super::{Head, ReadoutGradients, ReadoutShape};
use crate::backend::{
    Mut, Ref,
    cpu::{
        Cpu, Real,
        gemm::{gemm, gemm_on},
        math::{max, simd, sum},
        parallel::RowsMut,
    },
};
use std::ops::Range;

/// Logits of a task of the first round: what the cache of a core holds beside the weights that stream through it.
const TASK_LOGITS: usize = 1 << 18;
/// Tasks of the first round in a chunk.
const CHUNK_TASKS: usize = 8;
/// Classes of a task of the second round.
const CLASS_BLOCK: usize = 512;
/// Elements whose exponentials are summed in the compute type; such sums are added in f64.
const SUM_BLOCK: usize = 1024;

/// How scratch is divided. A row of it belongs to a token: logits, then x times the token's factor, then the factor.
/// The tail also keeps rows from lying a power of two apart, where columns would share few cache lines.
#[derive(Clone, Copy)]
struct Chunks {
    /// Tokens of a task.
    task: usize,
    /// Tokens of a chunk.
    chunk: usize,
    /// Elements of a row.
    stride: usize,
}

impl Chunks {
    fn new(shape: ReadoutShape) -> Self {
        let task = (TASK_LOGITS / shape.padded).clamp(8, 64) / 8 * 8;
        let chunk = (task * CHUNK_TASKS).min(shape.rows);
        Self { task, chunk, stride: shape.padded + shape.width + 16 }
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
    stride: usize,
}

impl<F: Real> Head for Cpu<F> {
    fn cross_entropy_scratch(&self, shape: ReadoutShape) -> usize {
        let chunks = Chunks::new(shape);
        chunks.chunk * chunks.stride
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
        let Chunks { task, chunk, stride } = Chunks::new(shape);
        let readout = Readout {
            x: &x.as_slice()[..shape.rows * width],
            weight: &weight.as_slice()[..padded * width],
            bias: bias.map(|b| &b.as_slice()[..padded]),
            targets: targets.as_slice(),
            shape,
            loss_scale: gradients.as_ref().map_or(0.0, |g| g.scale),
            stride,
        };
        let scratch = scratch.into_slice::<F>();
        let losses = losses.into_slice::<F>();
        let mut gradients =
            gradients.map(|g| (g.dx.into_slice::<F>(), g.dweight.into_slice::<F>(), g.dbias.map(Mut::into_slice::<F>)));
        for (start, losses) in (0..shape.rows).step_by(chunk).zip(losses.chunks_mut(chunk)) {
            let tokens = losses.len();
            let scratch = &mut scratch[..tokens * stride];
            let (rows, losses) = (RowsMut::new(scratch, stride), RowsMut::new(losses, 1));
            let Some((dx, dweight, dbias)) = &mut gradients else {
                self.pool().for_rows((rows, losses), task, |range, (rows, losses)| {
                    readout.losses(start + range.start, rows, losses);
                });
                continue;
            };
            let dx = RowsMut::new(&mut dx[start * width..][..tokens * width], width);
            self.pool().for_rows((rows, losses, dx), task, |range, (rows, losses, dx)| {
                readout.losses(start + range.start, rows, losses);
                readout.input_gradient(rows, dx);
            });
            let add = if start == 0 { F::ZERO } else { F::ONE };
            self.pool().for_rows(RowsMut::new(dweight, width), CLASS_BLOCK, |classes, dweight| {
                readout.weight_gradient(classes, scratch, add, dweight);
            });
            if let Some(dbias) = dbias {
                self.pool().for_rows(RowsMut::new(dbias, 1), CLASS_BLOCK, |classes, dbias| {
                    readout.bias_gradient(classes, scratch, add, dbias);
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
                row.iter_mut().zip(bias).for_each(|(z, &b)| *z = *z + b);
            }
        }
    }
}

impl<F: Real> Readout<'_, F> {
    /// Losses of the tokens from `first` on. Leaves in their rows e − S·onehot, x · loss_scale·scale/S, and
    /// loss_scale/S; all zero for ignored tokens.
    fn losses(&self, first: usize, rows: &mut [F], losses: &mut [F]) {
        let ReadoutShape { width, classes, padded, scale, .. } = self.shape;
        let x = &self.x[first * width..][..losses.len() * width];
        let logits = (&mut *rows, (self.stride, 1));
        let size = (losses.len(), classes, width);
        gemm(size, F::from_f64(scale), (x, (width, 1)), (self.weight, (1, width)), F::ZERO, logits);
        for (i, (row, loss)) in rows.chunks_mut(self.stride).zip(losses).enumerate() {
            let Ok(target) = usize::try_from(self.targets[first + i]) else {
                row.fill(F::ZERO);
                *loss = F::ZERO;
                continue;
            };
            let (logits, tail) = row.split_at_mut(padded);
            let logits = &mut logits[..classes];
            let at_target = logits[target] + self.bias.map_or(F::ZERO, |b| b[target]);
            let (max, sum) = simd(
                #[inline(always)]
                || exponentials(logits, self.bias),
            );
            *loss = F::from_f64(sum.ln() + max.to_f64() - at_target.to_f64());
            logits[target] = F::from_f64(logits[target].to_f64() - sum);
            let factor = self.loss_scale / sum;
            let by_input = F::from_f64(factor * scale);
            for (scaled, &x) in tail.iter_mut().zip(&x[i * width..][..width]) {
                *scaled = x * by_input;
            }
            tail[width] = F::from_f64(factor);
        }
    }

    /// dx of a task's tokens, from what [`Self::losses`] left.
    fn input_gradient(&self, rows: &[F], dx: &mut [F]) {
        let ReadoutShape { width, classes, padded, scale, .. } = self.shape;
        let (by_class, by_input) = ((self.stride, 1), (width, 1));
        let size = (dx.len() / width, width, classes);
        gemm(size, F::ONE, (rows, by_class), (self.weight, by_input), F::ZERO, (&mut *dx, by_input));
        for (dx, row) in dx.chunks_mut(width).zip(rows.chunks(self.stride)) {
            let factor = row[padded + width] * F::from_f64(scale);
            for dx in dx {
                *dx = *dx * factor;
            }
        }
    }

    /// Adds to `add` times what is there the dweight of some classes from a chunk of tokens.
    fn weight_gradient(&self, classes: Range<usize>, rows: &[F], add: F, dweight: &mut [F]) {
        let ReadoutShape { width, padded, .. } = self.shape;
        let real = classes.len().min(self.shape.classes.saturating_sub(classes.start));
        let (dweight, padding) = dweight.split_at_mut(real * width);
        let size = (real, width, rows.len() / self.stride);
        let (e, x) = ((&rows[classes.start..], (1, self.stride)), (&rows[padded..], (self.stride, 1)));
        gemm(size, F::ONE, e, x, add, (dweight, (width, 1)));
        padding.fill(F::ZERO);
    }

    /// The same for dbias, token after token.
    fn bias_gradient(&self, classes: Range<usize>, rows: &[F], add: F, dbias: &mut [F]) {
        let real = classes.len().min(self.shape.classes.saturating_sub(classes.start));
        dbias[real..].fill(F::ZERO);
        let dbias = &mut dbias[..real];
        if add == F::ZERO {
            dbias.fill(F::ZERO);
        }
        for row in rows.chunks(self.stride) {
            let factor = row[self.shape.padded + self.shape.width];
            for (dbias, &e) in dbias.iter_mut().zip(&row[classes.start..]) {
                *dbias = *dbias + e * factor;
            }
        }
    }
}

/// Adds the bias, subtracts the maximum, takes exponentials, in place; returns the maximum and the sum.
#[inline(always)]
fn exponentials<F: Real>(logits: &mut [F], bias: Option<&[F]>) -> (F, f64) {
    if let Some(bias) = bias {
        for (z, &b) in logits.iter_mut().zip(bias) {
            *z = *z + b;
        }
    }
    let max = max(logits);
    let mut total = 0.0;
    for block in logits.chunks_mut(SUM_BLOCK) {
        for z in &mut *block {
            *z = Real::exp(*z - max);
        }
        total += sum(block).to_f64();
    }
    (max, total)
}
