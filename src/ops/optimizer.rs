//! Elementwise optimizers over all parameters at once: SGD, Adam (arXiv 1412.6980), AdamW (1711.05101), Lion
//! (2302.06675). Each row comes with its own learning-rate factor, weight decay and epsilon (see [`crate::mup`]).

use super::{
    pieces::{Pieces, RowSettings, for_pieces},
    scalars::Scalar,
};
use crate::backend::{
    Backend, Mut, Ref,
    cpu::{Cpu, Real, math::simd},
};
use serde::{Deserialize, Serialize};

/// An elementwise rule with its constants. g is the gradient times [`super::scalars::Scalar::Factor`], lr the
/// schedule's rate times the row's factor, t the step count from 1.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum Method {
    /// g ← g + wd·w; m ← momentum·m + (1 − dampening)·g, and m = g at t = 1; w ← w − lr·m, or − lr·(g + momentum·m)
    /// with Nesterov; − lr·g without momentum. (PyTorch's SGD.)
    Sgd {
        /// Factor on the first moment; 0 keeps none.
        momentum: f64,
        /// 1 − factor on the gradient as it enters the moment.
        dampening: f64,
        /// Nesterov's look-ahead.
        nesterov: bool,
    },
    /// m ← β₁m + (1−β₁)g; v ← β₂v + (1−β₂)g²; w ← w − lr · (m/(1−β₁ᵗ)) / (√(v/(1−β₂ᵗ)) + eps). Weight decay is
    /// `coupled` (g ← g + wd·w: Adam) or not (w ← w − lr·wd·w before the update: AdamW). With amsgrad √(v/…) is taken of
    /// the largest v so far.
    Adam {
        /// Decay of the first moment.
        beta1: f64,
        /// Decay of the second moment.
        beta2: f64,
        /// L2 (Adam) instead of decoupled decay (AdamW).
        coupled: bool,
        /// Keep the maximum of the second moment.
        amsgrad: bool,
    },
    /// w ← w − lr·wd·w − lr·sign(β₁m + (1−β₁)g); m ← β₂m + (1−β₂)g. sign(0) = 0.
    Lion {
        /// Weight of the moment in the update.
        beta1: f64,
        /// Decay of the moment.
        beta2: f64,
    },
}

/// The arenas that an update reads and writes, all laid out alike.
pub struct Arenas<'a, B: Backend> {
    /// Weights that the forward pass reads.
    pub weights: Mut<'a, B>,
    /// Their master copy, if it is another tensor.
    pub master: Option<Mut<'a, B>>,
    /// First moments.
    pub first: Option<Mut<'a, B>>,
    /// Second moments.
    pub second: Option<Mut<'a, B>>,
    /// Maxima of the second moments.
    pub maximum: Option<Mut<'a, B>>,
    /// Gradients.
    pub gradients: Ref<'a, B>,
}

/// Elementwise updates.
pub trait Optimizer: Backend {
    /// Updates the weights and moments of every piece whose row is not Muon's; nothing if Skip is set.
    /// partials[i] = Σ of squared changes of the weights of piece i (0 where nothing was done).
    fn update(
        &self,
        arenas: Arenas<'_, Self>,
        partials: Mut<'_, Self>,
        scalars: Ref<'_, Self>,
        pieces: &Pieces<Self>,
        method: Method,
    );
}

impl<F: Real> Optimizer for Cpu<F> {
    fn update(
        &self,
        arenas: Arenas<'_, Self>,
        partials: Mut<'_, Self>,
        scalars: Ref<'_, Self>,
        pieces: &Pieces<Self>,
        method: Method,
    ) {
        assert!(arenas.master.is_none(), "on a CPU the weights are their own master copy");
        let partials = partials.into_slice::<f64>();
        let Some(step) = Step::read(scalars.as_slice()) else { return partials.fill(0.0) };
        let gradients = arenas.gradients;
        let arenas = [arenas.weights.into_slice(), slice(arenas.first), slice(arenas.second), slice(arenas.maximum)];
        for_pieces(self.pool(), &pieces.list, arenas, partials, |piece, arenas| {
            let row = &pieces.rows[piece.row as usize];
            let gradients = gradients.slice(piece.range());
            if row.muon != 0 {
                0.0
            } else if gradients.dtype() == F::DTYPE {
                simd(|| method.update(row, step, arenas, gradients.as_slice::<F>()))
            } else {
                simd(|| method.update(row, step, arenas, gradients.as_slice::<f64>()))
            }
        });
    }
}

/// The elements; none where there is no such arena.
fn slice<F: Real>(arena: Option<Mut<'_, Cpu<F>>>) -> &mut [F] {
    arena.map_or(&mut [], Mut::into_slice)
}

/// What an update reads of [`super::scalars`].
#[derive(Clone, Copy)]
pub(super) struct Step {
    /// The schedule's learning rate.
    pub(super) lr: f64,
    time: f64,
    /// Factor on gradients.
    pub(super) factor: f64,
}

impl Step {
    /// None when the step is to be skipped.
    pub(super) fn read(scalars: &[f64]) -> Option<Self> {
        let step = || Self {
            lr: Scalar::LearningRate.of(scalars),
            time: Scalar::Time.of(scalars),
            factor: Scalar::Factor.of(scalars),
        };
        (Scalar::Skip.of(scalars) == 0.0).then(step)
    }
}

impl Method {
    /// Updates elements of one row; Σ of squared changes. Constants are taken in f64 and rounded once.
    #[inline(always)]
    fn update<F: Real, G: Real>(self, row: &RowSettings, step: Step, arenas: [&mut [F]; 4], gradients: &[G]) -> f64 {
        let [weights, first, second, maximum] = arenas;
        let (c, one, zero) = (F::from_f64, F::from_f64(1.0), F::from_f64(0.0));
        let rate = step.lr * row.lr;
        let (lr, decay, shrink, eps) = (c(rate), c(row.decay), c(rate * row.decay), c(row.eps));
        let sweep = Sweep { weights, gradients, factor: c(step.factor) };
        match self {
            Self::Sgd { momentum: 0.0, .. } => sweep.run([], |w, [], g| (w - lr * (g + decay * w), [])),
            Self::Sgd { momentum, dampening, nesterov } => {
                let (kept, entering) = if step.time <= 1.0 { (0.0, 1.0) } else { (momentum, 1.0 - dampening) };
                let (of_g, of_m) = if nesterov { (1.0, momentum) } else { (0.0, 1.0) };
                let (kept, entering, of_g, of_m) = (c(kept), c(entering), c(of_g), c(of_m));
                sweep.run([first], |w, [m], g| {
                    let g = g + decay * w;
                    let m = kept * m + entering * g;
                    (w - lr * (of_g * g + of_m * m), [m])
                })
            }
            Self::Adam { beta1, beta2, coupled, amsgrad } => {
                let (l2, shrink) = if coupled { (decay, zero) } else { (zero, shrink) };
                let lr = c(rate / (1.0 - beta1.powf(step.time)));
                let correction = c((1.0 - beta2.powf(step.time)).sqrt().recip());
                let (b1, g1, b2, g2) = (c(beta1), c(1.0 - beta1), c(beta2), c(1.0 - beta2));
                let moments = |w, m, v, g| {
                    let g = g + l2 * w;
                    (b1 * m + g1 * g, b2 * v + g2 * g * g)
                };
                let weight = |w, m, v: F| w - shrink * w - lr * m / (v.sqrt() * correction + eps);
                if amsgrad {
                    sweep.run([first, second, maximum], |w, [m, v, max], g| {
                        let (m, v) = moments(w, m, v, g);
                        let max = if v > max { v } else { max };
                        (weight(w, m, max), [m, v, max])
                    })
                } else {
                    sweep.run([first, second], |w, [m, v], g| {
                        let (m, v) = moments(w, m, v, g);
                        (weight(w, m, v), [m, v])
                    })
                }
            }
            Self::Lion { beta1, beta2 } => {
                let (b1, g1, b2, g2) = (c(beta1), c(1.0 - beta1), c(beta2), c(1.0 - beta2));
                sweep.run([first], |w, [m], g| {
                    let u = b1 * m + g1 * g;
                    let positive = if u > zero { one } else { zero };
                    let negative = if u < zero { one } else { zero };
                    (w - shrink * w - lr * (positive - negative), [b2 * m + g2 * g])
                })
            }
        }
    }
}

/// Lanes in which changes are summed, whatever the machine.
const LANES: usize = 16;

/// A pass over the elements of one row.
struct Sweep<'a, F, G> {
    weights: &'a mut [F],
    gradients: &'a [G],
    factor: F,
}

impl<F: Real, G: Real> Sweep<'_, F, G> {
    /// Replaces weights and M moments by what `rule(weight, moments, gradient)` says; Σ of squared changes.
    #[inline(always)]
    fn run<const M: usize>(self, moments: [&mut [F]; M], rule: impl Fn(F, [F; M], F) -> (F, [F; M])) -> f64 {
        let len = self.weights.len();
        assert!(self.gradients.len() == len && moments.iter().all(|m| m.len() == len), "arenas are laid out alike");
        let mut changes = [0.0; LANES];
        let (weights, weights_tail) = self.weights.as_chunks_mut::<LANES>();
        let (gradients, gradients_tail) = self.gradients.as_chunks::<LANES>();
        let mut moments = moments.map(|m| m.as_chunks_mut::<LANES>());
        for (i, (w, g)) in weights.iter_mut().zip(gradients).enumerate() {
            for lane in 0..LANES {
                let old = moments.each_ref().map(|(m, _)| m[i][lane]);
                let (weight, new) = rule(w[lane], old, self.factor * F::from_f64(g[lane].to_f64()));
                moments.iter_mut().zip(new).for_each(|((m, _), new)| m[i][lane] = new);
                let change = (weight - w[lane]).to_f64();
                changes[lane] += change * change;
                w[lane] = weight;
            }
        }
        for (lane, (w, g)) in weights_tail.iter_mut().zip(gradients_tail).enumerate() {
            let old = moments.each_ref().map(|(_, m)| m[lane]);
            let (weight, new) = rule(*w, old, self.factor * F::from_f64(g.to_f64()));
            moments.iter_mut().zip(new).for_each(|((_, m), new)| m[lane] = new);
            let change = (weight - *w).to_f64();
            changes[lane] += change * change;
            *w = weight;
        }
        changes.iter().sum()
    }
}

#[cfg(test)]
mod tests;
