//! What the integration tests share: tiny models of every kind, data, trainers, and checkpoints between them.
#![allow(dead_code, reason = "each test binary uses a part of it")]

use mupscale::{
    DType, Result,
    backend::{HostBuffer, Stream, Tensor, cpu::Cpu},
    checkpoint::{CONFIG, STATE, Writer},
    comm::{Comm, Solo},
    config::{Config, ConfigText, DataShape, Moments, UpscaleConfig, resolve_model},
    data::{TokenData, dataset::BatchRules},
    feed::{HostBatch, Samples, TokenSamples},
    model::{
        decoder::Recompute,
        spec::{Scaling, Spec},
    },
    ops::Ops,
    state::{Meaning, Position, Progress},
    trainer::{Trainer, micro_batch},
    upscale::{self, Growth, Origin},
};
use std::path::Path;

pub const VOCAB: usize = 11;
pub const INPUTS: usize = 5;
pub const CLASSES: usize = 4;

/// Tiny models, one for each architecture and option that changes the computation.
pub const MODELS: [(&str, &str); 7] = [
    ("gpt2", "arch='gpt2'\nlayers=2\nresidual=8\nffn=12\nkv_heads=2\ngroup=1\nhead_dim=4\ncontext=6\ninit_std=0.4"),
    (
        "gpt2-grouped",
        "arch='gpt2'\nlayers=2\nresidual=8\nffn=12\nkv_heads=2\ngroup=2\nhead_dim=3\ncontext=6\ninit_std=0.4\ntied=false\nactivation='gelu-exact'",
    ),
    (
        "gpt2-bare",
        "arch='gpt2'\nlayers=1\nresidual=6\nffn=9\nkv_heads=3\nhead_dim=2\ncontext=5\ninit_std=0.4\nbias=false",
    ),
    ("llama", "arch='llama'\nlayers=2\nresidual=8\nffn=12\nkv_heads=2\ngroup=2\nhead_dim=4\ncontext=6\ninit_std=0.4"),
    (
        "qwen2",
        "arch='llama'\nlayers=2\nresidual=8\nffn=12\nkv_heads=2\ngroup=1\nhead_dim=4\ncontext=6\ninit_std=0.4\ntied=true\nqkv_bias=true",
    ),
    (
        "qwen3",
        "arch='llama'\nlayers=2\nresidual=8\nffn=12\nkv_heads=2\ngroup=2\nhead_dim=4\ncontext=6\ninit_std=0.4\nqk_norm=true\n[model.multipliers]\nembedding=1.5\nresidual=0.7\nattention=1.25\nlogits=0.8",
    ),
    ("mlp", "arch='mlp'\nhidden=[6, 9]"),
];

/// Optimizers with every option that changes the computation.
pub const OPTIMIZERS: [(&str, &str); 9] = [
    ("sgd", "kind='sgd'\nlr=0.05\nmomentum=0.9\nnesterov=true\nweight_decay=0.1"),
    ("sgd-dampened", "kind='sgd'\nlr=0.05\nmomentum=0.9\ndampening=0.2\nweight_decay=0.1"),
    ("sgd-plain", "kind='sgd'\nlr=0.05\nmomentum=0\nweight_decay=0.1"),
    ("adam", "kind='adam'\nlr=0.02\neps=1e-6\nweight_decay=0.1"),
    ("adam-amsgrad", "kind='adam'\nlr=0.02\namsgrad=true\nweight_decay=0.1"),
    ("adamw", "kind='adamw'\nlr=0.02\neps=1e-3\nweight_decay=0.1"),
    ("lion", "kind='lion'\nlr=0.005\nweight_decay=0.1"),
    ("muon", "kind='muon'\nlr=0.02\nweight_decay=0.1"),
    ("muon-rms", "kind='muon'\nlr=0.02\nweight_decay=0.1\nshape_factor='rms'"),
];

/// A configuration of these parts; `sets` are further assignments.
pub fn config(model: &str, optimizer: &str, sets: &[&str]) -> Config {
    let text = format!(
        "run='unused'\nsteps=60\nprecision='f64'\n[data]\npath='unused'\n[batch]\nsize=3\n[optimizer]\n{optimizer}\n[model]\n{model}\n"
    );
    let sets: Vec<String> = sets.iter().map(|s| s.to_string()).collect();
    ConfigText::parse(&text, &sets, Path::new("test")).and_then(|t| t.resolve()).expect("a valid configuration")
}

/// What a model of this configuration is, with its own shape as base.
pub fn meaning(config: &Config) -> Meaning {
    let model = config.model.as_ref().expect("a model");
    let tokens = DataShape::Tokens { vocab: VOCAB };
    let spec = resolve_model(model, tokens)
        .or_else(|_| resolve_model(model, DataShape::Rows { inputs: INPUTS, classes: CLASSES }))
        .expect("a model");
    let kind = config.parametrization.as_ref().map(|p| p.kind).unwrap_or_default();
    let scaling = Scaling::new(kind, spec.dims());
    Meaning { spec, scaling, optimizer: config.optimizer.clone(), tokenizer: None }
}

/// Fixed pseudo-random numbers below `below`.
pub fn numbers(seed: u64, below: u64, count: usize) -> Vec<u64> {
    let mut state = seed.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    (0..count).map(|_| next()).collect()
}

/// Rows of numbers, different for each index, in any float type.
pub struct NumberSamples {
    rows: usize,
    dtype: DType,
}

impl Samples for NumberSamples {
    fn train(&mut self, first: u64, batch: &mut HostBatch) {
        for row in 0..self.rows {
            let draws = numbers(first + row as u64, 2000, INPUTS + 1);
            let values: Vec<f64> = draws[..INPUTS].iter().map(|&d| d as f64 / 1000.0 - 1.0).collect();
            let size = INPUTS * self.dtype.size();
            let target = &mut batch.inputs[row * size..(row + 1) * size];
            mupscale::dtype::convert(bytemuck::cast_slice(&values), DType::F64, target, self.dtype);
            batch.targets[row] = (draws[INPUTS] % CLASSES as u64) as i32;
        }
    }
    fn validate(&mut self, first: u64, batch: &mut HostBatch) -> usize {
        self.train(first + 1_000_000, batch);
        self.rows
    }
    fn held_out(&self) -> u64 {
        4 * self.rows as u64
    }
    fn fingerprint(&self) -> u64 {
        1
    }
    fn inputs(&self) -> usize {
        INPUTS
    }
    fn resets_attention(&self) -> bool {
        false
    }
}

/// Data for a model: shuffled windows of random tokens, or rows of numbers.
pub fn samples(config: &Config, spec: &Spec, dtype: DType) -> Box<dyn Samples> {
    let micro = micro_batch(config, spec);
    match spec {
        Spec::Decoder(_) => {
            let tokens = |seed, n| {
                TokenData::from_tokens(numbers(seed, VOCAB as u64, n).into_iter().map(|t| t as u32).collect())
            };
            let rules = BatchRules {
                reset_attention_after: config.data.reset_attention.then_some(0),
                ignored_target: config.data.ignore,
            };
            Box::new(
                TokenSamples::new(tokens(7, 700), Some(tokens(8, 100)), micro, Some(config.seed), rules)
                    .expect("enough tokens"),
            )
        }
        Spec::Mlp(_) => Box::new(NumberSamples { rows: micro.samples, dtype }),
    }
}

/// A trainer with new weights. Biases and gains are moved off 0 and 1, so that nothing hides behind a constant.
pub fn trainer<B: Ops>(backend: B, config: &Config, meaning: &Meaning) -> Trainer<B> {
    trainer_of(backend, Box::new(Solo), config, meaning, Recompute::None)
}

/// The same, as one rank of several, with a way to save memory.
pub fn trainer_of<B: Ops>(
    backend: B,
    comm: Box<dyn Comm<B>>,
    config: &Config,
    meaning: &Meaning,
    recompute: Recompute,
) -> Trainer<B> {
    let samples = samples(config, &meaning.spec, backend.compute());
    let mut trainer = Trainer::new(backend, comm, config, meaning, samples, recompute).expect("a trainer");
    trainer.state.init(&trainer.backend, trainer.network.table(), &meaning.scaling, config.seed);
    let mut weights = read(&trainer.backend, &trainer.state.weights);
    let table = trainer.network.table().clone();
    for (i, row) in table.rows.iter().enumerate().filter(|(_, row)| !row.is_matrix()) {
        for (at, draw) in table.values(i).zip(numbers(i as u64, 1000, row.len())) {
            weights[at] += draw as f64 / 2500.0 - 0.2;
        }
    }
    write(&trainer.backend, &mut trainer.state.weights, &weights);
    trainer
}

/// Runs `steps` steps and gives their losses.
pub fn losses<B: Ops>(trainer: &mut Trainer<B>, steps: usize) -> Vec<f64> {
    let mut results = Vec::new();
    for _ in 0..steps {
        results.extend(trainer.step().expect("a step"));
    }
    while let Some(result) = trainer.collect().expect("a result") {
        results.push(result);
    }
    assert_eq!(results.len(), steps);
    assert!(results.iter().all(|r| !r.skipped), "a step was skipped");
    results.iter().map(|r| r.loss).collect()
}

/// An optimizer from whose step [`gradient`] reads the gradient: plain SGD, at a rate so high that the weight before is
/// small beside the change, and no digit is lost in the difference.
pub const GRADIENT: &str = "kind='sgd'\nlr=1048576\nmomentum=0\nweight_decay=0\nclip=0";

/// The loss of the trainer's next step, and its gradient by all weights, as the arena is laid out. The trainer must have
/// been made with [`GRADIENT`]; its weights change.
pub fn gradient<B: Ops>(trainer: &mut Trainer<B>, meaning: &Meaning) -> (f64, Vec<f64>) {
    let before = read(&trainer.backend, &trainer.state.weights);
    let loss = losses(trainer, 1)[0];
    let mut gradient = read(&trainer.backend, &trainer.state.weights);
    gradient.iter_mut().zip(before).for_each(|(after, before)| *after = before - *after);
    let table = trainer.network.table();
    for (i, settings) in meaning.optimizer.settings(table, &meaning.scaling).iter().enumerate() {
        let rate = meaning.optimizer.lr * settings.lr;
        gradient[table.values(i)].iter_mut().for_each(|g| *g /= rate);
    }
    (loss, gradient)
}

/// A tensor's values.
pub fn read<B: Ops>(backend: &B, tensor: &Tensor<B>) -> Vec<f64> {
    let bytes = tensor.len() * tensor.dtype().size();
    let mut host = backend.host(bytes).expect("host memory");
    backend.download(Stream::Compute, tensor.view(), &mut host, 0);
    backend.synchronize(&backend.record(Stream::Compute)).expect("a download");
    let mut values = vec![0.0f64; tensor.len()];
    mupscale::dtype::convert(&host.bytes()[..bytes], tensor.dtype(), bytemuck::cast_slice_mut(&mut values), DType::F64);
    values
}

/// Replaces a tensor's values.
pub fn write<B: Ops>(backend: &B, tensor: &mut Tensor<B>, values: &[f64]) {
    let mut host = backend.host(tensor.len() * tensor.dtype().size()).expect("host memory");
    mupscale::dtype::convert(bytemuck::cast_slice(values), DType::F64, host.bytes_mut(), tensor.dtype());
    let bytes = host.bytes().len();
    backend.upload(Stream::Compute, &host, 0..bytes, tensor.view_mut());
    backend.synchronize(&backend.record(Stream::Compute)).expect("an upload");
}

/// Saves a trainer's state as a checkpoint and opens it.
pub fn checkpoint<B: Ops>(trainer: &Trainer<B>, meaning: &Meaning, dir: &Path) -> Result<Origin> {
    let mut writer = Writer::create(dir, true)?;
    writer.json(CONFIG, meaning)?;
    let progress = Progress { position: trainer.position, data: 0, config: None, version: "test".into() };
    writer.json(STATE, &progress)?;
    trainer.state.save(&trainer.backend, trainer.network.table(), Some(&meaning.optimizer), &mut writer)?;
    writer.commit()?;
    Origin::open(dir)
}

/// A trainer that starts from a checkpoint, widened as `growth` says, at the same position in the data.
pub fn widened<B: Ops>(
    backend: B,
    config: &Config,
    origin: &Origin,
    growth: Option<&UpscaleConfig>,
) -> Result<(Trainer<B>, Meaning)> {
    let growth = growth.map(|g| Growth::new(&origin.meaning, g)).transpose()?;
    let meaning = upscale::meaning(&origin.meaning, growth.as_ref())?;
    let samples = samples(config, &meaning.spec, backend.compute());
    let mut trainer = Trainer::new(backend, Box::new(Solo), config, &meaning, samples, Recompute::None)?;
    let optimizer = Some(&meaning.optimizer);
    upscale::load(&trainer.backend, origin, growth.as_ref(), &mut trainer.state, &meaning, optimizer, Moments::Keep)?;
    trainer.position = Position { ..origin.progress.position };
    Ok((trainer, meaning))
}

/// The f64 CPU, on one thread.
pub fn cpu() -> Cpu<f64> {
    Cpu::new(1).expect("a CPU")
}
