//! What the three runs cost and reached: the table, the picture, the summary.

use crate::{
    Error, Result,
    dims::Width,
    model::{
        self,
        param::{Kind, Row},
        spec::Spec,
    },
    report::{
        chart::{self, Chart, Series, Style},
        human,
        metrics::{self, Record},
        table::Table,
    },
    run,
    upscale::Origin,
};
use serde::Serialize;
use std::path::Path;

/// A finished run.
#[derive(Clone, Debug, Serialize)]
pub struct RunSummary {
    /// `base`, `widened` or `scratch`.
    pub name: &'static str,
    /// Parameters of the model.
    pub parameters: usize,
    /// Tokens of this run.
    pub tokens: u64,
    /// Floating-point operations of this run ([`training_flops_per_token`] × tokens).
    pub flops: f64,
    /// Tokens of this run and of the base training that it rests on.
    pub tokens_with_base: u64,
    /// Floating-point operations of this run and of the base training that it rests on.
    pub flops_with_base: f64,
    /// Last validation loss, nats per token.
    pub validation_loss: f64,
    /// Validation losses over the run: (tokens of this run, nats per token).
    #[serde(skip)]
    pub curve: Vec<(f64, f64)>,
    #[serde(skip)]
    flops_per_token: f64,
}

impl RunSummary {
    /// Reads a run's folder. `base` is the run that this one started from.
    pub fn read(name: &'static str, folder: &Path, base: Option<&Self>) -> Result<Self> {
        let origin = Origin::open(&run::newest_checkpoint(folder)?)?;
        let spec = &origin.meaning.spec;
        let table = model::table(spec, &origin.meaning.scaling);
        let flops_per_token = training_flops_per_token(spec, &table);
        let path = folder.join(metrics::FILE_NAME);
        let validations = metrics::read(&path)?.into_iter().filter_map(|record| match record {
            Record::Validation(v) => Some((v.tokens as f64, v.loss)),
            Record::Step(_) | Record::Sample(_) => None,
        });
        let curve: Vec<_> = validations.collect();
        let why = "holds no validation: there is no held-out data";
        let validation_loss = curve.last().ok_or_else(|| Error::file(&path, why))?.1;
        let tokens = origin.progress.position.tokens;
        let flops = flops_per_token * tokens as f64;
        Ok(Self {
            name,
            parameters: table.parameters(),
            tokens,
            flops,
            tokens_with_base: tokens + base.map_or(0, |b| b.tokens),
            flops_with_base: flops + base.map_or(0.0, |b| b.flops),
            validation_loss,
            curve,
            flops_per_token,
        })
    }

    /// The curve over this run's own tokens, begun at `tokens`.
    fn over_tokens(&self, start: u64) -> Vec<(f64, f64)> {
        self.curve.iter().map(|&(tokens, loss)| (start as f64 + tokens, loss)).collect()
    }

    /// The curve over this run's own operations, begun at `flops`.
    fn over_flops(&self, start: f64) -> Vec<(f64, f64)> {
        self.curve.iter().map(|&(tokens, loss)| (start + tokens * self.flops_per_token, loss)).collect()
    }
}

/// Floating-point operations to train a model on one token: 6 N + 12 · layers · (heads · head_dim) · context
/// (arXiv 2204.02311, appendix B), with every attention score counted as if there were no mask.
///
/// N are the parameters that multiply something: all but embeddings, which are looked up; a tied embedding counts once,
/// as readout.
pub fn training_flops_per_token(spec: &Spec, table: &model::param::Table) -> f64 {
    let looked_up = table.rows.iter().filter(|row| row.kind == Kind::Embedding).map(Row::len).sum::<usize>();
    let multiplied = table.parameters() - looked_up;
    let Spec::Decoder(d) = spec else { return 6.0 * multiplied as f64 };
    let readout = if d.tied { d.vocab * d.dims.get(Width::Residual) } else { 0 };
    let heads = [Width::KvHeads, Width::Group, Width::HeadDim].map(|w| d.dims.get(w)).iter().product::<usize>();
    6.0 * (multiplied + readout) as f64 + 12.0 * (d.layers * heads * d.context) as f64
}

/// Narrow and wide losses of the same steps, without noise.
#[derive(Clone, Debug)]
pub struct Equivalence {
    /// Losses of each step: (step, narrow, wide).
    pub steps: Vec<(u64, f64, f64)>,
}

impl Equivalence {
    /// Compares the training losses of two run folders.
    pub fn read(narrow: &Path, wide: &Path) -> Result<Self> {
        let (narrow, wide) = (training_losses(narrow)?, training_losses(wide)?);
        Ok(Self { steps: narrow.into_iter().zip(wide).map(|((step, n), (_, w))| (step, n, w)).collect() })
    }

    /// The largest difference of any step, nats.
    pub fn max_difference(&self) -> f64 {
        // f64::max would lose a NaN.
        let differences = self.steps.iter().map(|(_, n, w)| (n - w).abs());
        differences.fold(0.0, |a: f64, b| if a.is_nan() || a >= b { a } else { b })
    }

    /// The losses side by side.
    pub fn table(&self) -> Table {
        let mut table = Table::new(["step", "base", "widened", "difference"]);
        for (step, narrow, wide) in &self.steps {
            table.row([
                step.to_string(),
                format!("{narrow:.7}"),
                format!("{wide:.7}"),
                format!("{:.1e}", (narrow - wide).abs()),
            ]);
        }
        table
    }
}

fn training_losses(run: &Path) -> Result<Vec<(u64, f64)>> {
    let records = metrics::read(&run.join(metrics::FILE_NAME))?;
    Ok(records
        .into_iter()
        .filter_map(|r| if let Record::Step(s) = r { Some((s.step, s.loss)) } else { None })
        .collect())
}

/// `summary.json`. Losses are validation losses in nats per token.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// `tiny` or `small`.
    pub size: &'static str,
    /// Seed of everything.
    pub seed: u64,
    /// Largest difference between the losses of narrow and wide model over the same steps, without noise.
    pub equivalence_max_loss_difference: f64,
    /// Number of those steps.
    pub equivalence_steps: usize,
    /// The base model's loss.
    pub base_loss: f64,
    /// The loss of the model that was widened and trained on.
    pub widened_loss: f64,
    /// The loss of the wide model trained from new weights.
    pub scratch_loss: f64,
    /// No model's expected loss is below it; none for the user's own text.
    pub entropy_floor: Option<f64>,
    /// σ of the widened model's noise.
    pub noise: f64,
    /// Seconds that everything took.
    pub seconds: f64,
    /// The three runs: base, widened, scratch.
    pub runs: [RunSummary; 3],
}

impl Summary {
    /// The comparison as a table.
    pub fn table(&self) -> Table {
        let header =
            ["model", "parameters", "tokens", "FLOPs", "tokens with base", "FLOPs with base", "validation loss"];
        let mut table = Table::new(header);
        let count = |x: f64| human::count(x);
        for run in &self.runs {
            table.row([
                run.name.into(),
                count(run.parameters as f64),
                count(run.tokens as f64),
                count(run.flops),
                count(run.tokens_with_base as f64),
                count(run.flops_with_base),
                format!("{:.4}", run.validation_loss),
            ]);
        }
        if let Some(floor) = self.entropy_floor {
            let mut cells = vec![String::new(); header.len()];
            (cells[0], cells[header.len() - 1]) = ("entropy floor".into(), format!("{floor:.4}"));
            table.row(cells);
        }
        table
    }

    /// The comparison as a picture, SVG: validation loss against tokens and against FLOPs.
    pub fn picture(&self) -> String {
        let [base, widened, scratch] = &self.runs;
        let panel = |title: &str, x_label: &str, [b, counted, alone, s]: [Vec<(f64, f64)>; 4]| {
            let mut series = vec![
                Series::new("base", 0, Style::Solid, b),
                Series::new("as wide, from scratch", 2, Style::Solid, s),
                Series::new("widened, base counted", 1, Style::Solid, counted),
                Series::new("widened, base not counted", 1, Style::Dashed, alone),
            ];
            series.extend(self.entropy_floor.map(|floor| Series::horizontal("entropy floor", floor)));
            Chart {
                title: title.into(),
                x_label: x_label.into(),
                y_label: "validation loss, nats per token".into(),
                series,
                ..Chart::default()
            }
        };
        chart::render(&[
            panel(
                "Loss against training tokens",
                "training tokens",
                [base.over_tokens(0), widened.over_tokens(base.tokens), widened.over_tokens(0), scratch.over_tokens(0)],
            ),
            panel(
                "Loss against training FLOPs",
                "training FLOPs",
                [
                    base.over_flops(0.0),
                    widened.over_flops(base.flops),
                    widened.over_flops(0.0),
                    scratch.over_flops(0.0),
                ],
            ),
        ])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config::{DataShape, resolve_model},
        mup::Parametrization,
    };

    fn flops(text: &str) -> f64 {
        let config: crate::config::ModelConfig = toml::from_str(text).unwrap();
        let spec = resolve_model(&config, DataShape::Tokens { vocab: 100 }).unwrap();
        let scaling = crate::model::spec::Scaling { kind: Parametrization::Mup, base: spec.dims().clone() };
        training_flops_per_token(&spec, &model::table(&spec, &scaling))
    }

    #[test]
    fn operations_count_every_parameter_that_multiplies() {
        let shape = "layers = 3\nresidual = 8\nkv_heads = 2\ncontext = 5\n";
        // A block: 4 d² for attention, 8 d² for the MLP, two gains; the last gain; the readout. 12 · 3 · 8 · 5 of attention.
        let tied = flops(&format!("arch = 'gpt2'\nbias = false\n{shape}"));
        assert_eq!(tied, 6.0 * (3.0 * (12.0 * 64.0 + 16.0) + 8.0 + 800.0) + 1440.0);
        assert_eq!(flops(&format!("arch = 'gpt2'\nbias = false\ntied = false\n{shape}")), tied);
    }

    #[test]
    fn the_largest_difference_is_found_and_nan_is_not_lost() {
        let mut equivalence = Equivalence { steps: vec![(1, 2.0, 2.5), (2, 3.0, 2.0), (3, 1.0, 1.0)] };
        assert_eq!(equivalence.max_difference(), 1.0);
        equivalence.steps.insert(1, (4, f64::NAN, 1.0));
        assert!(equivalence.max_difference().is_nan());
    }
}
