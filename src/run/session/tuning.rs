//! Algorithms that were measured for a run: the same on all its ranks, and after a stop.

use super::Session;
use crate::{
    Error, Result,
    ops::Ops,
    run::{TUNING_FILE, ranks::agree},
    trainer::Trainer,
};
use std::{fs, path::Path};

/// Goes on with the algorithms that the run has used so far.
pub(super) fn take_over<B: Ops>(backend: &B, run: &Path) -> Result<()> {
    let path = run.join(TUNING_FILE);
    if !path.exists() {
        return Ok(());
    }
    let text = fs::read_to_string(&path).map_err(Error::io("read", &path))?;
    if !backend.tune(&text) {
        tracing::warn!(
            "{}: measured on another device or with another library: measured anew, results may differ in their last bits",
            path.display()
        );
    }
    Ok(())
}

impl<B: Ops> Session<B> {
    /// After the first step of several ranks: rank 0 measures the products that it used, and the others take its choice.
    /// Each for itself would choose another, which adds in another order, and their weights would part.
    pub(super) fn choose_algorithms(&mut self) -> Result<()> {
        let Trainer { backend, comm, .. } = &self.trainer;
        if self.begun != 1 || !self.config.autotune || comm.world() == 1 {
            return Ok(());
        }
        let rank = comm.rank();
        agree(&**comm, if rank == 0 { backend.measure() } else { Ok(()) })?;
        let all = comm.exchange(backend.tuning().unwrap_or_default().as_bytes())?;
        let taken = rank == 0 || backend.tune(&String::from_utf8_lossy(&all[0]));
        let why =
            || format!("rank {rank} has another GPU or cuBLASLt than rank 0, which measures for all: leave it out");
        agree(&**comm, if taken { Ok(()) } else { Err(Error::config("autotune", true, why())) })?;
        // A step of many micro-batches records some of them already.
        self.trainer.forget_recordings();
        let backend = &self.trainer.backend;
        tracing::debug!("algorithms: {}", backend.tuning().unwrap_or_default());
        Ok(())
    }
}
