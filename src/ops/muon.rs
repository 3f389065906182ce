//! Muon: momentum orthogonalised by Newton–Schulz (Jordan et al., kellerjordan.github.io/posts/muon), for hidden
//! matrices.

mod cuda;

use super::{
    gradient::square_sum,
    optimizer::Step,
    pieces::RowSettings,
    stochastic::{self, Moment, Words},
};
use crate::{
    DType,
    backend::{
        ALIGNMENT, Backend, Mut, Ref,
        cpu::{
            Cpu, Pool, Real,
            gemm::gemm_on,
            math::vectorize,
            parallel::{RowsMut, scratch as scratch_of_thread},
        },
    },
};
use half::bf16;

/// One matrix to update.
pub struct MuonMatrix<'a, B: Backend> {
    /// rows × columns, read by the forward pass.
    pub weight: Mut<'a, B>,
    /// Its master copy, if it is another tensor.
    pub master: Option<Mut<'a, B>>,
    /// First moment, in the type that it is computed in or in bf16 ([`super::stochastic`]).
    pub first: Mut<'a, B>,
    /// Gradient.
    pub gradient: Ref<'a, B>,
    /// Place of its first element in the arena.
    pub offset: usize,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub columns: usize,
    /// Learning-rate factor (shape factor included), decay, epsilon.
    pub settings: RowSettings,
}

/// Elements of scratch that [`Muon::muon`] needs for a matrix, in the compute type: two matrices of its size and two
/// squares of its smaller side.
pub fn scratch(rows: usize, columns: usize) -> usize {
    let small = rows.min(columns);
    2 * on_border(rows * columns) + 2 * on_border(small * small)
}

/// Elements rounded up, so that what follows them starts on a border as a tensor does, whatever its type.
fn on_border(len: usize) -> usize {
    len.next_multiple_of(ALIGNMENT / 2)
}

/// Muon's update.
pub trait Muon: Backend {
    /// m ← 0.95 m + g; u = g + 0.95 m (Nesterov); x = u / (‖u‖_F + eps); five times
    /// x ← a x + (b A + c A²) x with A = x xᵀ and (a, b, c) = (3.4445, −4.7750, 2.0315), on xᵀ when rows > columns;
    /// w ← w − lr·wd·w − lr·x. g is the gradient times Factor. Nothing if Skip is set. partial[0] = Σ of squared
    /// changes.
    fn muon(
        &self,
        matrix: MuonMatrix<'_, Self>,
        partial: Mut<'_, Self>,
        scratch: Mut<'_, Self>,
        scalars: Ref<'_, Self>,
    );
}

/// Elements that one task takes.
const TASK: usize = 1 << 14;
/// Factor on the first moment.
const MOMENTUM: f64 = 0.95;
/// Newton-Schulz steps.
pub(crate) const STEPS: usize = 5;
/// a, b, c of a step.
pub(crate) const QUINTIC: [f64; 3] = [3.4445, -4.7750, 2.0315];

impl<F: Real> Muon for Cpu<F> {
    fn muon(
        &self,
        matrix: MuonMatrix<'_, Self>,
        partial: Mut<'_, Self>,
        scratch: Mut<'_, Self>,
        scalars: Ref<'_, Self>,
    ) {
        assert!(matrix.master.is_none(), "on a CPU the weights are their own master copy");
        let MuonMatrix { weight, first, gradient, offset, rows, columns, settings, .. } = matrix;
        let weight = weight.into_slice::<F>();
        let partial = &mut partial.into_slice::<f64>()[0];
        let Some(step) = Step::read(scalars.as_slice()) else { return *partial = 0.0 };
        let (x, rest) = scratch.into_slice::<F>().split_at_mut(rows * columns);
        let (y, squares) = rest.split_at_mut(x.len());
        match (gradient.dtype() == F::DTYPE, first.dtype() == DType::BF16) {
            (true, false) => add_momentum::<F, F, F>(self.pool(), x, first, gradient, step, offset),
            (true, true) => add_momentum::<F, bf16, F>(self.pool(), x, first, gradient, step, offset),
            (false, false) => add_momentum::<F, F, f64>(self.pool(), x, first, gradient, step, offset),
            (false, true) => add_momentum::<F, bf16, f64>(self.pool(), x, first, gradient, step, offset),
        }
        normalise(self.pool(), x, settings.eps);
        let update = orthogonalise(self.pool(), x, y, squares, rows, columns);
        let rate = step.lr * settings.lr;
        *partial = apply(self.pool(), weight, update, rate, rate * settings.decay);
    }
}

/// m ← 0.95 m + factor · gradient; u = factor · gradient + 0.95 m.
fn add_momentum<F: Real, M: Moment, G: Real>(
    pool: &Pool,
    u: &mut [F],
    first: Mut<'_, Cpu<F>>,
    gradient: Ref<'_, Cpu<F>>,
    step: Step,
    offset: usize,
) {
    let (first, gradient) = (first.into_slice::<M>(), gradient.as_slice::<G>());
    assert_eq!(gradient.len(), u.len());
    let (factor, momentum) = (F::from_f64(step.factor), F::from_f64(MOMENTUM));
    pool.for_rows((RowsMut::new(u, 1), RowsMut::new(first, 1)), TASK, |range, (u, first)| {
        let (mut words, start) = (Words::new(step.time), (offset + range.start) as u64);
        vectorize!({
            for (((u, first), g), element) in u.iter_mut().zip(first).zip(&gradient[range]).zip(start..) {
                let g = factor * F::from_f64(g.to_f64());
                let m = momentum * F::from_f64(first.value()) + g;
                *u = g + momentum * m;
                let bits = if M::RANDOM { stochastic::bits(words.of(element), 0) } else { 0 };
                *first = M::keep(m.to_f64(), bits);
            }
        });
    });
}

/// x ← x / (‖x‖ + eps), Frobenius norm.
fn normalise<F: Real>(pool: &Pool, x: &mut [F], eps: f64) {
    let tasks = x.len().div_ceil(TASK);
    let sum = pool.sum(tasks, |i| square_sum(&x[i * TASK..x.len().min((i + 1) * TASK)], F::to_f64));
    let scale = F::from_f64((sum.sqrt() + eps).recip());
    pool.for_rows(RowsMut::new(x, 1), TASK, |_, x| {
        vectorize!({
            for x in x {
                *x *= scale;
            }
        });
    });
}

/// The Newton-Schulz steps on the matrix in `x`; returns where the result is, `x` or `y`.
fn orthogonalise<'a, F: Real>(
    pool: &Pool,
    mut x: &'a mut [F],
    mut y: &'a mut [F],
    squares: &mut [F],
    rows: usize,
    columns: usize,
) -> &'a [F] {
    // A matrix with more rows than columns is taken transposed, by its strides.
    let (small, large) = (rows.min(columns), rows.max(columns));
    let (down, along) = if rows > columns { (1, columns) } else { (columns, 1) };
    let (a, b) = squares[..2 * small * small].split_at_mut(small * small);
    let [c1, c3, c5] = QUINTIC.map(F::from_f64);
    let (zero, one, square) = (F::ZERO, F::ONE, (small, 1));
    for _ in 0..STEPS {
        gemm_on(pool, (small, small, large), one, (x, (down, along)), (x, (along, down)), zero, (a, square));
        b.copy_from_slice(a);
        gemm_on(pool, (small, small, small), c5, (a, square), (a, square), c3, (b, square));
        y.copy_from_slice(x);
        gemm_on(pool, (small, large, small), one, (b, square), (x, (down, along)), c1, (y, (down, along)));
        std::mem::swap(&mut x, &mut y);
    }
    x
}

/// w ← w − shrink · w − rate · x; Σ of squared changes.
fn apply<F: Real>(pool: &Pool, weight: &mut [F], x: &[F], rate: f64, shrink: f64) -> f64 {
    let (rate, shrink) = (F::from_f64(rate), F::from_f64(shrink));
    scratch_of_thread(weight.len().div_ceil(TASK), |sums: &mut [f64]| {
        let blocks = (RowsMut::blocks(weight, TASK), RowsMut::new(sums, 1));
        pool.for_rows(blocks, 1, |range, (weight, sum)| {
            sum[0] = vectorize!(apply_block(weight, &x[range.start * TASK..], rate, shrink));
        });
        sums.iter().sum()
    })
}

#[inline(always)]
fn apply_block<F: Real>(weight: &mut [F], x: &[F], rate: F, shrink: F) -> f64 {
    let mut lanes = [0.0; 16];
    for (weight, x) in weight.chunks_mut(lanes.len()).zip(x.chunks(lanes.len())) {
        for ((w, &x), lane) in weight.iter_mut().zip(x).zip(&mut lanes) {
            let new = *w - shrink * *w - rate * x;
            let change = (new - *w).to_f64();
            *lane += change * change;
            *w = new;
        }
    }
    lanes.iter().sum()
}

#[cfg(test)]
mod tests;
