//! Two ways to the same result, wherever the program offers them: each promise of equality is a test.
//!
//! | file | |
//! |---|---|
//! | `computing` | recomputing = keeping; N ranks = N micro-batches; any number of threads |
//! | `sharding` | ranks that each update a part = ranks that update all |
//! | `runs` | resumed = never stopped; `upscale` and then `train` = widening on the way |
//! | `generation` | token by token = all at once = the loss of training |
//! | `noise` | paired noise keeps the function |
//! | `finite` | a step that is not finite changes nothing |
//! | `coordinates` | under μP what training changes does not grow with width |

#[path = "../common/mod.rs"]
mod common;

mod computing;
mod coordinates;
mod finite;
mod generation;
mod noise;
mod run_folder;
mod runs;
mod sharding;
