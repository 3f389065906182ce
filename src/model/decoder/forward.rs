//! The decoder's forward pass.

use super::{Activations, BlockRows, Decoder, activations::Parts};
use crate::{
    backend::{Mut, Ref, Tensor},
    model::{Batch, MicroBatch, Weights, spec::FeedForward},
    ops::{Ops, attention::Strided, embedding::EmbeddingShape, norm::Residual},
};

impl<B: Ops> Decoder<B> {
    /// From tokens to the normalised residual stream at the end, `acts.norm`.
    pub(super) fn forward(
        &self,
        backend: &B,
        w: Weights<'_, B>,
        acts: &mut Activations<B>,
        batch: &Batch<B>,
        micro: MicroBatch,
    ) {
        let a = &mut acts.0;
        let rows = micro.rows();
        let positions = self.rows.positions.as_ref().map(|p| w.get(p));
        backend.embed(
            a.x[0].view_mut(),
            batch.inputs.slice(0..rows),
            w.get(&self.rows.embedding),
            positions,
            self.embedding_shape(micro),
        );
        for l in 0..self.spec.layers {
            self.block_input(backend, w, a, l, rows);
            self.attention_half(backend, w, a, l, batch, micro);
            self.mlp_half(backend, w, a, l, rows);
        }
        let last = a.x.len() - 1;
        let middle = &a.inner[slot(&a.inner, self.spec.layers - 1)].middle;
        let residual =
            Residual { sum: a.x[last].view_mut(), branch: a.branch.view(), scale: self.spec.alphas.residual };
        let layer = &self.rows.norm;
        let (gain, bias) = (w.get(&layer.weight), layer.bias.as_ref().map(|b| w.get(b)));
        backend.norm(
            a.norm.view_mut(),
            a.statistics.view_mut(),
            middle.view(),
            Some(residual),
            gain,
            bias,
            self.norm_shape(rows),
        );
    }

    pub(super) fn embedding_shape(&self, micro: MicroBatch) -> EmbeddingShape {
        EmbeddingShape {
            rows: micro.rows(),
            width: self.width(),
            sequence: micro.length,
            start: 0,
            scale: self.spec.alphas.embedding,
        }
    }

    /// Adds what the block before returned to the residual stream, and normalises it: `x[l]`, `norm1`.
    fn block_input(&self, backend: &B, w: Weights<'_, B>, a: &mut Parts<Tensor<B>>, l: usize, rows: usize) {
        let layer = &self.rows.blocks[l].norm1;
        let (gain, bias) = (w.get(&layer.weight), layer.bias.as_ref().map(|b| w.get(b)));
        let (here, x) = (slot(&a.inner, l), slot(&a.x, l));
        if l == 0 {
            let inner = &mut a.inner[here];
            backend.norm(
                inner.norm1.view_mut(),
                inner.statistics1.view_mut(),
                a.x[x].view(),
                None,
                gain,
                bias,
                self.norm_shape(rows),
            );
            return;
        }
        let before = slot(&a.inner, l - 1);
        let residual = Residual { sum: a.x[x].view_mut(), branch: a.branch.view(), scale: self.spec.alphas.residual };
        let (middle, inner) = if before == here {
            let inner = &mut a.inner[here];
            (&inner.middle, (&mut inner.norm1, &mut inner.statistics1))
        } else {
            let (low, high) = a.inner.split_at_mut(here);
            (&low[before].middle, (&mut high[0].norm1, &mut high[0].statistics1))
        };
        backend.norm(
            inner.0.view_mut(),
            inner.1.view_mut(),
            middle.view(),
            Some(residual),
            gain,
            bias,
            self.norm_shape(rows),
        );
    }

    /// The same from `x[l]` as it was kept: for backward, when the block is recomputed.
    pub(super) fn block_input_again(
        &self,
        backend: &B,
        w: Weights<'_, B>,
        a: &mut Parts<Tensor<B>>,
        l: usize,
        rows: usize,
    ) {
        let layer = &self.rows.blocks[l].norm1;
        let (gain, bias) = (w.get(&layer.weight), layer.bias.as_ref().map(|b| w.get(b)));
        let here = slot(&a.inner, l);
        let inner = &mut a.inner[here];
        backend.norm(
            inner.norm1.view_mut(),
            inner.statistics1.view_mut(),
            a.x[l].view(),
            None,
            gain,
            bias,
            self.norm_shape(rows),
        );
    }

    /// From `norm1` to `branch`, `middle` and `norm2`.
    pub(super) fn attention_half(
        &self,
        backend: &B,
        w: Weights<'_, B>,
        a: &mut Parts<Tensor<B>>,
        l: usize,
        batch: &Batch<B>,
        micro: MicroBatch,
    ) {
        let (rows, heads, block) = (micro.rows(), self.heads(), &self.rows.blocks[l]);
        let (here, x) = (slot(&a.inner, l), slot(&a.x, l));
        let inner = &mut a.inner[here];
        let target = inner.projected.as_mut().unwrap_or(&mut inner.qkv);
        self.project(backend, w, block, target.view_mut(), inner.norm1.view(), rows);
        if let Some((projected, statistics)) = inner.projected.as_ref().zip(inner.head_statistics.as_mut()) {
            self.normalise_heads(backend, w, block, inner.qkv.view_mut(), statistics.view_mut(), projected.view());
        }
        if let Some(angles) = &self.angles {
            backend.rotate(inner.qkv.view_mut(), angles.view(), heads, rows, micro.length, 0, false);
        }
        let part = |start| Strided {
            view: inner.qkv.slice(start..rows * heads.row()),
            stride: heads.row(),
            rows: micro.length,
        };
        let (k, v) = (heads.queries(), heads.queries() + heads.keys());
        let first_key = batch.first_key.as_ref().map(|f| f.slice(0..rows));
        backend.attention(
            inner.attention.view_mut(),
            inner.log_sum_exp.view_mut(),
            part(0),
            part(k),
            part(v),
            first_key,
            self.attention_shape(micro),
        );
        let output = &block.output;
        let bias = output.bias.as_ref().map(|b| w.get(b));
        let shape = self.linear_shape(rows, heads.queries(), self.width());
        backend.linear(a.branch.view_mut(), inner.attention.view(), w.get(&output.weight), bias, shape);
        let residual =
            Residual { sum: inner.middle.view_mut(), branch: a.branch.view(), scale: self.spec.alphas.residual };
        let (gain, bias) = (w.get(&block.norm2.weight), block.norm2.bias.as_ref().map(|b| w.get(b)));
        backend.norm(
            inner.norm2.view_mut(),
            inner.statistics2.view_mut(),
            a.x[x].view(),
            Some(residual),
            gain,
            bias,
            self.norm_shape(rows),
        );
    }

    /// Q, K and V of normalised rows.
    pub(super) fn project(
        &self,
        backend: &B,
        w: Weights<'_, B>,
        block: &BlockRows,
        qkv: Mut<'_, B>,
        x: Ref<'_, B>,
        rows: usize,
    ) {
        let bias = block.qkv.bias.as_ref().map(|b| w.get(b));
        let shape = self.linear_shape(rows, self.width(), self.heads().row());
        backend.linear(qkv, x, w.get(&block.qkv.weight), bias, shape);
    }

    pub(super) fn normalise_heads(
        &self,
        backend: &B,
        w: Weights<'_, B>,
        block: &BlockRows,
        out: Mut<'_, B>,
        statistics: Mut<'_, B>,
        projected: Ref<'_, B>,
    ) {
        let Some((q, k)) = &block.qk_norm else { return };
        backend.head_norm(out, statistics, projected, w.get(q), w.get(k), self.heads(), self.spec.norm_eps);
    }

    /// From `norm2` to `branch`.
    fn mlp_half(&self, backend: &B, w: Weights<'_, B>, a: &mut Parts<Tensor<B>>, l: usize, rows: usize) {
        self.mlp_hidden(backend, w, a, l, rows);
        let down = &self.rows.blocks[l].down;
        let bias = down.bias.as_ref().map(|b| w.get(b));
        let here = slot(&a.hidden, l);
        let shape = self.linear_shape(rows, self.ffn(), self.width());
        backend.linear(a.branch.view_mut(), a.hidden[here].after.view(), w.get(&down.weight), bias, shape);
    }

    /// From `norm2` to the hidden layer, before and after the activation.
    pub(super) fn mlp_hidden(&self, backend: &B, w: Weights<'_, B>, a: &mut Parts<Tensor<B>>, l: usize, rows: usize) {
        let (up, here) = (&self.rows.blocks[l].up, slot(&a.hidden, l));
        let bias = up.bias.as_ref().map(|b| w.get(b));
        let inner = &a.inner[slot(&a.inner, l)];
        let hidden = &mut a.hidden[here];
        let gated = self.spec.feed_forward == FeedForward::Gated;
        let outputs = self.ffn() * if gated { 2 } else { 1 };
        backend.linear(
            hidden.before.view_mut(),
            inner.norm2.view(),
            w.get(&up.weight),
            bias,
            self.linear_shape(rows, self.width(), outputs),
        );
        match self.spec.feed_forward {
            FeedForward::Plain { activation } => {
                backend.activate(hidden.after.view_mut(), hidden.before.view(), activation)
            }
            FeedForward::Gated => backend.gate(hidden.after.view_mut(), hidden.before.view(), self.ffn()),
        }
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
        self.forward(backend, w, acts, batch, micro);
        let a = &mut acts.0;
        let targets = batch.targets.slice(0..micro.rows());
        backend.cross_entropy(
            a.losses.view_mut(),
            None,
            a.logits.view_mut(),
            a.norm.view(),
            w.get(&self.rows.readout),
            None,
            targets,
            self.readout_shape(micro.rows()),
        );
    }
}

/// Where block `l` keeps its part: in a list with one entry for each block, or in the only entry.
pub(super) fn slot<T>(list: &[T], l: usize) -> usize {
    l.min(list.len() - 1)
}
