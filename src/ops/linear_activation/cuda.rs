//! Linear layers with an activation on a GPU: GELU's tanh form is an epilogue of cuBLASLt's.

use super::{Activate, Activation, Linear, LinearActivation, LinearShape};
use crate::backend::{
    Mut, Ref,
    cuda::{Cuda, Epilogue, Matrix},
};

impl LinearActivation for Cuda {
    fn linear_activate(
        &self,
        mut after: Mut<'_, Self>,
        mut before: Mut<'_, Self>,
        x: Ref<'_, Self>,
        weight: Ref<'_, Self>,
        bias: Option<Ref<'_, Self>>,
        shape: LinearShape,
        kind: Activation,
    ) {
        let LinearShape { rows, inputs, outputs } = shape;
        if kind == Activation::GeluTanh {
            let (left, right) = (Matrix::new(x, inputs), Matrix::new(weight, inputs).transposed());
            let (size, epilogue) = ([rows, outputs, inputs], Epilogue::Gelu { before: before.reborrow(), bias });
            if self.gemm_with((after.reborrow(), outputs), left, right, size, (1.0, 0.0), epilogue) {
                return;
            }
        }
        self.linear(before.reborrow(), x, weight, bias, shape);
        self.activate(after, before.as_ref(), kind);
    }

    fn linear_activate_backward(
        &self,
        mut dbefore: Mut<'_, Self>,
        dy: Ref<'_, Self>,
        weight: Ref<'_, Self>,
        before: Ref<'_, Self>,
        shape: LinearShape,
        kind: Activation,
    ) {
        let LinearShape { rows, inputs, outputs } = shape;
        if kind == Activation::GeluTanh {
            let (left, right) = (Matrix::new(dy, outputs), Matrix::new(weight, inputs));
            let (size, slope) = ([rows, inputs, outputs], Epilogue::GeluSlope(before));
            if self.gemm_with((dbefore.reborrow(), inputs), left, right, size, (1.0, 0.0), slope) {
                return;
            }
        }
        self.linear_backward_input(dbefore.reborrow(), dy, weight, shape);
        self.activate_backward(dbefore, before, kind);
    }
}
