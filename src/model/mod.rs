//! Models.
pub mod param;
