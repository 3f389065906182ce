//! Provisional.
use super::{parallel::{Pool, RowsMut}, Real};
pub(crate) type Strides = (usize, usize);
pub(crate) fn row_major(columns: usize) -> Strides { (columns, 1) }
pub(crate) fn par_gemm<F: Real>(pool: &Pool, (m, n, k): (usize, usize, usize), alpha: F, a: (&[F], Strides), b: (&[F], Strides), beta: F, c: (&mut [F], Strides)) {
    assert!(c.1 == (n, 1) && c.0.len() == m * n);
    pool.for_rows(RowsMut::new(c.0, n), 64, |range, c| for (i, row) in range.zip(c.chunks_mut(n)) {
        for (j, c) in row.iter_mut().enumerate() {
            let mut s = F::ZERO;
            for p in 0..k { s += a.0[i * a.1.0 + p * a.1.1] * b.0[p * b.1.0 + j * b.1.1]; }
            *c = if beta == F::ZERO { alpha * s } else { beta * *c + alpha * s };
        }
    });
}
