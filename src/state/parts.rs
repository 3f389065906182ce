//! What of a state goes into a checkpoint, and how it gets there: streamed, or by way of a copy in host memory.
//!
//! Each rank writes the tensors' elements that lie in the range of the arena that it owns, and nobody else writes those.

use super::{Moment, State, common, meta};
use crate::{
    DType, Result,
    backend::{Backend, HostBuffer, Ref, Stream, Tensor},
    checkpoint::{MODEL, OPTIMIZER, Writer},
    config::OptimizerConfig,
    model::param::{Row, Table},
};
use std::ops::Range;

/// Elements that are copied to the host at a time where no copy of everything is made.
const CHUNK: usize = 1 << 20;

/// Consecutive elements of a tensor of a checkpoint, and where they lie.
#[derive(Clone, Debug)]
pub struct Part {
    /// The tensor's name in the checkpoint.
    pub name: String,
    /// Which of its elements, in flat order, comes first.
    pub start: usize,
    /// Where their copy lies in a snapshot, in bytes.
    pub bytes: Range<usize>,
    /// The arena: a moment's, or for none that of the weights.
    source: Option<Moment>,
    /// Elements of the arena.
    values: Range<usize>,
}

impl Part {
    /// How many elements there are, at least one.
    pub fn elements(&self) -> usize {
        self.values.len()
    }
}

/// The tensors of a checkpoint in order: the names of rows' weights, and of what the optimizer keeps of them.
fn stored<'a>(
    table: &'a Table,
    optimizer: Option<&'a OptimizerConfig>,
) -> impl Iterator<Item = (Option<Moment>, usize, String)> + 'a {
    let weights = table.rows.iter().enumerate().map(|(i, row)| (None, i, row.name.clone()));
    let moments = optimizer.into_iter().flat_map(move |optimizer| {
        Moment::ALL.into_iter().flat_map(move |moment| {
            let kept = move |(_, row): &(usize, &Row)| moment.exists(optimizer, row);
            let named = move |(i, row): (usize, &Row)| (Some(moment), i, moment.name(&row.name));
            table.rows.iter().enumerate().filter(kept).map(named)
        })
    });
    weights.chain(moments)
}

/// Bytes of a snapshot of these parts.
pub fn snapshot_bytes(parts: &[Part]) -> usize {
    parts.last().map_or(0, |part| part.bytes.end)
}

impl<B: Backend> State<B> {
    /// Declares all tensors of a checkpoint. `optimizer`: whose moments there are; none for weights alone.
    pub fn declare(&self, table: &Table, optimizer: Option<&OptimizerConfig>, writer: &mut Writer) -> Result<()> {
        let (mut weights, mut moments) = (Vec::new(), Vec::new());
        for (source, i, name) in stored(table, optimizer) {
            let file = if source.is_none() { &mut weights } else { &mut moments };
            file.push(meta(&name, &table.rows[i], self.dtype(source)));
        }
        writer.tensors(MODEL, weights)?;
        if optimizer.is_some() { writer.tensors(OPTIMIZER, moments) } else { Ok(()) }
    }

    /// What a checkpoint holds of the elements `owned` of the table's arena.
    pub fn parts(&self, table: &Table, optimizer: Option<&OptimizerConfig>, owned: Range<usize>) -> Vec<Part> {
        let (mut parts, mut end) = (Vec::new(), 0);
        for (source, i, name) in stored(table, optimizer) {
            let row = table.values(i);
            let values = common(&row, &owned);
            if values.is_empty() {
                continue;
            }
            let bytes = end..end + values.len() * self.dtype(source).size();
            end = bytes.end;
            parts.push(Part { name, start: values.start - row.start, bytes, source, values });
        }
        parts
    }

    /// Writes weights and moments into a checkpoint. `optimizer`: whose moments there are; none for weights alone.
    pub fn save(
        &self,
        backend: &B,
        table: &Table,
        optimizer: Option<&OptimizerConfig>,
        writer: &mut Writer,
    ) -> Result<()> {
        self.declare(table, optimizer, writer)?;
        self.stream(backend, &self.parts(table, optimizer, 0..table.arena), writer)
    }

    /// Writes parts of a checkpoint whose tensors are declared, a piece of them in host memory at a time.
    pub fn stream(&self, backend: &B, parts: &[Part], writer: &Writer) -> Result<()> {
        let mut host = backend.host(CHUNK * DType::F64.size())?;
        for part in parts {
            for first in part.values.clone().step_by(CHUNK) {
                let values = first..(first + CHUNK).min(part.values.end);
                let bytes = values.len() * self.dtype(part.source).size();
                let start = part.start + first - part.values.start;
                backend.download(Stream::Compute, self.elements(part.source, values), &mut host, 0);
                backend.synchronize(&backend.record(Stream::Compute))?;
                writer.write(&part.name, start, &host.bytes()[..bytes])?;
            }
        }
        Ok(())
    }

    /// Copies parts to `host`, which has [`snapshot_bytes`]: the state as it is after all that was asked of the device.
    pub fn snapshot(&self, backend: &B, parts: &[Part], host: &mut B::Host) -> Result<()> {
        backend.wait(Stream::Copy, &backend.record(Stream::Compute));
        for part in parts {
            backend.download(Stream::Copy, self.elements(part.source, part.values.clone()), host, part.bytes.start);
        }
        backend.synchronize(&backend.record(Stream::Copy))
    }

    /// Elements of the table's arena, of the weights that the optimizer updates or of a moment: such as are here.
    fn elements(&self, source: Option<Moment>, values: Range<usize>) -> Ref<'_, B> {
        // Weights without a master copy are all here.
        let start = if source.is_none() && self.master.is_none() { 0 } else { self.owned.start };
        self.arena(source).slice(values.start - start..values.end - start)
    }

    fn dtype(&self, source: Option<Moment>) -> DType {
        self.arena(source).dtype()
    }

    /// The arena that a checkpoint's tensors are taken from.
    fn arena(&self, source: Option<Moment>) -> &Tensor<B> {
        let weights = self.master.as_ref().unwrap_or(&self.weights);
        source.map_or(weights, |moment| self.moment(moment).expect("an optimizer's state has its moments"))
    }
}
