use super::*;
use crate::data::{
    dataset::{BatchRules, Dataset, DatasetOptions, TokenBatch},
    inspect::{InspectOptions, Summary, inspect},
    order::is_held_out,
    text::DEFAULT_FIELD,
};
use std::path::PathBuf;
use tempfile::TempDir;

/// A folder with `text.txt`, which holds `documents` documents.
fn corpus(documents: usize) -> (TempDir, Corpus) {
    let dir = tempfile::tempdir().unwrap();
    let text: String = (0..documents).map(|i| format!("document {i} of the wide model\n<|endoftext|>\n")).collect();
    fs::write(dir.path().join("text.txt"), text).unwrap();
    let corpus = Corpus::open(&dir.path().join("text.txt"), DEFAULT_FIELD).unwrap();
    (dir, corpus)
}

fn run(corpus: &Corpus, tokenizer: &Tokenizer, out: &Path, options: &TokenizeOptions) -> Result<DatasetInfo> {
    tokenize(corpus, tokenizer, out, options, &mut |_| {})
}

fn inspected(path: impl Into<PathBuf>) -> Summary {
    let options = InspectOptions { field: DEFAULT_FIELD.into(), dtype: None, label_column: None };
    inspect(&path.into(), &options).unwrap()
}

#[test]
fn text_becomes_a_dataset_whose_tokens_decode_to_the_documents() {
    let (dir, corpus) = corpus(100);
    let mut stages = Vec::new();
    let (tokenizer, made) = train_tokenizer(&corpus, 300, &mut |p| stages.push(p)).unwrap();
    assert_eq!((made.vocab, made.vocab_asked), (tokenizer.vocab_size(), 300));
    assert!(stages.len() == 100 && stages.iter().all(|p| p.done <= p.total && p.stage == "counting words"));

    let out = dir.path().join("dataset");
    let options = TokenizeOptions { shard_tokens: 400, ..Default::default() };
    let mut last = None;
    let info = tokenize(&corpus, &tokenizer, &out, &options, &mut |p| last = Some(p)).unwrap();
    assert_eq!(last.map(|p| p.done), Some(corpus.bytes()));
    assert_eq!((info.split, info.train.documents, info.val.documents), (SplitKind::Documents, 95, 5));
    assert!(info.train.shards.len() > 1);
    assert_eq!(DatasetInfo::read(&out).unwrap().unwrap(), info);

    let dataset = Dataset::open(&out, &DatasetOptions::default()).unwrap();
    assert_eq!((dataset.train.tokens(), dataset.vocab), (info.train.tokens, 300.min(tokenizer.vocab_size())));
    let val = dataset.val.unwrap();
    let mut batch = TokenBatch::new(1, val.tokens() as usize - 1);
    val.fill_consecutive(0, &BatchRules::default(), &mut batch);
    let ids: Vec<u32> = batch.inputs.iter().map(|&id| id as u32).collect();
    let held_out: String = (0..100)
        .filter(|&i| is_held_out(i, 0.05))
        .map(|i| format!("document {i} of the wide model\n<|endoftext|>"))
        .collect();
    let loaded = info.load_tokenizer(&out).unwrap();
    assert_eq!(loaded.decode(&ids).unwrap() + "<|endoftext|>", held_out);
}

#[test]
fn few_documents_are_split_at_the_tail() {
    let (dir, corpus) = corpus(3);
    let out = dir.path().join("dataset");
    let options = TokenizeOptions { val_fraction: 0.1, ..Default::default() };
    let info = run(&corpus, &Tokenizer::bytes(), &out, &options).unwrap();
    let total = 3 * "document 0 of the wide model\n".len() as u64;
    assert_eq!((info.split, info.train.tokens, info.val.tokens), (SplitKind::Tail, total - 9, 9));
    assert_eq!((info.train.documents, info.val.documents), (2, 1));
    assert_eq!((info.tokenizer.as_str(), info.vocab, info.end_of_text), ("bytes", 256, None));
    assert!(!out.join(TOKENIZER_FILE).exists());
    let Summary::Dataset { sample, train_tokens, val_tokens, statistics, .. } = inspected(&out) else {
        panic!("not a dataset")
    };
    assert!(sample.unwrap().starts_with("document 0 of"));
    assert_eq!((train_tokens, val_tokens), (total - 9, 9));
    // Bytes: each is a token, and none ends a document.
    assert_eq!((statistics.bytes_per_token, statistics.documents), (Some(1.0), None));
    assert_eq!(statistics.most_frequent[0].text.as_deref(), Some(" "));
}

#[test]
fn without_a_fraction_everything_is_for_training() {
    let (dir, corpus) = corpus(30);
    let options = TokenizeOptions { val_fraction: 0.0, ..Default::default() };
    let info = run(&corpus, &Tokenizer::bytes(), &dir.path().join("dataset"), &options).unwrap();
    assert_eq!((info.split, info.train.documents, info.val), (SplitKind::None, 30, PartInfo::default()));
    let bad = TokenizeOptions { val_fraction: 0.9, ..Default::default() };
    assert!(run(&corpus, &Tokenizer::bytes(), &dir.path().join("other"), &bad).is_err());
}

#[test]
fn an_existing_output_is_kept_without_force_and_after_a_failure() {
    let (dir, corpus) = corpus(30);
    let out = dir.path().join("dataset");
    let force = TokenizeOptions { force: true, ..Default::default() };
    let first = run(&corpus, &Tokenizer::bytes(), &out, &Default::default()).unwrap();
    assert!(matches!(run(&corpus, &Tokenizer::bytes(), &out, &Default::default()), Err(Error::Exists { .. })));
    fs::write(dir.path().join("bad.txt"), b"good, then bad \xff").unwrap();
    let bad = Corpus::open(&dir.path().join("bad.txt"), DEFAULT_FIELD).unwrap();
    assert_eq!(run(&bad, &Tokenizer::bytes(), &out, &force).unwrap_err().exit_code(), 2);
    assert_eq!(DatasetInfo::read(&out).unwrap(), Some(first));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 3, "the partial folder is gone");

    let (_other_dir, other) = super::tests::corpus(40);
    let second = run(&other, &Tokenizer::bytes(), &out, &force).unwrap();
    assert_eq!(DatasetInfo::read(&out).unwrap(), Some(second));
}

#[test]
fn output_around_the_input_and_empty_text_are_refused() {
    let (dir, corpus) = corpus(30);
    fs::write(dir.path().join(DATASET_FILE), "{}").unwrap();
    let force = TokenizeOptions { force: true, ..Default::default() };
    let error = run(&corpus, &Tokenizer::bytes(), dir.path(), &force).unwrap_err().to_string();
    assert!(error.contains("lies in it"), "{error}");
    fs::write(dir.path().join("empty.txt"), " \n").unwrap();
    let empty = Corpus::open(&dir.path().join("empty.txt"), DEFAULT_FIELD).unwrap();
    let error = run(&empty, &Tokenizer::bytes(), &dir.path().join("out"), &force).unwrap_err();
    assert!(error.exit_code() == 2 && error.to_string().contains("nothing to tokenize"), "{error}");
    assert!(train_tokenizer(&empty, 300, &mut |_| {}).is_err());
}

#[test]
fn a_dataset_with_a_missing_or_foreign_shard_is_refused() {
    let (dir, corpus) = corpus(30);
    let out = dir.path().join("dataset");
    run(&corpus, &Tokenizer::bytes(), &out, &Default::default()).unwrap();
    fs::copy(out.join("val_000000.bin"), out.join("train_000000.bin")).unwrap();
    let error = Dataset::open(&out, &Default::default()).unwrap_err().to_string();
    assert!(error.contains("train_000000.bin: holds"), "{error}");
    fs::remove_file(out.join("train_000000.bin")).unwrap();
    let error = Dataset::open(&out, &Default::default()).unwrap_err();
    assert!(error.exit_code() == 2 && error.to_string().contains("train_000000.bin"), "{error}");
}

#[test]
fn everything_can_be_inspected() {
    let (dir, corpus) = corpus(30);
    let out = dir.path().join("dataset");
    let (tokenizer, _) = train_tokenizer(&corpus, 270, &mut |_| {}).unwrap();
    let info = run(&corpus, &tokenizer, &out, &Default::default()).unwrap();
    let Summary::Text { documents: 30, files: 1, text_bytes, bytes_per_document: Some(bytes), .. } =
        inspected(corpus.root())
    else {
        panic!("not 30 documents")
    };
    assert_eq!((bytes.least, bytes.most), (29, 30), "the number has one digit, or two");
    assert_eq!(bytes.mean, text_bytes as f64 / 30.0);
    let Summary::Dataset { statistics, .. } = inspected(&out) else { panic!("not a dataset") };
    let (tokens, lengths) = (info.train.tokens + info.val.tokens - 30, statistics.tokens_per_document.unwrap());
    assert_eq!((statistics.documents, lengths.mean), (Some(30), tokens as f64 / 30.0));
    assert_eq!(statistics.bytes_per_token, Some(text_bytes as f64 / tokens as f64));
    assert_eq!(inspected(out.join(TOKENIZER_FILE)), Summary::Tokenizer { vocab: 270, end_of_text: Some(0) });
    assert_eq!(inspected("bytes"), Summary::Tokenizer { vocab: 256, end_of_text: None });
    let shard = inspected(out.join("train_000000.bin"));
    assert!(matches!(shard, Summary::Shard { dtype: TokenDtype::Uint16, header: true, .. }));
    assert_eq!(serde_json::to_value(&shard).unwrap()["kind"], "shard");
    fs::write(dir.path().join("rows.csv"), "1,2,0\n3,4,2\n5,6,2\n").unwrap();
    let rows = Summary::Rows { rows: 3, inputs: 2, classes: 3, rows_per_class: vec![1, 0, 2] };
    assert_eq!(inspected(dir.path().join("rows.csv")), rows);
}

/// All files of a folder.
fn files(folder: &Path) -> Vec<(std::ffi::OsString, Vec<u8>)> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
    let mut files: Vec<_> = entries.map(|e| (e.file_name(), fs::read(e.path()).unwrap())).collect();
    files.sort();
    files
}

#[test]
fn an_interrupted_call_is_gone_on_with_to_the_same_bytes() {
    let (dir, corpus) = corpus(300);
    let options = TokenizeOptions { shard_tokens: 1000, save_every: 500, ..Default::default() };
    let whole = dir.path().join("whole");
    let info = run(&corpus, &Tokenizer::bytes(), &whole, &options).unwrap();
    assert!(info.train.shards.len() > 3);
    let out = dir.path().join("out");
    let calls = |options: &TokenizeOptions, stop: usize| {
        let mut places = Vec::new();
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            tokenize(&corpus, &Tokenizer::bytes(), &out, options, &mut |p| {
                places.push(p.stage);
                // As good as a signal: what is not on the disk is lost.
                assert!(places.iter().filter(|stage| **stage == "tokenizing").count() < stop, "stop");
            })
        }));
        (result.ok(), places)
    };
    for stop in [9, 2, 4] {
        let (stopped, _) = calls(&options, stop);
        assert!(stopped.is_none() && !out.exists());
    }
    let (finished, places) = calls(&options, usize::MAX);
    assert_eq!(finished.unwrap().unwrap(), info);
    // Of eighteen batches twelve had been saved.
    let found = places.iter().filter(|stage| **stage == "finding the place").count();
    assert!(found > 150, "{found} documents were not made again");
    assert_eq!(files(&out), files(&whole));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 3, "nothing is left beside");

    // Other work starts from nothing.
    fs::remove_dir_all(&out).unwrap();
    assert!(calls(&options, 12).0.is_none());
    let other = TokenizeOptions { val_fraction: 0.1, ..options };
    let (_, places) = calls(&other, usize::MAX);
    assert!(!places.contains(&"finding the place"));
}
