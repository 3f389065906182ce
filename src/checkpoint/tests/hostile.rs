//! Files that lie, by hand and by chance.

use std::{collections::BTreeMap, sync::LazyLock};

use super::*;

/// A checkpoint, changed by `change` (a file and its new content), with a manifest that fits the change, as from a
/// writer that lies, if `sealed`.
fn tampered(file: &str, sealed: bool, change: impl FnOnce(Vec<u8>) -> Vec<u8>) -> (tempfile::TempDir, Result<Reader>) {
    static GOOD: LazyLock<Vec<(String, Vec<u8>)>> = LazyLock::new(|| {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("step");
        save(&dir, 1);
        names(&dir).into_iter().map(|name| (name.clone(), fs::read(dir.join(name)).unwrap())).collect()
    });
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("step");
    fs::create_dir(&dir).unwrap();
    for (name, bytes) in GOOD.iter() {
        fs::write(dir.join(name), bytes).unwrap();
    }
    let bytes = change(fs::read(dir.join(file)).unwrap());
    fs::write(dir.join(file), bytes).unwrap();
    if sealed {
        seal(&dir);
    }
    let result = open_and_verify(&dir);
    (folder, result)
}

/// Writes a manifest for the files that are there.
fn seal(dir: &Path) {
    let mut files = BTreeMap::new();
    for name in names(dir).into_iter().filter(|name| name != MANIFEST) {
        let bytes = fs::read(dir.join(&name)).unwrap();
        let length = bytes.first_chunk::<8>().map_or(usize::MAX, |length| u64::from_le_bytes(*length) as usize);
        let border =
            if name.ends_with("safetensors") { length.saturating_add(8).min(bytes.len()) } else { bytes.len() };
        let (head, tail) = bytes.split_at(border);
        let parts = [head, tail].into_iter().filter(|part| !part.is_empty());
        let spans = parts.map(|part| Span { bytes: part.len(), blake3: digest(part) }).collect();
        files.insert(name, FileEntry { size: bytes.len(), spans });
    }
    fs::write(dir.join(MANIFEST), format::document(&Manifest::new(files))).unwrap();
}

/// Replaces text in a safetensors header, whose length changes with it.
fn in_header(bytes: Vec<u8>, from: &str, to: &str) -> Vec<u8> {
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let json = in_text(bytes[8..8 + length].to_vec(), from, to);
    [&(json.len() as u64).to_le_bytes(), &json[..], &bytes[8 + length..]].concat()
}

/// Replaces the first occurrence of `from`, which must be there.
fn in_text(bytes: Vec<u8>, from: &str, to: &str) -> Vec<u8> {
    let place = bytes.windows(from.len()).position(|window| window == from.as_bytes()).expect(from);
    [&bytes[..place], to.as_bytes(), &bytes[place + from.len()..]].concat()
}

#[test]
fn damage_is_named_with_file_and_tensor() {
    let flip_last = |mut bytes: Vec<u8>| {
        *bytes.last_mut().unwrap() ^= 1;
        bytes
    };
    // The last bytes of the model are those of its narrowest tensor.
    assert_says(
        tampered(MODEL, false, flip_last).1,
        &[MODEL, "tensor bias", "checksum is wrong", "another checkpoint"],
    );
    assert_says(
        tampered(OPTIMIZER, false, flip_last).1,
        &[OPTIMIZER, "tensor attention.q.exp_avg", "checksum is wrong"],
    );
    assert_says(tampered(MODEL, false, |bytes| in_text(bytes, "F32", "I32")).1, &[MODEL, "checksum is wrong"]);
    assert_says(tampered(CONFIG, false, |bytes| in_text(bytes, "6", "7")).1, &[CONFIG, "checksum is wrong"]);
    assert_says(tampered(INDEX, false, |bytes| in_text(bytes, "kv_", "KV_")).1, &[INDEX, "checksum is wrong"]);
    assert_says(tampered(MANIFEST, false, |bytes| in_text(bytes, "a", "b")).1, &[MANIFEST]);
    let shorter = |mut bytes: Vec<u8>| {
        bytes.pop();
        bytes
    };
    assert_says(tampered(MODEL, false, shorter).1, &[MODEL, "truncated"]);
    assert_says(tampered(MANIFEST, false, shorter).1, &[MANIFEST, "checksum is wrong"]);
    let longer = |bytes: Vec<u8>| [bytes, vec![b' ']].concat();
    assert_says(tampered(MODEL, false, longer).1, &[MODEL, "oversized"]);
    assert_says(tampered(MANIFEST, false, longer).1, &[MANIFEST, "checksum is wrong"]);
}

#[test]
fn a_missing_file_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("step");
    for file in [OPTIMIZER, CONFIG, INDEX] {
        save(&dir, 1);
        fs::remove_file(dir.join(file)).unwrap();
        assert_eq!(assert_says(Reader::open(&dir), &[file, "cannot read"]).exit_code(), 2);
    }
    save(&dir, 1);
    fs::remove_file(dir.join(MODEL)).unwrap();
    fs::create_dir(dir.join(MODEL)).unwrap();
    assert_says(Reader::open(&dir), &[MODEL, "no ordinary file"]);
}

#[test]
fn a_newer_format_is_named() {
    let newer = |bytes: Vec<u8>| in_text(bytes, "\"format\": 1", "\"format\": 2");
    assert_says(tampered(MANIFEST, false, newer).1, &[MANIFEST, "format 2", "newer mupscale"]);
    assert_says(tampered(INDEX, true, newer).1, &[INDEX, "format 2", "newer mupscale"]);
}

#[test]
fn a_lying_header_is_named() {
    let header = |from: &'static str, to: &'static str, parts: &[&str]| {
        let (_folder, result) = tampered(MODEL, true, |bytes| in_header(bytes, from, to));
        assert_says(result, &[&[MODEL], parts].concat());
    };
    // The model's data: scale 0..8, attention.q 8..152, nothing 152..152, bias 152..162.
    header("\"F64\"", "\"F33\"", &["tensor scale", "dtype \"F33\" is unknown"]);
    header("\"F32\"", "\"F64\"", &["tensor attention.q", "144 bytes", "takes 288"]);
    header("\"F32\"", "\"I32\"", &["tensor attention.q", "it is i32", "says f32"]);
    header("[6,6]", "[4,9]", &["tensor attention.q", "[4, 9]", "[6, 6]"]);
    header("[6,6]", "[6,7]", &["tensor attention.q", "takes 168"]);
    header("[8,152]", "[0,144]", &["tensor attention.q", "overlaps"]);
    header("[152,162]", "[151,161]", &["tensor bias", "overlaps"]);
    header("[152,162]", "[153,163]", &["tensor bias", "outside the 162 bytes"]);
    header("[152,162]", "[162,152]", &["tensor bias", "outside"]);
    header("[152,162]", "[18446744073709551606,162]", &["tensor bias", "outside"]);
    header("[152,162]", "[-1,162]", &["bias", "header cannot be read"]);
    header("[6,6]", "[18446744073709551615,2]", &["tensor attention.q", "more elements"]);
    header("[0,6]", "[0,18446744073709551615]", &["tensor nothing", "more elements"]);
    header("\"scale\"", "\"bias\"", &["bias is there twice (a duplicate)"]);
    header("\"scale\"", "\"scales\"", &["tensor scale", "missing"]);
    header("\"scale\":", "\"scale\"", &["header cannot be read"]);
    header(
        "\"scale\":",
        "\"extra\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]},\"scale\":",
        &["tensor extra", "extra"],
    );
    header("[8,152]", "[8,152],\"data_offsets\":[8,152]", &["attention.q", "duplicate"]);

    let change = |parts: &[&str], change: fn(Vec<u8>) -> Vec<u8>| {
        assert_says(tampered(MODEL, true, change).1, &[&[MODEL], parts].concat());
    };
    change(&["after its last tensor"], |bytes| [bytes, vec![0; 3]].concat());
    change(&["too few"], |bytes| bytes[..7].to_vec());
    change(&["too few", "0 bytes"], |_| Vec::new());
    change(&["header says 4294967295 bytes"], |bytes| [&0xffff_ffff_u64.to_le_bytes(), &bytes[8..]].concat());
    change(&["header says 18446744073709551615 bytes"], |bytes| [&[255; 8], &bytes[8..]].concat());
    change(&["header cannot be read"], |bytes| [&9u64.to_le_bytes(), &bytes[8..]].concat());
    change(&["outside"], |bytes| bytes[..bytes.len() - 1].to_vec());
}

#[test]
fn a_lying_index_is_named() {
    let index = |from: &'static str, to: &'static str, parts: &[&str]| {
        let (_folder, result) = tampered(INDEX, true, |bytes| in_text(bytes, from, to));
        assert_says(result, &[&["step"], parts].concat());
    };
    index(
        "\"file\": \"model.safetensors\"",
        "\"file\": \"../x.safetensors\"",
        &[INDEX, "\"../x.safetensors\"", "own folder"],
    );
    index("\"file\": \"model.safetensors\"", "\"file\": \"/etc/passwd\"", &[INDEX, "\"/etc/passwd\"", "own folder"]);
    index(
        "\"file\": \"model.safetensors\"",
        "\"file\": \"config.json\"",
        &[INDEX, "tensor attention.q", "config.json"],
    );
    index(
        "\"file\": \"model.safetensors\"",
        "\"file\": \"optimizer.safetensors\"",
        &["optimizer.safetensors: tensor attention.q", "missing"],
    );
    index("\"start\": 0", "\"start\": 1", &[INDEX, "tensor attention.q", "end to end"]);
    index("\"length\": 36", "\"length\": 35", &[INDEX, "tensor attention.q", "35 of its 36"]);
    index("\"length\": 36", "\"length\": 18446744073709551615", &[INDEX, "tensor attention.q"]);
    index("\"length\": 36", "\"length\": -1", &[INDEX, "attention.q", "cannot be read"]);
    index("\"bf16\"", "\"f17\"", &[INDEX, "bias", "f17"]);
    index("\"bf16\"", "\"f16\"", &["model.safetensors: tensor bias", "it is bf16", "says f16"]);
    index("\"kv_heads\",", "\"kv_heads\", \"extra\": 1,", &[INDEX, "attention.q", "extra"]);
    index("\"size\": 3", "\"size\": 4", &[INDEX, "tensor attention.q", "kv_heads 2, head_dim 4"]);
    index("\"size\": 2", "\"size\": 9223372036854775808", &[INDEX, "tensor attention.q", "do not multiply"]);
    index("\"bias\":", "\"attention.q\":", &[INDEX, "attention.q is there twice"]);
    index("\"scale\":", "\"scales\":", &["tensor scales", "missing"]);
}

#[test]
fn a_lying_manifest_is_named() {
    let manifest = |change: fn(&mut Manifest), parts: &[&str]| {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("step");
        save(&dir, 1);
        let mut found: Manifest = serde_json::from_slice(&fs::read(dir.join(MANIFEST)).unwrap()).unwrap();
        change(&mut found);
        fs::write(dir.join(MANIFEST), format::document(&Manifest::new(found.files.0))).unwrap();
        assert_says(open_and_verify(&dir), parts);
    };
    fn file<'a>(manifest: &'a mut Manifest, name: &str) -> &'a mut FileEntry {
        manifest.files.0.get_mut(name).unwrap()
    }
    manifest(|found| file(found, MODEL).size += 1, &[MANIFEST, "model.safetensors", "cover"]);
    manifest(|found| file(found, MODEL).spans[0].bytes = usize::MAX, &[MANIFEST, "cover"]);
    manifest(|found| file(found, CONFIG).spans[0].blake3 = "x".into(), &[CONFIG, "checksum is wrong"]);
    manifest(
        |found| {
            file(found, MODEL).spans[0].bytes -= 1;
            file(found, MODEL).spans[1].bytes += 1;
        },
        &[MODEL, "checksum is wrong"],
    );
    manifest(|found| drop(found.files.0.remove(INDEX)), &[MANIFEST, "no index.json"]);
    manifest(|found| drop(found.files.0.remove(MODEL)), &[INDEX, "tensor attention.q", "no file of tensors"]);
    for name in ["../../x", "/etc/hostname", ".hidden", "a/../b"] {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("step");
        save(&dir, 1);
        let mut files = BTreeMap::from([(name.to_string(), FileEntry { size: 0, spans: vec![] })]);
        files.insert(INDEX.into(), FileEntry { size: 0, spans: vec![] });
        fs::write(dir.join(MANIFEST), format::document(&Manifest::new(files))).unwrap();
        assert_says(Reader::open(&dir), &[MANIFEST, name, "own folder"]);
    }
}

#[test]
fn asking_for_what_is_not_there_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("step");
    save(&dir, 1);
    let reader = Reader::open(&dir).unwrap();
    assert_says(reader.tensor("atention.q"), &["tensor atention.q", "missing", "nearest name is attention.q"]);
    assert_says(reader.read("bias", 0..6), &["tensor bias", "0..6", "has 5"]);
    #[expect(clippy::reversed_empty_ranges, reason = "the mistake that is tested")]
    let reversed = reader.read("bias", 3..2);
    assert_says(reversed, &["tensor bias", "3..2"]);
    assert_says(reader.bytes("tokenizer.json"), &["tokenizer.json", "no such file"]);
    assert_says(reader.json::<Vec<u8>>(CONFIG), &[CONFIG, "expected a sequence"]);
}

/// A change at a relative place in a file.
#[derive(Clone, Debug)]
enum Change {
    Flip(f64, u8),
    Truncate(f64),
    Insert(f64, Vec<u8>),
    /// A number written in digits becomes another.
    Number(f64, u64),
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        (0.0..1.0, 0u8..8).prop_map(|(at, bit)| Change::Flip(at, bit)),
        (0.0..1.0).prop_map(Change::Truncate),
        (0.0..=1.0, prop::collection::vec(any::<u8>(), 1..9)).prop_map(|(at, bytes)| Change::Insert(at, bytes)),
        (0.0..1.0, prop_oneof![Just(0), Just(1), Just(u64::MAX), Just(1 << 62), Just(1 << 40), any::<u64>()])
            .prop_map(|(at, number)| Change::Number(at, number)),
    ]
}

impl Change {
    fn apply(&self, mut bytes: Vec<u8>) -> Vec<u8> {
        let place = |at: &f64| (at * bytes.len() as f64) as usize;
        match self {
            Self::Flip(at, bit) => {
                let at = place(at);
                bytes[at] ^= 1 << bit;
            }
            Self::Truncate(at) => bytes.truncate(place(at)),
            Self::Insert(at, new) => {
                let at = place(at);
                bytes.splice(at..at, new.iter().copied());
            }
            Self::Number(at, number) => {
                let from = place(at);
                let digit = |from: usize| (from..bytes.len()).find(|&i| bytes[i].is_ascii_digit());
                let Some(start) = digit(from).or_else(|| digit(0)) else { return bytes };
                let end = (start..bytes.len()).find(|&i| !bytes[i].is_ascii_digit()).unwrap_or(bytes.len());
                bytes.splice(start..end, number.to_string().into_bytes());
            }
        }
        bytes
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Every byte of every file is under a checksum.
    #[test]
    fn any_change_is_detected(file in prop::sample::select(vec![CONFIG, STATE, MODEL, OPTIMIZER, INDEX, MANIFEST]),
                              change in change()) {
        let mut changed = true;
        let (_folder, result) = tampered(file, false, |bytes| {
            let new = change.apply(bytes.clone());
            changed = new != bytes;
            new
        });
        prop_assert_eq!(result.is_err(), changed, "{}", file);
    }

    /// A writer that lies, with checksums that are right, may be believed or not, but nothing falls over.
    #[test]
    fn a_liar_does_no_harm(file in prop::sample::select(vec![MODEL, OPTIMIZER, INDEX]),
                           changes in prop::collection::vec(change(), 1..4)) {
        let (folder, result) = tampered(file, true, |bytes| {
            changes.iter().fold(bytes, |bytes, change| if bytes.is_empty() { bytes } else { change.apply(bytes) })
        });
        if let Ok(reader) = result {
            for meta in reader.tensors() {
                let count = meta.elements().unwrap();
                prop_assert_eq!(reader.read(&meta.name, 0..count).unwrap().len(), count * meta.dtype.size());
            }
        }
        // What we take for a file of tensors, others do too.
        let path = folder.path().join("step").join(MODEL);
        let bytes = fs::read(&path).unwrap();
        if header::parse(&path, &bytes).is_ok() {
            prop_assert!(safetensors::SafeTensors::deserialize(&bytes).is_ok());
        }
    }

    #[test]
    fn the_header_reader_takes_what_the_crate_writes(
        shapes in prop::collection::btree_map("[a-z]{1,6}", prop::collection::vec(0usize..4, 0..4), 0..6)
    ) {
        let data = [0u8; 64 * 8];
        let views = shapes.iter().map(|(name, shape)| {
            let bytes = shape.iter().product::<usize>() * 8;
            (name, safetensors::tensor::TensorView::new(safetensors::Dtype::F64, shape.clone(), &data[..bytes]).unwrap())
        });
        let remark = Some([("format".to_string(), "pt".to_string())].into());
        let file = safetensors::serialize(views, remark).unwrap();
        let (_, found) = header::parse(Path::new("theirs"), &file).unwrap();
        prop_assert_eq!(found.len(), shapes.len());
        for (name, shape) in &shapes {
            prop_assert_eq!(&found[name].shape, shape);
        }
    }
}
