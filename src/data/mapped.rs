#![allow(unsafe_code, reason = "mapping a file into memory")]
//! Files mapped into memory, read only.

use crate::error::{Error, Result};
use memmap2::Mmap;
use std::{fs::File, path::Path};

/// Maps the whole of a file. An empty file gives an empty map.
pub(super) fn map_file(path: &Path) -> Result<Mmap> {
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
