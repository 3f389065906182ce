//! The readout on a GPU: chunks of logits by cuBLASLt, a pass that makes their losses and turns them into gradients, and
//! the products with those.

use super::{Head, ReadoutGradients, ReadoutShape};
use crate::{
    DType,
    backend::{
        ALIGNMENT, Backend, Mut, Ref,
        cuda::{Cuda, Epilogue, Launch, Matrix, kernels},
    },
    ops::{gradient::Gradient, linear::column_sums},
};

kernels! { "head":
    NAMED cross_entropy(
        losses: Mut, logits: Mut, targets: Ref, classes: u32, padded: u32, cached: u32, gradients: u32, scale: f32,
    );
    NAMED counted_rows(to: Mut, from: Ref, targets: Ref, width: u32);
}

/// Bytes of a chunk's logits. Every chunk reads and writes the gradient of the weight once more, so that chunks are
/// better large.
const CHUNK_BYTES: usize = 512 << 20;
/// Tokens of a chunk, at the most: a product with more of them is no faster.
const CHUNK_TOKENS: usize = 16_384;
/// Chunks are whole tiles of a product, and start on a border.
const TILE: usize = 128;

/// Tokens of a chunk: all chunks but the last are equal.
fn chunk(shape: ReadoutShape, compute: DType) -> usize {
    let most = (CHUNK_BYTES / (shape.padded * compute.size())).clamp(1, CHUNK_TOKENS);
    shape.rows.div_ceil(shape.rows.div_ceil(most).max(1)).next_multiple_of(TILE)
}

/// Elements of a chunk's logits, rounded up so that what follows them starts on a border.
fn logits_len(tokens: usize, shape: ReadoutShape) -> usize {
    (tokens * shape.padded).next_multiple_of(ALIGNMENT / 2)
}

/// Elements of a chunk's counted rows, rounded up likewise.
fn counted_len(tokens: usize, shape: ReadoutShape) -> usize {
    (tokens * shape.width).next_multiple_of(ALIGNMENT / 2)
}

impl Head for Cuda {
    fn cross_entropy_scratch(&self, shape: ReadoutShape) -> usize {
        let chunk = chunk(shape, self.compute());
        let tokens = chunk.min(shape.rows);
        // What several chunks give is summed in f32, whatever gradients are kept in.
        let sums = self.gradient() != DType::F32 && chunk < shape.rows;
        let sums = if sums { shape.padded * (shape.width + 1) * DType::F32.size() } else { 0 };
        logits_len(tokens, shape) + counted_len(tokens, shape) + sums / self.compute().size()
    }

    fn cross_entropy(
        &self,
        losses: Mut<'_, Self>,
        gradients: Option<ReadoutGradients<'_, Self>>,
        scratch: Mut<'_, Self>,
        x: Ref<'_, Self>,
        weight: Ref<'_, Self>,
        bias: Option<Ref<'_, Self>>,
        targets: Ref<'_, Self>,
        shape: ReadoutShape,
    ) {
        let chunk = chunk(shape, self.compute());
        let tokens = chunk.min(shape.rows);
        let (logits, rest) = scratch.split(logits_len(tokens, shape));
        let (counted, sums) = rest.split(counted_len(tokens, shape));
        let inputs = Inputs { x, weight, bias, targets, shape, chunk };
        match gradients {
            Some(gradients) if chunk < shape.rows && gradients.dweight.dtype() != DType::F32 => {
                let ReadoutGradients { dx, dweight, dbias, scale } = gradients;
                let (mut weights, biases) = sums.retyped(DType::F32).split(dweight.len());
                let mut biases = dbias.as_ref().map(|dbias| biases.slice(0..dbias.len()));
                let (of_weights, of_biases) = (weights.reborrow(), biases.as_mut().map(Mut::reborrow));
                let summed = ReadoutGradients { dx, dweight: of_weights, dbias: of_biases, scale };
                self.chunks(losses, Some(summed), logits, counted, inputs);
                self.accumulate(dweight, weights.as_ref(), false);
                if let (Some(dbias), Some(sums)) = (dbias, biases) {
                    self.accumulate(dbias, sums.as_ref(), false);
                }
            }
            gradients => self.chunks(losses, gradients, logits, counted, inputs),
        }
    }

    fn logits(
        &self,
        logits: Mut<'_, Self>,
        x: Ref<'_, Self>,
        weight: Ref<'_, Self>,
        bias: Option<Ref<'_, Self>>,
        shape: ReadoutShape,
    ) {
        self.chunk_logits((logits, shape.classes), x, weight, bias, shape);
    }
}

/// What is read, and how many tokens at a time.
struct Inputs<'a> {
    x: Ref<'a, Cuda>,
    weight: Ref<'a, Cuda>,
    bias: Option<Ref<'a, Cuda>>,
    targets: Ref<'a, Cuda>,
    shape: ReadoutShape,
    chunk: usize,
}

impl Cuda {
    /// Losses and gradients, chunk by chunk.
    fn chunks(
        &self,
        mut losses: Mut<'_, Self>,
        mut gradients: Option<ReadoutGradients<'_, Self>>,
        mut logits: Mut<'_, Self>,
        mut counted: Mut<'_, Self>,
        Inputs { x, weight, bias, targets, shape, chunk }: Inputs<'_>,
    ) {
        let ReadoutShape { rows, width, padded, .. } = shape;
        for start in (0..rows).step_by(chunk) {
            let tokens = start..rows.min(start + chunk);
            let (x, targets) = (x.slice(tokens.start * width..tokens.end * width), targets.slice(tokens.clone()));
            let mut logits = logits.reborrow().slice(0..tokens.len() * padded);
            self.chunk_logits((logits.reborrow(), padded), x, weight, bias, shape);
            let losses = losses.reborrow().slice(tokens.clone());
            let scale = gradients.as_ref().map(|gradients| gradients.scale);
            self.chunk_losses(losses, logits.reborrow(), targets, shape, scale);
            if let Some(gradients) = &mut gradients {
                let mut counted = counted.reborrow().slice(0..x.len());
                let launch = Launch::blocks(tokens.len());
                counted_rows(self, launch, counted.reborrow(), x, targets, width as u32);
                self.chunk_gradients(gradients, start, logits.as_ref(), counted.as_ref(), weight, shape);
            }
        }
    }

    /// The logits of as many classes as a row of them has elements.
    fn chunk_logits(
        &self,
        (logits, columns): (Mut<'_, Self>, usize),
        x: Ref<'_, Self>,
        weight: Ref<'_, Self>,
        bias: Option<Ref<'_, Self>>,
        ReadoutShape { width, scale, .. }: ReadoutShape,
    ) {
        let (size, weight) = ([x.len() / width, columns, width], Matrix::new(weight, width).transposed());
        let epilogue = bias.map_or(Epilogue::Plain, Epilogue::Bias);
        self.gemm_with((logits, columns), Matrix::new(x, width), weight, size, (scale, 0.0), epilogue);
    }

    /// Losses; with the factor on a token's loss the logits become their gradients.
    fn chunk_losses(
        &self,
        losses: Mut<'_, Self>,
        logits: Mut<'_, Self>,
        targets: Ref<'_, Self>,
        ReadoutShape { classes, padded, .. }: ReadoutShape,
        scale: Option<f64>,
    ) {
        let size = self.compute().size();
        let pack = if padded.is_multiple_of(16 / size) { 16 / size } else { 1 };
        let threads = padded.div_ceil(pack).next_multiple_of(32).min(512) as u32;
        // So much that two blocks fit on a multiprocessor, with what the driver and the kernel take themselves.
        let most = (self.shared_limit() / 2 - 2048) / size / pack * pack;
        let cached = if scale.is_some() { padded.min(most) } else { 0 };
        let launch = Launch::blocks(targets.len()).threads(threads).shared(cached * size);
        let (gradients, scale) = (u32::from(scale.is_some()), scale.unwrap_or(0.0) as f32);
        let (classes, padded, cached) = (classes as u32, padded as u32, cached as u32);
        cross_entropy(self, launch, losses, logits, targets, classes, padded, cached, gradients, scale);
    }

    /// From the gradients of a chunk's logits: dx, and what the chunk, whose first token is `start`, adds to the others.
    fn chunk_gradients(
        &self,
        gradients: &mut ReadoutGradients<'_, Self>,
        start: usize,
        dlogits: Ref<'_, Self>,
        x: Ref<'_, Self>,
        weight: Ref<'_, Self>,
        ReadoutShape { width, padded, scale, .. }: ReadoutShape,
    ) {
        let (tokens, left) = (x.len() / width, Matrix::new(dlogits, padded));
        let dx = gradients.dx.reborrow().slice(start * width..(start + tokens) * width);
        self.gemm((dx, width), left, Matrix::new(weight, width), [tokens, width, padded], (scale, 0.0));
        let (dweight, add) = (gradients.dweight.reborrow(), start > 0);
        let (size, factors) = ([padded, width, tokens], (scale, f64::from(u8::from(add))));
        self.gemm((dweight, width), left.transposed(), Matrix::new(x, width), size, factors);
        if let Some(dbias) = &mut gradients.dbias {
            column_sums(self, dbias.reborrow(), dlogits, tokens, padded, add);
        }
    }
}
