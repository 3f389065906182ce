//! What a person and a script see of a run; knows no device and no model.
//!
//! | file | what it holds |
//! |---|---|
//! | [`metrics`] | `metrics.jsonl`: one [`metrics::Record`] a line, the source of every later picture or table |
//! | [`tensorboard`] | the same numbers as event files for TensorBoard |
//! | [`progress`] | bars on a terminal, plain lines elsewhere, on standard error |
//! | [`chart`] | line charts as one self-contained SVG (`axis` holds its scales and ticks) |
//! | [`page`] | runs as one self-contained HTML page |
//! | [`screen`] | a run under way as a screen of text |
//! | [`table`] | text tables with aligned columns |
//! | [`human`] | numbers for people: bytes, counts, durations, rates |
//!
//! Standard output is for results, standard error for progress.

mod axis;
pub mod chart;
pub mod human;
pub mod metrics;
pub mod page;
pub mod progress;
pub mod screen;
pub mod table;
pub mod tensorboard;
