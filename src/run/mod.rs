//! Runs: from a configuration to a trained model in a run folder.
//!
//! ```text
//! RUN/config.toml              the resolved configuration
//! RUN/metrics.jsonl            one line for each step and each validation
//! RUN/events.out.tfevents.…    the same for TensorBoard
//! RUN/samples.jsonl            texts for the report, if `mupscale generate --prompts` wrote some there
//! RUN/log.txt                  what was printed
//! RUN/checkpoints/step-…/      checkpoints
//! ```

mod model;
mod place;
mod prepare;
mod session;

pub use model::{Evaluation, Model, tokenizer};
pub use place::{Place, Work};
pub use prepare::{Prepared, newest_checkpoint, prepare, prepare_resume};
pub use session::{Outcome, train};

use crate::{Result, config::Config, ops::Ops, report::progress::Show};
use std::path::{Path, PathBuf};

/// File names in a run folder.
pub const CONFIG_FILE: &str = "config.toml";
/// The log.
pub const LOG_FILE: &str = "log.txt";

/// Texts that a report shows.
pub const SAMPLES_FILE: &str = "samples.jsonl";

/// Trains as a configuration file says.
pub fn train_file(path: &Path, sets: &[String], force: bool, show: Show) -> Result<Outcome> {
    start(prepare(path, sets)?, force, show)
}

/// Goes on with a run from its newest checkpoint. `sets` may change how the run computes, not what.
pub fn resume(run: &Path, sets: &[String], show: Show) -> Result<Outcome> {
    start(prepare_resume(run, sets)?, false, show)
}

fn start(prepared: Prepared, force: bool, show: Show) -> Result<Outcome> {
    let Config { device, precision, threads, eager, .. } = prepared.config;
    Place { device, precision, threads, eager }.run(Training { prepared, force, show })
}

struct Training {
    prepared: Prepared,
    force: bool,
    show: Show,
}

impl Work for Training {
    type Output = Outcome;

    fn on<B: Ops>(self, backend: B) -> Result<Outcome> {
        train(backend, self.prepared, self.force, self.show)
    }
}

/// A checkpoint folder, given itself or its run's folder.
pub fn checkpoint_path(path: &Path) -> Result<PathBuf> {
    if path.join(crate::checkpoint::MANIFEST).exists() || !path.join("checkpoints").is_dir() {
        return Ok(path.into());
    }
    newest_checkpoint(path)
}
