//! The decoder's backward pass: from the losses' end to the embeddings, one block after another.

use super::{
    Activations, Decoder,
    activations::{Parts, Scratch},
    forward::{Pass, slot},
};
use crate::{
    backend::{Mut, Ref, Stream, Tensor},
    model::{Batch, Gradients, MicroBatch, Weights, spec::FeedForward},
    ops::{Ops, head::ReadoutGradients, linear::LinearShape, norm::NormShape},
    trace::Lane,
};

use super::rows::Layer;

impl<B: Ops> Decoder<B> {
    /// Losses and gradients of a micro-batch; `token_scale` is the factor on each token's loss.
    pub fn micro_step(
        &self,
        backend: &B,
        w: Weights<'_, B>,
        g: &mut Gradients<'_, B>,
        acts: &mut Activations<B>,
        batch: &Batch<B>,
        micro: MicroBatch,
        token_scale: f64,
    ) {
        self.forward(backend, w, acts, &mut Pass::new(batch, micro));
        let _backward = backend.span(Stream::Compute, Lane::Compute, "backward");
        let rows = micro.rows();
        let mut scratch = acts.0.scratch.take().expect("activations were planned for training");
        let a = &mut acts.0;
        let gradients = ReadoutGradients {
            dx: scratch.dy.view_mut(),
            dweight: g.get(&self.rows.readout),
            dbias: None,
            scale: token_scale,
        };
        let targets = batch.targets.slice(0..rows);
        let readout = w.get(&self.rows.readout);
        backend.cross_entropy(
            a.losses.view_mut(),
            Some(gradients),
            a.logits.view_mut(),
            a.norm.view(),
            readout,
            None,
            targets,
            self.readout_shape(rows),
        );
        let (x, shape) = (a.x[self.spec.layers].view(), self.norm_shape(rows));
        norm_backward(backend, w, g, &self.rows.norm, &mut scratch, x, a.statistics.view(), shape, true);
        g.done(self.spec.layers + 1);
        for l in (0..self.spec.layers).rev() {
            let _block = backend.span(Stream::Compute, Lane::Compute, format_args!("backward of block {l}"));
            self.recompute(backend, w, a, l, batch, micro);
            self.mlp_backward(backend, w, g, a, &mut scratch, l, rows);
            self.attention_half_backward(backend, w, g, a, &mut scratch, l, batch, micro);
            g.done(l + 1);
        }
        self.embedding_backward(backend, g, &scratch, batch, micro);
        a.scratch = Some(scratch);
        g.done(0);
    }

    /// Makes the activations of block `l` what they were in the forward pass, where they were not kept. Those of the
    /// last block are still there.
    fn recompute(
        &self,
        backend: &B,
        w: Weights<'_, B>,
        a: &mut Parts<Tensor<B>>,
        l: usize,
        batch: &Batch<B>,
        micro: MicroBatch,
    ) {
        if l + 1 == self.spec.layers {
            return;
        }
        if a.inner.len() == 1 {
            self.block_input_again(backend, w, a, l, micro.rows());
            self.attention_half(backend, w, a, l, &mut Pass::new(batch, micro));
        }
        if a.hidden.len() == 1 {
            self.mlp_hidden(backend, w, a, l, micro.rows());
        }
    }

    fn mlp_backward(
        &self,
        backend: &B,
        w: Weights<'_, B>,
        g: &mut Gradients<'_, B>,
        a: &Parts<Tensor<B>>,
        s: &mut Scratch<Tensor<B>>,
        l: usize,
        rows: usize,
    ) {
        let block = &self.rows.blocks[l];
        let (inner, hidden) = (&a.inner[slot(&a.inner, l)], &a.hidden[slot(&a.hidden, l)]);
        let branch = branch_gradient(backend, &s.dx, &mut s.scaled, self.spec.alphas.residual);
        let down = self.linear_shape(rows, self.ffn(), self.width());
        let weight = w.get(&block.down.weight);
        weight_backward(backend, g, &block.down, branch, hidden.after.view(), down);
        let dbefore = match (self.spec.feed_forward, &mut s.dbefore) {
            (FeedForward::Gated, Some(dbefore)) => {
                backend.linear_backward_input(s.dafter.view_mut(), branch, weight, down);
                backend.gate_backward(dbefore.view_mut(), s.dafter.view(), hidden.before.view(), self.ffn());
                dbefore.view()
            }
            (FeedForward::Plain { activation }, _) => {
                let (dbefore, before) = (s.dafter.view_mut(), hidden.before.view());
                backend.linear_activate_backward(dbefore, branch, weight, before, down, activation);
                s.dafter.view()
            }
            (FeedForward::Gated, None) => unreachable!("planned with gate and up"),
        };
        let up = self.linear_shape(rows, self.width(), dbefore.len() / rows);
        linear_backward(backend, w, g, &block.up, s.dy.view_mut(), dbefore, inner.norm2.view(), up);
        let (x, shape) = (inner.middle.view(), self.norm_shape(rows));
        norm_backward(backend, w, g, &block.norm2, s, x, inner.statistics2.view(), shape, false);
    }

    fn attention_half_backward(
        &self,
        backend: &B,
        w: Weights<'_, B>,
        g: &mut Gradients<'_, B>,
        a: &Parts<Tensor<B>>,
        s: &mut Scratch<Tensor<B>>,
        l: usize,
        batch: &Batch<B>,
        micro: MicroBatch,
    ) {
        let (rows, heads, block) = (micro.rows(), self.heads(), &self.rows.blocks[l]);
        let inner = &a.inner[slot(&a.inner, l)];
        let branch = branch_gradient(backend, &s.dx, &mut s.scaled, self.spec.alphas.residual);
        let output = self.linear_shape(rows, heads.queries(), self.width());
        linear_backward(backend, w, g, &block.output, s.dattention.view_mut(), branch, inner.attention.view(), output);
        let first_key = batch.first_key.as_ref().map(|f| f.slice(0..rows));
        backend.attention_backward(
            s.dqkv.view_mut(),
            s.dattention.view(),
            inner.attention.view(),
            inner.log_sum_exp.view(),
            inner.qkv.view(),
            first_key,
            self.attention_shape(micro),
        );
        let (d, rotation) = (s.dqkv.view_mut(), self.rotation(micro.length, 0));
        match (&block.qk_norm, &inner.projected, &inner.head_statistics) {
            (Some((q, k)), Some(projected), Some(statistics)) => {
                let ((dq, dk), projected, statistics) = (g.pair(q, k), projected.view(), statistics.view());
                let (q, k) = (w.get(q), w.get(k));
                backend.head_norm_backward(d, dq, dk, projected, statistics, q, k, rotation, heads);
            }
            _ => {
                if let Some(rotation) = rotation {
                    backend.rotate(d, rotation, heads, true);
                }
            }
        }
        let qkv = self.linear_shape(rows, self.width(), heads.row());
        linear_backward(backend, w, g, &block.qkv, s.dy.view_mut(), s.dqkv.view(), inner.norm1.view(), qkv);
        let (x, shape) = (a.x[l].view(), self.norm_shape(rows));
        norm_backward(backend, w, g, &block.norm1, s, x, inner.statistics1.view(), shape, false);
    }

    fn embedding_backward(
        &self,
        backend: &B,
        g: &mut Gradients<'_, B>,
        s: &Scratch<Tensor<B>>,
        batch: &Batch<B>,
        micro: MicroBatch,
    ) {
        let tokens = batch.inputs.slice(0..micro.rows());
        // A tied embedding already holds the readout's gradient.
        let (shape, accumulate) = (self.embedding_shape(micro, 0), self.spec.tied);
        match &self.rows.positions {
            Some(positions) => {
                let (dweight, dpositions) = g.pair(&self.rows.embedding, positions);
                backend.embed_backward(dweight, Some(dpositions), s.dx.view(), tokens, shape, accumulate);
            }
            None => backend.embed_backward(g.get(&self.rows.embedding), None, s.dx.view(), tokens, shape, accumulate),
        }
    }
}

/// The gradient by what a half-block returned: that of the residual stream, times the residual multiplier.
fn branch_gradient<'a, B: Ops>(
    backend: &B,
    dx: &'a Tensor<B>,
    scaled: &'a mut Option<Tensor<B>>,
    alpha: f64,
) -> Ref<'a, B> {
    match scaled {
        None => dx.view(),
        Some(scaled) => {
            backend.copy(Stream::Compute, dx.view(), scaled.view_mut());
            backend.scale(scaled.view_mut(), alpha);
            scaled.view()
        }
    }
}

/// Gradients of a linear layer by its input (`dx`) and its parameters.
fn linear_backward<B: Ops>(
    backend: &B,
    w: Weights<'_, B>,
    g: &mut Gradients<'_, B>,
    layer: &Layer,
    dx: Mut<'_, B>,
    dy: Ref<'_, B>,
    x: Ref<'_, B>,
    shape: LinearShape,
) {
    weight_backward(backend, g, layer, dy, x, shape);
    backend.linear_backward_input(dx, dy, w.get(&layer.weight), shape);
}

/// Gradients of a linear layer by its parameters.
fn weight_backward<B: Ops>(
    backend: &B,
    g: &mut Gradients<'_, B>,
    layer: &Layer,
    dy: Ref<'_, B>,
    x: Ref<'_, B>,
    shape: LinearShape,
) {
    let (dweight, dbias) = g.layer(&layer.weight, layer.bias.as_ref());
    backend.linear_backward_weight(dweight, dbias, dy, x, shape);
}

/// Adds the gradient through a norm, whose output's gradient is `dy`, to `dx`.
fn norm_backward<B: Ops>(
    backend: &B,
    w: Weights<'_, B>,
    g: &mut Gradients<'_, B>,
    layer: &Layer,
    s: &mut Scratch<Tensor<B>>,
    x: Ref<'_, B>,
    statistics: Ref<'_, B>,
    shape: NormShape,
    overwrite: bool,
) {
    let (dgain, dbias) = g.layer(&layer.weight, layer.bias.as_ref());
    backend.norm_backward(
        s.dx.view_mut(),
        dgain,
        dbias,
        s.dy.view(),
        x,
        statistics,
        w.get(&layer.weight),
        shape,
        overwrite,
    );
}
