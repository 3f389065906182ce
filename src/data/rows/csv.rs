//! Rows of numbers from CSV.

use super::{NOT_A_LABEL, RowData, label};
use crate::error::{Error, Result};
use csv::{ByteRecord, ReaderBuilder, Trim};
use std::{fs::File, path::Path};

/// See [`RowData::read_csv`].
pub(super) fn read(path: &Path, label_column: Option<&str>) -> Result<RowData> {
    let delimiter = if path.extension().is_some_and(|e| e.eq_ignore_ascii_case("tsv")) { b'\t' } else { b',' };
    let file = File::open(path).map_err(Error::io("open", path))?;
    let mut reader =
        ReaderBuilder::new().delimiter(delimiter).has_headers(false).flexible(true).trim(Trim::All).from_reader(file);
    let mut record = ByteRecord::new();
    let mut next = |record: &mut ByteRecord| reader.read_byte_record(record).map_err(|e| unreadable(path, e));
    if !next(&mut record)? {
        return Err(Error::file(path, "is empty: it needs one line for each row of numbers"));
    }
    let columns = Columns::new(path, &record, label_column)?;
    let (mut features, mut labels) = (Vec::new(), Vec::new());
    let mut more = !columns.is_header || next(&mut record)?;
    while more {
        columns.take_row(&record, &mut features, &mut labels)?;
        more = next(&mut record)?;
    }
    if labels.is_empty() {
        return Err(Error::file(path, "holds a header but no row of numbers"));
    }
    Ok(RowData::new(features, labels, columns.count - 1))
}

/// Which column is what, from the first line.
struct Columns<'a> {
    path: &'a Path,
    names: Vec<String>,
    is_header: bool,
    count: usize,
    label: usize,
}

impl<'a> Columns<'a> {
    fn new(path: &'a Path, first: &ByteRecord, label_column: Option<&str>) -> Result<Self> {
        // Some programs begin a file with a byte order mark.
        let text = |cell| String::from_utf8_lossy(cell).trim_start_matches('\u{feff}').to_owned();
        let cells: Vec<String> = first.iter().map(text).collect();
        let named = label_column.and_then(|name| cells.iter().position(|cell| cell == name));
        let is_header = named.is_some() || cells.iter().all(|cell| cell.parse::<f64>().is_err());
        let count = cells.len();
        if count < 2 {
            return Err(Error::file(path, "has a single column: it needs inputs and a class, divided by commas"));
        }
        let label = match (label_column, named) {
            (None, _) => count - 1,
            (Some(_), Some(named)) => named,
            (Some(name), None) if is_header => {
                let why = format!("has no column {name}; its columns are {}", cells.join(", "));
                return Err(Error::file(path, why));
            }
            (Some(name), None) => {
                return Err(Error::file(
                    path,
                    format!("has no header, so no column {name}: leave out the name for the last"),
                ));
            }
        };
        Ok(Self { path, names: if is_header { cells } else { Vec::new() }, is_header, count, label })
    }

    fn take_row(&self, record: &ByteRecord, features: &mut Vec<f32>, labels: &mut Vec<i32>) -> Result<()> {
        let line = record.position().map_or(0, |position| position.line());
        if record.len() != self.count {
            let why = format!("line {line}: has {} columns, but the first line has {}", record.len(), self.count);
            return Err(Error::file(self.path, why));
        }
        for (column, cell) in record.iter().enumerate() {
            let text = str::from_utf8(cell).unwrap_or("");
            if column == self.label {
                let class = text.parse().ok().and_then(label);
                labels.push(class.ok_or_else(|| self.refuse(line, column, cell, NOT_A_LABEL))?);
            } else {
                let number = text.parse().ok().filter(|x: &f32| x.is_finite());
                features.push(number.ok_or_else(|| self.refuse(line, column, cell, "is not a finite float32"))?);
            }
        }
        Ok(())
    }

    fn refuse(&self, line: u64, column: usize, cell: &[u8], why: &str) -> Error {
        let name = self.names.get(column).map(|name| format!(" ({name})")).unwrap_or_default();
        let cell: String = String::from_utf8_lossy(cell).chars().take(40).collect();
        Error::file(self.path, format!("line {line}, column {}{name}: `{cell}` {why}", column + 1))
    }
}

fn unreadable(path: &Path, error: csv::Error) -> Error {
    let why = error.to_string();
    match error.into_kind() {
        csv::ErrorKind::Io(source) => Error::io("read", path)(source),
        _ => Error::file(path, why),
    }
}
