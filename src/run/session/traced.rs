//! The trace of some steps of a run, over all its ranks.

use super::Session;
use crate::{Result, ops::Ops, run::ranks::agree, trace};

impl<B: Ops> Session<B> {
    /// Before a step: begins the trace that was asked for, or ends it.
    pub(super) fn trace(&mut self) -> Result<()> {
        let Some(request) = trace::requested() else { return Ok(()) };
        if self.begun == *request.steps.0.start() {
            // What is under way would be seen in part only.
            self.flush()?;
            // A file that cannot be written is found before there is something to lose.
            let file = if self.files.is_some() { trace::write(&request.file, &[]) } else { Ok(()) };
            agree(&*self.trainer.comm, file)?;
            trace::begin();
        } else if self.begun > *request.steps.0.end() {
            self.end_trace()?;
        }
        Ok(())
    }

    /// Ends the trace, if there is one under way, and lets rank 0 write it.
    pub(super) fn end_trace(&mut self) -> Result<()> {
        let Some(request) = trace::requested() else { return Ok(()) };
        if !trace::is_on() {
            if self.begun < *request.steps.0.start() {
                self.say(&format!("no trace: {} steps were made, --trace-steps is {}", self.begun, request.steps));
            }
            return Ok(());
        }
        self.flush()?;
        let trainer = &self.trainer;
        let mine = trace::end(trainer.comm.rank(), &trainer.backend.describe());
        let all = trainer.comm.exchange(mine.as_bytes())?;
        let written = if self.files.is_some() { trace::write(&request.file, &all) } else { Ok(()) };
        agree(&*trainer.comm, written)?;
        self.say(&format!("the trace of {} steps is in {}", request.steps, request.file.display()));
        Ok(())
    }
}
