//! Where NVIDIA's shared libraries are. The driver's comes with the driver; the others with a toolkit, or with PyTorch's
//! packages, whose folders are on no search path: such a library is opened by its path here, after which opening it by
//! name, as cudarc does, finds it.
#![allow(unsafe_code, reason = "opens shared libraries")]

use crate::{Error, Result};
use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};
use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

/// A library that we need, by the names it may have.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    /// `cublasLt`
    pub name: &'static str,
    files: &'static [&'static str],
    /// How the names of libraries begin that it opens by name.
    beside: Option<&'static str>,
    fix: &'static str,
}

/// The driver.
pub const DRIVER: Wanted = Wanted {
    name: "cuda",
    files: &["libcuda.so.1", "libcuda.so"],
    beside: None,
    fix: "install NVIDIA's driver (550 or newer), or use --device cpu",
};
/// Matrix products.
pub const CUBLASLT: Wanted = Wanted {
    name: "cublasLt",
    files: &["libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"],
    beside: None,
    fix: "install CUDA's libraries (`pip install nvidia-cublas`, PyTorch, or the toolkit), or set CUDA_HOME",
};
/// The compiler for machines whose binary carries no image of a kernel.
pub const NVRTC: Wanted = Wanted {
    name: "nvrtc",
    files: &["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"],
    beside: Some("libnvrtc-builtins.so."),
    fix: "install CUDA's libraries (`pip install nvidia-cuda-nvrtc`, or the toolkit), or set CUDA_HOME",
};

/// Sums over GPUs.
pub const NCCL: Wanted = Wanted {
    name: "nccl",
    files: &["libnccl.so.2", "libnccl.so"],
    beside: None,
    fix: "install NCCL (`pip install nvidia-nccl-cu13`, PyTorch, or your system's libnccl2), or train with one process",
};

/// Where a library was found: by name on the system's search path, or in this folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// By its name.
    Name(&'static str),
    /// By its path.
    Path(PathBuf),
}

impl std::fmt::Display for Found {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Name(name) => f.write_str(name),
            Self::Path(path) => path.display().fmt(f),
        }
    }
}

/// Opens a library for the rest of the process, so that cudarc finds it by name.
pub fn require(wanted: Wanted) -> Result<Found> {
    for &file in wanted.files {
        if open(Path::new(file)) {
            return Ok(Found::Name(file));
        }
    }
    for folder in folders() {
        for file in wanted.files {
            let path = folder.join(file);
            if path.exists() && open_beside(folder, wanted) && open(&path) {
                return Ok(Found::Path(path));
            }
        }
    }
    let names = wanted.files.join(", ");
    Err(Error::Device(format!("{names} cannot be loaded: {}", wanted.fix)))
}

/// Opens a library for the rest of the process, to look up its functions.
pub(super) fn load(wanted: Wanted) -> Result<Library> {
    let name = match require(wanted)? {
        Found::Name(name) => PathBuf::from(name),
        Found::Path(path) => path,
    };
    // SAFETY: opened already, so nothing runs; `require` keeps it open.
    unsafe { Library::open(Some(&name), RTLD_NOW | RTLD_LOCAL) }
        .map_err(|e| Error::Device(format!("{} cannot be loaded: {e}", name.display())))
}

/// Opens what a library will look for by name, and would not find where it was itself found by its path.
fn open_beside(folder: &Path, wanted: Wanted) -> bool {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut beside = entries
        .filter(|entry| wanted.beside.is_some_and(|start| entry.file_name().to_string_lossy().starts_with(start)));
    beside.all(|entry| open(&entry.path()))
}

/// Opens a library for the rest of the process. False where there is none, or one that does not load.
fn open(path: &Path) -> bool {
    // Local, since these libraries carry C++ libraries of their own that must not take each other's functions.
    // SAFETY: NVIDIA's libraries (or their stand-ins in the tests) run no code of ours when they are loaded, and are
    // never unloaded.
    match unsafe { Library::open(Some(path), RTLD_NOW | RTLD_LOCAL) } {
        Ok(library) => {
            std::mem::forget(library);
            true
        }
        Err(_) => false,
    }
}

/// Folders beside the search path where a toolkit's libraries may lie.
fn folders() -> &'static [PathBuf] {
    static FOLDERS: OnceLock<Vec<PathBuf>> = OnceLock::new();
    FOLDERS.get_or_init(|| {
        let mut folders = Vec::new();
        for variable in ["CUDA_HOME", "CUDA_PATH"] {
            if let Some(home) = env::var_os(variable) {
                folders.extend(["lib64", "lib", "targets/x86_64-linux/lib"].map(|lib| Path::new(&home).join(lib)));
            }
        }
        for site in site_packages() {
            let mut found = libraries_under(&site.join("nvidia"));
            found.sort();
            folders.extend(found);
        }
        folders.extend(["/usr/local/cuda/lib64", "/opt/cuda/lib64"].map(PathBuf::from));
        folders
    })
}

/// `nvidia/*/lib`, as PyTorch's packages lay them out.
fn libraries_under(nvidia: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(nvidia).into_iter().flatten().flatten();
    entries.map(|entry| entry.path().join("lib")).filter(|lib| lib.is_dir()).collect()
}

/// The folders where the Python on the path keeps its packages; none where there is no Python.
fn site_packages() -> Vec<PathBuf> {
    let script =
        "import site, sys; print('\\n'.join([*site.getsitepackages(), site.getusersitepackages(), *sys.path]))";
    let run = |python: &str| Command::new(python).args(["-c", script]).output().ok();
    let Some(output) = run("python3").or_else(|| run("python")).filter(|output| output.status.success()) else {
        return Vec::new();
    };
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.lines().filter(|line| line.ends_with("-packages")).map(PathBuf::from).collect()
}
