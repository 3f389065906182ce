//! Growth operators side by side: from one base, on equal tokens and on equal operations, beside models of the same
//! shapes from scratch. Each is an ordinary run; what is complete is not run again.
//!
//! From scratch is trained twice for each shape: on as many tokens as the grown models see, and with as many operations
//! as base and grown model took together, each with its whole schedule, so that no loss is read from the middle of one.

pub mod results;

use crate::{
    Error, Result,
    config::{Config, ConfigText, GrowthMethod, Moments, NoiseKind, UpscaleConfig},
    model::{self, spec::Spec},
    quickstart::comparison::training_flops_per_token,
    report::{
        metrics::{self, Record},
        progress::Show,
    },
    run,
    state::Meaning,
    upscale::{Growth, Origin},
};
use results::{Comparison, RunResult};
use serde::{Deserialize, Serialize};
use std::{
    fs,
    path::{Path, PathBuf},
};

/// The picture's file.
pub const PICTURE: &str = "growth.svg";
/// The numbers' file.
pub const RESULTS: &str = "growth.json";

/// `plan.toml`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GrowthPlan {
    /// The folder for everything.
    pub out: PathBuf,
    /// A base that is there already: a checkpoint or a run folder. `[base]` then says what it was trained as.
    #[serde(default)]
    pub from: Option<PathBuf>,
    /// What to compare; all that the model has, if left out.
    #[serde(default)]
    pub operators: Option<Vec<Operator>>,
    /// Multiplicities (`width` and its kin for operators that widen, `layers`, 2 if left out, for those that deepen), σ
    /// and its seed.
    pub growth: UpscaleConfig,
    /// The configuration of the base run, without `run` and `init`.
    pub base: toml::Table,
    /// What the grown models and those from scratch have instead: steps, schedule, …
    #[serde(default)]
    pub grown: toml::Table,
}

/// A growth operator, with what becomes of moments.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Operator {
    /// Every unit repeated, moments kept.
    Mupscale,
    /// Every unit repeated, moments reset.
    MupscaleReset,
    /// Every unit repeated, moments of new copies reset.
    MupscaleAsymmetric,
    /// Every unit repeated, paired noise.
    Hypercloning,
    /// Units copied at random.
    Net2net,
    /// New units from the block above.
    Aki,
    /// New units zero, perturbed.
    Zero,
    /// The stack of blocks repeated.
    Stack,
    /// Blocks inserted that add nothing yet.
    LlamaPro,
}

impl Operator {
    const ALL: [Self; 9] = [
        Self::Mupscale,
        Self::MupscaleReset,
        Self::MupscaleAsymmetric,
        Self::Hypercloning,
        Self::Net2net,
        Self::Aki,
        Self::Zero,
        Self::Stack,
        Self::LlamaPro,
    ];

    /// The name in plans, of runs and in tables.
    pub fn name(self) -> String {
        match self {
            Self::MupscaleReset => "mupscale-reset".into(),
            Self::MupscaleAsymmetric => "mupscale-asymmetric".into(),
            _ => self.method().name(),
        }
    }

    fn method(self) -> GrowthMethod {
        match self {
            Self::Mupscale | Self::MupscaleReset | Self::MupscaleAsymmetric => GrowthMethod::Mupscale,
            Self::Hypercloning => GrowthMethod::Hypercloning,
            Self::Net2net => GrowthMethod::Net2net,
            Self::Aki => GrowthMethod::Aki,
            Self::Zero => GrowthMethod::Zero,
            Self::Stack => GrowthMethod::Stack,
            Self::LlamaPro => GrowthMethod::LlamaPro,
        }
    }

    /// Moments: those who proposed the others start them anew.
    fn moments(self) -> Moments {
        match self {
            Self::Mupscale => Moments::Keep,
            Self::MupscaleAsymmetric => Moments::Asymmetric,
            _ => Moments::Reset,
        }
    }

    /// The growth by this operator. What deepens has no noise, as it was proposed; the kind of noise that the plan names
    /// is that of plain repetition.
    fn growth(self, asked: &UpscaleConfig) -> UpscaleConfig {
        let method = self.method();
        if method.deepens() {
            let (layers, seed) = (Some(asked.layers.unwrap_or(2)), asked.seed);
            return UpscaleConfig { method, layers, seed, ..UpscaleConfig::default() };
        }
        let noise_kind = if method == GrowthMethod::Mupscale { asked.noise_kind } else { NoiseKind::default() };
        UpscaleConfig { method, layers: None, noise_kind, ..asked.clone() }
    }
}

/// A shape that some operators grow the base to.
struct Shape {
    name: &'static str,
    spec: Spec,
}

impl GrowthPlan {
    /// Reads a plan.
    ///
    /// # Errors
    /// Unknown keys; keys of the base's configuration that the comparison sets itself.
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).map_err(Error::io("read", path))?;
        let plan: Self = toml::from_str(&text).map_err(|e| Error::file(path, e.to_string()))?;
        if plan.growth.method != GrowthMethod::default() {
            let why = "the comparison has all methods: name those that you want in operators";
            return Err(Error::config("growth.method", plan.growth.method.name(), why));
        }
        for (table, name) in [(&plan.base, "base"), (&plan.grown, "grown")] {
            if let Some(key) = ["run", "init"].into_iter().find(|key| table.contains_key(*key)) {
                return Err(Error::config(format!("{name}.{key}"), "set", "the comparison sets it: leave it out"));
            }
        }
        Ok(plan)
    }

    /// Trains what is not trained yet, and compares.
    pub fn run(&self, show: Show, say: &mut dyn FnMut(&str)) -> Result<Comparison> {
        fs::create_dir_all(&self.out).map_err(Error::io("create", &self.out))?;
        let from = match &self.from {
            Some(from) => from.clone(),
            None => {
                say("base");
                self.train("base", self.base.clone(), show)?;
                self.out.join("base")
            }
        };
        let origin = Origin::open(&run::checkpoint_path(&from)?)?;
        let base = self.base_result(&origin, &from)?;
        let common = self.grown_table();
        let steps = self.config("grown", &common)?;
        let operators = self.operators(&origin.meaning, &steps)?;
        let (mut runs, mut shapes) = (vec![base.clone()], Vec::<Shape>::new());
        for (operator, growth) in &operators {
            let spec = growth.spec(&origin.meaning.spec)?;
            say(&operator.name());
            let table = with_init(&common, &from, operator, growth);
            let ended = self.train(&operator.name(), table, show)?;
            let shape = if growth.config.method.deepens() { "deep" } else { "wide" };
            runs.push(self.result(operator.name(), &spec, &origin.meaning, ended, Some((&base, shape)))?);
            if shapes.iter().all(|s| s.name != shape) {
                shapes.push(Shape { name: shape, spec });
            }
        }
        for shape in &shapes {
            runs.extend(self.scratch(shape, &origin.meaning, &base, &steps, show, say)?);
        }
        Ok(Comparison::new(runs, (origin.meaning.spec.classes() as f64).ln()))
    }

    /// The operators with their growths.
    fn operators(&self, base: &Meaning, grown: &Config) -> Result<Vec<(Operator, Growth)>> {
        let growth = |operator: Operator| Ok((operator, Growth::new(base, &operator.growth(&self.growth))?));
        if let Some(operators) = &self.operators {
            return operators.iter().map(|&operator| growth(operator)).collect();
        }
        // Without a width that could be wrong, what remains is what the model does not have.
        growth(Operator::Mupscale)?;
        let warms_up = |operator: &Operator| *operator != Operator::MupscaleAsymmetric || grown.schedule.warmup > 0;
        Ok(Operator::ALL.into_iter().filter(warms_up).filter_map(|operator| growth(operator).ok()).collect())
    }

    /// The same shape from new weights: on as many tokens as the grown model, and with as many operations as base and
    /// grown model together.
    fn scratch(
        &self,
        shape: &Shape,
        base: &Meaning,
        base_run: &RunResult,
        grown: &Config,
        show: Show,
        say: &mut dyn FnMut(&str),
    ) -> Result<Vec<RunResult>> {
        let per_step = (grown.batch.size * grown.batch.micro_batches * shape.spec.context()) as f64;
        let flops = flops_per_token(&shape.spec, base) * per_step;
        let long = grown.steps + (base_run.flops / flops).ceil() as u64;
        let mut runs = Vec::new();
        for (name, steps) in
            [(format!("scratch-{}", shape.name), grown.steps), (format!("scratch-{}-long", shape.name), long)]
        {
            let mut table = self.grown_table();
            table.insert("model".into(), self.model(&shape.spec)?.into());
            let scaling = toml::Table::try_from(&base.scaling).unwrap_or_default();
            table.insert("parametrization".into(), scaling.into());
            table.insert("steps".into(), toml::Value::Integer(steps as i64));
            if !table.contains_key("optimizer") {
                let optimizer = toml::Table::try_from(&base.optimizer).unwrap_or_default();
                table.insert("optimizer".into(), optimizer.into());
            }
            say(&name);
            let ended = self.train(&name, table, show)?;
            runs.push(self.result(name, &shape.spec, base, ended, None)?);
        }
        Ok(runs)
    }

    /// `[base.model]` at another shape.
    fn model(&self, spec: &Spec) -> Result<toml::Table> {
        let why = "is needed for the models from scratch: what the base was trained as";
        let absent = || Error::config("base.model", "(absent)", why);
        let mut model = self.base.get("model").and_then(|model| model.as_table()).ok_or_else(absent)?.clone();
        let sizes: Vec<toml::Value> = spec.dims().iter().map(|(_, size)| (size as i64).into()).collect();
        match spec {
            Spec::Mlp(_) => drop(model.insert("hidden".into(), sizes.into())),
            Spec::Decoder(decoder) => {
                for ((width, _), size) in spec.dims().iter().zip(sizes) {
                    model.insert(width.to_string(), size);
                }
                model.insert("layers".into(), (decoder.layers as i64).into());
            }
        }
        Ok(model)
    }

    /// What all runs but the base have in common: they see the data in an order of their own.
    fn grown_table(&self) -> toml::Table {
        let mut table = self.base.clone();
        ["model", "parametrization"].into_iter().for_each(|key| drop(table.remove(key)));
        let seed = |table: &toml::Table| table.get("seed").and_then(toml::Value::as_integer);
        let order = table.get("data").and_then(|data| data.as_table()).and_then(seed);
        let order = order.or_else(|| seed(&table)).unwrap_or(1) + 1;
        if let Some(data) = table.get_mut("data").and_then(|data| data.as_table_mut()) {
            data.insert("seed".into(), order.into());
        }
        merge(&mut table, &self.grown);
        table
    }

    fn config(&self, name: &str, table: &toml::Table) -> Result<Config> {
        ConfigText::parse(&self.text(name, table.clone())?, &[], &self.out.join(name))?.resolve()
    }

    /// The text of a run's configuration.
    fn text(&self, name: &str, mut table: toml::Table) -> Result<String> {
        let folder = self.out.join(name);
        let why = "is not UTF-8, so no configuration can name it: choose another out";
        let folder = folder.to_str().ok_or_else(|| Error::file(&folder, why))?;
        table.insert("run".into(), folder.into());
        toml::to_string_pretty(&table).map_err(|e| Error::file(folder, e.to_string()))
    }

    /// Writes a run's configuration and trains it, or goes on with it. True: it ended; false: it diverged.
    fn train(&self, name: &str, table: toml::Table, show: Show) -> Result<bool> {
        let path = self.out.join(format!("{name}.toml"));
        fs::write(&path, self.text(name, table)?).map_err(Error::io("write", &path))?;
        match run::train_or_resume(&path, &[], show) {
            Ok(_) => Ok(true),
            Err(Error::NonFinite { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn base_result(&self, origin: &Origin, folder: &Path) -> Result<RunResult> {
        let meaning = &origin.meaning;
        let (mut base, tokens) =
            (RunResult::new("base", parameters(&meaning.spec, meaning)), origin.progress.position.tokens);
        base.curve = if folder.join(metrics::FILE_NAME).exists() { curve(folder)? } else { Vec::new() };
        base.ends(tokens as f64, flops_per_token(&meaning.spec, meaning), None);
        Ok(base)
    }

    fn result(
        &self,
        name: String,
        spec: &Spec,
        base: &Meaning,
        ended: bool,
        grown_from: Option<(&RunResult, &str)>,
    ) -> Result<RunResult> {
        let folder = self.out.join(&name);
        let mut result = RunResult::new(name, parameters(spec, base));
        result.curve = curve(&folder)?;
        result.diverged = !ended;
        if ended && result.curve.is_empty() {
            let why = "holds no validation: hold out data, and set validation.every";
            return Err(Error::file(folder, why));
        }
        let tokens = last_tokens(&folder)?;
        result.ends(tokens, flops_per_token(spec, base), grown_from.map(|(run, shape)| (run.flops, shape)));
        Ok(result)
    }
}

/// A run's configuration with the start that an operator makes.
fn with_init(common: &toml::Table, from: &Path, operator: &Operator, growth: &Growth) -> toml::Table {
    let init = crate::config::InitConfig {
        from: from.into(),
        keep_position: false,
        moments: operator.moments(),
        upscale: Some(growth.config.clone()),
    };
    let mut table = common.clone();
    table.insert("init".into(), toml::Table::try_from(init).unwrap_or_default().into());
    table
}

/// Puts the values of `over` into `table`, section by section.
fn merge(table: &mut toml::Table, over: &toml::Table) {
    for (key, value) in over {
        match (table.get_mut(key), value) {
            (Some(toml::Value::Table(inner)), toml::Value::Table(value)) => merge(inner, value),
            _ => drop(table.insert(key.clone(), value.clone())),
        }
    }
}

fn parameters(spec: &Spec, base: &Meaning) -> usize {
    model::table(spec, &base.scaling).parameters()
}

fn flops_per_token(spec: &Spec, base: &Meaning) -> f64 {
    training_flops_per_token(spec, &model::table(spec, &base.scaling))
}

/// Validation losses of a run against its tokens.
fn curve(folder: &Path) -> Result<Vec<(f64, f64)>> {
    let records = metrics::read(&folder.join(metrics::FILE_NAME))?;
    let validation = |record| match record {
        Record::Validation(v) => Some((v.tokens as f64, v.loss)),
        Record::Step(_) | Record::Sample(_) => None,
    };
    Ok(records.into_iter().filter_map(validation).collect())
}

/// Tokens that a run has seen.
fn last_tokens(folder: &Path) -> Result<f64> {
    let tokens = |record: Record| match record {
        Record::Validation(v) => Some(v.tokens as f64),
        Record::Step(s) => Some(s.tokens as f64),
        Record::Sample(_) => None,
    };
    Ok(metrics::read(&folder.join(metrics::FILE_NAME))?.into_iter().filter_map(tokens).fold(0.0, f64::max))
}
