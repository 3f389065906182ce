//! Compiles the kernels, where an nvcc is found, and puts commit and toolkit into `mupscale --version`.

#[path = "build/kernels.rs"]
mod kernels;
#[path = "build/nvcc.rs"]
mod nvcc;

use std::{env, path::Path, process::Command};

fn main() {
    let toolkit = kernels::embed().unwrap_or_else(|message| {
        println!("cargo::error={}", message.lines().next().unwrap_or_default());
        // Cargo shows the rest, nvcc's own words, because the script fails.
        eprintln!("{message}");
        std::process::exit(1);
    });
    // A source archive has no commit to name.
    let commit = git(&["rev-parse", "--short=10", "HEAD"]);
    let made_of: Vec<String> = commit.into_iter().chain(toolkit.map(|version| format!("CUDA {version}"))).collect();
    let made_of = if made_of.is_empty() { String::new() } else { format!(" ({})", made_of.join(", ")) };
    println!("cargo::rustc-env=MUPSCALE_VERSION={}{made_of}", env::var("CARGO_PKG_VERSION").unwrap_or_default());
    // Where git keeps them, which for a second working tree is elsewhere. A watched file that is missing would rebuild
    // everything at every call.
    for name in ["HEAD", "logs/HEAD"] {
        if let Some(path) = git(&["rev-parse", "--git-path", name]).filter(|path| Path::new(path).exists()) {
            println!("cargo::rerun-if-changed={path}");
        }
    }
}

/// What git answers, in the repository of this script.
fn git(arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").args(arguments).output().ok().filter(|output| output.status.success())?;
    Some(String::from_utf8(output.stdout).ok()?.trim().to_string())
}
