//! A model from elsewhere as a checkpoint of ours: its shape is its own base, and nothing has been trained yet.

use crate::{
    config::{Described, HfConfig},
    families::{self, Fold},
    layout::{self, Foreign, Source},
    tensors::TensorFiles,
};
use mupscale::{
    DType, Error, Result,
    checkpoint::{CONFIG, MODEL, STATE, Writer},
    config::OptimizerConfig,
    data::{Tokenizer, dataset::TOKENIZER_FILE},
    model::{self, spec::DecoderSpec, spec::Scaling, spec::Spec},
    mup::Parametrization,
    state::{self, Meaning, Position, Progress},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

/// Files that a model carries beside weights and configuration, as they are.
pub const CARRIED: [&str; 11] = [
    TOKENIZER_FILE,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "README.md",
];

/// The foreign configuration, kept for what it says of tokens.
pub const FOREIGN_CONFIG: &str = "huggingface_config.json";

/// Elements of a foreign model.
pub trait Elements {
    /// Type of a tensor, which must have this shape.
    fn expect(&self, tensor: &Foreign) -> Result<DType>;
    /// All of it.
    fn read(&self, tensor: &Foreign) -> Result<Vec<u8>>;
    /// Where it lies, for errors.
    fn place(&self) -> &Path;
}

impl Elements for TensorFiles {
    fn expect(&self, tensor: &Foreign) -> Result<DType> {
        TensorFiles::expect(self, &tensor.name, &tensor.shape)
    }

    fn read(&self, tensor: &Foreign) -> Result<Vec<u8>> {
        self.read_all(&tensor.name)
    }

    fn place(&self) -> &Path {
        self.dir()
    }
}

/// Converts a folder of Hugging Face's form.
pub fn from_hf(dir: &Path, out: &Path, dtype: Option<DType>, context: Option<usize>, force: bool) -> Result<()> {
    let config = HfConfig::open(dir)?;
    let Described { mut spec, biases } = config.describe(context)?;
    let files = TensorFiles::open(dir)?;
    let gpt2 = families::is_gpt2(&spec)?;
    let prefix = if gpt2 && files.has("wte.weight") { "" } else { "transformer." };
    if !gpt2 && biases.output && !biases.mlp {
        // Ours has biases in all of attention's output and MLP, or in none.
        spec.bias = has_output_bias(&files, spec.layers)?;
    }
    let tensors = match gpt2 {
        true => families::gpt2(&spec, Fold::NONE, prefix, true)?,
        false => families::llama(&spec, biases, Fold::NONE),
    };
    no_others(&files, &tensors, &spec)?;
    let mut writer = Writer::create(out, force)?;
    let mut tokenizer = None;
    for name in CARRIED {
        let path = dir.join(name);
        if path.is_file() {
            writer.bytes(name, &fs::read(&path).map_err(Error::io("read", &path))?)?;
        }
    }
    let path = dir.join(TOKENIZER_FILE);
    if path.is_file() {
        let size = Tokenizer::load(&path)?.vocab_size();
        if size > spec.vocab {
            let why = format!("its {size} tokens are more than the model's vocabulary of {}", spec.vocab);
            return Err(Error::file(path, format!("{why}: use the tokenizer that belongs to the model")));
        }
        tokenizer = Some(TOKENIZER_FILE.to_string());
    }
    writer.json(FOREIGN_CONFIG, &config.values)?;
    write(spec, tokenizer, &files, &tensors, dtype, writer)
}

/// Whether an attention output's bias is more than the zeros that we write for one that is not there.
fn has_output_bias(files: &TensorFiles, layers: usize) -> Result<bool> {
    for i in 0..layers {
        let name = format!("model.layers.{i}.self_attn.o_proj.bias");
        if !layout::all_zero(&files.read_all(&name)?, files.meta(&name)?.0) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Every tensor in the files is one that the configuration describes, a constant, or a second copy of a tied embedding.
fn no_others(files: &TensorFiles, tensors: &[Foreign], spec: &DecoderSpec) -> Result<()> {
    let known: BTreeSet<&str> = tensors.iter().map(|t| t.name.as_str()).collect();
    for name in files.names() {
        if known.contains(name) || families::is_constant(name) {
            continue;
        }
        if name == "lm_head.weight" && spec.tied {
            let embedding = &tensors[0].name;
            if files.same(name, embedding)? {
                continue;
            }
            let why = format!("differs from {embedding}, but config.json ties them: set tie_word_embeddings to false");
            return Err(Error::tensor(files.dir(), name, why));
        }
        return Err(Error::tensor(files.dir(), name, "is one more than the model that config.json describes has"));
    }
    Ok(())
}

/// Writes the checkpoint and makes it visible.
pub fn write(
    spec: DecoderSpec,
    tokenizer: Option<String>,
    from: &impl Elements,
    tensors: &[Foreign],
    dtype: Option<DType>,
    mut writer: Writer,
) -> Result<()> {
    let scaling = Scaling::new(Parametrization::Mup, &spec.dims);
    let spec = Spec::Decoder(spec);
    let table = model::table(&spec, &scaling);
    // The type of each of our tensors, from the first foreign tensor that feeds it.
    let mut types: BTreeMap<&str, DType> = BTreeMap::new();
    let mut widest = None;
    for tensor in tensors {
        let found = from.expect(tensor)?;
        widest = widest.filter(|w: &DType| w.size() >= found.size()).or(Some(found));
        for part in &tensor.parts {
            if let Source::Row { name, .. } = &part.source {
                types.insert(name, dtype.unwrap_or(found));
            }
        }
    }
    let other = dtype.or(widest).unwrap_or(DType::F32);
    let metas =
        table.rows.iter().map(|row| state::meta(&row.name, row, *types.get(row.name.as_str()).unwrap_or(&other)));
    writer.json(CONFIG, &Meaning { spec, scaling, optimizer: OptimizerConfig::default(), tokenizer })?;
    let version = env!("CARGO_PKG_VERSION").into();
    writer.json(STATE, &Progress { position: Position::default(), data: 0, config: None, version })?;
    writer.tensors(MODEL, metas.collect())?;
    for tensor in tensors {
        let bytes = from.read(tensor)?;
        let found = from.expect(tensor)?;
        tensor.scatter(&bytes, found, dtype.unwrap_or(found), &writer, from.place())?;
    }
    // Biases that the foreign model lacks where ours has one.
    for row in table.rows.iter().filter(|row| !types.contains_key(row.name.as_str())) {
        assert!(row.name.ends_with(".bias"), "{} is fed by nothing", row.name);
        writer.write(&row.name, 0, &vec![0; row.len() * other.size()])?;
    }
    writer.commit()
}
