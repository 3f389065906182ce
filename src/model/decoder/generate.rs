//! Generating with a cache of keys and values, one sequence at a time.

use super::{Activations, Decoder, forward::slot};
use crate::{
    DType, Result,
    backend::{Backend, HostBuffer, Stream, Tensor},
    model::{Batch, MicroBatch, Weights, plan::Plan, spec::FeedForward},
    ops::{
        Ops,
        attention::{AttentionShape, Strided},
        norm::Residual,
    },
};

/// The state of one sequence that is being generated.
pub struct Generator<B: Backend> {
    /// Rows of Q, K and V of every token so far, for each block: context × row.
    cache: Vec<Tensor<B>>,
    acts: Activations<B>,
    batch: Batch<B>,
    logits: Tensor<B>,
    host: B::Host,
    length: usize,
}

impl<B: Ops> Generator<B> {
    /// An empty sequence of at most the model's context.
    pub fn new(backend: &B, model: &Decoder<B>) -> Result<Self> {
        let context = model.spec.context;
        let mut plan = Plan::default();
        let row = context * model.heads().row();
        let cache: Vec<_> =
            (0..model.spec.layers).map(|i| plan.reserve(format!("cache.{i}"), backend.compute(), row)).collect();
        let slots = model.plan(backend, &mut plan, MicroBatch { samples: 1, length: context }, None);
        let tokens = ["inputs", "targets"].map(|name| plan.reserve(name, DType::I32, context));
        let logits = plan.reserve("logits", backend.compute(), model.spec.vocab);
        let mut planned = plan.commit(backend)?;
        let [inputs, targets] = tokens.map(|slot| planned.take(slot));
        Ok(Self {
            cache: cache.into_iter().map(|slot| planned.take(slot)).collect(),
            acts: Activations::new(slots, &mut planned),
            batch: Batch { inputs, targets, first_key: None },
            logits: planned.take(logits),
            host: backend.host(context.max(model.spec.vocab) * 8)?,
            length: 0,
        })
    }

    /// Tokens so far.
    pub fn length(&self) -> usize {
        self.length
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.length = 0;
    }

    /// Appends tokens and returns the logits of the next one. Panics when they do not fit the context.
    pub fn extend(
        &mut self,
        backend: &B,
        model: &Decoder<B>,
        weights: Weights<'_, B>,
        tokens: &[i32],
    ) -> Result<Vec<f64>> {
        let (new, total) = (tokens.len(), self.length + tokens.len());
        assert!(new > 0 && total <= model.spec.context, "{total} tokens in a context of {}", model.spec.context);
        let bytes: &[u8] = bytemuck::cast_slice(tokens);
        self.host.bytes_mut()[..bytes.len()].copy_from_slice(bytes);
        backend.upload(Stream::Compute, &self.host, 0..bytes.len(), self.batch.inputs.slice_mut(0..new));
        self.forward(backend, model, weights, new);
        self.length = total;
        let width = model.width();
        let last = self.acts.0.norm.slice((new - 1) * width..new * width);
        backend.logits(self.logits.view_mut(), last, weights.get(&model.rows.readout), None, model.readout_shape(1));
        backend.download(Stream::Compute, self.logits.view(), &mut self.host, 0);
        backend.synchronize(&backend.record(Stream::Compute))?;
        let mut logits = vec![0.0f64; model.spec.vocab];
        let bytes = logits.len() * self.logits.dtype().size();
        crate::dtype::convert(
            &self.host.bytes()[..bytes],
            self.logits.dtype(),
            bytemuck::cast_slice_mut(&mut logits),
            DType::F64,
        );
        Ok(logits)
    }

    /// The forward pass of `new` tokens behind those of the cache.
    fn forward(&mut self, backend: &B, model: &Decoder<B>, w: Weights<'_, B>, new: usize) {
        let (a, start) = (&mut self.acts.0, self.length);
        let (width, heads, alpha) = (model.width(), model.heads(), model.spec.alphas.residual);
        let mut embedding = model.embedding_shape(MicroBatch { samples: 1, length: new });
        embedding.start = start;
        let positions = model.rows.positions.as_ref().map(|p| w.get(p));
        let (stream, shape) = (0..new * width, model.norm_shape(new));
        backend.embed(
            a.x[0].slice_mut(stream.clone()),
            self.batch.inputs.slice(0..new),
            w.get(&model.rows.embedding),
            positions,
            embedding,
        );
        for l in 0..model.spec.layers {
            let (block, here) = (&model.rows.blocks[l], slot(&a.inner, l));
            let there = slot(&a.hidden, l);
            let (inner, hidden) = (&mut a.inner[here], &mut a.hidden[there]);
            let bias = |layer: &super::Layer| layer.bias.as_ref().map(|b| w.get(b));
            let statistics = 0..2 * new;
            backend.norm(
                inner.norm1.slice_mut(stream.clone()),
                inner.statistics1.slice_mut(statistics.clone()),
                a.x[0].slice(stream.clone()),
                None,
                w.get(&block.norm1.weight),
                bias(&block.norm1),
                shape,
            );
            let rows = start * heads.row()..(start + new) * heads.row();
            match (&mut inner.projected, &mut inner.head_statistics) {
                (Some(projected), Some(statistics)) => {
                    let range = 0..new * heads.row();
                    model.project(
                        backend,
                        w,
                        block,
                        projected.slice_mut(range.clone()),
                        inner.norm1.slice(stream.clone()),
                        new,
                    );
                    let statistics = statistics.slice_mut(0..new * heads.kv_heads * (heads.group + 1));
                    model.normalise_heads(
                        backend,
                        w,
                        block,
                        self.cache[l].slice_mut(rows.clone()),
                        statistics,
                        projected.slice(range),
                    );
                }
                _ => model.project(
                    backend,
                    w,
                    block,
                    self.cache[l].slice_mut(rows.clone()),
                    inner.norm1.slice(stream.clone()),
                    new,
                ),
            }
            if let Some(angles) = &model.angles {
                backend.rotate(self.cache[l].slice_mut(rows.clone()), angles.view(), heads, new, new, start, false);
            }
            let part = |from: usize, token: usize| Strided {
                view: self.cache[l].slice(token * heads.row() + from..rows.end),
                stride: heads.row(),
                rows: model.spec.context,
            };
            let (k, v) = (heads.queries(), heads.queries() + heads.keys());
            let attention =
                AttentionShape { heads, batch: 1, queries: new, keys: start + new, scale: model.attention_scale };
            let attended = 0..new * heads.queries();
            let sums = inner.log_sum_exp.slice_mut(0..new * heads.kv_heads * heads.group);
            backend.attention(
                inner.attention.slice_mut(attended.clone()),
                sums,
                part(0, start),
                part(k, 0),
                part(v, 0),
                None,
                attention,
            );
            let output = model.linear_shape(new, heads.queries(), width);
            backend.linear(
                a.branch.slice_mut(stream.clone()),
                inner.attention.slice(attended),
                w.get(&block.output.weight),
                bias(&block.output),
                output,
            );
            let residual = Residual {
                sum: inner.middle.slice_mut(stream.clone()),
                branch: a.branch.slice(stream.clone()),
                scale: alpha,
            };
            backend.norm(
                inner.norm2.slice_mut(stream.clone()),
                inner.statistics2.slice_mut(statistics),
                a.x[0].slice(stream.clone()),
                Some(residual),
                w.get(&block.norm2.weight),
                bias(&block.norm2),
                shape,
            );
            let gated = model.spec.feed_forward == FeedForward::Gated;
            let up = model.linear_shape(new, width, model.ffn() * if gated { 2 } else { 1 });
            let (before, after) = (0..new * up.outputs, 0..new * model.ffn());
            backend.linear(
                hidden.before.slice_mut(before.clone()),
                inner.norm2.slice(stream.clone()),
                w.get(&block.up.weight),
                bias(&block.up),
                up,
            );
            match model.spec.feed_forward {
                FeedForward::Plain { activation } => {
                    backend.activate(hidden.after.slice_mut(after.clone()), hidden.before.slice(before), activation)
                }
                FeedForward::Gated => {
                    backend.gate(hidden.after.slice_mut(after.clone()), hidden.before.slice(before), model.ffn())
                }
            }
            let down = model.linear_shape(new, model.ffn(), width);
            backend.linear(
                a.branch.slice_mut(stream.clone()),
                hidden.after.slice(after),
                w.get(&block.down.weight),
                bias(&block.down),
                down,
            );
            backend.add(
                a.x[0].slice_mut(stream.clone()),
                inner.middle.slice(stream.clone()),
                a.branch.slice(stream.clone()),
                alpha,
            );
        }
        let norm = &model.rows.norm;
        let bias = norm.bias.as_ref().map(|b| w.get(b));
        backend.norm(
            a.norm.slice_mut(stream.clone()),
            a.statistics.slice_mut(0..2 * new),
            a.x[0].slice(stream),
            None,
            w.get(&norm.weight),
            bias,
            shape,
        );
    }
}
