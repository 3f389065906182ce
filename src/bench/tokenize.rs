//! MB/s of `data tokenize`, from a file of text to a dataset folder, beside the `tokenizers` crate's own batch calls on the
//! same documents in memory.

use super::{Folder, median};
use crate::{
    Error, Result,
    data::{
        Tokenizer,
        synth::{CorpusFormat, Synth},
        text::{Corpus, DEFAULT_FIELD},
        tokenize::{self, BATCH_BYTES, TokenizeOptions},
    },
};
use std::{
    fs::{self, File},
    io::{BufWriter, Write},
    path::{Path, PathBuf},
    time::Instant,
};

/// What to measure.
#[derive(Clone, Debug)]
pub struct TokenizeBench {
    /// The text; a generated corpus if left out.
    pub text: Option<PathBuf>,
    /// Size of the generated corpus.
    pub bytes: u64,
    /// A `tokenizer.json`; one is trained on the text if left out.
    pub tokenizer: Option<PathBuf>,
    /// Vocabulary of the tokenizer that is trained.
    pub vocab: usize,
    /// How often both are measured, in turns.
    pub pairs: usize,
    /// Folder for what is made, and removed at the end.
    pub folder: PathBuf,
}

/// What was measured. MB are 10⁶ bytes of UTF-8.
#[derive(Clone, Debug, serde::Serialize)]
pub struct TokenizeSpeed {
    /// Bytes of text.
    pub text_bytes: u64,
    /// Documents that they make up.
    pub documents: u64,
    /// Tokens that they become, those between documents left out.
    pub tokens: u64,
    /// The tokenizer's vocabulary.
    pub vocab: usize,
    /// Threads.
    pub threads: usize,
    /// Median speed of `data tokenize`: reading, encoding, writing, all on disk at the end.
    pub mb_per_second: f64,
    /// Median speed of the crate's `encode_batch_fast`, its fastest, on documents in memory.
    pub crate_mb_per_second: f64,
    /// Median of the pairs' ratios: ours over the crate's.
    pub ratio: f64,
    /// The ratio of each pair.
    pub ratios: Vec<f64>,
}

/// Makes what is needed, and measures in pairs, so that both see the machine in the same state.
pub fn tokenize(bench: &TokenizeBench) -> Result<TokenizeSpeed> {
    let folder = Folder::new(&bench.folder)?;
    fs::create_dir_all(&folder.0).map_err(Error::io("create", &folder.0))?;
    let text = match &bench.text {
        Some(path) => path.clone(),
        None => generated(bench.bytes, &folder.0)?,
    };
    let corpus = Corpus::open(&text, DEFAULT_FIELD)?;
    let json = match &bench.tokenizer {
        Some(path) => path.clone(),
        None => {
            let path = folder.0.join("tokenizer.json");
            tokenize::train_tokenizer(&corpus, bench.vocab, &mut |_| {})?.0.save(&path, true)?;
            path
        }
    };
    let tokenizer = Tokenizer::load(&json)?;
    let theirs = tokenizers::Tokenizer::from_file(&json).map_err(|e| Error::file(&json, e.to_string()))?;
    let documents = corpus.documents().collect::<Result<Vec<String>>>()?;
    let text_bytes: usize = documents.iter().map(String::len).sum();
    let batches = in_batches(&documents);
    let (out, options) = (folder.0.join("data"), TokenizeOptions { force: true, ..TokenizeOptions::default() });
    let (mut ours, mut crates, mut tokens) = (Vec::new(), Vec::new(), 0);
    for _ in 0..bench.pairs {
        let start = Instant::now();
        let info = tokenize::tokenize(&corpus, &tokenizer, &out, &options, &mut |_| {})?;
        ours.push(start.elapsed().as_secs_f64());
        let start = Instant::now();
        tokens = by_the_crate(&theirs, &batches)?;
        crates.push(start.elapsed().as_secs_f64());
        let ends = if info.end_of_text.is_some() { documents.len() as u64 } else { 0 };
        if info.train.tokens + info.val.tokens != tokens + ends {
            return Err(Error::Usage(format!(
                "the crate gives {tokens} tokens, data tokenize another number: report it"
            )));
        }
    }
    let ratios: Vec<f64> = crates.iter().zip(&ours).map(|(theirs, ours)| theirs / ours).collect();
    let speed = |seconds| text_bytes as f64 / median(seconds) / 1e6;
    Ok(TokenizeSpeed {
        text_bytes: text_bytes as u64,
        documents: documents.len() as u64,
        tokens,
        vocab: tokenizer.vocab_size(),
        threads: rayon::current_num_threads(),
        mb_per_second: speed(ours),
        crate_mb_per_second: speed(crates),
        ratio: median(ratios.clone()),
        ratios,
    })
}

/// A corpus of the language of seed 0.
fn generated(bytes: u64, folder: &Path) -> Result<PathBuf> {
    let path = folder.join("corpus.txt");
    let mut file = BufWriter::new(File::create(&path).map_err(Error::io("create", &path))?);
    let written = Synth::new(0).write_corpus(&mut file, 0, bytes, CorpusFormat::Text);
    written.and_then(|_| file.flush()).map_err(Error::io("write", &path))?;
    Ok(path)
}

/// The documents, divided as `data tokenize` divides them: a whole corpus at once would measure memory instead.
fn in_batches(documents: &[String]) -> Vec<Vec<&str>> {
    let (mut batches, mut bytes) = (vec![Vec::new()], 0);
    for document in documents {
        if bytes >= BATCH_BYTES {
            batches.push(Vec::new());
            bytes = 0;
        }
        bytes += document.len();
        batches.last_mut().expect("there is always one").push(document.as_str());
    }
    batches
}

/// Encodes everything by the crate's own batch call. Returns the number of tokens.
fn by_the_crate(model: &tokenizers::Tokenizer, batches: &[Vec<&str>]) -> Result<u64> {
    let mut tokens = 0;
    for batch in batches {
        let encoded = model.encode_batch_fast(batch.clone(), false);
        let encoded = encoded.map_err(|e| Error::Usage(format!("the tokenizer failed: {e}")))?;
        tokens += encoded.iter().map(|encoding| encoding.len() as u64).sum::<u64>();
    }
    Ok(tokens)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_encode_the_same_text() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().to_path_buf();
        let bench = TokenizeBench { text: None, bytes: 30_000, tokenizer: None, vocab: 300, pairs: 2, folder };
        let speed = tokenize(&bench).unwrap();
        assert!(speed.text_bytes > 29_000 && speed.tokens > 5_000 && speed.documents > 10, "{speed:?}");
        assert!(speed.mb_per_second > 0.0 && speed.ratio > 0.0 && speed.ratios.len() == 2, "{speed:?}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "something is left behind");
    }
}
