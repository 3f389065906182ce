//! What is written is read; the rest of the tests, and what they share.

mod faults;
mod hostile;
mod kept;
mod together;

use std::{fs, ops::Range, path::Path};

pub(super) use faults::Faults;
use proptest::prelude::*;
use rayon::prelude::*;
use serde_json::{Value, json};

use super::{
    disk::Disk,
    format::{FileEntry, Manifest, Span, digest},
    *,
};
use crate::{DType, Error, Result};

fn block(name: &str, size: usize) -> Block {
    Block { name: name.into(), size }
}

fn meta(name: &str, dtype: DType, axes: Vec<Axis>) -> TensorMeta {
    let shape = axes.iter().map(|axis| axis.iter().map(|block| block.size).product()).collect();
    TensorMeta { name: name.into(), dtype, shape, axes }
}

/// Tensors of several types, one of them empty and one a scalar.
fn model() -> Vec<TensorMeta> {
    let residual = || vec![block("residual", 6)];
    vec![
        meta("bias", DType::BF16, vec![vec![block("residual", 5)]]),
        meta("attention.q", DType::F32, vec![residual(), vec![block("kv_heads", 2), block("head_dim", 3)]]),
        meta("scale", DType::F64, vec![]),
        meta("nothing", DType::F32, vec![vec![block("hidden", 0)], residual()]),
    ]
}

fn optimizer() -> Vec<TensorMeta> {
    vec![meta("attention.q.exp_avg", DType::F32, vec![vec![block("residual", 300)], vec![block("residual", 4)]])]
}

/// Bytes that differ from place to place and from seed to seed.
fn content(meta: &TensorMeta, seed: u8) -> Vec<u8> {
    let bytes = meta.elements().unwrap() * meta.dtype.size();
    (0..bytes).map(|i| (i as u8).wrapping_mul(31) ^ (i >> 8) as u8 ^ seed).collect()
}

/// Writes a checkpoint whose bytes depend on `seed`.
fn save_on(disk: Disk, dir: &Path, force: bool, seed: u8) -> Result<()> {
    let mut writer = Writer::create_on(disk, dir, force)?;
    writer.json(CONFIG, &json!({"width": 6, "seed": seed}))?;
    writer.json(STATE, &json!({"step": 20}))?;
    writer.tensors(MODEL, model())?;
    writer.tensors(OPTIMIZER, optimizer())?;
    for meta in model().iter().chain(&optimizer()) {
        writer.write(&meta.name, 0, &content(meta, seed))?;
    }
    writer.commit()
}

fn save(dir: &Path, seed: u8) {
    save_on(Disk::default(), dir, true, seed).unwrap();
}

/// Asserts that `dir` is whole and is that of `seed`.
fn assert_saved(dir: &Path, seed: u8) {
    let reader = Reader::open(dir).unwrap();
    reader.verify().unwrap();
    assert_eq!(reader.json::<Value>(CONFIG).unwrap()["seed"], seed);
    for meta in model().iter().chain(&optimizer()) {
        assert_eq!(reader.tensor(&meta.name).unwrap(), meta);
        assert_eq!(reader.read(&meta.name, 0..meta.elements().unwrap()).unwrap(), content(meta, seed));
    }
}

/// The names in a folder, sorted.
fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Opens and checks every byte.
fn open_and_verify(dir: &Path) -> Result<Reader> {
    let reader = Reader::open(dir)?;
    reader.verify()?;
    Ok(reader)
}

#[test]
fn a_checkpoint_reads_as_it_was_written() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("run/step");
    save(&dir, 3);
    assert_saved(&dir, 3);
    assert_eq!(names(folder.path().join("run").as_path()), ["step"]);
    let reader = Reader::open(&dir).unwrap();
    assert_eq!(reader.tensors().count(), 5);
    assert!(reader.contains("scale") && !reader.contains("scales"));
    assert!(reader.has_file(CONFIG) && !reader.has_file("tokenizer.json"));
    // A range, lent from the file, also after its pages were given back.
    let expected = content(&model()[1], 3);
    for _ in 0..2 {
        let part = reader.read("attention.q", 5..9).unwrap();
        assert!(matches!(part, std::borrow::Cow::Borrowed(_)));
        assert_eq!(part, &expected[20..36]);
        reader.release("attention.q").unwrap();
    }
    assert!(reader.read("attention.q", 9..9).unwrap().is_empty());
}

#[test]
fn any_reader_opens_the_tensor_files() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("step");
    save(&dir, 7);
    for (file, metas) in [(MODEL, model()), (OPTIMIZER, optimizer())] {
        let bytes = fs::read(dir.join(file)).unwrap();
        let views = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(views.len(), metas.len());
        for meta in &metas {
            let view = views.tensor(&meta.name).unwrap();
            assert_eq!(view.shape(), meta.shape);
            assert_eq!(view.data(), content(meta, 7));
            let offset = view.data().as_ptr() as usize - bytes.as_ptr() as usize;
            assert!(offset.is_multiple_of(meta.dtype.size()), "{} lies at {offset}", meta.name);
        }
        // The crate writes the same bytes, so order, padding and header are as it wants them.
        let pairs = metas.iter().map(|meta| (meta.name.clone(), views.tensor(&meta.name).unwrap()));
        let theirs = safetensors::serialize(pairs, None).unwrap();
        let (their_header, our_header) = (header_json(&theirs), header_json(&bytes));
        assert_eq!(their_header, our_header);
        assert_eq!(theirs.len(), bytes.len());
    }
}

fn header_json(file: &[u8]) -> Value {
    let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    assert!(length.is_multiple_of(8));
    serde_json::from_slice(&file[8..8 + length]).unwrap()
}

#[test]
fn pieces_in_several_files_are_one_tensor() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("step");
    let whole = meta("w", DType::F32, vec![vec![block("ffn", 10)], vec![block("residual", 7)]]);
    let bytes = content(&whole, 1);
    let mut writer = Writer::create(&dir, false).unwrap();
    writer.pieces("b.safetensors", vec![(whole.clone(), 33..70)]).unwrap();
    writer.pieces("a.safetensors", vec![(whole.clone(), 0..33)]).unwrap();
    // One write over the border of the pieces, then both ends.
    writer.write("w", 20, &bytes[80..200]).unwrap();
    writer.write("w", 50, &bytes[200..]).unwrap();
    writer.write("w", 0, &bytes[..80]).unwrap();
    writer.commit().unwrap();
    let reader = open_and_verify(&dir).unwrap();
    for Range { start, end } in [0..70, 0..33, 33..70, 32..34, 40..41, 70..70, 33..33] {
        assert_eq!(reader.read("w", start..end).unwrap(), &bytes[start * 4..end * 4], "{start}..{end}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn ranges_in_any_order_from_any_thread(
        cuts in prop::collection::btree_set(1usize..200_000, 0..20),
        keys in prop::collection::vec(any::<u64>(), 21),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("step");
        let tensor = meta("w", DType::BF16, vec![vec![block("residual", 200_000)]]);
        let bytes = content(&tensor, 9);
        let borders: Vec<usize> = [0].into_iter().chain(cuts).chain([200_000]).collect();
        let mut ranges: Vec<_> = borders.windows(2).map(|pair| pair[0]..pair[1]).zip(keys).collect();
        ranges.sort_by_key(|(_, key)| *key);
        let mut writer = Writer::create(&dir, false).unwrap();
        writer.tensors(MODEL, vec![tensor]).unwrap();
        ranges.par_iter().for_each(|(range, _)| {
            writer.write("w", range.start, &bytes[range.start * 2..range.end * 2]).unwrap();
        });
        writer.commit().unwrap();
        let reader = open_and_verify(&dir).unwrap();
        prop_assert_eq!(reader.read("w", 0..200_000).unwrap(), &bytes[..]);
    }
}

#[test]
fn what_is_written_from_front_to_back_has_one_checksum() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("step");
    let tensor = meta("w", DType::U8, vec![vec![block("vocab", 1000)]]);
    let bytes = content(&tensor, 0);
    let mut writer = Writer::create(&dir, false).unwrap();
    writer.tensors(MODEL, vec![tensor]).unwrap();
    for start in (0..1000).step_by(10) {
        writer.write("w", start, &bytes[start..start + 10]).unwrap();
    }
    writer.commit().unwrap();
    let manifest: Manifest = serde_json::from_slice(&fs::read(dir.join(MANIFEST)).unwrap()).unwrap();
    let spans = &manifest.files.0[MODEL].spans;
    assert_eq!(spans.len(), 2, "header and tensor");
    assert_eq!(spans[1].blake3, digest(&bytes));
}

/// Asserts that a result is an error whose message has all these parts.
fn assert_says<T>(result: Result<T>, parts: &[&str]) -> Error {
    let Err(error) = result else { panic!("no error, but expected one that says {parts:?}") };
    let message = error.to_string();
    for part in parts {
        assert!(message.contains(part), "{message:?} does not say {part:?}");
    }
    error
}

#[test]
fn the_writer_refuses_what_makes_no_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("step");
    let mut writer = Writer::create(&dir, false).unwrap();
    let tensor = |name: &str, size| meta(name, DType::F32, vec![vec![block("ffn", size)]]);
    let mut lying = tensor("lying", 4);
    lying.axes[0].push(block("group", 2));
    assert_says(writer.tensors(MODEL, vec![lying]), &["lying", "ffn 4, group 2", "axis of 4"]);
    let huge = meta("huge", DType::F32, vec![vec![block("a", usize::MAX / 2)], vec![block("b", 0)]]);
    assert_says(writer.tensors(MODEL, vec![huge]), &["huge", "more elements than"]);
    assert_says(writer.tensors(MODEL, vec![tensor("a", 1), tensor("a", 1)]), &["tensor a", "twice"]);
    assert_says(writer.tensors("model.bin", vec![]), &["model.bin", ".safetensors"]);
    for name in ["../x", "a/b", ".hidden", "", "/etc/x", "..", "a\\b"] {
        assert_says(writer.bytes(name, b"{}"), &["own folder"]);
    }
    writer.json(CONFIG, &json!({})).unwrap();
    assert_says(writer.json(CONFIG, &json!({})), &["config.json", "already"]);
    assert_says(writer.bytes(MANIFEST, b"{}"), &["manifest.json", "already"]);
    writer.tensors(MODEL, vec![tensor("a", 4)]).unwrap();
    assert_says(writer.tensors(OPTIMIZER, vec![tensor("a", 4)]), &["tensor a", "duplicate"]);
    assert_says(writer.write("b", 0, &[0; 4]), &["tensor b", "not declared"]);
    assert_says(writer.write("a", 0, &[0; 5]), &["tensor a", "5 bytes"]);
    assert_says(writer.write("a", 3, &[0; 8]), &["tensor a", "3..5", "no part"]);
    assert_says(writer.write("a", usize::MAX, &[0; 8]), &["tensor a"]);
    writer.write("a", 1, &[0; 8]).unwrap();
    assert_says(writer.write("a", 2, &[0; 8]), &["tensor a", "written before"]);
    assert_says(writer.write("a", 0, &[0; 8]), &["tensor a", "written before"]);
    assert_says(writer.write("a", 1, &[0; 4]), &["tensor a", "written before"]);
    writer.write("a", 0, &[0; 4]).unwrap();
    assert_says(writer.commit(), &["tensor a", "element 3 was never written"]);
    assert_eq!(names(folder.path()), [""; 0], "a writer without commit leaves nothing");
}

#[test]
fn pieces_that_do_not_cover_their_tensor_are_refused() {
    let tensor = meta("w", DType::U8, vec![vec![block("ffn", 10)]]);
    let pieces = |first: Range<usize>, second: Range<usize>| {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = Writer::create(folder.path().join("step"), false).unwrap();
        writer.pieces("a.safetensors", vec![(tensor.clone(), first.clone())])?;
        writer.pieces("b.safetensors", vec![(tensor.clone(), second.clone())])?;
        for range in [first, second] {
            writer.write("w", range.start, &vec![1; range.len()])?;
        }
        writer.commit()
    };
    pieces(5..10, 0..5).unwrap();
    assert_says(pieces(0..4, 5..10), &["tensor w", "one begins at 5, not 4"]);
    assert_says(pieces(1..5, 5..10), &["tensor w", "one begins at 1, not 0"]);
    assert_says(pieces(0..5, 5..9), &["tensor w", "9 of its 10"]);
    assert_says(pieces(0..6, 5..10), &["b.safetensors", "tensor w", "duplicate"]);
    assert_says(pieces(0..5, 5..5), &["b.safetensors", "tensor w", "5..5"]);
    assert_says(pieces(0..5, 5..11), &["b.safetensors", "tensor w", "5..11"]);
}

#[test]
fn only_a_checkpoint_is_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("out");
    save(&dir, 1);
    let exists = assert_says(Writer::create(&dir, false), &["exists already", "--force"]);
    assert!(matches!(exists, Error::Exists { .. }));
    save(&dir, 2);
    assert_saved(&dir, 2);
    assert_eq!(names(folder.path()), ["out"]);

    let home = folder.path().join("home");
    fs::create_dir(&home).unwrap();
    fs::write(home.join("letter.txt"), "dear").unwrap();
    assert_says(Writer::create(&home, true), &["no checkpoint"]);
    let file = folder.path().join("file");
    fs::write(&file, "x").unwrap();
    assert_says(Writer::create(&file, true), &["not a folder"]);
    assert_says(Writer::create("/", true), &["name of its own"]);
    // What appears while the checkpoint is written is kept too.
    let late = folder.path().join("late");
    let mut writer = Writer::create(&late, false).unwrap();
    writer.json(CONFIG, &json!({})).unwrap();
    fs::create_dir(&late).unwrap();
    assert_says(writer.commit(), &["exists already"]);
    assert_eq!(names(folder.path()), ["file", "home", "late", "out"]);
    assert_eq!(fs::read_to_string(home.join("letter.txt")).unwrap(), "dear");
}
