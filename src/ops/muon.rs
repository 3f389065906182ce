//! Muon: momentum orthogonalised by Newton–Schulz (Jordan et al., kellerjordan.github.io/posts/muon), for hidden
//! matrices.

use super::pieces::RowSettings;
use crate::backend::{Backend, Mut, Ref};

/// One matrix to update.
pub struct MuonMatrix<'a, B: Backend> {
    /// rows × columns, read by the forward pass.
    pub weight: Mut<'a, B>,
    /// Its master copy, if it is another tensor.
    pub master: Option<Mut<'a, B>>,
    /// First moment.
    pub first: Mut<'a, B>,
    /// Gradient.
    pub gradient: Ref<'a, B>,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub columns: usize,
    /// Learning-rate factor (shape factor included), decay, epsilon.
    pub settings: RowSettings,
}

/// Elements of scratch that [`Muon::muon`] needs for a matrix, in the compute type: two matrices of its size and two
/// squares of its smaller side.
pub fn scratch(rows: usize, columns: usize) -> usize {
    let small = rows.min(columns);
    2 * rows * columns + 2 * small * small
}

/// Muon's update.
pub trait Muon: Backend {
    /// m ← 0.95 m + g; u = g + 0.95 m (Nesterov); x = u / (‖u‖_F + eps); five times
    /// x ← a x + (b A + c A²) x with A = x xᵀ and (a, b, c) = (3.4445, −4.7750, 2.0315), on xᵀ when rows > columns;
    /// w ← w − lr·wd·w − lr·x. g is the gradient times Factor. Nothing if Skip is set. partial[0] = Σ of squared
    /// changes.
    fn muon(
        &self,
        matrix: MuonMatrix<'_, Self>,
        partial: Mut<'_, Self>,
        scratch: Mut<'_, Self>,
        scalars: Ref<'_, Self>,
    );
}
