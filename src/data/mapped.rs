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
    // SAFETY: the map is read only and every use of its bytes here is a copy of plain integers, which have no invalid
    // values: should another program rewrite the file meanwhile, tokens change but nothing else can go wrong (readers
    // compare them with the vocabulary once, and the embedding looks them up with a bounds check of its own). Should
    // another program cut the file off, the system ends the process with SIGBUS. We never write to a file that we have
    // mapped: all output is written beside and renamed.
    unsafe { Mmap::map(&file) }.map_err(Error::io("map", path))
}
