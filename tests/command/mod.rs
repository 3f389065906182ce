//! The binary as a user types it, in a folder of its own that holds a corpus, a dataset and two finished runs.
#![allow(dead_code, reason = "each of the test files that share this uses a part of it")]

pub mod ranks;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::LazyLock,
};
use tempfile::TempDir;

/// A tiny language model on the dataset `data`.
const RUN: &str = "run = 'r'\nsteps = 4\nthreads = 1\n[data]\npath = 'data'\n[batch]\nsize = 2\n\
                   [optimizer]\nlr = 0.01\n[checkpoint]\nevery = 2\n\
                   [model]\narch = 'gpt2'\nlayers = 1\nresidual = 16\nkv_heads = 2\ncontext = 16\n";
/// A tiny classifier on the rows of `rows.csv`.
const ROWS: &str = "run = 'm'\nsteps = 4\nthreads = 1\n[data]\npath = 'rows.csv'\n[batch]\nsize = 4\n\
                    [model]\narch = 'mlp'\nhidden = [6, 4]\n";

/// What a command answered.
pub struct Said {
    /// The exit code; −1 for a process that a signal ended.
    pub code: i32,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

impl Said {
    /// What a process that ended has answered; panics where it panicked.
    pub fn new(output: Output) -> Self {
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        let said =
            Self { code: output.status.code().unwrap_or(-1), out: text(output.stdout), err: text(output.stderr) };
        assert!(!said.err.contains("panicked"), "{}", said.err);
        said
    }

    /// Standard output as JSON.
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.out).unwrap_or_else(|e| panic!("{e}: {}", self.out))
    }
}

/// A folder to type commands in.
pub struct Place {
    dir: TempDir,
}

impl Place {
    /// An own copy of the folder: `corpus.txt`, `data/`, `run.toml` and its run `base/`, `rows.csv`, `rows.toml` and
    /// its run `classes/`.
    pub fn new() -> Self {
        static TEMPLATE: LazyLock<Place> = LazyLock::new(Place::template);
        let place = Self { dir: tempfile::tempdir().unwrap() };
        copy(TEMPLATE.path(), place.path());
        place
    }

    /// An empty folder.
    pub fn empty() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    fn template() -> Self {
        let place = Self::empty();
        place.ok("data synth corpus.txt --bytes 20000");
        place.ok("data tokenize corpus.txt --out data");
        let row = |i: usize| format!("{},{},{}\n", (i * 7 % 13) as f64 / 6.0 - 1.0, (i * 5 % 11) as f64 / 5.0, i % 3);
        place.write("rows.csv", (0..60).map(row).collect::<String>());
        place.write("run.toml", RUN);
        place.write("rows.toml", ROWS);
        place.ok("train -c run.toml --set run=base");
        place.ok("train -c rows.toml --set run=classes");
        place
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// A path in the folder.
    pub fn join(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }

    /// Writes a file.
    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        fs::write(self.join(name), content).unwrap();
    }

    /// Reads a file.
    pub fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.join(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    /// The names in a folder, sorted.
    pub fn names(&self, name: &str) -> Vec<String> {
        let entries = fs::read_dir(self.join(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
        let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// The command, not yet started; its words are divided at spaces. `convert` is mupscale-convert.
    pub fn command(&self, line: &str) -> Command {
        let (program, line) = match line.strip_prefix("convert ") {
            Some(rest) => (env!("CARGO_BIN_EXE_mupscale-convert"), rest),
            None => (env!("CARGO_BIN_EXE_mupscale"), line),
        };
        let mut command = Command::new(program);
        command.args(line.split_whitespace()).current_dir(self.path()).stdin(Stdio::null());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Runs a command to its end.
    pub fn run(&self, line: &str) -> Said {
        Said::new(self.command(line).output().unwrap())
    }

    /// Runs a command that must succeed.
    pub fn ok(&self, line: &str) -> Said {
        let said = self.run(line);
        assert_eq!(said.code, 0, "{line}: {}", said.err);
        said
    }

    /// Runs a command that must be refused: exit code 2, a message that holds all the parts, and no file touched.
    pub fn refuses(&self, line: &str, parts: &[&str]) {
        let before = contents(self.path());
        let said = self.run(line);
        assert_eq!(said.code, 2, "{line}: {}{}", said.out, said.err);
        for part in parts {
            assert!(said.err.contains(part), "{line}: no `{part}` in: {}", said.err);
        }
        let after = contents(self.path());
        let changed: Vec<_> = before.iter().filter(|&(path, content)| after.get(path) != Some(content)).collect();
        assert!(changed.is_empty(), "{line}: changed {:?}", changed.iter().map(|(path, _)| path).collect::<Vec<_>>());
        let new: Vec<_> = after.keys().filter(|path| !before.contains_key(*path)).collect();
        assert!(new.is_empty(), "{line}: left {new:?} behind");
    }
}

/// Every path below a folder, with the content of files.
pub fn contents(folder: &Path) -> BTreeMap<PathBuf, Option<Vec<u8>>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(contents(&path));
            found.insert(path, None);
        } else {
            found.insert(path.clone(), Some(fs::read(path).unwrap()));
        }
    }
    found
}

/// Copies what is in a folder.
pub fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        if path.is_dir() {
            copy(&path, &target);
        } else {
            fs::copy(&path, &target).unwrap();
        }
    }
}

/// What a finished run must agree in with one that was never disturbed: weights, moments, position, and the metrics
/// apart from what a clock or a memory counter says.
pub fn essence(run: &Path, step: u64) -> (Vec<u8>, Vec<u8>, serde_json::Value, Vec<serde_json::Value>) {
    let checkpoint = run.join(format!("checkpoints/step-{step:08}"));
    let read = |name: &str| fs::read(checkpoint.join(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
    let timeless = |text: &[u8]| {
        let mut value: serde_json::Value = serde_json::from_slice(text).unwrap();
        let object = value.as_object_mut().unwrap();
        // `config` holds the name of the run folder.
        for key in ["seconds", "tokens_per_second", "memory", "config"] {
            object.remove(key);
        }
        value
    };
    let metrics = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let metrics = metrics.lines().map(|line| timeless(line.as_bytes())).collect();
    (read("model.safetensors"), read("optimizer.safetensors"), timeless(&read("state.json")), metrics)
}
