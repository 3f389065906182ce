#!/usr/bin/env python3
"""Scores a model by EleutherAI's lm-evaluation-harness, after the export, and by `mupscale eval`: the same accuracies.

  lm_eval_check.py target/release

Trains a small model on a generated corpus, makes multiple-choice tasks of its text, exports the model with
`mupscale-convert to-hf`, and compares the harness's acc and acc_bytes with ours. A task whose best two endings are as good
as the same may fall either way by rounding, so one task in a hundred may differ. Needs lm-eval, torch and transformers;
uses no network. Noted result: docs/watching.md.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

TASKS = 200
RUN = """
run = "run"
steps = 300
[data]
path = "data"
[optimizer]
lr = 0.008
[validation]
every = 0
[model]
arch = "llama"
layers = 2
residual = 64
kv_heads = 4
context = 96
"""
HARNESS = """
task: continued
dataset_path: json
dataset_kwargs:
  data_files: {file}
output_type: multiple_choice
test_split: train
doc_to_text: "{{{{ctx}}}}"
doc_to_choice: "{{{{endings}}}}"
doc_to_target: "{{{{label}}}}"
metric_list:
  - metric: acc
  - metric: acc_bytes
"""


def tasks(corpus):
    """Sentences of the corpus cut in two, each with the right half and three of others."""
    sentences = [s for s in re.findall(r"[A-Z][^.]*\.", corpus) if 6 <= len(s.split()) <= 14]
    halves = [s.split() for s in sentences[-TASKS * 7 :: 7]]
    halves = [(" ".join(words[:3]), " ".join(words[3:])) for words in halves]
    for i, (start, end) in enumerate(halves):
        endings = [halves[(i + k * 31) % len(halves)][1] for k in (1, 2, 3)]
        endings.insert(i % 4, end)
        yield {"ctx": start, "endings": endings, "label": i % 4}


def main(programs):
    import lm_eval
    import torch
    import transformers
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)

        def run(program, line):
            done = subprocess.run([programs / program, *line.split()], cwd=place, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{program} {line}: {done.stderr}")
            return done.stdout

        run("mupscale", "data synth corpus.txt --bytes 1000000")
        run("mupscale", "data train-tokenizer corpus.txt --vocab 1024 --out tokenizer.json")
        run("mupscale", "data tokenize corpus.txt --tokenizer tokenizer.json --out data")
        (place / "run.toml").write_text(RUN)
        run("mupscale", "train -c run.toml")
        lines = [json.dumps(task) for task in tasks((place / "corpus.txt").read_text())]
        (place / "tasks.jsonl").write_text("\n".join(lines))
        ours = json.loads(run("mupscale", "eval run --tasks tasks.jsonl --json"))
        run("mupscale-convert", "to-hf run exported --verify")
        (place / "continued.yaml").write_text(HARNESS.format(file=place / "tasks.jsonl"))
        theirs = lm_eval.simple_evaluate(
            model="hf",
            model_args=f"pretrained={place / 'exported'},dtype=float32",
            tasks=["continued"],
            task_manager=TaskManager(include_path=str(place), include_defaults=False),
            device="cpu",
            batch_size=16,
        )["results"]["continued"]
    versions = f"lm-eval {lm_eval.__version__}, transformers {transformers.__version__}, torch {torch.__version__}"
    print(f"{ours['tasks']} tasks; {versions}\n\n| | mupscale eval | lm-evaluation-harness |\n|---|---|---|")
    apart = 0.0
    for name, key in [("accuracy", "acc"), ("accuracy_per_byte", "acc_bytes")]:
        print(f"| {name} ({key}) | {ours[name]:.4f} | {theirs[key + ',none']:.4f} |")
        apart = max(apart, abs(ours[name] - theirs[key + ",none"]))
    # Three times the deviation of that many guesses.
    if not ours["accuracy"] > ours["chance"] + 0.1:
        sys.exit("the model has learnt nothing, so nothing is shown")
    sys.exit(apart > 0.01)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]).resolve())
