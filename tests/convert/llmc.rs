//! llm.c's checkpoints, against their description in its `train_gpt2.py` (`write_model`).

use super::{TOLERANCE, converted, difference, expected, golden, plain::Plain, weights};
use half::bf16;
use std::fs;

const SIZES: [i32; 8] = [20240326, 3, 32, 19, 2, 2, 8, 128];

/// A checkpoint as llm.c's script writes it, from the tensors of a Hugging Face GPT-2 in f32: tensors of one kind for all
/// layers after each other, matrices `[outputs, inputs]`, the vocabulary padded with zeros.
fn written(bf16s: bool) -> Vec<u8> {
    let tensors = weights(&golden("gpt2"));
    let floats = |name: &str| -> Vec<f32> { bytemuck::pod_collect_to_vec(&tensors[&format!("transformer.{name}")].2) };
    let matrix = |name: &str| {
        let shape = &tensors[&format!("transformer.{name}")].1;
        let (values, mut out) = (floats(name), Vec::new());
        (0..shape[1]).for_each(|o| out.extend((0..shape[0]).map(|i| values[i * shape[1] + o])));
        out
    };
    let mut all = floats("wte.weight");
    all.resize(128 * 8, 0.0);
    all.extend(floats("wpe.weight"));
    let kinds = [
        "ln_1.weight",
        "ln_1.bias",
        "attn.c_attn.weight",
        "attn.c_attn.bias",
        "attn.c_proj.weight",
        "attn.c_proj.bias",
        "ln_2.weight",
        "ln_2.bias",
        "mlp.c_fc.weight",
        "mlp.c_fc.bias",
        "mlp.c_proj.weight",
        "mlp.c_proj.bias",
    ];
    for kind in kinds {
        for layer in 0..2 {
            let name = format!("h.{layer}.{kind}");
            all.extend(if kind.contains(".c_") && kind.ends_with("weight") { matrix(&name) } else { floats(&name) });
        }
    }
    all.extend(floats("ln_f.weight"));
    all.extend(floats("ln_f.bias"));
    let mut header = [0i32; 256];
    header[..8].copy_from_slice(&SIZES);
    header[1] = if bf16s { 5 } else { 3 };
    let mut bytes = bytemuck::cast_slice(&header).to_vec();
    match bf16s {
        true => bytes.extend(all.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes())),
        false => bytes.extend(all.iter().flat_map(|x| x.to_le_bytes())),
    }
    bytes
}

#[test]
fn out_as_llmc_writes_it() {
    let place = converted("gpt2");
    place.ok("convert to-llmc narrow gpt2.bin --verify");
    assert!(place.read("gpt2.bin") == written(false));
    place.ok("convert to-llmc narrow gpt2_bf16.bin --dtype bf16");
    assert!(place.read("gpt2_bf16.bin") == written(true));
}

#[test]
fn in_and_out_again_is_the_same_bit_for_bit() {
    let place = converted("gpt2");
    for (name, bf16s) in [("gpt2.bin", false), ("gpt2_bf16.bin", true)] {
        place.write(name, written(bf16s));
        place.ok(&format!("convert from-llmc {name} in-{name} --verify"));
        place.ok(&format!("convert to-llmc in-{name} again-{name}"));
        assert!(place.read(&format!("again-{name}")) == written(bf16s));
    }
    assert!(place.read("in-gpt2.bin/model.safetensors") == place.read("narrow/model.safetensors"));
}

/// The forward pass that `--verify` uses reads llm.c's file as what it is.
#[test]
fn the_plain_forward_of_a_file_is_that_of_transformers() {
    let place = converted("gpt2");
    place.write("gpt2.bin", written(false));
    let (tokens, expected) = expected("gpt2");
    let logits = |name: &str| Plain::of_llmc(&place.join(name)).unwrap().logits(&tokens).unwrap().concat();
    assert!(difference(&logits("gpt2.bin"), &expected) <= TOLERANCE);
    // Another model is seen to be one.
    let mut other = written(false);
    let at = other.len() - 3;
    other[at] ^= 0x40;
    place.write("other.bin", other);
    assert!(difference(&logits("other.bin"), &expected) > TOLERANCE);
}

#[test]
fn a_widened_model_leaves_by_llmc_as_by_hugging_face() {
    let place = converted("gpt2");
    place.ok("upscale narrow --out wide --residual 4 --ffn 4 --kv-heads 2 --head-dim 2");
    place.ok("convert to-llmc wide wide.bin --verify");
    place.ok("convert from-llmc wide.bin in");
    place.ok("convert to-hf in by-llmc");
    place.ok("convert to-hf wide by-hf");
    assert!(weights(&place.join("by-llmc")) == weights(&place.join("by-hf")));
}

#[test]
fn what_is_no_checkpoint_of_llmc_is_refused() {
    let place = converted("gpt2");
    let good = written(false);
    let refuse = |bytes: &[u8], parts: &[&str]| {
        place.write("bad.bin", bytes);
        place.refuses("convert from-llmc bad.bin out", &[&["bad.bin"], parts].concat());
    };
    let with = |field: usize, value: i32| {
        let mut bytes = good.clone();
        bytes[field * 4..field * 4 + 4].copy_from_slice(&value.to_le_bytes());
        bytes
    };
    refuse(&good[..1000], &["1000 bytes, too few"]);
    refuse(&good[..good.len() - 4], &["cut off"]);
    refuse(&with(0, 20240520), &["20240520 instead of 20240326"]);
    refuse(&with(1, 1), &["version 1", "3 (f32) and 5 (bf16)"]);
    refuse(&with(4, -1), &["layers -1"]);
    refuse(&with(4, 1 << 30), &["model.layers"]);
    refuse(&with(5, 3), &["8 channels of 3 heads"]);
    refuse(&with(7, 5), &["19 of 5 tokens"]);
    refuse(&with(6, i32::MAX - 1), &["model.residual"]);
    fs::remove_file(place.join("bad.bin")).unwrap();
    place.refuses("convert from-llmc nowhere.bin out", &["nowhere.bin", "cannot read"]);
    place.ok("upscale narrow --out odd --residual 2");
    place.refuses("convert to-llmc odd out.bin", &["model.ffn = 32", "4 × 16"]);
    place.refuses("convert to-llmc narrow out.bin --dtype f16", &["--dtype = f16", "f32 and bf16"]);
    for (name, part) in [("llama", "this is none"), ("gpt2-grouped", "model.ffn = 12")] {
        converted(name).refuses("convert to-llmc narrow out.bin", &[part]);
    }
}
