#!/usr/bin/env python3
"""mupscale-convert against the real `transformers`, both ways, on small random models of each family.

  hf_check.py make OUT           models with golden logits (tests/convert/golden)
  hf_check.py check GOLDEN BIN   convert each with the programs in BIN, widen it, convert it back, and compare logits in
                                 transformers; prints a table, and ends with 1 if a row is over its tolerance

Needs torch, transformers, safetensors, numpy. Runs on the CPU, uses no network.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

TOKENS = 20
LLAMA = dict(
    vocab_size=19, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, max_position_embeddings=32, rms_norm_eps=1e-5, initializer_range=0.5,
    tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
)
GPT2 = dict(vocab_size=19, n_positions=32, n_embd=8, n_layer=2, n_head=2, initializer_range=0.5, bos_token_id=1,
            eos_token_id=2)
LLAMA3 = dict(rope_type="llama3", rope_theta=50000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)

# name: (class, settings, type, widening)
FLAT = "--residual 2 --ffn 3 --kv-heads 2 --head-dim 2"
CASES = {
    "gpt2": ("GPT2", GPT2, "float32", "--residual 4 --ffn 3 --kv-heads 2 --head-dim 2"),
    "gpt2-grouped": ("GPT2", GPT2 | dict(n_inner=12, activation_function="gelu", tie_word_embeddings=False), "float32",
                     "--residual 8 --ffn 2 --kv-heads 2 --group 2 --head-dim 2"),
    "llama": ("Llama", LLAMA, "float32", FLAT + " --group 2"),
    "llama3": ("Llama", LLAMA | dict(num_attention_heads=4, num_key_value_heads=2, head_dim=6, rope_parameters=LLAMA3,
                                     tie_word_embeddings=True), "float32", FLAT),
    "llama-biased": ("Llama", LLAMA | dict(attention_bias=True, mlp_bias=True, rope_parameters=dict(
        rope_type="linear", factor=4.0, rope_theta=10000.0)), "float32", FLAT),
    "mistral": ("Mistral", LLAMA | dict(sliding_window=None, num_key_value_heads=1), "bfloat16", FLAT),
    "qwen2": ("Qwen2", LLAMA | dict(tie_word_embeddings=True, num_key_value_heads=1), "float32", FLAT),
    "qwen3": ("Qwen3", LLAMA | dict(head_dim=6, num_key_value_heads=1), "float32", FLAT),
    "qwen3-half": ("Qwen3", LLAMA | dict(head_dim=4, attention_bias=False, tie_word_embeddings=True), "float16", FLAT),
    "granite": ("Granite", LLAMA | dict(embedding_multiplier=3.0, residual_multiplier=0.7, attention_multiplier=0.3,
                                        logits_scaling=1.7, num_key_value_heads=1), "float32", FLAT),
    "granite-tied": ("Granite", LLAMA | dict(embedding_multiplier=2.5, residual_multiplier=0.22, logits_scaling=4.0,
                                             attention_multiplier=0.25, tie_word_embeddings=True), "float32", FLAT),
}


def logits(model, tokens):
    """In f64 from the stored weights. (transformers' RMSNorm and RoPE go through f32 all the same.)"""
    with torch.no_grad():
        return model.double()(tokens).logits


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()


def make(out):
    for seed, (name, (kind, settings, dtype, _)) in enumerate(CASES.items()):
        torch.manual_seed(seed)
        config = getattr(transformers, kind + "Config")(**settings)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        model = model.to(getattr(torch, dtype))
        folder = out / name
        # Shards, once.
        model.save_pretrained(folder, max_shard_size="6KB" if name == "llama3" else "1GB")
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "temperature": 0.7}))
        tokens = torch.randint(0, config.vocab_size, (1, TOKENS))
        # Read again: casting a model rounds its RoPE frequencies too.
        model = load(folder)
        golden = {"tokens": tokens[0].int(), "logits": logits(model, tokens)[0].contiguous()}
        save_file(golden, folder / "golden.safetensors")
        print(name, model.num_parameters(), "parameters, largest logit", f"{golden['logits'].abs().max():.3f}")


def weights(folder):
    files = sorted(path for path in folder.glob("*.safetensors") if path.name != "golden.safetensors")
    return {name: tensor for path in files for name, tensor in load_file(path).items()}


def check(golden, programs):
    def run(program, arguments):
        done = subprocess.run([programs / program, *map(str, arguments)], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{program} {arguments}: {done.stderr}")
        return done.stdout

    bad = 0
    print(f"transformers {transformers.__version__}, torch {torch.__version__}\n")
    print("| model | way | error / largest logit | bits of the weights |\n|---|---|---|---|")
    for name, (kind, _, _, widening) in CASES.items():
        source = golden / name
        reference = load_file(source / "golden.safetensors")
        tokens, expected = reference["tokens"][None].long(), reference["logits"]
        llama = kind != "GPT2"
        styles = ["fold"] + (["granite"] if llama and kind != "Qwen3" else [])
        with tempfile.TemporaryDirectory() as temporary:
            place = Path(temporary)
            run("mupscale-convert", ["from-hf", source, place / "narrow", "--verify"])
            run("mupscale", ["upscale", place / "narrow", "--out", place / "wide", *widening.split()])
            for state in ["narrow", "wide"]:
                for style in styles:
                    back = place / f"{state}-{style}"
                    run("mupscale-convert", ["to-hf", place / state, back, "--style", style, "--shard-size", "0.008",
                                             "--dtype", "f32", "--verify"])
                    error = (logits(load(back), tokens)[0] - expected).abs().max() / expected.abs().max()
                    before, after = weights(source), weights(back)
                    same = before.keys() == after.keys() and all(
                        torch.equal(before[key].float(), after[key]) for key in before)
                    untouched = state == "narrow" and (kind != "Granite" or style == "granite")
                    wrong = not error < 1e-5 or (untouched and style == "fold" and not same)
                    bad += wrong
                    bits = "the same" if same else "folded or widened"
                    print(f"| {name} | {state}, {style} | {error:.1e}{' WRONG' if wrong else ''} | {bits} |")
    sys.exit(bad > 0)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["make", out]:
            make(Path(out))
        case ["check", golden, programs]:
            check(Path(golden), Path(programs))
        case _:
            sys.exit(__doc__)
