//! What the recipe found: the large upscale, how the optimum moves with width, what tuning cost.

use super::{
    super::{
        fit::Optimum,
        sweep::{
            optima::{self, Found},
            points,
            results::Outcome,
        },
    },
    Chosen, TransferPlan,
};
use crate::{
    Error, Result,
    config::UpscaleConfig,
    model,
    quickstart::comparison::training_flops_per_token,
    report::{
        chart::{self, Chart, Series, Style},
        human,
        metrics::{self, Record},
        table::Table,
    },
    run,
    upscale::{Growth, Origin},
};
use serde::Serialize;
use std::{collections::BTreeMap, path::Path};

/// The numbers' file.
pub const REPORT: &str = "transfer.json";
/// The picture's file.
pub const PICTURE: &str = "transfer.svg";
/// The hypothesis: over an 8-fold range of widths the optimum moves by at most this factor.
const MOST: f64 = std::f64::consts::SQRT_2;

/// Points (x, y) of a line.
type Points = Vec<(f64, f64)>;

/// Outcomes of all parts.
pub struct Parts {
    /// At the small width.
    pub tuning: Vec<Outcome>,
    /// With what was chosen, at the large width.
    pub large: Vec<Outcome>,
    /// Along the axis at each width, by parametrisation.
    pub lines: BTreeMap<String, Vec<Outcome>>,
}

/// What the intervals of the optima allow to be said of their moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// By at most a factor √2, wherever in their intervals the optima lie.
    Holds,
    /// By more than a factor √2, wherever in their intervals two of the optima lie.
    Moves,
    /// The intervals are wider than the claim, or there are none, or an optimum lies at the end of its axis.
    NotResolved,
}

/// The optimum along an axis at each width.
#[derive(Clone, Debug, Serialize)]
pub struct Line {
    /// `mup` or `standard`.
    pub parametrization: String,
    /// Optima by width of the base; none where every run diverged.
    pub optima: Vec<(usize, Option<Optimum>)>,
    /// Largest optimum over smallest.
    pub factor: f64,
    /// Whether that is at most √2.
    pub verdict: Verdict,
    /// Mean losses (value, loss) at each width, for the picture.
    #[serde(skip)]
    losses: Vec<(usize, Points)>,
}

/// The recipe's end. Losses are validation losses in nats; operations those of training (arXiv 2204.02311, appendix B).
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// What was chosen.
    pub chosen: Vec<Chosen>,
    /// Losses of the large upscale, for each seed; none if it diverged.
    pub large: Vec<Option<f64>>,
    /// Loss of the large upscale above that of the best value run at its width (means over seeds), where that was run too:
    /// measured against measured, as a wide axis bends more than a quadratic.
    pub lost: Option<f64>,
    /// The axis of the evidence.
    pub axis: Option<String>,
    /// The evidence.
    pub lines: Vec<Line>,
    /// Operations of all runs that tuned, without the bases.
    pub tuning_flops: f64,
    /// Operations of as many runs on as many tokens at the large size.
    pub full_size_flops: f64,
    #[serde(skip)]
    curves: Vec<(String, Points)>,
}

impl Report {
    /// Reads off what the parts say.
    pub fn new(plan: &TransferPlan, chosen: Vec<Chosen>, parts: &Parts) -> Result<Self> {
        let axis = plan.evidence.as_ref().map(|evidence| evidence.axis.clone());
        let line = |(name, outcomes): (&String, &Vec<Outcome>)| Line::new(name, axis.as_deref()?, outcomes);
        let lines: Vec<Line> = parts.lines.iter().filter_map(line).collect();
        let large: Vec<Option<f64>> = parts.large.iter().map(Outcome::score).collect();
        let mean = mean(&large);
        let tuned = lines.iter().find(|line| line.parametrization == "mup");
        let tuned = tuned.and_then(|line| line.best(plan.sizes.large));
        let tokens: f64 = parts.tuning.iter().map(|outcome| outcome.tokens as f64).sum();
        let times = plan.sizes.large / plan.sizes.small;
        let (small, full) = (flops_per_token(plan, 1)?, flops_per_token(plan, times)?);
        Ok(Self {
            chosen,
            lost: mean.zip(tuned).map(|(mean, tuned)| mean - tuned),
            large,
            axis,
            lines,
            tuning_flops: tokens * small,
            full_size_flops: tokens * full,
            curves: curves(plan, parts)?,
        })
    }

    /// Mean loss of the large upscale; none if a seed diverged.
    pub fn loss(&self) -> Option<f64> {
        mean(&self.large)
    }

    /// What was chosen, and the evidence.
    pub fn table(&self) -> Table {
        let mut table = Table::new(["", "width", "axis", "best value", "90 % of seeds", "loss", ""]);
        let mut row = |what: &str, width: String, axis: &str, found: Option<&Optimum>| {
            let Some(optimum) = found else {
                let cells = [what, &width, axis, "none", "", "diverged", ""];
                table.row(cells.map(String::from));
                return;
            };
            let range = |[low, high]: [f64; 2]| format!("{} to {}", human::number(low), human::number(high));
            let edge = optimum.edge.map_or(String::new(), |edge| format!("at the edge: try {}", range(edge.try_next)));
            let interval = optimum.interval.map_or("one seed".into(), range);
            let (x, loss) = (human::number(optimum.x), format!("{:.4}", optimum.loss));
            table.row([what.into(), width, axis.into(), x, interval, loss, edge]);
        };
        for Chosen { axis, optimum, .. } in &self.chosen {
            row("chosen", String::new(), axis, Some(optimum));
        }
        for line in &self.lines {
            for (width, optimum) in &line.optima {
                let axis = self.axis.as_deref().unwrap_or_default();
                row(&line.parametrization, width.to_string(), axis, optimum.as_ref());
            }
        }
        table
    }

    /// The picture: losses along the axis at each width, the optimum against width, and loss curves.
    pub fn picture(&self) -> String {
        let axis = self.axis.clone().unwrap_or_default();
        let panel = |title: String, x: &str, y: &str, series: Vec<Series>| Chart {
            title,
            x_label: x.into(),
            y_label: y.into(),
            x_log: true,
            series,
            ..Chart::default()
        };
        let mut charts = Vec::new();
        for line in &self.lines {
            let series = line.losses.iter().enumerate();
            let series =
                series.map(|(i, (w, points))| Series::new(format!("width {w}"), i, Style::Solid, points.clone()));
            charts.push(panel(format!("Loss, {}", line.parametrization), &axis, "validation loss", series.collect()));
        }
        if !self.lines.is_empty() {
            let series = self.lines.iter().enumerate().map(|(i, line)| {
                let points = line.optima.iter().filter_map(|(w, o)| Some((*w as f64, o.as_ref()?.x))).collect();
                Series::new(line.parametrization.clone(), i, Style::Solid, points)
            });
            let mut chart = panel("Best value against width".into(), "width of the base", &axis, series.collect());
            chart.y_log = true;
            charts.push(chart);
        }
        let curves = self.curves.iter().enumerate();
        let curves = curves.map(|(i, (name, points))| Series::new(name.clone(), i, Style::Solid, points.clone()));
        charts.push(panel("Loss with what was chosen".into(), "tokens", "validation loss", curves.collect()));
        chart::render(&charts)
    }
}

impl Line {
    fn new(name: &str, axis: &str, outcomes: &[Outcome]) -> Option<Self> {
        let width = |found: &Found| found.at.get("width").and_then(toml::Value::as_integer).unwrap_or(0) as usize;
        let mut found: Vec<Found> = optima::optima(outcomes).into_iter().filter(|found| found.axis == axis).collect();
        found.sort_by_key(width);
        let optima: Vec<(usize, Option<Optimum>)> =
            found.into_iter().map(|found| (width(&found), found.optimum)).collect();
        let xs = optima.iter().flat_map(|(_, optimum)| optimum).map(|optimum| optimum.x);
        let (low, high) = xs.fold((f64::INFINITY, 0.0_f64), |(low, high), x| (low.min(x), high.max(x)));
        let losses = optima.iter().map(|(width, _)| (*width, losses(outcomes, axis, *width))).collect();
        let (factor, verdict) = (high / low, verdict(&optima));
        (!optima.is_empty()).then(|| Self { parametrization: name.into(), optima, factor, verdict, losses })
    }

    /// The least mean loss that was measured at a width.
    fn best(&self, width: usize) -> Option<f64> {
        let (_, points) = self.losses.iter().find(|(w, _)| *w == width)?;
        points.iter().map(|(_, loss)| *loss).min_by(f64::total_cmp)
    }
}

fn verdict(optima: &[(usize, Option<Optimum>)]) -> Verdict {
    let interval = |(_, optimum): &(usize, Option<Optimum>)| {
        let optimum = optimum.as_ref().filter(|optimum| optimum.edge.is_none())?;
        optimum.interval.filter(|interval| interval[0] > 0.0)
    };
    let Some(intervals) = optima.iter().map(interval).collect::<Option<Vec<_>>>() else { return Verdict::NotResolved };
    let least = |end: usize| intervals.iter().map(|i| i[end]).fold(f64::INFINITY, f64::min);
    let most = |end: usize| intervals.iter().map(|i| i[end]).fold(0.0, f64::max);
    match intervals.len() {
        0 | 1 => Verdict::NotResolved,
        _ if most(1) / least(0) <= MOST => Verdict::Holds,
        _ if most(0) / least(1) > MOST => Verdict::Moves,
        _ => Verdict::NotResolved,
    }
}

/// Mean losses along the axis at a width; a value at which a run diverged is left out.
fn losses(outcomes: &[Outcome], axis: &str, width: usize) -> Points {
    let here = |o: &&Outcome| o.values.get("width").and_then(toml::Value::as_integer) == Some(width as i64);
    let mut by_x: BTreeMap<u64, (f64, Vec<Option<f64>>)> = BTreeMap::new();
    for outcome in outcomes.iter().filter(here) {
        let Some(x) = outcome.values.get(axis).and_then(optima::number) else { continue };
        by_x.entry(x.to_bits()).or_insert((x, Vec::new())).1.push(outcome.score());
    }
    by_x.into_values().filter_map(|(x, scores)| Some((x, mean(&scores)?))).collect()
}

fn mean(losses: &[Option<f64>]) -> Option<f64> {
    let sum: f64 = losses.iter().copied().sum::<Option<f64>>()?;
    (!losses.is_empty()).then(|| sum / losses.len() as f64)
}

/// Operations for a token of the upscale whose base is `times` the small one.
fn flops_per_token(plan: &TransferPlan, times: usize) -> Result<f64> {
    let bases = points::bases(&plan.run.join("small"));
    let mut entries = std::fs::read_dir(&bases).map_err(Error::io("read", &bases))?.flatten();
    let small = entries.next().ok_or_else(|| Error::file(&bases, "holds no base"))?.path();
    let meaning = Origin::open(&run::checkpoint_path(&small)?)?.meaning;
    let width = Some(times * plan.sizes.multiplicity);
    let spec = Growth::new(&meaning, &UpscaleConfig { width, ..UpscaleConfig::default() })?.spec(&meaning.spec)?;
    Ok(training_flops_per_token(&spec, &model::table(&spec, &meaning.scaling)))
}

/// Loss curves: of the best small run, and of the large ones.
fn curves(plan: &TransferPlan, parts: &Parts) -> Result<Vec<(String, Points)>> {
    let best = parts.tuning.iter().filter_map(|outcome| Some((outcome.score()?, outcome)));
    let best = best.min_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, outcome)| outcome);
    let small = best.map(|outcome| ("small".to_string(), plan.run.join("small"), outcome));
    let large = parts.large.iter().map(|outcome| {
        let seed = outcome.values.get("seed").map_or(String::new(), |seed| format!(", seed {seed}"));
        (format!("large{seed}"), plan.run.join("large"), outcome)
    });
    let curves = small.into_iter().chain(large);
    curves.map(|(name, sweep, outcome)| Ok((name, curve(&points::runs(&sweep).join(&outcome.name))?))).collect()
}

fn curve(run: &Path) -> Result<Points> {
    let records = metrics::read(&run.join(metrics::FILE_NAME))?;
    let validations: Vec<_> = records
        .iter()
        .filter_map(|r| if let Record::Validation(v) = r { Some((v.tokens as f64, v.loss)) } else { None })
        .collect();
    let step = |r: &Record| if let Record::Step(s) = r { Some((s.tokens as f64, s.loss)) } else { None };
    Ok(if validations.len() > 1 { validations } else { records.iter().filter_map(step).collect() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(x: f64, interval: Option<[f64; 2]>) -> Option<Optimum> {
        Some(Optimum { x, loss: 1.0, interval, best: x, edge: None })
    }

    #[test]
    fn the_verdict_is_what_the_intervals_allow() {
        let of = |all: &[Option<Optimum>]| verdict(&all.iter().cloned().map(|o| (1, o)).collect::<Vec<_>>());
        let (narrow, wide) = (at(1.0, Some([0.95, 1.05])), at(1.0, Some([0.5, 2.0])));
        assert_eq!(of(&[narrow.clone(), at(1.2, Some([1.15, 1.25]))]), Verdict::Holds);
        assert_eq!(of(&[narrow.clone(), at(2.0, Some([1.9, 2.1]))]), Verdict::Moves);
        assert_eq!(of(&[narrow.clone(), wide]), Verdict::NotResolved);
        assert_eq!(of(&[narrow.clone(), at(1.0, None)]), Verdict::NotResolved);
        assert_eq!(of(&[narrow.clone(), None]), Verdict::NotResolved);
        let mut edge = narrow.clone();
        edge.as_mut().unwrap().edge = Some(super::super::super::fit::Edge { try_next: [1.0, 2.0] });
        assert_eq!(of(&[narrow, edge]), Verdict::NotResolved);
    }
}
