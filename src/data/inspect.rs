//! What a text, tokenizer, file of tokens or dataset folder holds: the work behind `data inspect`.

use super::{
    dataset::{DATASET_FILE, Dataset, DatasetInfo, DatasetOptions},
    rows::RowData,
    shard::{Shard, TokenDtype},
    text::Corpus,
    tokenizer::{BYTES, Tokenizer},
};
use crate::error::Result;
use serde::Serialize;
use std::path::Path;

/// What [`inspect`] found.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Summary {
    /// A text file, JSONL file, or folder of them, read to the end.
    Text {
        /// Files with text.
        files: usize,
        /// Their size.
        file_bytes: u64,
        /// Documents that are not empty.
        documents: u64,
        /// UTF-8 in the documents.
        text_bytes: u64,
        /// The longest document, in bytes.
        longest_document: u64,
        /// The beginning of the first document.
        sample: String,
    },
    /// A tokenizer.
    Tokenizer {
        /// Every token is below this.
        vocab: usize,
        /// The token that ends a document, if there is one.
        end_of_text: Option<u32>,
    },
    /// One file of tokens, checked.
    Shard {
        /// The type of the tokens.
        dtype: TokenDtype,
        /// Whether it has llm.c's header.
        header: bool,
        /// How many tokens.
        tokens: u64,
        /// The largest of them.
        max_token: Option<u32>,
    },
    /// A folder of files of tokens, all checked.
    Dataset {
        /// Every token is below this.
        vocab: usize,
        /// Tokens to train on.
        train_tokens: u64,
        /// Tokens to validate on.
        val_tokens: u64,
        /// What `data tokenize` wrote about it.
        #[serde(skip_serializing_if = "Option::is_none")]
        info: Option<DatasetInfo>,
        /// The beginning of the training part as text, where the tokenizer is known.
        #[serde(skip_serializing_if = "Option::is_none")]
        sample: Option<String>,
    },
    /// Rows of numbers from CSV.
    Rows {
        /// How many.
        rows: usize,
        /// Numbers in a row.
        inputs: usize,
        /// The largest label + 1.
        classes: usize,
        /// Rows of each class.
        rows_per_class: Vec<u64>,
    },
}

/// Options of [`inspect`].
#[derive(Debug, Clone)]
pub struct InspectOptions {
    /// The field of JSONL lines with the text.
    pub field: String,
    /// The type of the tokens of a `.bin` file without header.
    pub dtype: Option<TokenDtype>,
    /// The label's column in a CSV file, if it is not the last.
    pub label_column: Option<String>,
}

/// Tokens and characters shown as a sample.
const SAMPLE: usize = 200;

/// Reads the whole of a path and describes it. What it is follows from its name: `.bin` is a file of tokens, `.json` a
/// tokenizer (as is the word `bytes`), `.csv` and `.tsv` rows of numbers, a folder with `dataset.json` or `.bin` files
/// a dataset, all else text.
pub fn inspect(path: &Path, options: &InspectOptions) -> Result<Summary> {
    let extension = path.extension().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
    match extension.as_str() {
        _ if path.is_dir() => {
            if holds_tokens(path) {
                inspect_dataset(path, options)
            } else {
                inspect_text(path, options)
            }
        }
        _ if path.as_os_str() == BYTES && !path.exists() => Ok(inspect_tokenizer(&Tokenizer::bytes())),
        "json" => Ok(inspect_tokenizer(&Tokenizer::load(path)?)),
        "bin" => {
            let shard = Shard::open(path, options.dtype, None)?;
            Ok(Summary::Shard {
                dtype: shard.dtype(),
                header: shard.has_header(),
                tokens: shard.tokens().len() as u64,
                max_token: shard.max_token(),
            })
        }
        "csv" | "tsv" => {
            let rows = RowData::read_csv(path, options.label_column.as_deref())?;
            let mut rows_per_class = vec![0; rows.classes];
            rows.labels.iter().for_each(|&label| rows_per_class[label as usize] += 1);
            Ok(Summary::Rows { rows: rows.rows(), inputs: rows.inputs, classes: rows.classes, rows_per_class })
        }
        _ => inspect_text(path, options),
    }
}

fn holds_tokens(folder: &Path) -> bool {
    let is_bin = |entry: std::io::Result<std::fs::DirEntry>| {
        entry.is_ok_and(|e| e.path().extension().is_some_and(|e| e == "bin"))
    };
    folder.join(DATASET_FILE).exists() || folder.read_dir().is_ok_and(|mut entries| entries.any(is_bin))
}

fn inspect_text(path: &Path, options: &InspectOptions) -> Result<Summary> {
    let corpus = Corpus::open(path, &options.field)?;
    let (mut documents, mut text_bytes, mut longest_document, mut sample) = (0, 0, 0, String::new());
    for document in corpus.documents() {
        let document = document?;
        if documents == 0 {
            sample = document.chars().take(SAMPLE).collect();
        }
        documents += 1;
        text_bytes += document.len() as u64;
        longest_document = longest_document.max(document.len() as u64);
    }
    let (files, file_bytes) = (corpus.files().len(), corpus.bytes());
    Ok(Summary::Text { files, file_bytes, documents, text_bytes, longest_document, sample })
}

fn inspect_tokenizer(tokenizer: &Tokenizer) -> Summary {
    Summary::Tokenizer { vocab: tokenizer.vocab_size(), end_of_text: tokenizer.end_of_text() }
}

fn inspect_dataset(path: &Path, options: &InspectOptions) -> Result<Summary> {
    let dataset = Dataset::open(path, &DatasetOptions { dtype: options.dtype, ..Default::default() })?;
    let sample = match &dataset.info {
        Some(info) => Some(info.load_tokenizer(path)?.decode(&dataset.train.first_tokens(SAMPLE))?),
        None => None,
    };
    Ok(Summary::Dataset {
        vocab: dataset.vocab,
        train_tokens: dataset.train.tokens(),
        val_tokens: dataset.val.map_or(0, |val| val.tokens()),
        info: dataset.info,
        sample,
    })
}
