//! A run that is started by the same command as often as it takes: by a launcher after a failure, or by a queue after a
//! preemption.

use super::{
    Outcome, Ranks,
    prepare::{go_on, may_change, prepare, stored_config},
    start,
};
use crate::{
    Error, Result,
    checkpoint::Store,
    comm::environment::World,
    config::{Config, ConfigText},
    report::{
        metrics::{self, Record},
        progress::Show,
    },
    state::Position,
    upscale::Origin,
};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

/// Goes on with the newest complete checkpoint of the run that a configuration names, or begins the run if there is
/// none. A run that is complete stays as it is, and that is no error.
///
/// # Errors
/// Those of a new run and of a resumed one; the configuration is not the one that the run was begun with.
pub fn train_or_resume(path: &Path, sets: &[String], show: Show) -> Result<Outcome> {
    let mut text = ConfigText::read(path, sets)?;
    let config = text.resolve()?;
    let Some((_, checkpoint)) = Store::new(&config.run).newest()? else {
        let (ranks, prepared) = Ranks::meet(|| prepare(path, sets))?;
        // What a run left that had no time for a checkpoint is of no use.
        return start(ranks, prepared, true, show);
    };
    let origin = Origin::open(&checkpoint)?;
    let stored = stored_config(&origin)?;
    if config.init.is_some() {
        text.inherit(&stored.optimizer);
    }
    let config = text.resolve()?;
    refuse_another(stored, &config)?;
    if origin.progress.position.step >= config.steps {
        return complete(config.run, checkpoint, origin.progress.position);
    }
    let (ranks, prepared) = Ranks::meet(|| go_on(origin, config))?;
    start(ranks, prepared, false, show)
}

/// How a run ended, which has nothing left to do.
fn complete(run: PathBuf, checkpoint: PathBuf, position: Position) -> Result<Outcome> {
    let (mut loss, mut validation_loss) = (f64::NAN, None);
    for record in metrics::read(&run.join(metrics::FILE_NAME))? {
        match record {
            Record::Step(step) => loss = step.loss,
            Record::Validation(validation) => validation_loss = Some(validation.loss),
            Record::Sample(_) => {}
        }
    }
    let Position { step: steps, tokens, seconds, .. } = position;
    let rank = World::detect()?.rank;
    Ok(Outcome { run, checkpoint, steps, tokens, loss, validation_loss, seconds, rank })
}

/// A run folder belongs to one configuration. What was left open is as the run has found it.
fn refuse_another(stored: &Config, config: &Config) -> Result<()> {
    let old = flat(stored);
    let differs = flat(config).into_iter().find(|(key, new)| !may_change(key) && old.get(key) != Some(new));
    let Some((key, new)) = differs else { return Ok(()) };
    let old = old.get(&key).map_or("nothing", String::as_str);
    let run = config.run.display();
    let why = format!("the run in {run} was begun with {old}: go on with that, or choose another run folder");
    Err(Error::config(key, new, why))
}

/// Every value under its key in dots.
fn flat(config: &Config) -> BTreeMap<String, String> {
    fn visit(prefix: &str, table: &toml::Table, found: &mut BTreeMap<String, String>) {
        for (key, value) in table {
            match value {
                toml::Value::Table(inner) => visit(&format!("{prefix}{key}."), inner, found),
                value => drop(found.insert(format!("{prefix}{key}"), value.to_string())),
            }
        }
    }
    let mut found = BTreeMap::new();
    visit("", &toml::Table::try_from(config).unwrap_or_default(), &mut found);
    found
}
