//! What training changes: weights, moments, and the position in the run. A state is born by [`State::init`] or by
//! [`crate::upscale::load`] (resume, start from a checkpoint, widen); the trainer cannot tell which.

mod parts;

pub use parts::{Part, snapshot_bytes};

use crate::{
    backend::{Backend, Mut, Tensor},
    checkpoint::{self, TensorMeta},
    config::{Config, OptimizerConfig},
    dims::{Axis, BlockName},
    model::{
        param::{Init, Row, Table},
        plan::{Plan, Planned, Slot},
        spec::{Scaling, Spec},
    },
    ops::{Ops, expand::Noise},
    optim, rng,
};
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// `config.json` of a checkpoint: what the weights mean.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Meaning {
    /// The model.
    #[serde(flatten)]
    pub spec: Spec,
    /// Parametrisation and base shape.
    pub scaling: Scaling,
    /// The optimizer whose moments are stored; its numbers hold at the base shape.
    pub optimizer: OptimizerConfig,
    /// `tokenizer.json` (in the checkpoint) or `bytes`; none for rows of numbers, or where the data named none.
    pub tokenizer: Option<String>,
}

/// Where a run stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Position {
    /// Optimizer steps done in this run.
    pub step: u64,
    /// Tokens (rows) trained on in this run.
    pub tokens: u64,
    /// The data cursor: samples taken from the order.
    pub samples: u64,
    /// The optimizer's t.
    pub time: u64,
    /// Seconds of training so far.
    pub seconds: f64,
}

/// `state.json` of a checkpoint: what going on needs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Where the run stands.
    #[serde(flatten)]
    pub position: Position,
    /// Fingerprint of the training data, so that a resume on other data is noticed; 0 if there is none.
    pub data: u64,
    /// The run's configuration: seeds, order, schedule. Absent in what `upscale` wrote.
    pub config: Option<Config>,
    /// Version of the program that wrote it.
    pub version: String,
}

/// Weights and moments on a device. The weights are an arena laid out by the model's table; of what only the optimizer
/// reads there may be a part (ZeRO stage 1, arXiv 1910.02054): then other ranks have the rest.
pub struct State<B: Backend> {
    /// What forward and backward read.
    pub weights: Tensor<B>,
    /// Elements of the arena that the tensors below hold, from the first of them on: those that this rank updates.
    pub owned: Range<usize>,
    /// f32 copy of weights that are kept in a smaller type.
    pub master: Option<Tensor<B>>,
    /// First moments.
    pub first: Option<Tensor<B>>,
    /// Second moments. (Muon's matrices have none; their part of the arena is not used.)
    pub second: Option<Tensor<B>>,
    /// Maxima of the second moments.
    pub maximum: Option<Tensor<B>>,
}

/// Reserved memory of a state.
pub struct StateSlots {
    weights: Slot,
    owned: Range<usize>,
    master: Option<Slot>,
    first: Option<Slot>,
    second: Option<Slot>,
    maximum: Option<Slot>,
}

/// A moment by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// First moment.
    First,
    /// Second moment.
    Second,
    /// Maximum of the second moment.
    Maximum,
}

impl Moment {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::First, Self::Second, Self::Maximum];

    /// Name of a row's moment in a checkpoint.
    pub fn name(self, row: &str) -> String {
        let prefix = match self {
            Self::First => "first_moment",
            Self::Second => "second_moment",
            Self::Maximum => "second_moment_max",
        };
        format!("{prefix}.{row}")
    }

    /// Whether the optimizer keeps this moment of a row.
    pub fn exists(self, optimizer: &OptimizerConfig, row: &Row) -> bool {
        match self {
            Self::First => optimizer.has_first(),
            Self::Second => optimizer.has_second(row),
            Self::Maximum => optimizer.has_maximum(row),
        }
    }
}

impl<B: Backend> State<B> {
    /// Reserves the arenas that a model and an optimizer need.
    pub fn plan(backend: &B, plan: &mut Plan, table: &Table, optimizer: Option<&OptimizerConfig>) -> StateSlots {
        Self::plan_part(backend, plan, table, optimizer, 0..table.arena)
    }

    /// The same for a rank that updates a part of the arena.
    pub fn plan_part(
        backend: &B,
        plan: &mut Plan,
        table: &Table,
        optimizer: Option<&OptimizerConfig>,
        owned: Range<usize>,
    ) -> StateSlots {
        let mut moment = |moment: Moment, name: &str| {
            let needed = optimizer.is_some_and(|o| table.rows.iter().any(|row| moment.exists(o, row)));
            needed.then(|| plan.reserve(name, backend.moment(), owned.len()))
        };
        let first = moment(Moment::First, "first moments");
        let second = moment(Moment::Second, "second moments");
        let maximum = moment(Moment::Maximum, "maxima of second moments");
        let weights = plan.reserve("weights", backend.compute(), table.arena);
        // What is only read needs no copy to update.
        let master = optimizer.and(backend.master()).map(|dtype| plan.reserve("master weights", dtype, owned.len()));
        StateSlots { weights, owned, master, first, second, maximum }
    }

    /// Takes the reserved arenas, all zero.
    pub fn new(slots: StateSlots, planned: &mut Planned<B>) -> Self {
        Self {
            weights: planned.take(slots.weights),
            owned: slots.owned,
            master: slots.master.map(|s| planned.take(s)),
            first: slots.first.map(|s| planned.take(s)),
            second: slots.second.map(|s| planned.take(s)),
            maximum: slots.maximum.map(|s| planned.take(s)),
        }
    }

    /// The elements `values` of the weights, to be written anew: up to three parts, each with the place of its first
    /// element among them. Where a master copy is kept, the part of it that is owned is written, and is to be rounded
    /// ([`State::round`]); what other ranks update is written as forward and backward read it.
    pub fn renew(&mut self, values: Range<usize>) -> Vec<(usize, Mut<'_, B>)> {
        let (owned, first) = (common(&values, &self.owned), self.owned.start);
        let master = self.master.as_mut().filter(|_| !owned.is_empty());
        let Some(master) = master else { return vec![(0, self.weights.slice_mut(values))] };
        let (low, high) = self.weights.view_mut().pair(values.start..owned.start, owned.end..values.end);
        let own = master.slice_mut(owned.start - first..owned.end - first);
        let parts = [(0, low), (owned.start - values.start, own), (owned.end - values.start, high)];
        parts.into_iter().filter(|(_, part)| !part.is_empty()).collect()
    }

    /// The part of the elements `values` of a moment that this rank has, with the place of its first element among them;
    /// none if it has nothing of it.
    pub fn renew_moment(&mut self, moment: Moment, values: &Range<usize>) -> Option<(usize, Mut<'_, B>)> {
        let (owned, start) = (common(values, &self.owned), self.owned.start);
        let arena = self.moment_mut(moment).filter(|_| !owned.is_empty())?;
        Some((owned.start - values.start, arena.slice_mut(owned.start - start..owned.end - start)))
    }

    /// What this rank has of a moment.
    pub fn moment(&self, moment: Moment) -> Option<&Tensor<B>> {
        match moment {
            Moment::First => self.first.as_ref(),
            Moment::Second => self.second.as_ref(),
            Moment::Maximum => self.maximum.as_ref(),
        }
    }

    /// What this rank has of a moment, to write.
    pub fn moment_mut(&mut self, moment: Moment) -> Option<&mut Tensor<B>> {
        match moment {
            Moment::First => self.first.as_mut(),
            Moment::Second => self.second.as_mut(),
            Moment::Maximum => self.maximum.as_mut(),
        }
    }
}

impl<B: Ops> State<B> {
    /// New weights: functions of the seed and each tensor's name. Moments are zero.
    pub fn init(&mut self, backend: &B, table: &Table, scaling: &Scaling, seed: u64) {
        for (i, row) in table.rows.iter().enumerate() {
            let amount = optim::init_std(row, table, scaling);
            let noise = Noise { stream: rng::Stream::new(seed, &row.name), amount, paired: None };
            let (mean, noise) = match row.init {
                Init::Normal(_) => (0.0, Some(&noise)),
                Init::Ones => (1.0, None),
                Init::Zeros => (0.0, None),
            };
            for (start, target) in self.renew(table.values(i)) {
                backend.fill(target, start, mean, noise);
            }
        }
        self.round(backend);
    }

    /// Rounds the master copy, if there is one, to the weights that the forward pass reads.
    pub fn round(&mut self, backend: &B) {
        if let Some(master) = &self.master {
            backend.accumulate(self.weights.slice_mut(self.owned.clone()), master.view(), false);
        }
    }
}

/// The elements that are in both ranges; empty, within `a` or at its end, if there are none.
pub fn common(a: &Range<usize>, b: &Range<usize>) -> Range<usize> {
    let start = b.start.clamp(a.start, a.end);
    start..b.end.clamp(start, a.end)
}

/// How a row is described in a checkpoint.
pub fn meta(name: &str, row: &Row, dtype: crate::DType) -> TensorMeta {
    let axis = |axis: &Axis| {
        let block = |b: &crate::dims::Block| {
            let name = match b.name {
                BlockName::Width(w) => w.to_string(),
                BlockName::Fixed(name) => name.to_string(),
            };
            checkpoint::Block { name, size: b.size }
        };
        axis.0.iter().map(block).collect()
    };
    TensorMeta { name: name.into(), dtype, shape: row.shape(), axes: row.axes.iter().map(axis).collect() }
}
