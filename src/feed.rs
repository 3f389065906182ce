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

/// Parts of the ring: one is read by the compute stream while the other is filled.
pub const PARTS: usize = 2;

/// Micro-batches on the device: a ring of [`PARTS`] parts, filled on the copy stream while the compute stream works on
/// what was brought before.
///
/// Recorded work has fixed addresses, and each part is memory of its own. So there is a recording for each part
/// ([`Feed::part`]), rather than a copy into one place, or a kernel that finds its place by a number on the device:
/// those would cost every step a launch and a trip through memory before the first kernel that reads tokens, the second
/// recording costs milliseconds once.
pub struct Feed<B: Backend> {
    /// Where micro-batches come from.
    pub samples: Box<dyn Samples>,
    host: HostBatch,
    parts: Vec<Part<B>>,
    current: usize,
}

/// Micro-batches that are brought together, and the host memory that they come from.
struct Part<B: Backend> {
    batches: Vec<Batch<B>>,
    stage: B::Host,
    /// The last copy is over: `stage` may be filled again, and the device's batches may be read.
    filled: Option<B::Event>,
    /// Whatever read the batches has run.
    read: Option<B::Event>,
}

/// Reserved memory of a ring: its parts' micro-batches.
pub struct FeedSlots(Vec<Vec<BatchSlots>>);

struct BatchSlots {
    inputs: Slot,
    targets: Slot,
    first_key: Option<Slot>,
}

impl<B: Backend> Feed<B> {
    /// Reserves the device's ring, with `batches` micro-batches in a part.
    pub fn plan(
        backend: &B,
        plan: &mut Plan,
        samples: &dyn Samples,
        micro: MicroBatch,
        tokens: bool,
        batches: usize,
    ) -> FeedSlots {
        let rows = micro.rows();
        let dtype = if tokens { DType::I32 } else { backend.compute() };
        let mut batch = |i| BatchSlots {
            inputs: plan.reserve(format!("batch.{i}.inputs"), dtype, rows * samples.inputs()),
            targets: plan.reserve(format!("batch.{i}.targets"), DType::I32, rows),
            first_key: samples
                .resets_attention()
                .then(|| plan.reserve(format!("batch.{i}.first_key"), DType::I32, rows)),
        };
        FeedSlots((0..PARTS).map(|part| (0..batches).map(|i| batch(part * batches + i)).collect()).collect())
    }

    /// Takes the reserved memory.
    pub fn new(backend: &B, samples: Box<dyn Samples>, slots: FeedSlots, planned: &mut Planned<B>) -> Result<Self> {
        let mut batch = |slots: BatchSlots| Batch {
            inputs: planned.take(slots.inputs),
            targets: planned.take(slots.targets),
            first_key: slots.first_key.map(|slot| planned.take(slot)),
        };
        let parts = slots.0.into_iter().map(|slots| {
            let batches: Vec<Batch<B>> = slots.into_iter().map(&mut batch).collect();
            let stage = backend.host(batches.len() * bytes_of_batch(&batches[0]))?;
            Ok(Part { batches, stage, filled: None, read: None })
        });
        let parts: Vec<Part<B>> = parts.collect::<Result<_>>()?;
        let Batch { inputs, targets, first_key } = &parts[0].batches[0];
        let host = HostBatch {
            dtype: inputs.dtype(),
            inputs: vec![0; bytes(inputs)],
            targets: vec![0; targets.len()],
            first_key: first_key.as_ref().map(|f| vec![0; f.len()]),
        };
        Ok(Self { samples, host, parts, current: 0 })
    }

    /// Brings training samples on to the device, for each of `firsts` a micro-batch from that global index on, as many
    /// as a part has. They are what [`Feed::batch`] gives from now on.
    pub fn train(&mut self, backend: &B, firsts: impl IntoIterator<Item = u64>) -> Result<()> {
        self.turn(backend)?;
        for (i, first) in firsts.into_iter().enumerate() {
            let reading = trace::span(Lane::Host, "read a batch");
            self.samples.train(first, &mut self.host);
            drop(reading);
            self.upload(backend, i);
        }
        self.hand_over(backend);
        Ok(())
    }

    /// Brings held-out samples from index `first` on to the device, as batch 0; returns the number of counted targets.
    pub fn validate(&mut self, backend: &B, first: u64) -> Result<usize> {
        self.turn(backend)?;
        let counted = self.samples.validate(first, &mut self.host);
        self.upload(backend, 0);
        self.hand_over(backend);
        Ok(counted)
    }

    /// A micro-batch that was brought last, for the compute stream.
    pub fn batch(&self, index: usize) -> &Batch<B> {
        &self.parts[self.current].batches[index]
    }

    /// Where it lies: what reads the batches has the same arguments whenever this is the same.
    pub fn part(&self) -> usize {
        self.current
    }

    /// Goes on to the next part, as soon as the host may fill it; the copy stream does when its last reader is done.
    fn turn(&mut self, backend: &B) -> Result<()> {
        // All that reads the part so far is enqueued by now.
        self.parts[self.current].read = Some(backend.record(Stream::Compute));
        self.current = (self.current + 1) % PARTS;
        let part = &mut self.parts[self.current];
        if let Some(filled) = part.filled.take() {
            backend.synchronize(&filled)?;
        }
        if let Some(read) = part.read.take() {
            backend.wait(Stream::Copy, &read);
        }
        Ok(())
    }

    /// Copies what is on the host into a batch of the current part.
    fn upload(&mut self, backend: &B, index: usize) {
        let Part { batches, stage, .. } = &mut self.parts[self.current];
        let batch = &mut batches[index];
        let mut at = index * bytes_of_batch(batch);
        let _copy = backend.span(Stream::Copy, Lane::Copy, "batch to the device");
        let mut put = |from: &[u8], to: &mut Tensor<B>| {
            let range = at..at + from.len();
            stage.bytes_mut()[range.clone()].copy_from_slice(from);
            backend.upload(Stream::Copy, stage, range.clone(), to.view_mut());
            at = range.end;
        };
        put(&self.host.inputs, &mut batch.inputs);
        put(bytemuck::cast_slice(&self.host.targets), &mut batch.targets);
        if let (Some(from), Some(to)) = (&self.host.first_key, &mut batch.first_key) {
            put(bytemuck::cast_slice(from), to);
        }
    }

    /// Lets the compute stream wait for the copies.
    fn hand_over(&mut self, backend: &B) {
        let filled = backend.record(Stream::Copy);
        backend.wait(Stream::Compute, &filled);
        self.parts[self.current].filled = Some(filled);
    }
}

fn bytes_of_batch<B: Backend>(batch: &Batch<B>) -> usize {
    bytes(&batch.inputs) + bytes(&batch.targets) + batch.first_key.as_ref().map_or(0, bytes)
}

fn bytes<B: Backend>(tensor: &Tensor<B>) -> usize {
    tensor.len() * tensor.dtype().size()
}

/// The error for a run without held-out data that asks for a measurement on it.
pub fn no_held_out() -> Error {
    Error::Usage("there is no held-out data to evaluate on: tokenize with --val-fraction, or give a file".into())
}
