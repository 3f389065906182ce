//! The folder of a new run: made, or an earlier run's made empty.

use super::{CONFIG_FILE, LOG_FILE};
use crate::{
    Error, Result,
    checkpoint::Store,
    report::{metrics, tensorboard},
};
use std::{fs, path::Path};

/// A run folder that is made anew must not hold the checkpoint that the run starts from.
pub(super) fn refuse_run_around_source(run: &Path, from: &Path) -> Result<()> {
    match (fs::canonicalize(run), fs::canonicalize(from)) {
        (Ok(folder), Ok(source)) if source.starts_with(&folder) => {
            let why = format!("lies in the run folder {} that would be made anew: choose another run", run.display());
            Err(Error::config("init.from", from.display(), why))
        }
        _ => Ok(()),
    }
}

/// Makes the run folder. One that exists and is not empty needs `force`, which removes an earlier run, and nothing
/// that no run made.
pub(super) fn new_run_folder(run: &Path, force: bool) -> Result<()> {
    let mut entries = match fs::read_dir(run) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return fs::create_dir_all(run).map_err(Error::io("create", run));
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotADirectory => {
            return Err(Error::config("run", run.display(), "is, or lies in, a file: choose another name"));
        }
        Err(e) => return Err(Error::io("read", run)(e)),
    };
    let first = entries.next();
    // All that a run that was killed at its very beginning left behind.
    let begun = |entry: &fs::DirEntry| fs::read_dir(entry.path()).is_ok_and(|mut inside| inside.next().is_none());
    match (first, entries.next()) {
        (None, _) => return Ok(()),
        (Some(Ok(entry)), None) if entry.path() == Store::new(run).dir() && begun(&entry) => return Ok(()),
        _ => {}
    }
    if !force {
        return Err(Error::Exists { path: run.into() });
    }
    let checkpoints = Store::new(run).dir().to_path_buf();
    if !run.join(CONFIG_FILE).is_file() || !checkpoints.is_dir() {
        let why = format!(
            "is a folder that no run made (it has no {CONFIG_FILE} or no checkpoints/): --force does not replace it; choose another name"
        );
        return Err(Error::file(run, why));
    }
    fs::remove_dir_all(&checkpoints).map_err(Error::io("remove", &checkpoints))?;
    tensorboard::remove(run)?;
    for name in [metrics::FILE_NAME, LOG_FILE, CONFIG_FILE] {
        let path = run.join(name);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(Error::io("remove", &path)(e)),
            _ => {}
        }
    }
    Ok(())
}
