//! Sweeps: many ordinary runs over axes of hyperparameters, packed on the cores or GPUs at hand.
//!
//! ```text
//! SWEEP/sweep.toml        what was asked for
//! SWEEP/configs/NAME.toml the configuration of each run: `mupscale train -c` repeats it
//! SWEEP/bases/NAME/       base runs, trained once for all that share them
//! SWEEP/runs/NAME/        runs, each with its outcome.json
//! SWEEP/results.sqlite    all outcomes (see [`results`])
//! ```
//!
//! A run is a process, so that one that is killed takes no other along; it is started again where it stood. A sweep
//! that is started again goes on with what has not ended.

pub mod config;
pub mod optima;
pub mod points;
pub mod results;
mod workers;

use crate::{Error, Result, checkpoint::Store, report::human, run::Place};
use config::{Search, SweepConfig};
use points::{Base, Plan, Point, Values};
use results::{Outcome, Status};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File, TryLockError},
    path::{Path, PathBuf},
    time::Instant,
};
use workers::{Job, Pool};

/// One of n parts of a sweep, for queues: `--shard i/n`, i from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    /// Which part.
    pub index: usize,
    /// Of how many.
    pub of: usize,
}

impl std::str::FromStr for Shard {
    type Err = String;
    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let numbers = text.split_once('/').and_then(|(i, n)| Some((i.parse().ok()?, n.parse().ok()?)));
        match numbers {
            Some((index, of)) if index < of => Ok(Self { index, of }),
            _ => Err("must be i/n with i from 0 to n − 1, for example 0/4".into()),
        }
    }
}

/// How a sweep is run.
pub struct Runner<'a> {
    /// The program that trains: this one.
    pub program: PathBuf,
    /// Told what happens.
    pub say: &'a mut dyn FnMut(&str),
}

/// Runs what of a sweep has not ended yet. Returns the outcomes of the last rung's runs that this part has.
///
/// # Errors
/// A sweep without a valid point, another process at work in its folder, a signal ([`Error::Elsewhere`] with 75).
/// Runs that diverge or fail are outcomes, not errors.
pub fn run(sweep: &SweepConfig, shard: Option<Shard>, runner: &mut Runner<'_>) -> Result<Vec<Outcome>> {
    if let (Some(_), Search::Halving { .. }) = (shard, &sweep.search) {
        let why = "compares all runs of a rung: run it as one sweep, or search a grid or at random";
        return Err(Error::config("--shard", "with search.kind = \"halving\"", why));
    }
    fs::create_dir_all(&sweep.run).map_err(Error::io("create", &sweep.run))?;
    let _lock = lock(&sweep.run, shard)?;
    let text = toml::to_string_pretty(sweep).map_err(|e| Error::Usage(format!("no TOML: {e}")))?;
    write(&sweep.run.join("sweep.toml"), &text)?;
    let mut combinations = sweep.combinations();
    let full = points::plan(sweep, &combinations, None)?;
    let steps = full.points.first().map_or(0, |point| point.config.steps);
    let rungs = points::rungs(&sweep.search, steps);
    let mut outcomes = Vec::new();
    for (i, &rung) in rungs.iter().enumerate() {
        let plan = match rungs.len() {
            1 => points::plan(sweep, &combinations, None)?,
            _ => points::plan(sweep, &combinations, Some(rung))?,
        };
        if rungs.len() > 1 {
            (runner.say)(&format!("rung {} of {}: {} runs of {rung} steps", i + 1, rungs.len(), plan.points.len()));
        }
        outcomes = run_plan(sweep, plan, shard, runner)?;
        if let Search::Halving { eta, .. } = sweep.search {
            combinations = best(&outcomes, outcomes.len().div_ceil(eta as usize));
        }
    }
    let database = results::write_database(&sweep.run)?;
    (runner.say)(&format!("results: {}", database.display()));
    Ok(outcomes)
}

/// Values of the best outcomes.
fn best(outcomes: &[Outcome], count: usize) -> Vec<Values> {
    let mut scored: Vec<_> = outcomes.iter().filter_map(|o| Some((o.score()?, o))).collect();
    scored.sort_by(|a, b| a.0.total_cmp(&b.0));
    scored.into_iter().take(count.max(1)).map(|(_, outcome)| outcome.values.clone()).collect()
}

/// Holds the sweep's folder, or a shard's part of it, for this process.
fn lock(folder: &Path, shard: Option<Shard>) -> Result<File> {
    let name = shard.map_or("lock".into(), |s| format!("lock-{}-of-{}", s.index, s.of));
    let path = folder.join(name);
    let file = File::create(&path).map_err(Error::io("create", &path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => {
            let why = "another sweep is still at work here: wait for it, or end it";
            Err(Error::file(folder, why))
        }
        Err(TryLockError::Error(e)) => Err(Error::io("lock", &path)(e)),
    }
}

fn write(path: &Path, text: &str) -> Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
    }
    fs::write(path, text).map_err(Error::io("write", path))
}

fn run_plan(sweep: &SweepConfig, plan: Plan, shard: Option<Shard>, runner: &mut Runner<'_>) -> Result<Vec<Outcome>> {
    let mine = |(i, point): (usize, Point)| shard.is_none_or(|s| i % s.of == s.index).then_some(point);
    let points: Vec<Point> = plan.points.into_iter().enumerate().filter_map(mine).collect();
    let ended = |point: &Point| Outcome::read(&sweep.run, &point.name).filter(|o| o.status != Status::Failed);
    let (done, todo): (Vec<&Point>, Vec<&Point>) = points.iter().partition(|point| ended(point).is_some());
    if !done.is_empty() {
        (runner.say)(&format!("{} of {} runs have ended before", done.len(), points.len()));
    }
    let pool = Pool { program: runner.program.clone(), workers: workers(sweep, &points)? };
    let broken = train_bases(sweep, &plan.bases, &todo, &pool, runner)?;
    train_points(sweep, &todo, &broken, &pool, runner)?;
    Ok(points.iter().filter_map(|point| Outcome::read(&sweep.run, &point.name)).collect())
}

/// Which devices the runs get: for each worker its GPU, or none for cores.
fn workers(sweep: &SweepConfig, points: &[Point]) -> Result<Vec<Option<u32>>> {
    let Some(first) = points.first() else { return Ok(vec![None]) };
    let place = Place { device: first.config.device, precision: first.config.precision, ..Place::default() };
    if place.on_gpu()? {
        let gpus = crate::backend::cuda::driver::devices()?;
        let count = if sweep.workers == 0 { gpus } else { sweep.workers as u32 };
        return Ok((0..count.max(1)).map(|i| Some(i % gpus.max(1))).collect());
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let count = if sweep.workers == 0 { (cores / sweep.threads).max(1) } else { sweep.workers };
    Ok(vec![None; count])
}

/// Trains the bases that these points need. Returns why some could not be.
fn train_bases(
    sweep: &SweepConfig,
    all: &BTreeMap<String, Base>,
    todo: &[&Point],
    pool: &Pool,
    runner: &mut Runner<'_>,
) -> Result<BTreeMap<String, String>> {
    let needed: BTreeSet<&String> = todo.iter().filter_map(|point| point.base.as_ref()).collect();
    let mut jobs = Vec::new();
    for name in needed {
        let config = sweep.run.join("configs").join("bases").join(format!("{name}.toml"));
        write(&config, &all[name].text)?;
        jobs.push(Job { name: name.clone(), config, folder: points::bases(&sweep.run).join(name) });
    }
    let mut broken = BTreeMap::new();
    let count = jobs.len();
    let mut trained = 0;
    pool.run(jobs, &mut |name, code, message| {
        trained += 1;
        if code == Some(0) && Store::new(points::bases(&sweep.run).join(name)).newest()?.is_some() {
            (runner.say)(&format!("base {trained} of {count}: {name}"));
        } else {
            (runner.say)(&format!("base {trained} of {count}: {name} failed: {message}"));
            broken.insert(name.to_string(), message.to_string());
        }
        Ok(())
    })?;
    Ok(broken)
}

fn train_points(
    sweep: &SweepConfig,
    todo: &[&Point],
    broken: &BTreeMap<String, String>,
    pool: &Pool,
    runner: &mut Runner<'_>,
) -> Result<()> {
    let mut jobs = Vec::new();
    let mut progress = Progress::new(todo);
    for point in todo {
        if let Some(why) = point.base.as_ref().and_then(|base| broken.get(base)) {
            let outcome = Outcome::of(&sweep.run, point, None, &format!("its base failed: {why}"));
            outcome.write(&sweep.run)?;
            (runner.say)(&progress.line(point, &outcome));
            continue;
        }
        let config = sweep.run.join("configs").join(format!("{}.toml", point.name));
        write(&config, &point.text)?;
        jobs.push(Job { name: point.name.clone(), config, folder: points::runs(&sweep.run).join(&point.name) });
    }
    let by_name: BTreeMap<&str, &Point> = todo.iter().map(|point| (point.name.as_str(), *point)).collect();
    pool.run(jobs, &mut |name, code, message| {
        let point = by_name[name];
        let outcome = Outcome::of(&sweep.run, point, code, message);
        outcome.write(&sweep.run)?;
        (runner.say)(&progress.line(point, &outcome));
        Ok(())
    })
}

/// Runs done, and the time that the rest will take.
struct Progress {
    begun: Instant,
    runs: (usize, usize),
    /// Work done and in all, in steps × width²: what a run's time goes with.
    work: (f64, f64),
}

impl Progress {
    fn new(todo: &[&Point]) -> Self {
        let work = todo.iter().map(|point| work(point)).sum();
        Self { begun: Instant::now(), runs: (0, todo.len()), work: (0.0, work) }
    }

    fn line(&mut self, point: &Point, outcome: &Outcome) -> String {
        self.runs.0 += 1;
        self.work.0 += work(point);
        let left = self.begun.elapsed().as_secs_f64() * (self.work.1 - self.work.0) / self.work.0;
        let ended = match (outcome.status, outcome.score(), &outcome.message) {
            (Status::Done, Some(score), _) => format!("loss {score:.4}"),
            (Status::Failed, _, message) => format!("failed: {}", message.as_deref().unwrap_or("no message")),
            _ => "diverged".into(),
        };
        let left = if self.runs.0 < self.runs.1 { format!(", {} left", human::seconds(left)) } else { String::new() };
        format!("{}/{}{left}: {}: {ended}", self.runs.0, self.runs.1, point.name)
    }
}

fn work(point: &Point) -> f64 {
    let width = point.values.get("width").and_then(toml::Value::as_integer).unwrap_or(1) as f64;
    point.config.steps as f64 * width * width
}
