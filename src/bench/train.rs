//! Milliseconds of a training step on random tokens, by the trainer that `train` uses.

use super::{Preset, median};
use crate::{
    Result,
    backend::Profile,
    comm::Solo,
    config::Recording,
    data::{TokenData, dataset::BatchRules},
    feed::TokenSamples,
    model::{
        decoder::Recompute,
        param::{Kind, Table},
    },
    ops::Ops,
    rng,
    run::{Place, Work},
    trainer::{Trainer, micro_batch},
};
use std::time::Instant;

/// Batches that are taken in turn.
const BATCHES: usize = 8;
/// Steps before the clock runs: on a GPU one with each part of the feed's ring is eager, then one with each is
/// recorded, and two are always under way.
const WARM_UP: usize = 7;
/// Dense bf16 FLOP/s that utilisation is measured against: NVIDIA's figure for H100 and H200 (SXM).
const PEAK: f64 = 989e12;

/// What to measure.
#[derive(Clone, Copy, Debug)]
pub struct TrainBench {
    /// The model.
    pub preset: Preset,
    /// Sequences of a micro-batch; 0: the preset's own.
    pub batch: usize,
    /// Steps to time.
    pub steps: usize,
    /// What backward computes again.
    pub recompute: Recompute,
    /// What a GPU records of a step.
    pub graph: Recording,
    /// Measure where a step's time goes, too (on a CPU).
    pub profile: bool,
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
    /// Floating-point operations of the model in 10¹² a second: 6 for each token and element of a matrix that is
    /// multiplied, and 6 · layers · context · width for causal attention.
    pub tflops: f64,
    /// `tflops` over 989: the share of an H100's or H200's peak. It says nothing of other devices.
    pub mfu_h100: f64,
    /// Bytes of the device's memory that are in use.
    pub memory: usize,
    /// Loss of the last step, nats: random tokens cannot be learnt, so about the logarithm of the vocabulary.
    pub loss: f64,
    /// Where a step's time goes, if that was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub profile: Option<Vec<Hotspot>>,
}

/// A place in the source that opens parallel regions, and what they take in a step.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Hotspot {
    /// File and line; `serial` for what lies outside all regions.
    pub place: String,
    /// Regions a step.
    pub calls: f64,
    /// Milliseconds a step, mean.
    pub ms: f64,
}

/// Times steps on a device.
pub fn train(place: Place, bench: TrainBench) -> Result<TrainSpeed> {
    place.run(bench)
}

impl Work for TrainBench {
    type Output = TrainSpeed;

    fn on<B: Ops>(self, backend: B) -> Result<TrainSpeed> {
        let sizes = self.preset.sizes();
        let (mut config, meaning) = sizes.model(self.batch)?;
        config.graph = self.graph;
        let micro = micro_batch(&config, &meaning.spec);
        let mut draws = rng::Stream::new(0, "bench").rng();
        let count = BATCHES * micro.rows() + 1;
        let tokens = (0..count).map(|_| draws.below(sizes.vocab as u64) as u32).collect();
        let samples = TokenSamples::new(TokenData::from_tokens(tokens), None, micro, None, BatchRules::default())?;
        let device = backend.describe();
        let mut trainer = Trainer::new(backend, Box::new(Solo), &config, &meaning, Box::new(samples), self.recompute)?;
        trainer.state.init(&trainer.backend, trainer.network.table(), &meaning.scaling, config.seed);
        let (times, profile, loss) = time(&mut trainer, self.steps, self.profile)?;
        let table = trainer.network.table();
        let ms_best = times.iter().copied().fold(f64::INFINITY, f64::min);
        let (ms, tokens) = (median(times), micro.rows() as f64);
        let attention = 6 * sizes.layers * sizes.context * sizes.width;
        let tflops = (6 * multiplied(table) + attention) as f64 * tokens / ms / 1e9;
        Ok(TrainSpeed {
            device,
            width: sizes.width,
            layers: sizes.layers,
            heads: sizes.heads,
            vocab: sizes.vocab,
            batch: micro.samples,
            context: sizes.context,
            steps: self.steps,
            parameters: table.parameters(),
            ms_per_step: ms,
            ms_best,
            tokens_per_second: tokens / ms * 1e3,
            tflops,
            mfu_h100: tflops * 1e12 / PEAK,
            memory: trainer.backend.allocated(),
            loss,
            profile,
        })
    }
}

/// Milliseconds of each step, the profile, and the last loss. A step's call returns when the one two before it is done,
/// so in the steady state from call to call is a step's time.
fn time<B: Ops>(
    trainer: &mut Trainer<B>,
    steps: usize,
    profile: bool,
) -> Result<(Vec<f64>, Option<Vec<Hotspot>>, f64)> {
    let mut times = Vec::with_capacity(steps);
    for step in 0..WARM_UP + steps {
        if step == WARM_UP {
            trainer.backend.profile(profile);
        }
        let start = Instant::now();
        trainer.step()?;
        if step >= WARM_UP {
            times.push(start.elapsed().as_secs_f64() * 1e3);
        }
    }
    let profile = trainer.backend.profile(false).map(|profile| hotspots(profile, &times));
    let mut loss = f64::NAN;
    while let Some(result) = trainer.collect()? {
        loss = result.loss;
    }
    Ok((times, profile, loss))
}

/// Elements of the matrices that tokens are multiplied with. A tied embedding is the readout.
fn multiplied(table: &Table) -> usize {
    let readout = table.rows.iter().any(|row| row.kind == Kind::Readout);
    let counts = |kind| match kind {
        Kind::Hidden | Kind::Readout | Kind::Input => true,
        Kind::Embedding => !readout,
        Kind::Vector => false,
    };
    let positions = |name: &str| name.contains("position");
    table.rows.iter().filter(|row| counts(row.kind) && !positions(&row.name)).map(|row| row.len()).sum()
}

/// The places of a profile, the dearest first, per step.
fn hotspots(profile: Profile, times: &[f64]) -> Vec<Hotspot> {
    let steps = times.len() as f64;
    let place = |((file, line), (calls, seconds)): ((&str, u32), (u64, f64))| Hotspot {
        place: format!("{file}:{line}"),
        calls: calls as f64 / steps,
        ms: seconds * 1e3 / steps,
    };
    let mut places: Vec<Hotspot> = profile.into_iter().map(place).collect();
    let serial = times.iter().sum::<f64>() / steps - places.iter().map(|p| p.ms).sum::<f64>();
    places.push(Hotspot { place: "serial".into(), calls: 1.0, ms: serial });
    places.sort_by(|a, b| b.ms.total_cmp(&a.ms));
    places
}
