//! Runs as one HTML page that fetches nothing: curves to look into, runs side by side, settings, samples.
//!
//! `page.html` is the frame, `page.css` its looks, `page.js` draws; the numbers stand in the page as JSON. The page's
//! own policy forbids it every connection.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize, Serializer};

use super::{
    chart::escape,
    metrics::{Record, StepRecord},
};

/// A curve has at most this many points, more than a screen has pixels; of longer ones means are shown.
const MOST_POINTS: usize = 2000;
/// Of the texts of a run the newest are shown, so many at most.
const MOST_SAMPLES: usize = 200;

/// What is known of a run.
#[derive(Clone, Debug, Default)]
pub struct Run {
    /// For people.
    pub name: String,
    /// Its `metrics.jsonl`.
    pub records: Vec<Record>,
    /// Steps that it shall make, where its configuration is there.
    pub steps: Option<u64>,
    /// Weights of its model, where a checkpoint tells.
    pub parameters: Option<u64>,
    /// Floating-point operations to train on a token, where a checkpoint tells.
    pub flops_per_token: Option<f64>,
    /// Its configuration: dotted keys and their values as written.
    pub settings: BTreeMap<String, String>,
    /// Texts that its model wrote apart from the run, for [`Run::records`] hold those that it wrote on the way.
    pub samples: Vec<Sample>,
}

/// A text that a model wrote.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sample {
    /// Training steps before it; none for one that was written apart from the run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub step: Option<u64>,
    /// What it was given.
    pub prompt: String,
    /// What it added.
    pub text: String,
}

/// The page.
pub fn render(title: &str, runs: &[Run]) -> String {
    let shown: Vec<Shown> = runs.iter().map(Shown::new).collect();
    let data = serde_json::to_string(&shown).unwrap_or_else(|_| unreachable!("strings and numbers have a JSON form"));
    // In a script element "</script>" would end the data, whatever it stands in.
    let data = data.replace('<', "\\u003c");
    let footer = format!("Made by mupscale {} from metrics.jsonl.", env!("CARGO_PKG_VERSION"));
    let title = escape(title);
    let parts = [
        ("{{title}}", title.as_str()),
        ("{{footer}}", &footer),
        ("{{style}}", include_str!("page.css")),
        ("{{script}}", include_str!("page.js")),
        ("{{data}}", &data),
    ];
    fill(include_str!("page.html"), &parts)
}

/// The frame with each name replaced by its part; what a part holds is not looked at.
fn fill(frame: &str, parts: &[(&str, &str)]) -> String {
    let mut page = String::new();
    let mut rest = frame;
    while let Some(at) = rest.find("{{") {
        let (before, after) = rest.split_at(at);
        page += before;
        let (name, part) = parts.iter().find(|(name, _)| after.starts_with(name)).unwrap_or(&("{{", "{{"));
        page += part;
        rest = &after[name.len()..];
    }
    page + rest
}

/// A run as the page's script reads it.
#[derive(Serialize)]
struct Shown<'a> {
    name: &'a str,
    parameters: Option<u64>,
    flops_per_token: Option<f64>,
    step: u64,
    steps: Option<u64>,
    tokens: u64,
    flops: Option<f64>,
    seconds: Number,
    speed: Option<Number>,
    loss: Option<Number>,
    best: Option<Number>,
    last: Option<Number>,
    settings: &'a BTreeMap<String, String>,
    samples: Vec<Sample>,
    train: BTreeMap<&'static str, Vec<Number>>,
    validation: BTreeMap<&'static str, Vec<Number>>,
}

/// A number with seven digits, which is more than a picture shows; null if it is not finite.
#[derive(Clone, Copy)]
struct Number(f64);

impl Serialize for Number {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let whole = self.0.fract() == 0.0 && self.0.abs() < 1e15;
        match format!("{:.6e}", self.0).parse() {
            Ok(_) if whole => serializer.serialize_i64(self.0 as i64),
            Ok(rounded) if self.0.is_finite() => serializer.serialize_f64(rounded),
            _ => serializer.serialize_none(),
        }
    }
}

/// A column of the page's tables, and where its numbers stand in a record.
type Column<T> = (&'static str, fn(&T) -> f64);

/// Columns that say where a point stands: of several points the last counts, of all others the mean.
const PLACES: [&str; 3] = ["step", "tokens", "seconds"];

const STEP_COLUMNS: [Column<StepRecord>; 9] = [
    ("step", |r| r.step as f64),
    ("tokens", |r| r.tokens as f64),
    ("seconds", |r| r.seconds),
    ("loss", |r| r.loss),
    ("lr", |r| r.lr),
    ("grad_norm", |r| r.grad_norm),
    ("update_norm", |r| r.update_norm),
    ("tokens_per_second", |r| r.tokens_per_second),
    ("memory", |r| r.memory as f64),
];

impl<'a> Shown<'a> {
    fn new(run: &'a Run) -> Self {
        let (mut steps, mut validations, mut samples) = (Vec::new(), Vec::new(), Vec::new());
        for record in &run.records {
            match record {
                Record::Step(r) => steps.push(r.clone()),
                Record::Validation(r) => validations.push(r.clone()),
                Record::Sample(r) => {
                    samples.push(Sample { step: Some(r.step), prompt: r.prompt.clone(), text: r.text.clone() });
                }
            }
        }
        samples.drain(..samples.len().saturating_sub(MOST_SAMPLES));
        samples.extend(run.samples.iter().cloned());
        let tokens = steps.last().map_or(0, |r| r.tokens);
        let seconds = run.records.last().map_or(0.0, Record::seconds);
        let losses = validations.iter().map(|r| r.loss).filter(|loss| !loss.is_nan());
        Self {
            name: &run.name,
            parameters: run.parameters,
            flops_per_token: run.flops_per_token,
            step: run.records.last().map_or(0, Record::step),
            steps: run.steps,
            tokens,
            flops: run.flops_per_token.map(|flops| flops * tokens as f64),
            seconds: Number(seconds),
            speed: mean(&steps, |r| r.tokens_per_second).map(Number),
            loss: mean(&steps[steps.len().saturating_sub(20)..], |r| r.loss).map(Number),
            best: losses.min_by(f64::total_cmp).map(Number),
            last: validations.last().map(|r| Number(r.loss)),
            settings: &run.settings,
            samples,
            train: thinned(&steps, &STEP_COLUMNS),
            validation: thinned(
                &validations,
                &[
                    ("step", |r| r.step as f64),
                    ("tokens", |r| r.tokens as f64),
                    ("seconds", |r| r.seconds),
                    ("loss", |r| r.loss),
                ],
            ),
        }
    }
}

/// The columns of a table with as many rows as a curve may have points.
fn thinned<T>(records: &[T], columns: &[Column<T>]) -> BTreeMap<&'static str, Vec<Number>> {
    let group = records.len().div_ceil(MOST_POINTS).max(1);
    let column = |name: &str, number: fn(&T) -> f64| {
        let one = |records: &[T]| match PLACES.contains(&name) {
            true => records.last().map(number),
            false => mean(records, number),
        };
        records.chunks(group).map(|records| Number(one(records).unwrap_or(f64::NAN))).collect()
    };
    columns.iter().map(|&(name, number)| (name, column(name, number))).collect()
}

/// The mean of the numbers that are finite.
fn mean<T>(records: &[T], number: impl Fn(&T) -> f64) -> Option<f64> {
    let finite = records.iter().map(number).filter(|x| x.is_finite());
    let (sum, count) = finite.fold((0.0, 0), |(sum, count), x| (sum + x, count + 1));
    (count > 0).then(|| sum / f64::from(count))
}

#[cfg(test)]
mod tests;
