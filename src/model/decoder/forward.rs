//! The decoder's forward pass: the same for training, evaluation and generation.

use super::{
    Activations, BlockRows, Decoder, Layer,
    activations::{Inner, Parts},
};
use crate::{
    backend::{Mut, Ref, Stream, Tensor},
    model::{Batch, MicroBatch, Weights, spec::FeedForward},
    ops::{
        Ops,
        attention::{AttentionShape, Strided},
        embedding::EmbeddingShape,
        norm::Residual,
    },
    trace::Lane,
};

/// What a forward pass is over: the first positions of a batch, perhaps behind others whose keys and values are cached.
pub(super) struct Pass<'a, B: Ops> {
    pub batch: &'a Batch<B>,
    pub micro: MicroBatch,
    /// Rows of Q, K and V of all tokens so far, for each block (context × row), and the number of tokens so far. Only
    /// with one sequence.
    pub cache: Option<(&'a mut [Tensor<B>], usize)>,
}

impl<'a, B: Ops> Pass<'a, B> {
    /// A pass over a whole batch.
    pub fn new(batch: &'a Batch<B>, micro: MicroBatch) -> Self {
        Self { batch, micro, cache: None }
    }

    pub fn rows(&self) -> usize {
        self.micro.rows()
    }

    /// Tokens that stand before.
    pub fn start(&self) -> usize {
        self.cache.as_ref().map_or(0, |(_, start)| *start)
    }
}

impl<B: Ops> Decoder<B> {
    /// From tokens to the normalised residual stream at the end, `acts.norm`.
    pub(super) fn forward(&self, backend: &B, w: Weights<'_, B>, acts: &mut Activations<B>, pass: &mut Pass<'_, B>) {
        let _forward = backend.span(Stream::Compute, Lane::Compute, "forward");
        let (a, rows) = (&mut acts.0, pass.rows());
        let positions = self.rows.positions.as_ref().map(|p| w.get(p));
        let tokens = pass.batch.inputs.slice(0..rows);
        let shape = self.embedding_shape(pass.micro, pass.start());
        backend.embed(self.stream_mut(&mut a.x[0], rows), tokens, w.get(&self.rows.embedding), positions, shape);
        for l in 0..self.spec.layers {
            self.block_input(backend, w, a, l, rows);
            self.attention_half(backend, w, a, l, pass);
            self.mlp_half(backend, w, a, l, rows);
        }
        let (x, last) = (a.x.len() - 1, slot(&a.inner, self.spec.layers - 1));
        let residual = Residual {
            sum: self.stream_mut(&mut a.x[x], rows),
            branch: self.stream(&a.branch, rows),
            scale: self.spec.alphas.residual,
        };
        let middle = self.stream(&a.inner[last].middle, rows);
        self.normalise(backend, w, &self.rows.norm, (&mut a.norm, &mut a.statistics), middle, Some(residual), rows);
    }

    pub(super) fn embedding_shape(&self, micro: MicroBatch, start: usize) -> EmbeddingShape {
        let (rows, sequence) = (micro.rows(), micro.length);
        EmbeddingShape { rows, width: self.width(), sequence, start, scale: self.spec.alphas.embedding }
    }

    /// The first `rows` rows of a tensor as wide as the residual stream.
    fn stream<'t>(&self, tensor: &'t Tensor<B>, rows: usize) -> Ref<'t, B> {
        tensor.slice(0..rows * self.width())
    }

    fn stream_mut<'t>(&self, tensor: &'t mut Tensor<B>, rows: usize) -> Mut<'t, B> {
        tensor.slice_mut(0..rows * self.width())
    }

    fn normalise(
        &self,
        backend: &B,
        w: Weights<'_, B>,
        layer: &Layer,
        (y, statistics): (&mut Tensor<B>, &mut Tensor<B>),
        x: Ref<'_, B>,
        residual: Option<Residual<'_, B>>,
        rows: usize,
    ) {
        let (y, statistics) = (self.stream_mut(y, rows), statistics.slice_mut(0..2 * rows));
        let (gain, bias) = (w.get(&layer.weight), layer.bias.as_ref().map(|b| w.get(b)));
        backend.norm(y, statistics, x, residual, gain, bias, self.norm_shape(rows));
    }

    fn apply(
        &self,
        backend: &B,
        w: Weights<'_, B>,
        layer: &Layer,
        y: Mut<'_, B>,
        x: Ref<'_, B>,
        (rows, inputs, outputs): (usize, usize, usize),
    ) {
        let bias = layer.bias.as_ref().map(|b| w.get(b));
        backend.linear(y, x, w.get(&layer.weight), bias, self.linear_shape(rows, inputs, outputs));
    }

    /// Adds what the block before returned to the residual stream, and normalises it: `x[l]`, `norm1`.
    fn block_input(&self, backend: &B, w: Weights<'_, B>, a: &mut Parts<Tensor<B>>, l: usize, rows: usize) {
        if l == 0 {
            return self.block_input_again(backend, w, a, l, rows);
        }
        let (before, here, x) = (slot(&a.inner, l - 1), slot(&a.inner, l), slot(&a.x, l));
        let residual = Residual {
            sum: self.stream_mut(&mut a.x[x], rows),
            branch: self.stream(&a.branch, rows),
            scale: self.spec.alphas.residual,
        };
        let layer = &self.rows.blocks[l].norm1;
        // One block's activations may serve all of them.
        let (low, high) = a.inner.split_at_mut(here);
        let Inner { norm1, statistics1, middle, .. } = &mut high[0];
        let middle = if before == here { &*middle } else { &low[before].middle };
        self.normalise(backend, w, layer, (norm1, statistics1), self.stream(middle, rows), Some(residual), rows);
    }

    /// `norm1` from `x[l]` as it stands: for the first block, and where backward computes a block again.
    pub(super) fn block_input_again(
        &self,
        backend: &B,
        w: Weights<'_, B>,
        a: &mut Parts<Tensor<B>>,
        l: usize,
        rows: usize,
    ) {
        let (here, x) = (slot(&a.inner, l), slot(&a.x, l));
        let (layer, inner) = (&self.rows.blocks[l].norm1, &mut a.inner[here]);
        let x = self.stream(&a.x[x], rows);
        self.normalise(backend, w, layer, (&mut inner.norm1, &mut inner.statistics1), x, None, rows);
    }

    /// From `norm1` to `middle` and `norm2`.
    pub(super) fn attention_half(
        &self,
        backend: &B,
        w: Weights<'_, B>,
        a: &mut Parts<Tensor<B>>,
        l: usize,
        pass: &mut Pass<'_, B>,
    ) {
        let (rows, width, block) = (pass.rows(), self.width(), &self.rows.blocks[l]);
        let (here, x) = (slot(&a.inner, l), slot(&a.x, l));
        let inner = &mut a.inner[here];
        self.attend(backend, w, block, inner, l, pass);
        let attended = self.heads().queries();
        let (branch, attention) = (self.stream_mut(&mut a.branch, rows), inner.attention.slice(0..rows * attended));
        self.apply(backend, w, &block.output, branch, attention, (rows, attended, width));
        let residual = Residual {
            sum: self.stream_mut(&mut inner.middle, rows),
            branch: self.stream(&a.branch, rows),
            scale: self.spec.alphas.residual,
        };
        let x = self.stream(&a.x[x], rows);
        let target = (&mut inner.norm2, &mut inner.statistics2);
        self.normalise(backend, w, &block.norm2, target, x, Some(residual), rows);
    }

    /// From `norm1` to `attention`, with Q, K and V in the block's activations or in the cache.
    fn attend(
        &self,
        backend: &B,
        w: Weights<'_, B>,
        block: &BlockRows,
        inner: &mut Inner<Tensor<B>>,
        l: usize,
        pass: &mut Pass<'_, B>,
    ) {
        let (rows, heads, start, length) = (pass.rows(), self.heads(), pass.start(), pass.micro.length);
        let qkv = match &mut pass.cache {
            Some((cache, _)) => &mut cache[l],
            None => &mut inner.qkv,
        };
        let new = start * heads.row()..(start + rows) * heads.row();
        let (x, size) = (inner.norm1.slice(0..rows * self.width()), (rows, self.width(), heads.row()));
        let rotation = self.rotation(length, start);
        match (&mut inner.projected, &mut inner.head_statistics, &block.qk_norm) {
            (Some(projected), Some(statistics), Some((q, k))) => {
                let all = 0..rows * heads.row();
                self.apply(backend, w, &block.qkv, projected.slice_mut(all.clone()), x, size);
                let statistics = statistics.slice_mut(0..rows * heads.kv_heads * (heads.group + 1));
                let (out, eps) = (qkv.slice_mut(new.clone()), self.spec.norm_eps);
                backend.head_norm(out, statistics, projected.slice(all), w.get(q), w.get(k), rotation, heads, eps);
            }
            _ => {
                self.apply(backend, w, &block.qkv, qkv.slice_mut(new.clone()), x, size);
                if let Some(rotation) = rotation {
                    backend.rotate(qkv.slice_mut(new.clone()), rotation, heads, false);
                }
            }
        }
        let part = |from: usize| Strided { view: qkv.slice(from..new.end), stride: heads.row(), rows: start + length };
        let (q, k, v) = (part(new.start), part(heads.queries()), part(heads.queries() + heads.keys()));
        let first_key = pass.batch.first_key.as_ref().map(|f| f.slice(0..rows));
        let out = inner.attention.slice_mut(0..rows * heads.queries());
        let sums = inner.log_sum_exp.slice_mut(0..rows * heads.kv_heads * heads.group);
        let shape = AttentionShape { keys: start + length, ..self.attention_shape(pass.micro) };
        backend.attention(out, sums, q, k, v, first_key, shape);
    }

    /// From `norm2` to `branch`.
    fn mlp_half(&self, backend: &B, w: Weights<'_, B>, a: &mut Parts<Tensor<B>>, l: usize, rows: usize) {
        self.mlp_hidden(backend, w, a, l, rows);
        let (down, here) = (&self.rows.blocks[l].down, slot(&a.hidden, l));
        let hidden = a.hidden[here].after.slice(0..rows * self.ffn());
        let branch = self.stream_mut(&mut a.branch, rows);
        self.apply(backend, w, down, branch, hidden, (rows, self.ffn(), self.width()));
    }

    /// From `norm2` to the hidden layer, before and after the activation.
    pub(super) fn mlp_hidden(&self, backend: &B, w: Weights<'_, B>, a: &mut Parts<Tensor<B>>, l: usize, rows: usize) {
        let (up, here) = (&self.rows.blocks[l].up, slot(&a.hidden, l));
        let norm2 = self.stream(&a.inner[slot(&a.inner, l)].norm2, rows);
        let hidden = &mut a.hidden[here];
        let gated = self.spec.feed_forward == FeedForward::Gated;
        let outputs = self.ffn() * if gated { 2 } else { 1 };
        let mut before = hidden.before.slice_mut(0..rows * outputs);
        let after = hidden.after.slice_mut(0..rows * self.ffn());
        match self.spec.feed_forward {
            FeedForward::Plain { activation } => {
                let (weight, bias) = (w.get(&up.weight), up.bias.as_ref().map(|b| w.get(b)));
                let shape = self.linear_shape(rows, self.width(), outputs);
                backend.linear_activate(after, before, norm2, weight, bias, shape, activation);
            }
            FeedForward::Gated => {
                self.apply(backend, w, up, before.reborrow(), norm2, (rows, self.width(), outputs));
                backend.gate(after, before.as_ref(), self.ffn());
            }
        }
    }

    /// What a forward pass leaves of a micro-batch: the residual stream behind the last block and, normalised, what the
    /// readout reads; both rows × residual.
    pub fn hidden<'a>(
        &self,
        backend: &B,
        w: Weights<'_, B>,
        acts: &'a mut Activations<B>,
        batch: &Batch<B>,
        micro: MicroBatch,
    ) -> (Ref<'a, B>, Ref<'a, B>) {
        self.forward(backend, w, acts, &mut Pass::new(batch, micro));
        let (a, rows) = (&acts.0, micro.rows());
        (self.stream(&a.x[a.x.len() - 1], rows), self.stream(&a.norm, rows))
    }

    /// Losses of a micro-batch, without gradients.
    pub fn evaluate(
        &self,
        backend: &B,
        w: Weights<'_, B>,
        acts: &mut Activations<B>,
        batch: &Batch<B>,
        micro: MicroBatch,
    ) {
        self.forward(backend, w, acts, &mut Pass::new(batch, micro));
        let (a, shape) = (&mut acts.0, self.readout_shape(micro.rows()));
        let (readout, targets) = (w.get(&self.rows.readout), batch.targets.slice(0..micro.rows()));
        let (losses, logits) = (a.losses.view_mut(), a.logits.view_mut());
        backend.cross_entropy(losses, None, logits, a.norm.view(), readout, None, targets, shape);
    }
}

/// Where block `l` keeps its part: in a list with one entry for each block, or in the only entry.
pub(super) fn slot<T>(list: &[T], l: usize) -> usize {
    l.min(list.len() - 1)
}
