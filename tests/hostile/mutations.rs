//! Configurations changed at random.

use mupscale::{
    config::{ConfigText, DataShape, resolve_model},
    model::{self, spec::Scaling},
    mup::Parametrization,
};
use proptest::prelude::*;
use std::path::Path;

/// A configuration with something in every section.
const FULL: &str = "run = 'r'\nsteps = 20\nthreads = 1\nseed = 3\non_nan = 'skip'\n[data]\npath = 'data'\nignore = 0\n\
    [batch]\nsize = 2\nmicro_batches = 2\n[optimizer]\nkind = 'muon'\nlr = 0.01\nbetas = [0.9, 0.95]\nclip = 1.0\n\
    [schedule]\nkind = 'wsd'\nwarmup = 3\nfinal = 0.1\ndecay = 4\n[parametrization]\nkind = 'mup'\n\
    [parametrization.base]\nresidual = 8\n[checkpoint]\nevery = 2\nkeep_last = 1\n[validation]\nevery = 5\n\
    [memory]\nrecompute = 'block'\nlimit = 100\n[init]\nfrom = 'x'\nmoments = 'reset'\n[init.upscale]\nwidth = 2\n\
    noise = 0.1\nnoise_kind = 'paired'\n[model]\narch = 'llama'\nlayers = 2\nresidual = 16\nffn = 24\nkv_heads = 2\n\
    group = 2\nhead_dim = 4\ncontext = 16\nrope_base = 100.0\nnorm_eps = 1e-5\ninit_std = 0.02\n\
    [model.multipliers]\nlogits = 0.5\n";

/// Values that have broken programs before.
const NASTY: [&str; 20] = [
    "0",
    "-1",
    "1",
    "9223372036854775807",
    "-9223372036854775808",
    "16777216",
    "16777217",
    "nan",
    "inf",
    "-inf",
    "1e308",
    "-0.0",
    "''",
    "'\u{0}'",
    "[]",
    "{}",
    "true",
    "1979-05-27",
    "'gpt2'",
    "[1, 2, 3]",
];

#[derive(Clone, Debug)]
enum Mutation {
    Delete(usize, usize),
    Duplicate(usize, usize),
    Insert(usize, Vec<u8>),
    Swap(usize, usize),
    Value(usize, usize),
}

fn mutation() -> impl Strategy<Value = Mutation> {
    use Mutation::*;
    prop_oneof![
        1 => (any::<usize>(), 1..9usize).prop_map(|(at, n)| Delete(at, n)),
        1 => (any::<usize>(), 1..40usize).prop_map(|(at, n)| Duplicate(at, n)),
        1 => (any::<usize>(), prop::collection::vec(any::<u8>(), 1..4)).prop_map(|(at, bytes)| Insert(at, bytes)),
        1 => (any::<usize>(), any::<usize>()).prop_map(|(a, b)| Swap(a, b)),
        6 => (any::<usize>(), any::<usize>()).prop_map(|(line, value)| Value(line, value)),
    ]
}

/// Applies a mutation to text; positions are taken modulo its length.
fn mutate(text: String, mutation: &Mutation) -> String {
    let mut bytes = text.clone().into_bytes();
    let length = bytes.len().max(1);
    let end = |at: usize, n: usize| (at % length + n).min(bytes.len());
    let lines: Vec<&str> = text.lines().collect();
    let assignment = |line: usize| {
        let found: Vec<usize> = (0..lines.len()).filter(|&i| lines[i].contains(" = ")).collect();
        found.get(line % found.len().max(1)).copied()
    };
    let with = |changes: &[(usize, String)]| {
        let mut lines: Vec<String> = lines.iter().map(|line| line.to_string()).collect();
        changes.iter().for_each(|(line, text)| lines[*line] = text.clone());
        lines.join("\n")
    };
    let value = |i: usize| lines[i].split_once(" = ").map_or("", |(_, value)| value);
    let set = |i: usize, to: &str| (i, format!("{} = {to}", lines[i].split(" = ").next().unwrap_or_default()));
    match *mutation {
        Mutation::Delete(at, n) => drop(bytes.drain(at % length..end(at, n))),
        Mutation::Duplicate(at, n) => {
            let part = bytes[at % length..end(at, n)].to_vec();
            bytes.splice(at % length..at % length, part);
        }
        Mutation::Insert(at, ref new) => drop(bytes.splice(at % length..at % length, new.iter().copied())),
        Mutation::Swap(a, b) => {
            if let (Some(a), Some(b)) = (assignment(a), assignment(b)) {
                return with(&[set(a, value(b)), set(b, value(a))]);
            }
        }
        Mutation::Value(line, new) => {
            if let Some(line) = assignment(line) {
                return with(&[set(line, NASTY[new % NASTY.len()])]);
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// What a command does with a configuration before it opens any data.
fn resolve(text: &str) -> Result<(), mupscale::Error> {
    let config = ConfigText::parse(text, &[], Path::new("run.toml"))?.resolve()?;
    let Some(model) = &config.model else { return Ok(()) };
    for data in [DataShape::Tokens { vocab: 300 }, DataShape::Rows { inputs: 3, classes: 2 }] {
        let Ok(spec) = resolve_model(model, data) else { continue };
        let scaling = Scaling::new(Parametrization::Mup, spec.dims());
        let table = model::table(&spec, &scaling);
        assert!(table.parameters() > 0);
        if let Some(upscale) = config.init.as_ref().and_then(|init| init.upscale.as_ref()) {
            let _ = upscale.multiplicities(spec.dims());
        }
    }
    ConfigText::parse(&config.to_toml(), &[], Path::new("resolved.toml"))?.resolve()?;
    Ok(())
}

#[test]
fn the_configuration_that_is_mutated_is_valid() {
    resolve(FULL).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, failure_persistence: None, ..ProptestConfig::default() })]

    /// No text makes the reader of configurations panic, and every error says something.
    #[test]
    fn configurations_never_panic(mutations in prop::collection::vec(mutation(), 1..5)) {
        let text = mutations.iter().fold(FULL.to_string(), mutate);
        if let Err(error) = resolve(&text) {
            prop_assert!(!error.to_string().is_empty());
            prop_assert_eq!(error.exit_code(), 2, "{}", error);
        }
    }
}
