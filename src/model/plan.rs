//! Memory, planned by name before the first step: reserve, print, then commit to one allocation.

use crate::{
    DType, Error, Result,
    backend::{ALIGNMENT, Backend, Tensor},
    machine::size,
};
use std::fmt;

/// Tensors to come, by name.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    entries: Vec<(String, DType, usize)>,
}

/// A reserved tensor.
#[derive(Clone, Copy, Debug)]
pub struct Slot(usize);

impl Plan {
    /// Reserves `len` elements.
    pub fn reserve(&mut self, name: impl Into<String>, dtype: DType, len: usize) -> Slot {
        self.entries.push((name.into(), dtype, len));
        Slot(self.entries.len() - 1)
    }

    /// Bytes of all tensors, borders counted.
    pub fn bytes(&self) -> usize {
        self.entries.iter().map(|&(_, dtype, len)| bytes_of(dtype, len)).fold(0, usize::saturating_add)
    }

    /// Allocates everything at once.
    pub fn commit<B: Backend>(&self, backend: &B) -> Result<Planned<B>> {
        if self.bytes() > isize::MAX as usize {
            let why = "out of memory: the plan is larger than this machine can address; use a smaller batch or model";
            return Err(Error::Device(why.into()));
        }
        let parts: Vec<_> = self.entries.iter().map(|&(_, dtype, len)| (dtype, len)).collect();
        Ok(Planned(Tensor::carve(backend, &parts)?.into_iter().map(Some).collect()))
    }
}

/// One line for each name; names that differ only in a number (the blocks) share one.
impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut lines: Vec<(String, DType, usize, usize)> = Vec::new();
        for (name, dtype, len) in &self.entries {
            let general: String =
                name.split('.').map(|p| if p.parse::<u32>().is_ok() { "*" } else { p }).collect::<Vec<_>>().join(".");
            let bytes = bytes_of(*dtype, *len);
            match lines.iter_mut().find(|l| l.0 == general && l.1 == *dtype) {
                Some(line) => (line.2, line.3) = (line.2 + 1, line.3 + bytes),
                None => lines.push((general, *dtype, 1, bytes)),
            }
        }
        for (name, dtype, count, bytes) in lines {
            let times = if count > 1 { format!("  ({count})") } else { String::new() };
            writeln!(f, "  {:>10}  {:<4}  {name}{times}", size(bytes), dtype.name())?;
        }
        write!(f, "  {:>10}        in all", size(self.bytes()))
    }
}

/// Bytes of a tensor, its border counted; saturated, so that what no machine can address is too large for this one.
fn bytes_of(dtype: DType, len: usize) -> usize {
    len.checked_mul(dtype.size()).and_then(|bytes| bytes.checked_next_multiple_of(ALIGNMENT)).unwrap_or(usize::MAX)
}

/// The tensors of a committed plan, to be taken once each.
pub struct Planned<B: Backend>(Vec<Option<Tensor<B>>>);

impl<B: Backend> Planned<B> {
    /// Takes the tensor of a slot; each slot belongs to one owner.
    pub fn take(&mut self, slot: Slot) -> Tensor<B> {
        self.0[slot.0].take().expect("a slot is taken once")
    }
}
