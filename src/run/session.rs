//! A run under way: steps, metrics, validation, checkpoints, signals.

mod traced;
mod tuning;

use super::{
    CONFIG_FILE, LOG_FILE, Prepared, TUNING_FILE,
    folder::{new_run_folder, refuse_run_around_source},
    prepare::Start,
    ranks::{Ranks, agree},
    samples::Sampler,
    saving::{self, Saved, Saver},
};
use crate::{
    DType, Error, Result,
    checkpoint::{CONFIG, STATE, Store, Writer},
    comm::environment::World,
    config::{Config, OnNan},
    data::dataset::TOKENIZER_FILE,
    machine::{self, size},
    model::{
        Network,
        decoder::{Generator, Recompute},
    },
    ops::Ops,
    report::{
        metrics::{MetricsLog, Record, StepRecord, ValidationRecord},
        progress::{Progress as Shown, Show},
    },
    state::{Meaning, Position, Progress},
    trainer::{self, Bad, StepResult, Trainer},
    upscale,
};
use std::{
    fs,
    io::Write,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

/// What a run ended with.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Outcome {
    /// The run folder.
    pub run: PathBuf,
    /// The last checkpoint.
    pub checkpoint: PathBuf,
    /// Steps done.
    pub steps: u64,
    /// Tokens (rows) trained on.
    pub tokens: u64,
    /// Training loss of the last step, nats.
    pub loss: f64,
    /// Last validation loss, nats; none without held-out data.
    pub validation_loss: Option<f64>,
    /// Seconds of training.
    pub seconds: f64,
    /// The rank that this is the outcome of; rank 0 shows it.
    #[serde(skip)]
    pub rank: usize,
}

/// Trains on a backend, as one of the ranks of a run, until the last step, a signal, or a loss that is not finite.
/// Rank 0 alone writes and prints.
pub fn train<B: Ops>(backend: B, ranks: Ranks, prepared: Prepared, force: bool, show: Show) -> Result<Outcome> {
    let Prepared { config, meaning, samples, origin, tokenizer } = prepared;
    let world = ranks.world.clone();
    let free = saving::host_memory(&world);
    let comm = ranks.comm(&backend)?;
    let recompute = agree(&*comm, choose_recompute(&backend, &config, &meaning, &world))?;
    let mut trainer = Trainer::new(backend, comm, &config, &meaning, samples, recompute)?;
    let resumes = origin.as_ref().is_some_and(|start| start.resumes);
    if resumes {
        tuning::take_over(&trainer.backend, &config.run)?;
    }
    let loaded = first_state(&mut trainer, origin, &config, &meaning);
    agree(&*trainer.comm, loaded)?;
    let sampler = match world.rank {
        0 => Sampler::new(&trainer, &config, &meaning, tokenizer.as_deref()),
        _ => Ok(None),
    };
    let sampler = agree(&*trainer.comm, sampler)?;
    let opened = match world.rank {
        0 => Files::open(&config, trainer.position, resumes, force, show).map(Some),
        _ => Ok(None),
    };
    let files = agree(&*trainer.comm, opened)?;
    let saver = Saver::new(&trainer, &config, &meaning, free)?;
    let clock = (trainer.position.seconds, Instant::now());
    let stop = machine::stop_flag()?;
    let mut session = Session {
        trainer,
        config,
        meaning,
        tokenizer,
        files,
        sampler,
        saver,
        stop,
        clock,
        saved: None,
        validated: None,
        loss: f64::NAN,
        begun: 0,
    };
    session.announce(&world);
    let outcome = session.run();
    if let Err(error) = &outcome {
        session.trainer.comm.leave(&format!("rank {} ended: {error}", world.rank));
        if world.world > 1 && matches!(error, Error::Fault(_)) {
            // A device that waits for a lost rank may let whoever frees its memory wait too; the process ends anyway.
            std::mem::forget(session);
        }
    }
    match outcome {
        // All ranks come to these together, and one says so.
        Err(error @ (Error::Interrupted { .. } | Error::NonFinite { .. })) if world.rank > 0 => {
            Err(Error::Elsewhere { code: error.exit_code() })
        }
        outcome => outcome,
    }
}

/// Gives the trainer its first state: new weights, or those of a checkpoint, perhaps widened.
pub fn first_state<B: Ops>(
    trainer: &mut Trainer<B>,
    start: Option<Start>,
    config: &Config,
    meaning: &Meaning,
) -> Result<()> {
    let Some(start) = start else {
        trainer.state.init(&trainer.backend, trainer.network.table(), &meaning.scaling, config.seed);
        return Ok(());
    };
    let (backend, growth, optimizer) = (&trainer.backend, start.growth.as_ref(), Some(&meaning.optimizer));
    upscale::load(backend, &start.origin, growth, &mut trainer.state, meaning, optimizer, start.moments)?;
    trainer.position = start.position;
    Ok(())
}

/// The cheapest way to save memory that fits.
fn choose_recompute<B: Ops>(backend: &B, config: &Config, meaning: &Meaning, world: &World) -> Result<Recompute> {
    let network = Network::new(backend, &meaning.spec, &meaning.scaling)?;
    let limit = match config.memory.limit {
        0 => backend.available()?,
        mebibytes => mebibytes << 20,
    };
    let writing = network.decoder().filter(|_| config.samples.every > 0).map_or(0, |d| Generator::memory(backend, d));
    let (limit, rank) = (limit.saturating_sub(writing), (world.rank, world.world));
    let need = |recompute, samples| trainer::memory(backend, &network, config, meaning, rank, samples, recompute);
    let candidates = config.memory.recompute.candidates();
    if let Some(&recompute) = candidates.iter().find(|&&r| need(r, config.batch.size) <= limit) {
        return Ok(recompute);
    }
    let thriftiest = candidates.last().copied().unwrap_or_default();
    let fits = (1..config.batch.size).rev().find(|&samples| need(thriftiest, samples) <= limit);
    let why = match fits {
        Some(samples) => format!(
            "does not fit: it needs {}, there are {}; the largest that fits is {samples} (raise batch.micro_batches in turn)",
            size(need(thriftiest, config.batch.size)),
            size(limit)
        ),
        None => format!(
            "does not fit at any size: one sample needs {}, there are {}; use a smaller model or set memory.limit (MiB)",
            size(need(thriftiest, 1)),
            size(limit)
        ),
    };
    Err(Error::config("batch.size", config.batch.size, why))
}

/// What a run writes and shows: rank 0's.
struct Files {
    metrics: MetricsLog,
    log: fs::File,
    progress: Shown,
}

impl Files {
    fn open(config: &Config, position: Position, resumes: bool, force: bool, show: Show) -> Result<Self> {
        let run = &config.run;
        if !resumes {
            if let Some(init) = &config.init {
                refuse_run_around_source(run, &init.from)?;
            }
            new_run_folder(run, force)?;
        }
        let store = Store::new(run);
        fs::create_dir_all(store.dir()).map_err(Error::io("create", store.dir()))?;
        store.clean()?;
        let config_file = run.join(CONFIG_FILE);
        fs::write(&config_file, config.to_toml()).map_err(Error::io("write", &config_file))?;
        let metrics = if resumes { MetricsLog::resume(run, position.step)? } else { MetricsLog::create(run)? };
        let log_file = run.join(LOG_FILE);
        let log =
            fs::File::options().create(true).append(true).open(&log_file).map_err(Error::io("write", &log_file))?;
        let label = run.file_name().map_or("run".into(), |n| n.to_string_lossy().into_owned());
        let progress = Shown::new(&label, config.steps, position.step, show);
        Ok(Self { metrics, log, progress })
    }

    fn say(&mut self, line: &str) {
        self.progress.line(line);
        // The log is a convenience: a disk that fills up shows at the next checkpoint, with a message.
        let _ = writeln!(self.log, "{line}");
    }
}

struct Session<B: Ops> {
    trainer: Trainer<B>,
    config: Config,
    meaning: Meaning,
    tokenizer: Option<Vec<u8>>,
    files: Option<Files>,
    sampler: Option<Sampler<B>>,
    saver: Saver<B>,
    stop: Arc<AtomicBool>,
    /// Seconds of training before this session, and when it began.
    clock: (f64, Instant),
    saved: Option<u64>,
    validated: Option<(u64, f64)>,
    loss: f64,
    /// Steps that this process has begun.
    begun: u64,
}

impl<B: Ops> Session<B> {
    /// Says what will be done, and the memory plan, before the first step.
    fn announce(&mut self, world: &World) {
        let table = self.trainer.network.table();
        let scaling = &self.meaning.scaling;
        let lines = [
            format!("{}: {} parameters; {}", self.meaning.spec.arch(), table.parameters(), table.dims),
            format!("{}; {:?} parametrisation, base {}", self.trainer.backend.describe(), scaling.kind, scaling.base),
            format!(
                "clipping at {} by the {:?} norm; recompute {}",
                self.config.optimizer.clip, self.config.optimizer.clip_norm, self.trainer.recompute
            ),
            self.types(),
            format!("memory:\n{}", self.trainer.plan),
        ];
        let sharding = self.trainer.sharding();
        if world.world > 1 {
            self.say(&world.to_string());
        }
        for line in lines.into_iter().chain(sharding).chain(self.saver.describe()) {
            self.say(&line);
        }
    }

    /// What gradients and moments are kept in.
    fn types(&self) -> String {
        let backend = &self.trainer.backend;
        let (gradient, sums, moment) = (backend.gradient(), backend.reduction(), backend.moment());
        let rounded = if moment == DType::BF16 { ", rounded stochastically" } else { "" };
        format!("gradients {gradient}, sums of them {sums}; moments {moment}{rounded}")
    }

    fn say(&mut self, line: &str) {
        if let Some(files) = &mut self.files {
            files.say(line);
        }
    }

    /// The checkpoint of a step.
    fn checkpoint(&self, step: u64) -> PathBuf {
        Store::new(&self.config.run).path(step)
    }

    fn seconds(&self) -> f64 {
        self.clock.0 + self.clock.1.elapsed().as_secs_f64()
    }

    fn run(&mut self) -> Result<Outcome> {
        while self.trainer.position.step < self.config.steps {
            self.begun += 1;
            self.trace()?;
            if let Some(result) = self.trainer.step()? {
                self.record(result)?;
            }
            self.choose_algorithms()?;
            let step = self.trainer.position.step;
            let (stop, saved) = self.saver.meet(&*self.trainer.comm, self.stop.load(Ordering::Relaxed))?;
            self.say_saved(saved);
            let due = |every: u64| every > 0 && step.is_multiple_of(every);
            if due(self.config.validation.every) {
                self.validate()?;
            }
            if due(self.config.samples.every) {
                self.sample()?;
            }
            if due(self.config.checkpoint.every) || stop {
                self.save()?;
            }
            // A signal during the last step finds nothing to interrupt.
            if stop && step < self.config.steps {
                self.end_trace()?;
                self.finish_saving()?;
                return Err(Error::Interrupted {
                    step,
                    checkpoint: self.checkpoint(step),
                    run: self.config.run.clone(),
                });
            }
        }
        self.end_trace()?;
        if self.config.validation.every > 0 {
            self.validate()?;
        }
        if self.config.samples.every > 0 {
            self.sample()?;
        }
        self.save()?;
        self.finish_saving()?;
        Ok(Outcome {
            rank: self.trainer.comm.rank(),
            checkpoint: self.checkpoint(self.trainer.position.step),
            steps: self.trainer.position.step,
            tokens: self.trainer.position.tokens,
            loss: self.loss,
            validation_loss: self.validated.map(|(_, loss)| loss),
            seconds: self.seconds(),
            run: self.config.run.clone(),
        })
    }

    /// Waits for all steps under way.
    fn flush(&mut self) -> Result<()> {
        while let Some(result) = self.trainer.collect()? {
            self.record(result)?;
        }
        Ok(())
    }

    /// Logs a step; stops the run at the first one that was not finite.
    fn record(&mut self, result: StepResult) -> Result<()> {
        let tokens = self.trainer.tokens_per_step() as f64;
        if let Some(bad) = result.bad {
            let tensor = match bad {
                Bad::Loss => "the loss".into(),
                Bad::Row(row) => format!("the gradient of {}", self.trainer.network.table().rows[row].name),
            };
            if self.config.on_nan == OnNan::Stop {
                return self.halt(result.step, result.position, tensor);
            }
            self.say(&format!("step {}: {tensor} is not finite; the update is left out (--on-nan skip)", result.step));
        }
        self.loss = result.loss;
        let seconds = self.seconds();
        let Some(files) = &mut self.files else { return Ok(()) };
        let record = StepRecord {
            step: result.step,
            tokens: result.position.tokens,
            loss: result.loss,
            lr: result.lr,
            grad_norm: result.grad_norm,
            update_norm: result.update_norm,
            tokens_per_second: tokens / result.seconds,
            seconds,
            memory: machine::resident_memory().unwrap_or(self.trainer.backend.allocated()) as u64,
        };
        files.progress.step(&record);
        files.metrics.append(&Record::Step(record))
    }

    /// Saves the weights as they were before a step that was not finite (the device changed nothing since).
    fn halt(&mut self, step: u64, position: Position, tensor: String) -> Result<()> {
        while self.trainer.collect()?.is_some() {}
        self.trainer.position = position;
        self.finish_saving()?;
        self.begin_saving()?;
        self.finish_saving()?;
        Err(Error::NonFinite { step, tensor, checkpoint: self.checkpoint(position.step) })
    }

    fn validate(&mut self) -> Result<()> {
        self.flush()?;
        let step = self.trainer.position.step;
        if self.validated.is_some_and(|(at, _)| at == step) {
            return Ok(());
        }
        let Some((loss, batches)) = self.trainer.validate(self.config.validation.batches)? else { return Ok(()) };
        let record = ValidationRecord {
            step,
            tokens: self.trainer.position.tokens,
            loss,
            batches: batches as u64,
            seconds: self.seconds(),
        };
        self.validated = Some((step, loss));
        let Some(files) = &mut self.files else { return Ok(()) };
        files.progress.validation(&record);
        files.metrics.append(&Record::Validation(record))
    }

    /// Lets the model write, on rank 0, while the others wait in their next sum.
    fn sample(&mut self) -> Result<()> {
        self.flush()?;
        self.trainer.gather()?;
        let seconds = self.seconds();
        let (Some(sampler), Some(files)) = (&mut self.sampler, &mut self.files) else { return Ok(()) };
        for sample in sampler.write(&self.trainer, seconds)? {
            files.say(&format!("step {} writes: {}{}", sample.step, sample.prompt, sample.text));
            files.metrics.append(&Record::Sample(sample))?;
        }
        Ok(())
    }

    /// Begins to save, unless this state is saved or being saved already.
    fn save(&mut self) -> Result<()> {
        self.flush()?;
        if self.saved == Some(self.trainer.position.step) {
            return Ok(());
        }
        let start = Instant::now();
        if self.finish_saving()? {
            let waited = start.elapsed().as_secs_f64();
            self.say(&format!("waited {waited:.2} s for that before the next one can begin (checkpoint.every)"));
        }
        self.begin_saving()
    }

    fn begin_saving(&mut self) -> Result<()> {
        self.trainer.position.seconds = self.seconds();
        let Self { saver, trainer, config, meaning, tokenizer, .. } = self;
        saver.begin(trainer, meaning, |writer| {
            write_documents(trainer, config, meaning, tokenizer.as_deref(), writer)
        })?;
        self.saved = Some(self.trainer.position.step);
        Ok(())
    }

    /// Waits for the save under way; returns whether there was one.
    fn finish_saving(&mut self) -> Result<bool> {
        let saved = self.saver.finish(&*self.trainer.comm)?;
        let some = saved.is_some();
        self.say_saved(saved);
        Ok(some)
    }

    fn say_saved(&mut self, saved: Option<Saved>) {
        let Some(Saved { step, pause, whole }) = saved else { return };
        let path = self.checkpoint(step);
        let (pause, whole) = (pause.as_secs_f64(), whole.as_secs_f64());
        self.say(&format!("saved {} in {whole:.2} s; training paused for {pause:.2} s", path.display()));
    }
}

/// What a checkpoint holds beside tensors.
fn write_documents<B: Ops>(
    trainer: &Trainer<B>,
    config: &Config,
    meaning: &Meaning,
    tokenizer: Option<&[u8]>,
    writer: &mut Writer,
) -> Result<()> {
    let progress = Progress {
        position: trainer.position,
        data: trainer.feed.samples.fingerprint(),
        config: Some(config.clone()),
        version: env!("CARGO_PKG_VERSION").into(),
    };
    if let Some(tuning) = trainer.backend.tuning() {
        let path = config.run.join(TUNING_FILE);
        fs::write(&path, tuning).map_err(Error::io("write", &path))?;
    }
    writer.json(CONFIG, meaning)?;
    writer.json(STATE, &progress)?;
    tokenizer.map_or(Ok(()), |tokenizer| writer.bytes(TOKENIZER_FILE, tokenizer))
}
