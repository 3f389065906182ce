//! Against a foreign implementation: losses, gradients and 20-step trajectories that PyTorch made (`tools/fixtures.py`),
//! in f64. The fixtures' README defines every key.

mod common;

use common::*;
use mupscale::{
    backend::cpu::Cpu,
    comm::Solo,
    config::{Config, ConfigText, DataShape, resolve_model},
    dims::Width,
    feed::{HostBatch, Samples},
    model::{Network, Weights, decoder::Generator, decoder::Recompute, spec::Scaling},
    mup::Parametrization,
    state::Meaning,
    trainer::{StepResult, Trainer},
};
use safetensors::SafeTensors;
use serde_json::Value;
use std::path::{Path, PathBuf};

/// Allowed relative difference of losses, norms and weights over 20 steps.
const TRAJECTORY: f64 = 1e-8;
/// Allowed relative difference of what no step has amplified: logits, loss and gradients at the initial weights.
const FIRST: f64 = 1e-12;

/// One file.
struct Fixture {
    name: String,
    bytes: Vec<u8>,
    case: Value,
}

impl Fixture {
    fn open(path: PathBuf) -> Self {
        let bytes = std::fs::read(&path).unwrap();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let case = serde_json::from_str(&header.metadata().as_ref().unwrap()["config"]).unwrap();
        Self { name: path.file_stem().unwrap().to_string_lossy().into(), bytes, case }
    }

    fn all() -> Vec<Self> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
        let paths = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
        let mut paths: Vec<_> = paths.filter(|p| p.extension().is_some_and(|e| e == "safetensors")).collect();
        paths.sort();
        assert_eq!(paths.len(), 11, "all fixtures are there");
        paths.into_iter().map(Self::open).collect()
    }

    fn values<T: bytemuck::Pod>(&self, key: &str) -> Vec<T> {
        let tensors = SafeTensors::deserialize(&self.bytes).unwrap();
        bytemuck::pod_collect_to_vec(tensors.tensor(key).unwrap_or_else(|e| panic!("{}: {key}: {e}", self.name)).data())
    }

    fn has(&self, key: &str) -> bool {
        SafeTensors::deserialize(&self.bytes).unwrap().tensor(key).is_ok()
    }

    fn size(&self, key: &str) -> usize {
        self.case[key].as_u64().unwrap_or_else(|| panic!("{}: {key}", self.name)) as usize
    }

    fn number(&self, key: &str) -> f64 {
        self.case[key].as_f64().unwrap_or_else(|| panic!("{}: {key}", self.name))
    }

    fn is(&self, key: &str) -> bool {
        self.case[key].as_bool().unwrap_or_else(|| panic!("{}: {key}", self.name))
    }

    fn is_mlp(&self) -> bool {
        self.case["arch"] == "mlp"
    }

    fn optimizers(&self) -> impl Iterator<Item = (&String, &Value)> {
        self.case["optimizers"].as_object().unwrap().iter()
    }

    /// `[model]`.
    fn model(&self) -> String {
        if self.is_mlp() {
            return format!("arch='mlp'\nhidden={}", self.case["hidden"]);
        }
        let keys = [("layers", "layers"), ("residual", "d"), ("ffn", "f"), ("kv_heads", "kv"), ("group", "group")];
        let mut text: String =
            keys.iter().map(|(ours, theirs)| format!("{ours}={}\n", self.size(theirs))).collect::<String>();
        text += &format!("head_dim={}\ncontext={}\n", self.size("e"), self.size("context"));
        text += &format!("norm_eps={:e}\ntied={}\n", self.number("norm_eps"), self.is("tied"));
        if self.case["arch"] == "gpt2" {
            text + &format!(
                "arch='gpt2'\nactivation='gelu-{}'\nbias={}",
                self.case["gelu"].as_str().unwrap(),
                self.is("qkv_bias")
            )
        } else {
            let parts = (self.is("qkv_bias"), self.is("qk_norm"), self.number("rope_base"));
            text + &format!("arch='llama'\nqkv_bias={}\nqk_norm={}\nrope_base={:?}", parts.0, parts.1, parts.2)
        }
    }

    /// The configuration with an optimizer; `forward` adds to `[model]`.
    fn config(&self, optimizer: &str, forward: &str) -> Config {
        let clip = self.case["clip"].as_f64().unwrap_or(0.0);
        let text = format!(
            "run='unused'\nsteps=20\n[data]\npath='unused'\n[batch]\nsize={}\nmicro_batches={}\n[optimizer]\n{optimizer}\n\
             clip={clip:?}\nclip_norm='plain'\n[model]\n{}\n{forward}",
            self.size("batch"),
            self.size("accumulate"),
            self.model()
        );
        ConfigText::parse(&text, &[], Path::new(&self.name)).and_then(|t| t.resolve()).unwrap()
    }

    fn meaning(&self, config: &Config) -> Meaning {
        let shape = if self.is_mlp() {
            DataShape::Rows { inputs: self.size("inputs"), classes: self.size("classes") }
        } else {
            DataShape::Tokens { vocab: self.size("vocab") }
        };
        let spec = resolve_model(config.model.as_ref().unwrap(), shape).unwrap();
        let scaling = Scaling::new(Parametrization::Mup, spec.dims());
        Meaning { spec, scaling, optimizer: config.optimizer.clone(), tokenizer: None }
    }

    /// A trainer on the fixture's batches, from its initial weights.
    fn trainer(&self, config: &Config, meaning: &Meaning) -> Trainer<Cpu<f64>> {
        let samples = Box::new(Batches {
            inputs: self.bytes_of("inputs"),
            targets: self.values("targets"),
            first_key: self.has("first_key").then(|| self.values("first_key")),
            samples: self.size("batch"),
            width: if self.is_mlp() { self.size("inputs") } else { 1 },
        });
        let mut trainer = Trainer::new(cpu(), Box::new(Solo), config, meaning, samples, Recompute::None).unwrap();
        let table = trainer.network.table().clone();
        let mut weights = vec![0.0; table.arena];
        for (i, row) in table.rows.iter().enumerate() {
            weights[table.values(i)].copy_from_slice(&self.values::<f64>(&format!("init/{}", row.name)));
        }
        assert_eq!(table.rows.len(), self.case["parameters"].as_array().unwrap().len(), "{}", self.name);
        write(&trainer.backend, &mut trainer.state.weights, &weights);
        trainer
    }

    fn bytes_of(&self, key: &str) -> Vec<u8> {
        SafeTensors::deserialize(&self.bytes).unwrap().tensor(key).unwrap().data().to_vec()
    }

    /// The forward multipliers as chosen factors, at which every rate is the fixture's.
    fn multipliers(&self) -> String {
        if self.is_mlp() {
            return String::new();
        }
        let attention = self.number("attention_scale") * self.number("e").sqrt();
        format!("[model.multipliers]\nlogits={:?}\nattention={attention:?}", self.number("readout_multiplier"))
    }
}

/// The fixture's batches: step × accumulate × batch.
struct Batches {
    inputs: Vec<u8>,
    targets: Vec<i32>,
    first_key: Option<Vec<i32>>,
    samples: usize,
    width: usize,
}

impl Samples for Batches {
    fn train(&mut self, first: u64, batch: &mut HostBatch) {
        let index = first as usize / self.samples;
        let (bytes, rows) = (batch.inputs.len(), batch.targets.len());
        batch.inputs.copy_from_slice(&self.inputs[index * bytes..(index + 1) * bytes]);
        batch.targets.copy_from_slice(&self.targets[index * rows..(index + 1) * rows]);
        if let (Some(to), Some(from)) = (&mut batch.first_key, &self.first_key) {
            to.copy_from_slice(&from[index * rows..(index + 1) * rows]);
        }
    }
    fn validate(&mut self, _: u64, _: &mut HostBatch) -> usize {
        0
    }
    fn held_out(&self) -> u64 {
        0
    }
    fn fingerprint(&self) -> u64 {
        0
    }
    fn inputs(&self) -> usize {
        self.width
    }
    fn resets_attention(&self) -> bool {
        self.first_key.is_some()
    }
}

/// An optimizer of a fixture as `[optimizer]`.
fn optimizer(name: &str, h: &Value) -> String {
    let number = |key: &str| format!("{:?}", h[key].as_f64().unwrap_or_else(|| panic!("{name}: {key}")));
    let common = format!("lr={}\nweight_decay={}\n", number("lr"), number("weight_decay"));
    let rest = match name {
        "sgd" | "sgd-dampening" => format!(
            "kind='sgd'\nmomentum={}\ndampening={}\nnesterov={}",
            number("momentum"),
            number("dampening"),
            h["nesterov"]
        ),
        "adam" | "adam-amsgrad" => {
            format!("kind='adam'\nbetas={}\neps={}\namsgrad={}", h["betas"], number("eps"), h["amsgrad"])
        }
        "adamw" => format!("kind='adamw'\nbetas={}\neps={}", h["betas"], number("eps")),
        "lion" => format!("kind='lion'\nbetas={}", h["betas"]),
        "muon" => {
            let eps = (number("adamw_eps"), number("eps"));
            format!("kind='muon'\nbetas={}\neps={}\nmuon_eps={}", h["adamw_betas"], eps.0, eps.1)
        }
        other => panic!("an optimizer that is not known: {other}"),
    };
    common + &rest
}

/// Largest difference, relative to the largest expected number.
fn difference(found: &[f64], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let scale = expected.iter().fold(f64::MIN_POSITIVE, |m, e| m.max(e.abs()));
    found.iter().zip(expected).map(|(f, e)| (f - e).abs()).fold(0.0, f64::max) / scale
}

/// Loss and gradient at the initial weights, once with the forward multipliers chosen, once with those that μP gives at
/// another base shape.
#[test]
fn first_loss_and_gradients() {
    for fixture in Fixture::all() {
        let name = &fixture.name;
        for mup in [false, true] {
            let forward = if mup { String::new() } else { fixture.multipliers() };
            // Without the fixture's clipping, which is not in its gradients.
            let mut config = fixture.config(&GRADIENT.replace("clip=0", ""), &forward);
            config.optimizer.clip = 0.0;
            let mut meaning = fixture.meaning(&config);
            if mup && !fixture.is_mlp() {
                let base = &mut meaning.scaling.base;
                let width = fixture.number("d") * fixture.number("readout_multiplier");
                base.set(Width::Residual, width as usize);
                let size = (fixture.number("attention_scale") * fixture.number("e")).powi(2);
                base.set(Width::HeadDim, size.round() as usize);
            }
            let mut trainer = fixture.trainer(&config, &meaning);
            let (loss, gradient) = gradient(&mut trainer, &meaning);
            assert!(difference(&[loss], &fixture.values("loss")) <= FIRST, "{name}: loss {loss}");
            let table = trainer.network.table();
            let all: Vec<f64> =
                table.rows.iter().flat_map(|row| fixture.values(&format!("grad/{}", row.name))).collect();
            let scale = all.iter().fold(0.0f64, |m, g| m.max(g.abs()));
            for (i, row) in table.rows.iter().enumerate() {
                let expected: Vec<f64> = fixture.values(&format!("grad/{}", row.name));
                let found = &gradient[table.values(i)];
                // Relative to the tensor; the K bias of GPT-2, whose gradient is zero, to all of them.
                let own = if expected.iter().all(|g| g.abs() < 1e-12 * scale) { scale } else { 0.0 };
                let error = found.iter().zip(&expected).map(|(f, e)| (f - e).abs()).fold(0.0, f64::max);
                let largest = expected.iter().fold(own, |m, e| m.max(e.abs()));
                assert!(error <= FIRST * largest, "{name}: {}: {error:e} of {largest:e}", row.name);
            }
        }
    }
}

/// Logits of the first batch, token by token, with the cache of keys and values.
#[test]
fn first_logits() {
    for fixture in Fixture::all().iter().filter(|f| !f.is_mlp() && !f.is("document_mask")) {
        let config = fixture.config(GRADIENT.trim_end_matches("clip=0"), &fixture.multipliers());
        let trainer = fixture.trainer(&config, &fixture.meaning(&config));
        let Network::Decoder(decoder) = &trainer.network else { panic!("a decoder") };
        let weights = Weights::new(trainer.network.table(), trainer.state.weights.view());
        let mut generator = Generator::new(&trainer.backend, decoder).unwrap();
        let expected: Vec<f64> = fixture.values("logits");
        let sequences = expected.len() / (fixture.size("vocab") * fixture.size("context"));
        let tokens: Vec<i32> = fixture.values("inputs");
        let mut found = Vec::new();
        for sequence in tokens.chunks(fixture.size("context")).take(sequences) {
            generator.clear();
            for token in sequence {
                found.extend(generator.extend(&trainer.backend, decoder, weights, &[*token]).unwrap());
            }
        }
        let error = difference(&found, &expected);
        assert!(error <= FIRST, "{}: {error:e}", fixture.name);
    }
}

/// Runs the 20 steps.
fn steps(trainer: &mut Trainer<Cpu<f64>>) -> Vec<StepResult> {
    let mut results: Vec<_> = (0..20).filter_map(|_| trainer.step().unwrap()).collect();
    while let Some(result) = trainer.collect().unwrap() {
        results.push(result);
    }
    results
}

/// Losses, gradient norms and weights of every optimizer over 20 steps.
#[test]
fn trajectories() {
    for fixture in Fixture::all() {
        assert_eq!(fixture.optimizers().count(), 7);
        for (name, settings) in fixture.optimizers() {
            let config = fixture.config(&optimizer(name, settings), &fixture.multipliers());
            let mut trainer = fixture.trainer(&config, &fixture.meaning(&config));
            let results = steps(&mut trainer);
            let place = format!("{}, {name}", fixture.name);
            let of = |value: fn(&StepResult) -> f64| results.iter().map(value).collect::<Vec<f64>>();
            let error = difference(&of(|r| r.loss), &fixture.values(&format!("losses/{name}")));
            assert!(error <= TRAJECTORY, "{place}: losses differ by {error:e}");
            let error = difference(&of(|r| r.grad_norm), &fixture.values(&format!("grad_norms/{name}")));
            assert!(error <= TRAJECTORY, "{place}: gradient norms differ by {error:e}");
            final_weights(&fixture, name, &trainer);
        }
    }
}

/// Compares the weights after the steps: all of them where the fixture has them, else a sum and a norm of each tensor.
fn final_weights(fixture: &Fixture, optimizer: &str, trainer: &Trainer<Cpu<f64>>) {
    let (table, weights) = (trainer.network.table(), read(&trainer.backend, &trainer.state.weights));
    let summary: Vec<f64> = fixture.values(&format!("summary/{optimizer}"));
    for (at, parameter) in fixture.case["parameters"].as_array().unwrap().iter().enumerate() {
        let parameter = parameter.as_str().unwrap();
        let place = format!("{}, {optimizer}: {parameter}", fixture.name);
        // Under Lion the sign of a rounding error moves it: its gradient is zero.
        if optimizer == "lion" && fixture.case["arch"] == "gpt2" && parameter.ends_with("k.bias") {
            continue;
        }
        let values = &weights[table.values(table.find(parameter).unwrap())];
        let norm = values.iter().map(|w| w * w).sum::<f64>().sqrt();
        let sum: f64 = values.iter().enumerate().map(|(i, w)| w * (i as f64).cos()).sum();
        let expected = &summary[2 * at..2 * at + 2];
        let scale = expected[1].max(1e-3);
        for (found, expected) in [sum, norm].iter().zip(expected) {
            assert!((found - expected).abs() <= TRAJECTORY * scale, "{place}: {found} instead of {expected}");
        }
        let key = format!("final/{optimizer}/{parameter}");
        if fixture.has(&key) {
            let error = difference(values, &fixture.values(&key));
            assert!(error <= TRAJECTORY, "{place}: {error:e}");
        }
    }
    let full = ["adamw", "muon"].contains(&optimizer);
    assert_eq!(fixture.has(&format!("final/{optimizer}/{}", table.rows[0].name)), full);
}
