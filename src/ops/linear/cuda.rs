//! Linear layers by cuBLASLt.

use super::{Linear, LinearShape};
use crate::backend::{
    Mut, Ref,
    cuda::{Cuda, Epilogue, Matrix},
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
        let epilogue = bias.map_or(Epilogue::Plain, Epilogue::Bias);
        self.gemm_with((y, outputs), x, weight, [rows, outputs, inputs], (1.0, 0.0), epilogue);
    }

    fn linear_backward_input(&self, dx: Mut<'_, Self>, dy: Ref<'_, Self>, weight: Ref<'_, Self>, shape: LinearShape) {
        let LinearShape { rows, inputs, outputs } = shape;
        let (dy, weight) = (Matrix::new(dy, outputs), Matrix::new(weight, inputs));
        self.gemm((dx, inputs), dy, weight, [rows, inputs, outputs], (1.0, 0.0));
    }

    fn linear_backward_weight(
        &self,
        mut dweight: Mut<'_, Self>,
        dbias: Option<Mut<'_, Self>>,
        dy: Ref<'_, Self>,
        x: Ref<'_, Self>,
        shape: LinearShape,
    ) {
        let LinearShape { rows, inputs, outputs } = shape;
        let (left, right) = (Matrix::new(dy, outputs).transposed(), Matrix::new(x, inputs));
        let (size, factors) = ([outputs, inputs, rows], (1.0, 0.0));
        if let Some(mut dbias) = dbias {
            // The rows of dyᵀ.
            let sums = Epilogue::RowSums(dbias.reborrow());
            if self.gemm_with((dweight.reborrow(), inputs), left, right, size, factors, sums) {
                return;
            }
            super::column_sums(self, dbias, dy, rows, outputs, false);
        }
        self.gemm((dweight, inputs), left, right, size, factors);
    }
}
