//! The parameter table: one row per tensor, made of named axes. Kind, size, initial values, multipliers, weight decay,
//! clipping weight, widening, memory layout and checkpoint name all follow from a row; nothing else describes a
//! parameter.

use crate::{
    backend::ALIGNMENT,
    dims::{Axis, Dims},
};
use std::ops::Range;

/// What a tensor is to μP (upscaling.md, "The rule").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Rows picked by a fixed index (tokens, positions): input-like, its width is the second axis.
    Embedding,
    /// First matrix of an mlp: from fixed inputs to a width.
    Input,
    /// From widths to widths.
    Hidden,
    /// From a width to fixed outputs, with a forward multiplier ∝ 1 / width.
    Readout,
    /// Norm gains and biases: one axis.
    Vector,
}

/// Initial values.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// N(0, std²), std at the base shape.
    Normal(f64),
    /// All one: norm gains.
    Ones,
    /// All zero: biases.
    Zeros,
}

/// One tensor.
#[derive(Clone, Debug)]
pub struct Row {
    /// Name in checkpoints, printed tables, noise streams: `blocks.0.attention.q.weight`.
    pub name: String,
    /// What it is to μP.
    pub kind: Kind,
    /// `[output, input]`, or one axis for a vector. Memory is row-major.
    pub axes: Vec<Axis>,
    /// Initial values at the base shape.
    pub init: Init,
    /// The part of the network it belongs to; gradients of a group are complete together. Backward finishes groups
    /// from the highest to 0.
    pub group: usize,
    /// Stored right behind the row before, so that both are one matrix to a GEMM (Q, K, V; gate, up).
    pub glued: bool,
    /// Length of the first axis in memory: its size, or more where it is padded (the vocabulary). Padding is zero and
    /// leaves through no checkpoint.
    pub padded: usize,
}

impl Row {
    /// Sizes of the axes.
    pub fn shape(&self) -> Vec<usize> {
        self.axes.iter().map(Axis::size).collect()
    }

    /// Number of elements, padding not counted.
    pub fn len(&self) -> usize {
        self.axes.iter().map(Axis::size).product()
    }

    /// Whether the row has no elements (it always has some).
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Elements in memory, padding counted.
    pub fn stored(&self) -> usize {
        self.padded * self.columns()
    }

    /// Size of the input axis; 1 for a vector.
    pub fn columns(&self) -> usize {
        self.axes.get(1).map_or(1, Axis::size)
    }

    /// Whether weight decay and noise apply: matrices and embeddings, never gains and biases.
    pub fn is_matrix(&self) -> bool {
        self.kind != Kind::Vector
    }
}

/// Neighbouring rows of a table: one row, or rows that are glued.
pub type Span = Range<usize>;

/// All rows of a model at one shape, and where each lies in an arena.
#[derive(Clone, Debug)]
pub struct Table {
    /// Widths of this model.
    pub dims: Dims,
    /// The rows, in the order of the forward pass.
    pub rows: Vec<Row>,
    /// First element of each row in an arena (of weights, gradients, each moment: all alike).
    pub offsets: Vec<usize>,
    /// Elements of an arena, borders counted.
    pub arena: usize,
}

/// Builds a [`Table`] row by row.
pub struct TableBuilder {
    dims: Dims,
    rows: Vec<Row>,
    group: usize,
}

impl TableBuilder {
    /// An empty table for a model of this shape.
    pub fn new(dims: &Dims) -> Self {
        Self { dims: dims.clone(), rows: Vec::new(), group: 0 }
    }

    /// The widths.
    pub fn dims(&self) -> &Dims {
        &self.dims
    }

    /// Rows from here on belong to the next group.
    pub fn next_group(&mut self) {
        self.group += 1;
    }

    /// Adds a tensor.
    pub fn row(&mut self, name: impl Into<String>, kind: Kind, axes: Vec<Axis>, init: Init) -> Span {
        let padded = axes[0].size();
        self.rows.push(Row { name: name.into(), kind, axes, init, group: self.group, glued: false, padded });
        self.rows.len() - 1..self.rows.len()
    }

    /// Glues the rows added since `first` into one matrix (or vector), stacked along the first axis.
    pub fn glue(&mut self, first: Span) -> Span {
        let span = first.start..self.rows.len();
        for row in &mut self.rows[span.start + 1..] {
            row.glued = true;
        }
        span
    }

    /// Pads the first axis of a row in memory to a multiple of `multiple`.
    pub fn pad(&mut self, span: &Span, multiple: usize) {
        let row = &mut self.rows[span.start];
        row.padded = row.padded.next_multiple_of(multiple);
    }

    /// Lays the rows out. Rows start on [`ALIGNMENT`] borders for the smallest float, glued rows right behind another.
    pub fn build(self) -> Table {
        let step = ALIGNMENT / 2;
        let (mut offsets, mut end) = (Vec::with_capacity(self.rows.len()), 0usize);
        for row in &self.rows {
            if !row.glued {
                end = end.next_multiple_of(step);
            }
            offsets.push(end);
            end += row.stored();
        }
        Table { dims: self.dims, rows: self.rows, offsets, arena: end.next_multiple_of(step) }
    }
}

impl Table {
    /// Elements of an arena that a span of glued rows, or a single row, occupies.
    pub fn range(&self, span: &Span) -> Range<usize> {
        let last = span.end - 1;
        self.offsets[span.start]..self.offsets[last] + self.rows[last].stored()
    }

    /// Elements of an arena that hold the values of one row, padding left out.
    pub fn values(&self, row: usize) -> Range<usize> {
        self.offsets[row]..self.offsets[row] + self.rows[row].len()
    }

    /// Number of parameters.
    pub fn parameters(&self) -> usize {
        self.rows.iter().map(Row::len).sum()
    }

    /// The row with this name.
    pub fn find(&self, name: &str) -> Option<usize> {
        self.rows.iter().position(|r| r.name == name)
    }

    /// Number of groups.
    pub fn groups(&self) -> usize {
        self.rows.last().map_or(0, |r| r.group + 1)
    }

    /// Elements of an arena that a group occupies, up to where the next one starts.
    pub fn group(&self, group: usize) -> Range<usize> {
        let start = |g: usize| self.rows.iter().position(|r| r.group >= g).map_or(self.arena, |i| self.offsets[i]);
        start(group)..start(group + 1)
    }
}
