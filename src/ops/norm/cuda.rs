//! Norms on a GPU.

use super::{Norm, NormKind, NormShape, Residual};
use crate::{
    DType,
    backend::{
        Mut, Ref,
        cuda::{Cuda, Launch, Teams, kernels, warps},
    },
    ops::convert::tag,
};

kernels! { "norm":
    NAMED norm_forward(
        y: Mut, statistics: Mut, x: Ref, sum: Option<Mut>, branch: Option<Ref>, gain: Ref, bias: Option<Ref>,
        rows: u64, width: u32, kind: u32, scale: f32, eps: f32,
    );
    NAMED norm_forward_long(
        y: Mut, statistics: Mut, x: Ref, sum: Option<Mut>, branch: Option<Ref>, gain: Ref, bias: Option<Ref>,
        width: u32, kind: u32, scale: f32, eps: f32,
    );
    NAMED norm_backward_sums(sums: Mut, dy: Ref, x: Ref, statistics: Ref, gain: Ref, width: u32);
    NAMED norm_backward(
        dx: Mut, partials: Mut, dy: Ref, x: Ref, statistics: Ref, sums: Option<Ref>, gain: Ref,
        rows: u64, rows_per_block: u32, warps: u32, width: u32, sides: u32, kind: u32, overwrite: u32,
    );
    NAMED add_up(first: Mut, second: Option<Mut>, sum_type: u32, partials: Ref, count: u64, width: u32);
    NAMED norm_add(target: Mut, x: Ref, branch: Ref, n: u64, scale: f32);
    NAMED norm_scale(x: Mut, n: u64, scale: f32);
}

/// Elements of a row that a thread holds, and the longest row that a warp normalises by itself.
const HELD: usize = 16;
const WARP_ROW: usize = 32 * HELD;

/// Most threads of a block of `norm_forward_long`; warps of one of `norm_backward`.
const LONG: usize = 512;
const WARPS: usize = 12;

/// Blocks that backward cuts the rows into, or fewer: by the shape alone, so that results do not depend on the device.
/// With two blocks on a multiprocessor it fills a GPU of 132 of them about twice. A team has four rows or more, so that
/// partial sums are few beside the rows.
const BLOCKS: usize = 512;
const TEAM_ROWS: usize = 4;

impl Norm for Cuda {
    fn norm(
        &self,
        y: Mut<'_, Self>,
        statistics: Mut<'_, Self>,
        x: Ref<'_, Self>,
        residual: Option<Residual<'_, Self>>,
        gain: Ref<'_, Self>,
        bias: Option<Ref<'_, Self>>,
        shape: NormShape,
    ) {
        let NormShape { rows, width, kind, eps } = shape;
        let len = rows * width;
        assert!(y.len() == len && x.len() == len && statistics.len() == 2 * rows && gain.len() == width);
        let (sum, branch, scale) = match residual {
            Some(Residual { sum, branch, scale }) => (Some(sum), Some(branch), scale as f32),
            None => (None, None, 0.0),
        };
        assert!(sum.as_ref().is_none_or(|sum| sum.len() == len) && branch.is_none_or(|branch| branch.len() == len));
        let (columns, kind, eps) = (width as u32, number(kind), eps as f32);
        if width <= WARP_ROW {
            let (launch, rows) = (Launch::blocks(rows.div_ceil(8)), rows as u64);
            norm_forward(self, launch, y, statistics, x, sum, branch, gain, bias, rows, columns, kind, scale, eps);
        } else {
            let launch = Launch::blocks(rows).threads(warps(width.div_ceil(HELD)).min(LONG as u32));
            norm_forward_long(self, launch, y, statistics, x, sum, branch, gain, bias, columns, kind, scale, eps);
        }
    }

    fn norm_backward(
        &self,
        dx: Mut<'_, Self>,
        dgain: Mut<'_, Self>,
        dbias: Option<Mut<'_, Self>>,
        dy: Ref<'_, Self>,
        x: Ref<'_, Self>,
        statistics: Ref<'_, Self>,
        gain: Ref<'_, Self>,
        shape: NormShape,
        overwrite: bool,
    ) {
        let NormShape { rows, width, kind, .. } = shape;
        assert!(dx.len() == rows * width && dy.len() == rows * width && x.len() == rows * width);
        assert!(statistics.len() == 2 * rows && gain.len() == width && dgain.len() == width);
        let teams = Teams::new(width.div_ceil(self.piece()), WARPS);
        let rows_per_block = rows.div_ceil(BLOCKS).max(TEAM_ROWS * teams.teams).next_multiple_of(teams.teams);
        let (blocks, sides) = (rows.div_ceil(rows_per_block), if dbias.is_some() { 2 } else { 1 });
        let (columns, kind) = (width as u32, number(kind));
        let sums = if teams.parts > 1 { 2 * rows } else { 0 };
        let (mut partials, mut sums) =
            self.workspace(DType::F32, blocks * sides * width + sums).split(blocks * sides * width);
        if teams.parts > 1 {
            let launch = Launch::blocks(rows).threads(LONG as u32);
            norm_backward_sums(self, launch, sums.reborrow(), dy, x, statistics, gain, columns);
        }
        let sums = (teams.parts > 1).then(|| sums.as_ref());
        norm_backward(
            self,
            teams.launch(blocks),
            dx,
            partials.reborrow(),
            dy,
            x,
            statistics,
            sums,
            gain,
            rows as u64,
            rows_per_block as u32,
            teams.warps as u32,
            columns,
            sides as u32,
            kind,
            u32::from(overwrite),
        );
        add_up_partials(self, dgain, dbias, partials.as_ref(), width);
    }

    fn add(&self, target: Mut<'_, Self>, x: Ref<'_, Self>, branch: Ref<'_, Self>, scale: f64) {
        let n = x.len();
        assert!(target.len() == n && branch.len() == n);
        norm_add(self, Launch::blocks(n.div_ceil(256 * self.piece())), target, x, branch, n as u64, scale as f32);
    }

    fn scale(&self, x: Mut<'_, Self>, scale: f64) {
        let n = x.len();
        norm_scale(self, Launch::blocks(n.div_ceil(256 * self.piece())), x, n as u64, scale as f32);
    }
}

/// The kind's number in the kernels.
fn number(kind: NormKind) -> u32 {
    match kind {
        NormKind::Layer => 0,
        NormKind::Rms => 1,
    }
}

/// Adds rows of partial sums, in order: `partials` is any number of rows × (`width` for `first`, as many for `second`),
/// f32; both are f32 or bf16.
pub(in crate::ops) fn add_up_partials(
    cuda: &Cuda,
    first: Mut<'_, Cuda>,
    second: Option<Mut<'_, Cuda>>,
    partials: Ref<'_, Cuda>,
    width: usize,
) {
    let sides = if second.is_some() { 2 } else { 1 };
    let sum_type = tag(first.dtype());
    assert!(
        matches!(first.dtype(), DType::F32 | DType::BF16) && second.as_ref().is_none_or(|s| s.dtype() == first.dtype())
    );
    let (count, launch) = (partials.len() / (sides * width), Launch::grid(width.div_ceil(32), sides, 1).threads(1024));
    add_up(cuda, launch, first, second, sum_type, partials, count as u64, width as u32);
}
