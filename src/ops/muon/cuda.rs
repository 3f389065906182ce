//! Muon on a GPU: Newton-Schulz by cuBLASLt's products in the compute type, everything else in f32.

use super::{Muon, MuonMatrix, QUINTIC, STEPS, on_border};
use crate::{
    DType,
    backend::{
        Backend, Mut, Ref, Stream,
        cuda::{Cuda, Launch, Matrix, kernels},
    },
    ops::{convert::tag, stochastic},
};

kernels! { "muon":
    NAMED muon_momentum(
        x: Mut, first: Mut, moment_type: u32, gradient: Ref, gradient_type: u32, sums: Mut, scalars: Ref,
        rounding: u64, at: u64, len: u64, chunk: u64,
    );
    NAMED muon_normalise(x: Mut, sums: Ref, count: u32, eps: f64, len: u64, chunk: u64);
    NAMED muon_apply(
        weight: Mut, master: Option<Mut>, x: Ref, sums: Mut, scalars: Ref, lr: f64, decay: f64, len: u64, chunk: u64,
    );
    NAMED muon_changes(partial: Mut, sums: Ref, count: u32);
}

/// Blocks of an elementwise pass, at the most: every block of the next pass adds what they leave.
const BLOCKS: usize = 1024;
/// Elements of a block, at the least.
const CHUNK: usize = 1024;

impl Muon for Cuda {
    fn muon(
        &self,
        matrix: MuonMatrix<'_, Self>,
        partial: Mut<'_, Self>,
        scratch: Mut<'_, Self>,
        scalars: Ref<'_, Self>,
    ) {
        let MuonMatrix { weight, master, first, gradient, offset, rows, columns, settings } = matrix;
        let len = rows * columns;
        assert!(gradient.len() == len && first.len() == len);
        self.assert_types(gradient.dtype(), Some(first.dtype()));
        assert!(master.is_some() || weight.dtype() == DType::F32, "weights of {} need a master copy", weight.dtype());
        let blocks = len.div_ceil(CHUNK).clamp(1, BLOCKS);
        let (launch, chunk) = (Launch::blocks(blocks), len.div_ceil(blocks) as u64);
        let (len, count) = (len as u64, blocks as u32);
        let (mut x, y, [a, b]) = parts(scratch, rows, columns);
        let mut sums = self.workspace(DType::F64, blocks);
        let (moment_type, gradient_type) = (tag(first.dtype()), tag(gradient.dtype()));
        let ([_, rounding], at, scratch) = (stochastic::stream(0.0).key(), offset as u64, x.reborrow());
        muon_momentum(
            self,
            launch,
            scratch,
            first,
            moment_type,
            gradient,
            gradient_type,
            sums.reborrow(),
            scalars,
            rounding,
            at,
            len,
            chunk,
        );
        muon_normalise(self, launch, x.reborrow(), sums.as_ref(), count, settings.eps, len, chunk);
        let update = self.orthogonalise(x, y, a, b, [rows, columns]);
        let mut sums = self.workspace(DType::F64, blocks);
        let (lr, decay) = (settings.lr, settings.decay);
        muon_apply(self, launch, weight, master, update.as_ref(), sums.reborrow(), scalars, lr, decay, len, chunk);
        muon_changes(self, Launch::blocks(1), partial, sums.as_ref(), count);
    }
}

type View<'a> = Mut<'a, Cuda>;

/// Two matrices and two squares.
fn parts(scratch: View<'_>, rows: usize, columns: usize) -> (View<'_>, View<'_>, [View<'_>; 2]) {
    let (len, square) = (rows * columns, rows.min(columns).pow(2));
    let (x, rest) = scratch.split(on_border(len));
    let (y, rest) = rest.split(on_border(len));
    let (a, b) = rest.split(on_border(square));
    (x.slice(0..len), y.slice(0..len), [a.slice(0..square), b.slice(0..square)])
}

impl Cuda {
    /// The Newton-Schulz steps on the matrix in `x`; returns where the result is, `x` or `y`.
    fn orthogonalise<'a>(
        &self,
        mut x: View<'a>,
        mut y: View<'a>,
        mut a: View<'_>,
        mut b: View<'_>,
        [rows, columns]: [usize; 2],
    ) -> View<'a> {
        let (small, large) = (rows.min(columns), rows.max(columns));
        let [c1, c3, c5] = QUINTIC;
        for _ in 0..STEPS {
            // The squares are those of the smaller side.
            let wide = Matrix::new(x.as_ref(), columns);
            let wide = if rows > columns { wide.transposed() } else { wide };
            self.gemm((a.reborrow(), small), wide, wide.transposed(), [small, small, large], (1.0, 0.0));
            self.copy(Stream::Compute, a.as_ref(), b.reborrow());
            let square = Matrix::new(a.as_ref(), small);
            self.gemm((b.reborrow(), small), square, square, [small; 3], (c5, c3));
            self.copy(Stream::Compute, x.as_ref(), y.reborrow());
            let (square, x_as_is) = (Matrix::new(b.as_ref(), small), Matrix::new(x.as_ref(), columns));
            let (left, right) = if rows > columns { (x_as_is, square.transposed()) } else { (square, x_as_is) };
            self.gemm((y.reborrow(), columns), left, right, [rows, columns, small], (1.0, c1));
            std::mem::swap(&mut x, &mut y);
        }
        x
    }
}
