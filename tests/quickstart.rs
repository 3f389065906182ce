//! The quickstart from outside: its folder, its numbers, and that the commands it prints do what it did.

use mupscale::{
    data::synth::{CorpusFormat, Synth},
    report::metrics::{self, Record},
    run,
    upscale::Origin,
};
use serde_json::Value;
use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Command, Output},
};

/// A tiny quickstart in a folder of its own.
struct Quickstart {
    dir: tempfile::TempDir,
    printed: String,
    summary: Value,
}

/// With a space, so that the commands show whether they are quoted.
const OUT: &str = "quick start";

impl Quickstart {
    fn run(dir: tempfile::TempDir, arguments: &[&str]) -> Self {
        let all = [&["quickstart", "--size", "tiny", "--out", OUT], arguments].concat();
        let printed = succeeded(mupscale(dir.path(), &all));
        let summary = serde_json::from_slice(&fs::read(dir.path().join(OUT).join("summary.json")).unwrap()).unwrap();
        Self { dir, printed, summary }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(OUT).join(name)
    }

    /// Runs the printed command whose line contains `part` (which may end the line), and `more`, in a shell in the folder where the quickstart ran.
    fn repeat(&self, part: &str, more: &str) -> String {
        let is_it = |line: &&str| line.starts_with("  ") && format!("{line}\n").contains(part);
        let line = self.printed.lines().find(is_it).unwrap_or_else(|| panic!("no {part} in {}", self.printed));
        let shell = Command::new("sh").args(["-c", &format!("{line} {more}")]).current_dir(self.dir.path()).output();
        succeeded(shell.expect("a shell"))
    }

    /// Losses of a run, training and validation, in order.
    fn losses(&self, run: &str) -> Vec<f64> {
        let records = metrics::read(&self.path(run).join(metrics::FILE_NAME)).unwrap();
        let loss = |record| match record {
            Record::Step(r) => r.loss,
            Record::Validation(r) => r.loss,
            Record::Sample(_) => panic!("a quickstart writes no texts"),
        };
        records.into_iter().map(loss).collect()
    }
}

fn mupscale(dir: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_mupscale")).args(arguments).current_dir(dir).output().expect("the program starts")
}

fn succeeded(output: Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

fn number(value: &Value, key: &str) -> f64 {
    value[key].as_f64().unwrap_or_else(|| panic!("{key} is no number in {value}"))
}

#[test]
fn a_quickstart_shows_the_method() {
    let quickstart = Quickstart::run(tempfile::tempdir().unwrap(), &[]);
    for file in ["base.toml", "widened.toml", "scratch.toml", "corpus.jsonl", "tokenizer.json", "data/dataset.json"] {
        assert!(quickstart.path(file).is_file(), "{file} is missing");
    }
    let picture = fs::read_to_string(quickstart.path("report.svg")).unwrap();
    assert!(picture.starts_with("<svg") && picture.contains("entropy floor"));

    let summary = &quickstart.summary;
    // Some 1e-7 is seen: the two sum in different orders.
    assert!(number(summary, "equivalence_max_loss_difference") < 1e-5, "{summary}");
    assert_eq!(number(summary, "equivalence_steps"), 8.0);
    assert!(number(summary, "seconds") > 0.0);
    let [base, widened, scratch, floor] =
        ["base_loss", "widened_loss", "scratch_loss", "entropy_floor"].map(|key| number(summary, key));
    assert!(floor > 0.5 && floor < widened && floor < scratch && widened < base - 0.1, "{summary}");
    assert_eq!(quickstart.losses("base").last(), Some(&base));

    // Only their beginnings tell the two wide models apart.
    let meaning = |run: &str| {
        let checkpoint = run::newest_checkpoint(&quickstart.path(run)).unwrap();
        Origin::open(&checkpoint).unwrap().meaning
    };
    assert_eq!(meaning("widened"), meaning("scratch"));
    assert_eq!(meaning("widened").scaling, meaning("base").scaling);
    assert_ne!(meaning("widened").spec, meaning("base").spec);

    commands_repeat_the_steps(&quickstart);
}

/// Results do not depend on when, or how often, a command is run: what it leaves is the same to the bit.
fn commands_repeat_the_steps(quickstart: &Quickstart) {
    let files = ["corpus.jsonl", "tokenizer.json", "data/train_000000.bin", "data/val_000000.bin"];
    let read = || files.map(|file| fs::read(quickstart.path(file)).unwrap());
    let before = read();
    for command in ["data synth", "data train-tokenizer", "data tokenize"] {
        quickstart.repeat(command, "");
    }
    assert!(read() == before, "the data commands made something else");

    let runs = ["equivalence/narrow", "equivalence/wide", "widened"];
    let losses = runs.map(|run| quickstart.losses(run));
    for part in ["init.upscale.width=1", "init.upscale.width=2", "widened.toml' --force\n"] {
        quickstart.repeat(part, "");
    }
    assert_eq!(runs.map(|run| quickstart.losses(run)), losses);

    let evaluated: Value = serde_json::from_str(&quickstart.repeat(" eval ", "--json")).unwrap();
    let widened = number(&quickstart.summary, "widened_loss");
    assert!((number(&evaluated, "loss") - widened).abs() < 1e-5, "{evaluated} {widened}");
    quickstart.repeat(" generate ", "--tokens 5");
    quickstart.repeat(" inspect ", "");
}

#[test]
fn a_quickstart_on_ones_own_text_has_no_floor() {
    let dir = tempfile::tempdir().unwrap();
    let mut text = File::create(dir.path().join("mine.txt")).unwrap();
    Synth::new(7).write_corpus(&mut text, 0, 300_000, CorpusFormat::Text).unwrap();
    let quickstart = Quickstart::run(dir, &["--text", "mine.txt", "--json"]);
    assert!(quickstart.summary["entropy_floor"].is_null());
    assert!(number(&quickstart.summary, "widened_loss") < number(&quickstart.summary, "base_loss"));
    assert_eq!(serde_json::from_str::<Value>(&quickstart.printed).unwrap(), quickstart.summary);
    assert!(!quickstart.path("corpus.jsonl").exists());
}

#[test]
fn what_cannot_be_is_refused_and_nothing_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let refused = |arguments: &[&str], words: &[&str]| {
        let output = mupscale(dir.path(), &[&["quickstart", "--size", "tiny"], arguments].concat());
        let message = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{message}");
        words.iter().for_each(|word| assert!(message.contains(word), "{word} is not in: {message}"));
    };
    fs::create_dir(dir.path().join("thesis")).unwrap();
    fs::write(dir.path().join("thesis/widened.toml"), "years of work").unwrap();
    refused(&["--out", "thesis"], &["thesis", "--force"]);
    refused(&["--out", "thesis", "--force"], &["thesis", "no quickstart made this"]);
    assert_eq!(fs::read_to_string(dir.path().join("thesis/widened.toml")).unwrap(), "years of work");
    refused(&["--text", "nowhere.txt"], &["nowhere.txt"]);
    assert!(!dir.path().join("quickstart").exists(), "a folder was made for nothing");
    fs::write(dir.path().join("short.txt"), "Too short to learn from.").unwrap();
    refused(&["--text", "short.txt"], &["short.txt", "too short"]);
}
