//! The training step, for one rank: from samples to updated weights, without a file or a word to the user.
//!
//! A step: upload its scalars; for each micro-batch of this rank forward, backward, and the sum over micro-batches; the
//! sum over ranks, group by group as backward finishes; norm, decision, update. Nothing waits for the device: results
//! come back through a ring, [`LAG`] steps late, and a step that is not finite changes nothing on the device.

mod graphs;
mod results;

pub use results::{Bad, StepResult};

use crate::{
    DType, Error, Result,
    backend::{HostBuffer, Stream, Tensor},
    comm::{self, Comm, Ticket},
    config::{Config, OnNan, OptimizerConfig},
    feed::{Feed, Samples},
    model::{
        self, Acts, Gradients, MicroBatch, Network, Weights,
        decoder::Recompute,
        param::Table,
        plan::{Plan, Slot},
        spec::Spec,
    },
    ops::{
        Ops,
        gradient::Decision,
        muon::{self, MuonMatrix},
        optimizer::Arenas,
        pieces::{self, Pieces, RowSettings},
        scalars::{self, SCALAR_BYTES, SCALARS, Scalar},
    },
    schedule,
    state::{Meaning, Position, State, StateSlots},
    trace::{self, Lane},
};
use graphs::Work;
use results::Pending;
use std::{
    collections::{BTreeMap, VecDeque},
    time::Instant,
};

/// Steps that may be under way before the host looks at the oldest one's results.
pub const LAG: usize = 2;

/// Everything that training on one rank needs.
pub struct Trainer<B: Ops> {
    /// The device.
    pub backend: B,
    /// Other ranks.
    pub comm: Box<dyn Comm<B>>,
    /// The network.
    pub network: Network<B>,
    /// Weights and moments.
    pub state: State<B>,
    /// Where the run stands.
    pub position: Position,
    /// What the plan said, for the log.
    pub plan: Plan,
    /// What is computed again in backward.
    pub recompute: Recompute,
    /// Samples.
    pub feed: Feed<B>,
    optimizer: OptimizerConfig,
    config: Config,
    micro: MicroBatch,
    acts: Acts<B>,
    gradients: Tensor<B>,
    sums: Vec<Tensor<B>>,
    merges: Vec<usize>,
    pieces: Pieces<B>,
    partials: Tensor<B>,
    muon_scratch: Option<Tensor<B>>,
    scalars: Tensor<B>,
    validation: Tensor<B>,
    /// Whether a step is recorded as one.
    whole: bool,
    graphs: BTreeMap<Work, B::Graph>,
    ring: VecDeque<Pending<B>>,
    spare: Vec<Pending<B>>,
}

impl<B: Ops> Trainer<B> {
    /// Plans and allocates everything for training; the state is zero until it is initialised or loaded.
    ///
    /// `recompute` is the way to save memory; see [`Self::choose_recompute`].
    pub fn new(
        backend: B,
        comm: Box<dyn Comm<B>>,
        config: &Config,
        meaning: &Meaning,
        samples: Box<dyn Samples>,
        recompute: Recompute,
    ) -> Result<Self> {
        let network = Network::new(&backend, &meaning.spec, &meaning.scaling)?;
        let (table, micro) = (network.table(), micro_batch(config, &meaning.spec));
        let optimizer = meaning.optimizer.clone();
        enough_micro_batches(config, comm.world())?;
        let share = comm::share(config.batch.micro_batches, comm.rank(), comm.world());
        let pieces = Pieces::new(
            &backend,
            pieces::cut((0..table.rows.len()).map(|row| table.values(row)), 0..table.arena),
            optimizer.settings(table, &meaning.scaling),
        )?;
        let mut plan = Plan::default();
        let slots = Slots::reserve(&backend, &mut plan, &network, config, meaning, share.len(), micro, recompute);
        let (rows, inputs) = (micro.rows(), samples.inputs());
        let whole =
            B::RECORDS && graphs::whole_steps(config.graph, comm.world(), share.len(), table.arena, rows, inputs);
        let (tokens, batches) = (matches!(meaning.spec, Spec::Decoder(_)), if whole { share.len() } else { 1 });
        let batch = Feed::plan(&backend, &mut plan, &*samples, micro, tokens, batches);
        let mut planned = plan.commit(&backend)?;
        let state = State::new(slots.state, &mut planned);
        let [scalars, validation] = slots.small.map(|slot| planned.take(slot));
        Ok(Self {
            state,
            position: Position::default(),
            recompute,
            feed: Feed::new(&backend, samples, batch, &mut planned)?,
            optimizer,
            config: config.clone(),
            micro,
            acts: Acts::new(slots.acts, &mut planned),
            gradients: planned.take(slots.gradients),
            sums: slots.sums.into_iter().map(|slot| planned.take(slot)).collect(),
            merges: comm::halves(share.len()),
            pieces,
            partials: planned.take(slots.partials),
            muon_scratch: slots.muon.map(|slot| planned.take(slot)),
            scalars,
            validation,
            whole,
            graphs: BTreeMap::new(),
            ring: VecDeque::new(),
            spare: Vec::new(),
            plan,
            network,
            comm,
            backend,
        })
    }

    /// Weights, to read.
    pub fn weights(&self) -> Weights<'_, B> {
        Weights { table: self.network.table(), arena: self.state.weights.view() }
    }

    /// Enqueues one step. Returns the results of an older one, once [`LAG`] steps are under way.
    pub fn step(&mut self) -> Result<Option<StepResult>> {
        let mut pending = self.begin()?;
        if self.whole { self.whole_step(pending.before.samples) } else { self.step_in_parts(pending.before.samples) }?;
        self.backend.download(Stream::Compute, self.scalars.view(), &mut pending.results, 0);
        pending.event = Some(self.backend.record(Stream::Compute));
        self.position = pending.after;
        self.ring.push_back(pending);
        if self.ring.len() > LAG { self.collect() } else { Ok(None) }
    }

    /// Waits for the oldest step under way. None if there is none.
    pub fn collect(&mut self) -> Result<Option<StepResult>> {
        let Some(mut pending) = self.ring.pop_front() else { return Ok(None) };
        if let Some(event) = pending.event.take() {
            let _wait = trace::span(Lane::Host, "wait for results");
            self.backend.synchronize(&event)?;
        }
        let result = pending.result(self.ring.front().map_or_else(Instant::now, |next| next.begun));
        self.spare.push(pending);
        Ok(Some(result))
    }

    /// Writes the step's inputs to the device: learning rate, time, zero sums.
    fn begin(&mut self) -> Result<Pending<B>> {
        let before = self.position;
        let samples = (self.config.batch.micro_batches * self.micro.samples) as u64;
        let after = Position {
            step: before.step + 1,
            tokens: before.tokens + self.tokens_per_step(),
            samples: before.samples + samples,
            time: before.time + 1,
            ..before
        };
        let lr = self.optimizer.lr * schedule::factor(&self.config.schedule, after.step, self.config.steps);
        let mut pending = Pending::begin(&self.backend, self.spare.pop(), before, after, lr)?;
        let inputs = pending.inputs.bytes_mut();
        scalars::set(inputs, Scalar::LearningRate, lr);
        scalars::set(inputs, Scalar::Time, after.time as f64);
        let fresh = Scalar::Counted as usize + 1;
        self.backend.upload(Stream::Compute, &pending.inputs, 0..fresh * 8, self.scalars.slice_mut(0..fresh));
        Ok(pending)
    }

    /// Global indices of the first samples of this rank's micro-batches, in a step whose first is `samples`.
    fn firsts(&self, samples: u64) -> impl ExactSizeIterator<Item = u64> + use<B> {
        let size = self.micro.samples;
        comm::share(self.config.batch.micro_batches, self.comm.rank(), self.comm.world())
            .map(move |index| samples + (index * size) as u64)
    }

    /// All of a step, recorded as one; there is one rank.
    fn whole_step(&mut self, samples: u64) -> Result<()> {
        let firsts = self.firsts(samples);
        self.feed.train(&self.backend, firsts)?;
        self.recorded(Work::Step { part: self.feed.part() }, |trainer| {
            let count = trainer.merges.len();
            (0..count).try_for_each(|index| trainer.micro_step(index, index, index + 1 == count))?;
            trainer.update()
        })
    }

    /// A step's micro-batches one by one, and its update.
    fn step_in_parts(&mut self, samples: u64) -> Result<()> {
        let firsts = self.firsts(samples);
        let count = firsts.len();
        for (index, first) in firsts.enumerate() {
            self.feed.train(&self.backend, [first])?;
            let last = index + 1 == count;
            if last && self.comm.world() > 1 {
                // Sums over ranks begin within it, and hosts have a part in them: it is not recorded.
                self.micro_step(index, 0, last)?;
                continue;
            }
            let (part, top, merges) = (self.feed.part(), stack_height(&self.merges, index), self.merges[index]);
            self.recorded(Work::Micro { part, top, merges, last }, |trainer| trainer.micro_step(index, 0, last))?;
        }
        let sums = Scalar::LossSum as usize..Scalar::Counted as usize + 1;
        self.comm.all_reduce(&self.backend, Stream::Compute, self.scalars.slice_mut(sums))?;
        self.recorded(Work::Update, Self::update)
    }

    /// Forward, backward, and the sums over micro-batches and ranks. `index` counts this rank's micro-batches, `batch`
    /// those of the feed's part.
    fn micro_step(&mut self, index: usize, batch: usize, last: bool) -> Result<()> {
        let scale = 1.0 / self.nominal();
        let Self { backend, comm, network, state, feed, acts, gradients, sums, merges, scalars, micro, .. } = self;
        let (comm, merges, top) = (&**comm, merges[index], stack_height(merges, index));
        let (over_ranks, batch) = (last && comm.world() > 1, feed.batch(batch));
        let (mut fault, mut tickets) = (Ok(()), Vec::new());
        let mut finished = |group: usize, part: crate::backend::Mut<'_, B>| {
            if sums.is_empty() {
                return;
            }
            let range = network.table().group(group);
            push(backend, sums, top, merges, range.clone(), part.as_ref());
            if over_ranks && fault.is_ok() {
                match reduce(backend, comm, sums[0].slice_mut(range.clone())) {
                    Ok(ticket) => tickets.push((range, ticket)),
                    Err(error) => fault = Err(error),
                }
            }
        };
        let weights = Weights { table: network.table(), arena: state.weights.view() };
        let mut parts = Gradients { table: network.table(), arena: gradients.view_mut(), finished: &mut finished };
        network.micro_step(backend, weights, &mut parts, acts, batch, *micro, scale);
        backend.tally(scalars.view_mut(), acts.losses().view(), batch.targets.view());
        fault?;
        for (range, ticket) in tickets {
            comm.finish_all_reduce(backend, Stream::Communication, ticket, sums[0].slice_mut(range))?;
        }
        if over_ranks {
            let done = backend.record(Stream::Communication);
            backend.wait(Stream::Compute, &done);
        }
        Ok(())
    }

    /// Norm, decision, update.
    fn update(&mut self) -> Result<()> {
        let decision = self.decision();
        let Self {
            backend, network, state, gradients, sums, pieces, partials, muon_scratch, scalars, optimizer, ..
        } = self;
        // Sums stay in the type that they are made in.
        let (table, gradients) = (network.table(), sums.first().unwrap_or(gradients));
        let _update = backend.span(Stream::Compute, Lane::Compute, "update");
        let count = pieces.list.len();
        backend.square_norms(partials.slice_mut(0..count), gradients.view(), pieces);
        backend.decide(scalars.view_mut(), partials.slice(0..count), pieces, decision);
        let arenas = Arenas {
            weights: state.weights.view_mut(),
            master: state.master.as_mut().map(Tensor::view_mut),
            first: state.first.as_mut().map(Tensor::view_mut),
            second: state.second.as_mut().map(Tensor::view_mut),
            maximum: state.maximum.as_mut().map(Tensor::view_mut),
            gradients: gradients.view(),
        };
        backend.update(arenas, partials.slice_mut(0..count), scalars.view(), pieces, optimizer.method());
        if let Some(scratch) = muon_scratch {
            muon_update(backend, table, state, gradients, pieces, partials, scratch, scalars);
        }
        backend.finish_update(scalars.view_mut(), partials.view());
        Ok(())
    }

    /// Tokens (rows) of a step, over all ranks, ignored ones among them.
    pub fn tokens_per_step(&self) -> u64 {
        (self.config.batch.micro_batches * self.micro.rows()) as u64
    }

    /// Counted tokens of a step if none is ignored.
    fn nominal(&self) -> f64 {
        self.tokens_per_step() as f64
    }

    fn decision(&self) -> Decision {
        let clip = if self.optimizer.clip > 0.0 { self.optimizer.clip } else { f64::INFINITY };
        Decision { clip, nominal: self.nominal(), halt: self.config.on_nan == OnNan::Stop }
    }

    /// Mean loss over held-out data: `batches` micro-batches, or all for 0, shared out among ranks. Returns it with the
    /// number of micro-batches; None without held-out data.
    pub fn validate(&mut self, batches: usize) -> Result<Option<(f64, usize)>> {
        let all = self.feed.samples.held_out().div_ceil(self.micro.samples as u64) as usize;
        let batches = if batches == 0 { all } else { batches.min(all) };
        if batches == 0 {
            return Ok(None);
        }
        self.backend.zero(Stream::Compute, self.validation.view_mut());
        for index in comm::share(batches, self.comm.rank(), self.comm.world()) {
            self.feed.validate(&self.backend, (index * self.micro.samples) as u64)?;
            let weights = Weights { table: self.network.table(), arena: self.state.weights.view() };
            self.network.evaluate(&self.backend, weights, &mut self.acts, self.feed.batch(0), self.micro);
            self.backend.tally(
                self.validation.view_mut(),
                self.acts.losses().view(),
                self.feed.batch(0).targets.view(),
            );
        }
        let sums = Scalar::LossSum as usize..Scalar::Counted as usize + 1;
        self.comm.all_reduce(&self.backend, Stream::Compute, self.validation.slice_mut(sums))?;
        let mut host = self.backend.host(SCALAR_BYTES)?;
        self.backend.download(Stream::Compute, self.validation.view(), &mut host, 0);
        self.backend.synchronize(&self.backend.record(Stream::Compute))?;
        let get = |scalar| scalars::get(host.bytes(), scalar);
        Ok(Some((get(Scalar::LossSum) / get(Scalar::Counted), batches)))
    }
}

/// Reserved memory of a trainer, all but its batch.
struct Slots {
    state: StateSlots,
    gradients: Slot,
    sums: Vec<Slot>,
    muon: Option<Slot>,
    partials: Slot,
    small: [Slot; 2],
    acts: model::Slots,
}

impl Slots {
    /// `share`: micro-batches of this rank.
    fn reserve<B: Ops>(
        backend: &B,
        plan: &mut Plan,
        network: &Network<B>,
        config: &Config,
        meaning: &Meaning,
        share: usize,
        micro: MicroBatch,
        recompute: Recompute,
    ) -> Self {
        let (table, optimizer) = (network.table(), &meaning.optimizer);
        let settings = optimizer.settings(table, &meaning.scaling);
        let pieces = pieces::cut((0..table.rows.len()).map(|row| table.values(row)), 0..table.arena).len();
        let depth = if config.batch.micro_batches > 1 { comm::depth(share) } else { 0 };
        let mut sum = |i| plan.reserve(format!("gradient sums.{i}"), backend.reduction(), table.arena);
        Self {
            sums: (0..depth).map(&mut sum).collect(),
            state: State::plan(backend, plan, table, Some(optimizer)),
            gradients: plan.reserve("gradients", backend.gradient(), table.arena),
            muon: muon_scratch(table, &settings).map(|len| plan.reserve("muon", backend.compute(), len)),
            partials: plan.reserve("partial sums", DType::F64, pieces + table.rows.len()),
            small: ["step scalars", "validation scalars"].map(|name| plan.reserve(name, DType::F64, SCALARS)),
            acts: network.plan(backend, plan, micro, Some(recompute)),
        }
    }
}

/// Bytes that training will take, all but the batch itself, for one of `world` ranks.
pub fn memory<B: Ops>(
    backend: &B,
    network: &Network<B>,
    config: &Config,
    meaning: &Meaning,
    world: usize,
    samples: usize,
    recompute: Recompute,
) -> usize {
    let mut plan = Plan::default();
    let (share, micro) = (comm::share(config.batch.micro_batches, 0, world), micro_batch(config, &meaning.spec));
    let micro = MicroBatch { samples, ..micro };
    Slots::reserve(backend, &mut plan, network, config, meaning, share.len(), micro, recompute);
    plan.bytes()
}

/// Size of a micro-batch of a configuration.
pub fn micro_batch(config: &Config, spec: &Spec) -> MicroBatch {
    MicroBatch { samples: config.batch.size, length: spec.context() }
}

/// Every rank needs a micro-batch.
pub fn enough_micro_batches(config: &Config, world: usize) -> Result<()> {
    if config.batch.micro_batches >= world {
        return Ok(());
    }
    let why = format!("fewer than the {world} ranks: every rank needs a micro-batch");
    Err(Error::config("batch.micro_batches", config.batch.micro_batches, why))
}

/// Sums on the stack before micro-batch `index` is pushed.
fn stack_height(merges: &[usize], index: usize) -> usize {
    index - merges[..index].iter().sum::<usize>()
}

/// Pushes a part of the gradients on the stack of sums, and adds topmost sums as the tree says.
fn push<B: Ops>(
    backend: &B,
    sums: &mut [Tensor<B>],
    top: usize,
    merges: usize,
    range: std::ops::Range<usize>,
    part: crate::backend::Ref<'_, B>,
) {
    backend.accumulate(sums[top].slice_mut(range.clone()), part, false);
    for at in (top - merges..top).rev() {
        let (low, high) = sums.split_at_mut(at + 1);
        backend.accumulate(low[at].slice_mut(range.clone()), high[0].slice(range.clone()), true);
    }
}

/// Begins a sum over ranks on the communication stream, behind what the compute stream has done so far.
fn reduce<B: Ops>(backend: &B, comm: &dyn Comm<B>, part: crate::backend::Mut<'_, B>) -> Result<Ticket<B>> {
    let ready = backend.record(Stream::Compute);
    backend.wait(Stream::Communication, &ready);
    comm.begin_all_reduce(backend, Stream::Communication, part)
}

/// Elements of scratch for Muon's largest matrix; None if no row is Muon's.
fn muon_scratch(table: &Table, settings: &[RowSettings]) -> Option<usize> {
    let rows = table.rows.iter().zip(settings).filter(|(_, settings)| settings.muon != 0);
    rows.map(|(row, _)| muon::scratch(row.axes[0].size(), row.columns())).max()
}

#[allow(clippy::too_many_arguments, reason = "the disjoint parts of a trainer")]
fn muon_update<B: Ops>(
    backend: &B,
    table: &Table,
    state: &mut State<B>,
    gradients: &Tensor<B>,
    pieces: &Pieces<B>,
    partials: &mut Tensor<B>,
    scratch: &mut Tensor<B>,
    scalars: &Tensor<B>,
) {
    for (i, (row, settings)) in table.rows.iter().zip(&pieces.rows).enumerate().filter(|(_, (_, s))| s.muon != 0) {
        let values = table.values(i);
        let Some(first) = state.first.as_mut() else { return };
        let matrix = MuonMatrix {
            weight: state.weights.slice_mut(values.clone()),
            master: state.master.as_mut().map(|m| m.slice_mut(values.clone())),
            first: first.slice_mut(values.clone()),
            offset: values.start,
            gradient: gradients.slice(values),
            rows: row.axes[0].size(),
            columns: row.columns(),
            settings: *settings,
        };
        let at = pieces.list.len() + i;
        let needed = 0..muon::scratch(matrix.rows, matrix.columns);
        backend.muon(matrix, partials.slice_mut(at..at + 1), scratch.slice_mut(needed), scalars.view());
    }
}
