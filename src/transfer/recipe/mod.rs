//! The whole recipe: hyperparameters tuned on a small upscale, used unchanged on a large one, and what that cost.
//!
//! ```text
//! RUN/small/      a sweep over the tuned axes at the small width
//! RUN/large/      the large upscale with what was chosen, for each seed
//! RUN/mup/        the evidence: a line along one axis at every width
//! RUN/standard/   the same in standard parametrisation
//! RUN/transfer.{json,svg}
//! ```
//!
//! Each part is an ordinary sweep, so that a stop loses nothing: the same command goes on.

mod report;

pub use report::{PICTURE, REPORT, Report, Verdict};

use super::{
    fit::{self, Measured, Optimum},
    sweep::{
        self, Runner,
        config::{BaseConfig, Search, SweepConfig, Values},
        optima, points,
        results::{Outcome, Status},
    },
    widths::Sizes,
};
use crate::{Error, Result, config::ConfigText, mup::Parametrization};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

/// Where SLURM's job for the large upscale is written, in the plan's folder.
const JOB: &str = "large.sbatch";

/// `plan.toml`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TransferPlan {
    /// Folder of everything that is written.
    pub run: PathBuf,
    /// The configuration of every upscale, small and large.
    pub config: PathBuf,
    /// `--set` assignments on it.
    #[serde(default)]
    pub set: Vec<String>,
    /// Runs at a time; 0: as many as there are GPUs, or `threads` cores for each.
    #[serde(default)]
    pub workers: usize,
    /// CPU threads of a run.
    #[serde(default = "one")]
    pub threads: usize,
    /// The models that are widened.
    pub base: BaseConfig,
    /// How wide they are.
    pub sizes: SizesConfig,
    /// What is tuned, as a sweep's axes: a grid.
    pub tune: BTreeMap<String, Values>,
    /// Seeds of every point, for the uncertainty of the optimum.
    pub seeds: Vec<i64>,
    /// The optimum at several widths.
    #[serde(default)]
    pub evidence: Option<Evidence>,
    /// How the large upscale is run.
    #[serde(default)]
    pub large: Large,
}

fn one() -> usize {
    1
}

/// `[sizes]`: widths of the base models.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SizesConfig {
    /// Where the hyperparameters are tuned; the base shape of all.
    pub small: usize,
    /// Where they are used: a multiple of it.
    pub large: usize,
    /// How many times wider the upscales are.
    pub multiplicity: usize,
}

/// `[evidence]`: how the optimum moves with width.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Evidence {
    /// One of the tuned axes; the others keep what was chosen.
    pub axis: String,
    /// Widths of the bases; with `sizes.large` among them, what transfer lost is said.
    pub widths: Vec<usize>,
    /// The same in standard parametrisation, bases and all.
    #[serde(default = "yes")]
    pub standard: bool,
}

fn yes() -> bool {
    true
}

/// `[large]`.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Large {
    /// Write the job for a queue instead of training here; the same command reports when it has run.
    #[serde(default)]
    pub job: bool,
}

/// What was chosen for an axis.
#[derive(Clone, Debug, Serialize)]
pub struct Chosen {
    /// The axis.
    pub axis: String,
    /// The value that the large upscale gets: the optimum to three digits.
    pub value: f64,
    /// The optimum, and how sure it is.
    pub optimum: Optimum,
}

/// What there is when the recipe has run.
pub enum Done {
    /// Everything.
    Report(Box<Report>),
    /// The large upscale is for a queue: submit this.
    Job(PathBuf),
}

impl TransferPlan {
    /// Reads a plan.
    ///
    /// # Errors
    /// Unknown keys; nothing to tune; axes that the recipe sets itself; widths that do not fit together.
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).map_err(Error::io("read", path))?;
        let plan: Self = toml::from_str(&text).map_err(|e| Error::file(path, e.to_string()))?;
        plan.check()?;
        Ok(plan)
    }

    fn check(&self) -> Result<()> {
        let SizesConfig { small, large, .. } = self.sizes;
        if small == 0 || large < small || !large.is_multiple_of(small) {
            return Err(Error::config("sizes.large", large, format!("must be a multiple of sizes.small = {small}")));
        }
        if self.seeds.is_empty() {
            return Err(Error::config("seeds", "[]", "at least one; three or more to know how sure an optimum is"));
        }
        if let Some(key) = ["seed", "width", "multiplicity"].into_iter().find(|key| self.tune.contains_key(*key)) {
            return Err(Error::config(format!("tune.{key}"), "set", "the recipe sets it: see sizes and seeds"));
        }
        if let Some(Evidence { axis, .. }) = &self.evidence
            && !self.tune.contains_key(axis)
        {
            return Err(Error::config("evidence.axis", axis, "must be one of the axes under tune"));
        }
        let numbers = |values: &Values| values.all().iter().all(|value| optima::number(value).is_some());
        match self.tune.iter().find(|(_, values)| !numbers(values)) {
            Some((key, _)) => Err(Error::config(format!("tune.{key}"), "text", "only numbers have an optimum")),
            None => self.sweep("small", Parametrization::Mup, self.tune.clone(), &[small])?.check(),
        }
    }

    /// Runs what has not run yet.
    ///
    /// # Errors
    /// Those of [`sweep::run`]; runs that failed; an axis on which every run diverged.
    pub fn run(&self, runner: &mut Runner<'_>) -> Result<Done> {
        let SizesConfig { small, large, .. } = self.sizes;
        let tuning = self.part("small", Parametrization::Mup, self.tune.clone(), &[small], runner)?;
        let chosen = self.choose(&tuning)?;
        for Chosen { axis, value, .. } in &chosen {
            (runner.say)(&format!("chosen at width {small}: {axis} = {value}"));
        }
        let fixed = |skip: Option<&str>| -> BTreeMap<String, Values> {
            let others = chosen.iter().filter(|chosen| Some(chosen.axis.as_str()) != skip);
            others.map(|c| (c.axis.clone(), Values::List(vec![c.value.into()]))).collect()
        };
        let used = self.sweep("large", Parametrization::Mup, fixed(None), &[large])?;
        if self.large.job && !self.ended(&used)? {
            return Ok(Done::Job(self.write_job(&used)?));
        }
        let mut parts = report::Parts { tuning, large: self.runs(&used, runner)?, lines: BTreeMap::new() };
        if let Some(Evidence { axis, widths, standard }) = &self.evidence {
            let mut axes = fixed(Some(axis));
            axes.insert(axis.clone(), self.tune[axis].clone());
            let kinds = [(true, "mup", Parametrization::Mup), (*standard, "standard", Parametrization::Standard)];
            for (_, name, kind) in kinds.into_iter().filter(|(wanted, ..)| *wanted) {
                parts.lines.insert(name.into(), self.part(name, kind, axes.clone(), widths, runner)?);
            }
        }
        Ok(Done::Report(Box::new(Report::new(self, chosen, &parts)?)))
    }

    /// A part of the recipe as a sweep.
    fn sweep(
        &self,
        name: &str,
        kind: Parametrization,
        mut axes: BTreeMap<String, Values>,
        widths: &[usize],
    ) -> Result<SweepConfig> {
        let integers = |values: &[i64]| Values::List(values.iter().map(|&value| value.into()).collect());
        axes.insert("width".into(), integers(&widths.iter().map(|&width| width as i64).collect::<Vec<_>>()));
        axes.insert("multiplicity".into(), integers(&[self.sizes.multiplicity as i64]));
        axes.insert("seed".into(), integers(&self.seeds));
        let mut base = self.base.clone();
        match kind {
            Parametrization::Standard => base.set.push("parametrization.kind=\"standard\"".into()),
            Parametrization::Mup => {
                // One base shape for all parts, whatever widths they have.
                let config = ConfigText::read(&base.config, &base.set)?.resolve()?;
                base.set.extend(Sizes::at(&config, self.sizes.small)?.base_sets());
            }
        }
        Ok(SweepConfig {
            run: self.run.join(name),
            config: self.config.clone(),
            set: self.set.clone(),
            workers: self.workers,
            threads: self.threads,
            axes,
            search: Search::Grid,
            base: Some(base),
        })
    }

    fn part(
        &self,
        name: &str,
        kind: Parametrization,
        axes: BTreeMap<String, Values>,
        widths: &[usize],
        runner: &mut Runner<'_>,
    ) -> Result<Vec<Outcome>> {
        self.runs(&self.sweep(name, kind, axes, widths)?, runner)
    }

    fn runs(&self, sweep: &SweepConfig, runner: &mut Runner<'_>) -> Result<Vec<Outcome>> {
        (runner.say)(&format!("\n{}", sweep.run.display()));
        let outcomes = sweep::run(sweep, None, runner)?;
        match outcomes.iter().find(|outcome| outcome.status == Status::Failed) {
            None => Ok(outcomes),
            Some(Outcome { name, message, .. }) => {
                let message = message.as_deref().unwrap_or("no message");
                Err(Error::Failed(format!("{name} failed: {message}; the same command tries it again")))
            }
        }
    }

    fn choose(&self, outcomes: &[Outcome]) -> Result<Vec<Chosen>> {
        let measured = |outcome: &Outcome| {
            let at = self.tune.keys().filter_map(|key| optima::number(outcome.values.get(key)?)).collect();
            let seed = outcome.values.get("seed").and_then(toml::Value::as_integer).unwrap_or(0);
            Measured { at, seed, loss: outcome.score() }
        };
        let all = fit::optima(&outcomes.iter().map(measured).collect::<Vec<_>>());
        let all = all.ok_or_else(|| {
            Error::Failed(format!("every run at width {} diverged: tune at lower values", self.sizes.small))
        })?;
        let chosen = |(axis, optimum): (&String, Optimum)| {
            let value = format!("{:.2e}", optimum.x).parse().unwrap_or(optimum.x);
            Chosen { axis: axis.clone(), value, optimum }
        };
        Ok(self.tune.keys().zip(all).map(chosen).collect())
    }

    /// Whether the queue has run all of a sweep. Notes the outcomes, as the processes were not ours.
    fn ended(&self, sweep: &SweepConfig) -> Result<bool> {
        let mut all = true;
        for point in points::plan(sweep, &sweep.combinations(), None)?.points {
            let outcome = Outcome::of(&sweep.run, &point, Some(0), "");
            let done = outcome.steps == point.config.steps;
            all &= done;
            if done {
                outcome.write(&sweep.run)?;
            }
        }
        Ok(all)
    }

    /// Writes the configurations of the large upscale and the job that trains them.
    fn write_job(&self, sweep: &SweepConfig) -> Result<PathBuf> {
        let plan = points::plan(sweep, &sweep.combinations(), None)?;
        let folder = sweep.run.join("configs");
        fs::create_dir_all(&folder).map_err(Error::io("create", &folder))?;
        let mut configs = Vec::new();
        let named = plan.bases.values().map(|base| (&base.name, &base.text));
        for (name, text) in named.chain(plan.points.iter().map(|point| (&point.name, &point.text))) {
            let path = folder.join(format!("{name}.toml"));
            fs::write(&path, text).map_err(Error::io("write", &path))?;
            configs.push(format!("  '{}'", path.display()));
        }
        let path = self.run.join(JOB);
        fs::write(&path, job(&configs.join("\n"))).map_err(Error::io("write", &path))?;
        Ok(path)
    }
}

/// A job for SLURM: one node, all its GPUs, one run after another, each going on where it stood.
fn job(configs: &str) -> String {
    format!(
        r#"#!/usr/bin/env bash
# The large upscale: its base, then the upscale for each seed. Change what your cluster needs; more nodes:
# tools/cluster/slurm-nodes.sbatch.
#SBATCH --job-name=mupscale-large
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
set -euo pipefail
configs=(
{configs}
)
for config in "${{configs[@]}}"; do
  srun --kill-on-bad-exit=0 mupscale-launch --standalone --nproc-per-node gpu --max-restarts 3 \
    mupscale train -c "$config" --resume auto
done
"#
    )
}
