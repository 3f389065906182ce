//! Runs: from a configuration to a trained model in a run folder.
//!
//! ```text
//! RUN/config.toml              the resolved configuration
//! RUN/metrics.jsonl            one line for each step, each validation, and each text of `[samples]`
//! RUN/events.out.tfevents.…    the same for TensorBoard
//! RUN/samples.jsonl            more texts for the report, if `mupscale generate --prompts` wrote some there
//! RUN/log.txt                  what was printed
//! RUN/checkpoints/step-…/      checkpoints
//! ```

mod again;
mod author;
mod folder;
mod model;
mod place;
mod prepare;
mod ranks;
mod samples;
mod saving;
mod session;

pub use again::train_or_resume;
pub use author::{Author, Drawing, Written, encode};
pub use model::{Evaluation, Model, tokenizer};
pub use place::{Place, Work};
pub use prepare::{Prepared, newest_checkpoint, prepare, prepare_resume};
pub use ranks::Ranks;
pub use session::{Outcome, train};

use crate::{Error, Result, ops::Ops, report::progress::Show};
use std::path::{Path, PathBuf};

/// File names in a run folder.
pub const CONFIG_FILE: &str = "config.toml";
/// The log.
pub const LOG_FILE: &str = "log.txt";
/// Algorithms that were measured for the run (`autotune`).
pub const TUNING_FILE: &str = "tuning.json";

/// Texts that a report shows beside those in the metrics.
pub const SAMPLES_FILE: &str = "samples.jsonl";

/// Trains as a configuration file says, as one of the ranks that the environment tells of.
pub fn train_file(path: &Path, sets: &[String], force: bool, show: Show) -> Result<Outcome> {
    let (ranks, prepared) = Ranks::meet(|| prepare(path, sets))?;
    start(ranks, prepared, force, show)
}

/// Goes on with a run from its newest checkpoint, with any number of ranks. `sets` may change how the run computes,
/// not what.
pub fn resume(run: &Path, sets: &[String], show: Show) -> Result<Outcome> {
    let (ranks, prepared) = Ranks::meet(|| prepare_resume(run, sets))?;
    start(ranks, prepared, false, show)
}

fn start(ranks: Ranks, prepared: Prepared, force: bool, show: Show) -> Result<Outcome> {
    Place::of_rank(&prepared.config, &ranks.world)?.run(Training { ranks, prepared, force, show })
}

struct Training {
    ranks: Ranks,
    prepared: Prepared,
    force: bool,
    show: Show,
}

impl Work for Training {
    type Output = Outcome;

    fn on<B: Ops>(self, backend: B) -> Result<Outcome> {
        train(backend, self.ranks, self.prepared, self.force, self.show)
    }

    fn refused(self, error: Error) -> Error {
        self.ranks.refuse(error)
    }
}

/// A checkpoint folder, given itself or its run's folder.
pub fn checkpoint_path(path: &Path) -> Result<PathBuf> {
    if path.join(crate::checkpoint::MANIFEST).exists() || !path.join("checkpoints").is_dir() {
        return Ok(path.into());
    }
    newest_checkpoint(path)
}
