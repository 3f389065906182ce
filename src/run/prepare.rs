//! From a configuration to everything a run starts from: data, model, position. Nothing is written.

use super::{CONFIG_FILE, author::Drawing, checkpoint_path};
use crate::{
    Error, Result,
    checkpoint::Store,
    config::{self, Config, ConfigText, DataConfig, DataShape, Moments, Order, resolve_model},
    data::{
        Dataset, RowData,
        dataset::{BatchRules, DATASET_FILE, DatasetOptions, TOKENIZER_FILE},
        shard::TokenDtype,
        tokenizer::BYTES,
    },
    dims::Dims,
    feed::{RowSamples, Samples, TokenSamples},
    model::{
        MicroBatch,
        spec::{Scaling, Spec},
    },
    mup::Parametrization,
    state::{Meaning, Position},
    trainer::micro_batch,
    upscale::{self, Growth, Origin},
};
use std::path::{Path, PathBuf};

/// Most tokens of a micro-batch: their activations alone would fill any device.
const MAX_MICRO_BATCH: usize = 1 << 28;

/// Everything that a run starts from.
pub struct Prepared {
    /// The configuration, resolved.
    pub config: Config,
    /// The model, its scaling, its optimizer.
    pub meaning: Meaning,
    /// The data.
    pub samples: Box<dyn Samples>,
    /// The checkpoint to start from, and how.
    pub origin: Option<Start>,
    /// The tokenizer that goes into checkpoints.
    pub tokenizer: Option<Vec<u8>>,
}

/// How a run starts from a checkpoint.
pub struct Start {
    /// The checkpoint.
    pub origin: Origin,
    /// Widening on the way.
    pub growth: Option<Growth>,
    /// What becomes of the moments.
    pub moments: Moments,
    /// Where the run stands at its beginning.
    pub position: Position,
    /// The same run goes on: its folder and its log are continued.
    pub resumes: bool,
}

/// Reads a configuration and opens what it names.
pub fn prepare(path: &Path, sets: &[String]) -> Result<Prepared> {
    let mut text = ConfigText::read(path, sets)?;
    let config = text.resolve()?;
    let Some(init) = &config.init else {
        let data = Data::open(&config.data, None)?;
        let meaning = new_meaning(&config, &data)?;
        return finish(config, meaning, data, None);
    };
    let origin = Origin::open(&checkpoint_path(&init.from)?)?;
    text.inherit(&origin.meaning.optimizer);
    let config = text.resolve()?;
    let init = init.clone();
    let growth = init.upscale.as_ref().map(|u| Growth::new(&origin.meaning, u)).transpose()?;
    let mut meaning = upscale::meaning(&origin.meaning, growth.as_ref())?;
    meaning.optimizer = config.optimizer.clone();
    let data = Data::open(&config.data, Some(&meaning.spec))?;
    agrees(&config, &meaning, &data)?;
    let old = origin.progress.position;
    let time = if init.moments == Moments::Keep { old.time } else { 0 };
    let position = if init.keep_position { Position { time, ..old } } else { Position { time, ..Position::default() } };
    if position.step >= config.steps {
        let why =
            format!("the source stands at step {} already (init.continue = true): ask for more steps", position.step);
        return Err(Error::config("steps", config.steps, why));
    }
    let start = Start { origin, growth, moments: init.moments, position, resumes: false };
    finish(config, meaning, data, Some(start))
}

/// Reads a run folder's newest checkpoint, to go on as if nothing had happened.
pub fn prepare_resume(run: &Path, sets: &[String]) -> Result<Prepared> {
    if !run.join(CONFIG_FILE).exists() {
        return Err(Error::file(
            run,
            format!("is no run folder: it has no {CONFIG_FILE}; `mupscale train -c FILE` starts a run"),
        ));
    }
    let origin = Origin::open(&newest_checkpoint(run)?)?;
    let mut config = resumed_config(stored_config(&origin)?, sets)?;
    config.run = run.into();
    go_on(origin, config)
}

/// Goes on from a checkpoint of the run that `config` describes.
pub(super) fn go_on(origin: Origin, config: Config) -> Result<Prepared> {
    let data = Data::open(&config.data, Some(&origin.meaning.spec))?;
    let meaning = origin.meaning.clone();
    let position = origin.progress.position;
    if position.step >= config.steps {
        let why = format!("the run is complete: its newest checkpoint is of step {}", position.step);
        return Err(Error::config("steps", config.steps, why));
    }
    let expected = origin.progress.data;
    let start = Start { origin, growth: None, moments: Moments::Keep, position, resumes: true };
    let prepared = finish(config, meaning, data, Some(start))?;
    if prepared.samples.fingerprint() != expected {
        let why = "is not the data that the run was trained on; resume goes on with the same data. To train on \
                   other data, start a run with [init] from = CHECKPOINT";
        return Err(Error::file(&prepared.config.data.path, why));
    }
    Ok(prepared)
}

/// The configuration that a run left in its checkpoint.
pub(super) fn stored_config(origin: &Origin) -> Result<&Config> {
    origin.progress.config.as_ref().ok_or_else(|| {
        Error::file(origin.reader.dir(), "holds no run's configuration: start a run from it with [init] from = …")
    })
}

/// Whether a run may change this key, in dots, when it goes on: it says how to compute, not what.
pub(super) fn may_change(key: &str) -> bool {
    CHANGEABLE.iter().any(|a| key == *a || key.starts_with(&format!("{a}.")))
}

const CHANGEABLE: [&str; 11] = [
    "threads",
    "device",
    "graph",
    "on_nan",
    "checkpoint",
    "validation",
    "samples",
    "memory",
    "comm",
    "run",
    "data.path",
];

/// The stored configuration with those keys set that do not change what is computed.
fn resumed_config(stored: &Config, sets: &[String]) -> Result<Config> {
    for set in sets {
        let key = set.split('=').next().unwrap_or_default().trim();
        if !may_change(key) {
            let why = format!(
                "resume never changes this; it may set {}. For anything else start a run with [init] from = CHECKPOINT",
                CHANGEABLE.join(", ")
            );
            return Err(Error::config("--set", set, why));
        }
    }
    ConfigText::parse(&stored.to_toml(), sets, Path::new(CONFIG_FILE))?.resolve()
}

/// The newest complete checkpoint of a run.
pub fn newest_checkpoint(run: &Path) -> Result<PathBuf> {
    let newest = Store::new(run).newest()?;
    let why = "holds no complete checkpoint (RUN/checkpoints/step-…)";
    newest.map(|(_, path)| path).ok_or_else(|| Error::file(run, why))
}

/// Training data, opened.
enum Data {
    Tokens { dataset: Dataset, tokenizer: Option<(String, Vec<u8>)> },
    Rows { train: RowData, held_out: Option<RowData> },
}

impl Data {
    /// Opens what `[data]` names. With a model, tokens are checked against its vocabulary.
    fn open(config: &DataConfig, spec: Option<&Spec>) -> Result<Self> {
        let extension = config.path.extension().and_then(|e| e.to_str()).unwrap_or_default();
        if matches!(extension, "csv" | "npy") {
            return Self::rows(config, extension == "csv");
        }
        let dtype = config.dtype.as_deref().map(token_dtype).transpose()?;
        let vocab = spec.filter(|spec| matches!(spec, Spec::Decoder(_))).map(Spec::classes);
        let options = DatasetOptions { vocab, dtype, val: None, val_fraction: 0.0 };
        let dataset = Dataset::open(&config.path, &options)?;
        let tokenizer = match &dataset.info {
            Some(info) if info.tokenizer == BYTES => Some((BYTES.to_string(), Vec::new())),
            Some(_) => {
                let path = config.path.join(TOKENIZER_FILE);
                Some((TOKENIZER_FILE.to_string(), std::fs::read(&path).map_err(Error::io("read", &path))?))
            }
            None => None,
        };
        Ok(Self::Tokens { dataset, tokenizer })
    }

    fn rows(config: &DataConfig, csv: bool) -> Result<Self> {
        let rows = match (&config.labels, csv) {
            (None, true) => RowData::read_csv(&config.path, config.label_column.as_deref())?,
            (Some(labels), false) => RowData::read_npy(&config.path, labels)?,
            (None, false) => {
                return Err(Error::config(
                    "data.labels",
                    "(absent)",
                    "is needed: the .npy file with one class for each row",
                ));
            }
            (Some(_), true) => {
                return Err(Error::config("data.labels", "set", "a CSV file holds its labels: use data.label_column"));
            }
        };
        let (mut train, mut held_out) = rows.split(config.validation_fraction)?;
        if config.standardize {
            let by = train.standardization();
            train.standardize(&by)?;
            held_out.as_mut().map(|rows| rows.standardize(&by)).transpose()?;
        }
        Ok(Self::Rows { train, held_out })
    }

    fn shape(&self) -> DataShape {
        match self {
            Self::Tokens { dataset, .. } => DataShape::Tokens { vocab: dataset.vocab },
            Self::Rows { train, .. } => DataShape::Rows { inputs: train.inputs, classes: train.classes },
        }
    }

    fn tokenizer_name(&self) -> Option<String> {
        match self {
            Self::Tokens { tokenizer, .. } => tokenizer.as_ref().map(|(name, _)| name.clone()),
            Self::Rows { .. } => None,
        }
    }

    /// Samples of these data for a run.
    fn samples(self, config: &Config, micro: MicroBatch) -> Result<Box<dyn Samples>> {
        let seed = match config.data.order {
            Order::Shuffle => Some(config.data.seed.unwrap_or(config.seed)),
            Order::Sequential => None,
        };
        Ok(match self {
            Self::Tokens { dataset, .. } => {
                let rules = BatchRules {
                    reset_attention_after: if config.data.reset_attention {
                        Some(end_of_text(&config.data, &dataset)?)
                    } else {
                        None
                    },
                    ignored_target: config.data.ignore,
                };
                Box::new(TokenSamples::new(dataset.train, dataset.val, micro, seed, rules)?)
            }
            Self::Rows { train, held_out } => Box::new(RowSamples::new(train, held_out, micro, seed)?),
        })
    }
}

fn token_dtype(name: &str) -> Result<TokenDtype> {
    match name {
        "uint16" => Ok(TokenDtype::Uint16),
        "uint32" => Ok(TokenDtype::Uint32),
        _ => Err(Error::config("data.dtype", name, "must be uint16 or uint32")),
    }
}

fn end_of_text(config: &DataConfig, dataset: &Dataset) -> Result<u32> {
    let token = dataset.info.as_ref().and_then(|info| info.end_of_text);
    let why = format!("the dataset has no end-of-text token ({DATASET_FILE} names it): documents cannot be told apart");
    token.ok_or_else(|| Error::config("data.reset_attention", config.reset_attention, why))
}

/// The meaning of a new model.
fn new_meaning(config: &Config, data: &Data) -> Result<Meaning> {
    let model = config.model.as_ref();
    let model = model.ok_or_else(|| {
        Error::config("model", "(absent)", "is needed: a [model] section, or [init] from = CHECKPOINT")
    })?;
    let spec = resolve_model(model, data.shape())?;
    let parametrization = config.parametrization.clone().unwrap_or_default();
    let base = base_shape(spec.dims(), parametrization.base.as_ref())?;
    let scaling = Scaling { kind: parametrization.kind, base };
    Ok(Meaning { spec, scaling, optimizer: config.optimizer.clone(), tokenizer: data.tokenizer_name() })
}

/// The base shape: widths that were given, the model's own for the rest.
fn base_shape(dims: &Dims, given: Option<&Dims>) -> Result<Dims> {
    let mut base = dims.clone();
    for (width, size) in given.iter().flat_map(|g| g.iter()) {
        if !dims.has(width) || size == 0 {
            let why = format!("must be a positive size of a width that the model has: {dims}");
            return Err(Error::config(format!("parametrization.base.{width}"), size, why));
        }
        base.set(width, size);
    }
    Ok(base)
}

/// What the configuration says beside `init.from` must be what the checkpoint says.
fn agrees(config: &Config, meaning: &Meaning, data: &Data) -> Result<()> {
    if let Some(model) = &config.model {
        let asked = resolve_model(model, data.shape())?;
        if asked != meaning.spec {
            let why = format!(
                "describes another model than init.from gives ({}; the checkpoint gives {}): leave [model] out",
                asked.dims(),
                meaning.spec.dims()
            );
            return Err(Error::config("model", asked.arch(), why));
        }
    }
    if let Some(asked) = &config.parametrization {
        let base = base_shape(meaning.spec.dims(), asked.base.as_ref());
        let same = asked.kind == meaning.scaling.kind
            && (asked.base.is_none()
                || base.is_ok_and(|b| b == meaning.scaling.base)
                || asked.kind == Parametrization::Standard);
        if !same {
            let why = format!(
                "the checkpoint knows its own ({:?}, base {}): leave [parametrization] out",
                meaning.scaling.kind, meaning.scaling.base
            );
            return Err(Error::config("parametrization", format!("{:?}", asked.kind).to_lowercase(), why));
        }
    }
    match (&meaning.spec, data.shape()) {
        (Spec::Decoder(_), DataShape::Tokens { .. }) => Ok(()),
        (Spec::Mlp(m), DataShape::Rows { inputs, classes }) if m.inputs == inputs && m.classes >= classes => Ok(()),
        (Spec::Mlp(m), DataShape::Rows { inputs, classes }) => {
            let why =
                format!("has {inputs} inputs and {classes} classes; the model has {} and {}", m.inputs, m.classes);
            Err(Error::file(&config.data.path, why))
        }
        _ => Err(Error::file(
            &config.data.path,
            format!("is no data for {}: rows are for mlp, tokens for gpt2 and llama", meaning.spec.arch()),
        )),
    }
}

fn finish(mut config: Config, meaning: Meaning, data: Data, origin: Option<Start>) -> Result<Prepared> {
    let mut meaning = meaning;
    let tokenizer = match (&data, &origin) {
        (Data::Tokens { tokenizer: Some((name, bytes)), .. }, _) => {
            meaning.tokenizer = Some(name.clone());
            (!bytes.is_empty()).then(|| bytes.clone())
        }
        (_, Some(start)) => start.origin.tokenizer()?,
        _ => None,
    };
    config.optimizer = meaning.optimizer.clone();
    config.parametrization =
        Some(config::ParametrizationConfig { kind: meaning.scaling.kind, base: Some(meaning.scaling.base.clone()) });
    let micro = micro_batch(&config, &meaning.spec);
    if micro.samples.checked_mul(micro.length).is_none_or(|tokens| tokens > MAX_MICRO_BATCH) {
        let why = format!(
            "× the context of {} is over {MAX_MICRO_BATCH} tokens at once: use a smaller one, and more batch.micro_batches",
            micro.length
        );
        return Err(Error::config("batch.size", micro.samples, why));
    }
    if config.samples.every > 0 {
        if config.samples.prompts.is_empty() {
            let why = "must hold one or more: \"\" is the start of a document";
            return Err(Error::config("samples.prompts", "[]", why));
        }
        Drawing::from(&config.samples).check(|field| format!("samples.{field}"))?;
    }
    let samples = data.samples(&config, micro)?;
    Ok(Prepared { config, meaning, samples, origin, tokenizer })
}
