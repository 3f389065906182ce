//! Generating with a cache of keys and values, one sequence at a time.

use super::{ActivationSlots, Activations, Decoder, forward::Pass};
use crate::{
    DType, Result,
    backend::{Backend, HostBuffer, Stream, Tensor},
    model::{
        Batch, MicroBatch, Weights,
        plan::{Plan, Slot},
    },
    ops::Ops,
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
        let mut plan = Plan::default();
        let slots = Slots::reserve(backend, &mut plan, model);
        let mut planned = plan.commit(backend)?;
        let [inputs, targets] = slots.tokens.map(|slot| planned.take(slot));
        Ok(Self {
            cache: slots.cache.into_iter().map(|slot| planned.take(slot)).collect(),
            acts: Activations::new(slots.acts, &mut planned),
            batch: Batch { inputs, targets, first_key: None },
            logits: planned.take(slots.logits),
            host: backend.host(model.spec.context.max(model.spec.vocab) * 8)?,
            length: 0,
        })
    }

    /// Bytes that one takes on the device.
    pub fn memory(backend: &B, model: &Decoder<B>) -> usize {
        let mut plan = Plan::default();
        Slots::reserve(backend, &mut plan, model);
        plan.bytes()
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
        let micro = MicroBatch { samples: 1, length: new };
        let cache = Some((&mut self.cache[..], self.length));
        let mut pass = Pass { batch: &self.batch, micro, cache };
        model.forward(backend, weights, &mut self.acts, &mut pass);
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
}

/// Reserved memory of a [`Generator`].
struct Slots {
    cache: Vec<Slot>,
    acts: ActivationSlots,
    tokens: [Slot; 2],
    logits: Slot,
}

impl Slots {
    fn reserve<B: Ops>(backend: &B, plan: &mut Plan, model: &Decoder<B>) -> Self {
        let context = model.spec.context;
        let row = context * model.heads().row();
        let cache = |i| plan.reserve(format!("cache.{i}"), backend.compute(), row);
        Self {
            cache: (0..model.spec.layers).map(cache).collect(),
            acts: model.plan(backend, plan, MicroBatch { samples: 1, length: context }, None),
            tokens: ["inputs", "targets"].map(|name| plan.reserve(name, DType::I32, context)),
            logits: plan.reserve("logits", backend.compute(), model.spec.vocab),
        }
    }
}
