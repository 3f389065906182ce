//! Activations of the MLP: GELU (arXiv 1606.08415; tanh form and exact), ReLU, and SwiGLU (arXiv 2002.05202).

use crate::backend::{Backend, Mut, Ref};
use serde::{Deserialize, Serialize};

/// An elementwise activation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Activation {
    /// 0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³))).
    GeluTanh,
    /// x Φ(x), by erf.
    GeluExact,
    /// max(x, 0); its gradient at 0 is 0.
    Relu,
}

/// Activations.
pub trait Activate: Backend {
    /// y = f(x), of equal length.
    fn activate(&self, y: Mut<'_, Self>, x: Ref<'_, Self>, kind: Activation);

    /// d = d · f′(x): turns the gradient by y into the gradient by x, in place.
    fn activate_backward(&self, d: Mut<'_, Self>, x: Ref<'_, Self>, kind: Activation);

    /// y = silu(gate) · up. `gate_up` is rows × 2 ffn: the gate's outputs, then those of up; y is rows × ffn.
    fn gate(&self, y: Mut<'_, Self>, gate_up: Ref<'_, Self>, ffn: usize);

    /// dgate_up, rows × 2 ffn, from dy, rows × ffn.
    fn gate_backward(&self, dgate_up: Mut<'_, Self>, dy: Ref<'_, Self>, gate_up: Ref<'_, Self>, ffn: usize);
}
