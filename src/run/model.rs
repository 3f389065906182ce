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
        Weights { table: self.network.table(), arena: self.state.weights.view() }
    }

    /// Mean loss over all held-out samples, in micro-batches; `step` is told each one's number of samples.
    pub fn evaluate(
        &self,
        samples: Box<dyn Samples>,
        micro: MicroBatch,
        mut step: impl FnMut(u64),
    ) -> Result<Evaluation> {
        let backend = &self.backend;
        let mut plan = Plan::default();
        let batch = Feed::plan(backend, &mut plan, &*samples, micro, matches!(self.meaning.spec, Spec::Decoder(_)));
        let acts = self.network.plan(backend, &mut plan, micro, None);
        let sums = plan.reserve("sums", DType::F64, SCALARS);
        let mut planned = plan.commit(backend)?;
        let mut acts = Acts::new(acts, &mut planned);
        let mut sums: Tensor<B> = planned.take(sums);
        let mut feed = Feed::new(backend, samples, batch, &mut planned)?;
        let count = feed.samples.held_out();
        for first in (0..count).step_by(micro.samples) {
            feed.validate(backend, first)?;
            self.network.evaluate(backend, self.weights(), &mut acts, &feed.batch, micro);
            backend.tally(sums.view_mut(), acts.losses().view(), feed.batch.targets.view());
            step(micro.samples.min((count - first) as usize) as u64);
        }
        let mut host = backend.host(SCALAR_BYTES)?;
        backend.download(Stream::Compute, sums.view(), &mut host, 0);
        backend.synchronize(&backend.record(Stream::Compute))?;
        let get = |scalar| scalars::get(host.bytes(), scalar);
        let (sum, counted) = (get(Scalar::LossSum), get(Scalar::Counted));
        if counted == 0.0 {
            return Err(crate::feed::no_held_out());
        }
        Ok(Evaluation { loss: sum / counted, perplexity: (sum / counted).exp(), tokens: counted as u64 })
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
