//! Checkpoints between mupscale, Hugging Face's `transformers` and llm.c.
//!
//! | file | |
//! |---|---|
//! | `config` | `config.json` in, in our terms |
//! | `families` | each family's tensors by name and shape, and what is folded into them |
//! | `layout` | how a foreign tensor is made of ours, for both ways |
//! | `tensors` | safetensors of the hub: single and sharded |
//! | `import`, `export` | the two directions |
//! | `llmc` | llm.c's checkpoints |
//! | `shards` | tokens for nanoGPT |
//! | `plain`, `verify` | logits of both sides |

mod config;
mod export;
mod families;
mod import;
mod layout;
mod llmc;
mod plain;
mod shards;
mod tensors;
mod verify;

use clap::{Parser, Subcommand, ValueEnum};
use config::CONFIG;
use export::{Export, Style};
use import::{CARRIED, FOREIGN_CONFIG};
use mupscale::{
    DType, Error, Result,
    checkpoint::MANIFEST,
    data::{Tokenizer, dataset::TOKENIZER_FILE, output::Partial},
    run,
    upscale::Origin,
};
use serde_json::{Map, Value, json};
use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
    process::ExitCode,
};

/// Convert checkpoints between mupscale, Hugging Face and llm.c
#[derive(Parser)]
#[command(name = "mupscale-convert", version = env!("MUPSCALE_VERSION"), propagate_version = true, max_term_width = 100)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// A folder with config.json and safetensors becomes a checkpoint; its shape is the base shape
    FromHf {
        /// The model's folder
        model: PathBuf,
        /// The checkpoint to write
        out: PathBuf,
        /// Shorten the context, for example to within a sliding window
        #[arg(long, value_name = "TOKENS")]
        context: Option<usize>,
        /// Compare logits of both sides afterwards
        #[arg(long)]
        verify: bool,
        #[command(flatten)]
        common: Common,
    },
    /// A checkpoint becomes a folder that transformers loads, with the same logits
    ToHf {
        /// The checkpoint, or a run folder, whose newest one is taken
        checkpoint: PathBuf,
        /// The folder to write
        out: PathBuf,
        /// How multipliers leave
        #[arg(long, default_value = "fold")]
        style: Style,
        /// Largest file of weights, in MiB
        #[arg(long, default_value_t = 5000.0, value_name = "MIB")]
        shard_size: f64,
        /// Take tokenizer files, generation_config.json and the ids of special tokens from this Hugging Face folder
        #[arg(long, value_name = "FOLDER")]
        files: Option<PathBuf>,
        /// Compare logits of both sides afterwards
        #[arg(long)]
        verify: bool,
        #[command(flatten)]
        common: Common,
    },
    /// A GPT-2 checkpoint of llm.c (gpt2_*.bin, version 3 or 5) becomes a checkpoint
    FromLlmc {
        /// llm.c's file
        file: PathBuf,
        /// The checkpoint to write
        out: PathBuf,
        /// Compare logits of both sides afterwards
        #[arg(long)]
        verify: bool,
        #[command(flatten)]
        common: Common,
    },
    /// A GPT-2 becomes a checkpoint of llm.c
    ToLlmc {
        /// The checkpoint, or a run folder, whose newest one is taken
        checkpoint: PathBuf,
        /// The file to write
        out: PathBuf,
        /// Compare logits of both sides afterwards
        #[arg(long)]
        verify: bool,
        #[command(flatten)]
        common: Common,
    },
    /// A dataset becomes nanoGPT's train.bin and val.bin
    ToNanogpt {
        /// A dataset folder, or one .bin file with a header
        data: PathBuf,
        /// The folder to write
        out: PathBuf,
        /// Replace what is there
        #[arg(long)]
        force: bool,
    },
}

#[derive(clap::Args)]
struct Common {
    /// Type to store; as it is if left out
    #[arg(long)]
    dtype: Option<Stored>,
    /// Replace what is there
    #[arg(long)]
    force: bool,
}

/// Types that weights are stored in.
#[derive(Clone, Copy, ValueEnum)]
enum Stored {
    /// IEEE binary32
    F32,
    /// bfloat16
    Bf16,
    /// IEEE binary16
    F16,
}

impl Common {
    fn dtype(&self) -> Option<DType> {
        self.dtype.map(|stored| match stored {
            Stored::F32 => DType::F32,
            Stored::Bf16 => DType::BF16,
            Stored::F16 => DType::F16,
        })
    }
}

fn main() -> ExitCode {
    match Args::parse().command.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Where nobody reads the message the code still tells.
            let _ = writeln!(io::stderr(), "error: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}

impl Command {
    fn run(self) -> Result<()> {
        match self {
            Self::FromHf { model, out, context, verify, common } => {
                import::from_hf(&model, &out, common.dtype(), context, common.force)?;
                if verify { report(&out, &model, &out) } else { Ok(()) }
            }
            Self::ToHf { checkpoint, out, style, shard_size, files, verify, common } => {
                let shard = shard_size * f64::from(1 << 20);
                if !(1.0..1e18).contains(&shard) {
                    return Err(Error::config("--shard-size", shard_size, "must be a positive number of MiB"));
                }
                let checkpoint = run::checkpoint_path(&checkpoint)?;
                to_hf(&checkpoint, &out, style, shard as usize, files.as_deref(), &common)?;
                if verify { report(&checkpoint, &out, &out) } else { Ok(()) }
            }
            Self::FromLlmc { file, out, verify, common } => {
                llmc::from_llmc(&file, &out, common.dtype(), common.force)?;
                if verify { report(&out, &file, &out) } else { Ok(()) }
            }
            Self::ToLlmc { checkpoint, out, verify, common } => {
                let checkpoint = run::checkpoint_path(&checkpoint)?;
                let origin = Origin::open_to_stream(&checkpoint)?;
                llmc::to_llmc(&origin, &out, common.dtype(), common.force)?;
                if verify { report(&checkpoint, &out, &out) } else { Ok(()) }
            }
            Self::ToNanogpt { data, out, force } => shards::to_nanogpt(&data, &out, force),
        }
    }
}

/// Writes a Hugging Face folder, whole or not at all.
fn to_hf(
    checkpoint: &Path,
    out: &Path,
    style: Style,
    shard: usize,
    files: Option<&Path>,
    common: &Common,
) -> Result<()> {
    let origin = Origin::open_to_stream(checkpoint)?;
    let mut export = Export::new(export::decoder(&origin)?, &origin.meaning.scaling, style)?;
    if out.join(MANIFEST).exists() {
        return Err(Error::file(out, "is a checkpoint, which no other folder replaces: choose another name"));
    }
    let partial = Partial::folder(out, common.force, CONFIG)?;
    let dir = partial.path();
    for name in CARRIED {
        let bytes = match files {
            Some(folder) if folder.join(name).is_file() => {
                fs::read(folder.join(name)).map_err(Error::io("read", folder.join(name)))?
            }
            _ if origin.reader.has_file(name) => origin.reader.bytes(name)?.to_vec(),
            _ => continue,
        };
        fs::write(dir.join(name), bytes).map_err(Error::io("write", dir.join(name)))?;
    }
    tokens(&origin, files, &mut export.config)?;
    let (tokenizer, generic) = (dir.join(TOKENIZER_FILE), dir.join("tokenizer_config.json"));
    if tokenizer.exists() && !generic.exists() {
        end_of_text(&Tokenizer::load(&tokenizer)?, &generic, &mut export.config)?;
    }
    export.write(&origin, dir, common.dtype(), shard)?;
    partial.publish()
}

/// Takes the ids of special tokens from the configuration that the model came with.
fn tokens(origin: &Origin, files: Option<&Path>, config: &mut Map<String, Value>) -> Result<()> {
    let known = match files {
        Some(folder) => config::HfConfig::open(folder)?.values,
        None if origin.reader.has_file(FOREIGN_CONFIG) => origin.reader.json(FOREIGN_CONFIG)?,
        None => return Ok(()),
    };
    for key in ["bos_token_id", "eos_token_id", "pad_token_id"] {
        if let Some(value) = known.get(key) {
            config.insert(key.into(), value.clone());
        }
    }
    Ok(())
}

/// Writes the configuration of a tokenizer that came without one, as those that were trained here do. What ends a document
/// begins one too, as in GPT-2.
fn end_of_text(tokenizer: &Tokenizer, path: &Path, config: &mut Map<String, Value>) -> Result<()> {
    let mut described = json!({ "tokenizer_class": "PreTrainedTokenizerFast" });
    if let Some(token) = tokenizer.end_of_text() {
        let text = tokenizer.decode(&[token])?;
        for name in ["bos_token", "eos_token"] {
            described[name] = text.clone().into();
            let id = config.entry(format!("{name}_id")).or_insert(Value::Null);
            if id.is_null() {
                *id = token.into();
            }
        }
    }
    tensors::write_json(path, &described)
}

/// Compares logits and says so. 16-bit weights round what is folded into them.
fn report(checkpoint: &Path, foreign: &Path, written: &Path) -> Result<()> {
    let difference = verify::compare(checkpoint, foreign)?;
    let (largest, scale) = (difference.largest, difference.scale);
    let line = format!("largest difference {largest:.3e}, largest logit {scale:.3e}, ratio {:.3e}\n", largest / scale);
    let mut out = io::stdout().lock();
    out.write_all(line.as_bytes()).and_then(|()| out.flush()).map_err(Error::io("write", "standard output"))?;
    difference.check(written)
}
