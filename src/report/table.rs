//! Text tables for the terminal: aligned columns, two spaces between them, a rule under the header.

use std::fmt;

/// A table of text. A column whose every cell starts like a number is right-aligned.
///
/// ```text
/// run      loss   tokens
/// -------  -----  ------
/// base     4.123   1.2 M
/// ```
#[derive(Clone, Debug)]
pub struct Table {
    header: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these column names and no rows.
    pub fn new<T: Into<String>>(header: impl IntoIterator<Item = T>) -> Self {
        Self { header: header.into_iter().map(Into::into).collect(), rows: Vec::new() }
    }

    /// Adds a row; missing cells at its end are empty, cells beyond the header are dropped.
    pub fn row<T: Into<String>>(&mut self, cells: impl IntoIterator<Item = T>) {
        let mut row: Vec<String> = cells.into_iter().map(Into::into).collect();
        row.resize(self.header.len(), String::new());
        self.rows.push(row);
    }

    /// The cells of column `c`, header left out.
    fn column(&self, c: usize) -> impl Iterator<Item = &str> {
        self.rows.iter().map(move |row| row[c].as_str())
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let columns = 0..self.header.len();
        let right: Vec<bool> = columns.clone().map(|c| self.column(c).all(is_number_like)).collect();
        let width = |text: &str| text.chars().count();
        let widths: Vec<usize> =
            columns.map(|c| self.column(c).chain([self.header[c].as_str()]).map(width).max().unwrap_or(0)).collect();
        let rule: Vec<String> = widths.iter().map(|w| "-".repeat(*w)).collect();
        for row in [&self.header, &rule].into_iter().chain(&self.rows) {
            let cells: Vec<String> = row
                .iter()
                .zip(widths.iter().zip(&right))
                .map(|(cell, (&w, &right))| if right { format!("{cell:>w$}") } else { format!("{cell:<w$}") })
                .collect();
            writeln!(f, "{}", cells.join("  ").trim_end())?;
        }
        Ok(())
    }
}

/// Whether a cell reads as a number, with or without a unit, or as the absence of one.
fn is_number_like(cell: &str) -> bool {
    let unsigned = cell.trim_start_matches(['-', '+']);
    unsigned.is_empty() || unsigned == "NaN" || unsigned == "inf" || unsigned.starts_with(|c: char| c.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_go_left_and_numbers_right() {
        let mut table = Table::new(["run", "loss", "tokens"]);
        table.row(["base", "4.123", "900"]);
        table.row(["from scratch", "12.5", "1.2 M"]);
        table.row(["floor", "-"]);
        let expected = "\
run            loss  tokens
------------  -----  ------
base          4.123     900
from scratch   12.5   1.2 M
floor             -
";
        assert_eq!(table.to_string(), expected);
    }

    #[test]
    fn one_word_among_numbers_turns_a_column_to_the_left() {
        let mut table = Table::new(["shape"]);
        table.row(["64"]);
        table.row(["wide"]);
        assert_eq!(table.to_string(), "shape\n-----\n64\nwide\n");
    }

    #[test]
    fn width_is_counted_in_characters() {
        let mut table = Table::new(["σ", "x"]);
        table.row(["µµ", "1"]);
        assert_eq!(table.to_string(), "σ   x\n--  -\nµµ  1\n");
    }
}
