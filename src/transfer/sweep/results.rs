//! What became of a sweep's runs: a small file beside each, and all of them in one SQLite database.
//!
//! The database is made from the runs whenever they change, and never read back: if it is damaged, the next `sweep`
//! makes it anew.
//!
//! ```sql
//! CREATE TABLE runs (
//!   name TEXT PRIMARY KEY,      -- its values, and its steps where rungs differ in them
//!   folder TEXT NOT NULL,       -- an ordinary run folder
//!   base TEXT,                  -- the base run that it widened
//!   status TEXT NOT NULL,       -- done, diverged, failed
//!   steps INTEGER, tokens INTEGER,
//!   loss REAL,                  -- training loss, nats: mean over the last tenth of the steps
//!   validation_loss REAL,       -- the last one, nats
//!   seconds REAL,               -- of training
//!   message TEXT                -- of a run that failed
//! );
//! CREATE TABLE axes (name TEXT, key TEXT, number REAL, text TEXT, PRIMARY KEY (name, key));
//! CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT);  -- schema = 1, version
//! ```

use super::points::{Point, Values, runs};
use crate::{
    Error, Result,
    report::metrics::{self, Record},
};
use rusqlite::{Connection, params};
use serde::{Deserialize, Serialize};
use std::{
    fs,
    path::{Path, PathBuf},
};

/// The database's file in a sweep's folder.
pub const DATABASE: &str = "results.sqlite";
/// A run's outcome, in its folder.
const OUTCOME: &str = "outcome.json";

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// It trained to its last step.
    Done,
    /// A loss or gradient that is not finite, or a loss at the end that is no better than at the start.
    Diverged,
    /// It could not be run: its message says why. It is tried again by the next `sweep`.
    Failed,
}

/// What became of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// Its name.
    pub name: String,
    /// Its values.
    pub values: Values,
    /// The base run that it widened.
    pub base: Option<String>,
    /// How it ended.
    pub status: Status,
    /// Steps done.
    pub steps: u64,
    /// Tokens (rows) trained on.
    pub tokens: u64,
    /// Mean training loss of the last tenth of the steps, nats.
    pub loss: Option<f64>,
    /// Last validation loss, nats.
    pub validation_loss: Option<f64>,
    /// Seconds of training.
    pub seconds: f64,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

impl Outcome {
    /// What counts: the validation loss, without held-out data the training loss. None for a run that diverged or failed.
    pub fn score(&self) -> Option<f64> {
        if self.status != Status::Done {
            return None;
        }
        self.validation_loss.or(self.loss).filter(|loss| loss.is_finite())
    }

    /// What a run's folder tells, after its process ended with `code`.
    pub fn of(sweep: &Path, point: &Point, code: Option<i32>, message: &str) -> Self {
        let records = metrics::read(&runs(sweep).join(&point.name).join(metrics::FILE_NAME)).unwrap_or_default();
        let steps: Vec<_> =
            records.iter().filter_map(|r| if let Record::Step(s) = r { Some(s) } else { None }).collect();
        let validation =
            records.iter().rev().find_map(|r| if let Record::Validation(v) = r { Some(v.loss) } else { None });
        let tail = &steps[steps.len() - steps.len().div_ceil(10)..];
        let loss = (!tail.is_empty()).then(|| tail.iter().map(|s| s.loss).sum::<f64>() / tail.len() as f64);
        let worse = steps
            .first()
            .zip(loss)
            .is_some_and(|(first, loss)| loss.is_nan() || (loss >= first.loss && steps.len() > 10));
        let status = match code {
            Some(0) if worse => Status::Diverged,
            Some(0) => Status::Done,
            Some(4) => Status::Diverged,
            _ => Status::Failed,
        };
        let last = steps.last();
        Self {
            name: point.name.clone(),
            values: point.values.clone(),
            base: point.base.clone(),
            status,
            steps: last.map_or(0, |s| s.step),
            tokens: last.map_or(0, |s| s.tokens),
            loss: loss.filter(|loss| loss.is_finite()),
            validation_loss: validation.filter(|loss| loss.is_finite()),
            seconds: records.last().map_or(0.0, Record::seconds),
            message: (status == Status::Failed).then(|| message.trim().to_string()),
        }
    }

    /// Writes it beside its run.
    pub fn write(&self, sweep: &Path) -> Result<()> {
        let folder = runs(sweep).join(&self.name);
        fs::create_dir_all(&folder).map_err(Error::io("create", &folder))?;
        let text = serde_json::to_vec_pretty(self).map_err(|e| Error::Usage(format!("no JSON: {e}")))?;
        replace(&folder.join(OUTCOME), |path| fs::write(path, text).map_err(Error::io("write", path)))
    }

    /// What an earlier `sweep` wrote of a run; none if it has not ended, or if the file is damaged.
    pub fn read(sweep: &Path, name: &str) -> Option<Self> {
        serde_json::from_slice(&fs::read(runs(sweep).join(name).join(OUTCOME)).ok()?).ok()
    }
}

/// Writes a file beside its name and renames it, so that it is whole or not there.
fn replace(path: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let mut new = path.as_os_str().to_owned();
    // Shards of a sweep may write at the same time.
    new.push(format!(".{}.new", std::process::id()));
    let new = PathBuf::from(new);
    let _ = fs::remove_file(&new);
    write(&new)?;
    fs::rename(&new, path).map_err(Error::io("rename", path))
}

/// Outcomes of all runs of a sweep that have ended, by name.
pub fn all(sweep: &Path) -> Vec<Outcome> {
    let Ok(entries) = fs::read_dir(runs(sweep)) else { return Vec::new() };
    let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    let mut outcomes: Vec<_> = names.filter_map(|name| Outcome::read(sweep, &name)).collect();
    outcomes.sort_by(|a, b| a.name.cmp(&b.name));
    outcomes
}

/// Makes the database from the runs.
pub fn write_database(sweep: &Path) -> Result<PathBuf> {
    let path = sweep.join(DATABASE);
    let outcomes = all(sweep);
    replace(&path, |path| {
        fill(path, sweep, &outcomes).map_err(|e| Error::file(path, format!("SQLite cannot write it: {e}")))
    })?;
    Ok(path)
}

fn fill(path: &Path, sweep: &Path, outcomes: &[Outcome]) -> rusqlite::Result<()> {
    let mut connection = Connection::open(path)?;
    let write = connection.transaction()?;
    write.execute_batch(
        "CREATE TABLE runs (name TEXT PRIMARY KEY, folder TEXT NOT NULL, base TEXT, status TEXT NOT NULL, steps INTEGER,
           tokens INTEGER, loss REAL, validation_loss REAL, seconds REAL, message TEXT);
         CREATE TABLE axes (name TEXT, key TEXT, number REAL, text TEXT, PRIMARY KEY (name, key));
         CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT);
         INSERT INTO meta VALUES ('schema', '1');",
    )?;
    write.execute("INSERT INTO meta VALUES ('version', ?1)", [env!("MUPSCALE_VERSION")])?;
    for o in outcomes {
        let folder = runs(sweep).join(&o.name).display().to_string();
        let status = serde_json::to_value(o.status).ok().and_then(|v| v.as_str().map(String::from));
        write.execute(
            "INSERT INTO runs VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)",
            params![
                o.name,
                folder,
                o.base,
                status,
                o.steps as i64,
                o.tokens as i64,
                o.loss,
                o.validation_loss,
                o.seconds,
                o.message
            ],
        )?;
        for (key, value) in &o.values {
            let number = value.as_float().or_else(|| value.as_integer().map(|n| n as f64));
            let text = value.as_str().map_or_else(|| value.to_string(), String::from);
            write.execute("INSERT INTO axes VALUES (?1, ?2, ?3, ?4)", params![o.name, key, number, text])?;
        }
    }
    write.commit()
}
