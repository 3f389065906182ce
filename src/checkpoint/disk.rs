//! Changes to the file system, each of which may fail: the one layer through which checkpoints are written, renamed
//! and removed, so that tests can let it fail at any of them.
#![allow(unsafe_code, reason = "space is asked for and reserved by system calls that the standard library lacks")]

use std::{
    ffi::CString,
    fs::{self, File},
    io, mem,
    os::{
        fd::AsRawFd,
        unix::{ffi::OsStrExt, fs::FileExt},
    },
    path::Path,
};

use super::place;
use crate::{Error, Result, error::is_full};

/// The file system.
#[derive(Clone, Default)]
pub(super) struct Disk {
    #[cfg(test)]
    pub faults: Option<std::sync::Arc<super::tests::Faults>>,
}

impl Disk {
    /// Called before every change; tests answer with a failure.
    fn before(&self, action: &'static str, path: &Path) -> io::Result<()> {
        #[cfg(test)]
        if let Some(faults) = &self.faults {
            return faults.before(action, path);
        }
        let _ = (action, path);
        Ok(())
    }

    /// Makes a folder, with those above it.
    pub fn create_dir(&self, path: &Path) -> Result<()> {
        let done = self.before("create", path).and_then(|()| fs::create_dir_all(path));
        done.map_err(|source| refused("create", path, source, 0))
    }

    /// Makes a file of `size` bytes, whose space is reserved where the file system can do so.
    pub fn create(&self, path: &Path, size: usize) -> Result<File> {
        let create = || {
            self.before("create", path)?;
            if free_bytes(path).is_some_and(|free| free < size as u64) {
                return Err(io::ErrorKind::StorageFull.into());
            }
            let file = File::options().write(true).create_new(true).open(path)?;
            reserve(&file, size)?;
            file.set_len(size as u64)?;
            Ok(file)
        };
        create().map_err(|source| refused("create", path, source, size))
    }

    /// Opens a file of `size` bytes that another process has made, to write a part of it.
    pub fn open(&self, path: &Path, size: usize) -> Result<File> {
        let missing = "another process has made it, but it is not seen here: processes that write a checkpoint \
                       together need a file system that all of them share";
        let found = self.before("open", path).and_then(|()| File::options().write(true).open(path));
        let file = found.map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => Error::file(path, missing),
            _ => refused("open", path, source, 0),
        })?;
        let found = file.metadata().map_err(Error::io("read", path))?.len();
        if found != size as u64 {
            let why = format!("it has {found} bytes instead of {size}: do all processes run one version?");
            return Err(Error::file(path, why));
        }
        Ok(file)
    }

    /// Writes all of `bytes` at `offset`; several threads may write to one file at once.
    pub fn write_at(&self, file: &File, path: &Path, bytes: &[u8], offset: usize) -> Result<()> {
        let refuse = |source| refused("write", path, source, offset + bytes.len());
        if let Err(source) = self.before("write", path) {
            // A write that is cut off leaves a part behind.
            file.write_all_at(&bytes[..bytes.len() / 2], offset as u64).map_err(refuse)?;
            return Err(refuse(source));
        }
        file.write_all_at(bytes, offset as u64).map_err(refuse)
    }

    /// Makes the content of a file, or the names in a folder, outlast a loss of power.
    pub fn sync(&self, file: &File, path: &Path) -> Result<()> {
        let done = self.before("sync", path).and_then(|()| file.sync_all());
        done.map_err(|source| refused("sync", path, source, 0))
    }

    /// [`Self::sync`] of a folder.
    pub fn sync_dir(&self, path: &Path) -> Result<()> {
        let folder = File::open(path).map_err(Error::io("open", path))?;
        self.sync(&folder, path)
    }

    /// Gives a folder another name.
    pub fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        let done = self.before("rename", from).and_then(|()| fs::rename(from, to));
        done.map_err(|source| refused("rename", from, source, 0))
    }

    /// Removes a folder with its files, if it exists.
    pub fn remove(&self, folder: &Path) -> Result<()> {
        let entries = match fs::read_dir(folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            entries => entries.map_err(Error::io("read", folder))?,
        };
        for entry in entries {
            let entry = entry.map_err(Error::io("read", folder))?;
            let path = entry.path();
            let remove = |()| match entry.file_type() {
                Ok(kind) if kind.is_dir() => fs::remove_dir_all(&path),
                _ => fs::remove_file(&path),
            };
            self.before("remove", &path).and_then(remove).map_err(Error::io("remove", &path))?;
        }
        self.before("remove", folder).and_then(|()| fs::remove_dir(folder)).map_err(Error::io("remove", folder))
    }
}

/// The error for what the system refused; `size` is how many bytes the file at `path` needs, if any.
fn refused(action: &'static str, path: &Path, source: io::Error, size: usize) -> Error {
    if !is_full(&source) {
        return Error::Io { path: path.into(), action, source };
    }
    let free = free_bytes(path).map_or(String::new(), |free| format!(", {free} are free"));
    let needed = if size == 0 { String::new() } else { format!(" (the file needs {size} bytes{free})") };
    let why = format!("the disk is full{needed}; make room or choose another place. Earlier checkpoints are unchanged");
    Error::file(path, why)
}

/// Bytes that may still be written to the file system that holds the folder of `path`; none if it does not say.
fn free_bytes(path: &Path) -> Option<u64> {
    let name = CString::new(place::parent(path).as_os_str().as_bytes()).ok()?;
    // SAFETY: `statvfs` is a struct of integers, for which all zeros are a value.
    let mut answer: libc::statvfs = unsafe { mem::zeroed() };
    // SAFETY: `name` is a string that ends in NUL and lives until the end of this function, `answer` is a struct of
    // the type that the call fills; the call keeps neither.
    let code = unsafe { libc::statvfs(name.as_ptr(), &mut answer) };
    // File systems without a limit, and some on a network, say that they have no blocks at all.
    (code == 0 && answer.f_blocks > 0).then(|| answer.f_bavail as u64 * answer.f_frsize as u64)
}

/// Reserves the first `size` bytes of an empty file.
#[cfg(target_os = "linux")]
fn reserve(file: &File, size: usize) -> io::Result<()> {
    let Ok(size @ 1..) = libc::off64_t::try_from(size) else { return Ok(()) };
    // SAFETY: the descriptor belongs to `file`, which is open for writing during the call; no memory is passed.
    if unsafe { libc::fallocate64(file.as_raw_fd(), 0, 0, size) } == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    // A file system that cannot reserve says so; the writes will then tell whether there is room.
    if is_full(&error) { Err(error) } else { Ok(()) }
}

/// Other systems tell of a full disk when it is written.
#[cfg(not(target_os = "linux"))]
fn reserve(_: &File, _: usize) -> io::Result<()> {
    Ok(())
}
