//! Models that cannot be converted: each refused by name with exit code 2, and nothing left under the final name.

use super::{converted, golden};
use crate::command::{Place, copy};
use serde_json::{Value, json};
use std::fs;

/// A place with the model `name` as `model`, some keys of its configuration set (null: removed).
fn model(name: &str, changes: Value) -> Place {
    let place = Place::empty();
    copy(&golden(name), &place.join("model"));
    fs::remove_file(place.join("model/golden.safetensors")).unwrap();
    let path = place.join("model/config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    for (key, value) in changes.as_object().unwrap() {
        match value {
            Value::Null => drop(config.as_object_mut().unwrap().remove(key)),
            _ => config[key] = value.clone(),
        }
    }
    fs::write(path, config.to_string()).unwrap();
    place
}

fn refused(name: &str, changes: Value, parts: &[&str]) {
    model(name, changes).refuses("convert from-hf model out", parts);
}

#[test]
fn configurations_are_refused_by_key() {
    let config = |changes, parts: &[&str]| refused("llama", changes, &[&["config.json"], parts].concat());
    config(json!({ "model_type": "mamba" }), &["model_type = mamba", "unknown", "gpt2, llama, mistral"]);
    let experts = json!({ "model_type": "mixtral", "num_local_experts": 8 });
    config(experts, &["model_type = mixtral", "mixture of experts"]);
    config(json!({ "model_type": null }), &["model_type = (absent)"]);
    config(
        json!({ "architectures": ["LlamaForSequenceClassification"] }),
        &["LlamaForSequenceClassification", "readout"],
    );
    config(json!({ "quantization_config": { "bits": 4 } }), &["quantization_config", "use the original"]);
    config(json!({ "hidden_act": "gelu" }), &["hidden_act = gelu", "SwiGLU"]);
    config(json!({ "hidden_size": null }), &["hidden_size = (absent)", "needed"]);
    config(json!({ "hidden_size": -8 }), &["hidden_size = -8", "positive"]);
    config(json!({ "num_hidden_layers": 1_000_000_000u64 }), &["model.layers = 1000000000"]);
    config(json!({ "num_key_value_heads": 3 }), &["num_attention_heads = 2", "3 key/value heads"]);
    config(json!({ "rms_norm_eps": "small" }), &["rms_norm_eps", "must be a number"]);
    config(json!({ "rms_norm_eps": 0 }), &["model.norm_eps = 0"]);
    config(json!({ "rope_parameters": { "rope_type": "yarn", "factor": 4.0 } }), &["rope_type = yarn", "llama3"]);
    config(json!({ "rope_parameters": { "rope_type": "llama3" } }), &["rope_parameters.factor = (absent)"]);
    let partial = json!({ "rope_parameters": { "rope_theta": 1e4, "partial_rotary_factor": 0.5 } });
    config(partial, &["partial_rotary_factor = 0.5"]);
    let phi = json!({ "rope_type": "longrope", "short_factor": [1.0, 1.1], "long_factor": [2.0, 4.0] });
    config(json!({ "rope_parameters": phi }), &["rope_type = longrope"]);
    config(json!({ "rope_theta": -1, "rope_parameters": null }), &["model.rope_base = -1"]);
    let gpt2 = |changes, parts: &[&str]| refused("gpt2", changes, &[&["config.json"], parts].concat());
    gpt2(json!({ "activation_function": "swish" }), &["activation_function = swish"]);
    gpt2(json!({ "scale_attn_by_inverse_layer_idx": true }), &["scale_attn_by_inverse_layer_idx = true"]);
    gpt2(json!({ "n_head": 3 }), &["n_embd = 8", "3 heads"]);
}

#[test]
fn a_sliding_window_is_refused_unless_the_context_lies_within() {
    let window = json!({ "sliding_window": 16 });
    let place = model("mistral", window);
    place.refuses("convert from-hf model out", &["sliding_window = 16", "mistral", "--context 16"]);
    place.refuses("convert from-hf model out --context 99", &["--context = 99", "32"]);
    place.ok("convert from-hf model out --context 16 --verify");
    // transformers' own default where the key is absent.
    let long = json!({ "sliding_window": null, "max_position_embeddings": 5000 });
    refused("mistral", long, &["sliding_window = 4096"]);
    let qwen = json!({ "use_sliding_window": true, "sliding_window": 8 });
    refused("qwen2", qwen.clone(), &["sliding_window = 8", "qwen2"]);
    refused("qwen3", qwen, &["sliding_window = 8", "qwen3"]);
    model("gpt2", json!({})).refuses("convert from-hf model out --context 8", &["--context = 8", "it has 32"]);
}

#[test]
fn tensors_that_contradict_the_configuration_are_refused_by_name() {
    refused("llama", json!({ "intermediate_size": 13 }), &["mlp.gate_proj.weight", "[12, 8]", "[13, 8]"]);
    refused("llama", json!({ "vocab_size": 20 }), &["model.embed_tokens.weight", "[19, 8]", "[20, 8]"]);
    let missing = ["model.layers.2.input_layernorm.weight", "missing", "the nearest name is model.layers.0"];
    refused("llama", json!({ "num_hidden_layers": 3 }), &missing);
    refused("llama", json!({ "num_hidden_layers": 1 }), &["model.layers.1.", "one more"]);
    refused("llama", json!({ "tie_word_embeddings": true }), &["lm_head.weight", "differs", "tie_word_embeddings"]);
    refused("llama3", json!({ "tie_word_embeddings": false }), &["lm_head.weight", "missing"]);
    refused("llama-biased", json!({ "attention_bias": false }), &["self_attn.", "bias", "one more"]);
    refused("qwen3", json!({ "model_type": "llama" }), &["k_norm.weight", "one more"]);
    refused("gpt2", json!({ "n_positions": 16, "n_ctx": 16 }), &["wpe.weight", "[32, 8]", "[16, 8]"]);
}

#[test]
fn files_that_are_cut_off_or_lie_are_refused() {
    let place = model("llama3", json!({}));
    let second = "model/model-00002-of-00002.safetensors";
    let whole = place.read(second);
    let refuse = |parts: &[&str]| place.refuses("convert from-hf model out", parts);
    for length in [whole.len() - 1, whole.len() / 2, 40, 8, 3, 0] {
        place.write(second, &whole[..length]);
        refuse(&["model-00002-of-00002.safetensors", "cut off or damaged"]);
    }
    place.write(second, [&[0xff; 8][..], &whole[8..]].concat());
    refuse(&["its header says 18446744073709551615 bytes"]);
    place.write(second, [&whole[..8], b"[", &whole[9..]].concat());
    refuse(&["its header cannot be read"]);
    fs::remove_file(place.join(second)).unwrap();
    refuse(&["model-00002-of-00002.safetensors", "cannot read"]);
    place.write(second, &whole);

    let index = "model/model.safetensors.index.json";
    let good: Value = serde_json::from_slice(&place.read(index)).unwrap();
    let mut outside = good.clone();
    outside["weight_map"]["model.norm.weight"] = json!("../elsewhere.safetensors");
    place.write(index, outside.to_string());
    refuse(&["../elsewhere.safetensors", "outside its folder"]);
    let mut more = good.clone();
    more["weight_map"]["model.more.weight"] = json!("model-00001-of-00002.safetensors");
    place.write(index, more.to_string());
    refuse(&["model.more.weight", "no such tensor"]);
    let mut fewer = good;
    fewer["weight_map"].as_object_mut().unwrap().remove("model.norm.weight");
    place.write(index, fewer.to_string());
    refuse(&["model.norm.weight", "does not place it"]);
    place.write(index, "{");
    refuse(&["index.json", "not an index"]);
    fs::remove_file(place.join(index)).unwrap();
    refuse(&["neither model.safetensors nor"]);
}

#[test]
fn folders_and_other_files_are_refused() {
    let place = model("llama", json!({}));
    place.refuses("convert from-hf nowhere out", &["nowhere", "no such folder"]);
    place.write("model/config.json", "[1]");
    place.refuses("convert from-hf model out", &["config.json", "no JSON object"]);
    place.write("model/config.json", "{");
    place.refuses("convert from-hf model out", &["config.json", "not JSON"]);
    fs::remove_file(place.join("model/config.json")).unwrap();
    place.refuses("convert from-hf model out", &["config.json", "cannot read"]);

    // Other types, by name.
    let place = model("llama", json!({}));
    let bytes = place.read("model/model.safetensors");
    let at = bytes.windows(5).position(|w| w == b"\"F32\"").unwrap();
    place.write("model/model.safetensors", [&bytes[..at], b"\"I32\"", &bytes[at + 5..]].concat());
    place.refuses("convert from-hf model out", &["of type i32", "F64, F32, BF16 or F16"]);

    // A tokenizer of another model: 19 tokens fit, 257 do not.
    let place = Place::new();
    place.ok("data train-tokenizer corpus.txt --out model/tokenizer.json --vocab 257");
    copy(&golden("llama"), &place.join("model"));
    fs::remove_file(place.join("model/golden.safetensors")).unwrap();
    place.refuses("convert from-hf model out", &["tokenizer.json", "257 tokens", "vocabulary of 19"]);
    place.write("model/tokenizer.json", "{}");
    place.refuses("convert from-hf model out", &["tokenizer.json"]);
    place.refuses("convert to-hf classes out", &["mlp", "only decoders"]);
}

#[test]
fn outputs_are_not_replaced_unasked() {
    let place = converted("llama");
    place.refuses("convert from-hf model narrow", &["narrow exists already", "--force"]);
    place.ok("convert from-hf model narrow --force");
    place.ok("convert to-hf narrow hf");
    place.refuses("convert to-hf narrow hf", &["hf exists already", "--force"]);
    place.ok("convert to-hf narrow hf --force --style granite");
    // A checkpoint has a config.json too.
    place.refuses("convert to-hf narrow narrow --force", &["narrow", "is a checkpoint"]);
    fs::create_dir(place.join("mine")).unwrap();
    place.refuses("convert to-hf narrow mine --force", &["mine", "config.json"]);
    place.refuses("convert from-hf model mine/../hf --force", &["hf", "no checkpoint"]);
    place.refuses("convert to-hf narrow out --shard-size 0", &["--shard-size = 0"]);
    place.refuses("convert to-hf narrow out --files nowhere", &["nowhere"]);
    place.refuses("convert to-hf nowhere out", &["nowhere"]);
}

#[test]
fn models_that_no_stock_model_computes_are_refused() {
    let place = converted("gpt2");
    place.ok("upscale narrow --out wide --residual 2");
    place.refuses("convert to-hf wide out", &["model.residual = 16", "heads × head_dim", "2 × 4 = 8"]);
    place.refuses("convert to-hf narrow out --style granite", &["--style = granite", "GPT-2"]);
    // 70000 is over f16's largest.
    let place = converted("granite");
    place.ok("upscale narrow --out wide --residual 2");
    place.ok("convert to-hf wide out --dtype f16");
    let place = model("granite", json!({ "logits_scaling": 1e-6 }));
    place.ok("convert from-hf model narrow");
    place.refuses("convert to-hf narrow out --dtype f16", &["model.norm.weight", "too large for f16"]);
}

/// Checksums are compared as tensors are read; what was written until then does not appear.
#[test]
fn a_damaged_checkpoint_does_not_leave() {
    let place = converted("gpt2");
    let whole = place.read("narrow/model.safetensors");
    for at in [whole.len() / 2, whole.len() - 1] {
        let mut damaged = whole.clone();
        damaged[at] ^= 1;
        place.write("narrow/model.safetensors", damaged);
        for line in ["convert to-hf narrow out", "convert to-llmc narrow out.bin"] {
            place.refuses(line, &["model.safetensors", "checksum is wrong"]);
        }
    }
    // Moments do not leave, and are not read.
    let place = Place::new();
    let moments = "base/checkpoints/step-00000004/optimizer.safetensors";
    let mut bytes = place.read(moments);
    *bytes.last_mut().unwrap() ^= 1;
    place.write(moments, bytes);
    place.ok("convert to-hf base out");
    place.refuses("upscale base --width 2 --out wide", &["optimizer.safetensors", "checksum is wrong"]);
}
