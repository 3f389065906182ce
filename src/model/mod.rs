//! Models: a table of parameters, a plan of activations, a forward and a backward pass, generic over the backend.
//!
//! | file | |
//! |---|---|
//! | [`spec`] | what a model is; what its checkpoint stores |
//! | [`param`] | the parameter table |
//! | [`plan`] | memory by name |
//! | [`decoder`] | the transformer; [`gpt2`] and [`llama`] choose its parts |
//! | [`mlp`] | the classifier |

pub mod decoder;
pub mod gpt2;
pub mod llama;
pub mod mlp;
pub mod param;
pub mod plan;
pub mod spec;

use crate::{
    DType, Error, Result,
    backend::{Backend, Mut, Ref, Tensor},
    dims::Width,
    ops::Ops,
};
use decoder::{ActivationSlots, Activations, Decoder, Recompute};
use mlp::{Mlp, MlpActivations, MlpSlots};
use param::{Span, Table};
use plan::{Plan, Planned};
use spec::{Scaling, Spec};
use std::cell::RefCell;

/// Size of a micro-batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MicroBatch {
    /// Sequences, or rows of numbers.
    pub samples: usize,
    /// Tokens of a sequence; 1 for rows of numbers.
    pub length: usize,
}

impl MicroBatch {
    /// Positions that bear a loss.
    pub fn rows(&self) -> usize {
        self.samples * self.length
    }
}

/// A micro-batch on the device.
pub struct Batch<B: Backend> {
    /// Tokens, i32 [samples × length], or numbers in the compute type [samples × inputs].
    pub inputs: Tensor<B>,
    /// Classes, i32 [samples × length]; negative: ignored.
    pub targets: Tensor<B>,
    /// First key that each token may attend to, i32 [samples × length].
    pub first_key: Option<Tensor<B>>,
}

/// All weights, to read.
pub struct Weights<'a, B: Backend> {
    /// Where rows lie.
    pub table: &'a Table,
    arena: Arena<'a, B>,
}

enum Arena<'a, B: Backend> {
    Here(Ref<'a, B>),
    Arriving(&'a (dyn Groups<B> + 'a)),
}

/// An arena whose groups are written while others are read already: each is waited for when it is first asked for.
pub struct Arriving<'a, B: Backend> {
    /// Each with the element of the arena that it begins with.
    groups: RefCell<Vec<(usize, Coming<'a, B>)>>,
    arrive: Arrive<'a, B>,
}

/// Is told a group, and its part of the arena; ops that are enqueued afterwards may read it.
type Arrive<'a, B> = Box<dyn Fn(usize, Mut<'_, B>) + 'a>;

/// A group's part of an arena: to be waited for, or there.
enum Coming<'a, B: Backend> {
    Not(Option<Mut<'a, B>>),
    Here(Ref<'a, B>),
}

impl<'a, B: Backend> Arriving<'a, B> {
    /// An arena, of which `arrive` is told each group once, before it is read.
    pub fn new(table: &Table, arena: Mut<'a, B>, arrive: impl Fn(usize, Mut<'_, B>) + 'a) -> Self {
        let mut rest = Some(arena);
        let group = |group| {
            let range = table.group(group);
            let (first, others) = rest.take()?.split(range.len());
            rest = Some(others);
            Some((range.start, Coming::Not(Some(first))))
        };
        Self { groups: RefCell::new((0..table.groups()).filter_map(group).collect()), arrive: Box::new(arrive) }
    }

    /// Waits for groups that nobody has asked for.
    pub fn finish(&self) {
        let groups = self.groups.borrow().len();
        (0..groups).for_each(|group| _ = self.get(group));
    }
}

/// An arena by groups, however long it is borrowed to be written.
trait Groups<B: Backend> {
    /// A group's part of the arena, and where it begins.
    fn get(&self, group: usize) -> (usize, Ref<'_, B>);
}

impl<B: Backend> Groups<B> for Arriving<'_, B> {
    fn get(&self, group: usize) -> (usize, Ref<'_, B>) {
        let (start, slot) = &mut self.groups.borrow_mut()[group];
        match slot {
            Coming::Here(part) => (*start, *part),
            Coming::Not(part) => {
                let mut part = part.take().expect("waited for once");
                (self.arrive)(group, part.reborrow());
                let part = part.into_ref();
                *slot = Coming::Here(part);
                (*start, part)
            }
        }
    }
}

impl<'a, B: Backend> Weights<'a, B> {
    /// Weights that are there.
    pub fn new(table: &'a Table, arena: Ref<'a, B>) -> Self {
        Self { table, arena: Arena::Here(arena) }
    }

    /// Weights that other ranks may still be sending.
    pub fn arriving(table: &'a Table, arena: &'a Arriving<'_, B>) -> Self {
        Self { table, arena: Arena::Arriving(arena) }
    }

    /// A row, or glued rows.
    pub fn get(&self, span: &Span) -> Ref<'a, B> {
        let range = self.table.range(span);
        match self.arena {
            Arena::Here(arena) => arena.slice(range),
            Arena::Arriving(arena) => {
                let (start, part) = arena.get(self.table.rows[span.start].group);
                part.slice(range.start - start..range.end - start)
            }
        }
    }
}

impl<B: Backend> Clone for Weights<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: Backend> Copy for Weights<'_, B> {}

impl<B: Backend> Clone for Arena<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: Backend> Copy for Arena<'_, B> {}

/// All gradients, to write; and who is told when a group is complete.
pub struct Gradients<'a, B: Backend> {
    /// Where rows lie.
    pub table: &'a Table,
    /// The arena.
    pub arena: Mut<'a, B>,
    /// Called with a group and its part of the arena once backward will not touch it any more.
    pub finished: &'a mut dyn FnMut(usize, Mut<'_, B>),
}

impl<B: Backend> Gradients<'_, B> {
    /// A row, or glued rows.
    pub fn get(&mut self, span: &Span) -> Mut<'_, B> {
        self.arena.reborrow().slice(self.table.range(span))
    }

    /// Two different spans.
    pub fn pair(&mut self, a: &Span, b: &Span) -> (Mut<'_, B>, Mut<'_, B>) {
        self.arena.reborrow().pair(self.table.range(a), self.table.range(b))
    }

    /// A weight and its bias, if there is one.
    pub fn layer(&mut self, weight: &Span, bias: Option<&Span>) -> (Mut<'_, B>, Option<Mut<'_, B>>) {
        match bias {
            None => (self.get(weight), None),
            Some(bias) => {
                let (weight, bias) = self.pair(weight, bias);
                (weight, Some(bias))
            }
        }
    }

    /// Reports a group as complete.
    pub fn done(&mut self, group: usize) {
        let range = self.table.group(group);
        (self.finished)(group, self.arena.reborrow().slice(range));
    }
}

/// A device tensor of these numbers, in a float type; waits until they are there.
pub fn float_tensor<B: Backend>(backend: &B, dtype: DType, values: &[f64]) -> Result<Tensor<B>> {
    let mut bytes = vec![0; values.len() * dtype.size()];
    crate::dtype::convert(bytemuck::cast_slice(values), DType::F64, &mut bytes, dtype);
    Tensor::from_bytes(backend, dtype, &bytes)
}

/// A network of any architecture.
pub enum Network<B: Backend> {
    /// gpt2, llama.
    Decoder(Box<Decoder<B>>),
    /// mlp.
    Mlp(Box<Mlp>),
}

/// Reserved activations of any architecture.
pub enum Slots {
    /// gpt2, llama.
    Decoder(ActivationSlots),
    /// mlp.
    Mlp(MlpSlots),
}

/// Activations of any architecture.
pub enum Acts<B: Backend> {
    /// gpt2, llama.
    Decoder(Activations<B>),
    /// mlp.
    Mlp(MlpActivations<B>),
}

impl<B: Backend> Acts<B> {
    /// Takes the reserved tensors.
    pub fn new(slots: Slots, planned: &mut Planned<B>) -> Self {
        match slots {
            Slots::Decoder(s) => Self::Decoder(Activations::new(s, planned)),
            Slots::Mlp(s) => Self::Mlp(MlpActivations::new(s, planned)),
        }
    }

    /// Losses of the last forward pass, one for each position.
    pub fn losses(&self) -> &Tensor<B> {
        match self {
            Self::Decoder(a) => a.losses(),
            Self::Mlp(a) => a.losses(),
        }
    }
}

/// The parameter table of a model, with initial deviations for its base.
pub fn table(spec: &Spec, scaling: &Scaling) -> Table {
    match spec {
        Spec::Decoder(d) => decoder::table(d).0,
        Spec::Mlp(m) => Mlp::new(m, scaling).table,
    }
}

impl<B: Ops> Network<B> {
    /// Prepares a network on a device.
    pub fn new(backend: &B, spec: &Spec, scaling: &Scaling) -> Result<Self> {
        Ok(match spec {
            Spec::Decoder(d) if d.dims.get(Width::HeadDim) > B::LARGEST_HEAD => {
                let why =
                    format!("is over {}, the largest that this device computes: use --device cpu", B::LARGEST_HEAD);
                return Err(Error::config("model.head_dim", d.dims.get(Width::HeadDim), why));
            }
            Spec::Decoder(d) => Self::Decoder(Box::new(Decoder::new(backend, d, scaling)?)),
            Spec::Mlp(m) => Self::Mlp(Box::new(Mlp::new(m, scaling))),
        })
    }

    /// Its parameters.
    pub fn table(&self) -> &Table {
        match self {
            Self::Decoder(d) => &d.table,
            Self::Mlp(m) => &m.table,
        }
    }

    /// The decoder, if it is one: what writes text.
    pub fn decoder(&self) -> Option<&Decoder<B>> {
        match self {
            Self::Decoder(d) => Some(d),
            Self::Mlp(_) => None,
        }
    }

    /// Reserves the activations of a micro-batch; with `recompute` those for training, without for evaluation.
    pub fn plan(&self, backend: &B, plan: &mut Plan, micro: MicroBatch, recompute: Option<Recompute>) -> Slots {
        match self {
            Self::Decoder(d) => Slots::Decoder(d.plan(backend, plan, micro, recompute)),
            Self::Mlp(m) => Slots::Mlp(m.plan(backend, plan, micro)),
        }
    }

    /// Losses and gradients of a micro-batch; `scale` is the factor on each position's loss. Gradients are overwritten.
    pub fn micro_step(
        &self,
        backend: &B,
        weights: Weights<'_, B>,
        gradients: &mut Gradients<'_, B>,
        acts: &mut Acts<B>,
        batch: &Batch<B>,
        micro: MicroBatch,
        scale: f64,
    ) {
        match (self, acts) {
            (Self::Decoder(d), Acts::Decoder(a)) => d.micro_step(backend, weights, gradients, a, batch, micro, scale),
            (Self::Mlp(m), Acts::Mlp(a)) => m.micro_step(backend, weights, gradients, a, batch, micro, scale),
            _ => unreachable!("activations were planned by this network"),
        }
    }

    /// Runs the forward pass and shows what each layer returned, by name, the logits (rows × classes) last. The
    /// activations must be those planned with [`Recompute::None`].
    pub fn observe(
        &self,
        backend: &B,
        weights: Weights<'_, B>,
        acts: &mut Acts<B>,
        batch: &Batch<B>,
        micro: MicroBatch,
        logits: &mut Tensor<B>,
        seen: &mut dyn FnMut(&str, Ref<'_, B>) -> Result<()>,
    ) -> Result<()> {
        match (self, acts) {
            (Self::Decoder(d), Acts::Decoder(a)) => {
                d.observe(backend, weights, a, batch, micro, logits.view_mut(), seen)?
            }
            (Self::Mlp(m), Acts::Mlp(a)) => m.observe(backend, weights, a, batch, micro, logits.view_mut(), seen)?,
            _ => unreachable!("activations were planned by this network"),
        }
        seen("logits", logits.view())
    }

    /// Losses of a micro-batch, left in [`Acts::losses`].
    pub fn evaluate(
        &self,
        backend: &B,
        weights: Weights<'_, B>,
        acts: &mut Acts<B>,
        batch: &Batch<B>,
        micro: MicroBatch,
    ) {
        match (self, acts) {
            (Self::Decoder(d), Acts::Decoder(a)) => d.evaluate(backend, weights, a, batch, micro),
            (Self::Mlp(m), Acts::Mlp(a)) => m.evaluate(backend, weights, a, batch, micro),
            _ => unreachable!("activations were planned by this network"),
        }
    }
}
