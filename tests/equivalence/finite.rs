//! A step that is not finite changes nothing, though later steps were under way when the host learnt of it.

use crate::{
    common::*,
    run_folder::{MODEL_TOML, Place},
};
use mupscale::{
    Error,
    backend::cpu::Cpu,
    comm::Solo,
    feed::{HostBatch, Samples},
    model::decoder::Recompute,
    trainer::Trainer,
};

/// Rows of numbers, of which one sample holds a NaN.
struct Poisoned {
    rows: Box<dyn Samples>,
    sample: u64,
}

impl Samples for Poisoned {
    fn train(&mut self, first: u64, batch: &mut HostBatch) {
        self.rows.train(first, batch);
        if first == self.sample {
            batch.inputs[..8].copy_from_slice(&f64::NAN.to_le_bytes());
        }
    }
    fn validate(&mut self, first: u64, batch: &mut HostBatch) -> usize {
        self.rows.validate(first, batch)
    }
    fn held_out(&self) -> u64 {
        self.rows.held_out()
    }
    fn fingerprint(&self) -> u64 {
        self.rows.fingerprint()
    }
    fn inputs(&self) -> usize {
        self.rows.inputs()
    }
    fn resets_attention(&self) -> bool {
        false
    }
}

/// An mlp whose third step has a NaN in it.
fn poisoned(on_nan: &str) -> Trainer<Cpu<f64>> {
    let config = config(MODELS[6].1, OPTIMIZERS[5].1, &[&format!("on_nan={on_nan}")]);
    let meaning = meaning(&config);
    let rows = samples(&config, &meaning.spec, mupscale::DType::F64);
    let samples = Box::new(Poisoned { rows, sample: 2 * config.batch.size as u64 });
    let mut trainer = Trainer::new(cpu(), Box::new(Solo), &config, &meaning, samples, Recompute::None).unwrap();
    trainer.state.init(&trainer.backend, trainer.network.table(), &meaning.scaling, 1);
    trainer
}

/// Whether each of six steps was skipped, and whether it changed the weights.
fn six_steps(mut trainer: Trainer<Cpu<f64>>) -> Vec<(bool, bool)> {
    let mut before = read(&trainer.backend, &trainer.state.weights);
    let step = |_| {
        trainer.step().unwrap();
        let skipped = trainer.collect().unwrap().unwrap().skipped;
        let after = read(&trainer.backend, &trainer.state.weights);
        let changed = after != before;
        before = after;
        assert!(before.iter().all(|w| w.is_finite()));
        (skipped, changed)
    };
    (0..6).map(step).collect()
}

#[test]
fn one_bad_step_is_left_out() {
    let (good, bad) = ((false, true), (true, false));
    assert_eq!(six_steps(poisoned("skip")), [good, good, bad, good, good, good]);
    assert_eq!(six_steps(poisoned("stop")), [good, good, bad, bad, bad, bad]);
}

/// A rate at which the second step overflows: the run ends with the weights after the first, saved; or goes on.
#[test]
fn a_run_stops_with_the_last_good_weights() {
    let place = Place::new();
    for (precision, lr) in [("f32", "1e38"), ("f64", "1e300")] {
        let sections = format!("[optimizer]\nlr={lr}\n[batch]\nsize=2\n[model]\n{MODEL_TOML}");
        let train = |run: &str, keys: &str| {
            place.train(&format!("{run}-{precision}"), &format!("precision='{precision}'\n{keys}"), &sections)
        };
        train("one", "steps=1").unwrap();
        let expected = place.tensors(&format!("one-{precision}"), 1);
        let error = train("stopped", "steps=10").unwrap_err();
        let Error::NonFinite { step: 2, checkpoint, .. } = &error else { panic!("{error}") };
        assert_eq!(error.exit_code(), 4);
        assert_eq!(*checkpoint, place.path(&format!("stopped-{precision}/checkpoints/step-00000001")));
        assert!(place.tensors(&format!("stopped-{precision}"), 1) == expected, "{precision}: weights have changed");
        mupscale::upscale::Origin::open(checkpoint).unwrap();
        train("skipping", "steps=10\non_nan='skip'").unwrap();
        assert!(place.tensors(&format!("skipping-{precision}"), 10) == expected, "{precision}: a bad step was made");
    }
}
