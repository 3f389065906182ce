//! The folders beside a checkpoint while it is made, replaced or removed, and how each ends after a death in between.
//!
//! For a checkpoint `NAME` they are, in the same parent:
//!
//! | folder | holds | when found later |
//! |---|---|---|
//! | `.NAME.partial-PID-RANDOM` | a checkpoint being written, locked by its writer | removed, unless the lock is held |
//! | `.NAME.replaced` | the old checkpoint, between the two renames of a replacement | takes its name again if that is free |
//! | `.NAME.removed` | what is being deleted | removed |

use std::{
    ffi::OsString,
    fs::{self, File},
    hash::{BuildHasher, RandomState},
    io,
    path::{Path, PathBuf},
    process,
};

use super::{INDEX, MANIFEST, STATE, disk::Disk};
use crate::{Error, Result};

const PARTIAL: &str = ".partial-";
const REPLACED: &str = ".replaced";
const REMOVED: &str = ".removed";

/// The folder that `dir` lies in.
pub(super) fn parent(dir: &Path) -> &Path {
    match dir.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

/// `.NAME` and the ending, beside `dir`.
fn sibling(dir: &Path, ending: &str) -> PathBuf {
    let mut name = OsString::from(".");
    name.push(dir.file_name().unwrap_or_default());
    name.push(ending);
    dir.with_file_name(name)
}

/// Where the old checkpoint waits while a new one takes its place.
pub(super) fn replaced(dir: &Path) -> PathBuf {
    sibling(dir, REPLACED)
}

/// A new folder to write `dir` in, and the lock that says that its writer lives.
pub(super) fn partial(disk: &Disk, dir: &Path) -> Result<(PathBuf, File)> {
    // No name comes twice, so that who still writes a part of a checkpoint whose owner died writes into no other one.
    let path = sibling(dir, &format!("{PARTIAL}{}-{:016x}", process::id(), RandomState::new().hash_one(dir)));
    disk.create_dir(&path)?;
    let lock = File::open(&path).map_err(Error::io("open", &path))?;
    // Where locks do not exist nobody can hold or find one, and the folder stays if its writer dies.
    let _ = lock.try_lock();
    Ok((path, lock))
}

/// The folder of this name, which another process has made to write `dir` in; none if the name is no such one.
pub(super) fn partial_of(dir: &Path, name: &str) -> Option<PathBuf> {
    let own = sibling(dir, PARTIAL);
    let plain = name.starts_with(own.file_name()?.to_str()?) && !name.contains(['/', '\0']);
    plain.then(|| dir.with_file_name(name))
}

/// Whether something is called `path`, be it a link that leads nowhere.
pub(super) fn exists(path: &Path) -> Result<bool> {
    match fs::symlink_metadata(path) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(Error::io("read", path)(error)),
    }
}

/// Whether a checkpoint may be written to `dir`; with `force` it may replace one, but nothing else.
pub(super) fn check_target(dir: &Path, force: bool) -> Result<()> {
    if dir.file_name().is_none() {
        return Err(Error::file(dir, "a checkpoint needs a folder with a name of its own; choose one"));
    }
    if !exists(dir)? {
        return Ok(());
    }
    if !force {
        return Err(Error::Exists { path: dir.into() });
    }
    let mut entries = match fs::symlink_metadata(dir) {
        Ok(found) if found.is_dir() => fs::read_dir(dir).map_err(Error::io("read", dir))?,
        _ => return Err(Error::file(dir, "it is not a folder, so no checkpoint can replace it; choose another name")),
    };
    if entries.next().is_some() && ![MANIFEST, INDEX, STATE].iter().any(|name| dir.join(name).exists()) {
        return Err(Error::file(
            dir,
            "it holds files that are no checkpoint; choose another name, or remove it yourself",
        ));
    }
    Ok(())
}

/// Ends a replacement of `dir` that was cut off: the old checkpoint gets its name back, or goes if the new one has it.
pub(super) fn recover(disk: &Disk, dir: &Path) -> Result<()> {
    let aside = replaced(dir);
    if !exists(&aside)? {
        return Ok(());
    }
    if exists(dir)? { discard(disk, &aside, dir) } else { disk.rename(&aside, dir) }
}

/// Removes `folder`, which is `dir` or lies beside it; at no moment does a part of it look whole.
pub(super) fn discard(disk: &Disk, folder: &Path, dir: &Path) -> Result<()> {
    let removed = sibling(dir, REMOVED);
    disk.remove(&removed)?;
    disk.rename(folder, &removed)?;
    disk.remove(&removed)
}

/// Ends what processes that died left in `parent`, for the checkpoints whose names are `mine`.
pub(super) fn clean(disk: &Disk, parent: &Path, mine: impl Fn(&str) -> bool) -> Result<()> {
    let entries = match fs::read_dir(parent) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries.map_err(Error::io("read", parent))?,
    };
    for entry in entries {
        let path = entry.map_err(Error::io("read", parent))?.path();
        let Some(hidden) = path.file_name().and_then(|name| name.to_str()?.strip_prefix('.')) else { continue };
        if let Some(name) = hidden.strip_suffix(REMOVED).filter(|name| mine(name)) {
            disk.remove(&parent.join(format!(".{name}{REMOVED}")))?;
        } else if let Some(name) = hidden.strip_suffix(REPLACED).filter(|name| mine(name)) {
            recover(disk, &parent.join(name))?;
        } else if hidden.rsplit_once(PARTIAL).is_some_and(|(name, _)| mine(name)) && is_abandoned(&path) {
            disk.remove(&path)?;
        }
    }
    Ok(())
}

/// Whether the writer of a partial checkpoint is gone: its lock went with it.
fn is_abandoned(partial: &Path) -> bool {
    File::open(partial).is_ok_and(|folder| folder.try_lock().is_ok())
}
