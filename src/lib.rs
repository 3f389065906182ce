//! mupscale
pub mod backend;
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
pub mod report;
pub mod rng;
pub mod run;
pub mod schedule;
pub mod state;
pub mod trainer;
pub mod upscale;

pub use dtype::DType;
pub use error::{Error, Result};
