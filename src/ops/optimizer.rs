//! Elementwise optimizers over all parameters at once: SGD, Adam (arXiv 1412.6980), AdamW (1711.05101), Lion
//! (2302.06675). Each row comes with its own learning-rate factor, weight decay and epsilon (see [`crate::mup`]).

use super::pieces::Pieces;
use crate::backend::{Backend, Mut, Ref};
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
