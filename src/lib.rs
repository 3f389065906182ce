//! mupscale
pub mod backend;
pub mod config;
pub mod dims;
pub mod dtype;
pub mod error;
pub mod model;
pub mod mup;
pub mod ops;
pub mod report;
pub mod rng;
pub use dtype::DType;
pub use error::{Error, Result};
