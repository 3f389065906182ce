//! Linear layers: y = x · Wᵀ + b.

use crate::backend::{Backend, Mut, Ref};

/// Sizes of a linear layer.
#[derive(Clone, Copy, Debug)]
pub struct LinearShape {
    /// Tokens.
    pub rows: usize,
    /// Input features.
    pub inputs: usize,
    /// Output features.
    pub outputs: usize,
}

/// Linear layers. `x` is rows × inputs, `y` rows × outputs, `weight` outputs × inputs, `bias` outputs.
pub trait Linear: Backend {
    /// y = x · weightᵀ + bias.
    fn linear(
        &self,
        y: Mut<'_, Self>,
        x: Ref<'_, Self>,
        weight: Ref<'_, Self>,
        bias: Option<Ref<'_, Self>>,
        shape: LinearShape,
    );

    /// dx = dy · weight.
    fn linear_backward_input(&self, dx: Mut<'_, Self>, dy: Ref<'_, Self>, weight: Ref<'_, Self>, shape: LinearShape);

    /// dweight = dyᵀ · x, dbias = column sums of dy; both overwritten.
    fn linear_backward_weight(
        &self,
        dweight: Mut<'_, Self>,
        dbias: Option<Mut<'_, Self>>,
        dy: Ref<'_, Self>,
        x: Ref<'_, Self>,
        shape: LinearShape,
    );
}
