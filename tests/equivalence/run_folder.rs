//! Whole runs in folders of their own, through the code behind the commands.

use mupscale::{
    Result,
    checkpoint::{MODEL, OPTIMIZER},
    data::{
        Tokenizer,
        text::Corpus,
        tokenize::{TokenizeOptions, tokenize},
    },
    report::{
        metrics::{self, Record, StepRecord},
        progress::Show,
    },
    run::{self, Outcome},
};
use std::{fs, path::PathBuf};

/// A temporary folder with a small dataset in it.
pub struct Place {
    folder: tempfile::TempDir,
}

/// The model of these runs.
pub const MODEL_TOML: &str =
    "arch='llama'\nlayers=2\nresidual=16\nffn=24\nkv_heads=2\ngroup=2\nhead_dim=4\ncontext=16\ninit_std=0.2";

impl Place {
    /// 37 windows of 16 bytes.
    pub fn new() -> Self {
        let place = Self { folder: tempfile::tempdir().unwrap() };
        let text: String = (0..90).map(|i| format!("{} and {},", i * i % 97, i * 31 % 89)).collect();
        fs::write(place.path("text.txt"), &text[..37 * 16 + 8]).unwrap();
        let corpus = Corpus::open(&place.path("text.txt"), "text").unwrap();
        let options = TokenizeOptions { val_fraction: 0.0, ..Default::default() };
        tokenize(&corpus, &Tokenizer::bytes(), &place.path("data"), &options, &mut |_| {}).unwrap();
        place
    }

    /// A path in the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes a configuration, of which `sections` is all but the run folder, the data and the threads, and trains.
    pub fn train(&self, run: &str, keys: &str, sections: &str) -> Result<Outcome> {
        let file = self.path(&format!("{run}.toml"));
        let text = format!(
            "run={:?}\nthreads=1\n{keys}\n[data]\npath={:?}\n[validation]\nevery=0\n{sections}\n",
            self.path(run),
            self.path("data")
        );
        fs::write(&file, text).unwrap();
        run::train_file(&file, &[], false, Show::Quiet)
    }

    /// The bytes of a checkpoint's weights and moments.
    pub fn tensors(&self, run: &str, step: u64) -> [Vec<u8>; 2] {
        self.folder_tensors(&format!("{run}/checkpoints/step-{step:08}"))
    }

    /// The same, of a folder.
    pub fn folder_tensors(&self, folder: &str) -> [Vec<u8>; 2] {
        [MODEL, OPTIMIZER].map(|file| fs::read(self.path(folder).join(file)).unwrap())
    }

    /// The steps in a run's log.
    pub fn steps(&self, run: &str) -> Vec<StepRecord> {
        let records = metrics::read(&self.path(run).join(metrics::FILE_NAME)).unwrap();
        let step = |record| if let Record::Step(step) = record { Some(step) } else { None };
        records.into_iter().filter_map(step).collect()
    }
}
