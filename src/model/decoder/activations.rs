//! What a decoder keeps between forward and backward, and what it recomputes instead.

use super::Decoder;
use crate::{
    Error,
    backend::{Backend, Tensor},
    model::{
        MicroBatch,
        plan::{Plan, Planned, Slot},
        spec::FeedForward,
    },
    ops::Ops,
};
use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

/// What backward computes again instead of keeping it. The result is the same bit for bit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Recompute {
    /// Nothing: fastest, most memory.
    #[default]
    None,
    /// The hidden layer of each MLP.
    Mlp,
    /// All of each block but its input.
    Block,
}

impl fmt::Display for Recompute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::Mlp => "mlp",
            Self::Block => "block",
        })
    }
}

impl FromStr for Recompute {
    type Err = Error;
    fn from_str(name: &str) -> Result<Self, Error> {
        match name {
            "none" => Ok(Self::None),
            "mlp" => Ok(Self::Mlp),
            "block" => Ok(Self::Block),
            _ => Err(Error::config("recompute", name, "must be none, mlp, block or auto")),
        }
    }
}

/// Attention's half of a block.
pub(super) struct Inner<T> {
    pub norm1: T,
    pub statistics1: T,
    /// Q, K, V as projected; absent without Q/K norm, which needs them in backward.
    pub projected: Option<T>,
    pub head_statistics: Option<T>,
    /// Q, K, V as attention reads them.
    pub qkv: T,
    pub attention: T,
    pub log_sum_exp: T,
    /// The residual stream between attention and MLP.
    pub middle: T,
    pub norm2: T,
    pub statistics2: T,
}

/// The MLP's half of a block.
pub(super) struct Hidden<T> {
    /// Before the activation: ffn, or gate and up.
    pub before: T,
    pub after: T,
}

/// Gradients by activations: one block's worth, used again for each.
pub(super) struct Scratch<T> {
    /// By the residual stream.
    pub dx: T,
    /// By the input of a linear layer that follows a norm.
    pub dy: T,
    /// `dx` times the residual multiplier, where that is not 1.
    pub scaled: Option<T>,
    pub dafter: T,
    /// By gate and up; a plain MLP works in `dafter`.
    pub dbefore: Option<T>,
    pub dattention: T,
    pub dqkv: T,
}

/// All activations of a micro-batch.
pub struct Activations<B: Backend>(pub(super) Parts<Tensor<B>>);

/// The tensors of [`Activations`], or, while planning, their slots.
pub(super) struct Parts<T> {
    /// The residual stream before each block, and at the end.
    pub x: Vec<T>,
    /// What the last half-block returned.
    pub branch: T,
    pub norm: T,
    pub statistics: T,
    /// One for each block, or one for all of them.
    pub inner: Vec<Inner<T>>,
    pub hidden: Vec<Hidden<T>>,
    /// Absent for evaluation.
    pub scratch: Option<Scratch<T>>,
    pub losses: T,
    /// A chunk of logits.
    pub logits: T,
}

/// Reserved activations.
pub struct ActivationSlots(Parts<Slot>);

impl<B: Ops> Decoder<B> {
    /// Reserves the activations of a micro-batch; with `recompute` those for training, without for evaluation.
    pub fn plan(
        &self,
        backend: &B,
        plan: &mut Plan,
        micro: MicroBatch,
        recompute: Option<Recompute>,
    ) -> ActivationSlots {
        let (rows, width, heads) = (micro.rows(), self.width(), self.heads());
        let (float, statistic) = (backend.compute(), backend.statistics());
        let kept = |keep: bool| if keep { self.spec.layers } else { 1 };
        let mut slot =
            |name: String, dtype, columns: usize| plan.reserve(format!("activations.{name}"), dtype, rows * columns);
        let streams = if recompute.is_some() { self.spec.layers + 1 } else { 1 };
        let x = (0..streams).map(|i| slot(format!("{i}.residual"), float, width)).collect();
        let inner = (0..kept(matches!(recompute, Some(Recompute::None | Recompute::Mlp)))).map(|i| {
            let mut slot = |name: &str, dtype, columns| slot(format!("{i}.{name}"), dtype, columns);
            Inner {
                norm1: slot("norm1", float, width),
                statistics1: slot("statistics1", statistic, 2),
                projected: self.spec.qk_norm.then(|| slot("projected", float, heads.row())),
                head_statistics: self
                    .spec
                    .qk_norm
                    .then(|| slot("head_statistics", statistic, heads.kv_heads * (heads.group + 1))),
                qkv: slot("qkv", float, heads.row()),
                attention: slot("attention", float, heads.queries()),
                log_sum_exp: slot("log_sum_exp", statistic, heads.kv_heads * heads.group),
                middle: slot("middle", float, width),
                norm2: slot("norm2", float, width),
                statistics2: slot("statistics2", statistic, 2),
            }
        });
        let inner = inner.collect();
        let gated = self.spec.feed_forward == FeedForward::Gated;
        let before = self.ffn() * if gated { 2 } else { 1 };
        let hidden = (0..kept(recompute == Some(Recompute::None))).map(|i| Hidden {
            before: slot(format!("{i}.mlp.before"), float, before),
            after: slot(format!("{i}.mlp.after"), float, self.ffn()),
        });
        let hidden = hidden.collect();
        let scratch = recompute.map(|_| Scratch {
            dx: slot("scratch.dx".into(), float, width),
            dy: slot("scratch.dy".into(), float, width),
            scaled: (self.spec.alphas.residual != 1.0).then(|| slot("scratch.scaled".into(), float, width)),
            dafter: slot("scratch.mlp.dafter".into(), float, self.ffn()),
            dbefore: gated.then(|| slot("scratch.mlp.dbefore".into(), float, before)),
            dattention: slot("scratch.dattention".into(), float, heads.queries()),
            dqkv: slot("scratch.dqkv".into(), float, heads.row()),
        });
        ActivationSlots(Parts {
            x,
            branch: slot("branch".into(), float, width),
            norm: slot("norm".into(), float, width),
            statistics: slot("statistics".into(), statistic, 2),
            inner,
            hidden,
            scratch,
            losses: slot("losses".into(), statistic, 1),
            logits: plan.reserve("activations.logits", float, backend.cross_entropy_scratch(self.readout_shape(rows))),
        })
    }
}

impl<B: Backend> Activations<B> {
    /// Takes the reserved tensors.
    pub fn new(slots: ActivationSlots, planned: &mut Planned<B>) -> Self {
        let mut take = |slot: Slot| planned.take(slot);
        let s = slots.0;
        let inner = s.inner.into_iter().map(|i| Inner {
            norm1: take(i.norm1),
            statistics1: take(i.statistics1),
            projected: i.projected.map(&mut take),
            head_statistics: i.head_statistics.map(&mut take),
            qkv: take(i.qkv),
            attention: take(i.attention),
            log_sum_exp: take(i.log_sum_exp),
            middle: take(i.middle),
            norm2: take(i.norm2),
            statistics2: take(i.statistics2),
        });
        let inner = inner.collect();
        let hidden = s.hidden.into_iter().map(|h| Hidden { before: take(h.before), after: take(h.after) }).collect();
        let scratch = s.scratch.map(|s| Scratch {
            dx: take(s.dx),
            dy: take(s.dy),
            scaled: s.scaled.map(&mut take),
            dafter: take(s.dafter),
            dbefore: s.dbefore.map(&mut take),
            dattention: take(s.dattention),
            dqkv: take(s.dqkv),
        });
        Self(Parts {
            x: s.x.into_iter().map(&mut take).collect(),
            branch: take(s.branch),
            norm: take(s.norm),
            statistics: take(s.statistics),
            inner,
            hidden,
            scratch,
            losses: take(s.losses),
            logits: take(s.logits),
        })
    }

    /// Losses of the last forward pass, one for each token.
    pub fn losses(&self) -> &Tensor<B> {
        &self.0.losses
    }
}
