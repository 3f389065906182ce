//! What a sweep's file says: which configuration, which axes, how they are searched.

use crate::{Error, Result, rng};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

/// A sweep's file (TOML).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SweepConfig {
    /// Folder of everything that the sweep writes.
    pub run: PathBuf,
    /// The configuration of every run.
    pub config: PathBuf,
    /// `--set` assignments on it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub set: Vec<String>,
    /// Runs at a time; 0: one for each GPU, or each `threads` cores.
    #[serde(default)]
    pub workers: usize,
    /// CPU threads of a run.
    #[serde(default = "one")]
    pub threads: usize,
    /// Values by key: a dotted key of the configuration, or `width`, `multiplicity`, `noise`, `seed` (see
    /// [`super::points`]).
    pub axes: BTreeMap<String, Values>,
    /// How the axes are searched.
    #[serde(default)]
    pub search: Search,
    /// Base models that the runs start from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<BaseConfig>,
}

fn one() -> usize {
    1
}

/// `[base]`: each run widens a base model, trained once for all runs that share it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BaseConfig {
    /// Its configuration.
    pub config: PathBuf,
    /// `--set` assignments on it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub set: Vec<String>,
    /// Axes that make another base, beside `width`, `optimizer.kind` and those under `model`, `parametrization`, `data`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub axes: Vec<String>,
}

/// `[search]`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum Search {
    /// All combinations.
    #[default]
    Grid,
    /// Combinations drawn at random; a range is drawn from evenly (in its logarithm for `log`).
    Random {
        /// How many.
        trials: usize,
        /// Seed of the draws.
        #[serde(default)]
        seed: u64,
    },
    /// Successive halving (arXiv 1502.07943): all combinations (or `trials` random ones) are trained for `steps`, the best
    /// 1/eta of them anew for eta times as many steps, and so on up to the configuration's steps.
    Halving {
        /// Steps of the first rung.
        steps: u64,
        /// Part that goes on, and growth of the steps.
        #[serde(default = "three")]
        eta: u64,
        /// Random combinations instead of all.
        #[serde(default)]
        trials: usize,
        /// Seed of the draws.
        #[serde(default)]
        seed: u64,
    },
}

fn three() -> u64 {
    3
}

/// Values of an axis.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Values {
    /// These.
    List(Vec<toml::Value>),
    /// A range.
    Range(Range),
}

/// A range of numbers: exactly one of `log` and `linear`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Range {
    /// Lowest and highest, evenly spread in their logarithm.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log: Option<[f64; 2]>,
    /// Lowest and highest, evenly spread.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub linear: Option<[f64; 2]>,
    /// Values of a grid.
    #[serde(default)]
    pub points: usize,
}

impl Range {
    /// The value at a part of the way, 0 to 1.
    fn at(&self, part: f64) -> toml::Value {
        let value = match (self.log, self.linear) {
            (Some([low, high]), _) => (low.ln() + part * (high / low).ln()).exp(),
            (_, Some([low, high])) => low + part * (high - low),
            _ => 0.0,
        };
        // Three digits tell runs apart and stay readable in their names.
        toml::Value::Float(format!("{value:.3e}").parse().unwrap_or(value))
    }

    fn check(&self, key: &str, grid: bool) -> Result<()> {
        let refuse = |why: &str| Err(Error::config(format!("axes.{key}"), format!("{self:?}"), why));
        match (self.log, self.linear) {
            (Some([low, high]), None) if low > 0.0 && high > low && high.is_finite() => {}
            (None, Some([low, high])) if high > low && (high - low).is_finite() => {}
            _ => {
                return refuse(
                    "must be { log = [low, high] } or { linear = [low, high] } with low < high (0 < low for log)",
                );
            }
        }
        if grid && self.points < 2 {
            return refuse("needs points = 2 or more for a grid");
        }
        Ok(())
    }
}

impl Values {
    /// All values, for a grid.
    pub fn all(&self) -> Vec<toml::Value> {
        match self {
            Self::List(values) => values.clone(),
            Self::Range(range) => {
                (0..range.points).map(|i| range.at(i as f64 / (range.points - 1).max(1) as f64)).collect()
            }
        }
    }

    /// The value for a uniform draw from 0 to 1.
    pub fn draw(&self, part: f64) -> toml::Value {
        match self {
            Self::List(values) => values[((part * values.len() as f64) as usize).min(values.len() - 1)].clone(),
            Self::Range(range) => range.at(part),
        }
    }
}

impl SweepConfig {
    /// Reads a sweep's file.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
        let config: Self = toml::from_str(&text).map_err(|e| Error::file(path, e.to_string()))?;
        config.check()?;
        Ok(config)
    }

    /// Refuses what cannot be searched.
    pub fn check(&self) -> Result<()> {
        let grid = match self.search {
            Search::Grid => true,
            Search::Random { .. } => false,
            Search::Halving { trials, .. } => trials == 0,
        };
        match self.search {
            Search::Random { trials: 0, .. } => return Err(Error::config("search.trials", 0, "must be 1 or more")),
            Search::Halving { eta, steps, .. } if eta < 2 || steps == 0 => {
                return Err(Error::config(
                    "search",
                    format!("eta {eta}, steps {steps}"),
                    "eta is at least 2, steps at least 1",
                ));
            }
            _ => {}
        }
        for (key, values) in &self.axes {
            match values {
                Values::List(list) if list.is_empty() => {
                    return Err(Error::config(
                        format!("axes.{key}"),
                        "[]",
                        "has no value: the sweep has no valid point",
                    ));
                }
                Values::List(_) => {}
                Values::Range(range) => range.check(key, grid)?,
            }
        }
        if self.axes.is_empty() {
            return Err(Error::config("axes", "{}", "has no key: the sweep has no valid point"));
        }
        if self.threads == 0 {
            return Err(Error::config("threads", 0, "must be 1 or more: CPU threads of one run"));
        }
        Ok(())
    }

    /// The combinations to try, as values by key: all, or as many random ones as asked for.
    pub fn combinations(&self) -> Vec<BTreeMap<String, toml::Value>> {
        let (trials, seed) = match self.search {
            Search::Grid => (0, 0),
            Search::Random { trials, seed } | Search::Halving { trials, seed, .. } => (trials, seed),
        };
        if trials == 0 {
            return self.axes.iter().fold(vec![BTreeMap::new()], |points, (key, values)| {
                let values = values.all();
                let with = |point: &BTreeMap<String, toml::Value>, value: &toml::Value| {
                    let mut point = point.clone();
                    point.insert(key.clone(), value.clone());
                    point
                };
                points.iter().flat_map(|point| values.iter().map(move |value| with(point, value))).collect()
            });
        }
        let draw = |trial: usize| {
            let value = |(key, values): (&String, &Values)| {
                let mut part = [0.0];
                rng::Stream::new(seed, key).uniform_fill(trial as u64, &mut part);
                (key.clone(), values.draw(f64::from(part[0])))
            };
            self.axes.iter().map(value).collect()
        };
        (0..trials).map(draw).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sweep(text: &str) -> Result<SweepConfig, String> {
        let config: SweepConfig = toml::from_str(text).map_err(|e| e.to_string())?;
        config.check().map(|()| config).map_err(|e| e.to_string())
    }

    const HEAD: &str = "run='s'\nconfig='c.toml'\n";

    #[test]
    fn a_grid_is_all_combinations_and_random_draws_stay_within() {
        let axes = "[axes]\nseed=[1,2]\n'optimizer.lr'={log=[1e-4,1e-2],points=3}\n";
        let points = sweep(&format!("{HEAD}{axes}")).unwrap().combinations();
        assert_eq!(points.len(), 6);
        let lrs: Vec<_> = points.iter().filter_map(|p| p["optimizer.lr"].as_float()).collect();
        assert!(lrs.iter().all(|lr| [1e-4, 1e-3, 1e-2].contains(lr)), "{lrs:?}");
        let random = format!("{HEAD}{axes}[search]\nkind='random'\ntrials=40\nseed=3\n");
        let points = sweep(&random).unwrap().combinations();
        assert_eq!(points.len(), 40);
        assert!(points.iter().all(|p| (1e-4..=1e-2).contains(&p["optimizer.lr"].as_float().unwrap())));
        assert_eq!(points, sweep(&random).unwrap().combinations());
        assert!(points.iter().any(|p| p["seed"].as_integer() == Some(1)));
        assert!(points.iter().any(|p| p["seed"].as_integer() == Some(2)));
    }

    #[test]
    fn what_has_no_point_is_refused() {
        for (text, said) in [
            ("[axes]\n", "no valid point"),
            ("[axes]\nseed=[]\n", "no valid point"),
            ("[axes]\n'optimizer.lr'={log=[0.0,1.0],points=3}\n", "0 < low"),
            ("[axes]\n'optimizer.lr'={log=[1e-3,1.0]}\n", "points"),
            ("[axes]\nseed=[1]\n[search]\nkind='halving'\nsteps=1\neta=1\n", "eta"),
        ] {
            let error = sweep(&format!("{HEAD}{text}")).unwrap_err();
            assert!(error.contains(said), "{error}");
        }
    }
}
