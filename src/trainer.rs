//! The training step, for one rank: from samples to updated weights, without a file or a word to the user.
//!
//! A step: upload its scalars; for each micro-batch of this rank forward, backward, and the sum over micro-batches; the
//! sum over ranks, group by group as backward finishes; norm, decision, update. Where each rank updates a part of the
//! weights, the next step begins with all of them being sent to all ranks, and forward waits for one group after the
//! other. Nothing waits for the device: results come back through a ring, [`LAG`] steps late, and a step that is not
//! finite changes nothing on the device.

mod graphs;
mod results;
mod sharding;
mod update;

pub use results::{Bad, StepResult};

use crate::{
    DType, Error, Result,
    backend::{HostBuffer, Mut, Ref, Stream, Tensor},
    comm::{self, Comm},
    config::{Config, OptimizerConfig, Reduction},
    feed::{Feed, Samples},
    model::{
        self, Acts, Gradients, MicroBatch, Network, Weights,
        decoder::Recompute,
        plan::{Plan, Slot},
        spec::Spec,
    },
    ops::{
        Ops,
        pieces::{self, Pieces},
        scalars::{self, SCALAR_BYTES, SCALARS, Scalar},
    },
    schedule,
    state::{Meaning, Position, State, StateSlots},
    trace::{self, Lane},
};
use graphs::Work;
use results::Pending;
use sharding::{Gathering, Own, Shards};
use std::{
    cell::RefCell,
    collections::{BTreeMap, VecDeque},
    mem,
    ops::Range,
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
    shards: Shards,
    own: Own<B>,
    /// Type in which gradients travel, where it is another than that in which they are summed here.
    wire: Option<DType>,
    /// Whether other ranks have updated weights that this one does not know yet.
    stale: bool,
    /// Such weights on their way here.
    gathering: Gathering<B>,
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
        let rank = (comm.rank(), comm.world());
        let slots = Slots::reserve(&backend, &mut plan, &network, config, meaning, rank, micro, recompute);
        let (rows, inputs) = (micro.rows(), samples.inputs());
        let whole =
            B::RECORDS && graphs::whole_steps(config.graph, comm.world(), share.len(), table.arena, rows, inputs);
        let (tokens, batches) = (matches!(meaning.spec, Spec::Decoder(_)), if whole { share.len() } else { 1 });
        let batch = Feed::plan(&backend, &mut plan, &*samples, micro, tokens, batches);
        let mut planned = plan.commit(&backend)?;
        let state = State::new(slots.state, &mut planned);
        let [scalars, validation] = slots.small.map(|slot| planned.take(slot));
        let own = Own::new(&backend, &pieces, state.owned.clone())?;
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
            own,
            pieces,
            shards: slots.shards,
            wire: (config.comm.reduction == Reduction::Bf16 && comm.world() > 1).then_some(DType::BF16),
            stale: false,
            gathering: Gathering::default(),
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

    /// Weights, to read; see [`Self::gather`].
    pub fn weights(&self) -> Weights<'_, B> {
        Weights::new(self.network.table(), self.state.weights.view())
    }

    /// Elements of the arena that this rank writes into a checkpoint: what only it has, or else a share.
    pub fn saves(&self) -> Range<usize> {
        match self.shards.are_many() {
            true => self.own.range.clone(),
            false => comm::share(self.network.table().arena, self.comm.rank(), self.comm.world()),
        }
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
        self.begin_gather()?;
        for (index, first) in firsts.enumerate() {
            self.feed.train(&self.backend, [first])?;
            let last = index + 1 == count;
            if last && self.comm.world() > 1 || !self.gathering.is_empty() {
                // Hosts have a part in what goes on between ranks: it is not recorded.
                self.micro_step(index, 0, last)?;
                continue;
            }
            let (part, top, merges) = (self.feed.part(), stack_height(&self.merges, index), self.merges[index]);
            self.recorded(Work::Micro { part, top, merges, last }, |trainer| trainer.micro_step(index, 0, last))?;
        }
        let sums = Scalar::LossSum as usize..Scalar::Counted as usize + 1;
        self.comm.all_reduce(&self.backend, Stream::Compute, self.scalars.slice_mut(sums))?;
        if self.shards.are_many() { self.update_part() } else { self.recorded(Work::Update, Self::update) }
    }

    /// Lets other ranks have the weights that this one updated, and this one theirs. All ranks do so together, before
    /// the weights are read for anything but the next step.
    pub fn gather(&mut self) -> Result<()> {
        self.begin_gather()?;
        let gathering = RefCell::new(mem::take(&mut self.gathering));
        let Self { backend, comm, network, state, .. } = self;
        Gathering::weights(&gathering, backend, &**comm, network.table(), state.weights.view_mut()).finish();
        gathering.into_inner().fault
    }

    fn begin_gather(&mut self) -> Result<()> {
        if mem::take(&mut self.stale) {
            let Self { backend, comm, network, state, shards, .. } = self;
            self.gathering = shards.begin_gather(backend, &**comm, network.table(), &mut state.weights)?;
        }
        Ok(())
    }

    /// Forward, backward, and the sums over micro-batches and ranks. `index` counts this rank's micro-batches, `batch`
    /// those of the feed's part. Forward waits for weights that are on their way.
    fn micro_step(&mut self, index: usize, batch: usize, last: bool) -> Result<()> {
        let (scale, wire, gathering) = (1.0 / self.nominal(), self.wire, RefCell::new(mem::take(&mut self.gathering)));
        let Self { backend, comm, network, state, feed, acts, gradients, sums, merges, scalars, micro, .. } = self;
        let (comm, merges, top) = (&**comm, merges[index], stack_height(merges, index));
        let (over_ranks, batch, table) = (last && comm.world() > 1, feed.batch(batch), network.table());
        let shards = &self.shards;
        let (mut fault, mut under_way) = (Ok(()), Vec::new());
        let mut finished = |group: usize, part: Mut<'_, B>| {
            if sums.is_empty() {
                return;
            }
            let range = table.group(group);
            push(backend, sums, top, merges, range.clone(), part.as_ref());
            if over_ranks && fault.is_ok() {
                let memory = wire.map(|dtype| (part, dtype));
                match shards.begin_sums(backend, comm, &range, &mut sums[0], memory) {
                    Ok(begun) => under_way.extend(begun),
                    Err(error) => fault = Err(error),
                }
            }
        };
        let arena = Gathering::weights(&gathering, backend, comm, table, state.weights.view_mut());
        let mut parts = Gradients { table, arena: gradients.view_mut(), finished: &mut finished };
        network.micro_step(backend, Weights::arriving(table, &arena), &mut parts, acts, batch, *micro, scale);
        backend.tally(scalars.view_mut(), acts.losses().view(), batch.targets.view());
        arena.finish();
        drop(arena);
        gathering.into_inner().fault.and(fault)?;
        if over_ranks {
            shards.finish_sums(backend, comm, under_way, &mut sums[0], gradients, wire)?;
        }
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

    /// Mean loss over held-out data: `batches` micro-batches, or all for 0, shared out among ranks. Returns it with the
    /// number of micro-batches; None without held-out data.
    pub fn validate(&mut self, batches: usize) -> Result<Option<(f64, usize)>> {
        let all = self.feed.samples.held_out().div_ceil(self.micro.samples as u64) as usize;
        let batches = if batches == 0 { all } else { batches.min(all) };
        if batches == 0 {
            return Ok(None);
        }
        self.gather()?;
        self.backend.zero(Stream::Compute, self.validation.view_mut());
        for index in comm::share(batches, self.comm.rank(), self.comm.world()) {
            self.feed.validate(&self.backend, (index * self.micro.samples) as u64)?;
            let weights = Weights::new(self.network.table(), self.state.weights.view());
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
    shards: Shards,
    small: [Slot; 2],
    acts: model::Slots,
}

impl Slots {
    /// For one rank (its number, and how many there are).
    fn reserve<B: Ops>(
        backend: &B,
        plan: &mut Plan,
        network: &Network<B>,
        config: &Config,
        meaning: &Meaning,
        (rank, world): (usize, usize),
        micro: MicroBatch,
        recompute: Recompute,
    ) -> Self {
        let (table, optimizer) = (network.table(), &meaning.optimizer);
        let settings = optimizer.settings(table, &meaning.scaling);
        let pieces = pieces::cut((0..table.rows.len()).map(|row| table.values(row)), 0..table.arena).len();
        let shards = Shards::new(table, &settings, if config.comm.zero { world } else { 1 });
        let (owned, share) = (shards.of(rank), comm::share(config.batch.micro_batches, rank, world).len());
        let depth = if config.batch.micro_batches > 1 { comm::depth(share) } else { 0 };
        let mut sum = |i| plan.reserve(format!("gradient sums.{i}"), backend.reduction(), table.arena);
        Self {
            sums: (0..depth).map(&mut sum).collect(),
            state: State::plan_part(backend, plan, table, Some(optimizer), owned.clone()),
            gradients: plan.reserve("gradients", backend.gradient(), table.arena),
            muon: update::muon_scratch(table, &settings, &owned)
                .map(|len| plan.reserve("muon", backend.compute(), len)),
            partials: plan.reserve("partial sums", DType::F64, pieces + table.rows.len()),
            shards,
            small: ["step scalars", "validation scalars"].map(|name| plan.reserve(name, DType::F64, SCALARS)),
            acts: network.plan(backend, plan, micro, Some(recompute)),
        }
    }
}

/// Bytes that training will take, all but the batch itself, for one rank (its number, and how many there are).
pub fn memory<B: Ops>(
    backend: &B,
    network: &Network<B>,
    config: &Config,
    meaning: &Meaning,
    rank: (usize, usize),
    samples: usize,
    recompute: Recompute,
) -> usize {
    let mut plan = Plan::default();
    let micro = MicroBatch { samples, ..micro_batch(config, &meaning.spec) };
    Slots::reserve(backend, &mut plan, network, config, meaning, rank, micro, recompute);
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
fn push<B: Ops>(backend: &B, sums: &mut [Tensor<B>], top: usize, merges: usize, range: Range<usize>, part: Ref<'_, B>) {
    backend.accumulate(sums[top].slice_mut(range.clone()), part, false);
    for at in (top - merges..top).rev() {
        let (low, high) = sums.split_at_mut(at + 1);
        backend.accumulate(low[at].slice_mut(range.clone()), high[0].slice(range.clone()), true);
    }
}
