//! Multipliers: from a table row and two shapes to every factor by which they differ. Pure arithmetic.
//!
//! The same formulas serve μP (this shape : base shape) and widening (wide : narrow). Their derivation and their proof
//! are those of arXiv 2203.03466 (μP) and arXiv 2602.10545 (widening); Lion, Muon and the clipping weight go beyond
//! both and are proved by the tests in `tests/widening.rs`.

mod rules;

pub use rules::{AttentionRule, DecayRule, DepthRule, EmbeddingRule, EpsRule, Rules};

use crate::{
    dims::{Axis, Dims},
    model::param::{Kind, Row},
};
use serde::{Deserialize, Serialize};

/// How hyperparameters depend on width.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Parametrization {
    /// μP relative to a base shape.
    #[default]
    Mup,
    /// Standard parametrisation: nothing depends on width; every shape is its own base.
    Standard,
}

/// Ratios of one tensor at a shape to the same tensor at a reference shape.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ratios {
    /// Growth of the output axis.
    pub k_out: f64,
    /// Growth of the input axis.
    pub k_in: f64,
    /// Growth of the forward multiplier a in y = a·W·x.
    pub a: f64,
}

/// Factors on a tensor's optimizer settings and state, wide : narrow (or this shape : base).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Factors {
    /// Learning rate.
    pub lr: f64,
    /// Epsilon of the optimizer.
    pub eps: f64,
    /// Weight decay.
    pub decay: f64,
    /// First moment.
    pub first: f64,
    /// Second moment (and amsgrad's maximum).
    pub second: f64,
}

/// The rules that optimizers follow under widening (one column of the table in [`Ratios::factors`] each).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// SGD with any momentum; weight decay coupled.
    Sgd,
    /// Adam with coupled weight decay (L2).
    Adam,
    /// AdamW: weight decay decoupled.
    AdamW,
    /// Lion.
    Lion,
    /// Muon, on hidden matrices.
    Muon,
}

impl Ratios {
    /// Ratios of `row`, at the shape `dims`, to the same row at `base`.
    ///
    /// `scaled_readout` says whether the readout has a forward multiplier ∝ 1 / width (it has under μP).
    pub fn new(row: &Row, dims: &Dims, base: &Dims, scaled_readout: bool) -> Self {
        let k = |axis: Option<&Axis>| axis.map_or(1.0, |a| a.ratio(dims, base));
        let (output, input) = (k(row.axes.first()), k(row.axes.get(1)));
        match row.kind {
            Kind::Embedding => Self { k_out: input, k_in: 1.0, a: 1.0 },
            Kind::Readout => Self { k_out: 1.0, k_in: input, a: if scaled_readout { 1.0 / input } else { 1.0 } },
            Kind::Input | Kind::Hidden | Kind::Vector => Self { k_out: output, k_in: input, a: 1.0 },
        }
    }

    /// Weight: W_wide = s · repeat(W).
    pub fn s(&self) -> f64 {
        1.0 / (self.k_in * self.a)
    }

    /// Gradient: G_wide = γ · repeat(G).
    pub fn gamma(&self) -> f64 {
        self.a / self.k_out
    }

    /// Weight c of a tensor in the gradient norm, ‖g‖² = Σ c ‖g_p‖²: with it the norm of a widened model is the
    /// narrow one's.
    pub fn clip(&self) -> f64 {
        self.s() / self.gamma()
    }

    /// Standard deviation of initial values. Hidden 1/√k_in; everything else 1.
    pub fn init(&self, kind: Kind) -> f64 {
        if kind == Kind::Hidden { self.k_in.sqrt().recip() } else { 1.0 }
    }

    /// Factors for an optimizer, from the table of upscaling.md ("What keeps the wide model equal").
    pub fn factors(&self, rule: Rule) -> Factors {
        let (s, gamma) = (self.s(), self.gamma());
        let (first, second) = (gamma, gamma * gamma);
        match rule {
            Rule::Sgd => Factors { lr: s / gamma, eps: 1.0, decay: gamma / s, first, second },
            Rule::Adam => Factors { lr: s, eps: gamma, decay: gamma / s, first, second },
            Rule::AdamW | Rule::Lion => Factors { lr: s, eps: gamma, decay: 1.0 / s, first, second },
            Rule::Muon => {
                let root = (self.k_out * self.k_in).sqrt();
                Factors { lr: s * root, eps: gamma * root, decay: 1.0 / (s * root), first, second }
            }
        }
    }
}
