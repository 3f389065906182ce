//! `[optimizer]` and `[schedule]`.

use crate::ops::optimizer::Method;
use serde::{Deserialize, Serialize};

/// An optimizer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerKind {
    /// SGD; weight decay coupled.
    Sgd,
    /// Adam; weight decay coupled (L2).
    Adam,
    /// AdamW; weight decay decoupled.
    #[default]
    AdamW,
    /// Lion.
    Lion,
    /// Muon for hidden matrices, AdamW for the rest.
    Muon,
}

/// Muon's factor on the learning rate from a matrix's shape, taken at the base shape.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ShapeFactor {
    /// 1.
    #[default]
    None,
    /// √max(1, rows / columns).
    Spectral,
    /// 0.2 √max(rows, columns): updates as large as AdamW's (arXiv 2502.16982).
    Rms,
}

/// Which gradient norm clipping measures.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ClipNorm {
    /// ‖g‖² = Σ (s/γ) ‖g_p‖²: the same for a widened model.
    #[default]
    Mup,
    /// ‖g‖² = Σ ‖g_p‖².
    Plain,
}

/// `[optimizer]`. Numbers hold at the base shape.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OptimizerConfig {
    /// Which one.
    pub kind: OptimizerKind,
    /// Learning rate at the top of the schedule.
    pub lr: f64,
    /// β₁, β₂ of Adam, AdamW (0.9, 0.95) and Lion (0.9, 0.99).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub betas: Option<[f64; 2]>,
    /// Epsilon of Adam and AdamW.
    pub eps: f64,
    /// Weight decay of matrices and embeddings.
    pub weight_decay: f64,
    /// Momentum of SGD.
    pub momentum: f64,
    /// Dampening of SGD.
    pub dampening: f64,
    /// Nesterov momentum of SGD.
    pub nesterov: bool,
    /// Adam's and AdamW's amsgrad.
    pub amsgrad: bool,
    /// Muon's epsilon beside the Frobenius norm.
    pub muon_eps: f64,
    /// Muon's factor from a matrix's shape.
    pub shape_factor: ShapeFactor,
    /// Largest gradient norm; 0: no clipping.
    pub clip: f64,
    /// Which norm.
    pub clip_norm: ClipNorm,
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        Self {
            kind: OptimizerKind::AdamW,
            lr: 1e-3,
            betas: None,
            eps: 1e-8,
            weight_decay: 0.1,
            momentum: 0.9,
            dampening: 0.0,
            nesterov: false,
            amsgrad: false,
            muon_eps: 1e-7,
            shape_factor: ShapeFactor::None,
            clip: 1.0,
            clip_norm: ClipNorm::Mup,
        }
    }
}

impl OptimizerConfig {
    /// The elementwise rule: of all tensors, or of those that Muon leaves.
    pub fn method(&self) -> Method {
        let [beta1, beta2] = self.betas.unwrap_or(match self.kind {
            OptimizerKind::Lion => [0.9, 0.99],
            _ => [0.9, 0.95],
        });
        match self.kind {
            OptimizerKind::Sgd => {
                Method::Sgd { momentum: self.momentum, dampening: self.dampening, nesterov: self.nesterov }
            }
            OptimizerKind::Lion => Method::Lion { beta1, beta2 },
            kind => Method::Adam { beta1, beta2, coupled: kind == OptimizerKind::Adam, amsgrad: self.amsgrad },
        }
    }
}

/// `[schedule]`: the learning rate's factor over the run's steps.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ScheduleConfig {
    /// Its form.
    pub kind: ScheduleKind,
    /// Steps over which the rate rises from 0 to its top.
    pub warmup: u64,
    /// The rate at the end, as a part of the top.
    #[serde(rename = "final")]
    pub end: f64,
    /// Steps of the decay at the end, for warmup-stable-decay; a fifth of the run if left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decay: Option<u64>,
}

/// Forms of a schedule.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScheduleKind {
    /// The top all the way.
    #[default]
    Constant,
    /// A straight line down.
    Linear,
    /// Half a cosine down.
    Cosine,
    /// Warmup-stable-decay: the top, then a straight line down over the last steps.
    Wsd,
}
