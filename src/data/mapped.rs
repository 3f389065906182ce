#![allow(unsafe_code, reason = "mapping a file into memory")]
//! Files mapped into memory, read only.

use crate::error::{Error, Result};
use memmap2::{Mmap, UncheckedAdvice};
use std::{fs::File, ops::Range, path::Path};

/// Maps the whole of a file. An empty file gives an empty map.
pub(crate) fn map_file(path: &Path) -> Result<Mmap> {
    let file = File::open(path).map_err(Error::io("open", path))?;
    if !file.metadata().map_err(Error::io("read", path))?.is_file() {
        return Err(Error::file(path, "is not a regular file"));
    }
    // SAFETY: the map is private to this process and read only, so nothing here can write through it, and we never
    // write to a file that may be mapped: all our output is written beside and renamed. What remains is another program
    // that rewrites or cuts off the file while it is mapped, which the type system cannot exclude on any system. The
    // bytes are only read as integers, which have no invalid values; pages that are cut off end the process with
    // SIGBUS.
    unsafe { Mmap::map(&file) }.map_err(Error::io("map", path))
}

/// Gives the pages of a part of a map back to the system, for those who stream through a file larger than memory; read
/// again, they come from the file again.
pub(crate) fn release(map: &Mmap, bytes: Range<usize>) {
    if !bytes.is_empty() && bytes.end <= map.len() {
        // SAFETY: the map is read-only, so its pages hold nothing but the file's content; dropped, they are read from it
        // again, and slices lent from the map see the same bytes. The range lies in the map. A refusal changes nothing
        // but the memory in use, so it is passed over.
        let _ = unsafe { map.unchecked_advise_range(UncheckedAdvice::DontNeed, bytes.start, bytes.len()) };
    }
}
