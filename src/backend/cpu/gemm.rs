//! Matrix products: C ← β·C + α·A·B, with any strides, cut into tiles over the threads of a [`Pool`].
//!
//! The arithmetic is the `gemm` crate's (instruction set and cache sizes found at run time). Tiles depend on the shape
//! only, and so does the order in which an element's products are added, which is the same for all elements. So the
//! number of threads changes no bit, and equal rows of A or columns of B give equal bits (the copies of a widened
//! unit stay equal).
#![allow(unsafe_code, reason = "the gemm crate takes raw pointers, and tiles of C interleave in memory")]

use std::{marker::PhantomData, ops::Range};

use super::{math::Real, parallel::Pool};
use gemm_common::Parallelism;

/// The crate's product for an element type: m, n, k; C with column and row stride, and whether it is read; A and B with
/// theirs; the factors on C and on the product; conjugations; threads.
#[rustfmt::skip]
pub type Kernel<F> = unsafe fn(
    usize, usize, usize, *mut F, isize, isize, bool, *const F, isize, isize, *const F, isize, isize,
    F, F, bool, bool, bool, Parallelism,
);

/// Multiply-adds in a tile that one thread takes some 80 µs for: less is not worth handing out.
const TILE_WORK: usize = 3 << 21;
/// Tiles are not made smaller than this in either direction.
const TILE_SIDE: usize = 32;
/// Products added in one go. The crate chooses such a length by cache and tile size, but never cuts 512 or fewer, so
/// sums longer than this are cut here: its choice could differ between the tiles of one product.
const DEPTH: usize = 512;
/// More tiles than this are not made: larger tiles run nearer to the machine's peak.
const TILES: usize = 8;

/// A matrix: its elements, and the distances in elements between neighbours in a column and in a row.
pub(crate) type Matrix<'a, F> = (&'a [F], (usize, usize));
/// The same, to be written.
pub(crate) type MatrixMut<'a, F> = (&'a mut [F], (usize, usize));

/// C ← β·C + α·A·B on this thread, where A is m × k, B is k × n and C is m × n. With β = 0, C is not read.
///
/// # Panics
/// When a slice is shorter than its shape and strides say, or C's strides let two elements fall together.
pub(crate) fn gemm<F: Real>(
    shape: (usize, usize, usize),
    alpha: F,
    a: Matrix<F>,
    b: Matrix<F>,
    beta: F,
    c: MatrixMut<F>,
) {
    let (m, n, _) = shape;
    // SAFETY: one tile, all of C, which we borrow.
    unsafe { Product::new(shape, alpha, a, b, beta, c).tile(0..m, 0..n) };
}

/// [`gemm`] on all threads of the pool.
#[track_caller]
pub(crate) fn gemm_on<F: Real>(
    pool: &Pool,
    shape: (usize, usize, usize),
    alpha: F,
    a: Matrix<F>,
    b: Matrix<F>,
    beta: F,
    c: MatrixMut<F>,
) {
    let (m, n, _) = shape;
    let (rows, columns) = tile_shape(shape);
    // The last tile takes the remainder: a sliver would go through the crate's matrix-vector code, which adds in
    // another order.
    let (down, across) = ((m / rows).max(1), (n / columns).max(1));
    let range =
        |i: usize, count: usize, size: usize, all: usize| i * size..if i + 1 < count { (i + 1) * size } else { all };
    let product = Product::new(shape, alpha, a, b, beta, c);
    pool.for_tasks(down * across, |i| {
        // SAFETY: tiles of different tasks share no element of C, and every task runs once.
        unsafe { product.tile(range(i / across, down, rows, m), range(i % across, across, columns, n)) };
    });
}

/// Rows and columns of a tile: C halved along its longer side until a tile is small enough. The shape alone decides.
fn tile_shape((m, n, k): (usize, usize, usize)) -> (usize, usize) {
    let work = |(rows, columns): (usize, usize)| rows.saturating_mul(columns).saturating_mul(k);
    let enough = TILE_WORK.max(work((m, n)) / TILES);
    let mut tile = (m.max(1), n.max(1));
    while work(tile) > enough && tile.0.max(tile.1) > TILE_SIDE {
        let longer = if tile.0 >= tile.1 { &mut tile.0 } else { &mut tile.1 };
        *longer = longer.div_ceil(2).next_multiple_of(16);
    }
    tile
}

/// A product whose operands have been checked, and whose tiles can be computed apart.
struct Product<'a, F> {
    k: usize,
    alpha: F,
    a: Matrix<'a, F>,
    b: Matrix<'a, F>,
    beta: F,
    c: *mut F,
    c_strides: (usize, usize),
    c_borrow: PhantomData<&'a mut [F]>,
}

// SAFETY: all that a shared product allows is `tile`, whose contract keeps threads to elements of their own; A and B
// are shared slices of plain numbers.
unsafe impl<F: Real> Sync for Product<'_, F> {}

impl<'a, F: Real> Product<'a, F> {
    fn new(
        (m, n, k): (usize, usize, usize),
        alpha: F,
        a: Matrix<'a, F>,
        b: Matrix<'a, F>,
        beta: F,
        (c, c_strides): MatrixMut<'a, F>,
    ) -> Self {
        assert!(fits(a.0.len(), (m, k), a.1), "A is shorter than its shape");
        assert!(fits(b.0.len(), (k, n), b.1), "B is shorter than its shape");
        assert!(fits(c.len(), (m, n), c_strides), "C is shorter than its shape");
        let (row, column) = c_strides;
        let row_major = column >= 1 && (m <= 1 || row > (n.max(1) - 1) * column);
        let column_major = row >= 1 && (n <= 1 || column > (m.max(1) - 1) * row);
        assert!(row_major || column_major, "elements of C fall together");
        Self { k, alpha, a, b, beta, c: c.as_mut_ptr(), c_strides, c_borrow: PhantomData }
    }

    /// Computes the elements of C in these rows and columns, which lie inside the shape.
    ///
    /// # Safety
    /// While this runs, no one else may touch these elements of C.
    unsafe fn tile(&self, rows: Range<usize>, columns: Range<usize>) {
        if rows.is_empty() || columns.is_empty() {
            return;
        }
        // With k = 0 one empty sum still scales C.
        for depth in (0..self.k.max(1)).step_by(DEPTH) {
            let beta = if depth == 0 { self.beta } else { F::ONE };
            // SAFETY: the same contract; `depth` is below k or both are zero.
            unsafe { self.add_products(&rows, &columns, depth..self.k.min(depth + DEPTH), beta) };
        }
    }

    /// C ← β·C + α·A·B for a tile and a range of k.
    ///
    /// # Safety
    /// The ranges lie inside the shape, and while this runs no one else may touch these elements of C.
    unsafe fn add_products(&self, rows: &Range<usize>, columns: &Range<usize>, depth: Range<usize>, beta: F) {
        let at = |row: usize, column: usize, strides: (usize, usize)| row * strides.0 + column * strides.1;
        let (((a, a_strides), (b, b_strides)), c_strides) = ((self.a, self.b), self.c_strides);
        let a = a.as_ptr().wrapping_add(at(rows.start, depth.start, a_strides));
        let b = b.as_ptr().wrapping_add(at(depth.start, columns.start, b_strides));
        let turned = |(row, column): (usize, usize)| (column, row);
        // The crate writes vectors down the columns of C, so a row-major product is taken as Cᵀ = Bᵀ·Aᵀ.
        let ((m, n), (lhs, lhs_strides), (rhs, rhs_strides), dst_strides) = if c_strides.1 < c_strides.0 {
            let (lhs, rhs) = ((b, turned(b_strides)), (a, turned(a_strides)));
            ((columns.len(), rows.len()), lhs, rhs, turned(c_strides))
        } else {
            ((rows.len(), columns.len()), (a, a_strides), (b, b_strides), c_strides)
        };
        // SAFETY: `new` has checked that element (row, column) of each operand, for every row and column of the whole
        // shape, lies inside its slice; the tile's are among them. So the offsets to the tile's first elements stay
        // inside, and so does all that the crate touches from there with the same strides and the tile's sizes, turned
        // or not: a turned product touches the same elements. (With k = 0, A and B have no elements: the crate reads
        // neither, and wrapping arithmetic on a pointer is harmless.) The tile's part of C is ours by this function's
        // contract. F is f32 or f64, which the crate supports.
        unsafe {
            F::kernel()(
                m,
                n,
                depth.len(),
                self.c.add(at(rows.start, columns.start, c_strides)),
                dst_strides.1 as isize,
                dst_strides.0 as isize,
                beta != F::ZERO,
                lhs,
                lhs_strides.1 as isize,
                lhs_strides.0 as isize,
                rhs,
                rhs_strides.1 as isize,
                rhs_strides.0 as isize,
                beta,
                self.alpha,
                false,
                false,
                false,
                Parallelism::None,
            );
        }
    }
}

/// Whether a slice of `len` elements holds a matrix of this shape and these strides.
fn fits(len: usize, (rows, columns): (usize, usize), (row, column): (usize, usize)) -> bool {
    let last = |count: usize, stride: usize| (count - 1).checked_mul(stride);
    rows == 0
        || columns == 0
        || last(rows, row)
            .and_then(|r| r.checked_add(last(columns, column)?))
            .is_some_and(|last| last < len && last < isize::MAX as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers in -0.5 .. 0.5 that look random.
    fn numbers<F: Real>(len: usize, seed: u32, from: fn(f64) -> F) -> Vec<F> {
        let mut x = seed;
        let mut next = || {
            x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            f64::from((x >> 8) as f32) / f64::from(1 << 24) - 0.5
        };
        (0..len).map(|_| from(next())).collect()
    }

    /// All shapes, layouts and scalars against the definition in f64; `epsilon` is the type's.
    fn against_definition<F: Real + Into<f64>>(from: fn(f64) -> F, epsilon: f64) {
        let pool = Pool::new(2).unwrap();
        let shapes = [(1, 1, 1), (1, 33, 7), (17, 1, 65), (5, 3, 2), (33, 47, 1), (31, 65, 129), (130, 70, 600)];
        for ((m, n, k), layout) in shapes.into_iter().flat_map(|s| (0..8).map(move |l| (s, l))) {
            // Bit i of the layout: operand i is column-major. Rows are two elements longer than they need be.
            let strides = |bit: usize, rows: usize, columns: usize| {
                if layout >> bit & 1 == 0 { (columns + 2, 1) } else { (1, rows + 2) }
            };
            let (sa, sb, sc) = (strides(0, m, k), strides(1, k, n), strides(2, m, n));
            let a = numbers((m + 2) * (k + 2), 1, from);
            let b = numbers((k + 2) * (n + 2), 2, from);
            let before = numbers((m + 2) * (n + 2), 3, from);
            for (alpha, beta) in [(1.0, 0.0), (1.0, 1.0), (-0.5, 2.0), (0.0, 0.5)] {
                let mut c = before.clone();
                gemm_on(&pool, (m, n, k), from(alpha), (&a, sa), (&b, sb), from(beta), (&mut c, sc));
                let mut expected = before.iter().map(|&x| x.into()).collect::<Vec<f64>>();
                for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
                    let product: f64 =
                        (0..k).map(|p| a[i * sa.0 + p * sa.1].into() * b[p * sb.0 + j * sb.1].into()).sum();
                    let e = &mut expected[i * sc.0 + j * sc.1];
                    *e = alpha * product + beta * *e;
                }
                // Rounding of a sum of k products below 1/4, twice over for the two scalings; untouched elements too.
                let bound = epsilon * (0.25 * k as f64 + 2.0);
                assert!(c.iter().zip(&expected).all(|(&c, e)| (c.into() - e).abs() <= bound), "{m} {n} {k} {layout}");
            }
        }
    }

    #[test]
    fn agrees_with_the_definition() {
        against_definition::<f32>(|x| x as f32, f64::from(f32::EPSILON));
        against_definition::<f64>(|x| x, f64::EPSILON);
    }

    #[test]
    fn overwrites_what_is_not_a_number_when_beta_is_zero() {
        let (a, b, mut c) = (vec![1f32; 64 * 8], vec![2f32; 8 * 64], vec![f32::NAN; 64 * 64]);
        gemm((64, 64, 8), 1.0, (&a, (8, 1)), (&b, (64, 1)), 0.0, (&mut c, (64, 1)));
        assert!(c.iter().all(|&c| c == 16.0));
        gemm((64, 64, 0), 1.0, (&[], (0, 1)), (&[], (64, 1)), 0.0, (&mut c, (64, 1)));
        assert!(c.iter().all(|&c| c == 0.0));
    }

    #[test]
    fn bits_do_not_depend_on_the_number_of_threads() {
        let pools = [1, 2, 3, 7].map(|threads| Pool::new(threads).unwrap());
        for (m, n, k) in
            [(512, 192, 64), (300, 1000, 37), (97, 8193, 64), (192, 64, 2048), (64, 64, 2048), (129, 64, 1999)]
        {
            let (a, b) = (numbers(m * k, 4, |x| x as f32), numbers(k * n, 5, |x| x as f32));
            for (sa, sb) in [((k, 1), (1, k)), ((k, 1), (n, 1)), ((1, m), (n, 1))] {
                let results = pools.each_ref().map(|pool| {
                    let mut c = vec![0f32; m * n];
                    gemm_on(pool, (m, n, k), 1.0, (&a, sa), (&b, sb), 0.0, (&mut c, (n, 1)));
                    c
                });
                assert!(results.iter().all(|r| *r == results[0]));
            }
        }
    }

    /// Widening copies units; their copies must stay equal, bit for bit, wherever they lie in a matrix.
    #[test]
    fn equal_rows_and_columns_give_equal_elements() {
        let pool = Pool::new(2).unwrap();
        let (m, n) = (161, 205);
        for (k, sides) in [(7, (5, 8)), (64, (40, 50)), (600, (80, 100)), (2048, (32, 40)), (2048, (7, 5))] {
            let (a, b) = (numbers(sides.0 * k, 6, |x| x as f32), numbers(sides.1 * k, 7, |x| x as f32));
            let wide_a: Vec<f32> = (0..m).flat_map(|i| a[i % sides.0 * k..][..k].to_vec()).collect();
            let wide_b: Vec<f32> = (0..n).flat_map(|j| b[j % sides.1 * k..][..k].to_vec()).collect();
            let transposed = |x: &[f32], rows: usize| -> Vec<f32> {
                (0..k).flat_map(|p| (0..rows).map(move |i| x[i * k + p])).collect()
            };
            let (a_t, b_t) = (transposed(&wide_a, m), transposed(&wide_b, n));
            for (a, b) in [
                ((&wide_a[..], (k, 1)), (&wide_b[..], (1, k))),
                ((&wide_a[..], (k, 1)), (&b_t[..], (n, 1))),
                ((&a_t[..], (1, m)), (&b_t[..], (n, 1))),
            ] {
                let mut c = vec![0f32; m * n];
                gemm_on(&pool, (m, n, k), 1.0, a, b, 0.0, (&mut c, (n, 1)));
                for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
                    assert_eq!(c[i * n + j], c[i % sides.0 * n + j % sides.1], "{k}: {i}, {j}");
                }
            }
        }
    }

    #[test]
    fn tiles_cover_the_benchmark_with_work_for_two_threads() {
        for d in [64, 128, 256] {
            for shape in [(2048, 3 * d, d), (2048, d, d), (d, d, 2048), (4 * d, d, 2048), (256, 8192, d)] {
                let (rows, columns) = tile_shape(shape);
                let tiles = shape.0.div_ceil(rows) * shape.1.div_ceil(columns);
                assert!((2..=2 * TILES).contains(&tiles), "{shape:?}: {tiles}");
            }
        }
        assert_eq!(tile_shape((10, 20, 30)), (10, 20));
        assert_eq!(tile_shape((0, 0, 5)), (1, 1));
    }

    #[test]
    #[should_panic(expected = "C is shorter")]
    fn a_short_slice_is_refused() {
        gemm((2, 2, 1), 1.0, (&[1f32; 2], (1, 1)), (&[1.0; 2], (2, 1)), 0.0, (&mut [0.0; 3], (2, 1)));
    }

    #[test]
    #[should_panic(expected = "fall together")]
    fn overlapping_elements_are_refused() {
        gemm((2, 2, 1), 1.0, (&[1f32; 2], (1, 1)), (&[1.0; 2], (2, 1)), 0.0, (&mut [0.0; 9], (1, 1)));
    }
}
