//! Norms on the CPU.

use super::{Norm, NormKind, NormShape, Residual};
use crate::backend::{
    Mut, Ref,
    cpu::{
        Cpu, Real,
        math::{dot, sum, vectorize},
        parallel::{RowsMut, scratch},
    },
};

/// Rows of a task, and of a partial sum of gain and bias gradients.
pub(super) const BLOCK: usize = 64;

/// Elements of a task of an elementwise op.
pub(super) const TASK: usize = 1 << 14;

impl<F: Real> Norm for Cpu<F> {
    fn norm(
        &self,
        y: Mut<'_, Self>,
        statistics: Mut<'_, Self>,
        x: Ref<'_, Self>,
        residual: Option<Residual<'_, Self>>,
        gain: Ref<'_, Self>,
        bias: Option<Ref<'_, Self>>,
        shape: NormShape,
    ) {
        let len = shape.rows * shape.width;
        assert!(y.len() == len && x.len() == len && statistics.len() == 2 * shape.rows && gain.len() == shape.width);
        let (x, gain, bias) = (x.as_slice::<F>(), gain.as_slice::<F>(), bias.map(|b| b.as_slice::<F>()));
        let y = RowsMut::blocks(y.into_slice::<F>(), BLOCK * shape.width);
        let statistics = RowsMut::blocks(statistics.into_slice::<F>(), BLOCK * 2);
        let Some(Residual { sum, branch, scale }) = residual else {
            self.pool().for_rows((y, statistics), 1, |block, (y, statistics)| {
                let x = &x[block.start * BLOCK * shape.width..][..y.len()];
                vectorize!(normalize(y, statistics, x, gain, bias, shape));
            });
            return;
        };
        assert!(sum.len() == len && branch.len() == len);
        let (branch, scale) = (branch.as_slice::<F>(), F::from_f64(scale));
        let sum = RowsMut::blocks(sum.into_slice::<F>(), BLOCK * shape.width);
        self.pool().for_rows((y, statistics, sum), 1, |block, (y, statistics, sum)| {
            let start = block.start * BLOCK * shape.width;
            let (x, branch) = (&x[start..][..y.len()], &branch[start..][..y.len()]);
            vectorize!({
                add_scaled(sum, x, branch, scale);
                normalize(y, statistics, sum, gain, bias, shape);
            });
        });
    }

    fn norm_backward(
        &self,
        dx: Mut<'_, Self>,
        dgain: Mut<'_, Self>,
        dbias: Option<Mut<'_, Self>>,
        dy: Ref<'_, Self>,
        x: Ref<'_, Self>,
        statistics: Ref<'_, Self>,
        gain: Ref<'_, Self>,
        shape: NormShape,
        overwrite: bool,
    ) {
        let NormShape { rows, width, .. } = shape;
        let (dy, x) = (dy.as_slice::<F>(), x.as_slice::<F>());
        let (statistics, gain) = (statistics.as_slice::<F>(), gain.as_slice::<F>());
        assert!(dx.len() == rows * width && dy.len() == rows * width && x.len() == rows * width);
        assert!(statistics.len() == 2 * rows && gain.len() == width && dgain.len() == width);
        scratch(rows.div_ceil(BLOCK) * 2 * width, |partials: &mut [F]| {
            let dx = RowsMut::blocks(dx.into_slice::<F>(), BLOCK * width);
            self.pool().for_rows((dx, RowsMut::new(partials, 2 * width)), 1, |block, (dx, partial)| {
                let first = block.start * BLOCK;
                let inputs = Inputs {
                    dy: &dy[first * width..][..dx.len()],
                    x: &x[first * width..][..dx.len()],
                    statistics: &statistics[first * 2..],
                    gain,
                };
                scratch(2 * width, |rows: &mut [F]| {
                    vectorize!(backward(dx, partial, inputs, rows, shape.kind, overwrite))
                });
            });
            let (gains, biases) = (0..width, width..2 * width);
            add_up(dgain.into_slice(), partials.chunks_exact(2 * width).map(|p| &p[gains.clone()]));
            if let Some(dbias) = dbias {
                add_up(dbias.into_slice(), partials.chunks_exact(2 * width).map(|p| &p[biases.clone()]));
            }
        });
    }

    fn add(&self, target: Mut<'_, Self>, x: Ref<'_, Self>, branch: Ref<'_, Self>, scale: f64) {
        let (x, branch, scale) = (x.as_slice::<F>(), branch.as_slice::<F>(), F::from_f64(scale));
        assert!(target.len() == x.len() && x.len() == branch.len());
        self.pool().for_rows(RowsMut::blocks(target.into_slice::<F>(), TASK), 1, |block, target| {
            let range = block.start * TASK..block.start * TASK + target.len();
            vectorize!(add_scaled(target, &x[range.clone()], &branch[range], scale));
        });
    }

    fn scale(&self, x: Mut<'_, Self>, scale: f64) {
        let scale = F::from_f64(scale);
        self.pool().for_rows(RowsMut::blocks(x.into_slice::<F>(), TASK), 1, |_, x| {
            vectorize!(x.iter_mut().for_each(|x| *x *= scale));
        });
    }
}

#[inline(always)]
fn add_scaled<F: Real>(target: &mut [F], x: &[F], branch: &[F], scale: F) {
    for ((t, &x), &b) in target.iter_mut().zip(x).zip(branch) {
        *t = x + scale * b;
    }
}

/// Normalises rows. The variance is the mean square of centred elements, so that a large mean costs no digits.
#[inline(always)]
fn normalize<F: Real>(y: &mut [F], statistics: &mut [F], x: &[F], gain: &[F], bias: Option<&[F]>, shape: NormShape) {
    let width = shape.width;
    let (count, eps) = (F::from_f64(width as f64), F::from_f64(shape.eps));
    let rows = y.chunks_exact_mut(width).zip(x.chunks_exact(width)).zip(statistics.as_chunks_mut::<2>().0);
    for ((y, x), statistics) in rows {
        let mean = match shape.kind {
            NormKind::Layer => sum(x) / count,
            NormKind::Rms => F::ZERO,
        };
        y.iter_mut().zip(x).for_each(|(y, &x)| *y = x - mean);
        let inverse = F::ONE / (dot(y, y) / count + eps).sqrt();
        *statistics = [mean, inverse];
        match bias {
            Some(bias) => {
                for ((y, &g), &b) in y.iter_mut().zip(gain).zip(bias) {
                    *y = *y * inverse * g + b;
                }
            }
            None => y.iter_mut().zip(gain).for_each(|(y, &g)| *y = *y * inverse * g),
        }
    }
}

/// What a block of rows needs for its gradients.
#[derive(Clone, Copy)]
struct Inputs<'a, F> {
    dy: &'a [F],
    x: &'a [F],
    statistics: &'a [F],
    gain: &'a [F],
}

/// With n the normalised row and g = dy · gain: dx = (g − mean(g) − n · mean(g · n)) / deviation, where RMSNorm lacks
/// the second term; dgain = Σ dy · n, dbias = Σ dy, which go to the halves of `partial`. `row` holds n and g.
#[inline(always)]
fn backward<F: Real>(
    dx: &mut [F],
    partial: &mut [F],
    inputs: Inputs<'_, F>,
    row: &mut [F],
    kind: NormKind,
    overwrite: bool,
) {
    let width = inputs.gain.len();
    let count = F::from_f64(width as f64);
    let (n, g) = row.split_at_mut(width);
    partial.fill(F::ZERO);
    let (dgain, dbias) = partial.split_at_mut(width);
    let rows = dx.chunks_exact_mut(width).zip(inputs.dy.chunks_exact(width)).zip(inputs.x.chunks_exact(width));
    for (((dx, dy), x), &[mean, inverse]) in rows.zip(inputs.statistics.as_chunks::<2>().0) {
        n.iter_mut().zip(x).for_each(|(n, &x)| *n = (x - mean) * inverse);
        g.iter_mut().zip(dy).zip(inputs.gain).for_each(|((g, &dy), &gain)| *g = dy * gain);
        dgain.iter_mut().zip(dy).zip(&*n).for_each(|((s, &dy), &n)| *s += dy * n);
        dbias.iter_mut().zip(dy).for_each(|(s, &dy)| *s += dy);
        let shift = match kind {
            NormKind::Layer => sum(g) / count,
            NormKind::Rms => F::ZERO,
        };
        let slope = dot(g, n) / count;
        if overwrite {
            dx.fill(F::ZERO);
        }
        for ((dx, &g), &n) in dx.iter_mut().zip(&*g).zip(&*n) {
            *dx += inverse * (g - shift - n * slope);
        }
    }
}

/// target = the sum of these rows, added in order.
pub(in crate::ops) fn add_up<'a, F: Real>(target: &mut [F], rows: impl Iterator<Item = &'a [F]>) {
    target.fill(F::ZERO);
    rows.for_each(|row| target.iter_mut().zip(row).for_each(|(t, &r)| *t += r));
}
