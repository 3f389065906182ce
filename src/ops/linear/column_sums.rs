//! Sums over the rows of a matrix: the gradient of a bias.

use crate::{
    DType,
    backend::{
        Backend, Mut, Ref,
        cuda::{Cuda, Launch, kernels},
    },
    ops::convert::tag,
};

kernels! { "linear":
    NAMED partial_column_sums(partials: Mut, x: Ref, rows: u64, columns: u32, rows_per_block: u32, wide: u32);
    NAMED add_partials(out: Mut, out_type: u32, partials: Ref, rows: u32, columns: u32, add: u32);
}

/// Rows of a partial sum: by the shape alone, so that results do not depend on the device.
const ROWS: usize = 128;
/// Threads of a block side by side.
const ACROSS: usize = 32;

/// out[c] = Σ over rows of x[r, c], or with `add` out[c] += that; out is f32 or bf16, x of the compute type, read 16 bytes
/// at once where it lies on such borders. Summed in f32. In a fixed order, the same for all columns.
pub(in crate::ops) fn column_sums(
    cuda: &Cuda,
    out: Mut<'_, Cuda>,
    x: Ref<'_, Cuda>,
    rows: usize,
    columns: usize,
    add: bool,
) {
    assert!(x.dtype() == cuda.compute() && x.len() == rows * columns);
    assert!(matches!(out.dtype(), DType::F32 | DType::BF16), "sums in {}", out.dtype());
    let pack = 16 / x.dtype().size();
    let wide = columns.is_multiple_of(pack) && x.address().is_multiple_of(16);
    let (across, blocks) = (if wide { ACROSS * pack } else { ACROSS }, rows.div_ceil(ROWS));
    // Rows beyond what a grid can have side by side would be a batch of eight million tokens.
    let launch = Launch::grid(columns.div_ceil(across), blocks, 1);
    let mut partials = cuda.workspace(DType::F32, blocks * columns);
    let (x_rows, columns_u32, wide) = (rows as u64, columns as u32, u32::from(wide));
    partial_column_sums(cuda, launch, partials.reborrow(), x, x_rows, columns_u32, ROWS as u32, wide);
    let launch = Launch::blocks(columns.div_ceil(ACROSS));
    let out_type = tag(out.dtype());
    add_partials(cuda, launch, out, out_type, partials.as_ref(), blocks as u32, columns_u32, u32::from(add));
}
