//! What happens to losses and gradients between backward and the optimizer: sums over micro-steps, the global norm,
//! clipping, and the decision to skip a step that is not finite.

mod cuda;

use super::{
    convert::{Float, with_float},
    pieces::Pieces,
    scalars::Scalar,
};
use crate::backend::{
    Backend, Mut, Ref,
    cpu::{Cpu, Pool, Real, math::vectorize, parallel::RowsMut},
};

/// Constants of [`Gradient::decide`].
#[derive(Clone, Copy, Debug)]
pub struct Decision {
    /// Largest norm; infinite without clipping.
    pub clip: f64,
    /// Tokens of a global step if none is ignored; gradients were scaled by its inverse.
    pub nominal: f64,
    /// Whether the first step that is not finite is the last one.
    pub halt: bool,
}

/// Sums, norm, decision.
pub trait Gradient: Backend {
    /// scalars: LossSum += Σ losses, Counted += number of targets ≥ 0; in a fixed order.
    fn tally(&self, scalars: Mut<'_, Self>, losses: Ref<'_, Self>, targets: Ref<'_, Self>);

    /// target = source, or with `add` target += source, converting between float types (round to nearest even).
    fn accumulate(&self, target: Mut<'_, Self>, source: Ref<'_, Self>, add: bool);

    /// partials[i] = clip weight of its row × Σ g² over piece i, as f64 sums in a fixed order.
    fn square_norms(&self, partials: Mut<'_, Self>, gradients: Ref<'_, Self>, pieces: &Pieces<Self>);

    /// From partials, LossSum and Counted: GradNorm, Factor, Skip, Halt, BadRow.
    ///
    /// GradNorm = √Σ partials · nominal / Counted. Factor = nominal / Counted · min(1, clip / GradNorm). Skip when a
    /// partial or LossSum is not finite, when nothing was counted, or when Halt is set. Sums over partials are made in
    /// order; BadRow is the row at which the running sum stops being finite. Where GradNorm would be 0 / 0 it is NaN.
    fn decide(&self, scalars: Mut<'_, Self>, partials: Ref<'_, Self>, pieces: &Pieces<Self>, decision: Decision);

    /// UpdateNorm = √Σ partials, summed in order; 0 when the step was skipped.
    fn finish_update(&self, scalars: Mut<'_, Self>, partials: Ref<'_, Self>);
}

/// Elements that one task takes.
const TASK: usize = 1 << 16;

impl<F: Real> Gradient for Cpu<F> {
    fn tally(&self, scalars: Mut<'_, Self>, losses: Ref<'_, Self>, targets: Ref<'_, Self>) {
        let scalars = scalars.into_slice::<f64>();
        let losses: f64 = losses.as_slice::<F>().iter().map(|l| l.to_f64()).sum();
        let counted = targets.as_slice::<i32>().iter().filter(|&&t| t >= 0).count();
        *Scalar::LossSum.in_mut(scalars) += losses;
        *Scalar::Counted.in_mut(scalars) += counted as f64;
    }

    fn accumulate(&self, target: Mut<'_, Self>, source: Ref<'_, Self>, add: bool) {
        with_float!(source.dtype(), S => {
            let source = source.as_slice::<S>();
            with_float!(target.dtype(), T => accumulate(self.pool(), target.into_slice::<T>(), source, add));
        });
    }

    fn square_norms(&self, partials: Mut<'_, Self>, gradients: Ref<'_, Self>, pieces: &Pieces<Self>) {
        with_float!(gradients.dtype(), T => {
            let gradients = gradients.as_slice::<T>();
            self.pool().for_rows(RowsMut::new(partials.into_slice::<f64>(), 1), 1, |range, partial| {
                let piece = &pieces.list[range.start];
                partial[0] = pieces.rows[piece.row as usize].clip * square_sum(&gradients[piece.range()], T::load);
            });
        });
    }

    fn decide(&self, scalars: Mut<'_, Self>, partials: Ref<'_, Self>, pieces: &Pieces<Self>, decision: Decision) {
        let scalars = scalars.into_slice::<f64>();
        let (mut sum, mut bad_row) = (0.0, -1.0);
        for (piece, partial) in pieces.list.iter().zip(partials.as_slice::<f64>()) {
            sum += partial;
            if !f64::is_finite(sum) {
                bad_row = f64::from(piece.row);
                break;
            }
        }
        if bad_row == -1.0 && !Scalar::LossSum.of(scalars).is_finite() {
            bad_row = -2.0;
        }
        let finite = bad_row == -1.0;
        let counted = Scalar::Counted.of(scalars);
        let mean = decision.nominal / counted;
        let norm = sum.sqrt() * mean;
        if decision.halt && !finite {
            *Scalar::Halt.in_mut(scalars) = 1.0;
        }
        let skip = !finite || counted == 0.0 || Scalar::Halt.of(scalars) != 0.0;
        *Scalar::GradNorm.in_mut(scalars) = norm;
        *Scalar::Factor.in_mut(scalars) = mean * (decision.clip / norm).min(1.0);
        *Scalar::Skip.in_mut(scalars) = f64::from(u8::from(skip));
        *Scalar::BadRow.in_mut(scalars) = bad_row;
    }

    fn finish_update(&self, scalars: Mut<'_, Self>, partials: Ref<'_, Self>) {
        let scalars = scalars.into_slice::<f64>();
        let skip = Scalar::Skip.of(scalars) != 0.0;
        let sum: f64 = partials.as_slice::<f64>().iter().sum();
        *Scalar::UpdateNorm.in_mut(scalars) = if skip { 0.0 } else { sum.sqrt() };
    }
}

/// In f64, so that each element is rounded once, to the target's type.
fn accumulate<T: Float, S: Float>(pool: &Pool, target: &mut [T], source: &[S], add: bool) {
    assert_eq!(target.len(), source.len());
    pool.for_rows(RowsMut::new(target, 1), TASK, |range, target| {
        vectorize!(for (t, s) in target.iter_mut().zip(&source[range]) {
            *t = T::store(if add { t.load() + s.load() } else { s.load() });
        });
    });
}

/// Σ x², in f64 and in 16 lanes, whatever the machine. `load` gives an element's value.
pub(super) fn square_sum<T: Copy>(x: &[T], load: impl Fn(T) -> f64) -> f64 {
    vectorize!({
        let mut lanes = [0.0; 16];
        let (blocks, rest) = x.as_chunks::<16>();
        for block in blocks {
            for (lane, &x) in lanes.iter_mut().zip(block) {
                *lane += load(x) * load(x);
            }
        }
        for (lane, &x) in lanes.iter_mut().zip(rest) {
            *lane += load(x) * load(x);
        }
        lanes.iter().sum()
    })
}

#[cfg(test)]
mod tests;
