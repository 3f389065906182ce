//! What the runs of a comparison reached, on equal tokens and on equal operations, and where from scratch catches up.

use crate::report::{
    chart::{self, Chart, Series, Style},
    human,
    table::Table,
};
use serde::Serialize;

/// One run. Losses are validation losses in nats per token; operations are
/// [`crate::quickstart::comparison::training_flops_per_token`] × tokens.
#[derive(Clone, Debug, Serialize)]
pub struct RunResult {
    /// `base`, an operator, `scratch-wide`, `scratch-wide-long`, `scratch-deep`, `scratch-deep-long`.
    pub name: String,
    /// Parameters of the model.
    pub parameters: usize,
    /// Tokens of this run.
    pub tokens: f64,
    /// Operations of this run.
    pub flops: f64,
    /// Operations of the base that it grew from; 0 for what did not grow.
    pub base_flops: f64,
    /// `wide` or `deep`, for a grown model: the shape from scratch that it is compared with.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shape: Option<String>,
    /// Whether its loss ceased to be a number, or ended over that of a guess.
    pub diverged: bool,
    /// The last loss.
    pub loss: Option<f64>,
    /// Loss after as many operations as the shortest of the runs took, the base not counted.
    pub loss_at_equal_flops: Option<f64>,
    /// The same with the base counted.
    pub loss_at_equal_flops_with_base: Option<f64>,
    /// Tokens after which the shape from scratch is as good; none: not within its run.
    pub scratch_catches_up_tokens: Option<f64>,
    /// Operations after which it is, those of the base counted and the long run from scratch taken.
    pub scratch_catches_up_flops: Option<f64>,
    /// (tokens, loss) over the run.
    pub curve: Vec<(f64, f64)>,
    flops_per_token: f64,
}

impl RunResult {
    /// A run of which nothing is known yet.
    pub fn new(name: impl Into<String>, parameters: usize) -> Self {
        Self {
            name: name.into(),
            parameters,
            tokens: 0.0,
            flops: 0.0,
            base_flops: 0.0,
            shape: None,
            diverged: false,
            loss: None,
            loss_at_equal_flops: None,
            loss_at_equal_flops_with_base: None,
            scratch_catches_up_tokens: None,
            scratch_catches_up_flops: None,
            curve: Vec::new(),
            flops_per_token: 0.0,
        }
    }

    /// What it took, and for a grown model the base's operations and the shape.
    pub fn ends(&mut self, tokens: f64, flops_per_token: f64, grown: Option<(f64, &str)>) {
        (self.tokens, self.flops_per_token, self.flops) = (tokens, flops_per_token, tokens * flops_per_token);
        if let Some((base_flops, shape)) = grown {
            (self.base_flops, self.shape) = (base_flops, Some(shape.into()));
        }
        self.loss = self.curve.last().map(|&(_, loss)| loss);
    }

    /// The curve over operations that begin at `start`.
    fn over_flops(&self, start: f64) -> Vec<(f64, f64)> {
        self.curve.iter().map(|&(tokens, loss)| (start + tokens * self.flops_per_token, loss)).collect()
    }

    fn counts(&self) -> bool {
        !self.diverged && self.name != "base"
    }

    fn is_long(&self) -> bool {
        self.name.ends_with("-long")
    }
}

/// `growth.json`.
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    /// Operations at which losses are compared, the base not counted.
    pub equal_flops: f64,
    /// Operations at which losses are compared, the base counted.
    pub equal_flops_with_base: f64,
    /// The base, the grown models, those from scratch.
    pub runs: Vec<RunResult>,
}

impl Comparison {
    /// Compares finished runs. `guess`: the loss of a uniform guess, over which a run has diverged.
    pub fn new(mut runs: Vec<RunResult>, guess: f64) -> Self {
        for run in &mut runs {
            run.diverged |= run.loss.is_some_and(|loss| !loss.is_finite() || loss > guess);
        }
        let least = |of: &dyn Fn(&RunResult) -> Option<f64>| {
            runs.iter().filter(|run| run.counts()).filter_map(of).fold(f64::INFINITY, f64::min)
        };
        let equal_flops = least(&|run| (!run.is_long()).then_some(run.flops));
        let equal_flops_with_base = least(&|run| run.shape.as_ref().map(|_| run.flops + run.base_flops));
        let all = runs.clone();
        for run in runs.iter_mut().filter(|run| run.counts()) {
            if !run.is_long() {
                run.loss_at_equal_flops = at(&run.over_flops(0.0), equal_flops);
            }
            if run.is_long() || run.shape.is_some() {
                run.loss_at_equal_flops_with_base = at(&run.over_flops(run.base_flops), equal_flops_with_base);
            }
            let Some(shape) = &run.shape else { continue };
            let scratch = |name: String| all.iter().find(|other| other.name == name && !other.diverged);
            run.scratch_catches_up_tokens =
                scratch(format!("scratch-{shape}")).and_then(|s| crossing(&run.curve, &s.curve));
            run.scratch_catches_up_flops = scratch(format!("scratch-{shape}-long"))
                .and_then(|s| crossing(&run.over_flops(run.base_flops), &s.over_flops(0.0)));
        }
        Self { equal_flops, equal_flops_with_base, runs }
    }

    /// The comparison as a table.
    pub fn table(&self) -> Table {
        let mut table = Table::new([
            "run",
            "parameters",
            "tokens",
            "FLOPs",
            "loss",
            "at equal FLOPs",
            "… base counted",
            "scratch catches up: tokens",
            "… FLOPs, base counted",
        ]);
        let loss = |loss: Option<f64>| loss.map_or(String::new(), |loss| format!("{loss:.4}"));
        for run in &self.runs {
            let caught = |at: Option<f64>| match (&run.shape, at) {
                (None, _) => String::new(),
                _ if run.diverged => String::new(),
                (_, Some(at)) => human::count(at),
                (_, None) => "not within the run".into(),
            };
            table.row([
                run.name.clone(),
                human::count(run.parameters as f64),
                human::count(run.tokens),
                human::count(run.flops),
                if run.diverged { "diverged".into() } else { loss(run.loss) },
                loss(run.loss_at_equal_flops),
                loss(run.loss_at_equal_flops_with_base),
                caught(run.scratch_catches_up_tokens),
                caught(run.scratch_catches_up_flops),
            ]);
        }
        table
    }

    /// Losses against tokens, and against operations with the base counted, SVG. Diverged runs are drawn as far as they
    /// have numbers, and named so.
    pub fn picture(&self) -> String {
        let series = |points: &dyn Fn(&RunResult) -> Vec<(f64, f64)>| {
            let shown = self.runs.iter().enumerate().map(|(i, run)| {
                let name = if run.diverged { format!("{} (diverged)", run.name) } else { run.name.clone() };
                let style = if i < 6 { Style::Solid } else { Style::Dashed };
                Series::new(name, i, style, points(run))
            });
            shown.collect()
        };
        let panel = |title: &str, x_label: &str, series| Chart {
            title: title.into(),
            x_label: x_label.into(),
            y_label: "validation loss, nats".into(),
            series,
            ..Chart::default()
        };
        chart::render(&[
            panel("Loss against tokens", "tokens of the run", series(&|run| run.curve.clone())),
            panel(
                "Loss against FLOPs, the base counted",
                "training FLOPs",
                series(&|run| run.over_flops(run.base_flops)),
            ),
        ])
    }
}

/// The value of a curve at x, between two of its points; none outside them.
fn at(curve: &[(f64, f64)], x: f64) -> Option<f64> {
    // Ends that are the same number of operations may differ in the last bit.
    let slack = 1e-9 * x.abs();
    let after = curve.iter().position(|&(at, _)| at >= x - slack)?;
    let (x1, y1) = curve[after];
    if x1 <= x + slack {
        return Some(y1);
    }
    let (x0, y0) = curve[after.checked_sub(1)?];
    Some(y0 + (y1 - y0) * (x - x0) / (x1 - x0))
}

/// Where `behind` is first as low as `ahead`, over the stretch that both have.
fn crossing(ahead: &[(f64, f64)], behind: &[(f64, f64)]) -> Option<f64> {
    let mut xs: Vec<f64> = ahead.iter().chain(behind).map(|&(x, _)| x).collect();
    xs.sort_by(f64::total_cmp);
    let mut last: Option<(f64, f64)> = None;
    for x in xs {
        let (Some(first), Some(second)) = (at(ahead, x), at(behind, x)) else { continue };
        let gap = second - first;
        if gap <= 0.0 {
            return Some(last.map_or(x, |(x0, gap0)| x0 + (x - x0) * gap0 / (gap0 - gap)));
        }
        last = Some((x, gap));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(name: &str, curve: &[(f64, f64)], flops_per_token: f64, grown: Option<(f64, &str)>) -> RunResult {
        let mut run = RunResult::new(name, 1);
        run.curve = curve.to_vec();
        run.ends(curve.last().unwrap().0, flops_per_token, grown);
        run
    }

    #[test]
    fn curves_cross_where_their_lines_do() {
        let ahead = [(0.0, 2.0), (10.0, 2.0), (20.0, 2.0)];
        assert_eq!(crossing(&ahead, &[(0.0, 4.0), (8.0, 3.0), (16.0, 1.0)]), Some(12.0));
        assert_eq!(crossing(&ahead, &[(5.0, 1.0), (16.0, 1.0)]), Some(5.0));
        assert_eq!(crossing(&ahead, &[(0.0, 4.0), (20.0, 2.1)]), None);
        // Where only one has values there is nothing to compare.
        assert_eq!(crossing(&ahead, &[(30.0, 1.0)]), None);
    }

    #[test]
    fn budgets_are_those_of_the_shortest_and_the_base_is_counted() {
        let runs = vec![
            run("base", &[(10.0, 3.0)], 1.0, None),
            run("mupscale", &[(5.0, 3.0), (10.0, 2.0)], 4.0, Some((10.0, "wide"))),
            run("stack", &[(5.0, 3.5), (10.0, 2.5)], 2.0, Some((10.0, "deep"))),
            run("zero", &[(5.0, 9.0), (10.0, 8.0)], 4.0, Some((10.0, "wide"))),
            run("scratch-wide", &[(5.0, 4.0), (10.0, 2.2)], 4.0, None),
            run("scratch-wide-long", &[(5.0, 4.0), (12.5, 1.0)], 4.0, None),
        ];
        let all = Comparison::new(runs, 5.0);
        let find = |name: &str| all.runs.iter().find(|r| r.name == name).unwrap();
        assert_eq!((all.equal_flops, all.equal_flops_with_base), (20.0, 30.0));
        // 20 operations are 5 tokens of the wide model; 30 with the base's are the same.
        assert_eq!(find("mupscale").loss_at_equal_flops, Some(3.0));
        assert_eq!(find("mupscale").loss_at_equal_flops_with_base, Some(3.0));
        assert_eq!(find("stack").loss_at_equal_flops_with_base, Some(2.5));
        assert_eq!(find("scratch-wide-long").loss_at_equal_flops_with_base, Some(3.0));
        assert_eq!(find("mupscale").scratch_catches_up_tokens, None);
        assert!((find("mupscale").scratch_catches_up_flops.unwrap() - 30.0).abs() < 1e-9);
        assert!(find("zero").diverged && find("zero").loss_at_equal_flops.is_none());
        let (table, picture) = (all.table().to_string(), all.picture());
        assert!(table.contains("diverged") && table.contains("not within the run"));
        assert!(picture.contains("zero (diverged)"));
    }
}
