//! Linear layers by cuBLASLt.

use super::{Linear, LinearShape};
use crate::backend::{
    Mut, Ref,
    cuda::{Cuda, Matrix},
};

impl Linear for Cuda {
    fn linear(
        &self,
        y: Mut<'_, Self>,
        x: Ref<'_, Self>,
        weight: Ref<'_, Self>,
        bias: Option<Ref<'_, Self>>,
        shape: LinearShape,
    ) {
        let LinearShape { rows, inputs, outputs } = shape;
        let (x, weight) = (Matrix::new(x, inputs), Matrix::new(weight, inputs).transposed());
        self.gemm((y, outputs), x, weight, [rows, outputs, inputs], (1.0, 0.0), bias);
    }

    fn linear_backward_input(&self, dx: Mut<'_, Self>, dy: Ref<'_, Self>, weight: Ref<'_, Self>, shape: LinearShape) {
        let LinearShape { rows, inputs, outputs } = shape;
        let (dy, weight) = (Matrix::new(dy, outputs), Matrix::new(weight, inputs));
        self.gemm((dx, inputs), dy, weight, [rows, inputs, outputs], (1.0, 0.0), None);
    }

    fn linear_backward_weight(
        &self,
        dweight: Mut<'_, Self>,
        dbias: Option<Mut<'_, Self>>,
        dy: Ref<'_, Self>,
        x: Ref<'_, Self>,
        shape: LinearShape,
    ) {
        let LinearShape { rows, inputs, outputs } = shape;
        let (left, right) = (Matrix::new(dy, outputs).transposed(), Matrix::new(x, inputs));
        self.gemm((dweight, inputs), left, right, [outputs, inputs, rows], (1.0, 0.0), None);
        if let Some(dbias) = dbias {
            super::column_sums(self, dbias, dy, rows, outputs, false);
        }
    }
}
