use super::*;
use crate::Result;
use std::path::Path;

fn parse(text: &str, sets: &[&str]) -> Result<Config> {
    let sets: Vec<String> = sets.iter().map(|s| s.to_string()).collect();
    ConfigText::parse(text, &sets, Path::new("run.toml"))?.resolve()
}

const SMALL: &str = "run = \"r\"\nsteps = 3\n[data]\npath = \"d\"\n[model]\narch = \"gpt2\"\n";

#[test]
fn misspelt_keys_name_the_nearest() {
    let error = parse(&format!("{SMALL}[optimizer]\nwieght_decay = 0.1\n"), &[]).unwrap_err().to_string();
    assert!(error.contains("did you mean `weight_decay`"), "{error}");
    assert!(error.starts_with("run.toml"), "{error}");
    let error = parse(SMALL, &["optimizer.kind=adammw"]).unwrap_err().to_string();
    assert!(error.contains("did you mean `adamw`"), "{error}");
}

#[test]
fn set_reaches_any_key() {
    let config = parse(SMALL, &["run=x/y", "steps=20", "optimizer.lr=0.5", "model.residual=64"]).unwrap();
    assert_eq!((config.run.to_str(), config.steps, config.optimizer.lr), (Some("x/y"), 20, 0.5));
    assert_eq!(config.model.as_ref().unwrap().residual, Some(64));
    assert!(parse(SMALL, &["steps"]).unwrap_err().to_string().contains("key=value"));
    assert!(parse(SMALL, &["steps.x=1"]).unwrap_err().to_string().contains("not a section"));
}

#[test]
fn a_config_survives_its_own_text() {
    let config = parse(SMALL, &["init.from=a", "init.upscale.width=2", "schedule.final=0.1"]).unwrap();
    assert_eq!(parse(&config.to_toml(), &[]).unwrap(), config);
}

#[test]
fn impossible_values_are_refused_by_name() {
    for (set, field) in [
        ("steps=0", "steps"),
        ("batch.size=0", "batch.size"),
        ("optimizer.lr=-1", "optimizer.lr"),
        ("optimizer.lr=nan", "optimizer.lr"),
        ("optimizer.eps=0", "optimizer.eps"),
        ("optimizer.betas=[0.9, 1.0]", "optimizer.betas"),
        ("schedule.final=2.0", "schedule.final"),
        ("schedule.decay=5", "schedule.decay"),
    ] {
        let error = parse(SMALL, &[set]).unwrap_err().to_string();
        assert!(error.contains(field), "{set}: {error}");
    }
}

#[test]
fn shapes_that_do_not_divide_are_refused() {
    let model = |sets: &[&str]| {
        let config = parse(SMALL, &[sets, &["model.layers=1", "model.context=8"]].concat()).unwrap();
        resolve_model(&config.model.unwrap(), model::DataShape::Tokens { vocab: 300 })
    };
    let error = |sets: &[&str]| model(sets).unwrap_err().to_string();
    assert!(error(&["model.residual=30", "model.kv_heads=4"]).contains("4 heads"));
    assert!(error(&["model.residual=32"]).contains("model.kv_heads"));
    assert!(error(&["model.residual=32", "model.kv_heads=4", "model.vocab=299"]).contains("vocabulary is 300"));
    assert!(error(&["model.residual=32", "model.kv_heads=4", "model.rope_base=1.0"]).contains("model.rope_base"));
    assert!(error(&["model.arch=llama", "model.residual=20", "model.kv_heads=4"]).contains("even"));
    assert!(model(&["model.residual=32", "model.kv_heads=4"]).is_ok());
}

#[test]
fn an_inherited_optimizer_fills_what_was_not_written() {
    let theirs = OptimizerConfig { kind: OptimizerKind::Muon, lr: 0.02, ..Default::default() };
    let mut text = ConfigText::parse(SMALL, &["optimizer.lr=0.5".into()], Path::new("run.toml")).unwrap();
    text.inherit(&theirs);
    let config = text.resolve().unwrap();
    assert_eq!((config.optimizer.kind, config.optimizer.lr), (OptimizerKind::Muon, 0.5));
}
