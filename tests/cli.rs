//! Every command as a user types it: what it prints, what it writes, and how the commands fit together.

mod command;

use clap::CommandFactory;
use command::{Place, contents, essence};
use serde_json::Value;
use std::fs;

/// All commands with their paths, for example `data tokenize`.
fn commands() -> Vec<(String, clap::Command)> {
    fn below(path: &str, command: &clap::Command, found: &mut Vec<(String, clap::Command)>) {
        for sub in command.get_subcommands() {
            let path = format!("{path} {}", sub.get_name()).trim().to_string();
            below(&path, sub, found);
            found.push((path, sub.clone()));
        }
    }
    let mut found = Vec::new();
    below("", &mupscale::commands::Args::command(), &mut found);
    found
}

#[test]
fn help_is_complete() {
    let place = Place::new();
    let top = place.ok("--help").out;
    for (path, command) in commands() {
        let help = place.ok(&format!("{path} --help")).out;
        assert!(command.get_about().is_some_and(|a| !a.to_string().is_empty()), "{path} says not what it does");
        assert!(path.contains(' ') || top.contains(&path), "--help lists no {path}");
        for argument in command.get_arguments() {
            let name = argument.get_long().map_or(argument.get_id().to_string(), |long| format!("--{long}"));
            assert!(help.to_lowercase().contains(&name.to_lowercase()), "{path} --help lists no {name}");
            assert!(argument.get_help().is_some(), "{path}: {name} has no help");
        }
    }
}

#[test]
fn the_commands_have_the_options_that_users_were_promised() {
    let promised = [
        ("train", "--config --set --force --resume --device --threads --on-nan --json"),
        ("resume", "--set --device --threads --on-nan --json"),
        (
            "upscale",
            "--out --width --residual --ffn --kv-heads --group --head-dim --hidden --noise --noise-kind --moments \
             --seed --force --json independent paired relative paper keep reset",
        ),
        ("generate", "--prompt --tokens --temperature --top-k --top-p --seed --json"),
        ("eval", "--part --tokenizer --json"),
        ("inspect", "--json"),
        ("checkpoint merge", "--out --weights --force"),
        ("data tokenize", "--out --tokenizer --val-fraction --force --json"),
        ("data train-tokenizer", "--out --vocab --force --json"),
        ("data synth", "--bytes --seed --force --json"),
        ("data inspect", "--dtype --json"),
        ("quickstart", ""),
        ("completions", "bash zsh fish"),
    ];
    let place = Place::new();
    for (command, options) in promised {
        let help = place.ok(&format!("{command} --help")).out;
        for option in options.split_whitespace() {
            assert!(help.contains(option), "{command} --help lists no {option}");
        }
    }
}

#[test]
fn version_and_completions() {
    let place = Place::new();
    assert!(place.ok("--version").out.starts_with(concat!("mupscale ", env!("CARGO_PKG_VERSION"))));
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = place.ok(&format!("completions {shell}")).out;
        for (path, _) in commands() {
            assert!(script.contains(path.rsplit(' ').next().unwrap()), "{shell}: no {path}");
        }
        assert!(script.contains("kv-heads"), "{shell}: no options");
    }
    // bash itself reads its script and completes by it.
    place.write("complete.bash", place.ok("completions bash").out);
    let script = "source complete.bash; COMP_WORDS=(mupscale ups); COMP_CWORD=1; _mupscale mupscale ups mupscale; \
                  echo \"${COMPREPLY[@]}\"";
    let answer = std::process::Command::new("bash").args(["-c", script]).current_dir(place.path()).output();
    match answer {
        Ok(answer) => assert_eq!(String::from_utf8_lossy(&answer.stdout).trim(), "upscale"),
        Err(_) => eprintln!("skipped: there is no bash here"),
    }
}

#[test]
fn a_run_folder_holds_what_the_manual_says() {
    let place = Place::new();
    let outcome = place.ok("train -c run.toml --set run=a/b --set steps=20 --set checkpoint.every=5 --json").json();
    assert_eq!(outcome["steps"], 20);
    assert_eq!(outcome["tokens"], 20 * 2 * 16);
    assert_eq!(outcome["checkpoint"], "a/b/checkpoints/step-00000020");
    let mut names = place.names("a/b");
    names.retain(|name| !name.starts_with("events.out.tfevents."));
    assert_eq!(names, ["checkpoints", "config.toml", "log.txt", "metrics.jsonl"]);
    assert_eq!(place.names("a/b").len(), 5, "and one file for TensorBoard");
    assert_eq!(place.names("a/b/checkpoints"), ["step-00000015", "step-00000020"], "the two newest are kept");
    let files =
        ["config.json", "index.json", "manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"];
    assert_eq!(place.names("a/b/checkpoints/step-00000020"), files);
    let metrics = String::from_utf8(place.read("a/b/metrics.jsonl")).unwrap();
    let lines: Vec<Value> = metrics.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let steps: Vec<_> = lines.iter().filter(|line| line["kind"] == "train").collect();
    assert_eq!(steps.len(), 20);
    for (i, line) in steps.iter().enumerate() {
        assert_eq!(line["step"], i as u64 + 1);
        for field in ["tokens", "loss", "lr", "grad_norm", "update_norm", "tokens_per_second", "seconds", "memory"] {
            assert!(line[field].is_number(), "step {}: {field} is {}", i + 1, line[field]);
        }
    }
    assert!(lines.iter().any(|line| line["kind"] == "validation" && line["loss"].is_number()));
    // The resolved configuration is a configuration: it gives the same run.
    place.ok("train -c a/b/config.toml --set run=again");
    assert!(essence(&place.join("a/b"), 20) == essence(&place.join("again"), 20));
    // A name is a name, even where it looks like a number.
    for name in ["1", "nan"] {
        place.ok(&format!("train -c run.toml --set run={name} --set steps=1"));
        assert_eq!(place.names(&format!("{name}/checkpoints")), ["step-00000001"]);
    }
    // Keep-every keeps what keep-last would not.
    place.ok("train -c run.toml --set run=k --set steps=9 --set checkpoint={every=1,keep_last=1,keep_every=4}");
    assert_eq!(place.names("k/checkpoints"), ["step-00000004", "step-00000008", "step-00000009"]);
}

#[test]
fn checkpoints_are_the_same_behind_training_and_before_it() {
    let place = Place::new();
    let train = |run: &str, more: &str| {
        place.ok(&format!("train -c run.toml --set run={run} --set checkpoint={{every=1,keep_last=0{more}}}"));
        String::from_utf8(place.read(&format!("{run}/log.txt"))).unwrap()
    };
    let (behind, waits) = ("written behind training, from a copy of", "training waits while a checkpoint is written");
    let logs = [("auto", ""), ("always", ",background=true"), ("never", ",background=false")]
        .map(|(run, more)| (run, train(run, more)));
    for (run, log) in &logs {
        let (says, not) = if *run == "never" { (waits, behind) } else { (behind, waits) };
        assert!(log.contains(says) && !log.contains(not), "{run}: {log}");
        assert_eq!(log.matches("training paused for").count(), 4, "{run}: {log}");
        for step in 1..=4 {
            let files = ["model.safetensors", "optimizer.safetensors", "index.json"];
            for file in files.map(|file| format!("checkpoints/step-{step:08}/{file}")) {
                assert!(place.read(&format!("{run}/{file}")) == place.read(&format!("never/{file}")), "{run}: {file}");
            }
        }
    }
    // No room beside the model itself: the choice of a machine that has more.
    let need = place.ok("train -c run.toml --set run=tight --set memory.limit=1 --set checkpoint.every=1");
    assert!(need.err.contains(behind), "{}", need.err);
    let wide = "--set run=full --set model.residual=96 --set memory={limit=3,recompute='none'} --set steps=2";
    let full = place.run(&format!("train -c run.toml {wide} --set checkpoint.every=1"));
    assert!(full.code == 0 && full.err.contains("a copy takes") && full.err.contains(waits), "{}", full.err);
    place.refuses("train -c run.toml --set run=x --set checkpoint.background=maybe", &["maybe", "auto", "false"]);
}

#[test]
fn merging_gives_one_file_of_all_tensors() {
    use safetensors::SafeTensors;
    let place = Place::new();
    let said = place.ok("checkpoint merge base -o all.safetensors");
    assert!(said.out.contains("all.safetensors: ") && said.out.contains("tensors, "), "{}", said.out);
    let folder = "base/checkpoints/step-00000004";
    let [all, model, optimizer] =
        ["all.safetensors".into(), format!("{folder}/model.safetensors"), format!("{folder}/optimizer.safetensors")]
            .map(|name: String| place.read(&name));
    let [all, model, optimizer] = [&all, &model, &optimizer].map(|bytes| SafeTensors::deserialize(bytes).unwrap());
    assert_eq!(all.len(), model.len() + optimizer.len());
    for (name, view) in model.iter().chain(optimizer.iter()) {
        let merged = all.tensor(name).unwrap();
        assert!((merged.dtype(), merged.shape(), merged.data()) == (view.dtype(), view.shape(), view.data()), "{name}");
    }
    place.ok(&format!("checkpoint merge {folder} -o weights.safetensors --weights"));
    let weights = place.read("weights.safetensors");
    assert_eq!(SafeTensors::deserialize(&weights).unwrap().len(), model.len());
    place.refuses("checkpoint merge base -o weights.safetensors", &["weights.safetensors", "--force"]);

    // The same tensors in two shards, one of a type that no model of ours has, and an index, as the hub has them.
    fs::create_dir(place.join("hub")).unwrap();
    let names: Vec<&str> = model.names().into_iter().collect();
    let flag = safetensors::tensor::TensorView::new(safetensors::Dtype::BOOL, vec![2], &[0, 1]).unwrap();
    let (first, second) = names.split_at(names.len() / 2);
    let mut map = serde_json::Map::new();
    for (file, names) in [("a-1.safetensors", first), ("a-2.safetensors", second)] {
        let own = names.iter().map(|name| (*name, model.tensor(name).unwrap()));
        let own: Vec<_> = own.chain((names == second).then(|| ("flag", flag.clone()))).collect();
        map.extend(own.iter().map(|(name, _)| (name.to_string(), file.into())));
        let remarks = [("format".to_string(), "pt".to_string())].into();
        place.write(&format!("hub/{file}"), safetensors::serialize(own, Some(remarks)).unwrap());
    }
    place.ok("checkpoint merge hub -o whole.safetensors");
    let index = |map: &serde_json::Map<String, Value>| serde_json::json!({ "weight_map": map }).to_string();
    place.write("hub/a.safetensors.index.json", index(&map));
    place.ok("checkpoint merge hub -o indexed.safetensors");
    let whole = place.read("whole.safetensors");
    assert!(whole == place.read("indexed.safetensors"));
    let found = SafeTensors::deserialize(&whole).unwrap();
    assert!(found.len() == model.len() + 1 && found.tensor("flag").unwrap().data() == [0, 1]);
    assert!(model.iter().all(|(name, view)| found.tensor(name).unwrap().data() == view.data()));
    let (_, metadata) = SafeTensors::read_metadata(&whole).unwrap();
    assert_eq!(metadata.metadata().as_ref().unwrap()["format"], "pt");

    // What is not whole is not merged.
    let merge = "checkpoint merge hub -o x.safetensors";
    map.insert("lost".into(), "a-1.safetensors".into());
    place.write("hub/a.safetensors.index.json", index(&map));
    place.refuses(merge, &["a-1.safetensors", "lost", "missing"]);
    map.insert("lost".into(), "../base.safetensors".into());
    place.write("hub/a.safetensors.index.json", index(&map));
    place.refuses(merge, &["lost", "outside"]);
    fs::remove_file(place.join("hub/a.safetensors.index.json")).unwrap();
    fs::copy(place.join("hub/a-1.safetensors"), place.join("hub/b.safetensors")).unwrap();
    place.refuses(merge, &["b.safetensors", "a-1.safetensors too"]);
    place.write("hub/b.safetensors", "no safetensors");
    place.refuses(merge, &["b.safetensors", "no whole safetensors file"]);
    let tensors = place.join(folder).join("model.safetensors");
    let mut bytes = fs::read(&tensors).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&tensors, bytes).unwrap();
    place.refuses("checkpoint merge base -o x.safetensors", &["checksum is wrong"]);
    place.refuses("checkpoint merge data -o x.safetensors", &["no checkpoint and no *.safetensors"]);
}

#[test]
fn resume_goes_on_as_if_nothing_had_happened() {
    let place = Place::new();
    for (run, config) in [("base", "run.toml"), ("again", "rows.toml")] {
        place.ok(&format!("train -c {config} --set run={run} --set checkpoint.every=2 --force"));
        let whole = essence(&place.join(run), 4);
        fs::remove_dir_all(place.join(run).join("checkpoints/step-00000004")).unwrap();
        let outcome = place.ok(&format!("resume {run} --json")).json();
        assert_eq!(outcome["steps"], 4);
        assert!(essence(&place.join(run), 4) == whole, "{config}");
    }
}

#[test]
fn the_same_command_begins_goes_on_and_finds_the_run_complete() {
    let place = Place::new();
    place.write("wide.toml", String::from_utf8(place.read("run.toml")).unwrap().split("[model]").next().unwrap());
    let (narrow, wide) =
        ("-c run.toml --set run=n", "-c wide.toml --set run=w --set init={from='base',upscale={width=2}}");
    for (run, line) in [("n", narrow), ("w", wide)] {
        let line = format!("train {line} --resume auto --set checkpoint.every=2");
        // A kill before the first checkpoint leaves a folder without one, or without anything.
        fs::create_dir_all(place.join(run).join("checkpoints")).unwrap();
        place.ok(&line);
        fs::remove_dir_all(place.join(run).join("checkpoints")).unwrap();
        fs::create_dir(place.join(run).join("checkpoints")).unwrap();
        let begun = place.ok(&format!("{line} --json")).json();
        let whole = essence(&place.join(run), 4);
        fs::remove_dir_all(place.join(run).join("checkpoints/step-00000004")).unwrap();
        let went_on = place.ok(&format!("{line} --threads 2 --json")).json();
        assert!(essence(&place.join(run), 4) == whole, "{run}");
        let complete = contents(&place.join(run));
        let found = place.ok(&format!("{line} --json")).json();
        assert!(contents(&place.join(run)) == complete, "{run}: a complete run stays as it is");
        for outcome in [went_on, found] {
            for key in ["run", "checkpoint", "steps", "tokens", "loss"] {
                assert_eq!(outcome[key], begun[key], "{run}: {key}");
            }
        }
        place.refuses(&format!("{line} --set seed=5"), &["seed = 5", "was begun with", "another run folder"]);
    }
    place.refuses("train -c run.toml --resume auto --force", &["--force", "cannot be used with"]);
}

#[test]
fn upscale_and_train_widen_alike() {
    let place = Place::new();
    let noise = ["independent", "paired", "relative", "paper"];
    for (i, kind) in noise.into_iter().enumerate() {
        let outcome = place
            .ok(&format!("upscale base --out wide{i} --width 2 --noise 0.1 --noise-kind {kind} --seed 3 --json"))
            .json();
        assert_eq!(outcome["shape"]["residual"], 32);
        assert!(outcome["parameters"].as_u64() > outcome["narrow_parameters"].as_u64());
        let init = format!("--set init.from=base --set init.upscale={{width=2,noise=0.1,noise_kind='{kind}',seed=3}}");
        place.write("wide.toml", String::from_utf8(place.read("run.toml")).unwrap().split("[model]").next().unwrap());
        place.ok(&format!("train -c wide.toml --set run=x{i} {init}"));
        place.ok(&format!("train -c wide.toml --set run=y{i} --set init.from=wide{i}"));
        assert!(essence(&place.join(&format!("x{i}")), 4) == essence(&place.join(&format!("y{i}")), 4), "{kind}");
    }
    let weights = |i: usize| place.read(&format!("wide{i}/model.safetensors"));
    assert!((1..4).all(|i| weights(i) != weights(0)), "kinds of noise differ");
    place.ok("upscale base --out plain --width 2");
    let loss = |checkpoint: &str| place.ok(&format!("eval {checkpoint} data --json")).json()["loss"].as_f64().unwrap();
    // f32: sums of twice as many terms are rounded otherwise.
    assert!((loss("plain") - loss("base")).abs() < 1e-5, "widening without noise keeps the function");
    assert!((loss("wide0") - loss("base")).abs() > 1e-5, "noise changes it");
    place.ok("upscale classes --out wide-classes --hidden 2,3");
    place.ok("upscale base --out unequal --residual 3 --ffn 2 --kv-heads 1 --group 2 --head-dim 2 --moments reset");
    assert!(!place.names("unequal").contains(&"optimizer.safetensors".into()), "reset moments are not stored");
    place.ok("upscale plain --out plain --width 2 --force");
    let shape = place.ok("inspect plain --json").json();
    assert_eq!(shape["dims"]["residual"], 64, "a checkpoint may be replaced by its own widening");
}

#[test]
fn eval_measures_the_same_tokens_alike() {
    let place = Place::new();
    let eval = |line: &str| place.ok(&format!("eval {line} --json")).json();
    let loss = |line: &str| eval(line)["loss"].as_f64().unwrap();
    let by_training = place.ok("train -c run.toml --set run=v --set validation.batches=0 --json").json();
    assert!((loss("v data") - by_training["validation_loss"].as_f64().unwrap()).abs() < 1e-6);
    assert_eq!(loss("base data --part train"), loss("base data/train_000000.bin"));
    assert_eq!(loss("base data/val_000000.bin"), loss("base data"));
    assert_eq!(
        loss("base/checkpoints/step-00000004 data"),
        loss("base data"),
        "a run stands for its newest checkpoint"
    );
    // A batch's size changes no window; sums in f32 may be taken in another order.
    assert!((loss("base data --batch 3") - loss("base data")).abs() < 1e-6);
    let text = String::from_utf8(place.read("corpus.txt")).unwrap();
    place.write("head.txt", &text[..1000]);
    fs::create_dir(place.join("folder")).unwrap();
    place.write("folder/head.txt", &text[..1000]);
    let head = place.ok("data tokenize head.txt --out head --val-fraction 0 --json").json();
    assert_eq!(loss("base head.txt"), loss("base head --part train"));
    assert_eq!(loss("base folder"), loss("base head.txt"));
    // Windows of 16 tokens, and after the last one a token to predict.
    let tokens = head["train"]["tokens"].as_u64().unwrap();
    assert_eq!(eval("base head.txt")["tokens"], (tokens - 1) / 16 * 16);
    assert!(eval("classes rows.csv")["loss"].as_f64().unwrap() > 0.0);
    assert!(place.ok("eval base data").out.contains("perplexity"));
}

#[test]
fn generate_is_a_function_of_its_seed() {
    let place = Place::new();
    let text = |options: &str| place.ok(&format!("generate base --tokens 40 --json {options}")).json()["text"].clone();
    assert_eq!(text("--seed 1"), text("--seed 1"));
    assert_ne!(text("--seed 1"), text("--seed 2"));
    assert_eq!(text("--temperature 0 --seed 1"), text("--temperature 0 --seed 2"));
    assert_eq!(text("--top-k 1 --seed 1"), text("--temperature 0"));
    // Past the context of 16, and a prompt that is longer than it.
    let long = place.ok(&format!("generate base --tokens 40 --prompt {}", "a".repeat(50)));
    assert!(!long.out.is_empty());
    assert_eq!(place.ok("generate base --tokens 0 --json").json()["tokens"], 0);
}

#[test]
fn inspect_shows_every_tensor_with_its_multipliers() {
    let place = Place::new();
    let narrow = place.ok("inspect base --json").json();
    let planned = place.ok("inspect run.toml --json").json();
    assert_eq!(narrow["tensors"], planned["tensors"], "a configuration shows what its checkpoint will");
    place.ok("upscale base --out wide --width 2");
    let wide = place.ok("inspect wide --json").json();
    assert_eq!(wide["scaling"]["base"], narrow["dims"], "a checkpoint knows its base");
    let tensors = wide["tensors"].as_array().unwrap();
    let elements: u64 = tensors.iter().map(|t| t["elements"].as_u64().unwrap()).sum();
    assert_eq!(wide["parameters"], elements);
    let of = |name: &str| tensors.iter().find(|t| t["name"] == name).unwrap_or_else(|| panic!("no {name}"));
    // upscaling.md, "The rule", for AdamW at twice the width.
    for (name, s, gamma) in
        [("blocks.0.mlp.up.weight", 0.5, 0.5), ("blocks.0.norm1.weight", 1.0, 0.5), ("embedding.weight", 1.0, 0.5)]
    {
        let tensor = of(name);
        assert_eq!((tensor["s"].as_f64(), tensor["gamma"].as_f64()), (Some(s), Some(gamma)), "{name}");
        assert_eq!(tensor["lr_factor"].as_f64(), Some(s), "{name}");
        for field in ["lr", "weight_decay", "eps", "init_std", "clip_weight", "a"] {
            assert!(tensor[field].is_number(), "{name}: {field}");
        }
        assert!(tensor["axes"].as_array().is_some_and(|axes| !axes.is_empty()), "{name}");
    }
    let printed = place.ok("inspect wide").out;
    assert!(tensors.iter().all(|t| printed.contains(t["name"].as_str().unwrap())));
}

#[test]
fn data_commands_work_together() {
    let place = Place::new();
    let made = place.ok("data synth two.jsonl --bytes 8000 --seed 5 --json").json();
    assert!(made["nats"].as_f64().unwrap() > 0.0);
    place.ok("data synth again.jsonl --bytes 8000 --seed 5");
    assert_eq!(place.read("two.jsonl"), place.read("again.jsonl"));
    assert_eq!(place.ok("data inspect two.jsonl --json").json()["documents"], made["documents"]);
    let trained = place.ok("data train-tokenizer two.jsonl --vocab 300 --out new/tok.json --json").json();
    assert_eq!(trained["vocab"], 300);
    assert_eq!(place.ok("data inspect new/tok.json --json").json()["vocab"], 300);
    let info = place.ok("data tokenize two.jsonl --tokenizer new/tok.json --out tokens --json").json();
    assert_eq!(info["vocab"], 300);
    let shown = place.ok("data inspect tokens --json").json();
    assert_eq!(shown["train_tokens"], info["train"]["tokens"]);
    assert_eq!(place.ok("data inspect tokens/train_000000.bin --json").json()["tokens"], info["train"]["tokens"]);
    assert_eq!(place.ok("data inspect rows.csv --json").json()["rows"], 60);
    // The tokenizer goes with the data into the checkpoint, through widening, and into eval and generate.
    place.ok("train -c run.toml --set run=t --set data.path=tokens");
    place.ok("upscale t --out wide --width 2");
    assert_eq!(place.read("wide/tokenizer.json"), place.read("tokens/tokenizer.json"));
    assert!(place.ok("eval wide two.jsonl --json").json()["loss"].is_number());
    place.ok("generate wide --tokens 5 --prompt The");
}

/// A reader who has seen enough is no reason to panic.
#[test]
fn a_closed_pipe_ends_quietly() {
    let place = Place::new();
    for line in ["inspect base", "completions bash", "generate base --tokens 3000", "data inspect data --json"] {
        // Closed before the program starts, so that it cannot be quicker.
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = place.command(line).stdout(writer).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!said.contains("panicked") && !said.contains("error"), "{line}: {said}");
        assert_eq!(output.status.code(), Some(141), "{line}");
    }
}

#[test]
fn bad_lines_are_counted_in_the_result() {
    let place = Place::empty();
    place.write("lines.jsonl", "{\"text\": \"one\"}\n{broken\n{\"text\": \"two\"}\n{\"text\": 3}\n");
    place.refuses("data tokenize lines.jsonl --out data", &["lines.jsonl", "line 2"]);
    let said = place.ok("data tokenize lines.jsonl --out data --skip-bad --json");
    assert_eq!((&said.json()["skipped_lines"], &said.json()["text_bytes"]), (&2.into(), &6.into()));
    let shown = place.ok("data inspect data").out;
    assert!(shown.contains("bytes_per_token = 1.0") && shown.contains("share"), "{shown}");
}
