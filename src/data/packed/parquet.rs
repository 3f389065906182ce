//! A column of text in a Parquet file, read as if the file were JSONL with that field alone. Rows without a value are
//! left out; a batch of rows at a time is in memory.

use parquet::{
    basic::Type,
    column::reader::{ColumnReaderImpl, get_typed_column_reader},
    data_type::{ByteArray, ByteArrayType},
    file::reader::{FileReader, SerializedFileReader},
};
use std::{
    fs::File,
    io::{self, Cursor, Read},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

/// Rows that are read at once.
const ROWS: usize = 256;

/// The column as lines of JSON.
pub(super) struct Lines {
    file: SerializedFileReader<File>,
    /// Its index and its name.
    column: (usize, String),
    /// The next row group, and the one that is being read.
    next: usize,
    group: Option<ColumnReaderImpl<ByteArrayType>>,
    lines: Cursor<Vec<u8>>,
    /// Counts the file's bytes, a row group at a time.
    read: Arc<AtomicU64>,
    left: u64,
}

impl Lines {
    /// The column `field` of a file.
    pub fn open(path: &Path, field: &str, read: Arc<AtomicU64>) -> io::Result<Self> {
        let file = File::open(path)?;
        let left = file.metadata()?.len();
        let file = SerializedFileReader::new(file).map_err(io::Error::other)?;
        let schema = file.metadata().file_metadata().schema_descr();
        let names: Vec<String> = schema.columns().iter().map(|column| column.path().string()).collect();
        let Some(index) = names.iter().position(|name| name == field) else {
            return Err(io::Error::other(format!("it has no column `{field}`; its columns are {}", names.join(", "))));
        };
        let column = schema.column(index);
        if column.physical_type() != Type::BYTE_ARRAY || column.max_rep_level() > 0 {
            return Err(io::Error::other(format!("its column `{field}` holds no text")));
        }
        let column = (index, field.to_string());
        Ok(Self { file, column, next: 0, group: None, lines: Cursor::default(), read, left })
    }

    /// Fills `lines`; false at the end.
    fn refill(&mut self) -> Result<bool, parquet::errors::ParquetError> {
        loop {
            let Some(group) = &mut self.group else {
                let groups = self.file.metadata().row_groups();
                let Some(meta) = groups.get(self.next) else {
                    self.read.fetch_add(std::mem::take(&mut self.left), Ordering::Relaxed);
                    return Ok(false);
                };
                let size = self.left.min(u64::try_from(meta.compressed_size()).unwrap_or(0));
                self.read.fetch_add(size, Ordering::Relaxed);
                self.left -= size;
                let group = self.file.get_row_group(self.next)?;
                self.group = Some(get_typed_column_reader(group.get_column_reader(self.column.0)?));
                self.next += 1;
                continue;
            };
            let (mut texts, mut levels): (Vec<ByteArray>, Vec<i16>) = Default::default();
            let (rows, ..) = group.read_records(ROWS, Some(&mut levels), None, &mut texts)?;
            if rows == 0 {
                self.group = None;
                continue;
            }
            let mut lines = Vec::new();
            for text in texts {
                let line = serde_json::json!({ &self.column.1: text.as_utf8()? });
                lines.extend(line.to_string().into_bytes());
                lines.push(b'\n');
            }
            self.lines = Cursor::new(lines);
            return Ok(true);
        }
    }
}

impl Read for Lines {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let n = self.lines.read(buffer)?;
            if n > 0 || buffer.is_empty() || !self.refill().map_err(io::Error::other)? {
                return Ok(n);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::text::Corpus;
    use parquet::{file::writer::SerializedFileWriter, schema::parser::parse_message_type};

    /// A file of rows in groups of three; none is a row without text.
    fn file(path: &Path, rows: &[Option<&str>]) {
        let schema = "message rows { optional binary text (utf8); required int64 id; }";
        let schema = Arc::new(parse_message_type(schema).unwrap());
        let mut writer = SerializedFileWriter::new(File::create(path).unwrap(), schema, Arc::default()).unwrap();
        for rows in rows.chunks(3) {
            let mut group = writer.next_row_group().unwrap();
            let texts: Vec<ByteArray> = rows.iter().flatten().map(|text| ByteArray::from(*text)).collect();
            let levels: Vec<i16> = rows.iter().map(|row| i16::from(row.is_some())).collect();
            let mut column = group.next_column().unwrap().unwrap();
            column.typed::<ByteArrayType>().write_batch(&texts, Some(&levels), None).unwrap();
            column.close().unwrap();
            let mut column = group.next_column().unwrap().unwrap();
            let ids: Vec<i64> = (0..rows.len() as i64).collect();
            column.typed::<parquet::data_type::Int64Type>().write_batch(&ids, None, None).unwrap();
            column.close().unwrap();
            group.close().unwrap();
        }
        writer.close().unwrap();
    }

    fn read(path: &Path, field: &str) -> crate::Result<Vec<String>> {
        Corpus::open(path, field)?.documents().collect()
    }

    #[test]
    fn a_column_becomes_documents() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.parquet");
        file(&path, &[Some("one\n\"two\""), None, Some("é"), Some("four"), None, None, None, Some("eight")]);
        assert_eq!(read(&path, "text").unwrap(), ["one\n\"two\"", "é", "four", "eight"]);
        let corpus = Corpus::open(dir.path(), "text").unwrap();
        let mut documents = corpus.documents();
        assert_eq!(documents.by_ref().count(), 4);
        assert_eq!(documents.bytes_read(), corpus.bytes());
    }

    #[test]
    fn other_columns_and_damaged_files_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.parquet");
        file(&path, &[Some("some text"); 9]);
        for (field, part) in [("body", "columns are text, id"), ("id", "holds no text")] {
            let error = read(&path, field).unwrap_err();
            assert!(error.to_string().contains(part) && error.exit_code() == 2, "{error}");
        }
        let whole = std::fs::read(&path).unwrap();
        for left in [0, 3, whole.len() / 2, whole.len() - 1] {
            std::fs::write(&path, &whole[..left]).unwrap();
            assert!(read(&path, "text").is_err_and(|e| e.exit_code() == 2), "{left} of {} bytes", whole.len());
        }
    }
}
