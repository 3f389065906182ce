//! What a matrix product does with its sums before it writes them, and which of that is left to kernels of our own.

use super::Cuda;
use crate::{
    DType,
    backend::{Mut, Ref, Tensor},
};
use cudarc::cublaslt::sys::cublasLtEpilogue_t as Kind;

/// What becomes of the sums of c = a · b. Vectors and matrices are of c's type.
pub(crate) enum Epilogue<'a> {
    /// They are written.
    Plain,
    /// A number for each column of c is added.
    Bias(Ref<'a, Cuda>),
    /// They, with a bias added, are written to `before`, which lies in memory as c does, and their GELU (tanh form) to c.
    Gelu {
        /// GELU's argument.
        before: Mut<'a, Cuda>,
        /// A number for each column.
        bias: Option<Ref<'a, Cuda>>,
    },
    /// They are multiplied by the slope of GELU (tanh form) at this matrix, which lies in memory as c does.
    GeluSlope(Ref<'a, Cuda>),
    /// They are written, and so are the sums of a's rows: a number for each row of c. Nothing is added to.
    RowSums(Mut<'a, Cuda>),
}

impl<'a> Epilogue<'a> {
    /// One that the library calls this, over memory of c's type: as many numbers as c has rows or columns, and as many as
    /// c has in memory.
    pub(super) fn of(kind: Kind, vector: &'a mut Tensor<Cuda>, matrix: &'a mut Tensor<Cuda>) -> Self {
        match kind {
            Kind::CUBLASLT_EPILOGUE_BIAS => Self::Bias(vector.view()),
            Kind::CUBLASLT_EPILOGUE_GELU_AUX => Self::Gelu { before: matrix.view_mut(), bias: None },
            Kind::CUBLASLT_EPILOGUE_GELU_AUX_BIAS => {
                Self::Gelu { before: matrix.view_mut(), bias: Some(vector.view()) }
            }
            Kind::CUBLASLT_EPILOGUE_DGELU => Self::GeluSlope(matrix.view()),
            Kind::CUBLASLT_EPILOGUE_BGRADB => Self::RowSums(vector.view_mut()),
            _ => Self::Plain,
        }
    }

    /// The library's name. Its matrices are the transposes of ours, so a row of a is a column of its B.
    pub(super) fn kind(&self) -> Kind {
        match self {
            Self::Plain => Kind::CUBLASLT_EPILOGUE_DEFAULT,
            Self::Bias(_) => Kind::CUBLASLT_EPILOGUE_BIAS,
            Self::Gelu { bias: None, .. } => Kind::CUBLASLT_EPILOGUE_GELU_AUX,
            Self::Gelu { bias: Some(_), .. } => Kind::CUBLASLT_EPILOGUE_GELU_AUX_BIAS,
            Self::GeluSlope(_) => Kind::CUBLASLT_EPILOGUE_DGELU,
            Self::RowSums(_) => Kind::CUBLASLT_EPILOGUE_BGRADB,
        }
    }

    /// The vector that is read or written.
    pub(super) fn vector(&self) -> Option<Ref<'_, Cuda>> {
        match self {
            Self::Bias(bias) => Some(*bias),
            Self::Gelu { bias, .. } => *bias,
            Self::RowSums(sums) => Some(sums.as_ref()),
            Self::Plain | Self::GeluSlope(_) => None,
        }
    }

    /// The matrix that is read or written beside c.
    pub(super) fn matrix(&self) -> Option<Ref<'_, Cuda>> {
        match self {
            Self::Gelu { before, .. } => Some(before.as_ref()),
            Self::GeluSlope(before) => Some(*before),
            Self::Plain | Self::Bias(_) | Self::RowSums(_) => None,
        }
    }

    /// Whether kernels of our own can do the same.
    pub(super) fn is_optional(&self) -> bool {
        !matches!(self, Self::Plain | Self::Bias(_))
    }
}

impl Cuda {
    /// Whether a product of operands of a type, with these distances between rows, is given an epilogue that kernels of
    /// our own could replace. The library wants a multiple of 8 for GELU's argument, and is fast with that everywhere;
    /// in f32 our own kernels have the accuracy.
    pub(super) fn fuses(&self, compute: DType, strides: [usize; 3]) -> bool {
        !self.options.unfused && compute == DType::BF16 && strides.iter().all(|stride| stride.is_multiple_of(8))
    }
}
