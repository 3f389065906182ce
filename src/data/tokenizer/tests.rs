use super::*;

/// Text of a small grammar: words of several lengths, numbers, punctuation, line ends.
fn sample(words: usize) -> String {
    const WORDS: [&str; 12] =
        ["the", " of", " width", "\n", " naïve", " 1", "23", ".", " neuron", "  two", " grow", " 東京"];
    let mut state = 1u64;
    (0..words)
        .map(|_| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            WORDS[(state >> 33) as usize % WORDS.len()]
        })
        .collect()
}

fn trained(vocab: usize) -> Tokenizer {
    let texts = [sample(3000), sample(500)];
    Tokenizer::train_bpe(texts.into_iter().map(Ok), vocab).unwrap()
}

#[test]
fn bytes_are_their_own_tokens() {
    let tokenizer = Tokenizer::load("bytes").unwrap();
    assert_eq!((tokenizer.vocab_size(), tokenizer.end_of_text(), tokenizer.is_bytes()), (256, None, true));
    assert_eq!(tokenizer.encode("aé").unwrap(), [97, 0xc3, 0xa9]);
    assert_eq!(tokenizer.decode(&[97, 0xc3, 0xa9, 0xff, 999]).unwrap(), "aé\u{fffd}");
    assert!(tokenizer.save(Path::new("never"), false).is_err());
}

#[test]
fn trained_bpe_gives_every_text_back_and_survives_its_file() {
    let tokenizer = trained(300);
    assert_eq!((tokenizer.vocab_size(), tokenizer.end_of_text()), (300, Some(0)));
    let text = sample(400) + "\u{0}\r\n\t unseen: żółw 🐢  ";
    let ids = tokenizer.encode(&text).unwrap();
    assert!(ids.len() < text.len() / 2, "{} ids for {} bytes", ids.len(), text.len());
    assert_eq!(tokenizer.decode(&ids).unwrap(), text);
    assert_eq!(tokenizer.encode("<|endoftext|>").unwrap(), [0]);

    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tokenizer.json");
    tokenizer.save(&path, false).unwrap();
    assert!(matches!(tokenizer.save(&path, false), Err(Error::Exists { .. })));
    let loaded = Tokenizer::load(&path).unwrap();
    assert_eq!((loaded.vocab_size(), loaded.end_of_text()), (300, Some(0)));
    assert_eq!(loaded.encode(&text).unwrap(), ids);
}

#[test]
fn training_is_deterministic() {
    assert_eq!(trained(320).to_json().unwrap(), trained(320).to_json().unwrap());
}

#[test]
fn training_reports_what_it_cannot_use() {
    let train =
        |texts: Vec<Result<String>>, vocab| Tokenizer::train_bpe(texts.into_iter(), vocab).err().unwrap().to_string();
    assert!(train(vec![Ok("text".into())], 256).contains("at least 257"));
    assert!(train(vec![], 300).contains("no text"));
    assert!(train(vec![Ok("text".into()), Err(Error::Usage("broken".into()))], 300).contains("broken"));
}

#[test]
fn long_texts_are_encoded_in_pieces_with_the_same_result() {
    let tokenizer = trained(300);
    let text = sample(100_000);
    assert!(pieces(&text, |_| true).len() > 4, "{} bytes", text.len());
    let whole = tokenizer.model.as_ref().unwrap().encode_fast(text.as_str(), false).unwrap();
    assert_eq!(tokenizer.encode(&text).unwrap(), whole.get_ids());
    let batch = tokenizer.encode_batch(&[text.as_str(), "the width"]).unwrap();
    assert_eq!(batch[0], whole.get_ids());
    assert_eq!(batch[1], tokenizer.encode("the width").unwrap());
}

#[test]
fn a_tokenizer_that_marks_the_start_of_a_text_is_not_cut() {
    // With add_prefix_space every piece would begin with a space of its own.
    let mut model = *trained(300).model.unwrap();
    model.with_pre_tokenizer(Some(ByteLevel::default().add_prefix_space(true)));
    let whole = model.clone();
    let tokenizer = Tokenizer::from_model(model).unwrap();
    let text = sample(100_000).replace(' ', "\n");
    assert_eq!(tokenizer.encode(&text).unwrap(), whole.encode_fast(text.as_str(), false).unwrap().get_ids());
}

#[test]
fn truncation_and_padding_in_the_file_are_ignored_and_gaps_in_the_ids_counted() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tokenizer.json");
    fs::write(
        &path,
        r#"{"version": "1.0",
            "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
            "padding": {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0,
                        "pad_type_id": 0, "pad_token": "</s>"},
            "added_tokens": [], "normalizer": null, "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null,
            "decoder": null,
            "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "</s>": 70000, "?": 2}, "unk_token": "?"}}"#,
    )
    .unwrap();
    let tokenizer = Tokenizer::load(&path).unwrap();
    assert_eq!((tokenizer.vocab_size(), tokenizer.end_of_text()), (70_001, Some(70_000)));
    assert_eq!(tokenizer.encode("a b a b").unwrap(), [0, 1, 0, 1]);
}

#[test]
fn what_is_no_tokenizer_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tokenizer.json");
    for content in ["", "{}", "[1]", "{\"model\": 3}", "\u{0}\u{1}"] {
        fs::write(&path, content).unwrap();
        let error = Tokenizer::load(&path).err().unwrap();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains("tokenizer.json: is not a tokenizer.json that"), "{error}");
    }
    assert_eq!(Tokenizer::load(dir.path().join("absent")).err().unwrap().exit_code(), 2);
}
