//! The coordinate check (arXiv 2203.03466, appendix D.1): how large each layer's activations are, and by how much the
//! first steps change them, at several widths.
//!
//! Under μP the change x_t − x_0 is as large at every width; in standard parametrisation it grows. So the verdict is on
//! the slope of log mean |x_t − x_0| against log width: only growth fails. (Logits at initialisation may fall as
//! 1/√width.) A check at a rate so low that standard parametrisation passes too tells nothing, and says so.

use super::widths::Sizes;
use crate::{
    DType, Error, Result,
    backend::{HostBuffer, Ref, Stream, Tensor},
    comm::Solo,
    config::{Config, ConfigText},
    model::{
        Acts, MicroBatch,
        decoder::Recompute,
        plan::{Plan, Slot},
    },
    mup::Parametrization,
    ops::Ops,
    report::progress::Show,
    run::{self, Place, Prepared, Work},
    trainer::{Trainer, micro_batch},
};
use serde::Serialize;
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

/// Changes that grow faster than width to this power fail. Between what is seen under μP (below 0.1) and in standard
/// parametrisation (0.5 and more, tests/equivalence/coordinates.rs).
pub const THRESHOLD: f64 = 0.3;

/// What to check.
pub struct Options {
    /// A run's configuration, whose model is made wider and narrower.
    pub config: PathBuf,
    /// `--set` assignments.
    pub sets: Vec<String>,
    /// The widths, rising; the first is the base shape.
    pub widths: Vec<usize>,
    /// Steps.
    pub steps: usize,
    /// Seeds, over which sizes are averaged.
    pub seeds: u64,
    /// Start from models widened this many times instead of new ones.
    pub widen: Option<Widen>,
    /// Growth that fails, see [`THRESHOLD`].
    pub threshold: f64,
}

/// How the models came to be that a check after widening starts from.
#[derive(Clone, Debug)]
pub struct Widen {
    /// Multiplicity of every width.
    pub times: usize,
    /// σ of the noise.
    pub noise: f64,
    /// Steps that the narrow models were trained for.
    pub steps: u64,
    /// Folder for them; removed afterwards.
    pub folder: PathBuf,
}

/// Size of one layer's activations at one width after some steps, averaged over seeds.
#[derive(Clone, Debug, Serialize)]
pub struct Coordinate {
    /// The layer.
    pub layer: String,
    /// The width.
    pub width: usize,
    /// Steps done.
    pub step: usize,
    /// Mean |x_t|.
    pub size: f64,
    /// Mean |x_t − x_0|.
    pub change: f64,
}

/// How a layer's changes grow with width.
#[derive(Clone, Debug, Serialize)]
pub struct Slope {
    /// The layer.
    pub layer: String,
    /// Exponent of width in mean |x_t − x_0|, the largest over the steps t ≥ 1; infinite where a change was.
    pub slope: f64,
    /// The step of the largest.
    pub step: usize,
    /// Exponent of width in mean |x_0|.
    pub initial: f64,
}

/// A check under one parametrisation.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    /// Which one.
    pub parametrization: Parametrization,
    /// Every size.
    pub coordinates: Vec<Coordinate>,
    /// One for each layer, in the order of the forward pass.
    pub slopes: Vec<Slope>,
    /// Whether no layer's changes grow.
    pub passes: bool,
}

/// Checks one parametrisation.
///
/// # Errors
/// Fewer than two widths, widths at which the model has no whole sizes; those of training.
pub fn check(options: &Options, kind: Parametrization) -> Result<Check> {
    let config = ConfigText::read(&options.config, &options.sets)?.resolve()?;
    let rising = options.widths.windows(2).all(|pair| pair[0] < pair[1]);
    if options.widths.len() < 2 || !rising {
        let why = "must be at least two, rising: the first is the base shape";
        return Err(Error::config("--widths", format!("{:?}", options.widths), why));
    }
    if config.init.is_some() {
        let why = "the check makes its own models: leave [init] out, and give --widen for widened ones";
        return Err(Error::config("init", "set", why));
    }
    // All widths first: a long check should not end at its last one.
    options
        .widths
        .iter()
        .try_for_each(|&width| narrow(options, width).and_then(|w| Sizes::at(&config, w)).map(drop))?;
    let mut seen: Sums = BTreeMap::new();
    for &width in &options.widths {
        for seed in 0..options.seeds {
            let sets = sets(options, &config, kind, width, config.seed + seed)?;
            let prepared = prepare(options, &config, width, &sets)?;
            let place = Place {
                device: config.device,
                precision: config.precision,
                threads: config.threads,
                ..Place::default()
            };
            let work = Probe { prepared, steps: options.steps };
            for (order, (layer, sizes)) in place.run(work)?.into_iter().enumerate() {
                for (step, (size, change)) in sizes.into_iter().enumerate() {
                    let sum = seen.entry((order, width, step)).or_insert_with(|| (layer.clone(), 0.0, 0.0));
                    (sum.1, sum.2) = (sum.1 + size, sum.2 + change);
                }
            }
        }
    }
    Ok(judge(options, kind, seen))
}

/// Sums over seeds by (layer's place, width, step).
type Sums = BTreeMap<(usize, usize, usize), (String, f64, f64)>;

fn judge(options: &Options, kind: Parametrization, seen: Sums) -> Check {
    let seeds = options.seeds as f64;
    let coordinate = |((_, width, step), (layer, size, change)): (_, (String, f64, f64))| Coordinate {
        layer,
        width,
        step,
        size: size / seeds,
        change: change / seeds,
    };
    let mut layers: Vec<String> = Vec::new();
    seen.values().for_each(|(layer, ..)| {
        if layers.last() != Some(layer) {
            layers.push(layer.clone());
        }
    });
    let coordinates: Vec<_> = seen.into_iter().map(coordinate).collect();
    let points = |layer: &str, step: usize, of: fn(&Coordinate) -> f64| {
        let here = coordinates.iter().filter(|c| c.layer == layer && c.step == step);
        slope(&here.map(|c| (c.width as f64, of(c))).collect::<Vec<_>>())
    };
    let slopes = layers.iter().map(|layer| {
        let steps = (1..=options.steps).map(|step| (points(layer, step, |c| c.change), step));
        let (slope, step) = steps.max_by(|a, b| a.0.total_cmp(&b.0)).unwrap_or((0.0, 0));
        Slope { layer: layer.clone(), slope, step, initial: points(layer, 0, |c| c.size) }
    });
    let slopes: Vec<_> = slopes.collect();
    let passes = slopes.iter().all(|s| s.slope <= options.threshold);
    Check { parametrization: kind, coordinates, slopes, passes }
}

/// Exponent p of y ∝ x^p by least squares; infinite if a y is not finite (a model that blew up), 0 for what never changes.
fn slope(points: &[(f64, f64)]) -> f64 {
    if points.iter().any(|(_, y)| !y.is_finite()) {
        return f64::INFINITY;
    }
    let logs: Vec<_> = points.iter().filter(|(_, y)| *y > 0.0).map(|(x, y)| (x.ln(), y.ln())).collect();
    let n = logs.len().max(1) as f64;
    let (mx, my) = (logs.iter().map(|p| p.0).sum::<f64>() / n, logs.iter().map(|p| p.1).sum::<f64>() / n);
    let covariance: f64 = logs.iter().map(|p| (p.0 - mx) * (p.1 - my)).sum();
    let variance: f64 = logs.iter().map(|p| (p.0 - mx).powi(2)).sum();
    if variance > 0.0 { covariance / variance } else { 0.0 }
}

/// The width that a model starts from.
fn narrow(options: &Options, width: usize) -> Result<usize> {
    let Some(widen) = &options.widen else { return Ok(width) };
    match widen.times {
        0 | 1 => Err(Error::config("--widen", widen.times, "must be 2 or more")),
        times if width.is_multiple_of(times) => Ok(width / times),
        times => Err(Error::config("--widths", width, format!("is no multiple of {times} (--widen)"))),
    }
}

/// What makes the configuration that of one model to be checked.
fn sets(options: &Options, config: &Config, kind: Parametrization, width: usize, seed: u64) -> Result<Vec<String>> {
    let base = Sizes::at(config, narrow(options, options.widths[0])?)?;
    let mut sets = options.sets.clone();
    sets.extend(Sizes::at(config, narrow(options, width)?)?.model_sets());
    sets.extend(base.base_sets());
    let kind = if kind == Parametrization::Mup { "mup" } else { "standard" };
    sets.push(format!("parametrization.kind={kind}"));
    // The rate at its top from the first step on: a warmup would be over only when the check is.
    sets.extend([format!("seed={seed}"), "schedule.kind=constant".into(), "schedule.warmup=0".into()]);
    sets.extend([format!("steps={}", options.steps), "validation.every=0".into()]);
    Ok(sets)
}

/// The model to be checked: new, or widened from one that was trained for some steps.
fn prepare(options: &Options, config: &Config, width: usize, sets: &[String]) -> Result<Prepared> {
    let Some(widen) = &options.widen else { return run::prepare(&options.config, sets) };
    let text = |path: &Path| format!("run={}", toml::Value::String(path.display().to_string()));
    let base = [sets, &[format!("steps={}", widen.steps), text(&widen.folder)]].concat();
    run::train_file(&options.config, &base, true, Show::Quiet)?;
    let from = toml::Value::String(widen.folder.display().to_string());
    let mut wide = sets.to_vec();
    wide.extend(Sizes::at(config, width)?.model_sets());
    wide.extend([format!("init.from={from}"), format!("init.upscale.width={}", widen.times)]);
    wide.push(format!("init.upscale.noise={:?}", widen.noise));
    run::prepare(&options.config, &wide)
}

/// Trains a model for some steps and looks at it before the first and after each.
struct Probe {
    prepared: Prepared,
    steps: usize,
}

/// A layer's name, and for each step mean |x_t| and mean |x_t − x_0|.
type Layer = (String, Vec<(f64, f64)>);

impl Work for Probe {
    type Output = Vec<Layer>;

    fn on<B: Ops>(self, backend: B) -> Result<Vec<Layer>> {
        let Prepared { config, meaning, samples, origin, .. } = self.prepared;
        let mut trainer = Trainer::new(backend, Box::new(Solo), &config, &meaning, samples, Recompute::None)?;
        run::first_state(&mut trainer, origin, &config, &meaning)?;
        let mut observer = Observer::new(&trainer, micro_batch(&config, &meaning.spec), meaning.spec.classes())?;
        let mut layers: Vec<Layer> = Vec::new();
        let mut initial: Vec<Vec<f64>> = Vec::new();
        for step in 0..=self.steps {
            if step > 0 {
                trainer.step()?;
            }
            let mut at = 0;
            observer.look(&mut trainer, &mut |name, values| {
                if step == 0 {
                    layers.push((name.into(), Vec::new()));
                    initial.push(values.to_vec());
                }
                let n = values.len() as f64;
                let size = values.iter().map(|x| x.abs()).sum::<f64>() / n;
                let change = values.iter().zip(&initial[at]).map(|(x, y)| (x - y).abs()).sum::<f64>() / n;
                layers[at].1.push((size, change));
                at += 1;
            })?;
        }
        Ok(layers)
    }
}

/// Memory of its own for a forward pass over one batch, the same each time.
struct Observer<B: Ops> {
    acts: Acts<B>,
    logits: Tensor<B>,
    micro: MicroBatch,
    host: B::Host,
}

impl<B: Ops> Observer<B> {
    fn new(trainer: &Trainer<B>, micro: MicroBatch, classes: usize) -> Result<Self> {
        let (backend, network) = (&trainer.backend, &trainer.network);
        let mut plan = Plan::default();
        let acts = network.plan(backend, &mut plan, micro, Some(Recompute::None));
        let logits: Slot = plan.reserve("logits", backend.compute(), micro.rows() * classes);
        // More than the largest tensor, which is what is copied at a time.
        let host = backend.host(plan.bytes())?;
        let mut planned = plan.commit(backend)?;
        let logits = planned.take(logits);
        Ok(Self { acts: Acts::new(acts, &mut planned), logits, micro, host })
    }

    /// Shows the values of each layer for the first samples of the training data.
    fn look(&mut self, trainer: &mut Trainer<B>, seen: &mut dyn FnMut(&str, &[f64])) -> Result<()> {
        trainer.feed.train(&trainer.backend, [0])?;
        let (backend, host) = (&trainer.backend, &mut self.host);
        let mut show = |name: &str, view: Ref<'_, B>| {
            backend.download(Stream::Compute, view, host, 0);
            backend.synchronize(&backend.record(Stream::Compute))?;
            let mut values = vec![0.0f64; view.len()];
            let bytes = &host.bytes()[..view.len() * view.dtype().size()];
            crate::dtype::convert(bytes, view.dtype(), bytemuck::cast_slice_mut(&mut values), DType::F64);
            seen(name, &values);
            Ok(())
        };
        let (batch, weights) = (trainer.feed.batch(0), trainer.weights());
        trainer.network.observe(backend, weights, &mut self.acts, batch, self.micro, &mut self.logits, &mut show)
    }
}

#[cfg(test)]
mod tests {
    use super::slope;

    #[test]
    fn a_slope_is_the_exponent_of_width() {
        let power = |p: f64| [32.0, 64.0, 256.0].map(|x: f64| (x, 3.0 * x.powf(p)));
        assert!((slope(&power(0.5)) - 0.5).abs() < 1e-12);
        assert!((slope(&power(-1.0)) + 1.0).abs() < 1e-12);
        assert_eq!(slope(&[(1.0, 0.0), (2.0, 0.0)]), 0.0);
        assert_eq!(slope(&[(1.0, 1.0), (2.0, f64::NAN)]), f64::INFINITY);
    }
}
