//! GB/s of widening a checkpoint into memory, by the path that `train` and `upscale` take.

use super::{Folder, median, preset::meaning};
use crate::{
    Error, Result,
    backend::Stream,
    checkpoint::{CONFIG, STATE, Writer},
    config::{Moments, NoiseKind, UpscaleConfig},
    machine,
    model::{self, plan::Plan},
    mup::Parametrization,
    ops::{Ops, expand::Noise},
    rng,
    run::{Place, Work},
    state::{Meaning, Moment, Position, Progress, State},
    upscale::{self, Growth, Origin},
};
use std::{
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    thread,
    time::{Duration, Instant},
};

/// What to measure.
#[derive(Clone, Debug)]
pub struct UpscaleBench {
    /// Residual width of the narrow GPT-2; heads of 64.
    pub width: usize,
    /// Its blocks.
    pub layers: usize,
    /// Its vocabulary.
    pub vocab: usize,
    /// Factor on residual, ffn and kv_heads.
    pub times: usize,
    /// σ of the noise.
    pub noise: f64,
    /// Folder in which the narrow checkpoint is made, and removed at the end.
    pub folder: PathBuf,
}

/// What was measured. GB are 10⁹ bytes of wide weights and both moments, 12 a parameter (14 where weights
/// have a bf16 copy).
#[derive(Clone, Debug, serde::Serialize)]
pub struct UpscaleSpeed {
    /// Parameters of the narrow model.
    pub parameters: usize,
    /// Parameters of the wide model.
    pub wide_parameters: usize,
    /// σ of the noise.
    pub noise: f64,
    /// Seconds to open the narrow checkpoint, every checksum verified.
    pub open_seconds: f64,
    /// Seconds of the first widening, into pages that the system has not yet given.
    pub first_touch_seconds: f64,
    /// Median seconds of three more, into the same memory.
    pub seconds: f64,
    /// Wide bytes over the median.
    pub gb_per_second: f64,
    /// Wide bytes over the fastest.
    pub gb_per_second_best: f64,
    /// Speed at which this machine's threads fill the same memory with one value, past the caches: the limit.
    pub fill_gb_per_second: f64,
    /// Most memory that lay in no file, in wide bytes; the wide state itself is 1.
    pub anonymous_over_wide: Option<f64>,
}

/// Makes a narrow checkpoint, widens it four times into the same memory, and removes it.
pub fn upscale(place: Place, bench: &UpscaleBench) -> Result<UpscaleSpeed> {
    place.run(bench)
}

impl Work for &UpscaleBench {
    type Output = UpscaleSpeed;

    fn on<B: Ops>(self, backend: B) -> Result<UpscaleSpeed> {
        measure(&backend, self)
    }
}

fn measure<B: Ops>(backend: &B, bench: &UpscaleBench) -> Result<UpscaleSpeed> {
    let folder = Folder::new(&bench.folder)?;
    narrow(backend, bench, &folder.0)?;

    let before = machine::anonymous_memory().unwrap_or(0);
    let start = Instant::now();
    let origin = Origin::open(&folder.0)?;
    let open_seconds = start.elapsed().as_secs_f64();
    let config = UpscaleConfig {
        width: Some(bench.times),
        noise: bench.noise,
        noise_kind: NoiseKind::Independent,
        ..UpscaleConfig::default()
    };
    let growth = Growth::new(&origin.meaning, &config)?;
    let wide = upscale::meaning(&origin.meaning, Some(&growth))?;
    let table = model::table(&wide.spec, &wide.scaling);
    let mut state = new_state(backend, &wide)?;
    let mut load = || -> Result<f64> {
        let start = Instant::now();
        let optimizer = Some(&wide.optimizer);
        upscale::load(backend, &origin, Some(&growth), &mut state, &wide, optimizer, Moments::Keep)?;
        backend.synchronize(&backend.record(Stream::Compute))?;
        Ok(start.elapsed().as_secs_f64())
    };
    let (times, most) = with_peak(|| (0..4).map(|_| load()).collect::<Result<Vec<f64>>>());
    let times = times?;
    let copy = if backend.master().is_some() { backend.compute().size() } else { 0 };
    let bytes = ((12 + copy) * table.parameters()) as f64;
    let (first, rest) = (times[0], times[1..].to_vec());
    let best = rest.iter().copied().fold(f64::INFINITY, f64::min);
    let seconds = median(rest);
    Ok(UpscaleSpeed {
        parameters: model::table(&origin.meaning.spec, &origin.meaning.scaling).parameters(),
        wide_parameters: table.parameters(),
        noise: bench.noise,
        open_seconds,
        first_touch_seconds: first,
        seconds,
        gb_per_second: bytes / seconds / 1e9,
        gb_per_second_best: bytes / best / 1e9,
        fill_gb_per_second: fill(backend, &mut state)? / 1e9,
        anonymous_over_wide: most.map(|most| most.saturating_sub(before) as f64 / bytes),
    })
}

/// Weights and both moments, zero.
fn new_state<B: Ops>(backend: &B, meaning: &Meaning) -> Result<State<B>> {
    let mut plan = Plan::default();
    let table = model::table(&meaning.spec, &meaning.scaling);
    let slots = State::plan(backend, &mut plan, &table, Some(&meaning.optimizer));
    Ok(State::new(slots, &mut plan.commit(backend)?))
}

/// Writes a GPT-2 with random weights and moments.
fn narrow<B: Ops>(backend: &B, bench: &UpscaleBench, dir: &Path) -> Result<()> {
    const HEAD: usize = 64;
    if bench.width == 0 || !bench.width.is_multiple_of(HEAD) {
        return Err(Error::config("--width", bench.width, format!("must be a multiple of {HEAD}, the size of a head")));
    }
    let text = format!(
        "run = 'bench'\nsteps = 1\n[data]\npath = 'bench'\n[model]\narch = 'gpt2'\nlayers = {}\nresidual = {}\n\
         kv_heads = {}\ncontext = 1024\n",
        bench.layers,
        bench.width,
        bench.width / HEAD
    );
    let (_, meaning) = meaning(&text, bench.vocab, Parametrization::Mup)?;
    let table = model::table(&meaning.spec, &meaning.scaling);
    let mut state = new_state(backend, &meaning)?;
    state.init(backend, &table, &meaning.scaling, 1);
    for moment in [Moment::First, Moment::Second] {
        let Some(arena) = state.moment_mut(moment) else { continue };
        let noise = Noise { stream: rng::Stream::new(1, &moment.name("")), amount: 1e-4, paired: None };
        backend.fill(arena.view_mut(), 0, 1e-3, Some(&noise));
    }
    let mut writer = Writer::create(dir, true)?;
    writer.json(CONFIG, &meaning)?;
    let position = Position { step: 1, time: 1, ..Position::default() };
    let version = env!("CARGO_PKG_VERSION").into();
    writer.json(STATE, &Progress { position, data: 0, config: None, version })?;
    state.save(backend, &table, Some(&meaning.optimizer), &mut writer)?;
    writer.commit()
}

/// Runs `work` while another thread watches this process's memory; the most that lay in no file.
fn with_peak<R>(work: impl FnOnce() -> R) -> (R, Option<usize>) {
    let (done, most) = (AtomicBool::new(false), AtomicUsize::new(0));
    let look = || machine::anonymous_memory().map(|now| most.fetch_max(now, Ordering::Relaxed));
    let result = thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                look();
                thread::sleep(Duration::from_millis(10));
            }
        });
        let result = work();
        done.store(true, Ordering::Relaxed);
        result
    });
    look();
    (result, Some(most.into_inner()).filter(|&most| most > 0))
}

/// Bytes a second at which the weights' memory is filled with one value; the best of three.
fn fill<B: Ops>(backend: &B, state: &mut State<B>) -> Result<f64> {
    let weights = state.master.as_mut().unwrap_or(&mut state.weights);
    let bytes = weights.len() * weights.dtype().size();
    let mut best = f64::INFINITY;
    for _ in 0..3 {
        let start = Instant::now();
        backend.fill(weights.view_mut(), 0, 1.0, None);
        backend.synchronize(&backend.record(Stream::Compute))?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(bytes as f64 / best)
}
