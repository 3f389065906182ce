//! From text or numbers on disk to batches on the host.
//!
//! ```text
//! text files, folders, JSONL, packed or not ──text──▶ documents ──tokenizer──▶ token ids ──tokenize──▶ shards on disk
//! shards ──shard (mapped)──▶ dataset::TokenData ──order──▶ dataset::TokenBatch     (language models)
//! CSV or .npy ──rows──▶ rows::RowData ──order──▶ rows::RowBatch                    (the mlp)
//! ```
//!
//! | file | what it holds |
//! |---|---|
//! | `text` | where documents come from: UTF-8 files, folders of them, JSONL |
//! | `packed` | gzip, Zstandard and standard input as they are read |
//! | `tokenizer` | raw bytes, or any `tokenizer.json`; training of byte-level BPE |
//! | `tokenize` | the commands: text to a dataset folder, training a tokenizer |
//! | `inspect` | what a text, tokenizer, shard or dataset folder holds, for people and scripts |
//! | `statistics` | how the documents and tokens of a corpus are spread |
//! | `shard` | files of tokens: llm.c's `.bin` in 16 and 32 bits, nanoGPT's without a header |
//! | `dataset` | shards as windows of tokens; filling batches; training and validation part |
//! | `rows` | rows of numbers with a class each |
//! | `synth` | a corpus of known entropy |
//! | `order` | which sample comes when: a pure function of (seed, global sample index) |
//! | `output` | files and folders that appear whole or not at all |
//!
//! Invariants: nothing read from disk is trusted before it is checked; the order of samples holds no state, so a run
//! that resumes neither repeats nor skips; filling a batch allocates nothing.

pub mod dataset;
pub mod inspect;
pub(crate) mod mapped;
pub mod order;
pub mod output;
pub mod packed;
pub mod rows;
pub mod shard;
pub mod statistics;
pub mod synth;
pub mod text;
pub mod tokenize;
pub mod tokenizer;

pub use dataset::{Dataset, TokenBatch, TokenData};
pub use order::Order;
pub use rows::{RowBatch, RowData};
pub use tokenizer::Tokenizer;
