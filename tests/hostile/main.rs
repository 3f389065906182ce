//! Input that cannot be used: each is refused with exit code 2 and a message that names the thing, its value and the
//! remedy; nothing is overwritten and nothing left behind (`Place::refuses` compares the folder before and after).

#[path = "../command/mod.rs"]
mod command;
mod mutations;

use command::{Place, essence};
use mupscale::checkpoint::{CONFIG, MODEL, OPTIMIZER, Reader, STATE, TensorMeta, Writer};
use serde_json::{Value, json};
use std::{env, fs, path::Path, process::Command};

#[test]
fn configurations_are_refused_by_key() {
    let place = Place::new();
    let train = |sets: &str, parts: &[&str]| {
        let sets: String = sets.split_whitespace().map(|set| format!(" --set {set}")).collect();
        place.refuses(&format!("train -c run.toml --set run=q{sets}"), parts);
    };
    // Keys and values that do not exist, with the nearest one.
    train("optimizer.wieght_decay=0.1", &["run.toml", "wieght_decay", "did you mean `weight_decay`"]);
    train("stesp=3", &["stesp", "did you mean `steps`"]);
    train("model.resdiual=3", &["resdiual", "did you mean `residual`"]);
    train("init.from=base init.upscale.widht=2", &["widht", "did you mean `width`"]);
    train("optimizer.kind=admaw", &["admaw", "did you mean `adamw`"]);
    train("model.arch=gpt3", &["gpt3", "did you mean `gpt2`"]);
    train("parametrization.base.residuall=3", &["residuall", "residual, ffn"]);
    // Values of another type, or that no run can have.
    train("steps=-1", &["steps", "-1"]);
    train("steps=0", &["steps = 0", "1 or more"]);
    train("steps=many", &["steps", "many"]);
    train("model=3", &["model = 3"]);
    train("optimizer.lr=nan", &["optimizer.lr = NaN"]);
    train("optimizer.betas=[0.9]", &["betas"]);
    train("schedule.final=2.0", &["schedule.final = 2"]);
    train("batch.size=0", &["batch.size = 0"]);
    train("memory.limit=9223372036854775807", &["memory.limit = 9223372036854775807"]);
    train("run=", &["run = ", "folder"]);
    train("run=run.toml", &["run = run.toml", "choose another"]);
    train("threads=1000000000000", &["threads = 1000000000000", "at most"]);
    train("steps", &["--set = steps", "key=value"]);
    train("steps.x=1", &["--set", "not a section"]);
    // Shapes that cannot be.
    train("model.residual=15", &["model.residual = 15", "2 heads", "multiple of 2"]);
    train("model.residual=0", &["model.residual = 0"]);
    train("model.kv_heads=0", &["model.kv_heads = 0"]);
    train("model.kv_heads=16777216 model.group=16777216 model.head_dim=16777216", &["model.kv_heads", "is over"]);
    train("model.layers=1000000", &["model.layers = 1000000", "between 1 and"]);
    train("model.residual=99999999", &["model.residual = 99999999", "between 1 and"]);
    train("model.context=16000000", &["tokens are too few", "16000000", "smaller context"]);
    train("model.vocab=200", &["model.vocab = 200", "vocabulary is 256"]);
    train("model.arch=llama model.head_dim=7", &["model.head_dim = 7", "even"]);
    train("model.arch=llama model.rope_base=-3", &["model.rope_base = -3", "positive"]);
    train("model.arch=llama model.rope_dim=3", &["model.rope_dim = 3", "divide"]);
    train("model.rope_base=100", &["model.rope_base = 100", "gpt2 has no such part"]);
    train("model.hidden=[4]", &["model.hidden", "gpt2 has no such part"]);
    train("model.init_std=-1", &["model.init_std = -1", "positive"]);
    train("model.multipliers.logits=nan", &["model.multipliers.logits = NaN", "positive"]);
    train("model.arch=mlp", &["model.arch = mlp", "rows of numbers"]);
    train("parametrization.base.hidden_1=3", &["parametrization.base.hidden_1 = 3", "residual 16"]);
    train("batch.size=1048576 model.context=1000", &["batch.size = 1048576", "micro_batches"]);
    train("batch.size=900000", &["batch.size = 900000", "does not fit", "the largest that fits"]);
    train("memory.limit=1 model.residual=512", &["batch.size = 2", "does not fit at any size", "memory.limit"]);
    // Starts from a checkpoint that does not fit.
    train("init.from=nowhere", &["nowhere", "no such checkpoint"]);
    train("init.from=base model.residual=32", &["model = gpt2", "residual 32", "leave [model] out"]);
    train("init.from=base init.continue=true", &["steps = 4", "step 4 already", "more steps"]);
    train("init.from=base optimizer.kind=lion init.moments=keeep", &["keeep", "did you mean `keep`"]);
    train("init.from=classes", &["model = gpt2", "hidden_1 6", "leave [model] out"]);
    train("init.from=classes data.path=rows.csv model.arch=mlp", &["model.layers", "mlp has no such part"]);
    let rows = String::from_utf8(place.read("rows.toml")).unwrap();
    place.write("bare.toml", rows.split("[model]").next().unwrap());
    let bare = "train -c bare.toml --set run=q --set init.from=classes --set data.path=data";
    place.refuses(bare, &["data", "no data for mlp", "rows are for mlp"]);
    // Files that are no configuration.
    place.write("broken.toml", "steps = = 3");
    place.refuses("train -c broken.toml", &["broken.toml", "line 1"]);
    place.write("latin1.toml", b"run = \"caf\xe9\"");
    place.refuses("train -c latin1.toml", &["latin1.toml", "not UTF-8", "byte 10"]);
    place.refuses("train -c nowhere.toml", &["nowhere.toml", "cannot read"]);
    place.write("empty.toml", "");
    place.refuses("train -c empty.toml", &["empty.toml", "missing field"]);
    place.refuses("train -c run.toml --set run=q --device cuda", &["libcuda.so.1", "--device cpu"]);
    place.refuses("train -c run.toml --set run=q --device tpu", &["tpu", "cuda"]);
    place.refuses("train -c run.toml --stepz 3", &["--stepz"]);
}

#[test]
fn widenings_are_refused_by_axis() {
    let place = Place::new();
    let upscale = |line: &str, parts: &[&str]| place.refuses(&format!("upscale {line}"), parts);
    upscale("base --out w --width 0", &["width = 0", "1 or more"]);
    upscale("base --out w --ffn 0", &["ffn = 0", "1 or more"]);
    upscale("base --out w", &["nothing to grow", "--width 2"]);
    upscale("base --out w --hidden 2", &["hidden_1 = 2", "no such width", "residual, ffn, kv_heads"]);
    upscale("classes --out w --head-dim 2", &["head_dim = 2", "no such width", "hidden_1, hidden_2"]);
    upscale("classes --out w --residual 2", &["residual = 2", "no such width"]);
    upscale("classes --out w --hidden 2,2,2", &["hidden_3 = 2", "no such width"]);
    upscale("base --out w --width 9999999999", &["residual = 9999999999", "is over"]);
    upscale("base --out w --width -2", &["-2"]);
    upscale("base --out w --width 2 --noise nan", &["noise = NaN", "positive"]);
    upscale("base --out w --width 2 --noise=-0.1", &["noise = -0.1", "positive"]);
    upscale("base --out w --width 2 --noise-kind pared", &["pared", "paired"]);
    upscale("nowhere --out w --width 2", &["nowhere", "no such checkpoint", "step-00000020"]);
    upscale("data --out w --width 2", &["data", "no checkpoint", "manifest.json"]);
    upscale("base --out classes --width 2", &["classes exists already", "--force"]);
    upscale("base --out data --width 2 --force", &["data", "no checkpoint", "choose another name"]);
    upscale("base --out rows.csv --width 2 --force", &["rows.csv", "not a folder"]);
    place.ok("train -c run.toml --set run=plain --set parametrization.kind=standard");
    upscale("plain --out w --head-dim 2", &["head_dim = 2", "standard parametrisation"]);
}

/// Every command that reads a checkpoint, with the checkpoint in `broken`.
const READERS: [&str; 6] = [
    "eval broken data",
    "generate broken --tokens 3",
    "inspect broken",
    "upscale broken --out w --width 2",
    "train -c run.toml --set run=q --set init.from=broken",
    "resume broken-run",
];

/// Puts a changed copy of the base run's newest checkpoint in `broken` and in the run `broken-run`.
fn broken(place: &Place, change: impl FnOnce(&Path)) {
    for old in ["broken", "broken-run"] {
        let _ = fs::remove_dir_all(place.join(old));
    }
    command::copy(&place.join("base/checkpoints/step-00000004"), &place.join("broken"));
    change(&place.join("broken"));
    command::copy(&place.join("base"), &place.join("broken-run"));
    let inside = place.join("broken-run/checkpoints/step-00000004");
    fs::remove_dir_all(&inside).unwrap();
    command::copy(&place.join("broken"), &inside);
}

#[test]
fn damaged_checkpoints_are_refused_by_every_command() {
    let place = Place::new();
    for file in [MODEL, OPTIMIZER, CONFIG, STATE, "index.json", "manifest.json"] {
        type Damage = fn(Vec<u8>) -> Vec<u8>;
        let damages: [(Damage, &str); 3] = [
            (|bytes| bytes[..bytes.len() - 3].to_vec(), "truncated"),
            (|bytes| [bytes, vec![b' '; 5]].concat(), "oversized"),
            (
                |mut bytes| {
                    let middle = bytes.len() / 2;
                    bytes[middle] ^= 4;
                    bytes
                },
                "",
            ),
        ];
        for (i, (damage, word)) in damages.into_iter().enumerate() {
            broken(&place, |dir| fs::write(dir.join(file), damage(fs::read(dir.join(file)).unwrap())).unwrap());
            // The manifest says so of itself by its checksum.
            let word = if file == "manifest.json" { "" } else { word };
            // All six once, then in turn: what they share is the reader.
            let readers = if file == MODEL { &READERS[..] } else { &READERS[i..=i + 3] };
            readers.iter().for_each(|line| place.refuses(line, &[file, word]));
        }
    }
    let flip_last = |dir: &Path| {
        let mut bytes = fs::read(dir.join(MODEL)).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(dir.join(MODEL), bytes).unwrap();
    };
    broken(&place, flip_last);
    place.refuses("eval broken data", &[MODEL, "tensor ", "checksum is wrong", "another checkpoint"]);
    let unseal = |dir: &Path| fs::remove_file(dir.join("manifest.json")).unwrap();
    broken(&place, unseal);
    READERS[..5].iter().for_each(|line| place.refuses(line, &["broken", "incomplete checkpoint", "manifest.json"]));
    // A run whose newest checkpoint is none goes on from the one before.
    place.ok("resume broken-run");
    broken(&place, |dir| fs::remove_file(dir.join(MODEL)).unwrap());
    READERS.iter().for_each(|line| place.refuses(line, &[MODEL, "cannot read"]));
}

/// Writes a checkpoint like `from`, whole and sealed, whose documents and tensors are as `change` makes them.
fn forge(from: &Path, to: &Path, change: impl FnOnce(&mut Value, &mut Value, &mut Vec<(TensorMeta, Vec<u8>)>)) {
    let reader = Reader::open(from).unwrap();
    let (mut config, mut state): (Value, Value) = (reader.json(CONFIG).unwrap(), reader.json(STATE).unwrap());
    let mut tensors: Vec<_> = reader
        .tensors()
        .cloned()
        .collect::<Vec<_>>()
        .into_iter()
        .map(|meta| {
            let bytes = reader.read(&meta.name, 0..meta.elements().unwrap()).unwrap().into_owned();
            (meta, bytes)
        })
        .collect();
    change(&mut config, &mut state, &mut tensors);
    let mut writer = Writer::create(to, true).unwrap();
    writer.json(CONFIG, &config).unwrap();
    writer.json(STATE, &state).unwrap();
    for (file, moments) in [(MODEL, false), (OPTIMIZER, true)] {
        let of_file: Vec<_> = tensors.iter().filter(|(meta, _)| meta.name.contains("_moment") == moments).collect();
        writer.tensors(file, of_file.iter().map(|(meta, _)| meta.clone()).collect()).unwrap();
        of_file.iter().for_each(|(meta, bytes)| writer.write(&meta.name, 0, bytes).unwrap());
    }
    writer.commit().unwrap();
}

#[test]
fn lying_checkpoints_are_refused_by_tensor() {
    let place = Place::new();
    type Tensors = Vec<(TensorMeta, Vec<u8>)>;
    let lies = |parts: &[&str], change: fn(&mut Value, &mut Value, &mut Tensors)| {
        forge(&place.join("base/checkpoints/step-00000004"), &place.join("broken"), change);
        READERS[..5].iter().for_each(|line| place.refuses(line, parts));
    };
    lies(&["tensor norm_f.weight", "missing"], |_, _, tensors| {
        tensors.retain(|(meta, _)| meta.name != "norm_f.weight")
    });
    lies(&["tensor norm_g", "no such tensor"], |_, _, tensors| {
        let (mut meta, bytes) = tensors.iter().find(|(meta, _)| meta.name == "norm_f.bias").unwrap().clone();
        meta.name = "norm_g".into();
        tensors.push((meta, bytes));
    });
    lies(&["tensor norm_f.weight", "[8]", "[16]"], |_, _, tensors| {
        let (meta, bytes) = tensors.iter_mut().find(|(meta, _)| meta.name == "norm_f.weight").unwrap();
        (meta.shape[0], meta.axes[0][0].size) = (8, 8);
        bytes.truncate(32);
    });
    lies(&["tensor norm_f.weight", "floats"], |_, _, tensors| {
        tensors.iter_mut().find(|(meta, _)| meta.name == "norm_f.weight").unwrap().0.dtype = mupscale::DType::I32;
    });
    lies(&["model.head_dim", "0"], |config, _, _| config["dims"]["head_dim"] = json!(0));
    lies(&["model.kv_heads", "is over"], |config, _, _| {
        ["kv_heads", "group", "head_dim"].iter().for_each(|width| config["dims"][width] = json!(1 << 24));
    });
    lies(&["model.layers"], |config, _, _| config["layers"] = json!(u64::MAX));
    lies(&["tensor embedding.weight", "[256, 17]"], |config, _, _| config["dims"]["residual"] = json!(17));
    lies(&["scaling.base.residual", "0"], |config, _, _| config["scaling"]["base"]["residual"] = json!(0));
    lies(&["scaling.base.hidden_1"], |config, _, _| config["scaling"]["base"]["hidden_1"] = json!(3));
    lies(&["config.json"], |config, _, _| config["family"] = json!("rnn"));
    lies(&["state.json"], |_, state, _| state["step"] = json!(-1));
}

#[test]
fn data_are_refused_by_file() {
    let place = Place::new();
    let shard = place.read("data/train_000000.bin");
    let train = |path: &str, parts: &[&str]| {
        place.refuses(&format!("train -c run.toml --set run=q --set data.path={path}"), parts);
    };
    let both = |path: &str, parts: &[&str]| {
        train(path, parts);
        place.refuses(&format!("eval base {path}"), parts);
    };
    place.write("magic.bin", [&7i32.to_le_bytes(), &shard[4..]].concat());
    train("magic.bin", &["magic.bin", "7"]);
    place.write("short.bin", &shard[..shard.len() - 10]);
    both("short.bin", &["short.bin"]);
    place.write("long.bin", [&shard[..], &[0; 10]].concat());
    both("long.bin", &["long.bin"]);
    place.write("none.bin", "");
    both("none.bin", &["none.bin"]);
    let mut large = shard.clone();
    large[1024 + 2 * 77..][..2].copy_from_slice(&999u16.to_le_bytes());
    place.write("large.bin", &large);
    place.refuses("eval base large.bin", &["large.bin", "999", "256"]);
    train("large.bin --set init.from=base", &["large.bin", "999", "256"]);
    fs::write(place.join("data/train_000000.bin"), &large).unwrap();
    train("data", &["train_000000.bin", "999", "256"]);
    fs::write(place.join("data/train_000000.bin"), &shard).unwrap();
    place.write(
        "two.bin",
        [&20240520i32.to_le_bytes()[..], &1i32.to_le_bytes(), &2i32.to_le_bytes(), &[0; 1012], &[1, 0, 2, 0]].concat(),
    );
    both("two.bin", &["two.bin", "2 tokens are too few", "17", "smaller context"]);
    train("nowhere", &["nowhere", "cannot open"]);
    train("rows.csv", &["rows of numbers", "gpt2"].map(|_| "tokens"));
    place.write("data/dataset.json", "{}");
    train("data", &["dataset.json", "tokenize the text again"]);

    place.write("empty.txt", "");
    place.write("blank.txt", " \n \n");
    place.write("latin1.txt", b"caf\xe9 au lait");
    place.write("bad.jsonl", "{\"text\": \"one\"}\n{\"text\": 3}\n");
    place.write("other.jsonl", "{\"body\": \"one\"}\n");
    fs::create_dir(place.join("hollow")).unwrap();
    for (text, parts) in [
        ("empty.txt", &["empty.txt", "no text"][..]),
        ("blank.txt", &["blank.txt", "no text"]),
        ("latin1.txt", &["latin1.txt", "invalid UTF-8 at byte 3", "convert"]),
        ("bad.jsonl", &["bad.jsonl", "line 2", "text"]),
        ("other.jsonl", &["other.jsonl", "line 1", "no field `text`", "body"]),
        ("hollow", &["hollow"]),
        ("nowhere.txt", &["nowhere.txt", "cannot"]),
    ] {
        place.refuses(&format!("data tokenize {text} --out d"), parts);
        if !text.starts_with("blank") && !text.starts_with("empty") {
            place.refuses(&format!("data train-tokenizer {text} --out t.json"), parts);
            place.refuses(&format!("data inspect {text}"), parts);
        }
    }
    place.refuses("data train-tokenizer empty.txt --out t.json", &["no text"]);
    place.refuses("eval base empty.txt", &["too few"]);
    place.refuses("data train-tokenizer corpus.txt --out t.json --vocab 3", &["vocab = 3", "257"]);
    place.refuses(
        "data train-tokenizer corpus.txt --out t.json --vocab 99999999999",
        &["vocab = 99999999999", "at most"],
    );
    place.refuses("data tokenize corpus.txt --out d --val-fraction 2", &["val_fraction = 2", "0.5"]);
    place.refuses("data tokenize corpus.txt --out d --shard-tokens 0", &["shard_tokens = 0"]);
    place.refuses("data tokenize corpus.txt --out d --tokenizer rows.csv", &["rows.csv"]);
    place.refuses("data synth s.txt --bytes 0", &["--bytes = 0"]);

    // Rows.
    for (name, rows, parts) in [
        ("words.csv", "1,2,0\n1,x,1\n", &["words.csv", "line 2", "`x`"][..]),
        ("ragged.csv", "1,2,0\n1,1\n", &["ragged.csv", "line 2"]),
        ("nothing.csv", "", &["nothing.csv", "empty"]),
        ("infinite.csv", "1,2,0\n1,inf,1\n", &["infinite.csv", "inf"]),
        ("half.csv", "1,2,0\n1,1,0.5\n", &["half.csv", "0.5"]),
    ] {
        place.write(name, rows);
        place.refuses(&format!("train -c rows.toml --set run=q --set data.path={name}"), parts);
    }
    place.write("wide.csv", "1,2,3,0\n4,5,6,1\n");
    place.refuses("eval classes wide.csv", &["wide.csv", "3 inputs", "2 and 3"]);
}

#[test]
fn outputs_that_exist_are_kept() {
    let place = Place::new();
    for line in [
        "train -c run.toml --set run=base",
        "train -c run.toml --set run=data",
        "data tokenize corpus.txt --out data",
        "data tokenize corpus.txt --out base",
        "data synth corpus.txt",
        "data synth data",
        "data train-tokenizer corpus.txt --out rows.csv",
        "upscale base --out classes --width 2",
    ] {
        place.refuses(line, &["exists already", "choose another name", "--force"]);
    }
    // What no command of that kind made is kept even then.
    place.refuses("train -c run.toml --set run=data --force", &["data", "no run made", "--force"]);
    place.refuses("train -c run.toml --set run=. --force", &["no run made"]);
    place.refuses("data tokenize corpus.txt --out base --force", &["dataset.json", "--force"]);
    place.refuses("data tokenize corpus.txt --out . --force", &["choose another"]);
    place.refuses("train -c run.toml --set run=base --set init.from=base --force", &["init.from = base", "another"]);
    // An error after --force was read is found before anything is removed.
    place.refuses("train -c run.toml --set run=base --set model.residual=15 --force", &["model.residual = 15"]);
    place.refuses("data synth rows.csv/s.txt", &["rows.csv", "cannot create"]);
    // A run made anew leaves what others put into its folder.
    place.write("base/notes.txt", "mine");
    place.ok("train -c run.toml --set run=base --set steps=2 --force");
    assert_eq!(place.names("base/checkpoints"), ["step-00000002"]);
    assert_eq!(place.read("base/notes.txt"), b"mine");
    place.ok("data tokenize corpus.txt --out data --force");
}

#[test]
fn resume_never_changes_what_is_computed() {
    let place = Place::new();
    place.refuses("resume base", &["steps = 4", "complete"]);
    place.refuses("resume nowhere", &["nowhere", "no run folder", "train -c"]);
    place.refuses("resume data", &["data", "no run folder"]);
    for key in
        ["steps=9", "optimizer.lr=1", "batch.size=1", "schedule.kind=cosine", "seed=3", "model.layers=2", "init.from=x"]
    {
        place.refuses(&format!("resume base --set {key}"), &["--set", key, "resume never changes", "[init]"]);
    }
    fs::remove_dir_all(place.join("base/checkpoints/step-00000004")).unwrap();
    place.ok("data synth other.txt --bytes 20000 --seed 9");
    place.ok("data tokenize other.txt --out other");
    place.refuses("resume base --set data.path=other", &["other", "not the data", "[init]"]);
    place.refuses("resume base --set data.path=rows.csv", &["rows.csv"].map(|_| "rows"));
    place.refuses("resume base --device cuda", &["libcuda.so.1", "--device cpu"]);
    fs::rename(place.join("data"), place.join("moved")).unwrap();
    place.refuses("resume base", &["data", "cannot open"]);
    place.ok("resume base --set data.path=moved --threads 2");
    fs::remove_dir_all(place.join("base/checkpoints")).unwrap();
    place.refuses("resume base", &["base", "no complete checkpoint"]);
}

#[test]
fn options_of_eval_and_generate_are_checked() {
    let place = Place::new();
    place.refuses("eval base data --batch 0", &["--batch = 0"]);
    place.refuses("eval base data --batch 18446744073709551615", &["--batch = 18446744073709551615"]);
    place.refuses("eval base data --threads 99999999", &["threads = 99999999"]);
    place.refuses("eval base nowhere.txt", &["nowhere.txt"]);
    place.refuses("eval base data --device cuda", &["libcuda.so.1", "--device cpu"]);
    place.refuses("generate base --temperature=-1", &["--temperature = -1"]);
    place.refuses("generate base --temperature nan", &["--temperature = NaN"]);
    place.refuses("generate base --top-p 2", &["--top-p = 2"]);
    place.refuses("generate base --tokenizer nowhere.json", &["nowhere.json"]);
    place.refuses("generate classes", &["classes", "classifier"].map(|_| "classes"));
    place.ok("data train-tokenizer corpus.txt --vocab 320 --out tok.json");
    let text = String::from_utf8(place.read("corpus.txt")).unwrap();
    let word = text.split_whitespace().next().unwrap();
    place.refuses(
        &format!("generate base --tokenizer tok.json --prompt {}", word.repeat(3)),
        &["--tokenizer = tok.json", "256"],
    );
    place.refuses("eval base corpus.txt --tokenizer tok.json", &["corpus.txt", "vocabulary of 256"]);
    place.refuses("inspect nowhere", &["nowhere", "no such checkpoint"]);
    place.refuses("inspect data", &["data", "no checkpoint"]);
}

#[test]
fn a_loss_that_is_not_finite_stops_or_is_skipped() {
    let place = Place::new();
    let line = "train -c run.toml --set run=nan --set steps=6 --set optimizer={kind='sgd',lr=1e30}";
    let said = place.run(line);
    assert_eq!(said.code, 4, "{}", said.err);
    for part in [
        "step 2",
        "gradient of ",
        "not finite",
        "after step 1",
        "step-00000001",
        "lower the learning rate",
        "--on-nan skip",
    ] {
        assert!(said.err.contains(part), "no `{part}` in {}", said.err);
    }
    // The weights are those before the step: of one step at this rate.
    place.ok("train -c run.toml --set run=one --set steps=1 --set optimizer={kind='sgd',lr=1e30}");
    let weights = |run: &str| place.read(&format!("{run}/checkpoints/step-00000001/model.safetensors"));
    assert_eq!(weights("nan"), weights("one"));
    place.ok("inspect nan/checkpoints/step-00000001");
    place.ok("upscale nan --out w --width 2");
    // To go on with the same rate meets the same step again; to skip goes past it.
    assert_eq!(place.run("resume nan").code, 4);
    let said = place.ok("resume nan --on-nan skip");
    assert!(said.err.contains("update is left out"), "{}", said.err);
    assert_eq!(place.names("nan/checkpoints").last().unwrap(), "step-00000006");
    let last = "nan/checkpoints/step-00000006/model.safetensors";
    assert_eq!(place.read(last), weights("one"), "no skipped step changed the weights");
}

/// Runs itself again with a small disk of its own, where the system allows that.
#[test]
fn a_full_disk_is_named_and_costs_no_checkpoint() {
    const DISK: &str = "MUPSCALE_TEST_SMALL_DISK_CLI";
    if let Some(disk) = env::var_os(DISK) {
        return fill(Path::new(&disk));
    }
    let folder = tempfile::tempdir().unwrap();
    let mount = r#"mount -t tmpfs -o size=1m none "$0""#;
    let shell = |script: &str| {
        let mut command = Command::new("unshare");
        command.args(["-rm", "sh", "-c", script]).arg(folder.path()).arg(env::current_exe().unwrap());
        command.args(["--exact", "a_full_disk_is_named_and_costs_no_checkpoint"]);
        command.env(DISK, folder.path()).output()
    };
    if !shell(mount).is_ok_and(|output| output.status.success()) {
        eprintln!("skipped: a small disk cannot be mounted here (unshare -rm, mount -t tmpfs)");
        return;
    }
    let output = shell(&format!(r#"{mount} && exec "$@""#)).unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("1 passed"), "{said}{}", String::from_utf8_lossy(&output.stderr));
}

fn fill(disk: &Path) {
    let place = Place::new();
    let run = disk.join("run");
    let line = |run: &str| {
        format!(
            "train -c run.toml --set run={run} --set steps=40 --set checkpoint.every=5 --set checkpoint.keep_last=0"
        )
    };
    place.ok(&line("whole"));
    // Eight checkpoints of 100 kB and more do not fit with the ballast.
    fs::write(disk.join("ballast"), vec![1; 500_000]).unwrap();
    let said = place.run(&line(run.to_str().unwrap()));
    assert_eq!(said.code, 2, "{}", said.err);
    assert!(said.err.contains("disk is full") && said.err.contains("make room"), "{}", said.err);
    let kept = fs::read_dir(run.join("checkpoints")).unwrap().count();
    assert!((1..8).contains(&kept), "{kept} checkpoints");
    // Nothing else fits either, and says so without leaving a part behind.
    let wide = disk.join("wide");
    let said = place.run(&format!("upscale base --out {} --width 8", wide.display()));
    assert_eq!(said.code, 2, "{}", said.err);
    assert!(said.err.contains("disk is full") && !wide.exists(), "{}", said.err);
    fs::copy(place.join("corpus.txt"), disk.join("kept.txt")).unwrap();
    let before = fs::read(disk.join("kept.txt")).unwrap();
    let said = place.run(&format!("data synth {} --bytes 3000000 --force", disk.join("kept.txt").display()));
    assert_eq!(said.code, 2, "{}", said.err);
    assert!(said.err.contains("disk is full"), "{}", said.err);
    assert!(fs::read(disk.join("kept.txt")).unwrap() == before, "a text was replaced by a part of another");
    let said = place.run(&format!("data tokenize corpus.txt --out {}", disk.join("d").display()));
    assert!(said.code == 0 || said.err.contains("disk is full"), "{}", said.err);
    // With room, the run goes on to the same end.
    fs::remove_file(disk.join("ballast")).unwrap();
    for name in ["kept.txt", "d/train_000000.bin"] {
        let _ = fs::remove_file(disk.join(name));
    }
    let said = place.run(&format!("resume {} --set checkpoint.keep_last=2", run.display()));
    assert_eq!(said.code, 0, "{}", said.err);
    assert!(essence(&run, 40) == essence(&place.join("whole"), 40));
}
