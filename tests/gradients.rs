//! Backward of whole models against central differences of the loss, in f64, for every architecture and option.
//!
//! The gradient is read off the trainer itself: plain SGD moves each weight by its row's rate times the gradient of the
//! mean loss. So the sums over micro-batches and the division by the counted tokens are in the proof.

mod common;

use common::*;
use mupscale::{
    comm::Solo,
    dims::Width,
    model::decoder::Recompute,
    ops::Ops,
    state::{Meaning, Position},
    trainer::Trainer,
};

/// Distance of the points of a difference. The formula has an error of h⁴ f⁗′/30 ≈ 10⁻¹⁶ and one of rounding of about
/// 10⁻¹⁶ · loss / h ≈ 10⁻¹².
const H: f64 = 1e-4;
/// A seed whose first batch has the end of a document and an ignored target in it.
const SEED: &str = "seed=2";
/// Allowed difference, relative to the largest gradient of the tensor.
const RELATIVE: f64 = 1e-7;
/// Allowed difference where a tensor's gradient is zero (GPT-2's K bias): rounding of the loss, over H.
const ABSOLUTE: f64 = 2e-11;

/// A model, its weights and the data of its first step.
struct Probe<B: Ops> {
    trainer: Trainer<B>,
    weights: Vec<f64>,
}

impl<B: Ops> Probe<B> {
    /// The loss with `step` added to the weights.
    fn loss(&mut self, step: &[(usize, f64)]) -> f64 {
        let mut weights = self.weights.clone();
        for &(at, change) in step {
            weights[at] += change;
        }
        write(&self.trainer.backend, &mut self.trainer.state.weights, &weights);
        self.trainer.position = Position::default();
        losses(&mut self.trainer, 1)[0]
    }

    /// The derivative of the loss along a direction, by the central formula of fourth order.
    fn derivative(&mut self, direction: &[(usize, f64)]) -> f64 {
        let mut at = |h: f64| self.loss(&direction.iter().map(|&(i, d)| (i, h * d)).collect::<Vec<_>>());
        let (near, far) = (at(H) - at(-H), at(2.0 * H) - at(-2.0 * H));
        (8.0 * near - far) / (12.0 * H)
    }
}

/// Compares every tensor of a model: all elements of small ones, a part of large ones, and a direction through all.
fn check(name: &str, model: &str, sets: &[&str], base: impl Fn(&mut Meaning)) {
    let config = config(model, GRADIENT, &[sets, &[SEED]].concat());
    let mut meaning = meaning(&config);
    base(&mut meaning);
    let mut trainer = trainer_of(cpu(), Box::new(Solo), &config, &meaning, Recompute::None);
    let weights = read(&trainer.backend, &trainer.state.weights);
    let (_, gradient) = gradient(&mut trainer, &meaning);
    let table = trainer.network.table().clone();
    let mut probe = Probe { trainer, weights };
    for (i, row) in table.rows.iter().enumerate() {
        let values = table.values(i);
        let largest = gradient[values.clone()].iter().fold(0.0f64, |m, g| m.max(g.abs()));
        let elements = values.clone().step_by(row.len().div_ceil(48)).map(|at| vec![(at, 1.0)]);
        let draws = numbers(i as u64, 2001, row.len());
        let all: Vec<_> = values.zip(draws).map(|(at, d)| (at, d as f64 / 1000.0 - 1.0)).collect();
        let norm = (row.len() as f64).sqrt();
        let all = all.into_iter().map(|(at, d)| (at, d / norm)).collect();
        for direction in elements.chain([all]) {
            let expected: f64 = direction.iter().map(|&(at, d)| gradient[at] * d).sum();
            let found = probe.derivative(&direction);
            let (error, bound) = ((expected - found).abs(), RELATIVE * largest + ABSOLUTE);
            let place = direction[0].0 - table.offsets[i];
            assert!(error <= bound, "{name} {sets:?}, {}[{place}]: {expected:e}, difference {found:e}", row.name);
        }
    }
    let zero = table.rows.iter().enumerate().filter(|(i, _)| gradient[table.values(*i)].iter().all(|g| g.abs() < 1e-6));
    for (_, row) in zero {
        assert!(row.name.ends_with("k.bias") && model.contains("gpt2"), "{name}: {} has no gradient", row.name);
    }
}

/// As it is, with attention reset at documents, with ignored targets, over two micro-batches, and all of it.
#[test]
fn backward_is_the_derivative() {
    let (reset, ignore, micro) = ("data.reset_attention=true", "data.ignore=3", "batch.micro_batches=2");
    for (name, model) in MODELS {
        check(name, model, &[], |_| {});
        if name == "mlp" {
            check(name, model, &[micro], |_| {});
        } else {
            check(name, model, &[reset, ignore, micro], |_| {});
        }
    }
    let [(name, model), ..] = MODELS;
    for set in [reset, ignore, micro] {
        check(name, model, &[set], |_| {});
    }
}

/// A model that is wider than its base has other forward multipliers.
#[test]
fn backward_is_the_derivative_at_another_base() {
    for (name, model) in MODELS {
        check(name, model, &[], |meaning| {
            let base = &mut meaning.scaling.base;
            for (width, size) in base.clone().iter().filter(|(w, _)| matches!(w, Width::Residual | Width::HeadDim)) {
                base.set(width, size / 2);
            }
            if base.has(Width::Hidden(2)) {
                base.set(Width::Hidden(2), 3);
            }
        });
    }
}

/// The options that the proof above is about change the loss, so they are in it.
#[test]
fn options_change_the_loss() {
    for (name, model) in MODELS.iter().filter(|(name, _)| *name != "mlp") {
        let loss = |sets: &[&str]| {
            let config = config(model, GRADIENT, &[sets, &[SEED]].concat());
            losses(&mut trainer(cpu(), &config, &meaning(&config)), 1)[0]
        };
        let plain = loss(&[]);
        for set in ["data.reset_attention=true", "data.ignore=3", "batch.micro_batches=2"] {
            assert!((loss(&[set]) - plain).abs() > 1e-4, "{name}: {set}");
        }
    }
}
