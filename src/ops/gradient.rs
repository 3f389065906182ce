//! What happens to losses and gradients between backward and the optimizer: sums over micro-steps, the global norm,
//! clipping, and the decision to skip a step that is not finite.

use super::pieces::Pieces;
use crate::backend::{Backend, Mut, Ref};

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
    /// partial or LossSum is not finite, when nothing was counted, or when Halt is set.
    fn decide(&self, scalars: Mut<'_, Self>, partials: Ref<'_, Self>, pieces: &Pieces<Self>, decision: Decision);

    /// UpdateNorm = √Σ partials, summed in order; 0 when the step was skipped.
    fn finish_update(&self, scalars: Mut<'_, Self>, partials: Ref<'_, Self>);
}
