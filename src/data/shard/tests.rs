use super::*;
use proptest::prelude::*;
use std::fs;

fn shard_bytes(dtype: TokenDtype, count: i32, tokens: &[u32]) -> Vec<u8> {
    let mut header = vec![0i32; 256];
    header[..2].copy_from_slice(&dtype.header());
    header[2] = count;
    let mut bytes: Vec<u8> = header.iter().flat_map(|v| v.to_le_bytes()).collect();
    for token in tokens {
        bytes.extend(&token.to_le_bytes()[..dtype.bytes()]);
    }
    bytes
}

fn open(bytes: &[u8], headerless: Option<TokenDtype>, vocab: Option<usize>) -> Result<Vec<u32>> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tokens.bin");
    fs::write(&path, bytes).unwrap();
    Shard::open(&path, headerless, vocab).map(|shard| shard.tokens().iter().collect())
}

/// The message of the refusal, which must name the file and exit with 2.
fn refusal(bytes: &[u8], headerless: Option<TokenDtype>, vocab: Option<usize>) -> String {
    let error = open(bytes, headerless, vocab).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    assert!(error.to_string().contains("tokens.bin"), "{error}");
    error.to_string()
}

#[test]
fn the_writer_starts_new_files_and_the_reader_gives_the_tokens_back() {
    for dtype in [TokenDtype::Uint16, TokenDtype::Uint32] {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = ShardWriter::new(dir.path(), "train", dtype, 100);
        let tokens: Vec<u32> = (0..250).map(|i| i * 7 % 50_000).collect();
        tokens.chunks(33).for_each(|chunk| writer.push(chunk).unwrap());
        let files = writer.finish().unwrap();
        assert_eq!(files.iter().map(|f| f.tokens).collect::<Vec<_>>(), [100, 100, 50]);
        assert_eq!(files[2].name, "train_000002.bin");
        let mut read = Vec::new();
        for file in &files {
            let shard = Shard::open(&dir.path().join(&file.name), None, Some(50_000)).unwrap();
            assert_eq!((shard.dtype(), shard.has_header()), (dtype, true));
            read.extend(shard.tokens().iter());
        }
        assert_eq!(read, tokens);
    }
}

#[test]
fn headers_that_lie_are_refused_with_the_reason() {
    let good = shard_bytes(TokenDtype::Uint16, 3, &[1, 2, 3]);
    assert_eq!(open(&good, None, Some(4)).unwrap(), [1, 2, 3]);
    assert!(refusal(&good[..good.len() - 1], None, None).contains("counts 3 tokens of uint16, but 5 bytes follow"));
    assert!(refusal(&[good.clone(), vec![0; 2]].concat(), None, None).contains("cut off or damaged"));
    assert!(refusal(&good[..500], None, None).contains("after 500 of 1024 bytes"));
    assert!(refusal(&shard_bytes(TokenDtype::Uint32, -1, &[]), None, None).contains("counts -1 tokens"));
    assert!(refusal(&good, Some(TokenDtype::Uint16), None).contains("leave out the dtype"));
    let mut wrong = good.clone();
    wrong[4] = 7;
    assert!(refusal(&wrong, None, None).contains("version 7"));
    wrong[0] ^= 1;
    assert!(refusal(&wrong, None, None).contains("instead of a magic number"));
    assert!(refusal(&[], None, None).contains("only 0 bytes"));
}

#[test]
fn a_token_outside_the_vocabulary_is_named_with_its_position() {
    let mut tokens = vec![5; 200_000];
    tokens[123_456] = 300;
    let bytes = shard_bytes(TokenDtype::Uint32, 200_000, &tokens);
    let message = refusal(&bytes, None, Some(300));
    assert!(message.contains("token 300 at position 123456 is outside the vocabulary of 300"), "{message}");
    assert!(open(&bytes, None, Some(301)).is_ok());
}

#[test]
fn files_without_header_need_a_dtype() {
    let bytes = [1u8, 0, 2, 0, 3, 1];
    assert_eq!(open(&bytes, Some(TokenDtype::Uint16), None).unwrap(), [1, 2, 259]);
    assert!(refusal(&bytes, None, None).contains("--dtype uint16"));
    assert!(refusal(&bytes, Some(TokenDtype::Uint32), None).contains("not a whole number of uint32 tokens"));
    assert!(refusal(&bytes, Some(TokenDtype::Uint16), Some(100)).contains("token 259 at position 2"));
}

#[test]
fn a_folder_or_nothing_in_place_of_a_file_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(Shard::open(dir.path(), None, None).unwrap_err().exit_code(), 2);
    assert_eq!(Shard::open(&dir.path().join("absent.bin"), None, None).unwrap_err().exit_code(), 2);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..Default::default() })]

    #[test]
    fn any_header_over_any_body_gives_the_tokens_or_an_error(
        magic in prop_oneof![Just(20240520i32), Just(20240801), any::<i32>()],
        version in prop_oneof![Just(1i32), Just(7), any::<i32>()],
        count in prop_oneof![0i32..12, any::<i32>()],
        body in prop::collection::vec(any::<u8>(), 0..48),
        keep in 0usize..1100,
        headerless in prop_oneof![Just(None), Just(Some(TokenDtype::Uint16)), Just(Some(TokenDtype::Uint32))],
        vocab in prop_oneof![Just(None), (1usize..70_000).prop_map(Some)],
    ) {
        let mut bytes: Vec<u8> = [magic, version, count].iter().flat_map(|v| v.to_le_bytes()).collect();
        bytes.resize(HEADER_BYTES, 0);
        bytes.extend(&body);
        bytes.truncate(keep);
        if let Ok(tokens) = open(&bytes, headerless, vocab) {
            let (width, start) = match (headerless, magic) {
                (Some(dtype), _) => (dtype.bytes(), 0),
                (None, 20240520) => (2, HEADER_BYTES),
                (None, _) => (4, HEADER_BYTES),
            };
            let expected: Vec<u32> = bytes[start..]
                .chunks_exact(width)
                .map(|chunk| chunk.iter().rev().fold(0, |value, &byte| value << 8 | u32::from(byte)))
                .collect();
            prop_assert_eq!(&tokens, &expected);
            prop_assert_eq!(tokens.len() * width, bytes.len() - start);
            prop_assert!(headerless.is_some() || tokens.len() as i32 == count);
            prop_assert!(tokens.iter().all(|&token| vocab.is_none_or(|vocab| (token as usize) < vocab)));
        }
    }

    #[test]
    fn garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..2048)) {
        let _ = open(&bytes, None, Some(100));
        let _ = open(&bytes, Some(TokenDtype::Uint16), Some(100));
    }
}
