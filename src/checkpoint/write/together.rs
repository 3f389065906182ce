//! A checkpoint that several processes write: one owns it, the others are guests in its folder.
//!
//! The owner declares the tensors, which makes the files, and tells the guests the folder's name. A guest declares the
//! same tensors, which opens those files, and writes elements that nobody else writes. Its report says what it wrote,
//! with checksums, after that has reached the disk. The owner commits once it has admitted the reports: before, there
//! is no checkpoint, whoever died.

use super::{Checksum, Disk, OpenPiece, OpenSpan, OpenTensor, Writer, is_taken, mem, place};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, path::Path};

/// What a guest has written: consecutive elements of a piece of a tensor.
#[derive(Serialize, Deserialize)]
struct Stretch {
    tensor: String,
    start: usize,
    length: usize,
    blake3: String,
}

impl Writer {
    /// Takes part in writing the checkpoint `dir`, in the folder that its owner has called `folder` ([`Self::folder`]).
    /// What the owner has declared must be declared here too; headers and documents are the owner's alone.
    ///
    /// # Errors
    /// If that is no name of such a folder. That it is not seen here is noticed when tensors are declared.
    pub fn join(dir: impl AsRef<Path>, folder: &str) -> Result<Self> {
        Self::join_on(Disk::default(), dir.as_ref(), folder)
    }

    pub(in crate::checkpoint) fn join_on(disk: Disk, dir: &Path, folder: &str) -> Result<Self> {
        let strange = || Error::file(dir, format!("{folder:?} is no folder that it is written in"));
        Ok(Self {
            disk,
            target: dir.into(),
            force: true,
            partial: place::partial_of(dir, folder).ok_or_else(strange)?,
            lock: None,
            files: Vec::new(),
            tensors: BTreeMap::new(),
            committed: false,
        })
    }

    /// The name of the folder that is written in, for guests.
    pub fn folder(&self) -> String {
        self.partial.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// Ends a guest's part: what it wrote goes to the disk, and into a report for the owner.
    pub fn report(self) -> Result<Vec<u8>> {
        for file in &self.files {
            self.disk.sync(&file.file, &file.path)?;
        }
        let mut report = Vec::new();
        for (name, tensor) in &self.tensors {
            for piece in &tensor.pieces {
                let size = tensor.meta.dtype.size();
                for (begin, OpenSpan { end, checksum }) in mem::take(&mut *piece.lock()) {
                    let start = piece.range.start + (begin - piece.bytes.start) / size;
                    let unwritten = || Error::tensor(&self.target, name, "a part of it was not written to its end");
                    let blake3 = checksum.digest().ok_or_else(unwritten)?;
                    report.push(Stretch { tensor: name.clone(), start, length: (end - begin) / size, blake3 });
                }
            }
        }
        serde_json::to_vec(&report).map_err(|e| Error::file(&self.target, format!("no report can be made: {e}")))
    }

    /// Takes over what a guest has written.
    ///
    /// # Errors
    /// If the report is none, or tells of what was not declared or was written here as well.
    pub fn admit(&mut self, report: &[u8]) -> Result<()> {
        let strange = |e| {
            let why = format!("a process that wrote a part of it reports nonsense ({e}): do all run one version?");
            Error::file(&self.target, why)
        };
        let report: Vec<Stretch> = serde_json::from_slice(report).map_err(strange)?;
        for stretch in report {
            let name = stretch.tensor.clone();
            let taken = self.tensors.get(&name).is_some_and(|tensor| tensor.admit(stretch));
            if !taken {
                let why = "another process reports elements of it that do not exist or were written here too";
                return Err(Error::tensor(&self.target, name, why));
            }
        }
        Ok(())
    }
}

impl OpenTensor {
    /// Notes what a guest has written of it; false if that cannot be.
    fn admit(&self, Stretch { start, length, blake3, .. }: Stretch) -> bool {
        let Some(end) = start.checked_add(length).filter(|_| length > 0) else { return false };
        let holds = |piece: &&OpenPiece| piece.range.start <= start && end <= piece.range.end;
        let Some(piece) = self.pieces.iter().find(holds) else { return false };
        let byte = |element: usize| piece.bytes.start + (element - piece.range.start) * self.meta.dtype.size();
        let (begin, end, mut written) = (byte(start), byte(end), piece.lock());
        let free = !is_taken(&written, begin, end);
        if free {
            written.insert(begin, OpenSpan { end, checksum: Checksum::Told(blake3) });
        }
        free
    }
}
