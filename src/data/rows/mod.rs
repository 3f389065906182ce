//! Rows of numbers with a class each, for the mlp: from CSV or from NumPy's `.npy`.

mod csv;
mod npy;

use super::order::{Order, is_held_out};
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// The largest number of classes; a label beyond it is taken for a mistake, such as a wrong column.
pub const MAX_CLASSES: usize = 65_536;

/// Rows of numbers and the class of each.
#[derive(Debug, Clone, PartialEq)]
pub struct RowData {
    /// rows × inputs, all finite.
    pub features: Vec<f32>,
    /// One class a row, below `classes`.
    pub labels: Vec<i32>,
    /// Numbers in a row.
    pub inputs: usize,
    /// The largest label + 1.
    pub classes: usize,
}

/// A column's mean and standard deviation in the training rows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Standardization {
    /// One a column.
    pub mean: Vec<f32>,
    /// One a column (divided by n, not n - 1); 1 for a column that is constant.
    pub std: Vec<f32>,
}

/// Rows on the host, to be filled again and again.
#[derive(Debug, Clone, PartialEq)]
pub struct RowBatch {
    /// batch × inputs.
    pub inputs: Vec<f32>,
    /// One class a row; -1 where the loss does not count it.
    pub labels: Vec<i32>,
}

impl RowBatch {
    /// An empty batch of `batch` rows of `inputs` numbers.
    pub fn new(batch: usize, inputs: usize) -> Self {
        Self { inputs: vec![0.0; batch * inputs], labels: vec![0; batch] }
    }
}

impl RowData {
    /// Reads a CSV file. A first line without any number is a header. The label is the column of that name in the
    /// header, or the last column; all others are inputs. A `.tsv` file is divided by tabs.
    ///
    /// # Errors
    /// Each names line, column and value: a cell that is not a finite number, a label that is not an integer from 0,
    /// a line of another width; and a file without rows.
    pub fn read_csv(path: &Path, label_column: Option<&str>) -> Result<Self> {
        csv::read(path, label_column)
    }

    /// Reads two `.npy` files: inputs (two or more dimensions, of which all after the first are one row) and labels
    /// (one integer a row). Types: f4, f8, i4, i8, u1, little-endian, in C order.
    ///
    /// # Errors
    /// Another type or layout, a length that is not what the header says, unequal numbers of rows, a number that is not
    /// finite, a label that is not an integer from 0.
    pub fn read_npy(features: &Path, labels: &Path) -> Result<Self> {
        npy::read(features, labels)
    }

    /// Checked rows; `labels` are not empty and below [`MAX_CLASSES`].
    fn new(features: Vec<f32>, labels: Vec<i32>, inputs: usize) -> Self {
        let classes = labels.iter().max().map_or(0, |&label| label as usize + 1);
        Self { features, labels, inputs, classes }
    }

    /// How many rows there are.
    pub fn rows(&self) -> usize {
        self.labels.len()
    }

    /// Divides the rows: one of every 1 / `val_fraction` consecutive ones is held out, at a place that a hash picks,
    /// since files are often sorted by class. None where that leaves no row to validate on. Both parts have all
    /// classes' number. `val_fraction` is 0 to 0.5.
    pub fn split(self, val_fraction: f64) -> Result<(Self, Option<Self>)> {
        super::dataset::check_val_fraction(val_fraction)?;
        let part = |held_out| {
            let kept = || (0..self.rows()).filter(move |&row| is_held_out(row as u64, val_fraction) == held_out);
            Self {
                features: kept().flat_map(|row| self.row(row)).copied().collect(),
                labels: kept().map(|row| self.labels[row]).collect(),
                ..Self { features: Vec::new(), labels: Vec::new(), inputs: self.inputs, classes: self.classes }
            }
        };
        let (train, val) = (part(false), part(true));
        Ok((train, (val.rows() > 0).then_some(val)))
    }

    /// Mean and standard deviation of every column, summed in float64.
    pub fn standardization(&self) -> Standardization {
        let rows = self.rows().max(1) as f64;
        let column_means = |value: &dyn Fn(usize, f32) -> f64| {
            let mut sums = vec![0.0; self.inputs];
            for row in self.features.chunks_exact(self.inputs) {
                row.iter().enumerate().for_each(|(column, &x)| sums[column] += value(column, x));
            }
            sums.into_iter().map(|sum| sum / rows).collect::<Vec<f64>>()
        };
        let mean = column_means(&|_, x| x.into());
        let variance = column_means(&|column, x| (f64::from(x) - mean[column]).powi(2));
        let std = variance.iter().map(|v| if v.sqrt() as f32 > 0.0 { v.sqrt() as f32 } else { 1.0 }).collect();
        Standardization { mean: mean.iter().map(|&m| m as f32).collect(), std }
    }

    /// Subtracts the mean and divides by the standard deviation of every column.
    ///
    /// # Errors
    /// A standardisation of rows of another length.
    pub fn standardize(&mut self, by: &Standardization) -> Result<()> {
        if by.mean.len() != self.inputs || by.std.len() != self.inputs {
            let why =
                format!("these rows have {} inputs, but the standardisation is of {}", self.inputs, by.mean.len());
            return Err(Error::Usage(why));
        }
        for row in self.features.chunks_exact_mut(self.inputs) {
            for ((x, mean), std) in row.iter_mut().zip(&by.mean).zip(&by.std) {
                // In float64, where the difference of two float32 cannot overflow.
                *x = ((f64::from(*x) - f64::from(*mean)) / f64::from(*std)) as f32;
            }
        }
        Ok(())
    }

    /// The order of rows in training: shuffled by a seed, or sequential without one.
    pub fn order(&self, seed: Option<u64>) -> Result<Order> {
        match (self.rows() as u64, seed) {
            (0, _) => Err(Error::Usage("there are no rows of numbers to train on".into())),
            (rows, Some(seed)) => Ok(Order::shuffled(rows, seed)),
            (rows, None) => Ok(Order::sequential(rows)),
        }
    }

    /// Fills a batch with the rows at the global indices from `first_sample` of `order`, which must be over these rows.
    /// Returns the number of labels that count: all. Allocates nothing.
    pub fn fill(&self, order: &Order, first_sample: u64, batch: &mut RowBatch) -> usize {
        assert_eq!(order.samples(), self.rows() as u64, "the order belongs to other data");
        (0..batch.labels.len())
            .map(|at| self.fill_row(order.sample(first_sample + at as u64) as usize, at, batch))
            .sum()
    }

    /// Fills a batch with consecutive rows from `first_row`, for evaluation. Past the last row the label is -1. Returns
    /// the number of labels that count.
    pub fn fill_consecutive(&self, first_row: usize, batch: &mut RowBatch) -> usize {
        (0..batch.labels.len()).map(|at| self.fill_row(first_row + at, at, batch)).sum()
    }

    fn fill_row(&self, row: usize, at: usize, batch: &mut RowBatch) -> usize {
        let inputs = &mut batch.inputs[at * self.inputs..(at + 1) * self.inputs];
        if row < self.rows() {
            inputs.copy_from_slice(self.row(row));
            batch.labels[at] = self.labels[row];
            return 1;
        }
        inputs.fill(0.0);
        batch.labels[at] = -1;
        0
    }

    fn row(&self, row: usize) -> &[f32] {
        &self.features[row * self.inputs..(row + 1) * self.inputs]
    }
}

/// A number as a class, if it is one.
fn label(value: f64) -> Option<i32> {
    (value.fract() == 0.0 && (0.0..MAX_CLASSES as f64).contains(&value)).then_some(value as i32)
}

/// What is wrong with a number that [`label`] refuses.
const NOT_A_LABEL: &str = "is not a class: classes are integers from 0 to 65535";

#[cfg(test)]
mod tests;
