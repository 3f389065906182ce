//! The multilayer perceptron: rows of numbers → hidden layers with ReLU → logits over classes.

use super::{
    Batch, Gradients, MicroBatch, Weights,
    param::{Init, Kind, Span, Table, TableBuilder},
    plan::{Plan, Planned, Slot},
    spec::{MlpSpec, Scaling},
};
use crate::{
    backend::{Backend, Mut, Ref, Stream, Tensor},
    dims::{Axis, Width},
    ops::{
        Ops,
        activation::Activation,
        head::{ReadoutGradients, ReadoutShape},
        linear::LinearShape,
    },
    trace::Lane,
};

/// An mlp at a shape.
pub struct Mlp {
    /// What it is.
    pub spec: MlpSpec,
    /// Its parameters.
    pub table: Table,
    layers: Vec<(Span, Option<Span>)>,
    readout: (Span, Option<Span>),
    readout_scale: f64,
}

/// The parameters: layers 0, 1, … and the readout. Group i is layer i, the last one the readout.
fn table(spec: &MlpSpec) -> (Table, Vec<(Span, Option<Span>)>) {
    let mut t = TableBuilder::new(&spec.dims);
    let mut layers = Vec::new();
    let hidden = spec.dims.iter().count();
    let mut input = Axis::fixed("input", spec.inputs);
    for i in 0..=hidden {
        if i > 0 {
            t.next_group();
        }
        let (name, kind, output) = if i == hidden {
            ("readout".into(), Kind::Readout, Axis::fixed("classes", spec.classes))
        } else {
            let width = Axis::widths(&[Width::Hidden(i as u16 + 1)], &spec.dims);
            (format!("layers.{i}"), if i == 0 { Kind::Input } else { Kind::Hidden }, width)
        };
        let std = spec.init_gain * (2.0 / input.size() as f64).sqrt();
        let weight = t.row(format!("{name}.weight"), kind, vec![output.clone(), input], Init::Normal(std));
        let bias = spec.bias.then(|| t.row(format!("{name}.bias"), Kind::Vector, vec![output.clone()], Init::Zeros));
        layers.push((weight, bias));
        input = output;
    }
    (t.build(), layers)
}

/// Activations of an mlp.
pub struct MlpActivations<B: Backend> {
    /// Before and after the activation, for each hidden layer.
    hidden: Vec<(Tensor<B>, Tensor<B>)>,
    /// Gradients by the activations of the present layer and of the one before.
    scratch: [Tensor<B>; 2],
    losses: Tensor<B>,
    logits: Tensor<B>,
}

/// Reserved activations.
pub struct MlpSlots {
    hidden: Vec<(Slot, Slot)>,
    scratch: [Slot; 2],
    losses: Slot,
    logits: Slot,
}

impl<B: Backend> MlpActivations<B> {
    /// Takes the reserved tensors.
    pub fn new(slots: MlpSlots, planned: &mut Planned<B>) -> Self {
        Self {
            hidden: slots.hidden.into_iter().map(|(a, b)| (planned.take(a), planned.take(b))).collect(),
            scratch: slots.scratch.map(|s| planned.take(s)),
            losses: planned.take(slots.losses),
            logits: planned.take(slots.logits),
        }
    }

    /// Losses of the last forward pass, one for each row.
    pub fn losses(&self) -> &Tensor<B> {
        &self.losses
    }
}

impl Mlp {
    /// Prepares an mlp.
    ///
    /// Initial deviations are those of the base shape: the table's √(2 / inputs) is taken there, and μP's ratio does
    /// the rest.
    pub fn new(spec: &MlpSpec, scaling: &Scaling) -> Self {
        let (mut table, mut layers) = table(spec);
        let base = self::table(&MlpSpec { dims: scaling.reference(&spec.dims).clone(), ..spec.clone() }).0;
        for (row, base) in table.rows.iter_mut().zip(base.rows) {
            row.init = base.init;
        }
        let readout = layers.pop().expect("an mlp has a readout");
        let last = Axis::widths(&[Width::Hidden(layers.len() as u16)], &spec.dims);
        let width = if layers.is_empty() { 1.0 } else { last.ratio(&spec.dims, scaling.reference(&spec.dims)) };
        Self { spec: spec.clone(), table, layers, readout, readout_scale: spec.logits / width }
    }

    /// Reserves the activations of a micro-batch.
    pub fn plan<B: Ops>(&self, backend: &B, plan: &mut Plan, micro: MicroBatch) -> MlpSlots {
        let (rows, float) = (micro.rows(), backend.compute());
        let mut slot =
            |name: String, dtype, columns: usize| plan.reserve(format!("activations.{name}"), dtype, rows * columns);
        let widest = (0..self.layers.len()).map(|i| self.outputs(i)).max().unwrap_or(1);
        MlpSlots {
            hidden: (0..self.layers.len())
                .map(|i| {
                    (
                        slot(format!("{i}.before"), float, self.outputs(i)),
                        slot(format!("{i}.after"), float, self.outputs(i)),
                    )
                })
                .collect(),
            scratch: ["scratch.present", "scratch.next"].map(|name| slot(name.into(), float, widest)),
            losses: slot("losses".into(), backend.statistics(), 1),
            logits: plan.reserve("activations.logits", float, backend.cross_entropy_scratch(self.readout_shape(rows))),
        }
    }

    fn outputs(&self, layer: usize) -> usize {
        self.table.rows[self.layers[layer].0.start].axes[0].size()
    }

    fn shape(&self, layer: usize, rows: usize) -> LinearShape {
        let row = &self.table.rows[self.layers[layer].0.start];
        LinearShape { rows, inputs: row.columns(), outputs: row.axes[0].size() }
    }

    fn readout_shape(&self, rows: usize) -> ReadoutShape {
        let row = &self.table.rows[self.readout.0.start];
        ReadoutShape {
            rows,
            width: row.columns(),
            classes: self.spec.classes,
            padded: row.padded,
            scale: self.readout_scale,
        }
    }

    fn forward<'a, B: Ops>(
        &self,
        backend: &B,
        w: Weights<'_, B>,
        acts: &'a mut MlpActivations<B>,
        batch: &'a Batch<B>,
        rows: usize,
    ) -> Ref<'a, B> {
        let _forward = backend.span(Stream::Compute, Lane::Compute, "forward");
        for (i, (weight, bias)) in self.layers.iter().enumerate() {
            let (done, rest) = acts.hidden.split_at_mut(i);
            let x = done.last().map_or_else(|| batch.inputs.view(), |(_, after)| after.view());
            let (before, after) = &mut rest[0];
            backend.linear(before.view_mut(), x, w.get(weight), bias.as_ref().map(|b| w.get(b)), self.shape(i, rows));
            backend.activate(after.view_mut(), before.view(), Activation::Relu);
        }
        match acts.hidden.last() {
            Some((_, after)) => after.view(),
            None => batch.inputs.view(),
        }
    }

    /// Losses of a micro-batch, without gradients.
    pub fn evaluate<B: Ops>(
        &self,
        backend: &B,
        w: Weights<'_, B>,
        acts: &mut MlpActivations<B>,
        batch: &Batch<B>,
        micro: MicroBatch,
    ) {
        let rows = micro.rows();
        self.forward(backend, w, acts, batch, rows);
        let x = acts.hidden.last().map_or_else(|| batch.inputs.view(), |(_, after)| after.view());
        let bias = self.readout.1.as_ref().map(|b| w.get(b));
        backend.cross_entropy(
            acts.losses.view_mut(),
            None,
            acts.logits.view_mut(),
            x,
            w.get(&self.readout.0),
            bias,
            batch.targets.view(),
            self.readout_shape(rows),
        );
    }

    /// Losses and gradients of a micro-batch; `scale` is the factor on each row's loss.
    pub fn micro_step<B: Ops>(
        &self,
        backend: &B,
        w: Weights<'_, B>,
        g: &mut Gradients<'_, B>,
        acts: &mut MlpActivations<B>,
        batch: &Batch<B>,
        micro: MicroBatch,
        scale: f64,
    ) {
        let rows = micro.rows();
        self.forward(backend, w, acts, batch, rows);
        let _backward = backend.span(Stream::Compute, Lane::Compute, "backward");
        let shape = self.readout_shape(rows);
        let x = acts.hidden.last().map_or_else(|| batch.inputs.view(), |(_, after)| after.view());
        let (weight, bias) = (w.get(&self.readout.0), self.readout.1.as_ref().map(|b| w.get(b)));
        let (dweight, dbias) = g.layer(&self.readout.0, self.readout.1.as_ref());
        let [present, next] = &mut acts.scratch;
        let (mut present, mut next) = (present, next);
        let dx = present.slice_mut(0..rows * shape.width);
        let gradients = ReadoutGradients { dx, dweight, dbias, scale };
        backend.cross_entropy(
            acts.losses.view_mut(),
            Some(gradients),
            acts.logits.view_mut(),
            x,
            weight,
            bias,
            batch.targets.view(),
            shape,
        );
        g.done(self.layers.len());
        for i in (0..self.layers.len()).rev() {
            let (shape, (weight, bias)) = (self.shape(i, rows), &self.layers[i]);
            let range = 0..rows * shape.outputs;
            backend.activate_backward(present.slice_mut(range.clone()), acts.hidden[i].0.view(), Activation::Relu);
            let x = if i == 0 { batch.inputs.view() } else { acts.hidden[i - 1].1.view() };
            let (dweight, dbias) = g.layer(weight, bias.as_ref());
            backend.linear_backward_weight(dweight, dbias, present.slice(range.clone()), x, shape);
            if i > 0 {
                let dx: Mut<'_, B> = next.slice_mut(0..rows * shape.inputs);
                backend.linear_backward_input(dx, present.slice(range), w.get(weight), shape);
                std::mem::swap(&mut present, &mut next);
            }
            g.done(i);
        }
    }

    /// Logits of a micro-batch, rows × classes.
    pub fn logits<B: Ops>(
        &self,
        backend: &B,
        w: Weights<'_, B>,
        acts: &mut MlpActivations<B>,
        batch: &Batch<B>,
        logits: Mut<'_, B>,
        micro: MicroBatch,
    ) {
        let x = self.forward(backend, w, acts, batch, micro.rows());
        let bias = self.readout.1.as_ref().map(|b| w.get(b));
        backend.logits(logits, x, w.get(&self.readout.0), bias, self.readout_shape(micro.rows()));
    }
}
