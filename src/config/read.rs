//! Reading a configuration: TOML, `--set key=value`, and errors that name the key and the nearest known one.

use super::{Config, OptimizerConfig, OptimizerKind, ScheduleKind};
use crate::{Error, Result};
use std::path::{Path, PathBuf};

/// A configuration as it was written, `--set` applied, before defaults.
pub struct ConfigText {
    table: toml::Table,
    origin: PathBuf,
}

impl ConfigText {
    /// Reads a file and applies `--set` assignments.
    pub fn read(path: &Path, sets: &[String]) -> Result<Self> {
        let text = std::fs::read(path).map_err(Error::io("read", path))?;
        let text = String::from_utf8(text)
            .map_err(|e| Error::file(path, format!("not UTF-8 text at byte {}", e.utf8_error().valid_up_to())))?;
        Self::parse(&text, sets, path)
    }

    /// Reads TOML text; `origin` is named in errors.
    pub fn parse(text: &str, sets: &[String], origin: &Path) -> Result<Self> {
        let mut table: toml::Table = text.parse().map_err(|e: toml::de::Error| Error::file(origin, e.to_string()))?;
        for assignment in sets {
            set_value(&mut table, assignment)?;
        }
        Ok(Self { table, origin: origin.into() })
    }

    /// Lets the optimizer's keys that were not written be those of `optimizer`: a run that starts from a checkpoint goes
    /// on as the checkpoint's run did.
    pub fn inherit(&mut self, optimizer: &OptimizerConfig) {
        let Ok(theirs) = toml::Table::try_from(optimizer) else { return };
        let ours = self.table.entry("optimizer").or_insert_with(|| toml::Value::Table(toml::Table::new()));
        let Some(ours) = ours.as_table_mut() else { return };
        for (key, value) in theirs {
            ours.entry(key).or_insert(value);
        }
    }

    /// The configuration: known keys only, defaults filled in, values checked.
    pub fn resolve(&self) -> Result<Config> {
        // Written out and read again, so that errors show the line as it is after --set.
        let text = toml::to_string_pretty(&self.table).map_err(|e| Error::file(&self.origin, e.to_string()))?;
        let config: Config = toml::from_str(&text).map_err(|e| Error::file(&self.origin, explain(&e)))?;
        config.check()?;
        Ok(config)
    }
}

impl Config {
    /// The configuration as TOML.
    pub fn to_toml(&self) -> String {
        toml::to_string_pretty(self).expect("a configuration is plain data")
    }

    /// Refuses values that no run can have.
    pub fn check(&self) -> Result<()> {
        let o = &self.optimizer;
        let positive = |field: &str, value: f64| {
            if value > 0.0 && value.is_finite() {
                Ok(())
            } else {
                Err(Error::config(field, value, "must be a positive number"))
            }
        };
        let not_negative = |field: &str, value: f64| {
            if value >= 0.0 && value.is_finite() {
                Ok(())
            } else {
                Err(Error::config(field, value, "must be 0 or a positive number"))
            }
        };
        let fraction = |field: &str, value: f64| {
            if (0.0..1.0).contains(&value) {
                Ok(())
            } else {
                Err(Error::config(field, value, "must be at least 0 and below 1"))
            }
        };
        not_negative("optimizer.lr", o.lr)?;
        positive("optimizer.eps", o.eps)?;
        positive("optimizer.muon_eps", o.muon_eps)?;
        not_negative("optimizer.weight_decay", o.weight_decay)?;
        not_negative("optimizer.clip", o.clip)?;
        fraction("optimizer.momentum", o.momentum)?;
        fraction("optimizer.dampening", o.dampening)?;
        for beta in o.betas.into_iter().flatten() {
            fraction("optimizer.betas", beta)?;
        }
        if o.amsgrad && !matches!(o.kind, OptimizerKind::Adam | OptimizerKind::AdamW) {
            return Err(Error::config("optimizer.amsgrad", true, "only adam and adamw have it"));
        }
        if o.nesterov && (o.momentum == 0.0 || o.dampening != 0.0) {
            return Err(Error::config("optimizer.nesterov", true, "needs a momentum and no dampening"));
        }
        fraction("data.validation_fraction", self.data.validation_fraction)?;
        if !(0.0..=1.0).contains(&self.schedule.end) {
            return Err(Error::config("schedule.final", self.schedule.end, "must be between 0 and 1"));
        }
        if self.schedule.decay.is_some() && self.schedule.kind != ScheduleKind::Wsd {
            return Err(Error::config("schedule.decay", "set", "only kind = \"wsd\" has it"));
        }
        for (field, value) in [("batch.size", self.batch.size), ("batch.micro_batches", self.batch.micro_batches)] {
            if value == 0 || value > 1 << 20 {
                return Err(Error::config(field, value, "must be between 1 and 1048576"));
            }
        }
        if self.comm.timeout == 0 || self.comm.timeout > 1 << 30 {
            let why = "must be at least 1: seconds";
            return Err(Error::config("comm.timeout", self.comm.timeout, why));
        }
        if self.memory.limit > usize::MAX >> 20 {
            return Err(Error::config(
                "memory.limit",
                self.memory.limit,
                "is more than this machine can address (MiB)",
            ));
        }
        if self.run.as_os_str().is_empty() {
            return Err(Error::config("run", "\"\"", "must name the folder that the run writes, for example runs/one"));
        }
        if self.steps == 0 {
            return Err(Error::config("steps", 0, "must be 1 or more"));
        }
        Ok(())
    }
}

/// Keys whose values are names, even where a name looks like a number: `--set run=1`.
const NAMES: [&str; 5] = ["run", "data.path", "data.labels", "data.label_column", "init.from"];

/// Applies `key=value`: the key is dotted, the value TOML, or else a string.
pub fn set_value(table: &mut toml::Table, assignment: &str) -> Result<()> {
    let Some((key, value)) = assignment.split_once('=') else {
        return Err(Error::config("--set", assignment, "must be key=value, for example --set optimizer.lr=0.002"));
    };
    let value = format!("v = {value}").parse::<toml::Table>().ok().and_then(|mut t| t.remove("v"));
    let names = NAMES.contains(&key.trim());
    let value = value.filter(|value| !names || value.is_str());
    let value = value.unwrap_or_else(|| toml::Value::String(assignment[key.len() + 1..].into()));
    let mut parts: Vec<&str> = key.trim().split('.').collect();
    let last = parts.pop().unwrap_or_default();
    let mut here = table;
    for part in parts {
        let entry = here.entry(part).or_insert_with(|| toml::Value::Table(toml::Table::new()));
        let Some(next) = entry.as_table_mut() else {
            return Err(Error::config("--set", assignment, format!("{part} is a value, not a section")));
        };
        here = next;
    }
    here.insert(last.into(), value);
    Ok(())
}

/// serde's message, with the nearest known key or value where one was not known.
fn explain(error: &toml::de::Error) -> String {
    let message = error.message();
    let text = error.to_string();
    let mut names = message.split('`').skip(1).step_by(2);
    let known = message.starts_with("unknown field") || message.starts_with("unknown variant");
    match names.next() {
        Some(unknown) if known => {
            let likeness = |name: &&str| strsim::jaro_winkler(unknown, name);
            let near = names.filter(|name| likeness(name) > 0.5).max_by(|a, b| likeness(a).total_cmp(&likeness(b)));
            near.map_or(text.clone(), |near| format!("{}\ndid you mean `{near}`?", text.trim_end()))
        }
        _ => text,
    }
}
