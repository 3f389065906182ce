//! A trained model without its run: for evaluation and generation.

use crate::{
    DType,
    backend::{HostBuffer, Stream, Tensor},
};
use crate::{
    Error, Result,
    config::Moments,
    data::{Tokenizer, dataset::TOKENIZER_FILE, tokenizer::BYTES},
    feed::{Feed, Samples},
    model::{Acts, MicroBatch, Network, Weights, plan::Plan, spec::Spec},
    ops::{
        Ops,
        scalars::{self, SCALAR_BYTES, SCALARS, Scalar},
    },
    state::{Meaning, State},
    upscale::{self, Origin},
};

/// Weights on a device, and what they mean.
pub struct Model<B: Ops> {
    /// The device.
    pub backend: B,
    /// The network.
    pub network: Network<B>,
    /// Its weights.
    pub state: State<B>,
    /// What they mean.
    pub meaning: Meaning,
}

/// A measured loss.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub struct Evaluation {
    /// Mean loss of a counted token (row), nats.
    pub loss: f64,
    /// e to the loss.
    pub perplexity: f64,
    /// Counted tokens (rows).
    pub tokens: u64,
    /// Bits for each byte of the text that the tokens stand for; none where the text's size is not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bits_per_byte: Option<f64>,
}

impl<B: Ops> Model<B> {
    /// Loads the weights of a checkpoint.
    pub fn load(backend: B, origin: &Origin) -> Result<Self> {
        let meaning = origin.meaning.clone();
        let network = Network::new(&backend, &meaning.spec, &meaning.scaling)?;
        let mut plan = Plan::default();
        let slots = State::plan(&backend, &mut plan, network.table(), None);
        let mut state = State::new(slots, &mut plan.commit(&backend)?);
        upscale::load(&backend, origin, None, &mut state, &meaning, None, Moments::Reset)?;
        Ok(Self { backend, network, state, meaning })
    }

    /// Weights, to read.
    pub fn weights(&self) -> Weights<'_, B> {
        Weights::new(self.network.table(), self.state.weights.view())
    }

    /// Mean loss over all held-out samples, in micro-batches; `step` is told each one's number of samples.
    pub fn evaluate(&self, samples: Box<dyn Samples>, micro: MicroBatch, step: impl FnMut(u64)) -> Result<Evaluation> {
        let backend = &self.backend;
        let sums = self.sweep(samples, micro, step, |sums, losses, targets| {
            backend.tally(sums.view_mut(), losses.view(), targets.view());
            Ok(())
        })?;
        let mut host = backend.host(SCALAR_BYTES)?;
        backend.download(Stream::Compute, sums.view(), &mut host, 0);
        backend.synchronize(&backend.record(Stream::Compute))?;
        let get = |scalar| scalars::get(host.bytes(), scalar);
        let (sum, counted) = (get(Scalar::LossSum), get(Scalar::Counted));
        if counted == 0.0 {
            return Err(crate::feed::no_held_out());
        }
        Ok(Evaluation {
            loss: sum / counted,
            perplexity: (sum / counted).exp(),
            tokens: counted as u64,
            bits_per_byte: None,
        })
    }

    /// The loss of every position of all held-out samples, nats; 0 where none is counted.
    pub fn losses(&self, samples: Box<dyn Samples>, micro: MicroBatch, step: impl FnMut(u64)) -> Result<Vec<f64>> {
        let backend = &self.backend;
        let mut host = backend.host(micro.rows() * DType::F64.size())?;
        let mut all = Vec::new();
        self.sweep(samples, micro, step, |_, losses, _| {
            backend.download(Stream::Compute, losses.view(), &mut host, 0);
            backend.synchronize(&backend.record(Stream::Compute))?;
            let mut converted = vec![0.0f64; micro.rows()];
            let bytes = &host.bytes()[..converted.len() * losses.dtype().size()];
            crate::dtype::convert(bytes, losses.dtype(), bytemuck::cast_slice_mut(&mut converted), DType::F64);
            all.extend(converted);
            Ok(())
        })?;
        Ok(all)
    }

    /// Forward over all held-out samples. `each` gets the sums, the losses and the targets of each micro-batch; `step`
    /// is told its number of samples. Returns the sums.
    fn sweep(
        &self,
        samples: Box<dyn Samples>,
        micro: MicroBatch,
        mut step: impl FnMut(u64),
        mut each: impl FnMut(&mut Tensor<B>, &Tensor<B>, &Tensor<B>) -> Result<()>,
    ) -> Result<Tensor<B>> {
        let backend = &self.backend;
        let mut plan = Plan::default();
        let tokens = matches!(self.meaning.spec, Spec::Decoder(_));
        let batch = Feed::plan(backend, &mut plan, &*samples, micro, tokens, 1);
        let acts = self.network.plan(backend, &mut plan, micro, None);
        let sums = plan.reserve("sums", DType::F64, SCALARS);
        let mut planned = plan.commit(backend)?;
        let mut acts = Acts::new(acts, &mut planned);
        let mut sums: Tensor<B> = planned.take(sums);
        let mut feed = Feed::new(backend, samples, batch, &mut planned)?;
        let count = feed.samples.held_out();
        for first in (0..count).step_by(micro.samples) {
            feed.validate(backend, first)?;
            self.network.evaluate(backend, self.weights(), &mut acts, feed.batch(0), micro);
            each(&mut sums, acts.losses(), &feed.batch(0).targets)?;
            step(micro.samples.min((count - first) as usize) as u64);
        }
        Ok(sums)
    }
}

/// The tokenizer that a checkpoint carries.
pub fn tokenizer(origin: &Origin) -> Result<Tokenizer> {
    let dir = origin.reader.dir();
    match origin.meaning.tokenizer.as_deref() {
        Some(BYTES) => Ok(Tokenizer::bytes()),
        Some(_) if origin.reader.has_file(TOKENIZER_FILE) => Tokenizer::load(dir.join(TOKENIZER_FILE)),
        _ => Err(Error::file(dir, "carries no tokenizer: its data named none; give one with --tokenizer")),
    }
}
