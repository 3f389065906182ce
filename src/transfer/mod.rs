//! Transfer: hyperparameters tuned on small upscales, used unchanged on large ones, with the evidence.
//!
//! | file | |
//! |---|---|
//! | [`widths`] | one configuration at many widths |
//! | [`coordinates`] | the coordinate check: do changes of activations grow with width? |
//! | [`fit`] | the optimum of a swept axis, and how sure it is |
//! | [`growth`] | growth operators side by side |
//! | [`plan`] | what a training will take, before it is begun |
//! | [`recipe`] | tune small, use large: sweeps, the optimum, the large upscale, the report |
//! | [`sweep`] | many runs over axes of hyperparameters, packed on what there is, resumable |

pub mod coordinates;
pub mod fit;
pub mod growth;
pub mod plan;
pub mod recipe;
pub mod sweep;
pub mod widths;
