//! Files as they are read: plain, gzip (`.gz`), or Zstandard (`.zst`), and standard input for `-`. With the feature
//! `parquet` also a column of a Parquet file, as lines of JSON.

#[cfg(feature = "parquet")]
mod parquet;

use ruzstd::decoding::{FrameDecoder, StreamingDecoder};
use std::{
    fs::File,
    io::{self, BufRead, BufReader, Chain, Cursor, Read},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

/// The name that means standard input.
pub const STDIN: &str = "-";

/// Bytes that are read at once.
const BUFFER: usize = 1 << 18;

/// Opens a file and unpacks it by its name's end. `field` holds the text where there are fields; `read` counts the
/// file's own bytes as they are read.
pub(super) fn open(path: &Path, field: &str, read: Arc<AtomicU64>) -> io::Result<Box<dyn BufRead + Send>> {
    if packing(path) == Some("parquet") {
        return open_parquet(path, field, read);
    }
    let file: Box<dyn Read + Send> =
        if path.as_os_str() == STDIN { Box::new(io::stdin()) } else { Box::new(File::open(path)?) };
    let file = BufReader::with_capacity(BUFFER, Counted { file, read });
    Ok(match packing(path) {
        Some("gz") => Box::new(BufReader::with_capacity(BUFFER, flate2::bufread::MultiGzDecoder::new(file))),
        Some("zst") => Box::new(BufReader::with_capacity(BUFFER, Frames(Some(State::Between(file))))),
        _ => Box::new(file),
    })
}

#[cfg(feature = "parquet")]
fn open_parquet(path: &Path, field: &str, read: Arc<AtomicU64>) -> io::Result<Box<dyn BufRead + Send>> {
    Ok(Box::new(BufReader::with_capacity(BUFFER, parquet::Lines::open(path, field, read)?)))
}

#[cfg(not(feature = "parquet"))]
fn open_parquet(_: &Path, _: &str, _: Arc<AtomicU64>) -> io::Result<Box<dyn BufRead + Send>> {
    Err(io::Error::other("this program was built without Parquet; build it with --features parquet"))
}

/// `gz`, `zst` or `parquet` for a file that is unpacked as it is read.
pub(super) fn packing(path: &Path) -> Option<&'static str> {
    let extension = path.extension()?;
    ["gz", "zst", "parquet"].into_iter().find(|packed| extension.eq_ignore_ascii_case(packed))
}

/// The name of what a packed file holds.
pub(super) fn unpacked_name(path: &Path) -> PathBuf {
    match packing(path) {
        Some("parquet") => path.with_extension("jsonl"),
        Some(_) => path.with_extension(""),
        None => path.into(),
    }
}

/// Counts what is read.
struct Counted {
    file: Box<dyn Read + Send>,
    read: Arc<AtomicU64>,
}

impl Read for Counted {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.file.read(buffer)?;
        self.read.fetch_add(n as u64, Ordering::Relaxed);
        Ok(n)
    }
}

/// The frames of a Zstandard file, one after another (RFC 8878, section 3); parallel packers write many.
struct Frames<R: BufRead>(Option<State<R>>);

/// A frame's magic number, which has been looked at and is read once more, and the rest of the file.
type Frame<R> = StreamingDecoder<Chain<Cursor<[u8; 4]>, R>, FrameDecoder>;

enum State<R: BufRead> {
    Between(R),
    Inside(Box<Frame<R>>),
}

impl<R: BufRead> Read for Frames<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        // After an error there is no state, and the end of the file.
        while let Some(state) = self.0.take() {
            match state {
                State::Inside(mut frame) => {
                    let n = frame.read(buffer)?;
                    if n > 0 || buffer.is_empty() {
                        self.0 = Some(State::Inside(frame));
                        return Ok(n);
                    }
                    let stated = frame.decoder.get_checksum_from_data();
                    if stated.is_some() && stated != frame.decoder.get_calculated_checksum() {
                        return Err(io::Error::other("a checksum differs"));
                    }
                    self.0 = Some(State::Between(frame.into_inner().into_inner().1));
                }
                State::Between(mut file) => {
                    if file.fill_buf()?.is_empty() {
                        break;
                    }
                    self.0 = Some(next_frame(file)?);
                }
            }
        }
        Ok(0)
    }
}

fn next_frame<R: BufRead>(mut file: R) -> io::Result<State<R>> {
    let mut magic = [0; 4];
    file.read_exact(&mut magic)?;
    // A frame for other programs.
    if (0x184d_2a50..=0x184d_2a5f).contains(&u32::from_le_bytes(magic)) {
        let mut length = [0; 4];
        file.read_exact(&mut length)?;
        let length = u64::from(u32::from_le_bytes(length));
        if io::copy(&mut (&mut file).take(length), &mut io::sink())? < length {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        return Ok(State::Between(file));
    }
    let source = Cursor::new(magic).chain(file);
    StreamingDecoder::new(source).map(|frame| State::Inside(Box::new(frame))).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::{Compression, write::GzEncoder};
    use ruzstd::encoding::{CompressionLevel, compress_to_vec};
    use std::io::Write;

    fn gz(content: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(content).unwrap();
        encoder.finish().unwrap()
    }

    fn zst(content: &[u8]) -> Vec<u8> {
        compress_to_vec(content, CompressionLevel::Fastest)
    }

    /// Unpacks a file of this name and content; counts its bytes.
    fn unpack(name: &str, content: &[u8]) -> (io::Result<Vec<u8>>, u64) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        std::fs::write(&path, content).unwrap();
        let (count, mut unpacked) = (Arc::new(AtomicU64::new(0)), Vec::new());
        let result = open(&path, "text", count.clone()).and_then(|mut file| file.read_to_end(&mut unpacked));
        (result.map(|_| unpacked), count.load(Ordering::Relaxed))
    }

    fn text() -> Vec<u8> {
        (0..60_000u32).flat_map(|i| format!("line {}\n", i.wrapping_mul(2_654_435_761) % 977).into_bytes()).collect()
    }

    #[test]
    fn packed_files_give_their_content_and_all_of_their_parts() {
        let skippable = [&0x184d_2a53u32.to_le_bytes()[..], &3u32.to_le_bytes(), b"abc"].concat();
        for (name, packed) in [
            ("a.txt", [text(), b"end".to_vec()].concat()),
            ("a.txt.gz", [gz(&text()), gz(b"end")].concat()),
            ("a.txt.ZST", [zst(&text()), skippable, zst(b""), zst(b"end")].concat()),
        ] {
            let (content, read) = unpack(name, &packed);
            assert!(content.unwrap() == [text(), b"end".to_vec()].concat(), "{name}");
            assert_eq!(read, packed.len() as u64, "{name}");
        }
        assert_eq!(unpacked_name(Path::new("a/b.jsonl.zst")), Path::new("a/b.jsonl"));
        assert_eq!(unpacked_name(Path::new("a/b.parquet")), Path::new("a/b.jsonl"));
        assert_eq!(unpacked_name(Path::new("a/b.jsonl")), Path::new("a/b.jsonl"));
    }

    #[test]
    fn what_is_cut_off_or_damaged_is_an_error() {
        for (name, packed) in [("a.gz", gz(&text())), ("a.zst", zst(&text()))] {
            for left in [1, 3, 10, packed.len() / 2, packed.len() - 1] {
                assert!(unpack(name, &packed[..left]).0.is_err(), "{name}: {left} of {} bytes", packed.len());
            }
            let mut damaged = packed.clone();
            let middle = damaged.len() / 2;
            damaged[middle] ^= 0x10;
            assert!(unpack(name, &damaged).0.is_err(), "{name}: a bit is wrong");
        }
    }
}
