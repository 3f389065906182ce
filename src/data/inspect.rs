//! What a text, tokenizer, file of tokens or dataset folder holds: the work behind `data inspect`.

use super::{
    dataset::{DATASET_FILE, Dataset, DatasetInfo, DatasetOptions, TokenData},
    rows::RowData,
    shard::{Shard, TokenDtype},
    statistics::{Frequent, Lengths, Quantiles, Statistics},
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
        /// The beginning of the first document.
        sample: String,
        /// Bytes of a document.
        #[serde(skip_serializing_if = "Option::is_none")]
        bytes_per_document: Option<Quantiles>,
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
        /// How they are spread.
        statistics: Statistics,
    },
    /// A folder of files of tokens, all checked.
    Dataset {
        /// Every token is below this.
        vocab: usize,
        /// Tokens to train on.
        train_tokens: u64,
        /// Tokens to validate on.
        val_tokens: u64,
        /// The beginning of the training part as text, where the tokenizer is known.
        #[serde(skip_serializing_if = "Option::is_none")]
        sample: Option<String>,
        /// How its tokens and documents are spread, both parts together.
        statistics: Statistics,
        /// What `data tokenize` wrote about it.
        #[serde(skip_serializing_if = "Option::is_none")]
        info: Option<DatasetInfo>,
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

impl Summary {
    /// Takes the most frequent tokens out, to be shown as a table.
    pub fn take_most_frequent(&mut self) -> Vec<Frequent> {
        match self {
            Self::Shard { statistics, .. } | Self::Dataset { statistics, .. } => {
                std::mem::take(&mut statistics.most_frequent)
            }
            _ => Vec::new(),
        }
    }
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
                statistics: Statistics::new(shard.tokens().iter(), None, None, None)?,
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
    let (mut lengths, mut text_bytes, mut sample) = (Lengths::default(), 0, String::new());
    for document in corpus.documents() {
        let document = document?;
        if text_bytes == 0 {
            sample = document.chars().take(SAMPLE).collect();
        }
        text_bytes += document.len() as u64;
        lengths.add(document.len() as u64);
    }
    let (files, file_bytes) = (corpus.files().len(), corpus.bytes());
    let (documents, bytes_per_document) = (lengths.documents(), lengths.quantiles());
    Ok(Summary::Text { files, file_bytes, documents, text_bytes, sample, bytes_per_document })
}

fn inspect_tokenizer(tokenizer: &Tokenizer) -> Summary {
    Summary::Tokenizer { vocab: tokenizer.vocab_size(), end_of_text: tokenizer.end_of_text() }
}

fn inspect_dataset(path: &Path, options: &InspectOptions) -> Result<Summary> {
    let dataset = Dataset::open(path, &DatasetOptions { dtype: options.dtype, ..Default::default() })?;
    let info = dataset.info;
    let tokenizer = info.as_ref().map(|info| info.load_tokenizer(path)).transpose()?;
    let sample = tokenizer.as_ref().map(|t| t.decode(&dataset.train.first_tokens(SAMPLE))).transpose()?;
    // A document that is divided between the parts goes on from one to the other.
    let all = dataset.train.all().chain(dataset.val.iter().flat_map(TokenData::all));
    let (end, text_bytes) = (info.as_ref().and_then(|i| i.end_of_text), info.as_ref().map(|i| i.text_bytes));
    let statistics = Statistics::new(all, end, text_bytes, tokenizer.as_ref())?;
    Ok(Summary::Dataset {
        vocab: dataset.vocab,
        train_tokens: dataset.train.tokens(),
        val_tokens: dataset.val.as_ref().map_or(0, TokenData::tokens),
        sample,
        statistics,
        info,
    })
}
