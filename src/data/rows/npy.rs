//! Rows of numbers from NumPy's `.npy`: a magic, a version, the length of a header, a header that is a Python
//! dictionary (`{'descr': '<f4', 'fortran_order': False, 'shape': (150, 4), }`), then the numbers (NumPy's NEP 1).

use super::{NOT_A_LABEL, RowData, label};
use crate::{
    data::mapped::map_file,
    error::{Error, Result},
};
use std::path::Path;

/// See [`RowData::read_npy`].
pub(super) fn read(features_path: &Path, labels_path: &Path) -> Result<RowData> {
    let features_file = map_file(features_path)?;
    let features = Array::parse(features_path, &features_file)?;
    let labels_file = map_file(labels_path)?;
    let labels = Array::parse(labels_path, &labels_file)?;
    let (rows, inputs) = (features.rows()?, features.row_len());
    if features.shape.len() < 2 || inputs == 0 {
        let why = format!("has the shape {:?}: inputs need two dimensions, rows and columns", features.shape);
        return Err(Error::file(features_path, why));
    }
    if labels.rows()? != rows || labels.row_len() != 1 {
        let why =
            format!("has the shape {:?}, but there are {rows} rows of inputs: it needs one class a row", labels.shape);
        return Err(Error::file(labels_path, why));
    }
    let refuse = |path: &Path, row: usize, column: usize, value: f64, why: &str| {
        Error::file(path, format!("row {row}, column {column} (both from 0): {value} {why}"))
    };
    let numbers = features.values().enumerate().map(|(at, value)| {
        let number = value as f32;
        let not_finite = || refuse(features_path, at / inputs, at % inputs, value, "is not a finite float32");
        number.is_finite().then_some(number).ok_or_else(not_finite)
    });
    let classes = labels
        .values()
        .enumerate()
        .map(|(row, value)| label(value).ok_or_else(|| refuse(labels_path, row, 0, value, NOT_A_LABEL)));
    Ok(RowData::new(numbers.collect::<Result<_>>()?, classes.collect::<Result<_>>()?, inputs))
}

/// An array in a mapped file.
struct Array<'a> {
    path: &'a Path,
    shape: Vec<usize>,
    dtype: Dtype,
    body: &'a [u8],
}

#[derive(Clone, Copy)]
enum Dtype {
    F4,
    F8,
    I4,
    I8,
    U1,
}

impl Dtype {
    fn from_descr(descr: &str) -> Option<Self> {
        Some(match descr {
            "<f4" => Self::F4,
            "<f8" => Self::F8,
            "<i4" => Self::I4,
            "<i8" => Self::I8,
            "|u1" => Self::U1,
            _ => return None,
        })
    }

    fn bytes(self) -> usize {
        match self {
            Self::U1 => 1,
            Self::F4 | Self::I4 => 4,
            Self::F8 | Self::I8 => 8,
        }
    }

    /// The number in `bytes`, of which there are as many as the type needs.
    fn value(self, bytes: &[u8]) -> f64 {
        let mut wide = [0; 8];
        wide[..bytes.len()].copy_from_slice(bytes);
        let narrow = [wide[0], wide[1], wide[2], wide[3]];
        match self {
            Self::F4 => f32::from_le_bytes(narrow).into(),
            Self::F8 => f64::from_le_bytes(wide),
            Self::I4 => i32::from_le_bytes(narrow).into(),
            Self::I8 => i64::from_le_bytes(wide) as f64,
            Self::U1 => wide[0].into(),
        }
    }
}

impl<'a> Array<'a> {
    fn parse(path: &'a Path, bytes: &'a [u8]) -> Result<Self> {
        let refuse = |why: &str| Error::file(path, why);
        let (header, body) = split_header(bytes)
            .ok_or_else(|| refuse("is not a .npy file, or is cut off inside its header: write it with numpy.save"))?;
        let descr = field(header, "descr").and_then(|rest| rest.strip_prefix('\'')?.split('\'').next());
        let dtype = descr.and_then(Dtype::from_descr).ok_or_else(|| {
            refuse(&format!(
                "numbers of type {} are not read: save them as float32, float64, int32, int64 or uint8",
                descr.unwrap_or("(not stated)")
            ))
        })?;
        if !field(header, "fortran_order").is_some_and(|rest| rest.starts_with("False")) {
            return Err(refuse("is not in C order: save numpy.ascontiguousarray of it"));
        }
        let shape = field(header, "shape").and_then(parse_shape).ok_or_else(|| refuse("its header states no shape"))?;
        let count = shape.iter().try_fold(dtype.bytes(), |product, &n| product.checked_mul(n));
        if count != Some(body.len()) {
            let why = format!("has the shape {shape:?}, but {} bytes of numbers: it is cut off or damaged", body.len());
            return Err(refuse(&why));
        }
        Ok(Self { path, shape, dtype, body })
    }

    fn rows(&self) -> Result<usize> {
        match self.shape.first() {
            Some(&rows) if rows > 0 => Ok(rows),
            _ => Err(Error::file(self.path, "holds no rows")),
        }
    }

    /// Numbers in a row.
    fn row_len(&self) -> usize {
        self.shape[1..].iter().product()
    }

    fn values(&self) -> impl Iterator<Item = f64> {
        self.body.chunks_exact(self.dtype.bytes()).map(|bytes| self.dtype.value(bytes))
    }
}

/// The dictionary and what follows it.
fn split_header(bytes: &[u8]) -> Option<(&str, &[u8])> {
    let rest = bytes.strip_prefix(b"\x93NUMPY")?;
    let (version, rest) = rest.split_at_checked(2)?;
    // Version 1 counts the header's bytes with 16 bits, versions 2 and 3 with 32.
    let (length, rest) = match version[0] {
        1 => rest.split_at_checked(2)?,
        2 | 3 => rest.split_at_checked(4)?,
        _ => return None,
    };
    let length = length.iter().rev().fold(0, |value, &byte| value << 8 | usize::from(byte));
    let (header, body) = rest.split_at_checked(length)?;
    Some((str::from_utf8(header).ok()?, body))
}

/// What follows a key of the dictionary.
fn field<'a>(header: &'a str, key: &str) -> Option<&'a str> {
    let (_, rest) = header.split_once(&format!("'{key}'"))?;
    Some(rest.trim_start().strip_prefix(':')?.trim_start())
}

/// A tuple such as `(150, 4)` or `(150,)`.
fn parse_shape(text: &str) -> Option<Vec<usize>> {
    let (inside, _) = text.strip_prefix('(')?.split_once(')')?;
    inside.split(',').map(str::trim).filter(|n| !n.is_empty()).map(|n| n.parse().ok()).collect()
}
