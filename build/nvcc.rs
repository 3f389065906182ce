//! The CUDA compiler: where it is, what it can, and how it is called.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

/// An nvcc that answers.
pub struct Nvcc {
    program: PathBuf,
    /// All that `nvcc --version` says, which is part of what a compiled kernel depends on.
    pub words: String,
    /// The toolkit's version: `13.0`.
    pub version: String,
    /// Architectures that it compiles for: 80, 86, …
    pub architectures: Vec<u32>,
}

impl Nvcc {
    /// The first of `CUDA_HOME`, PATH and the folder that tools/setup-cuda makes; `None` where there is none. One that
    /// the user named and that does not run is an error.
    pub fn find(root: &Path) -> Result<Option<Self>, String> {
        println!("cargo::rerun-if-env-changed=CUDA_HOME");
        println!("cargo::rerun-if-env-changed=PATH");
        if let Some(home) = env::var_os("CUDA_HOME").filter(|home| !home.is_empty()) {
            return Self::ask(Path::new(&home).join("bin/nvcc")).map(Some);
        }
        let path = env::var_os("PATH").unwrap_or_default();
        let folders = env::split_paths(&path).chain([root.join(".cuda/bin")]);
        folders.map(|folder| folder.join("nvcc")).find(|program| program.is_file()).map(Self::ask).transpose()
    }

    fn ask(program: PathBuf) -> Result<Self, String> {
        let answer = |argument: &str| {
            let wrong = |what: String| format!("{} {argument}: {what}", program.display());
            let output = Command::new(&program).arg(argument).output().map_err(|e| wrong(e.to_string()))?;
            let words = String::from_utf8_lossy(&output.stdout).into_owned();
            if output.status.success() { Ok(words) } else { Err(wrong(output.status.to_string())) }
        };
        let words = answer("--version")?;
        let version = words.split("release ").nth(1).and_then(|rest| rest.split(',').next());
        let version = version.ok_or_else(|| format!("{} --version names no release", program.display()))?.to_string();
        let architectures = answer("--list-gpu-arch")?;
        let architectures = architectures.lines().filter_map(|line| line.trim().strip_prefix("compute_")?.parse().ok());
        let architectures = architectures.collect();
        // When it goes, or another takes its place, kernels are compiled anew or not at all.
        println!("cargo::rerun-if-changed={}", program.display());
        Ok(Self { program, words, version, architectures })
    }

    /// Compiles `source` to `target`, and returns what nvcc said, as does the error.
    pub fn compile(&self, options: &[String], source: &Path, target: &Path) -> Result<String, String> {
        let mut command = Command::new(&self.program);
        command.args(options).arg(source).arg("-o").arg(target);
        let output = command.output().map_err(|e| format!("{}: {e}", self.program.display()))?;
        let words = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        if output.status.success() { Ok(words) } else { Err(format!("{command:?}\n{words}")) }
    }
}
