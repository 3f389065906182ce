//! What a sweep found: for each axis of numbers the best value, for each combination of the other axes, over seeds.

use super::{
    super::fit::{self, Measured, Optimum},
    points::Values,
    results::{Outcome, Status},
};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};

/// Axes that tell runs apart, and are not tuned.
const NOT_TUNED: [&str; 3] = ["seed", "width", "multiplicity"];
/// Values that an axis must have for an optimum to be looked for.
const FEWEST: usize = 3;

/// An optimum.
#[derive(Clone, Debug, Serialize)]
pub struct Found {
    /// The axis.
    pub axis: String,
    /// Values of the others, seeds left out.
    pub at: Values,
    /// Where the loss is least; none if every run diverged.
    pub optimum: Option<Optimum>,
}

/// The optima of every axis with at least three values.
pub fn optima(outcomes: &[Outcome]) -> Vec<Found> {
    let keys: BTreeSet<&String> = outcomes.iter().flat_map(|o| o.values.keys()).collect();
    let tuned = keys.into_iter().filter(|key| !NOT_TUNED.contains(&key.as_str()));
    tuned.flat_map(|axis| along(outcomes, axis)).collect()
}

fn along(outcomes: &[Outcome], axis: &str) -> Vec<Found> {
    let mut lines: BTreeMap<String, (Values, Vec<Measured>)> = BTreeMap::new();
    for outcome in outcomes.iter().filter(|o| o.status != Status::Failed) {
        let Some(x) = outcome.values.get(axis).and_then(number) else { continue };
        let mut at = outcome.values.clone();
        at.remove(axis);
        let seed = at.remove("seed").and_then(|seed| seed.as_integer()).unwrap_or(0);
        let run = Measured { at: vec![x], seed, loss: outcome.score() };
        lines.entry(format!("{at:?}")).or_insert_with(|| (at, Vec::new())).1.push(run);
    }
    let enough =
        |runs: &[Measured]| runs.iter().map(|run| run.at[0].to_bits()).collect::<BTreeSet<_>>().len() >= FEWEST;
    let lines = lines.into_values().filter(|(_, runs)| enough(runs));
    let first = |runs: &[Measured]| fit::optima(runs).map(|mut axes| axes.remove(0));
    lines.map(|(at, runs)| Found { axis: axis.into(), at, optimum: first(&runs) }).collect()
}

/// The number that a value is.
pub fn number(value: &toml::Value) -> Option<f64> {
    value.as_float().or_else(|| value.as_integer().map(|n| n as f64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_width_has_its_optimum_over_seeds() {
        let outcome = |width: i64, lr: f64, seed: i64, best: f64| {
            let values = format!("width={width}\n'optimizer.lr'={lr:?}\nseed={seed}");
            Outcome {
                name: String::new(),
                values: values.parse::<toml::Table>().unwrap().into_iter().collect(),
                base: None,
                status: Status::Done,
                steps: 1,
                tokens: 1,
                loss: Some(1.0 + (lr / best).log2().powi(2)),
                validation_loss: None,
                seconds: 0.0,
                message: None,
            }
        };
        let mut outcomes = Vec::new();
        for (width, best) in [(16, 2e-3), (32, 4e-3)] {
            for lr in [5e-4, 1e-3, 2e-3, 4e-3, 8e-3] {
                outcomes.extend([1, 2].map(|seed| outcome(width, lr, seed, best)));
            }
        }
        let found = optima(&outcomes);
        assert_eq!(found.len(), 2);
        for (found, best) in found.iter().zip([2e-3, 4e-3]) {
            let optimum = found.optimum.as_ref().unwrap();
            assert!((optimum.x / best - 1.0).abs() < 1e-9, "{found:?}");
            assert_eq!(found.axis, "optimizer.lr");
        }
    }
}
