//! What a step brought, and the steps that are under way.

use crate::{
    Result,
    backend::{Backend, HostBuffer},
    ops::scalars::{self, SCALAR_BYTES, Scalar},
    state::Position,
};
use std::time::Instant;

/// What a step brought.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepResult {
    /// Where the run stood after the step (before it, for a step that halted training).
    pub position: Position,
    /// The step, from 1.
    pub step: u64,
    /// Mean loss of the counted tokens, nats.
    pub loss: f64,
    /// Learning rate at the base shape.
    pub lr: f64,
    /// Gradient norm before clipping.
    pub grad_norm: f64,
    /// Norm of the change of all weights.
    pub update_norm: f64,
    /// Seconds from this step's beginning to the next one's (or to its result, for the last one under way).
    pub seconds: f64,
    /// Whether the update was left out.
    pub skipped: bool,
    /// `loss`, or the row whose gradient was not finite.
    pub bad: Option<Bad>,
}

/// What was not finite.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bad {
    /// The loss only.
    Loss,
    /// The gradient of this row.
    Row(usize),
}

/// A step under way.
pub(super) struct Pending<B: Backend> {
    pub(super) inputs: B::Host,
    pub(super) results: B::Host,
    pub(super) event: Option<B::Event>,
    pub(super) begun: Instant,
    pub(super) before: Position,
    pub(super) after: Position,
    pub(super) lr: f64,
}

impl<B: Backend> Pending<B> {
    /// A step that begins now, in the host memory of one that is over or in new memory.
    pub(super) fn begin(backend: &B, spare: Option<Self>, before: Position, after: Position, lr: f64) -> Result<Self> {
        let begun = Instant::now();
        if let Some(pending) = spare {
            return Ok(Self { begun, before, after, lr, ..pending });
        }
        let (inputs, results) = (backend.host(SCALAR_BYTES)?, backend.host(SCALAR_BYTES)?);
        Ok(Self { inputs, results, event: None, begun, before, after, lr })
    }

    /// What it brought, once its event has passed; `end` is when the next step began.
    pub(super) fn result(&self, end: Instant) -> StepResult {
        let get = |scalar| scalars::get(self.results.bytes(), scalar);
        let skipped = get(Scalar::Skip) != 0.0;
        let bad = match get(Scalar::BadRow) {
            row if skipped && row >= 0.0 => Some(Bad::Row(row as usize)),
            row if skipped && row == -2.0 => Some(Bad::Loss),
            _ => None,
        };
        StepResult {
            position: if get(Scalar::Halt) != 0.0 { self.before } else { self.after },
            step: self.after.step,
            loss: get(Scalar::LossSum) / get(Scalar::Counted),
            lr: self.lr,
            grad_norm: get(Scalar::GradNorm),
            update_norm: get(Scalar::UpdateNorm),
            seconds: end.duration_since(self.begun).as_secs_f64(),
            skipped,
            bad,
        }
    }
}
