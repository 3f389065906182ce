use super::*;
use crate::data::shard::ShardWriter;

fn write_shards(folder: &Path, prefix: &'static str, tokens: &[u32], limit: u64) -> Vec<ShardFile> {
    let mut writer = ShardWriter::new(folder, prefix, TokenDtype::Uint16, limit);
    writer.push(tokens).unwrap();
    writer.finish().unwrap()
}

fn options(val_fraction: f64) -> DatasetOptions {
    DatasetOptions { val_fraction, ..Default::default() }
}

fn refusal(path: &Path, options: &DatasetOptions) -> String {
    let error = Dataset::open(path, options).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    error.to_string()
}

#[test]
fn windows_share_their_border_token_and_targets_are_one_further() {
    let data = TokenData::from_tokens((0..10).collect());
    assert_eq!([1, 2, 3, 4, 9, 10].map(|context| data.windows(context)), [9, 4, 3, 2, 1, 0]);
    let order = data.order(3, None).unwrap();
    let mut batch = TokenBatch::new(2, 3);
    assert_eq!(data.fill(&order, 0, &BatchRules::default(), &mut batch), 6);
    assert_eq!((&batch.inputs[..], &batch.targets[..]), (&[0, 1, 2, 3, 4, 5][..], &[1, 2, 3, 4, 5, 6][..]));
    assert_eq!(batch.first_key, [0; 6]);
    data.fill(&order, 2, &BatchRules::default(), &mut batch);
    assert_eq!(batch.inputs, [6, 7, 8, 0, 1, 2], "past the last window the next epoch begins");
}

#[test]
fn evaluation_ends_with_rows_that_do_not_count() {
    let data = TokenData::from_tokens((0..10).collect());
    let mut batch = TokenBatch::new(2, 3);
    let counted = [0, 2, 4].map(|first| data.fill_consecutive(first, &BatchRules::default(), &mut batch));
    assert_eq!(counted, [6, 3, 0]);
    data.fill_consecutive(2, &BatchRules::default(), &mut batch);
    assert_eq!((&batch.inputs[..], &batch.targets[..]), (&[6, 7, 8, 0, 0, 0][..], &[7, 8, 9, -1, -1, -1][..]));
}

#[test]
fn attention_starts_anew_after_the_end_of_a_document() {
    // 0 ends a document; the row starts inside one, and two ends follow each other.
    let data = TokenData::from_tokens(vec![5, 0, 6, 7, 0, 0, 8, 9]);
    let order = data.order(7, None).unwrap();
    let mut batch = TokenBatch::new(1, 7);
    data.fill(&order, 0, &BatchRules { reset_attention_after: Some(0), ..Default::default() }, &mut batch);
    assert_eq!(batch.inputs, [5, 0, 6, 7, 0, 0, 8]);
    assert_eq!(batch.first_key, [0, 0, 2, 2, 2, 5, 6]);
}

#[test]
fn ignored_targets_are_marked_and_not_counted() {
    let data = TokenData::from_tokens(vec![1, 9, 2, 9, 9, 3]);
    let mut batch = TokenBatch::new(1, 5);
    let rules = BatchRules { ignored_target: Some(9), ..Default::default() };
    assert_eq!(data.fill_consecutive(0, &rules, &mut batch), 2);
    assert_eq!(batch.inputs, [1, 9, 2, 9, 9], "inputs stay");
    assert_eq!(batch.targets, [-1, 2, -1, -1, 3]);
}

#[test]
fn windows_stay_inside_their_file() {
    let dir = tempfile::tempdir().unwrap();
    write_shards(dir.path(), "train", &(0..25).collect::<Vec<_>>(), 10);
    let data = TokenData::open(dir.path(), None, None).unwrap();
    assert_eq!((data.tokens(), data.windows(4), data.max_token()), (25, 2 + 2 + 1, Some(24)));
    let mut batch = TokenBatch::new(5, 4);
    data.fill_consecutive(0, &BatchRules::default(), &mut batch);
    let starts: Vec<i32> = batch.inputs.chunks(4).map(|row| row[0]).collect();
    assert_eq!(starts, [0, 4, 10, 14, 20]);
}

#[test]
fn a_shuffled_epoch_holds_every_window_once() {
    let data = TokenData::from_tokens((0..1001).collect());
    let order = data.order(10, Some(3)).unwrap();
    let mut batch = TokenBatch::new(10, 10);
    let mut starts = Vec::new();
    for first in (0..100).step_by(10) {
        data.fill(&order, first, &BatchRules::default(), &mut batch);
        starts.extend(batch.inputs.chunks(10).map(|row| row[0]));
    }
    assert_ne!(starts, (0..100).map(|w| w * 10).collect::<Vec<_>>());
    starts.sort();
    assert_eq!(starts, (0..100).map(|w| w * 10).collect::<Vec<_>>());
}

#[test]
fn the_tail_split_keeps_all_tokens_across_files() {
    let dir = tempfile::tempdir().unwrap();
    write_shards(dir.path(), "train", &(0..25).collect::<Vec<_>>(), 10);
    let dataset = Dataset::open(dir.path(), &options(0.4)).unwrap();
    let val = dataset.val.unwrap();
    assert_eq!((dataset.train.tokens(), val.tokens(), dataset.vocab), (15, 10, 25));
    let mut batch = TokenBatch::new(1, 4);
    val.fill_consecutive(0, &BatchRules::default(), &mut batch);
    assert_eq!((&batch.inputs[..], &batch.targets[..]), (&[15, 16, 17, 18][..], &[16, 17, 18, 19][..]));
    assert!(Dataset::open(dir.path(), &options(0.0)).unwrap().val.is_none());
    assert!(refusal(dir.path(), &options(0.6)).contains("val_fraction = 0.6"));
    assert!(refusal(dir.path(), &options(f64::NAN)).contains("val_fraction"));
}

#[test]
fn folders_of_other_programs_are_understood_by_their_names() {
    let dir = tempfile::tempdir().unwrap();
    write_shards(dir.path(), "fineweb_train", &[1; 30], 10);
    write_shards(dir.path(), "fineweb_val", &[2; 7], 10);
    write_shards(dir.path(), "pretrained", &[3; 7], 10);
    let dataset = Dataset::open(dir.path(), &options(0.1)).unwrap();
    assert_eq!((dataset.train.tokens(), dataset.val.unwrap().tokens()), (30, 7));
    let nano = tempfile::tempdir().unwrap();
    fs::write(nano.path().join("train.bin"), [1, 0, 2, 0]).unwrap();
    fs::write(nano.path().join("val.bin"), [3, 0]).unwrap();
    let dtype = Some(TokenDtype::Uint16);
    let dataset = Dataset::open(nano.path(), &DatasetOptions { dtype, ..Default::default() }).unwrap();
    assert_eq!((dataset.train.tokens(), dataset.vocab), (2, 4));
    let vocab = Some(3);
    assert!(refusal(nano.path(), &DatasetOptions { dtype, vocab, ..Default::default() }).contains("val.bin: token 3"));
}

#[test]
fn an_own_validation_file_takes_the_place_of_the_tail() {
    let dir = tempfile::tempdir().unwrap();
    let name = |files: Vec<ShardFile>| dir.path().join(&files[0].name);
    let train = name(write_shards(dir.path(), "train", &[1; 30], 100));
    let other = name(write_shards(dir.path(), "other", &[2; 8], 100));
    let dataset = Dataset::open(&train, &DatasetOptions { val: Some(other), ..options(0.5) }).unwrap();
    assert_eq!((dataset.train.tokens(), dataset.val.unwrap().tokens()), (30, 8));
}

#[test]
fn folders_without_tokens_and_too_few_tokens_are_errors() {
    let dir = tempfile::tempdir().unwrap();
    assert!(refusal(dir.path(), &options(0.1)).contains("data tokenize"));
    assert!(TokenData::open(dir.path(), None, None).is_err());
    let error = TokenData::from_tokens(vec![1; 64]).order(64, None).unwrap_err().to_string();
    assert!(error.contains("64 tokens are too few: one window of context 64 needs 65"), "{error}");
    fs::write(dir.path().join(DATASET_FILE), "{}").unwrap();
    assert!(refusal(dir.path(), &options(0.1)).contains("dataset.json: is not a dataset's description"));
}
