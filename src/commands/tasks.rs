//! Multiple choice: which of several endings does a model find the likeliest?
//!
//! Tasks are JSONL in the form of HellaSwag (arXiv 1905.07830): `{"ctx": …, "endings": […], "label": …}`. An ending is
//! scored by the probability of its tokens after the context and a space.

use crate::{
    Error, Result,
    data::Tokenizer,
    feed::{HostBatch, Samples},
    model::MicroBatch,
    ops::Ops,
    report::progress::WorkProgress,
    run::Model,
};
use serde::{Deserialize, Serialize};
use std::{fs, path::Path};

/// A line of a task file.
#[derive(Deserialize)]
struct Line {
    ctx: String,
    endings: Vec<String>,
    label: Label,
}

/// Which ending is right: a number, which some files write as text.
#[derive(Deserialize)]
#[serde(untagged)]
enum Label {
    Number(usize),
    Text(String),
}

/// How often the right ending was the likeliest.
#[derive(Debug, Serialize)]
pub struct Score {
    /// Tasks.
    pub tasks: usize,
    /// Share of tasks whose right ending has the largest probability.
    pub accuracy: f64,
    /// The same with log-probabilities divided by the ending's bytes, as the harness of EleutherAI does (`acc_norm`).
    pub accuracy_per_byte: f64,
    /// The same with log-probabilities divided by the ending's tokens, as llm.c does.
    pub accuracy_per_token: f64,
    /// The share that guessing would reach.
    pub chance: f64,
}

/// An ending as the model sees it.
struct Choice {
    /// Context and ending.
    tokens: Vec<i32>,
    /// Tokens of the ending.
    scored: usize,
    /// Bytes of the ending.
    bytes: usize,
}

struct Task {
    choices: Vec<Choice>,
    right: usize,
}

/// Scores all tasks of a file, `batch` endings at a time; `progress` counts them.
pub fn score<B: Ops>(
    model: &Model<B>,
    tokenizer: &Tokenizer,
    path: &Path,
    batch: usize,
    progress: impl FnOnce(u64) -> WorkProgress,
) -> Result<Score> {
    let spec = &model.meaning.spec;
    let tasks = read(path, tokenizer, spec.context(), spec.classes())?;
    let choices: Vec<&Choice> = tasks.iter().flat_map(|task| &task.choices).collect();
    // No longer than needed: most tasks are far shorter than the context.
    let length = choices.iter().map(|c| c.tokens.len() - 1).max().unwrap_or(1);
    let micro = MicroBatch { samples: batch, length };
    let rows = choices.iter().map(|choice| choice.row(length)).collect();
    let progress = progress(choices.len() as u64);
    let losses = model.losses(Box::new(Rows { rows, length }), micro, |n| progress.advance(n))?;
    let mut sums = losses.chunks(length).map(|row| row.iter().sum::<f64>());
    let mut hits = [0usize; 3];
    let mut chance = 0.0;
    for task in &tasks {
        let sums: Vec<f64> = sums.by_ref().take(task.choices.len()).collect();
        let weights: [fn(&Choice) -> usize; 3] = [|_| 1, |c| c.bytes, |c| c.scored];
        for (hits, weight) in hits.iter_mut().zip(weights) {
            let cost = |i: &usize| sums[*i] / weight(&task.choices[*i]) as f64;
            let best = (0..sums.len()).min_by(|a, b| cost(a).total_cmp(&cost(b)));
            *hits += usize::from(best == Some(task.right));
        }
        chance += 1.0 / task.choices.len() as f64;
    }
    let share = |hits: usize| hits as f64 / tasks.len() as f64;
    let [accuracy, accuracy_per_byte, accuracy_per_token] = hits.map(share);
    Ok(Score {
        tasks: tasks.len(),
        accuracy,
        accuracy_per_byte,
        accuracy_per_token,
        chance: chance / tasks.len() as f64,
    })
}

fn read(path: &Path, tokenizer: &Tokenizer, context: usize, vocab: usize) -> Result<Vec<Task>> {
    let text = fs::read_to_string(path).map_err(Error::io("read", path))?;
    let mut tasks = Vec::new();
    for (i, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let refuse = |why: String| Error::file(path, format!("line {}: {why}", i + 1));
        let form = "a line is {\"ctx\": \"…\", \"endings\": [\"…\", \"…\"], \"label\": 0}";
        let line: Line = serde_json::from_str(line).map_err(|e| refuse(format!("{e}; {form}")))?;
        let right = match &line.label {
            Label::Number(label) => Some(*label),
            Label::Text(label) => label.parse().ok(),
        };
        let right = right.filter(|&right| right < line.endings.len() && line.endings.len() > 1).ok_or_else(|| {
            refuse(format!("its label names none of its {} endings (two or more, counted from 0)", line.endings.len()))
        })?;
        let choices = line.endings.iter().map(|ending| Choice::new(&line.ctx, ending, tokenizer, context, vocab));
        let choices = choices.collect::<Result<Result<Vec<_>, String>>>()?.map_err(refuse)?;
        tasks.push(Task { choices, right });
    }
    if tasks.is_empty() {
        return Err(Error::file(path, "holds no task: it is empty"));
    }
    Ok(tasks)
}

impl Choice {
    /// The inner error is one of the line.
    fn new(
        ctx: &str,
        ending: &str,
        tokenizer: &Tokenizer,
        context: usize,
        vocab: usize,
    ) -> Result<Result<Self, String>> {
        let ending = format!(" {}", ending.trim_start());
        let mut tokens = tokenizer.encode(ctx.trim_end())?;
        if tokens.is_empty() {
            // What stands before a document's first token in training.
            tokens.push(tokenizer.end_of_text().unwrap_or(0));
        }
        // The space is not the ending's own; an empty one costs nothing to divide.
        let bytes = (ending.len() - 1).max(1);
        let added = tokenizer.encode(&ending)?;
        let scored = added.len();
        tokens.extend(added);
        if let Some(token) = tokens.iter().find(|&&t| t as usize >= vocab) {
            return Ok(Err(format!(
                "token {token} is not in the model's vocabulary of {vocab}: give the tokenizer it was trained with"
            )));
        }
        if scored > context {
            return Ok(Err(format!("an ending has {scored} tokens; the model's context is {context}")));
        }
        // The last target needs no place among the inputs. Of a context that is too long its end counts.
        tokens.drain(..tokens.len().saturating_sub(context + 1));
        Ok(Ok(Self { tokens: tokens.into_iter().map(|t| t as i32).collect(), scored, bytes }))
    }

    /// Inputs and targets, filled up with what is not counted.
    fn row(&self, length: usize) -> (Vec<i32>, Vec<i32>) {
        let mut inputs = self.tokens[..self.tokens.len() - 1].to_vec();
        let mut targets = self.tokens[1..].to_vec();
        let given = targets.len() - self.scored;
        targets[..given].fill(UNCOUNTED);
        inputs.resize(length, 0);
        targets.resize(length, UNCOUNTED);
        (inputs, targets)
    }
}

/// A target that no loss is taken of.
const UNCOUNTED: i32 = -1;

/// Rows that lie ready, all of the same length.
struct Rows {
    rows: Vec<(Vec<i32>, Vec<i32>)>,
    length: usize,
}

impl Samples for Rows {
    fn train(&mut self, first: u64, batch: &mut HostBatch) {
        self.validate(first, batch);
    }

    fn validate(&mut self, first: u64, batch: &mut HostBatch) -> usize {
        batch.inputs.fill(0);
        batch.targets.fill(UNCOUNTED);
        let inputs = batch.inputs.chunks_mut(self.length * size_of::<i32>());
        let places = inputs.zip(batch.targets.chunks_mut(self.length));
        for ((inputs, targets), row) in places.zip(self.rows.iter().skip(first as usize)) {
            inputs.copy_from_slice(bytemuck::cast_slice(&row.0));
            targets.copy_from_slice(&row.1);
        }
        batch.targets.iter().filter(|&&target| target >= 0).count()
    }

    fn held_out(&self) -> u64 {
        self.rows.len() as u64
    }

    fn fingerprint(&self) -> u64 {
        0
    }

    fn inputs(&self) -> usize {
        1
    }

    fn resets_attention(&self) -> bool {
        false
    }
}
