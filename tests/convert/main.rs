//! mupscale-convert, held to models and logits that `transformers` made (`tools/hf_check.py make tests/convert/golden`).

#[path = "../command/mod.rs"]
mod command;
mod hostile;
#[path = "llmc.rs"]
mod llmc_files;

// The tool's own modules, to compare what they compute with golden logits.
#[allow(dead_code, reason = "the rest runs through the program")]
#[path = "../../tools/convert/config.rs"]
mod config;
#[allow(dead_code, reason = "the rest runs through the program")]
#[path = "../../tools/convert/export.rs"]
mod export;
#[allow(dead_code, reason = "the rest runs through the program")]
#[path = "../../tools/convert/families.rs"]
mod families;
#[allow(dead_code, reason = "the rest runs through the program")]
#[path = "../../tools/convert/import.rs"]
mod import;
#[allow(dead_code, reason = "the rest runs through the program")]
#[path = "../../tools/convert/layout.rs"]
mod layout;
#[allow(dead_code, reason = "the rest runs through the program")]
#[path = "../../tools/convert/llmc.rs"]
mod llmc;
#[allow(dead_code, reason = "the rest runs through the program")]
#[path = "../../tools/convert/plain.rs"]
mod plain;
#[allow(dead_code, reason = "the rest runs through the program")]
#[path = "../../tools/convert/tensors.rs"]
mod tensors;
#[allow(dead_code, reason = "the rest runs through the program")]
#[path = "../../tools/convert/verify.rs"]
mod verify;

use command::{Place, copy};
use mupscale::upscale::Origin;
use plain::Plain;
use safetensors::SafeTensors;
use serde_json::Value;
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};
use tensors::TensorFiles;

/// Allowed difference from transformers' logits, of the largest: its RMSNorm and RoPE go through f32.
const TOLERANCE: f64 = 1e-5;

/// The models and how each is widened.
const MODELS: [(&str, &str); 11] = [
    ("gpt2", "--residual 4 --ffn 3 --kv-heads 2 --head-dim 2"),
    ("gpt2-grouped", "--residual 8 --ffn 2 --kv-heads 2 --group 2 --head-dim 2"),
    ("llama", "--residual 2 --ffn 3 --kv-heads 2 --group 2 --head-dim 2"),
    ("llama3", "--residual 2 --ffn 3 --kv-heads 2 --head-dim 2"),
    ("llama-biased", "--residual 3 --ffn 3 --kv-heads 2 --head-dim 3"),
    ("mistral", "--residual 2 --head-dim 2"),
    ("qwen2", "--residual 2 --ffn 3 --kv-heads 2 --head-dim 2"),
    ("qwen3", "--residual 5 --ffn 3 --kv-heads 2 --head-dim 2"),
    ("qwen3-half", "--residual 2 --ffn 3 --kv-heads 2"),
    ("granite", "--residual 2 --ffn 3 --kv-heads 2 --head-dim 2"),
    ("granite-tied", "--residual 2 --ffn 3 --kv-heads 2 --head-dim 2"),
];

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/convert/golden").join(name)
}

/// Tokens and transformers' logits.
fn expected(name: &str) -> (Vec<i32>, Vec<f64>) {
    let bytes = fs::read(golden(name).join("golden.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let data = |key| tensors.tensor(key).unwrap().data().to_vec();
    (bytemuck::pod_collect_to_vec(&data("tokens")), bytemuck::pod_collect_to_vec(&data("logits")))
}

/// Largest difference, of the largest expected.
fn difference(found: &[f64], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let scale = expected.iter().fold(0.0f64, |m, e| m.max(e.abs()));
    found.iter().zip(expected).map(|(f, e)| (f - e).abs()).fold(0.0, f64::max) / scale
}

/// All tensors of a Hugging Face folder: type, shape, bytes.
fn weights(folder: &Path) -> BTreeMap<String, (String, Vec<usize>, Vec<u8>)> {
    let files = TensorFiles::open(folder).unwrap();
    let of = |name: &str| {
        let (dtype, shape) = files.meta(name).unwrap();
        (dtype.to_string(), shape.to_vec(), files.read_all(name).unwrap())
    };
    files.names().into_iter().map(|name| (name.to_string(), of(name))).collect()
}

/// A place where the model `name` lies as `model`, and its checkpoint as `narrow`.
fn converted(name: &str) -> Place {
    let place = Place::empty();
    copy(&golden(name), &place.join("model"));
    fs::remove_file(place.join("model/golden.safetensors")).unwrap();
    place.ok("convert from-hf model narrow");
    place
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

#[test]
fn every_golden_model_is_tested() {
    let mut names =
        fs::read_dir(golden("")).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect::<Vec<_>>();
    names.sort();
    let mut tested = MODELS.map(|(name, _)| name.to_string()).to_vec();
    tested.sort();
    assert_eq!(names, tested);
}

#[test]
fn the_plain_forward_is_that_of_transformers() {
    for (name, _) in MODELS {
        let (tokens, expected) = expected(name);
        let error = difference(&Plain::open(&golden(name)).unwrap().logits(&tokens).unwrap().concat(), &expected);
        assert!(error <= TOLERANCE, "{name}: {error:e}");
    }
}

#[test]
fn a_converted_model_computes_what_transformers_does() {
    for (name, _) in MODELS {
        let (tokens, expected) = expected(name);
        let origin = Origin::open(&converted(name).join("narrow")).unwrap();
        let error = difference(&verify::logits(&origin, &tokens).unwrap(), &expected);
        assert!(error <= TOLERANCE, "{name}: {error:e}");
    }
}

#[test]
fn there_and_back_is_the_same_bit_for_bit() {
    for (name, _) in MODELS {
        let place = converted(name);
        let style = if name.starts_with("granite") { "granite" } else { "fold" };
        place.ok(&format!("convert to-hf narrow back --style {style}"));
        assert!(weights(&place.join("model")) == weights(&place.join("back")), "{name}: weights differ");
        place.ok("convert from-hf back again");
        for file in ["model.safetensors", "config.json"] {
            assert!(
                place.read(&format!("narrow/{file}")) == place.read(&format!("again/{file}")),
                "{name}: {file} differs"
            );
        }
        assert_eq!(place.read("model/generation_config.json"), place.read("back/generation_config.json"));
        let (before, after) = (json(&place.join("model/config.json")), json(&place.join("back/config.json")));
        for key in ["bos_token_id", "eos_token_id", "tie_word_embeddings", "vocab_size", "initializer_range"] {
            assert_eq!(before[key], after[key], "{name}: {key}");
        }
        let card = String::from_utf8(place.read("back/README.md")).unwrap();
        assert!(card.contains("parameters"), "{card}");
    }
}

/// The function of the narrow model in transformers is that of the widened one after every way out.
#[test]
fn a_widened_model_leaves_with_the_same_logits() {
    for (name, widening) in MODELS {
        let (tokens, expected) = expected(name);
        let place = converted(name);
        place.ok(&format!("upscale narrow --out wide {widening}"));
        let granite = !name.starts_with("gpt2") && !name.starts_with("qwen3");
        for style in ["fold", "granite"].into_iter().take(1 + usize::from(granite)) {
            place.ok(&format!("convert to-hf wide {style} --style {style} --dtype f32 --verify"));
            let found = Plain::open(&place.join(style)).unwrap().logits(&tokens).unwrap().concat();
            let error = difference(&found, &expected);
            assert!(error <= TOLERANCE, "{name}, {style}: {error:e}");
        }
    }
}

/// Every choice of a decoder's parts, multipliers among them, as trained here.
#[test]
fn what_was_trained_here_leaves_with_the_same_logits() {
    let place = Place::new();
    let multipliers = "--set model.multipliers.embedding=1.5 --set model.multipliers.residual=0.7 \
                       --set model.multipliers.attention=1.25 --set model.multipliers.logits=0.8";
    let llama = "--set model.arch=llama --set model.group=2";
    let cases = [
        ("bare", "--set model.bias=false --set model.group=2 --set model.head_dim=4"),
        ("untied", "--set model.tied=false --set model.activation=gelu-exact"),
        ("llama", llama),
        ("tied", &format!("{llama} --set model.tied=true --set model.qkv_bias=true")),
        ("qwen3", &format!("{llama} --set model.qk_norm=true --set model.qkv_bias=true --set model.tied=true")),
        ("standard", &format!("{llama} --set parametrization.kind=standard")),
        ("grown", &format!("{llama} --set parametrization.base.residual=4 --set parametrization.base.head_dim=2")),
    ];
    for (name, sets) in cases {
        place.ok(&format!("train -c run.toml --set run={name} --set model.init_std=0.4 {sets} {multipliers}"));
        place.ok(&format!("convert to-hf {name} {name}-hf --verify"));
        let granite = format!("convert to-hf {name} {name}-granite --style granite");
        if ["llama", "tied", "standard", "grown"].contains(&name) {
            place.ok(&format!("{granite} --verify"));
        } else {
            place.refuses(&granite, &["--style = granite", "--style fold"]);
        }
    }
}

#[test]
fn shards_hold_what_one_file_does() {
    let place = converted("llama");
    place.ok("convert to-hf narrow one");
    place.ok("convert to-hf narrow many --shard-size 0.001 --dtype bf16");
    let index = json(&place.join("many/model.safetensors.index.json"));
    let files = place.names("many").iter().filter(|n| n.ends_with(".safetensors")).count();
    assert!(files > 2, "{files} files");
    let (one, many) = (weights(&place.join("one")), weights(&place.join("many")));
    assert_eq!(index["weight_map"].as_object().unwrap().len(), one.len());
    assert_eq!(index["metadata"]["total_size"], many.values().map(|(_, _, bytes)| bytes.len()).sum::<usize>());
    place.ok("convert from-hf many narrow-many");
    place.ok("convert to-hf narrow-many again");
    assert!(weights(&place.join("again")) == many);
    for (name, (dtype, _, bytes)) in &many {
        let full = layout::floats(&one[name].2, mupscale::DType::F32);
        let short = layout::floats(bytes, mupscale::DType::BF16);
        assert_eq!(dtype, "bf16");
        assert!(full.iter().zip(&short).all(|(f, s)| (f - s).abs() <= f.abs() / 256.0), "{name} is not rounded");
    }
}

/// A checkpoint that came from elsewhere is one like any other: it trains on, and leaves.
#[test]
fn a_converted_model_trains_on() {
    let place = Place::new();
    place.ok("convert to-hf base hf");
    place.ok("convert from-hf hf in");
    let config = String::from_utf8(place.read("run.toml")).unwrap();
    place.write("on.toml", config.split("[model]").next().unwrap());
    place.ok("train -c on.toml --set run=on --set init.from=in");
    place.ok("convert to-hf on out --verify --files hf");
    assert!(place.join("out/config.json").is_file());
}

#[test]
fn tokens_leave_for_nanogpt() {
    let place = Place::new();
    place.ok("convert to-nanogpt data out");
    let file = |name: &str| String::from_utf8(place.read(name)).unwrap();
    let info: Value = serde_json::from_str(&file("data/dataset.json")).unwrap();
    for part in ["train", "val"] {
        let shards = info[part]["shards"].as_array().unwrap();
        let tokens: Vec<u8> = shards
            .iter()
            .flat_map(|s| place.read(&format!("data/{}", s["name"].as_str().unwrap())).split_off(1024))
            .collect();
        assert!(!tokens.is_empty() && place.read(&format!("out/{part}.bin")) == tokens, "{part}");
    }
    // As nanoGPT's own files are read.
    let said = place.ok("data inspect out/train.bin --dtype uint16 --json").json();
    assert_eq!(said["tokens"], info["train"]["tokens"]);
    let mut long = [0i32; 256];
    long[..3].copy_from_slice(&[20240801, 7, 1]);
    place.write("long.bin", [bytemuck::cast_slice(&long), &70000u32.to_le_bytes()[..]].concat());
    place.refuses("convert to-nanogpt long.bin short", &["long.bin", "token 70000", "uint16"]);
    place.refuses("convert to-nanogpt classes short", &["classes", "dataset.json"]);
}

/// As the hub's own gpt2 is: names without prefix, constants beside the weights; and a readout stored though it is tied.
#[test]
fn names_and_copies_as_the_hub_has_them() {
    let place = converted("gpt2");
    let mut tensors = weights(&place.join("model"));
    let embedding = tensors["transformer.wte.weight"].clone();
    tensors.insert("lm_head.weight".into(), embedding.clone());
    tensors.insert("transformer.h.0.attn.bias".into(), ("f32".into(), vec![1, 1, 2, 2], vec![0; 16]));
    let write = |tensors: &BTreeMap<String, (String, Vec<usize>, Vec<u8>)>| {
        let views = tensors.iter().map(|(name, (_, shape, bytes))| {
            let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes).unwrap();
            (name.trim_start_matches("transformer.").to_string(), view)
        });
        place.write("model/model.safetensors", safetensors::serialize(views, None).unwrap());
    };
    write(&tensors);
    place.ok("convert from-hf model in --verify");
    assert!(place.read("in/model.safetensors") == place.read("narrow/model.safetensors"));
    tensors.get_mut("lm_head.weight").unwrap().2[0] ^= 1;
    write(&tensors);
    place.refuses("convert from-hf model other", &["lm_head.weight", "differs from wte.weight"]);
}

#[test]
fn a_tokenizer_goes_in_and_out() {
    let place = Place::new();
    place.ok("data train-tokenizer corpus.txt --out tokenizer.json --vocab 300");
    place.ok("data tokenize corpus.txt --tokenizer tokenizer.json --out bpe");
    place.ok("train -c run.toml --set run=words --set data.path=bpe");
    place.ok("convert to-hf words out");
    assert_eq!(place.read("out/tokenizer.json"), place.read("bpe/tokenizer.json"));
    let described = json(&place.join("out/tokenizer_config.json"));
    assert_eq!(described["tokenizer_class"], "PreTrainedTokenizerFast");
    // Programs that generate or score ask for the token that ends a document.
    assert_eq!(described["eos_token"], "<|endoftext|>");
    assert_eq!(json(&place.join("out/config.json"))["eos_token_id"], 0);
    place.ok("convert from-hf out in");
    let before = place.ok("generate words --prompt The --tokens 5 --temperature 0 --json").json();
    assert_eq!(place.ok("generate in --prompt The --tokens 5 --temperature 0 --json").json(), before);
}
