//! Elementwise optimizers over all parameters at once: SGD, Adam (arXiv 1412.6980), AdamW (1711.05101), Lion
//! (2302.06675). Each row comes with its own learning-rate factor, weight decay and epsilon (see [`crate::mup`]).

mod cuda;

use super::{
    pieces::{Pieces, RowSettings, for_pieces},
    scalars::Scalar,
    stochastic::{self, Moment, Words},
};
use crate::{
    DType,
    backend::{
        Backend, Mut, Ref,
        cpu::{Cpu, Pool, Real, math::vectorize},
    },
};
use bytemuck::Zeroable;
use half::bf16;
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

/// The arenas that an update reads and writes, all laid out alike. Moments are of the type that they are computed in, or
/// bf16 ([`super::stochastic`]); all of one type. Gradients may be of another type than weights.
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
        let half = arenas.first.as_ref().is_some_and(|first| first.dtype() == DType::BF16);
        if half {
            update::<F, bf16>(self.pool(), arenas, partials, step, pieces, method);
        } else {
            update::<F, F>(self.pool(), arenas, partials, step, pieces, method);
        }
    }
}

/// The update with moments that are kept as `M`.
fn update<F: Real, M: Moment>(
    pool: &Pool,
    arenas: Arenas<'_, Cpu<F>>,
    partials: &mut [f64],
    step: Step,
    pieces: &Pieces<Cpu<F>>,
    method: Method,
) {
    let gradients = arenas.gradients;
    let moments = [arenas.first, arenas.second, arenas.maximum];
    let moments = moments.map(|arena| arena.map_or(&mut [][..], Mut::into_slice::<M>));
    for_pieces(pool, &pieces.list, arenas.weights.into_slice::<F>(), moments, partials, |piece, weights, moments| {
        let row = &pieces.rows[piece.row as usize];
        let (gradients, element) = (gradients.slice(piece.range()), pieces.origin + piece.offset);
        if row.muon != 0 {
            return 0.0;
        }
        vectorize!(match gradients.dtype() == F::DTYPE {
            true => method.update(element, row, step, weights, moments, gradients.as_slice::<F>()),
            false => method.update(element, row, step, weights, moments, gradients.as_slice::<f64>()),
        })
    });
}

/// What an update reads of [`super::scalars`].
#[derive(Clone, Copy)]
pub(super) struct Step {
    /// The schedule's learning rate.
    pub(super) lr: f64,
    /// The optimizer's step count.
    pub(super) time: f64,
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
    fn update<F: Real, M: Moment, G: Real>(
        self,
        element: u64,
        row: &RowSettings,
        step: Step,
        weights: &mut [F],
        [first, second, maximum]: [&mut [M]; 3],
        gradients: &[G],
    ) -> f64 {
        let c = F::from_f64;
        let rate = step.lr * row.lr;
        let (lr, decay, shrink, eps) = (c(rate), c(row.decay), c(rate * row.decay), c(row.eps));
        let words = Words::new(step.time);
        let sweep = Sweep { weights, gradients, factor: c(step.factor), words, offset: element };
        match self {
            Self::Sgd { momentum: 0.0, .. } => sweep.run::<M, 0>(
                [],
                #[inline(always)]
                |w, [], g| (w - lr * (g + decay * w), []),
            ),
            Self::Sgd { momentum, dampening, nesterov } => {
                let (kept, entering) = if step.time <= 1.0 { (0.0, 1.0) } else { (momentum, 1.0 - dampening) };
                let (of_g, of_m) = if nesterov { (1.0, momentum) } else { (0.0, 1.0) };
                let (kept, entering, of_g, of_m) = (c(kept), c(entering), c(of_g), c(of_m));
                sweep.run(
                    [first],
                    #[inline(always)]
                    |w, [m], g| {
                        let g = g + decay * w;
                        let m = kept * m + entering * g;
                        (w - lr * (of_g * g + of_m * m), [m])
                    },
                )
            }
            Self::Adam { beta1, beta2, coupled, amsgrad } => {
                let adam = Adam {
                    beta1: [c(beta1), c(1.0 - beta1)],
                    beta2: [c(beta2), c(1.0 - beta2)],
                    correction: c((1.0 - beta2.powf(step.time)).sqrt().recip()),
                    lr: c(rate / (1.0 - beta1.powf(step.time))),
                    eps,
                    l2: if coupled { decay } else { F::ZERO },
                    shrink: if coupled { F::ZERO } else { shrink },
                };
                if amsgrad {
                    sweep.run(
                        [first, second, maximum],
                        #[inline(always)]
                        |w, [m, v, max], g| {
                            let (m, v) = adam.moments(w, m, v, g);
                            let max = if v > max { v } else { max };
                            (adam.weight(w, m, max), [m, v, max])
                        },
                    )
                } else {
                    sweep.run(
                        [first, second],
                        #[inline(always)]
                        |w, [m, v], g| {
                            let (m, v) = adam.moments(w, m, v, g);
                            (adam.weight(w, m, v), [m, v])
                        },
                    )
                }
            }
            Self::Lion { beta1, beta2 } => {
                let (b1, g1, b2, g2) = (c(beta1), c(1.0 - beta1), c(beta2), c(1.0 - beta2));
                sweep.run(
                    [first],
                    #[inline(always)]
                    |w, [m], g| {
                        let u = b1 * m + g1 * g;
                        let positive = if u > F::ZERO { F::ONE } else { F::ZERO };
                        let negative = if u < F::ZERO { F::ONE } else { F::ZERO };
                        (w - shrink * w - lr * (positive - negative), [b2 * m + g2 * g])
                    },
                )
            }
        }
    }
}

/// Adam's constants for one row and step.
struct Adam<F> {
    /// β and 1 − β.
    beta1: [F; 2],
    beta2: [F; 2],
    /// 1 / √(1 − β₂ᵗ).
    correction: F,
    /// Learning rate / (1 − β₁ᵗ).
    lr: F,
    eps: F,
    /// Coupled decay.
    l2: F,
    /// Learning rate × decoupled decay.
    shrink: F,
}

impl<F: Real> Adam<F> {
    #[inline(always)]
    fn moments(&self, w: F, m: F, v: F, g: F) -> (F, F) {
        let g = g + self.l2 * w;
        (self.beta1[0] * m + self.beta1[1] * g, self.beta2[0] * v + self.beta2[1] * g * g)
    }

    #[inline(always)]
    fn weight(&self, w: F, m: F, v: F) -> F {
        w - self.shrink * w - self.lr * m / (v.sqrt() * self.correction + self.eps)
    }
}

/// Lanes in which changes are summed, whatever the machine.
const LANES: usize = 16;

/// A pass over the elements of one row.
struct Sweep<'a, F, G> {
    weights: &'a mut [F],
    gradients: &'a [G],
    factor: F,
    /// What rounds moments, and the first element's place in the arena.
    words: Words,
    offset: u64,
}

impl<F: Real, G: Real> Sweep<'_, F, G> {
    /// Replaces weights and N moments by what `rule(weight, moments, gradient)` says; Σ of squared changes.
    #[inline(always)]
    fn run<M: Moment, const N: usize>(
        mut self,
        moments: [&mut [M]; N],
        rule: impl Fn(F, [F; N], F) -> (F, [F; N]),
    ) -> f64 {
        let len = self.weights.len();
        assert!(self.gradients.len() == len && moments.iter().all(|m| m.len() == len), "arenas are laid out alike");
        let mut changes = [0.0; LANES];
        for start in (0..len).step_by(LANES) {
            let end = len.min(start + LANES);
            // The last block is filled up with zeros, so that there is one loop, of a fixed length.
            let mut w = load(&self.weights[start..end]);
            let g = load(&self.gradients[start..end]);
            let mut m = [[M::zeroed(); LANES]; N];
            for k in 0..N {
                m[k] = load(&moments[k][start..end]);
            }
            let mut words = [0; LANES];
            if M::RANDOM && N > 0 {
                for (word, element) in words.iter_mut().zip(self.offset + start as u64..) {
                    *word = self.words.of(element);
                }
            }
            for lane in 0..LANES {
                let mut old = [F::ZERO; N];
                for k in 0..N {
                    old[k] = F::from_f64(m[k][lane].value());
                }
                let (weight, new) = rule(w[lane], old, self.factor * F::from_f64(g[lane].to_f64()));
                for k in 0..N {
                    m[k][lane] = M::keep(new[k].to_f64(), stochastic::bits(words[lane], k));
                }
                let change = (weight - w[lane]).to_f64();
                changes[lane] += change * change;
                w[lane] = weight;
            }
            store(&mut self.weights[start..end], &w);
            for k in 0..N {
                store(&mut moments[k][start..end], &m[k]);
            }
        }
        changes.iter().sum()
    }
}

#[inline(always)]
fn load<T: Copy + Zeroable>(x: &[T]) -> [T; LANES] {
    let mut block = [T::zeroed(); LANES];
    // A length that the compiler knows makes registers of the block; so in `store`.
    if x.len() == LANES {
        block.copy_from_slice(x)
    } else {
        block[..x.len()].copy_from_slice(x)
    }
    block
}

#[inline(always)]
fn store<T: Copy>(x: &mut [T], block: &[T; LANES]) {
    let len = x.len();
    if len == LANES { x.copy_from_slice(block) } else { x.copy_from_slice(&block[..len]) }
}

#[cfg(test)]
mod tests;
