//! Samples on their way to the device: which ones a micro-batch takes, and in what form.

use crate::{
    DType, Error, Result,
    backend::{Backend, HostBuffer, Stream, Tensor},
    data::{Order, RowBatch, RowData, TokenBatch, TokenData, dataset::BatchRules},
    model::{
        Batch, MicroBatch,
        plan::{Plan, Planned, Slot},
    },
    trace::{self, Lane},
};

/// A micro-batch on the host.
pub struct HostBatch {
    /// Type of `inputs`: i32 for tokens, the device's compute type for numbers.
    pub dtype: DType,
    /// Tokens (i32) or numbers in the compute type, as bytes.
    pub inputs: Vec<u8>,
    /// Classes; −1: not counted.
    pub targets: Vec<i32>,
    /// First key that each position may attend to, where attention is reset at documents.
    pub first_key: Option<Vec<i32>>,
}

/// Where micro-batches come from.
pub trait Samples: Send {
    /// Fills a training batch with the samples at global indices `first`, `first + 1`, …
    fn train(&mut self, first: u64, batch: &mut HostBatch);
    /// Fills a validation batch with held-out samples `first`, … in their order; those past the end are not counted.
    /// Returns the number of counted targets: 0 when there are no more.
    fn validate(&mut self, first: u64, batch: &mut HostBatch) -> usize;
    /// Number of held-out samples.
    fn held_out(&self) -> u64;
    /// Fingerprint of the training data.
    fn fingerprint(&self) -> u64;
    /// Numbers of one position's input; 1 for a token.
    fn inputs(&self) -> usize;
    /// Whether attention is reset at documents.
    fn resets_attention(&self) -> bool;
}

/// Tokens of a dataset.
pub struct TokenSamples {
    train: TokenData,
    held_out: Option<TokenData>,
    order: Order,
    rules: BatchRules,
    staging: TokenBatch,
}

impl TokenSamples {
    /// Windows of `micro.length` tokens, in the order that `seed` shuffles, or sequential without one.
    pub fn new(
        train: TokenData,
        held_out: Option<TokenData>,
        micro: MicroBatch,
        seed: Option<u64>,
        rules: BatchRules,
    ) -> Result<Self> {
        let order = train.order(micro.length, seed)?;
        Ok(Self { train, held_out, order, rules, staging: TokenBatch::new(micro.samples, micro.length) })
    }

    fn hand_over(&self, batch: &mut HostBatch) {
        batch.inputs.copy_from_slice(bytemuck::cast_slice(&self.staging.inputs));
        batch.targets.copy_from_slice(&self.staging.targets);
        if let Some(first_key) = &mut batch.first_key {
            first_key.copy_from_slice(&self.staging.first_key);
        }
    }
}

impl Samples for TokenSamples {
    fn train(&mut self, first: u64, batch: &mut HostBatch) {
        self.train.fill(&self.order, first, &self.rules, &mut self.staging);
        self.hand_over(batch);
    }

    fn validate(&mut self, first: u64, batch: &mut HostBatch) -> usize {
        let Some(data) = &self.held_out else { return 0 };
        let counted = data.fill_consecutive(first, &self.rules, &mut self.staging);
        self.hand_over(batch);
        counted
    }

    fn held_out(&self) -> u64 {
        self.held_out.as_ref().map_or(0, |data| data.windows(self.staging.context()))
    }

    fn fingerprint(&self) -> u64 {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.train.tokens().to_le_bytes());
        // Windows from all over the data: reading all of it would cost more than it tells.
        let mut batch = TokenBatch::new(1, self.staging.context());
        let windows = self.order.samples();
        for i in 0..64.min(windows) {
            self.train.fill_consecutive(i * windows / 64.min(windows), &BatchRules::default(), &mut batch);
            hasher.update(bytemuck::cast_slice(&batch.inputs));
        }
        short(&hasher)
    }

    fn inputs(&self) -> usize {
        1
    }

    fn resets_attention(&self) -> bool {
        self.rules.reset_attention_after.is_some()
    }
}

/// Rows of numbers.
pub struct RowSamples {
    train: RowData,
    held_out: Option<RowData>,
    order: Order,
    staging: RowBatch,
}

impl RowSamples {
    /// Rows in the order that `seed` shuffles, or as they lie without one.
    pub fn new(train: RowData, held_out: Option<RowData>, micro: MicroBatch, seed: Option<u64>) -> Result<Self> {
        let order = train.order(seed)?;
        let staging = RowBatch::new(micro.samples, train.inputs);
        Ok(Self { train, held_out, order, staging })
    }

    fn hand_over(&self, batch: &mut HostBatch) {
        let numbers = bytemuck::cast_slice(&self.staging.inputs);
        crate::dtype::convert(numbers, DType::F32, &mut batch.inputs, batch.dtype);
        batch.targets.copy_from_slice(&self.staging.labels);
    }
}

impl Samples for RowSamples {
    fn train(&mut self, first: u64, batch: &mut HostBatch) {
        self.train.fill(&self.order, first, &mut self.staging);
        self.hand_over(batch);
    }

    fn validate(&mut self, first: u64, batch: &mut HostBatch) -> usize {
        let Some(data) = &self.held_out else { return 0 };
        let counted = data.fill_consecutive(first as usize, &mut self.staging);
        self.hand_over(batch);
        counted
    }

    fn held_out(&self) -> u64 {
        self.held_out.as_ref().map_or(0, |data| data.rows() as u64)
    }

    fn fingerprint(&self) -> u64 {
        let mut hasher = blake3::Hasher::new();
        hasher.update(bytemuck::cast_slice(&self.train.features)).update(bytemuck::cast_slice(&self.train.labels));
        short(&hasher)
    }

    fn inputs(&self) -> usize {
        self.train.inputs
    }

    fn resets_attention(&self) -> bool {
        false
    }
}

/// 64 bits of a hash.
fn short(hasher: &blake3::Hasher) -> u64 {
    let bytes = hasher.finalize();
    u64::from_le_bytes(bytes.as_bytes()[..8].try_into().expect("a hash has 32 bytes"))
}

/// The device's batch and the host memory that it is filled from: two stages, so that one is filled while the other is
/// still being copied.
pub struct Feed<B: Backend> {
    /// Where micro-batches come from.
    pub samples: Box<dyn Samples>,
    /// The batch that forward and backward read.
    pub batch: Batch<B>,
    host: HostBatch,
    stages: [(B::Host, Option<B::Event>); 2],
    next: usize,
}

/// Reserved memory of a batch.
pub struct FeedSlots {
    inputs: Slot,
    targets: Slot,
    first_key: Option<Slot>,
}

impl<B: Backend> Feed<B> {
    /// Reserves the device's batch.
    pub fn plan(backend: &B, plan: &mut Plan, samples: &dyn Samples, micro: MicroBatch, tokens: bool) -> FeedSlots {
        let rows = micro.rows();
        let dtype = if tokens { DType::I32 } else { backend.compute() };
        FeedSlots {
            inputs: plan.reserve("batch.inputs", dtype, rows * samples.inputs()),
            targets: plan.reserve("batch.targets", DType::I32, rows),
            first_key: samples.resets_attention().then(|| plan.reserve("batch.first_key", DType::I32, rows)),
        }
    }

    /// Takes the reserved memory.
    pub fn new(backend: &B, samples: Box<dyn Samples>, slots: FeedSlots, planned: &mut Planned<B>) -> Result<Self> {
        let inputs = planned.take(slots.inputs);
        let targets = planned.take(slots.targets);
        let first_key = slots.first_key.map(|s| planned.take(s));
        let host = HostBatch {
            dtype: inputs.dtype(),
            inputs: vec![0; bytes(&inputs)],
            targets: vec![0; targets.len()],
            first_key: first_key.as_ref().map(|f| vec![0; f.len()]),
        };
        let size = bytes(&inputs) + bytes(&targets) + first_key.as_ref().map_or(0, bytes);
        let stages = [(backend.host(size)?, None), (backend.host(size)?, None)];
        Ok(Self { samples, batch: Batch { inputs, targets, first_key }, host, stages, next: 0 })
    }

    /// Brings the training samples from global index `first` on to the device.
    pub fn train(&mut self, backend: &B, first: u64) -> Result<()> {
        let reading = trace::span(Lane::Host, "read a batch");
        self.samples.train(first, &mut self.host);
        drop(reading);
        self.upload(backend)
    }

    /// Brings held-out samples from index `first` on to the device; returns the number of counted targets.
    pub fn validate(&mut self, backend: &B, first: u64) -> Result<usize> {
        let counted = self.samples.validate(first, &mut self.host);
        self.upload(backend)?;
        Ok(counted)
    }

    fn upload(&mut self, backend: &B) -> Result<()> {
        let (stage, busy) = &mut self.stages[self.next];
        self.next = 1 - self.next;
        if let Some(event) = busy.take() {
            backend.synchronize(&event)?;
        }
        let _copy = backend.span(Stream::Compute, Lane::Copy, "batch to the device");
        let batch = &mut self.batch;
        let mut at = 0;
        let mut put = |from: &[u8], to: &mut Tensor<B>| {
            let range = at..at + from.len();
            stage.bytes_mut()[range.clone()].copy_from_slice(from);
            backend.upload(Stream::Compute, stage, range.clone(), to.view_mut());
            at = range.end;
        };
        put(&self.host.inputs, &mut batch.inputs);
        put(bytemuck::cast_slice(&self.host.targets), &mut batch.targets);
        if let (Some(from), Some(to)) = (&self.host.first_key, &mut batch.first_key) {
            put(bytemuck::cast_slice(from), to);
        }
        *busy = Some(backend.record(Stream::Compute));
        Ok(())
    }
}

fn bytes<B: Backend>(tensor: &Tensor<B>) -> usize {
    tensor.len() * tensor.dtype().size()
}

/// The error for a run without held-out data that asks for a measurement on it.
pub fn no_held_out() -> Error {
    Error::Usage("there is no held-out data to evaluate on: tokenize with --val-fraction, or give a file".into())
}
