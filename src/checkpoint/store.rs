//! The checkpoints of a run: `RUN/checkpoints/step-00000020/`.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use super::{MANIFEST, Writer, disk::Disk, place};
use crate::{Error, Result};

const PREFIX: &str = "step-";

/// A run's folder of checkpoints, which one process at a time writes.
#[derive(Clone)]
pub struct Store {
    dir: PathBuf,
}

impl Store {
    /// The checkpoints of the run folder `run`, which need not exist yet.
    pub fn new(run: impl AsRef<Path>) -> Self {
        Self { dir: run.as_ref().join("checkpoints") }
    }

    /// The folder that holds them.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The folder of the checkpoint after `step` steps.
    pub fn path(&self, step: u64) -> PathBuf {
        self.dir.join(format!("{PREFIX}{step:08}"))
    }

    /// Begins the checkpoint after `step` steps; one of this step that is there already is replaced.
    pub fn create(&self, step: u64) -> Result<Writer> {
        Writer::create(self.path(step), true)
    }

    /// Takes part in writing the checkpoint after `step` steps: see [`Writer::join`].
    pub fn join(&self, step: u64, folder: &str) -> Result<Writer> {
        Writer::join(self.path(step), folder)
    }

    /// The complete checkpoints with their steps, oldest first.
    pub fn list(&self) -> Result<Vec<(u64, PathBuf)>> {
        let entries = match fs::read_dir(&self.dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(Error::io("read", &self.dir))?,
        };
        let mut found = Vec::new();
        for entry in entries {
            let path = entry.map_err(Error::io("read", &self.dir))?.path();
            let step = path.file_name().and_then(|name| step_of(name.to_str()?));
            if let Some(step) = step.filter(|_| path.join(MANIFEST).exists()) {
                found.push((step, path));
            }
        }
        found.sort_unstable();
        Ok(found)
    }

    /// The newest complete checkpoint, if there is one.
    pub fn newest(&self) -> Result<Option<(u64, PathBuf)>> {
        Ok(self.list()?.pop())
    }

    /// Removes all complete checkpoints but the `keep_last` newest (at least one) and, with `keep_every` = M, those
    /// whose step is a multiple of M. Gives the steps that went.
    pub fn prune(&self, keep_last: usize, keep_every: Option<u64>) -> Result<Vec<u64>> {
        let mut old = self.list()?;
        old.truncate(old.len().saturating_sub(keep_last.max(1)));
        old.retain(|&(step, _)| !keep_every.is_some_and(|every| step.is_multiple_of(every)));
        for (_, path) in &old {
            place::discard(&Disk::default(), path, path)?;
        }
        Ok(old.into_iter().map(|(step, _)| step).collect())
    }

    /// Ends what a process that died left behind: unfinished checkpoints and removals go, and a checkpoint that was
    /// being replaced gets its name back. To be called before the first checkpoint of a session.
    pub fn clean(&self) -> Result<()> {
        place::clean(&Disk::default(), &self.dir, |name| step_of(name).is_some())
    }
}

/// The step in a folder's name.
fn step_of(name: &str) -> Option<u64> {
    let digits = name.strip_prefix(PREFIX)?;
    digits.parse().ok().filter(|step| format!("{step:08}") == digits)
}
