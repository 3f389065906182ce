//! Embeddings on a GPU.

use super::{Embedding, EmbeddingShape};
use crate::{
    DType,
    backend::{
        Backend, Mut, Ref, Stream,
        cuda::{Cuda, Launch, Teams, kernels},
    },
    ops::convert::tag,
};

kernels! { "embedding":
    NAMED embedding_forward(
        x: Mut, tokens: Ref, weight: Ref, positions: Option<Ref>,
        width: u32, sequence: u32, first_position: u32, scale: f32,
    );
    NAMED embedding_sort(order: Mut, starts: Mut, tokens: Ref, rows: u32, vocabulary: u32);
    NAMED embedding_windows(
        dweight: Mut, sum_type: u32, partials: Mut, dx: Ref, tokens: Ref, order: Ref,
        rows: u32, window: u32, width: u32, scale: f32,
    );
    NAMED embedding_join(
        dweight: Mut, sum_type: u32, partials: Ref, tokens: Ref, order: Ref, starts: Ref,
        rows: u32, window: u32, width: u32, warps: u32, scale: f32,
    );
    NAMED embedding_positions(
        dpositions: Mut, sum_type: u32, dx: Ref, rows: u64, sequence: u32, width: u32, warps: u32,
    );
}

/// Tokens of the vocabulary that a block of `embedding_sort` sorts, one a thread.
const BINS: usize = 512;

/// Windows that the sorted rows are cut into, about, and the fewest and most rows of one: enough blocks to fill a GPU,
/// and few windows for a token that is everywhere. By the shape alone, so that results do not depend on the device.
const WINDOWS: usize = 512;
const FEWEST_ROWS: usize = 32;
const MOST_ROWS: usize = 256;

/// Warps of a block whose teams add up.
const WARPS: usize = 8;

impl Embedding for Cuda {
    fn embed(
        &self,
        x: Mut<'_, Self>,
        tokens: Ref<'_, Self>,
        weight: Ref<'_, Self>,
        positions: Option<Ref<'_, Self>>,
        shape: EmbeddingShape,
    ) {
        let EmbeddingShape { rows, width, sequence, start, scale } = shape;
        assert!(x.len() == rows * width && tokens.len() == rows);
        let launch = Launch::pieces(rows, width.div_ceil(self.piece()));
        let (width, sequence, start, scale) = (width as u32, sequence as u32, start as u32, scale as f32);
        embedding_forward(self, launch, x, tokens, weight, positions, width, sequence, start, scale);
    }

    fn embed_backward(
        &self,
        mut dweight: Mut<'_, Self>,
        dpositions: Option<Mut<'_, Self>>,
        dx: Ref<'_, Self>,
        tokens: Ref<'_, Self>,
        shape: EmbeddingShape,
        accumulate: bool,
    ) {
        let EmbeddingShape { rows, width, sequence, start, scale } = shape;
        assert!(dx.len() == rows * width && tokens.len() == rows && start == 0 && rows < i32::MAX as usize);
        let known = |dtype| dtype == DType::F32 || dtype == DType::BF16 && self.compute() == DType::BF16;
        assert!(known(dweight.dtype()), "sums in {}", dweight.dtype());
        let sum_type = tag(dweight.dtype());
        let (vocabulary, pieces) = (dweight.len() / width, width.div_ceil(self.piece()));
        if !accumulate {
            self.zero(Stream::Compute, dweight.reborrow());
        }
        let window = rows.div_ceil(WINDOWS).clamp(FEWEST_ROWS, MOST_ROWS);
        let windows = rows.div_ceil(window);
        // Partial sums first, on their border of 16 bytes. All of them have elements of four bytes.
        let partials = windows * 2 * width;
        let workspace = self.workspace(DType::U32, partials + rows + vocabulary + 1);
        let (mut partials, rest) = workspace.split(partials);
        let (mut order, mut starts) = rest.split(rows);
        let launch = Launch::blocks(vocabulary.div_ceil(BINS)).threads(BINS as u32);
        let (tokens_sorted, size) = (rows as u32, vocabulary as u32);
        embedding_sort(self, launch, order.reborrow(), starts.reborrow(), tokens, tokens_sorted, size);

        let (order, starts, launch) = (order.as_ref(), starts.as_ref(), Launch::pieces(windows, pieces));
        let (count, window, columns, scale) = (rows as u32, window as u32, width as u32, scale as f32);
        let (target, sums) = (dweight.reborrow(), partials.reborrow());
        embedding_windows(self, launch, target, sum_type, sums, dx, tokens, order, count, window, columns, scale);
        let teams = Teams::new(pieces, WARPS);
        let (launch, sums, warps) = (teams.launch(windows), partials.as_ref(), teams.warps as u32);
        embedding_join(
            self, launch, dweight, sum_type, sums, tokens, order, starts, count, window, columns, warps, scale,
        );
        if let Some(dpositions) = dpositions {
            let (launch, sum_type) = (teams.launch(dpositions.len() / width), tag(dpositions.dtype()));
            embedding_positions(self, launch, dpositions, sum_type, dx, rows as u64, sequence as u32, columns, warps);
        }
    }
}
