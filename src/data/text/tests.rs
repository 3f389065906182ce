use super::*;
use proptest::prelude::*;

/// Reads one file of a name with a content.
fn read(name: &str, content: &[u8]) -> Result<Vec<String>> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    fs::write(&path, content).unwrap();
    Corpus::open(&path, DEFAULT_FIELD)?.documents().collect()
}

fn refusal(name: &str, content: &[u8]) -> String {
    let error = read(name, content).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    assert!(error.to_string().contains(name), "{error}");
    error.to_string()
}

#[test]
fn a_text_file_is_one_document_or_several() {
    assert_eq!(read("a.txt", b"one\ntwo\n").unwrap(), ["one\ntwo\n"]);
    let several = b"one\n<|endoftext|>\ntwo<|endoftext|>three<|endoftext|>\r\n\n<|endoftext|>\nfour\nfive";
    assert_eq!(read("a.txt", several).unwrap(), ["one\n", "two", "three", "four\nfive"]);
    assert_eq!(read("a.txt", "\u{feff}märchen".as_bytes()).unwrap(), ["märchen"]);
    assert!(read("a.txt", b" \n\n").unwrap().is_empty());
    assert!(read("a.txt", b"").unwrap().is_empty());
}

#[test]
fn invalid_utf8_is_named_with_its_offset() {
    assert!(refusal("a.txt", b"first\nsec\xffond").contains("invalid UTF-8 at byte 9 (0xff)"));
    assert!(refusal("a.txt", b"cut off \xe2\x82").contains("at byte 8 (0xe2)"));
    assert!(refusal("a.jsonl", b"{\"text\": \"a\"}\n{\"text\": \"\xc3(\"}").contains("at byte 24 (0xc3)"));
    assert!(refusal("a.jsonl.xz", b"\xfd7zXZ").contains("unpack"));
    for name in ["a.jsonl.gz", "a.txt.zst"] {
        assert!(refusal(name, b"{\"text\": \"not packed\"}").contains("cannot be unpacked"));
    }
}

#[test]
fn jsonl_gives_the_named_field_and_names_bad_lines() {
    let good = b"{\"text\": \"a\\nb\", \"n\": 1}\n\n{\"n\": 2, \"text\": \"\\u00e9\"}\n";
    assert_eq!(read("a.jsonl", good).unwrap(), ["a\nb", "é"]);
    assert!(
        refusal("a.jsonl", b"{\"text\": \"a\"}\n\n{\"text\": 3}")
            .contains("line 3: the field `text` is not a string but 3")
    );
    assert!(
        refusal("a.jsonl", b"{\"content\": \"a\", \"id\": 1}")
            .contains("no field `text`; its fields are `content`, `id`")
    );
    assert!(refusal("a.jsonl", b"{\"text\": \"a\"").contains("line 1: is not a JSON object"));
    assert!(refusal("a.jsonl", b"[1, 2]").contains("line 1: is not a JSON object"));
    assert!(refusal("a.jsonl", b"{\"text\": \"\\ud800\"}").contains("line 1"));
}

#[test]
fn a_folder_is_read_in_sorted_order_without_hidden_and_foreign_files() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, content: &[u8]| {
        let path = dir.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    };
    write("b.md", b"second");
    write("a/z.TXT", b"first");
    write("c.jsonl", b"{\"body\": \"third\"}");
    write("picture.png", b"\xff\xff");
    write(".git/config.txt", b"hidden");
    std::os::unix::fs::symlink(dir.path(), dir.path().join("a/circle")).unwrap();
    let corpus = Corpus::open(dir.path(), "body").unwrap();
    assert_eq!(corpus.files().len(), 3);
    assert_eq!(corpus.documents().collect::<Result<Vec<_>>>().unwrap(), ["first", "second", "third"]);
    let mut documents = corpus.documents();
    while documents.next().is_some() {}
    assert_eq!(documents.bytes_read(), corpus.bytes());
}

#[test]
fn missing_paths_and_folders_without_text_are_errors() {
    let dir = tempfile::tempdir().unwrap();
    assert!(Corpus::open(dir.path(), "text").unwrap_err().to_string().contains("holds no text"));
    assert_eq!(Corpus::open(&dir.path().join("absent"), "text").unwrap_err().exit_code(), 2);
}

#[test]
fn bad_lines_are_left_out_where_asked_and_told() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.jsonl");
    let bad = "{\"text\": 3}\n".repeat(20);
    fs::write(&path, [b"{\"text\": \"a\"}\nno json\n\xff\n{\"text\": \"b\"}\n", bad.as_bytes()].concat()).unwrap();
    let corpus = Corpus::open(&path, "text").unwrap().skip_bad(true);
    assert_eq!(corpus.documents().collect::<Result<Vec<_>>>().unwrap(), ["a", "b"]);
    let skipped = corpus.skipped();
    assert_eq!((skipped.lines, skipped.first.len()), (22, Skipped::TOLD));
    assert!(skipped.first[0].contains("line 2") && skipped.first[1].contains("UTF-8"), "{skipped:?}");
    // A file that ends too early is no bad line.
    let path = dir.path().join("b.jsonl.gz");
    fs::write(&path, b"\x1f\x8b\x08\0\0\0").unwrap();
    let corpus = Corpus::open(&path, "text").unwrap().skip_bad(true);
    assert!(corpus.documents().next().unwrap().is_err());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..Default::default() })]

    #[test]
    fn hostile_bytes_give_documents_or_one_error(
        bytes in prop::collection::vec(prop_oneof![any::<u8>(), prop::sample::select(&b"{}\"text: \n\\"[..])], 0..300),
        jsonl in any::<bool>(),
    ) {
        let _ = read(if jsonl { "a.jsonl" } else { "a.txt" }, &bytes);
        let path = tempfile::tempdir().unwrap();
        fs::write(path.path().join("a.jsonl"), &bytes).unwrap();
        let corpus = Corpus::open(path.path(), "text").unwrap();
        let results: Vec<_> = corpus.documents().collect();
        let errors = results.iter().filter(|r| r.is_err()).count();
        prop_assert!(errors == 0 || (errors == 1 && results.last().unwrap().is_err()));
    }

    #[test]
    fn documents_survive_both_formats(texts in prop::collection::vec("[ -~é\n]{1,40}", 1..6)) {
        let kept: Vec<&String> = texts.iter().filter(|text| !text.trim().is_empty()).collect();
        let jsonl: String = texts.iter().map(|t| serde_json::json!({ "text": t }).to_string() + "\n").collect();
        let from_jsonl = read("a.jsonl", jsonl.as_bytes()).unwrap();
        prop_assert_eq!(from_jsonl.iter().collect::<Vec<_>>(), kept.clone());
        let text: String = texts.iter().map(|t| t.clone() + END_OF_TEXT + "\n").collect();
        let from_text = read("a.txt", text.as_bytes()).unwrap();
        prop_assert_eq!(from_text.iter().collect::<Vec<_>>(), kept);
    }
}
