//! The training step, for one rank: from samples to updated weights, without a file or a word to the user.
//!
//! A step: upload its scalars; for each micro-batch of this rank forward, backward, and the sum over micro-batches; the
//! sum over ranks, group by group as backward finishes; norm, decision, update. Where each rank updates a part of the
//! weights, the next step begins with all of them being sent to all ranks, and forward waits for one group after the
//! other. Nothing waits for the device: results come back through a ring, [`LAG`] steps late, and a step that is not
//! finite changes nothing on the device.

mod results;
mod sharding;

pub use results::{Bad, StepResult};

use crate::{
    DType, Error, Result,
    backend::{HostBuffer, Stream, Tensor},
    comm::{self, Comm},
    config::{Config, OnNan, OptimizerConfig, Reduction},
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
};
use results::Pending;
use sharding::{Gathering, Own, Shards};
use std::{cell::RefCell, collections::VecDeque, mem, ops::Range, time::Instant};

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
    partials: Tensor<B>,
    muon_scratch: Option<Tensor<B>>,
    scalars: Tensor<B>,
    validation: Tensor<B>,
    /// One for each micro-batch of this rank, since their sums differ, and one for the update.
    graphs: (Vec<B::Graph>, B::Graph),
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
        let batch = Feed::plan(&backend, &mut plan, &*samples, micro, matches!(meaning.spec, Spec::Decoder(_)));
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
            partials: planned.take(slots.partials),
            muon_scratch: slots.muon.map(|slot| planned.take(slot)),
            scalars,
            validation,
            graphs: (share.clone().map(|_| B::Graph::default()).collect(), B::Graph::default()),
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
        Weights::new(self.network.table(), self.state.weights.view())
    }

    /// Enqueues one step. Returns the results of an older one, once [`LAG`] steps are under way.
    pub fn step(&mut self) -> Result<Option<StepResult>> {
        let mut pending = self.begin()?;
        let mut gathering = self.begin_gather()?;
        let share = comm::share(self.config.batch.micro_batches, self.comm.rank(), self.comm.world());
        for index in share.clone() {
            let first = pending.before.samples + (index * self.micro.samples) as u64;
            self.feed.train(&self.backend, first)?;
            self.micro_step(index - share.start, index + 1 == share.end, mem::take(&mut gathering))?;
        }
        self.update()?;
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

    /// Lets other ranks have the weights that this one updated, and this one theirs. All ranks do so together, before
    /// weights are read for anything but the next step.
    pub fn gather(&mut self) -> Result<()> {
        let gathering = RefCell::new(self.begin_gather()?);
        let Self { backend, comm, network, state, .. } = self;
        Gathering::weights(&gathering, backend, &**comm, network.table(), state.weights.view_mut()).finish();
        gathering.into_inner().fault
    }

    fn begin_gather(&mut self) -> Result<Gathering<B>> {
        if !mem::take(&mut self.stale) {
            return Ok(Gathering::default());
        }
        let Self { backend, comm, network, state, shards, .. } = self;
        shards.begin_gather(backend, &**comm, network.table(), &mut state.weights)
    }

    /// Forward, backward, and the sums over micro-batches and ranks. `index` counts this rank's micro-batches; forward
    /// waits for weights that are on their way.
    fn micro_step(&mut self, index: usize, last: bool, gathering: Gathering<B>) -> Result<()> {
        let (scale, top, wire) = (1.0 / self.nominal(), stack_height(&self.merges, index), self.wire);
        let Self { backend, comm, network, state, feed, acts, gradients, sums, merges, .. } = self;
        let Self { scalars, graphs, micro, shards, own, .. } = self;
        let (comm, table, merges) = (&**comm, network.table(), merges[index]);
        let (mut fault, mut under_way) = (Ok(()), Vec::new());
        let mut finished = |group: usize, part: crate::backend::Mut<'_, B>| {
            if sums.is_empty() {
                return;
            }
            let range = table.group(group);
            push(backend, sums, top, merges, range.clone(), part.as_ref());
            if last && comm.world() > 1 && fault.is_ok() {
                let memory = wire.map(|dtype| (part, dtype));
                match shards.begin_sums(backend, comm, &range, &mut sums[0], memory) {
                    Ok(begun) => under_way.extend(begun),
                    Err(error) => fault = Err(error),
                }
            }
        };
        // Hosts have a part in what goes on between ranks: it is not recorded.
        let recorded = gathering.is_empty() && !(last && comm.world() > 1);
        let gathering = RefCell::new(gathering);
        let arena = Gathering::weights(&gathering, backend, comm, table, state.weights.view_mut());
        let mut work = || {
            let mut gradients = Gradients { table, arena: gradients.view_mut(), finished: &mut finished };
            let weights = Weights::arriving(table, &arena);
            network.micro_step(backend, weights, &mut gradients, acts, &feed.batch, *micro, scale);
            backend.tally(scalars.view_mut(), acts.losses().view(), feed.batch.targets.view());
            Ok(())
        };
        if recorded { backend.captured(&mut graphs.0[index], work) } else { work() }?;
        arena.finish();
        drop(arena);
        gathering.into_inner().fault.and(fault)?;
        if last && !sums.is_empty() {
            Shards::finish_sums(backend, comm, under_way, &mut sums[0], gradients, wire)?;
            let own = own.range.clone();
            backend.accumulate(gradients.slice_mut(own.clone()), sums[0].slice(own), false);
        }
        Ok(())
    }

    /// Norm, decision, update. Where others update the rest, sums over all pieces are made of theirs and this rank's:
    /// what it does not own is 0, which changes no sum of a piece.
    fn update(&mut self) -> Result<()> {
        let sums = Scalar::LossSum as usize..Scalar::Counted as usize + 1;
        self.comm.all_reduce(&self.backend, Stream::Compute, self.scalars.slice_mut(sums))?;
        let (decision, apart) = (self.decision(), self.shards.are_many());
        let Self { backend, comm, network, state, gradients, pieces, own, partials, .. } = self;
        let Self { muon_scratch, scalars, graphs, optimizer, .. } = self;
        let (table, count) = (network.table(), pieces.list.len());
        let norms = |partials: &mut Tensor<B>| {
            backend.square_norms(
                partials.slice_mut(own.among.clone()),
                gradients.slice(own.range.clone()),
                &own.pieces,
            );
        };
        if apart {
            backend.zero(Stream::Compute, partials.view_mut());
            norms(partials);
            comm.all_reduce(backend, Stream::Compute, partials.slice_mut(0..count))?;
        }
        backend.captured(&mut graphs.1, || {
            if !apart {
                norms(partials);
            }
            backend.decide(scalars.view_mut(), partials.slice(0..count), pieces, decision);
            if apart {
                backend.zero(Stream::Compute, partials.view_mut());
            }
            let arenas = Arenas {
                weights: state.weights.slice_mut(own.range.clone()),
                master: state.master.as_mut().map(Tensor::view_mut),
                first: state.first.as_mut().map(Tensor::view_mut),
                second: state.second.as_mut().map(Tensor::view_mut),
                maximum: state.maximum.as_mut().map(Tensor::view_mut),
                gradients: gradients.slice(own.range.clone()),
            };
            let changes = partials.slice_mut(own.among.clone());
            backend.update(arenas, changes, scalars.view(), &own.pieces, optimizer.method());
            if let Some(scratch) = muon_scratch {
                muon_update(backend, table, state, gradients, pieces, partials, scratch, scalars);
            }
            if !apart {
                backend.finish_update(scalars.view_mut(), partials.view());
            }
            Ok(())
        })?;
        if apart {
            comm.all_reduce(backend, Stream::Compute, partials.view_mut())?;
            backend.finish_update(scalars.view_mut(), partials.view());
            self.stale = true;
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
        self.gather()?;
        self.backend.zero(Stream::Compute, self.validation.view_mut());
        for index in comm::share(batches, self.comm.rank(), self.comm.world()) {
            self.feed.validate(&self.backend, (index * self.micro.samples) as u64)?;
            let weights = Weights::new(self.network.table(), self.state.weights.view());
            self.network.evaluate(&self.backend, weights, &mut self.acts, &self.feed.batch, self.micro);
            self.backend.tally(self.validation.view_mut(), self.acts.losses().view(), self.feed.batch.targets.view());
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
            muon: muon_scratch(table, &settings, &owned).map(|len| plan.reserve("muon", backend.compute(), len)),
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
fn push<B: Ops>(
    backend: &B,
    sums: &mut [Tensor<B>],
    top: usize,
    merges: usize,
    range: Range<usize>,
    part: crate::backend::Ref<'_, B>,
) {
    backend.accumulate(sums[top].slice_mut(range.clone()), part, false);
    for at in (top - merges..top).rev() {
        let (low, high) = sums.split_at_mut(at + 1);
        backend.accumulate(low[at].slice_mut(range.clone()), high[0].slice(range.clone()), true);
    }
}

/// Elements of scratch for the largest matrix that Muon updates here; None if there is none.
fn muon_scratch(table: &Table, settings: &[RowSettings], owned: &Range<usize>) -> Option<usize> {
    let rows = muon_rows(table, settings, owned).map(|i| &table.rows[i]);
    rows.map(|row| muon::scratch(row.axes[0].size(), row.columns())).max()
}

/// Muon's rows in this part of the arena; each has one owner.
fn muon_rows(table: &Table, settings: &[RowSettings], owned: &Range<usize>) -> impl Iterator<Item = usize> {
    (0..table.rows.len()).filter(move |&i| settings[i].muon != 0 && owned.contains(&table.offsets[i]))
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
    let Some(first) = state.first.as_mut() else { return };
    for i in muon_rows(table, &pieces.rows, &state.owned) {
        let (row, values) = (&table.rows[i], table.values(i));
        let kept = values.start - state.owned.start..values.end - state.owned.start;
        let matrix = MuonMatrix {
            weight: state.weights.slice_mut(values.clone()),
            master: state.master.as_mut().map(|m| m.slice_mut(kept.clone())),
            first: first.slice_mut(kept),
            gradient: gradients.slice(values),
            rows: row.axes[0].size(),
            columns: row.columns(),
            settings: pieces.rows[i],
        };
        let at = pieces.list.len() + i;
        let needed = 0..muon::scratch(matrix.rows, matrix.columns);
        backend.muon(matrix, partials.slice_mut(at..at + 1), scratch.slice_mut(needed), scalars.view());
    }
}
