//! Milliseconds of a training step of a small GPT-2 on random tokens, by the trainer that `train` uses.

use super::median;
use crate::{
    Result,
    backend::{
        Backend,
        cpu::{Cpu, parallel::Profile},
    },
    comm::Solo,
    config::{Config, ConfigText, DataShape, resolve_model},
    data::{TokenData, dataset::BatchRules},
    feed::TokenSamples,
    model::{decoder::Recompute, spec::Scaling},
    mup::Parametrization,
    rng,
    state::Meaning,
    trainer::{Trainer, micro_batch},
};
use std::{path::Path, time::Instant};

const LAYERS: usize = 4;
const HEADS: usize = 4;
const VOCAB: usize = 8192;
const BATCH: usize = 8;
const CONTEXT: usize = 256;
/// Batches that are taken in turn.
const BATCHES: usize = 8;
/// Steps before the clock runs.
const WARM_UP: usize = 3;

/// A model to measure: 4 layers, 4 heads, vocabulary 8,192, batch 8, context 256, AdamW, clipping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Preset {
    /// Width 64, 0.7 million parameters, on the CPU in f32.
    CpuW64,
    /// Width 128, 1.9 million.
    CpuW128,
    /// Width 256, 5.3 million.
    CpuW256,
}

impl Preset {
    /// The residual width.
    pub fn width(self) -> usize {
        match self {
            Self::CpuW64 => 64,
            Self::CpuW128 => 128,
            Self::CpuW256 => 256,
        }
    }
}

/// What was measured.
#[derive(Clone, Debug, serde::Serialize)]
pub struct TrainSpeed {
    /// The device in words.
    pub device: String,
    /// Residual width.
    pub width: usize,
    /// Blocks.
    pub layers: usize,
    /// Heads.
    pub heads: usize,
    /// Vocabulary.
    pub vocab: usize,
    /// Sequences of a step.
    pub batch: usize,
    /// Tokens of a sequence.
    pub context: usize,
    /// Timed steps.
    pub steps: usize,
    /// Parameters, the tied embedding counted once.
    pub parameters: usize,
    /// Median milliseconds of a step: forward, backward, clipping, AdamW.
    pub ms_per_step: f64,
    /// The fastest step's.
    pub ms_best: f64,
    /// Tokens of a step over the median.
    pub tokens_per_second: f64,
    /// (6 · parameters + 12 · layers · width · context) floating-point operations a token, in 10¹² a second.
    pub tflops: f64,
    /// Loss of the last step, nats: random tokens cannot be learnt, so about ln 8,192 = 9.01.
    pub loss: f64,
    /// Where a step's time goes, if that was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub profile: Option<Vec<Place>>,
}

/// A place in the source that opens parallel regions, and what they take in a step.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Place {
    /// File and line; `serial` for what lies outside all regions.
    pub place: String,
    /// Regions a step.
    pub calls: f64,
    /// Milliseconds a step, mean.
    pub ms: f64,
}

/// Times `steps` steps on `threads` threads (0: all cores); with `profile` also where their time goes.
pub fn train(preset: Preset, steps: usize, threads: usize, profile: bool) -> Result<TrainSpeed> {
    let (config, meaning) = model(preset.width())?;
    let micro = micro_batch(&config, &meaning.spec);
    let mut draws = rng::Stream::new(0, "bench").rng();
    let tokens = (0..BATCHES * BATCH * CONTEXT + 1).map(|_| draws.below(VOCAB as u64) as u32).collect();
    let samples = TokenSamples::new(TokenData::from_tokens(tokens), None, micro, None, BatchRules::default())?;
    let backend = Cpu::<f32>::new(threads)?;
    let device = backend.describe();
    let mut trainer = Trainer::new(backend, Box::new(Solo), &config, &meaning, Box::new(samples), Recompute::None)?;
    let parameters = trainer.network.table().parameters();
    trainer.state.init(&trainer.backend, trainer.network.table(), &meaning.scaling, config.seed);
    let mut times = Vec::with_capacity(steps);
    for step in 0..WARM_UP + steps {
        if step == WARM_UP {
            trainer.backend.pool().profile(profile);
        }
        // On a CPU a step is done when the call returns.
        let start = Instant::now();
        trainer.step()?;
        if step >= WARM_UP {
            times.push(start.elapsed().as_secs_f64() * 1e3);
        }
    }
    let profile = trainer.backend.pool().profile(false).map(|profile| places(profile, &times));
    let mut loss = f64::NAN;
    while let Some(result) = trainer.collect()? {
        loss = result.loss;
    }
    let ms_best = times.iter().copied().fold(f64::INFINITY, f64::min);
    let (ms, width) = (median(times), preset.width());
    let tokens = (BATCH * CONTEXT) as f64;
    let flops = (6 * parameters + 12 * LAYERS * width * CONTEXT) as f64 * tokens;
    Ok(TrainSpeed {
        device,
        width,
        layers: LAYERS,
        heads: HEADS,
        vocab: VOCAB,
        batch: BATCH,
        context: CONTEXT,
        steps,
        parameters,
        ms_per_step: ms,
        ms_best,
        tokens_per_second: tokens / ms * 1e3,
        tflops: flops / ms / 1e9,
        loss,
        profile,
    })
}

/// The places of a profile, the dearest first, per step.
fn places(profile: Profile, times: &[f64]) -> Vec<Place> {
    let steps = times.len() as f64;
    let place = |((file, line), (calls, seconds)): ((&str, u32), (u64, f64))| Place {
        place: format!("{file}:{line}"),
        calls: calls as f64 / steps,
        ms: seconds * 1e3 / steps,
    };
    let mut places: Vec<Place> = profile.into_iter().map(place).collect();
    let serial = times.iter().sum::<f64>() / steps - places.iter().map(|p| p.ms).sum::<f64>();
    places.push(Place { place: "serial".into(), calls: 1.0, ms: serial });
    places.sort_by(|a, b| b.ms.total_cmp(&a.ms));
    places
}

fn model(width: usize) -> Result<(Config, Meaning)> {
    let text = format!(
        "run = 'bench'\nsteps = 1000000\n[data]\npath = 'bench'\n[batch]\nsize = {BATCH}\n\
         [optimizer]\nlr = 3e-4\nbetas = [0.9, 0.95]\nweight_decay = 0.1\nclip = 1.0\nclip_norm = 'plain'\n\
         [model]\narch = 'gpt2'\nlayers = {LAYERS}\nresidual = {width}\nkv_heads = {HEADS}\ncontext = {CONTEXT}\n"
    );
    meaning(&text, VOCAB, Parametrization::Standard)
}

/// A configuration, and a new model as it says.
pub(super) fn meaning(text: &str, vocab: usize, kind: Parametrization) -> Result<(Config, Meaning)> {
    let config = ConfigText::parse(text, &[], Path::new("bench"))?.resolve()?;
    let model = config.model.as_ref().expect("the text has a model");
    let spec = resolve_model(model, DataShape::Tokens { vocab })?;
    let scaling = Scaling { kind, base: spec.dims().clone() };
    let meaning = Meaning { spec, scaling, optimizer: config.optimizer.clone(), tokenizer: None };
    Ok((config, meaning))
}
