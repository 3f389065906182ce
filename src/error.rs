//! Every way a command can fail, as one enum whose messages name the thing, its value, and what to do.

use std::{
    io,
    path::{Path, PathBuf},
};

/// What went wrong. The message names the file, field or tensor, the value found, and the remedy.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A configuration key or command-line option with a value that cannot be used.
    #[error("{field} = {value}: {why}")]
    Config {
        /// Dotted key, for example `model.kv_heads`, or an option, for example `--width`.
        field: String,
        /// The value as the user wrote it.
        value: String,
        /// What is wrong and what to write instead.
        why: String,
    },
    /// A file or folder whose content cannot be used.
    #[error("{}: {why}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it and what to do.
        why: String,
    },
    /// A tensor inside a file that cannot be used.
    #[error("{}: tensor {tensor}: {why}", path.display())]
    Tensor {
        /// The file that holds, or should hold, the tensor.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// What is wrong with it and what to do.
        why: String,
    },
    /// The operating system refused an operation on a file.
    #[error("{}: cannot {action}: {source}{}", path.display(), remedy(source))]
    Io {
        /// The file.
        path: PathBuf,
        /// A verb: `read`, `write`, `create`, `rename`.
        action: &'static str,
        /// The system's answer.
        source: io::Error,
    },
    /// An output that exists already.
    #[error("{} exists already: choose another name, or add --force to replace it", path.display())]
    Exists {
        /// The file or folder.
        path: PathBuf,
    },
    /// A command that cannot be carried out as asked, apart from one field or file.
    #[error("{0}")]
    Usage(String),
    /// The loss or a gradient is not a number any more; the weights are those of the step before.
    #[error("step {step}: {tensor} is not finite (NaN or infinity); the weights are those after step {}, saved in {}; \
             lower the learning rate, or go on past such steps with --on-nan skip", step - 1, checkpoint.display())]
    NonFinite {
        /// The step whose update was not made.
        step: u64,
        /// `loss`, or the first tensor whose gradient is not finite.
        tensor: String,
        /// The checkpoint written with the weights before the step.
        checkpoint: PathBuf,
    },
    /// A device (GPU, driver, library) that is missing or cannot do what is asked.
    #[error("{0}")]
    Device(String),
    /// A device that failed while it worked, or another rank.
    #[error("{0}")]
    Fault(String),
    /// A check that was asked for, and that does not pass.
    #[error("{0}")]
    Failed(String),
    /// Another rank of the run says why it ends; this one ends with it, without a word.
    #[error("another rank says why")]
    Elsewhere {
        /// The exit code of that rank.
        code: u8,
    },
    /// SIGTERM, SIGINT or SIGUSR1: the step was finished and saved.
    #[error("stopped by a signal after step {step}; saved in {}: go on with `mupscale resume {}`", checkpoint.display(), run.display())]
    Interrupted {
        /// Last finished step.
        step: u64,
        /// The checkpoint written.
        checkpoint: PathBuf,
        /// The run folder.
        run: PathBuf,
    },
}

/// Whether the system refused because there is no room left.
pub fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// Whether the system refused because of the name that it was given.
fn is_a_name(error: &io::Error) -> bool {
    use io::ErrorKind::{AlreadyExists, IsADirectory, NotADirectory, NotFound};
    matches!(error.kind(), AlreadyExists | IsADirectory | NotADirectory | NotFound)
}

/// What to do about a refusal, where that is not plain from the system's own words.
fn remedy(error: &io::Error) -> &'static str {
    if is_full(error) { ": the disk is full; make room, or choose another place" } else { "" }
}

/// Exit code for a device that failed while it worked, or another rank.
pub const FAULT: u8 = 3;

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// A configuration error; `field` is the dotted key or the option.
    pub fn config(field: impl Into<String>, value: impl ToString, why: impl Into<String>) -> Self {
        Self::Config { field: field.into(), value: value.to_string(), why: why.into() }
    }

    /// An error about a file's content.
    pub fn file(path: impl AsRef<Path>, why: impl Into<String>) -> Self {
        Self::File { path: path.as_ref().into(), why: why.into() }
    }

    /// An error about a tensor in a file.
    pub fn tensor(path: impl AsRef<Path>, tensor: impl Into<String>, why: impl Into<String>) -> Self {
        Self::Tensor { path: path.as_ref().into(), tensor: tensor.into(), why: why.into() }
    }

    /// Wraps a system error: `map_err(Error::io("read", path))`.
    pub fn io(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> Self {
        let path = path.as_ref().to_path_buf();
        move |source| Self::Io { path, action, source }
    }

    /// The process's exit code: 2 for input that must change or a device that is missing, 3 for a device that failed, 4 for a loss that is not finite,
    /// 75 (BSD's "temporary failure, try again") after a signal, 1 for what the operating system refused.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Config { .. } | Self::File { .. } | Self::Tensor { .. } | Self::Exists { .. } | Self::Usage(_) => 2,
            Self::Io { source, .. } if is_a_name(source) => 2,
            Self::Io { source, .. } if is_full(source) => 2,
            Self::Io { .. } => 1,
            Self::Device(_) => 2,
            Self::Failed(_) => 1,
            Self::Fault(_) => FAULT,
            Self::NonFinite { .. } => 4,
            Self::Interrupted { .. } => 75,
            Self::Elsewhere { code } => *code,
        }
    }
}
