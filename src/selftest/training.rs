//! Training on the device as a whole: beside the CPU; widened beside narrow; saved and loaded beside never stopped.

use super::agreement::{Agreement, get};
use crate::{
    DType, Error, Result,
    backend::{Backend, cpu::Cpu, cuda::Cuda},
    checkpoint::{CONFIG, STATE, Writer},
    comm::Solo,
    config::{Config, ConfigText, DataShape, Moments, UpscaleConfig, resolve_model},
    data::{TokenData, dataset::BatchRules},
    dims::Dims,
    feed::TokenSamples,
    model::{self, decoder::Recompute, spec::Scaling},
    mup::Parametrization,
    ops::Ops,
    rng,
    state::{Meaning, Position, Progress},
    trainer::{Trainer, micro_batch},
    upscale::{self, Growth, Origin},
};
use std::{
    fs,
    path::{Path, PathBuf},
};

const VOCAB: usize = 61;
const STEPS: usize = 5;
const WIDTH: usize = 2;

const MODELS: [(&str, &str); 2] = [
    ("gpt2", "arch = 'gpt2'\nlayers = 2\nresidual = 48\nkv_heads = 3\ncontext = 24\n"),
    (
        "llama",
        "arch = 'llama'\nlayers = 2\nresidual = 48\nkv_heads = 2\ngroup = 3\nffn = 72\ncontext = 24\nqk_norm = true\n\
         qkv_bias = true\n",
    ),
];

fn setting(model: &str) -> Result<(Config, Meaning)> {
    let text = format!(
        "run = 'selftest'\nsteps = 1000\n[data]\npath = 'selftest'\n[batch]\nsize = 3\nmicro_batches = 2\n\
         [optimizer]\nlr = 0.01\nclip = 1.0\n[model]\n{model}"
    );
    let config = ConfigText::parse(&text, &[], Path::new("selftest"))?.resolve()?;
    let spec = resolve_model(config.model.as_ref().expect("the text has a model"), DataShape::Tokens { vocab: VOCAB })?;
    let scaling = Scaling { kind: Parametrization::Mup, base: spec.dims().clone() };
    let meaning = Meaning { spec, scaling, optimizer: config.optimizer.clone(), tokenizer: None };
    Ok((config, meaning))
}

/// A trainer with an empty state, on tokens in which each follows from the one before, nearly.
fn trainer<B: Ops>(backend: B, config: &Config, meaning: &Meaning) -> Result<Trainer<B>> {
    let micro = micro_batch(config, &meaning.spec);
    let mut draws = rng::Stream::new(3, "selftest").rng();
    let mut token = 0;
    let next = |_| {
        token = (token * 7 + 5 + draws.below(3)) % VOCAB as u64;
        token as u32
    };
    let tokens = (0..6 * micro.rows() + 1).map(next).collect();
    let samples = TokenSamples::new(TokenData::from_tokens(tokens), None, micro, None, BatchRules::default())?;
    Trainer::new(backend, Box::new(Solo), config, meaning, Box::new(samples), Recompute::None)
}

/// Losses of some more steps.
fn curve<B: Ops>(trainer: &mut Trainer<B>, steps: usize) -> Result<Vec<f64>> {
    let mut losses = Vec::new();
    for _ in 0..steps {
        losses.extend(trainer.step()?.map(|result| result.loss));
    }
    while let Some(result) = trainer.collect()? {
        losses.push(result.loss);
    }
    Ok(losses)
}

/// A folder that goes when this does.
struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        // What cannot be removed stays behind in the system's temporary folder.
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn save(trainer: &Trainer<Cuda>, meaning: &Meaning, dir: &Path) -> Result<()> {
    let mut writer = Writer::create(dir, true)?;
    writer.json(CONFIG, meaning)?;
    let version = env!("CARGO_PKG_VERSION").into();
    writer.json(STATE, &Progress { position: trainer.position, data: 0, config: None, version })?;
    trainer.state.save(&trainer.backend, trainer.network.table(), Some(&meaning.optimizer), &mut writer)?;
    writer.commit()
}

/// A trainer on the device that starts from a checkpoint, perhaps widened.
fn load(cuda: &Cuda, origin: &Origin, config: &Config, growth: Option<&Growth>) -> Result<Trainer<Cuda>> {
    let meaning = upscale::meaning(&origin.meaning, growth)?;
    let mut trainer = trainer(Cuda::new(cuda.options())?, config, &meaning)?;
    let optimizer = Some(&meaning.optimizer);
    upscale::load(&trainer.backend, origin, growth, &mut trainer.state, &meaning, optimizer, Moments::Keep)?;
    trainer.position = Position { seconds: 0.0, ..origin.progress.position };
    Ok(trainer)
}

/// Weights as the optimizer keeps them.
fn weights(trainer: &Trainer<Cuda>) -> Result<Vec<f64>> {
    get(&trainer.backend, trainer.state.master.as_ref().unwrap_or(&trainer.state.weights))
}

pub(super) fn check(agreement: &mut Agreement) -> Result<()> {
    let folder = Folder(std::env::temp_dir().join(format!("mupscale-selftest-{}", std::process::id())));
    fs::create_dir_all(&folder.0).map_err(Error::io("create", &folder.0))?;
    for (name, model) in MODELS {
        one(agreement, name, model, &folder.0.join(name))?;
    }
    Ok(())
}

fn one(agreement: &mut Agreement, name: &str, model: &str, dir: &Path) -> Result<()> {
    let (config, meaning) = setting(model)?;
    let mut device = trainer(Cuda::new(agreement.cuda().options())?, &config, &meaning)?;
    device.state.init(&device.backend, device.network.table(), &meaning.scaling, 1);
    let mut reference = trainer(Cpu::<f64>::new(0)?, &config, &meaning)?;
    reference.state.init(&reference.backend, reference.network.table(), &meaning.scaling, 1);
    let (got, wanted) = (curve(&mut device, STEPS)?, curve(&mut reference, STEPS)?);
    // A loss is the mean of 144 tokens', whose errors are some roundings of their activations and have both signs; they
    // grow as steps build on one another.
    let rounding = agreement.rounding();
    let bound = |i: usize, losses: &[f64]| 4.0 * rounding * losses[i] * (i + 1) as f64;
    let bounds: Vec<f64> = (0..STEPS).map(|i| bound(i, &wanted)).collect();
    agreement.compare(format!("training {name}: losses beside the CPU"), &got, &wanted, |i| bounds[i]);

    save(&device, &meaning, dir)?;
    let origin = Origin::open(dir)?;
    let narrow = curve(&mut device, STEPS)?;
    let mut resumed = load(agreement.cuda(), &origin, &config, None)?;
    agreement.compare(format!("training {name}: losses after loading"), &curve(&mut resumed, STEPS)?, &narrow, |_| 0.0);
    let (got, wanted) = (weights(&resumed)?, weights(&device)?);
    agreement.compare(format!("training {name}: weights after loading"), &got, &wanted, |_| 0.0);

    let growth = Growth::new(&origin.meaning, &UpscaleConfig { width: Some(WIDTH), ..UpscaleConfig::default() })?;
    let mut wide = load(agreement.cuda(), &origin, &config, Some(&growth))?;
    let losses = curve(&mut wide, STEPS)?;
    agreement.compare(format!("training {name}: losses when widened"), &losses, &narrow, |i| bounds[i]);
    if agreement.cuda().moment() == DType::BF16 {
        // Moments of copies are rounded each for itself.
        return Ok(());
    }
    let (got, first) = copies(&wide, &meaning, &growth.times)?;
    agreement.compare(format!("training {name}: copies of a unit stay equal"), &got, &first, |_| 0.0);
    Ok(())
}

/// Every weight of a widened model, and beside it the first one that copies the same weight of the narrow model.
fn copies(wide: &Trainer<Cuda>, narrow: &Meaning, times: &Dims) -> Result<(Vec<f64>, Vec<f64>)> {
    let (all, narrow) = (weights(wide)?, model::table(&narrow.spec, &narrow.scaling));
    let (mut got, mut first) = (Vec::new(), Vec::new());
    for (i, row) in narrow.rows.iter().enumerate() {
        let map = |axis: usize| row.axes.get(axis).map_or(vec![0], |axis| axis.repeat(times));
        let (rows, columns) = (map(0), map(1));
        let place = |map: &[u32], source: u32| map.iter().position(|&s| s == source).unwrap_or(0);
        let firsts: Vec<usize> = columns.iter().map(|&c| place(&columns, c)).collect();
        let values = &all[wide.network.table().values(i)];
        for (r, &source) in rows.iter().enumerate() {
            let from = place(&rows, source) * columns.len();
            got.extend_from_slice(&values[r * columns.len()..(r + 1) * columns.len()]);
            first.extend(firsts.iter().map(|&c| values[from + c]));
        }
    }
    Ok((got, first))
}
