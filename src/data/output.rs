//! Files and folders that appear whole or not at all: written beside their place, synchronised, and renamed.

use crate::error::{Error, Result};
use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    process,
};

/// A file or folder that is being written beside its final place. Dropped before [`Partial::publish`], it is removed,
/// unless it was told to stay.
pub struct Partial {
    beside: PathBuf,
    target: PathBuf,
    stays: bool,
    /// Of a folder: locked as long as this process writes it. The system unlocks it however the process ends.
    lock: Option<File>,
}

/// The file in a folder that its lock is on.
const LOCK: &str = ".lock";

impl Partial {
    /// Starts a folder that will be `target`, or goes on with what is left of one that stayed. An existing one is refused
    /// without `force`, and with `force` if it does not hold the file `mark`, which every folder of this kind holds:
    /// `--force` shall not delete somebody's home.
    pub fn folder(target: &Path, force: bool, mark: &str) -> Result<Self> {
        if target.exists() {
            if !force {
                return Err(Error::Exists { path: target.into() });
            }
            if !target.join(mark).is_file() {
                let why = format!(
                    "exists and holds no {mark}, so --force does not replace it: remove it or choose another name"
                );
                return Err(Error::file(target, why));
            }
        }
        let beside = sibling(target, "unfinished")?;
        fs::create_dir_all(&beside).map_err(Error::io("create", &beside))?;
        let lock = File::create(beside.join(LOCK)).map_err(Error::io("create", &beside))?;
        match lock.try_lock() {
            Ok(()) => Ok(Self { beside, target: target.into(), stays: false, lock: Some(lock) }),
            Err(fs::TryLockError::WouldBlock) => {
                Err(Error::file(target, "is being made by another process: wait for it, or choose another name"))
            }
            Err(fs::TryLockError::Error(error)) => Err(Error::io("lock", &beside)(error)),
        }
    }

    /// From now on what has been written stays if this is dropped: the next [`Partial::folder`] goes on with it.
    pub fn stay(&mut self) {
        self.stays = true;
    }

    /// Starts a file that will be `target`; an existing one is refused without `force`.
    pub fn file(target: &Path, force: bool) -> Result<Self> {
        if target.is_dir() || (target.exists() && !force) {
            return Err(Error::Exists { path: target.into() });
        }
        let partial = Self::beside(target)?;
        if let Some(parent) = partial.beside.parent() {
            fs::create_dir_all(parent).map_err(Error::io("create", parent))?;
        }
        Ok(partial)
    }

    /// Writes `content` to the file `target`; an existing one is refused without `force`.
    pub fn write_file(target: &Path, force: bool, content: &[u8]) -> Result<()> {
        let partial = Self::file(target, force)?;
        write_synced(&partial.beside, content)?;
        partial.publish()
    }

    /// The folder, or file, to write into.
    pub fn path(&self) -> &Path {
        &self.beside
    }

    /// Puts what was written in its place; what was there before is removed after that.
    pub fn publish(mut self) -> Result<()> {
        if self.lock.take().is_some() {
            let lock = self.beside.join(LOCK);
            fs::remove_file(&lock).map_err(Error::io("remove", &lock))?;
            File::open(&self.beside).and_then(|f| f.sync_all()).map_err(Error::io("write", &self.beside))?;
            let old = sibling(&self.target, &format!("old-{}", process::id()))?;
            let replaced = self.target.exists();
            if replaced {
                fs::rename(&self.target, &old).map_err(Error::io("rename", &self.target))?;
            }
            fs::rename(&self.beside, &self.target).map_err(Error::io("rename", &self.beside))?;
            if replaced {
                fs::remove_dir_all(&old).map_err(Error::io("remove", &old))?;
            }
        } else {
            fs::rename(&self.beside, &self.target).map_err(Error::io("rename", &self.beside))?;
        }
        self.stays = true;
        Ok(())
    }

    fn beside(target: &Path) -> Result<Self> {
        let beside = sibling(target, &format!("partial-{}", process::id()))?;
        Ok(Self { beside, target: target.into(), stays: false, lock: None })
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.stays {
            // Only tidying up: the error that led here is the one to report.
            let _ = if self.beside.is_dir() { fs::remove_dir_all(&self.beside) } else { fs::remove_file(&self.beside) };
        }
    }
}

/// Writes a file and waits until it is on the disk.
pub fn write_synced(path: &Path, content: &[u8]) -> Result<()> {
    let mut file = File::create(path).map_err(Error::io("create", path))?;
    file.write_all(content).and_then(|()| file.sync_all()).map_err(Error::io("write", path))
}

/// A hidden name in the same folder.
fn sibling(target: &Path, kind: &str) -> Result<PathBuf> {
    let name =
        target.file_name().ok_or_else(|| Error::file(target, "is no name for an output: give it a name of its own"))?;
    Ok(target.with_file_name(format!(".{}.{kind}", name.to_string_lossy())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_appears_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("out");
        drop(Partial::folder(&target, false, "mark").unwrap());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "what was not published is removed");

        let write = |force, content: &str| -> Result<()> {
            let partial = Partial::folder(&target, force, "mark")?;
            write_synced(&partial.path().join("mark"), content.as_bytes())?;
            assert_ne!(fs::read_to_string(target.join("mark")).unwrap_or_default(), content);
            partial.publish()
        };
        write(false, "one").unwrap();
        assert!(matches!(write(false, "two"), Err(Error::Exists { .. })));
        assert_eq!(fs::read_to_string(target.join("mark")).unwrap(), "one");
        write(true, "two").unwrap();
        assert_eq!(fs::read_to_string(target.join("mark")).unwrap(), "two");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_folder_that_stayed_is_gone_on_with_by_one_process_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("out");
        let mut partial = Partial::folder(&target, false, "mark").unwrap();
        assert!(Partial::folder(&target, false, "mark").is_err_and(|e| e.to_string().contains("another process")));
        write_synced(&partial.path().join("mark"), b"half").unwrap();
        partial.stay();
        drop(partial);
        let partial = Partial::folder(&target, false, "mark").unwrap();
        assert_eq!(fs::read_to_string(partial.path().join("mark")).unwrap(), "half");
        partial.publish().unwrap();
        assert_eq!(fs::read_dir(&target).unwrap().count(), 1, "the lock is no part of the folder");
    }

    #[test]
    fn force_replaces_only_folders_of_our_own() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("thesis.tex"), "years of work").unwrap();
        assert!(matches!(Partial::folder(dir.path(), true, "mark"), Err(Error::File { .. })));
        assert!(dir.path().join("thesis.tex").exists());
    }

    #[test]
    fn a_file_is_replaced_only_with_force() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("new/file");
        Partial::write_file(&target, false, b"one").unwrap();
        assert!(matches!(Partial::write_file(&target, false, b"two"), Err(Error::Exists { .. })));
        Partial::write_file(&target, true, b"two").unwrap();
        assert_eq!(fs::read(&target).unwrap(), b"two");
        assert_eq!(fs::read_dir(target.parent().unwrap()).unwrap().count(), 1);
    }
}
