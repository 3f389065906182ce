//! What of a step is recorded and replayed.

use super::Trainer;
use crate::{Result, config::Recording, ops::Ops};
use std::mem;

/// Micro-batches of a step that is recorded whole, at most: recording takes the host's time and the graph the driver's
/// memory, some hundred kernels for each.
const MOST_BATCHES: usize = 64;

/// Floating-point operations of such a step's micro-batch, at most: 10 ms at 440 TFLOP/s. Beyond that, the microseconds
/// between one graph and the next are less than a thousandth.
const MOST_OPERATIONS: f64 = (1u64 << 42) as f64;

/// Numbers that such a step's micro-batches take in, at most: as tokens 32 MiB for each part of the feed's ring, which
/// holds a step.
const MOST_INPUTS: usize = 1 << 23;

/// Work that is recorded. Its kernels' arguments follow from what is written here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Work {
    /// All micro-batches of a step, in a part of the feed's ring, and the update.
    Step {
        /// Of the feed's ring.
        part: usize,
    },
    /// A micro-batch.
    Micro {
        /// Of the feed's ring.
        part: usize,
        /// Sums of gradients on the stack before.
        top: usize,
        /// Sums that are added afterwards.
        merges: usize,
        /// The step's last, after which the sum is handed to the update.
        last: bool,
    },
    /// The update.
    Update,
}

/// Whether whole steps are recorded: `batches` micro-batches of `rows` tokens, each `inputs` numbers, by one of `world`
/// ranks, and a network of so many `elements`.
///
/// With several ranks none is, as hosts have a part in the sums over them. Operations are counted roughly: 6 for each
/// element and token (arXiv 2001.08361, section 2.1), attention left out.
pub(super) fn whole_steps(
    choice: Recording,
    world: usize,
    batches: usize,
    elements: usize,
    rows: usize,
    inputs: usize,
) -> bool {
    let few = batches <= MOST_BATCHES && batches.saturating_mul(rows).saturating_mul(inputs) <= MOST_INPUTS;
    let small = few && 6.0 * elements as f64 * rows as f64 <= MOST_OPERATIONS;
    match choice {
        Recording::Auto => world == 1 && small,
        Recording::Step => world == 1,
        Recording::Micro | Recording::None => false,
    }
}

impl<B: Ops> Trainer<B> {
    /// Lets what was recorded be recorded anew, as it would be computed in another way now.
    pub fn forget_recordings(&mut self) {
        self.graphs.clear();
    }

    /// Does some work, or replays it.
    pub(super) fn recorded(&mut self, work: Work, run: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        // Taken out, so that the work has the trainer for itself.
        let mut graph = mem::take(self.graphs.entry(work).or_default());
        let done = self.backend.begin(&mut graph).and_then(|now| {
            if now {
                let worked = run(self);
                self.backend.end(&mut graph, worked)?;
            }
            Ok(())
        });
        self.graphs.insert(work, graph);
        done
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_steps_are_those_of_small_models_on_one_rank() {
        let proxy = |choice, world| whole_steps(choice, world, 8, 5_300_000, 2048, 1);
        assert!(proxy(Recording::Auto, 1) && proxy(Recording::Step, 1));
        assert!(!proxy(Recording::Micro, 1) && !proxy(Recording::None, 1));
        assert!(!proxy(Recording::Auto, 2) && !proxy(Recording::Step, 2));
        let gpt2 = |choice| whole_steps(choice, 1, 1, 124_000_000, 32 * 1024, 1);
        assert!(!gpt2(Recording::Auto) && gpt2(Recording::Step));
        assert!(!whole_steps(Recording::Auto, 1, 65, 5_300_000, 2048, 1));
        assert!(!whole_steps(Recording::Auto, 1, 8, 10_000, 2048, 3072));
    }
}
