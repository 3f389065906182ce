//! Transfer by the commands that a user would type: the coordinate check and sweeps.

mod command;

use command::{Place, Said};
use std::{fs, path::Path, process::Command};

/// A base, and the upscale that is swept.
const BASE: &str = "run = 'x'\nsteps = 6\n[data]\npath = 'data'\n[batch]\nsize = 2\n[validation]\nevery = 0\n\
                    [model]\narch = 'gpt2'\nlayers = 1\nresidual = 8\nkv_heads = 1\ncontext = 16\n";
const UP: &str =
    "run = 'x'\nsteps = 12\n[data]\npath = 'data'\n[batch]\nsize = 2\n[validation]\nevery = 12\nbatches = 2\n";
const SWEEP: &str = "run = 's'\nconfig = 'up.toml'\n[base]\nconfig = 'base.toml'\n[axes]\nwidth = [8, 16]\n\
                     multiplicity = [2]\nnoise = [0.1]\n'optimizer.lr' = [1e-3, 1e30]\nseed = [1]\n";

fn write(place: &Place, name: &str, text: &str) {
    fs::write(place.path().join(name), text).unwrap();
}

fn swept(place: &Place) -> Said {
    ["base.toml", "up.toml", "sweep.toml"]
        .iter()
        .zip([BASE, UP, SWEEP])
        .for_each(|(name, text)| write(place, name, text));
    place.run("sweep -c sweep.toml --json")
}

#[test]
fn mup_passes_the_coordinate_check_and_standard_parametrisation_fails() {
    let place = Place::new();
    write(&place, "check.toml", &BASE.replace("residual = 8\nkv_heads = 1", "residual = 16\nkv_heads = 2"));
    let check = |more: &str| place.run(&format!("coord-check -c check.toml --widths 16,32,64,128 --json {more}"));
    for more in ["", "--widen 2 --set model.arch=llama", "--set optimizer.kind=sgd --set optimizer.lr=0.1"] {
        let passed = check(more);
        assert_eq!(passed.code, 0, "{more}: {}{}", passed.out, passed.err);
        assert_eq!(passed.json()["verdict"], "passes");
    }
    let failed = check("--parametrization standard -o picture.svg");
    assert_eq!(failed.code, 1);
    assert_eq!(failed.json()["verdict"], "grows");
    assert!(failed.err.contains("standard parametrisation"), "{}", failed.err);
    assert!(fs::read_to_string(place.path().join("picture.svg")).unwrap().contains("<svg"));
    // Where nothing is learnt nothing can be seen to grow.
    let nothing = check("--lr 0.0");
    assert_eq!((nothing.code, nothing.json()["verdict"].clone()), (1, "cannot-tell".into()));
    let refused = place.run("coord-check -c check.toml --widths 16,24,33");
    assert_eq!(refused.code, 2);
    assert!(refused.err.contains("33"), "{}", refused.err);
}

#[test]
fn a_sweep_shares_bases_keeps_what_diverged_and_goes_on() {
    let place = Place::new();
    let first = swept(&place);
    assert_eq!(first.code, 0, "{}", first.err);
    let outcomes = first.json()["outcomes"].clone();
    let status = |run: usize| outcomes[run]["status"].as_str().unwrap().to_string();
    assert_eq!((0..4).map(status).collect::<Vec<_>>(), ["done", "done", "diverged", "diverged"]);
    assert_eq!(fs::read_dir(place.path().join("s/bases")).unwrap().count(), 2);
    // The run that the sweep names is the one that train makes of its configuration.
    let name = outcomes[0]["name"].as_str().unwrap();
    let config = fs::read_to_string(place.path().join(format!("s/configs/{name}.toml"))).unwrap();
    write(&place, "again.toml", &config.replace("s/runs/", "again/"));
    let again = place.run("train -c again.toml --json");
    assert_eq!(again.json()["validation_loss"], outcomes[0]["validation_loss"], "{}", again.err);
    // Started again it finds all of it done; a damaged outcome, result file or lost run is made anew, to the same bits.
    fs::write(place.path().join(format!("s/runs/{name}/outcome.json")), "{").unwrap();
    fs::write(place.path().join("s/results.sqlite"), "no database").unwrap();
    fs::remove_dir_all(place.path().join("s/runs").join(outcomes[1]["name"].as_str().unwrap())).unwrap();
    let second = place.run("sweep -c sweep.toml --json");
    assert!(second.err.contains("2 of 4 runs have ended before"), "{}", second.err);
    let losses = |said: &Said| -> Vec<_> {
        said.json()["outcomes"].as_array().unwrap().iter().map(|o| o["validation_loss"].clone()).collect()
    };
    assert_eq!(losses(&second), losses(&first));
    assert_eq!(rows(&place.path().join("s/results.sqlite")), 4);
}

fn rows(database: &Path) -> i64 {
    let connection = rusqlite::Connection::open(database).unwrap();
    connection
        .query_row("SELECT count(*) FROM runs JOIN axes USING (name) WHERE key = 'width'", [], |row| row.get(0))
        .unwrap()
}

#[test]
fn halving_trains_the_best_longer_and_shards_share_a_grid() {
    let place = Place::new();
    for (name, text) in [("base.toml", BASE), ("up.toml", UP)] {
        write(&place, name, text);
    }
    write(
        &place,
        "halving.toml",
        &(SWEEP.replace("run = 's'", "run = 'h'") + "[search]\nkind = 'halving'\nsteps = 4\neta = 3\n"),
    );
    let said = place.run("sweep -c halving.toml --json");
    assert_eq!(said.code, 0, "{}", said.err);
    let outcomes = said.json()["outcomes"].clone();
    // Four runs of 4 steps, the better two of 12.
    assert_eq!(outcomes.as_array().unwrap().len(), 2, "{outcomes}");
    assert!(outcomes.as_array().unwrap().iter().all(|o| o["steps"] == 12 && o["status"] == "done"), "{outcomes}");
    write(&place, "sweep.toml", SWEEP);
    // At the same time: both need both bases.
    let shards = [0, 1].map(|i| place.command(&format!("sweep -c sweep.toml --shard {i}/2 --json")).spawn().unwrap());
    let shards = shards.map(|shard| Said::new(shard.wait_with_output().unwrap()));
    assert!(shards.iter().all(|said| said.code == 0 && said.json()["outcomes"].as_array().unwrap().len() == 2));
    assert_eq!(rows(&place.path().join("s/results.sqlite")), 4);
}

#[test]
fn a_killed_worker_is_started_again_and_a_stopped_sweep_goes_on() {
    let place = Place::new();
    for (name, text) in [
        ("base.toml", BASE.to_string()),
        ("up.toml", UP.replace("steps = 12", "steps = 400\n[checkpoint]\nevery = 20")),
    ] {
        write(&place, name, &text);
    }
    write(&place, "sweep.toml", &SWEEP.replace("1e-3, 1e30", "1e-3").replace("width = [8, 16]", "width = [8]"));
    let mut sweep = Command::new(env!("CARGO_BIN_EXE_mupscale"));
    let child = sweep.args(["sweep", "-c", "sweep.toml", "--json"]).current_dir(place.path());
    let child = child.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).spawn().unwrap();
    // Its training process, once it has saved.
    let runs = place.path().join("s/runs");
    let saved = || {
        fs::read_dir(&runs).into_iter().flatten().flatten().any(|run| {
            fs::read_dir(run.path().join("checkpoints"))
                .is_ok_and(|mut all| all.any(|e| e.is_ok_and(|e| e.file_name().to_string_lossy().starts_with("step-"))))
        })
    };
    let until = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while !saved() && std::time::Instant::now() < until {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let killed = Command::new("pkill").args(["-KILL", "-P", &child.id().to_string()]).status();
    let said = Said::new(child.wait_with_output().unwrap());
    assert!(killed.is_ok_and(|status| status.success()), "the run ended before it could be killed: {}", said.err);
    assert_eq!(said.code, 0, "{}", said.err);
    assert_eq!(
        (said.json()["outcomes"][0]["status"].clone(), said.json()["outcomes"][0]["steps"].clone()),
        ("done".into(), 400.into())
    );
}

/// What the recipe is tried on: an upscale that learns something in a second, tuned at 8 and used at 16.
const PLAN: &str = "run = 't'\nconfig = 'up.toml'\nseeds = [1, 2]\n[base]\nconfig = 'base.toml'\n\
                    [sizes]\nsmall = 8\nlarge = 16\nmultiplicity = 2\n\
                    [tune]\nnoise = [0.01, 0.1, 1.0]\n'optimizer.lr' = [1e-3, 4e-3, 1.6e-2]\n";

#[test]
fn the_recipe_tunes_small_uses_large_and_reports() {
    let place = Place::new();
    for (name, text) in [("base.toml", BASE), ("up.toml", UP)] {
        write(&place, name, text);
    }
    let plan = format!("{PLAN}[evidence]\naxis = 'optimizer.lr'\nwidths = [8, 16]\n");
    write(&place, "plan.toml", &plan);
    let said = place.run("transfer -c plan.toml --json");
    assert_eq!(said.code, 0, "{}", said.err);
    let report = said.json();
    let chosen = report["chosen"].as_array().unwrap();
    let value = |i: usize| chosen[i]["value"].as_f64().unwrap();
    assert_eq!((chosen[0]["axis"].as_str(), chosen[1]["axis"].as_str()), (Some("noise"), Some("optimizer.lr")));
    // The large upscale is the run that train makes of its configuration, with the values that were chosen.
    let configs = fs::read_dir(place.path().join("t/large/configs")).unwrap().flatten();
    let config = configs.map(|e| e.path()).find(|path| path.to_string_lossy().contains("seed=1")).unwrap();
    let text = fs::read_to_string(config).unwrap();
    let table: toml::Table = text.parse().unwrap();
    assert_eq!(table["optimizer"]["lr"].as_float(), Some(value(1)), "{text}");
    assert_eq!(table["init"]["upscale"]["noise"].as_float(), Some(value(0)), "{text}");
    write(&place, "again.toml", &text.replace("t/large/runs/", "again/"));
    let again = place.run("train -c again.toml --json");
    assert_eq!(again.json()["validation_loss"], report["large"][0], "{}", again.err);
    // All parts have one base shape, except in standard parametrisation, where there is none.
    let base = |part: &str| fs::read_to_string(place.path().join(format!("t/{part}/configs/bases/width=16.toml")));
    for part in ["large", "mup"] {
        let base: toml::Table = base(part).unwrap().parse().unwrap();
        assert_eq!(base["parametrization"]["base"]["residual"].as_integer(), Some(8));
    }
    assert!(base("standard").unwrap().contains("standard"));
    let lines = report["lines"].as_array().unwrap();
    let names: Vec<_> = lines.iter().map(|line| line["parametrization"].as_str().unwrap()).collect();
    assert_eq!(names, ["mup", "standard"]);
    assert!(lines.iter().all(|line| line["optima"].as_array().unwrap().len() == 2), "{report}");
    let mean = (report["large"][0].as_f64().unwrap() + report["large"][1].as_f64().unwrap()) / 2.0;
    let mut by_lr = std::collections::BTreeMap::<String, Vec<f64>>::new();
    for run in fs::read_dir(place.path().join("t/mup/runs")).unwrap().flatten() {
        let name = run.file_name().into_string().unwrap();
        let outcome: serde_json::Value =
            serde_json::from_slice(&fs::read(run.path().join("outcome.json")).unwrap()).unwrap();
        if name.ends_with("width=16") {
            let loss = outcome["validation_loss"].as_f64().unwrap();
            by_lr.entry(outcome["values"]["optimizer.lr"].to_string()).or_default().push(loss);
        }
    }
    let best = by_lr.values().map(|losses| losses.iter().sum::<f64>() / 2.0).fold(f64::INFINITY, f64::min);
    let lost = mean - best;
    assert!((report["lost"].as_f64().unwrap() - lost).abs() < 1e-12, "{report}");
    assert!(report["full_size_flops"].as_f64() > report["tuning_flops"].as_f64());
    assert!(fs::read_to_string(place.path().join("t/transfer.svg")).unwrap().contains("Best value against width"));
    // Once more it reads what is there.
    let second = place.run("transfer -c plan.toml --json");
    assert_eq!(second.json(), report);
    assert!(second.err.contains("18 of 18 runs have ended before"), "{}", second.err);
}

#[test]
fn the_recipe_writes_a_job_and_reports_when_it_has_run() {
    let place = Place::new();
    for (name, text) in [("base.toml", BASE), ("up.toml", UP)] {
        write(&place, name, text);
    }
    write(&place, "plan.toml", &format!("{PLAN}[large]\njob = true\n").replace("[0.01, 0.1, 1.0]", "[0.1]"));
    let said = place.run("transfer -c plan.toml");
    assert_eq!(said.code, 0, "{}", said.err);
    assert!(said.out.contains("sbatch t/large.sbatch"), "{}", said.out);
    let job = fs::read_to_string(place.path().join("t/large.sbatch")).unwrap();
    let configs: Vec<_> = job.lines().filter_map(|line| line.trim().strip_prefix('\'')?.strip_suffix('\'')).collect();
    // The base, then a run for each seed, in an order in which they can be trained.
    assert_eq!(configs.len(), 3, "{job}");
    for config in configs {
        let trained = place.command("train --resume auto -c").arg(config).output().unwrap();
        assert!(trained.status.success(), "{}", String::from_utf8_lossy(&trained.stderr));
    }
    let said = place.run("transfer -c plan.toml");
    assert_eq!(said.code, 0, "{}", said.err);
    assert!(said.out.contains("mean of 2 seeds: loss"), "{}", said.out);
}

#[test]
fn a_plan_that_cannot_be_is_refused_before_anything_runs() {
    let place = Place::new();
    for (name, text) in [("base.toml", BASE), ("up.toml", UP)] {
        write(&place, name, text);
    }
    for (from, to, said) in [
        ("large = 16", "large = 12", "multiple of sizes.small = 8"),
        ("noise = [0.01, 0.1, 1.0]", "noise = ['a']", "only numbers"),
        ("noise = [0.01, 0.1, 1.0]", "seed = [1]", "the recipe sets it"),
        ("noise = [0.01, 0.1, 1.0]", "noise = []", "no valid point"),
        ("seeds = [1, 2]", "seeds = []", "at least one"),
        ("[tune]", "[evidence]\naxis = 'x'\nwidths = [8]\n[tune]", "evidence.axis"),
        ("[tune]", "[other]\n[tune]", "unknown field"),
    ] {
        write(&place, "plan.toml", &PLAN.replace(from, to));
        let refused = place.run("transfer -c plan.toml");
        assert_eq!(refused.code, 2, "{to}: {}{}", refused.out, refused.err);
        assert!(refused.err.contains(said), "{to}: {}", refused.err);
        assert!(!place.path().join("t").exists());
    }
    // Everything diverged: said, with where to go.
    let all = PLAN.replace("[1e-3, 4e-3, 1.6e-2]", "[1e30, 1e31, 1e32]").replace("[0.01, 0.1, 1.0]", "[0.1]");
    write(&place, "plan.toml", &all);
    let diverged = place.run("transfer -c plan.toml");
    assert_eq!(diverged.code, 1, "{}", diverged.err);
    assert!(diverged.err.contains("every run at width 8 diverged"), "{}", diverged.err);
}

#[test]
fn plans_of_the_experiments_can_be_run() {
    use mupscale::transfer::{growth::GrowthPlan, recipe::TransferPlan};
    let experiments = Path::new("experiments");
    let plans: Vec<_> = ["lr.toml", "lr-small.toml", "noise.toml", "noise-small.toml"]
        .map(|name| TransferPlan::read(&experiments.join("gpt2").join(name)).unwrap())
        .into_iter()
        .collect();
    // The small ones are parts of the large ones: the same folders and values, fewer widths.
    for pair in plans.chunks(2) {
        assert_eq!((&pair[0].run, &pair[0].tune, &pair[0].seeds), (&pair[1].run, &pair[1].tune, &pair[1].seeds));
    }
    GrowthPlan::read(&experiments.join("growth/plan.toml")).unwrap();
}
