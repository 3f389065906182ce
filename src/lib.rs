//! mupscale trains a small transformer, widens it exactly - weights *and* optimizer state -, and goes on training. The
//! wide model trains as the narrow one would, step for step, until noise breaks the symmetry between the copies of a
//! unit. Hyperparameters follow μP (arXiv 2203.03466), so those that were tuned on a small upscale hold for a large one
//! (arXiv 2602.10545).
//!
//! # The map
//!
//! ```text
//! Args → Config → tokens (mapped) → Batch → forward → loss → backward → sum over ranks → optimizer → checkpoint
//! source checkpoint → factors(table row, narrow shape, wide shape) → ops::expand → State → the same loop
//! ```
//!
//! [`state::State`] is the meeting point. It is born by initialisation, by resuming, or by widening, and
//! [`trainer::Trainer`] cannot tell which.
//!
//! | layer | modules | what they know |
//! |---|---|---|
//! | 0 | [`dims`], [`dtype`], [`error`], [`rng`], [`machine`], [`trace`] | axes by name, element types, what can fail, random numbers, the system, where time goes |
//! | 1 | [`backend`] (cpu, cuda), [`comm`] | a device's memory, streams, copies; how kernels load and launch; sums between ranks |
//! | 2 | [`ops`] | one stem an operation: contract, CPU code, tests, launcher; its device code is `kernels/` of the same stem |
//! | 3 | [`model`], [`mup`] | the parameter table, forward and backward; factors as pure arithmetic |
//! | 4 | [`config`], [`optim`], [`schedule`], [`data`], [`feed`], [`checkpoint`], [`state`], [`upscale`], [`widen`] | what the user asked for; samples; files; loading and widening |
//! | 5 | [`trainer`], [`report`], [`run`] | one step; what people and scripts see; a run folder |
//! | 6 | [`quickstart`], [`bench`], [`selftest`], [`commands`] | the method on one example; speed; a device against the CPU; the command line |
//!
//! Imports point downward (`tests/tidy.rs` holds them to it). `ops` knows no model, `mup` no device, `model` no file,
//! `comm` no parameter.
//!
//! # Invariants
//!
//! - A parameter is one row of [`model::param::Table`], made of named axes. Its kind, multipliers, initial values, weight
//!   decay, layout and checkpoint name follow from that row; no code knows a parameter by number or by a pattern.
//! - Device memory is opaque ([`backend`]): only an operation's CPU code sees it as a slice. A kernel is declared once
//!   ([`backend::cuda`], `kernels!`), and is run in the tests on an emulated GPU (`tests/emulator`).
//! - What changes from step to step lies in device memory ([`ops::scalars`]); a step allocates nothing and waits for
//!   nothing. Its results are read some steps late, and a step that is not finite changes no weight.
//! - Results do not depend on the number of threads, nor on how tensors are cut; those of a power of two of ranks are
//!   those of one rank with as many micro-batches, bit for bit.
//! - Random numbers are functions of (seed, name, index); the order of samples of (seed, index).
//! - A checkpoint is complete or not there, knows nothing of ranks or devices, and is distrusted when read.
//!
//! # To add
//!
//! An operation: `ops/x.rs` with its trait, its CPU code and its tests, its name in [`ops::Ops`], `kernels/x.cu`,
//! `ops/x/cuda.rs` that launches it, and `selftest/x.rs` that compares both. An architecture: a
//! choice of a decoder's parts (as [`model::gpt2`] is), or a file with table, plan, forward and backward (as
//! [`model::mlp`] is) and a variant of [`model::spec::Spec`]; then a line in `tests/common`, over whose models the
//! gradient, widening, resume and rank tests run. Anything else that must change is a flaw in the table.
//!
//! # Absent on purpose
//!
//! Tensor, pipeline and context parallelism, ZeRO-2 and 3, offload, mixture of experts, dropout. The README names the
//! closest alternatives.

pub mod backend;
pub mod bench;
pub mod checkpoint;
pub mod comm;
pub mod commands;
pub mod config;
pub mod data;
pub mod dims;
pub mod dtype;
pub mod error;
pub mod feed;
pub mod machine;
pub mod model;
pub mod mup;
pub mod ops;
pub mod optim;
pub mod quickstart;
pub mod report;
pub mod rng;
pub mod run;
pub mod schedule;
pub mod selftest;
pub mod state;
pub mod trace;
pub mod trainer;
pub mod upscale;
pub mod widen;

pub use dtype::DType;
pub use error::{Error, Result};
