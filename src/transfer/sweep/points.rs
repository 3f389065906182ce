//! From combinations of values to runs: each an ordinary configuration with a name and a folder.
//!
//! | axis | becomes |
//! |---|---|
//! | `width` | the model at that width ([`Sizes`]); of the base model, where there is one |
//! | `multiplicity` | `init.upscale.width` |
//! | `noise` | `init.upscale.noise` |
//! | `seed` | `seed`, and where a base is widened `init.upscale.seed` |
//! | any other | that key of the configuration |

use super::{
    super::widths::{self, Sizes},
    config::{Search, SweepConfig},
};
use crate::{
    Error, Result,
    config::{Config, ConfigText, set_value},
    mup::Parametrization,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

/// Values by axis.
pub type Values = BTreeMap<String, toml::Value>;

/// A run of a sweep.
#[derive(Clone, Debug)]
pub struct Point {
    /// Its name: its values.
    pub name: String,
    /// Its values.
    pub values: Values,
    /// Its configuration, as written.
    pub text: String,
    /// The same, resolved.
    pub config: Config,
    /// Name of the base run that it starts from.
    pub base: Option<String>,
}

/// A base run, shared by the points that name it.
#[derive(Clone, Debug)]
pub struct Base {
    /// Its name.
    pub name: String,
    /// Its configuration, as written.
    pub text: String,
}

/// All runs of a sweep, or of one of its rungs.
pub struct Plan {
    /// Base runs, by name.
    pub bases: BTreeMap<String, Base>,
    /// Runs, in the order of the combinations.
    pub points: Vec<Point>,
}

/// Folder of a sweep's runs.
pub fn runs(sweep: &Path) -> PathBuf {
    sweep.join("runs")
}

/// Folder of a sweep's base runs.
pub fn bases(sweep: &Path) -> PathBuf {
    sweep.join("bases")
}

/// What stays the same for all points.
struct Maker<'a> {
    sweep: &'a SweepConfig,
    table: toml::Table,
    base: Option<toml::Table>,
    /// The smallest width of the axis: the base shape of all.
    smallest: Option<usize>,
}

/// The runs for some combinations, for `steps` steps (the configuration's, if none).
///
/// # Errors
/// A configuration that cannot be read; values that it refuses, widths at which the model has no whole sizes.
pub fn plan(sweep: &SweepConfig, combinations: &[Values], steps: Option<u64>) -> Result<Plan> {
    let table = |path: &Path, sets: &[String]| -> Result<toml::Table> {
        let text = fs::read_to_string(path).map_err(Error::io("read", path))?;
        let mut table: toml::Table = text.parse().map_err(|e: toml::de::Error| Error::file(path, e.to_string()))?;
        sets.iter().try_for_each(|set| set_value(&mut table, set))?;
        Ok(table)
    };
    let base = sweep.base.as_ref().map(|base| table(&base.config, &base.set)).transpose()?;
    let widths = combinations.iter().filter_map(|values| values.get("width")?.as_integer());
    let smallest = widths.min().map(|width| width.max(0) as usize);
    let maker = Maker { sweep, table: table(&sweep.config, &sweep.set)?, base, smallest };
    let mut plan = Plan { bases: BTreeMap::new(), points: Vec::new() };
    let mut names = BTreeSet::new();
    for values in combinations {
        let base = maker.base(values)?;
        let point = maker.point(values, base.as_ref(), steps)?;
        // Random draws from lists may repeat.
        if names.insert(point.name.clone()) {
            base.into_iter().for_each(|base| drop(plan.bases.insert(base.name.clone(), base)));
            plan.points.push(point);
        }
    }
    Ok(plan)
}

impl Maker<'_> {
    /// The base run that a combination starts from.
    fn base(&self, values: &Values) -> Result<Option<Base>> {
        let (Some(table), Some(base)) = (&self.base, &self.sweep.base) else { return Ok(None) };
        let shared = |key: &str| {
            let under = ["model.", "parametrization.", "data."].iter().any(|section| key.starts_with(section));
            under || ["width", "optimizer.kind"].contains(&key) || base.axes.iter().any(|axis| axis == key)
        };
        let mine: Values = values.iter().filter(|(key, _)| shared(key)).map(|(k, v)| (k.clone(), v.clone())).collect();
        let name = name(&mine, None);
        let mut table = table.clone();
        self.set_all(&mut table, &mine, false)?;
        self.folder(&mut table, &bases(&self.sweep.run).join(&name))?;
        let text = text(&table)?;
        ConfigText::parse(&text, &[], &base.config)?.resolve()?;
        Ok(Some(Base { name, text }))
    }

    fn point(&self, values: &Values, base: Option<&Base>, steps: Option<u64>) -> Result<Point> {
        let name = name(values, steps);
        let mut table = self.table.clone();
        match base {
            None => self.set_all(&mut table, values, false)?,
            Some(base) => {
                // The checkpoint knows these.
                table.remove("model");
                table.remove("parametrization");
                let from = bases(&self.sweep.run).join(&base.name);
                set_value(&mut table, &format!("init.from={}", quoted(&from)))?;
                let own = values.iter().filter(|(key, _)| {
                    *key != "width" && !["model.", "parametrization."].iter().any(|section| key.starts_with(section))
                });
                self.set_all(&mut table, &own.map(|(k, v)| (k.clone(), v.clone())).collect(), true)?;
            }
        }
        if let Some(steps) = steps {
            set_value(&mut table, &format!("steps={steps}"))?;
        }
        self.folder(&mut table, &runs(&self.sweep.run).join(&name))?;
        let text = text(&table)?;
        let config = ConfigText::parse(&text, &[], &self.sweep.config)?.resolve()?;
        Ok(Point { name, values: values.clone(), text, config, base: base.map(|base| base.name.clone()) })
    }

    fn folder(&self, table: &mut toml::Table, folder: &Path) -> Result<()> {
        set_value(table, &format!("run={}", quoted(folder)))?;
        set_value(table, &format!("threads={}", self.sweep.threads))
    }

    fn set_all(&self, table: &mut toml::Table, values: &Values, widened: bool) -> Result<()> {
        for (key, value) in values {
            match key.as_str() {
                "width" => {}
                "multiplicity" => set_value(table, &format!("init.upscale.width={value}"))?,
                "noise" => set_value(table, &format!("init.upscale.noise={value}"))?,
                key => set_value(table, &format!("{key}={value}"))?,
            }
            if key == "seed" && widened {
                set_value(table, &format!("init.upscale.seed={value}"))?;
            }
        }
        match values.get("width") {
            Some(width) => self.set_width(table, width),
            None => Ok(()),
        }
    }

    fn set_width(&self, table: &mut toml::Table, width: &toml::Value) -> Result<()> {
        let positive = width.as_integer().and_then(|width| usize::try_from(width).ok());
        let width = positive.ok_or_else(|| Error::config("axes.width", width, "must be a positive whole number"))?;
        let config = ConfigText::parse(&text(table)?, &[], &self.sweep.config)?.resolve()?;
        let mut sets = Sizes::at(&config, width)?.model_sets();
        let given = config.parametrization.unwrap_or_default();
        if given.kind == Parametrization::Mup && given.base.is_none() {
            let config = ConfigText::parse(&text(table)?, &[], &self.sweep.config)?.resolve()?;
            let smallest = self.smallest.map_or_else(|| widths::of(&config), Ok)?;
            sets.extend(Sizes::at(&config, smallest)?.base_sets());
        }
        sets.iter().try_for_each(|set| set_value(table, set))
    }
}

fn text(table: &toml::Table) -> Result<String> {
    toml::to_string_pretty(table).map_err(|e| Error::Usage(format!("no TOML: {e}")))
}

/// A path as TOML.
fn quoted(path: &Path) -> String {
    toml::Value::String(path.display().to_string()).to_string()
}

/// A name that says the values, and is a file's name: `lr=0.001,seed=1`.
fn name(values: &Values, steps: Option<u64>) -> String {
    let last = |key: &str| key.rsplit('.').next().unwrap_or(key).to_string();
    let short = |key: &String| {
        let alike = values.keys().filter(|other| last(other) == last(key)).count();
        if alike > 1 { key.clone() } else { last(key) }
    };
    let value = |value: &toml::Value| value.as_str().map_or_else(|| value.to_string(), String::from);
    let mut parts: Vec<_> = values.iter().map(|(key, v)| format!("{}={}", short(key), value(v))).collect();
    parts.extend(steps.map(|steps| format!("steps={steps}")));
    let safe = |c: char| if c.is_ascii_alphanumeric() || "=.,_+-".contains(c) { c } else { '_' };
    let name: String = parts.join(",").chars().map(safe).collect();
    if name.is_empty() { "base".into() } else { name }
}

/// Steps of each rung of successive halving, the configuration's last; one rung for another search.
pub fn rungs(search: &Search, steps: u64) -> Vec<u64> {
    let Search::Halving { steps: first, eta, .. } = *search else { return vec![steps] };
    let mut rungs = Vec::new();
    let mut rung = first;
    while rung < steps {
        rungs.push(rung);
        rung = rung.saturating_mul(eta);
    }
    rungs.push(steps);
    rungs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_say_the_values_and_are_file_names() {
        let values: Values =
            "'optimizer.lr'=0.001\nseed=2\n'data.path'='a/b c'".parse::<toml::Table>().unwrap().into_iter().collect();
        assert_eq!(name(&values, Some(9)), "path=a_b_c,lr=0.001,seed=2,steps=9");
        let values: Values = "'a.lr'=1\n'b.lr'=2".parse::<toml::Table>().unwrap().into_iter().collect();
        assert_eq!(name(&values, None), "a.lr=1,b.lr=2");
    }

    #[test]
    fn rungs_end_at_the_configured_steps() {
        let halving = Search::Halving { steps: 10, eta: 3, trials: 0, seed: 0 };
        assert_eq!(rungs(&halving, 100), [10, 30, 90, 100]);
        assert_eq!(rungs(&halving, 10), [10]);
        assert_eq!(rungs(&Search::Grid, 100), [100]);
    }

    #[test]
    fn runs_that_share_a_base_share_it() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = dir.path().join(name);
            fs::write(&path, text).unwrap();
            path.display().to_string()
        };
        let model = "[model]\narch='gpt2'\nlayers=1\nresidual=32\nkv_heads=2\ncontext=8\n[data]\npath='d'\n";
        let base = file("base.toml", &format!("run='r'\nsteps=5\n{model}"));
        let point = file("point.toml", "run='r'\nsteps=7\n[data]\npath='d'\n");
        let text = format!(
            "run='s'\nconfig='{point}'\n[base]\nconfig='{base}'\n[axes]\nwidth=[16,32]\nnoise=[0.0,0.1]\nseed=[1,2]\nmultiplicity=[2]\n"
        );
        let sweep: SweepConfig = toml::from_str(&text).unwrap();
        let plan = plan(&sweep, &sweep.combinations(), None).unwrap();
        assert_eq!((plan.bases.len(), plan.points.len()), (2, 8));
        let text = &plan.bases["width=32"].text;
        let config = ConfigText::parse(text, &[], "x".as_ref()).unwrap().resolve().unwrap();
        let base = config.parametrization.unwrap().base.unwrap();
        assert_eq!((config.model.unwrap().kv_heads, base.get(crate::dims::Width::Residual)), (Some(2), 16));
        let last = plan.points.last().unwrap();
        let init = last.config.init.clone().unwrap();
        assert!(init.from.ends_with("bases/width=32"), "{:?}", init.from);
        let upscale = init.upscale.unwrap();
        assert_eq!((upscale.width, upscale.noise, upscale.seed, last.config.seed), (Some(2), 0.1, 2, 2));
    }
}
