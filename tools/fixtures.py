#!/usr/bin/env python3
"""Fixtures of a foreign implementation: losses, gradients and 20-step trajectories of tiny models in float64 PyTorch.

    python3 -m venv .venv
    .venv/bin/pip install torch numpy safetensors
    .venv/bin/python tools/fixtures.py            # writes tests/fixtures/*.safetensors; the same bytes every time

The models are written from their definitions with torch.nn, the optimizers are torch.optim's where it has them. PyTorch
is needed to make the fixtures only, never to run the tests. The format is described in tests/fixtures/README.md.
"""

import argparse
import json
import math
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

STEPS = 20
IGNORED = -1
FULL_FINAL = ("adamw", "muon")  # optimizers whose final weights are stored whole; the others' are summarised

OPTIMIZERS = {
    "sgd": {"lr": 0.05, "momentum": 0.9, "dampening": 0.0, "nesterov": True, "weight_decay": 0.01},
    "sgd-dampening": {"lr": 0.05, "momentum": 0.9, "dampening": 0.1, "nesterov": False, "weight_decay": 0.01},
    "adam": {"lr": 0.01, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01, "amsgrad": False},
    "adam-amsgrad": {"lr": 0.01, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.01, "amsgrad": True},
    "adamw": {"lr": 0.01, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1},
    "lion": {"lr": 0.01, "betas": [0.9, 0.99], "weight_decay": 0.1},
    "muon": {
        "lr": 0.01,
        "momentum": 0.95,
        "eps": 1e-7,
        "weight_decay": 0.1,
        "adamw_betas": [0.9, 0.95],
        "adamw_eps": 1e-8,
    },
}

# Sizes differ on every axis of a case (vocab, context, d, f, query heads × e, key heads × e), so that a transposed or
# mistaken axis cannot pass.
COMMON = {"layers": 2, "norm_eps": 1e-5, "batch": 3, "accumulate": 1, "clip": None, "readout_multiplier": 1.0}
TRANSFORMER = COMMON | {
    "qk_norm": False, "rope_base": None, "attention_scale": None, "document_mask": False,
    "ignored": [],  # for each micro-batch the share of targets that do not count
}  # fmt: skip
ALL, NONE = ({"norm": on, "qkv": on, "o": on, "mlp": on} for on in (True, False))
GPT2 = TRANSFORMER | {
    "arch": "gpt2", "vocab": 13, "context": 8, "d": 10, "f": 18, "kv": 3, "group": 1, "e": 4,
    "tied": True, "biases": ALL, "gelu": "tanh",
}  # fmt: skip
LLAMA = TRANSFORMER | {
    "arch": "llama", "vocab": 15, "context": 7, "d": 10, "f": 14, "kv": 2, "group": 2, "e": 4,
    "tied": False, "biases": NONE, "gelu": None, "rope_base": 10000.0,
}  # fmt: skip
CASES = {
    "gpt2": GPT2,
    "gpt2-exact-gelu": GPT2
    | {"vocab": 17, "context": 7, "d": 8, "f": 14, "kv": 2, "e": 6, "biases": NONE, "gelu": "exact"},
    "gpt2-documents": GPT2 | {"document_mask": True},
    "gpt2-ignored": GPT2 | {"ignored": [0.4]},
    "llama": LLAMA,
    "llama-accumulate": LLAMA | {"accumulate": 2, "ignored": [0.1, 0.6]},
    "llama-clip": LLAMA | {"clip": 0.3},
    "llama-mup": LLAMA | {"readout_multiplier": 0.5, "attention_scale": math.sqrt(2) / 4},  # base head size e / 2 = 2
    "qwen2": LLAMA | {"vocab": 17, "d": 12, "tied": True, "biases": NONE | {"qkv": True}},
    "qwen3": LLAMA | {"vocab": 13, "d": 12, "group": 3, "qk_norm": True},
    "mlp": COMMON | {"arch": "mlp", "inputs": 7, "hidden": [12, 9], "classes": 5, "batch": 6},
}


def norm(c, width):
    if c["arch"] == "gpt2":
        return nn.LayerNorm(width, eps=c["norm_eps"], bias=c["biases"]["norm"])
    return nn.RMSNorm(width, eps=c["norm_eps"])


def rotate_half(x, base):
    """RoPE on [batch, heads, time, e]: the pair (i, i + e/2) turns by time · base^(-i / (e/2))."""
    half = x.shape[-1] // 2
    frequency = base ** (-torch.arange(half) / half)
    angle = torch.outer(torch.arange(x.shape[-2]).double(), frequency)
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()), dim=-1)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        d, e, bias = c["d"], c["e"], c["biases"]
        self.q = nn.Linear(d, c["kv"] * c["group"] * e, bias=bias["qkv"])
        self.k = nn.Linear(d, c["kv"] * e, bias=bias["qkv"])
        self.v = nn.Linear(d, c["kv"] * e, bias=bias["qkv"])
        self.o = nn.Linear(c["kv"] * c["group"] * e, d, bias=bias["o"])
        if c["qk_norm"]:
            self.q_norm, self.k_norm = norm(c, e), norm(c, e)

    def forward(self, x, mask):
        c = self.c
        q, k, v = (f(x).unflatten(-1, (-1, c["e"])).transpose(1, 2) for f in (self.q, self.k, self.v))
        if c["qk_norm"]:
            q, k = self.q_norm(q), self.k_norm(k)
        if c["rope_base"]:
            q, k = rotate_half(q, c["rope_base"]), rotate_half(k, c["rope_base"])
        # enable_gqa lets query head h read K/V head h // group.
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=c["attention_scale"], enable_gqa=True)
        return self.o(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gelu, bias = c["gelu"], c["biases"]["mlp"]
        self.up = nn.Linear(c["d"], c["f"], bias=bias)
        self.down = nn.Linear(c["f"], c["d"], bias=bias)
        if not self.gelu:
            self.gate = nn.Linear(c["d"], c["f"], bias=bias)

    def forward(self, x):
        if not self.gelu:
            return self.down(F.silu(self.gate(x)) * self.up(x))
        return self.down(F.gelu(self.up(x), approximate="tanh" if self.gelu == "tanh" else "none"))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm1, self.attention = norm(c, c["d"]), Attention(c)
        self.norm2, self.mlp = norm(c, c["d"]), FeedForward(c)

    def forward(self, x, mask):
        x = x + self.attention(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.embedding = nn.Embedding(c["vocab"], c["d"])
        if c["arch"] == "gpt2":
            self.positions = nn.Embedding(c["context"], c["d"])
        self.blocks = nn.ModuleList(Block(c) for _ in range(c["layers"]))
        self.norm_f = norm(c, c["d"])
        if not c["tied"]:
            self.readout = nn.Linear(c["d"], c["vocab"], bias=False)

    def forward(self, tokens, first_key):
        time = torch.arange(tokens.shape[1])
        x = self.embedding(tokens)
        if self.c["arch"] == "gpt2":
            x = x + self.positions(time)
        query, key = time[:, None], time[None, :]
        mask = ((first_key[:, :, None] <= key) & (key <= query))[:, None]  # [batch, 1 head, query, key]
        for block in self.blocks:
            x = block(x, mask)
        readout = self.embedding if self.c["tied"] else self.readout
        return self.c["readout_multiplier"] * F.linear(self.norm_f(x), readout.weight)


class Classifier(nn.Module):
    def __init__(self, c):
        super().__init__()
        widths = [c["inputs"], *c["hidden"]]
        self.multiplier = c["readout_multiplier"]
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(widths))
        self.readout = nn.Linear(widths[-1], c["classes"])

    def forward(self, x, _):
        for layer in self.layers:
            x = F.relu(layer(x))
        return self.multiplier * F.linear(x, self.readout.weight) + self.readout.bias


class Lion(torch.optim.Optimizer):
    """arXiv 2302.06675, algorithm 2, with decoupled weight decay."""

    def __init__(self, params, **hyperparameters):
        super().__init__(params, hyperparameters)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                update = (beta1 * m + (1 - beta1) * p.grad).sign()  # sign(0) = 0
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * update)
                m.mul_(beta2).add_((1 - beta2) * p.grad)


def orthogonalise(u, eps):
    """Five quintic Newton–Schulz steps from u / (‖u‖_F + eps), on the orientation with rows ≤ columns."""
    x = u.T if u.shape[0] > u.shape[1] else u
    x = x / (x.norm() + eps)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if u.shape[0] > u.shape[1] else x


class Muon(torch.optim.Optimizer):
    """Keller Jordan's Muon, Nesterov, without a shape factor, in float64 (torch.optim.Muon iterates in bf16)."""

    def __init__(self, params, **hyperparameters):
        super().__init__(params, hyperparameters)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            mu = group["momentum"]
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                m.mul_(mu).add_(p.grad)
                update = orthogonalise(p.grad + mu * m, group["eps"])
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * update)


def is_hidden_matrix(name):
    """The matrices that Muon takes: those of the blocks, and those between two hidden layers of an mlp."""
    *_, layer, kind = name.split(".")
    if name.startswith("layers."):
        return layer != "0" and kind == "weight"
    return layer in ("q", "k", "v", "o", "up", "gate", "down") and kind == "weight"


def decay_groups(parameters, weight_decay):
    """Weight decay on matrices and embeddings, none on gains and biases."""
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [g for g in groups if g["params"]]


def make_optimizers(name, model):
    """The optimizers of one run: one, or Muon and the AdamW beside it."""
    h = dict(OPTIMIZERS[name])
    decay, lr = h.pop("weight_decay"), h["lr"]
    if name != "muon":
        kind = {"adamw": torch.optim.AdamW, "lion": Lion}.get(name) or (
            torch.optim.SGD if name.startswith("sgd") else torch.optim.Adam
        )
        return [kind(decay_groups(list(model.parameters()), decay), **h)]
    hidden = [p for n, p in model.named_parameters() if is_hidden_matrix(n)]
    rest = [p for n, p in model.named_parameters() if not is_hidden_matrix(n)]
    return [
        Muon(decay_groups(hidden, decay), lr=lr, momentum=h["momentum"], eps=h["eps"]),
        torch.optim.AdamW(decay_groups(rest, decay), lr=lr, betas=h["adamw_betas"], eps=h["adamw_eps"]),
    ]


def initialise(model):
    """Matrices ~ N(0, 1/fan_in), embeddings ~ N(0, 0.5²), gains near 1 and biases near 0, all different."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() >= 2:
                embedding = name.startswith(("embedding", "positions"))
                p.normal_(std=0.5 if embedding else p.shape[1] ** -0.5)
            else:
                p.normal_(mean=float("norm" in name and name.endswith("weight")), std=0.2)


def make_batches(c):
    """inputs, targets and first_key of all steps. Tokens mostly follow a rule, so that there is something to learn."""
    shape = (STEPS, c["accumulate"], c["batch"])
    if c["arch"] == "mlp":
        x = torch.randn(*shape, c["inputs"])
        return x, (x.sum(-1) * 2).floor().long() % c["classes"], torch.zeros(shape, dtype=torch.long)
    vocab, context = c["vocab"], c["context"]
    tokens = torch.randint(vocab, (*shape, context + 1))
    for t in range(context):
        follows = torch.rand(shape) < 0.8
        tokens[..., t + 1] = torch.where(follows, (3 * tokens[..., t] + 1) % vocab, tokens[..., t + 1])
    inputs, targets = tokens[..., :-1].clone(), tokens[..., 1:].clone()
    for micro, share in enumerate(c["ignored"]):
        targets[:, micro][torch.rand(targets[:, micro].shape) < share] = IGNORED
    first_key = torch.zeros_like(inputs)
    if c["document_mask"]:
        starts = torch.rand(inputs.shape) < 0.3
        first_key = torch.where(starts, torch.arange(context), 0).cummax(-1).values
    return inputs, targets, first_key


def forward_backward(model, batches, step):
    """The loss of one step and its gradients (in .grad): sums over all micro-batches / all their counted targets."""
    inputs, targets, first_key = (z[step] for z in batches)
    counted = (targets != IGNORED).sum()
    total = 0.0
    model.zero_grad()
    for x, y, first in zip(inputs, targets, first_key):
        logits = model(x, first)
        loss = F.cross_entropy(logits.flatten(0, -2), y.flatten(), ignore_index=IGNORED, reduction="sum") / counted
        loss.backward()
        total += loss.item()
    return total


def train(c, model, batches, name):
    """20 steps; the loss before each update and the gradient norm before clipping."""
    optimizers, losses, norms = make_optimizers(name, model), [], []
    for step in range(STEPS):
        losses.append(forward_backward(model, batches, step))
        grads = [p.grad for p in model.parameters()]
        norms.append(torch.cat([g.flatten() for g in grads]).norm().item())
        if c["clip"]:
            for g in grads:
                g.mul_(min(1.0, c["clip"] / norms[-1]))
        for optimizer in optimizers:
            optimizer.step()
    return torch.tensor(losses), torch.tensor(norms)


def summary(p):
    """[Σ w_i cos i, ‖w‖] over the flat row-major index i: a fixed projection and the norm."""
    w = p.detach().flatten()
    return torch.stack((w @ torch.arange(w.numel()).double().cos(), w.norm()))


def make_case(c):
    """All tensors of one fixture file and the names of the model's parameters."""
    model = Classifier(c) if c["arch"] == "mlp" else Transformer(c)
    initialise(model)
    initial = {n: p.detach().clone() for n, p in model.named_parameters()}
    batches = inputs, targets, first_key = make_batches(c)
    out = {"inputs": inputs if c["arch"] == "mlp" else inputs.int(), "targets": targets.int()}
    if c.get("document_mask"):
        out["first_key"] = first_key.int()
    out["logits"] = torch.stack([model(x, first).detach() for x, first in zip(inputs[0], first_key[0])])
    out["loss"] = torch.tensor([forward_backward(model, batches, 0)])
    out |= {f"init/{n}": p for n, p in initial.items()}
    out |= {f"grad/{n}": p.grad.clone() for n, p in model.named_parameters()}
    for name in OPTIMIZERS:
        model.load_state_dict(initial)
        out[f"losses/{name}"], out[f"grad_norms/{name}"] = train(c, model, batches, name)
        out[f"summary/{name}"] = torch.stack([summary(p) for p in model.parameters()])
        if name in FULL_FINAL:
            out |= {f"final/{name}/{n}": p.detach().clone() for n, p in model.named_parameters()}
    return out, list(initial)


def configuration(name, c, parameters):
    """What the tests read from the metadata: the case with every default written out."""
    c = {k: v for k, v in c.items() if k != "ignored"}
    if c["arch"] == "mlp":
        c = {k: v for k, v in c.items() if k not in ("layers", "norm_eps")}
    else:
        c |= {"qkv_bias": c["biases"]["qkv"], "attention_scale": c["attention_scale"] or c["e"] ** -0.5}
    return {"name": name, "steps": STEPS, **c, "parameters": parameters, "optimizers": OPTIMIZERS}


def compare(made, path, parameters):
    """Another machine's and PyTorch's fixture holds the same numbers to rounding; exits where it does not.

    A gradient that is zero in exact arithmetic (of the keys' bias: attention does not see it) is rounding alone, and Lion,
    which steps by signs, makes any number of it: those rows of its summary are left out.
    """
    known = load_file(path)
    if tensors_differ := made.keys() ^ known.keys():
        raise SystemExit(f"{path}: only one of the two has {sorted(tensors_differ)}")
    nothing = [made[f"grad/{name}"].abs().max().item() < 1e-12 for name in parameters]
    for key, mine in made.items():
        theirs = known[key]
        if key == "summary/lion":
            keep = ~torch.tensor(nothing)
            mine, theirs = mine[keep], theirs[keep]
        if mine.is_floating_point():
            far = (mine - theirs).abs().max().item()
            agrees = far <= 1e-9 * theirs.abs().max().item() + 1e-14
        else:
            far, agrees = math.nan, torch.equal(mine, theirs)
        if not agrees:
            raise SystemExit(f"{path}: {key} differs by {far:.1e}")


def main():
    a = argparse.ArgumentParser(description="Write the float64 PyTorch fixtures of tests/fixtures.")
    a.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "tests" / "fixtures")
    a.add_argument("--check", action="store_true", help="write nothing: compare with the fixtures that are there")
    a = a.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    a.out.mkdir(parents=True, exist_ok=True)
    for seed, (name, c) in enumerate(CASES.items()):
        torch.manual_seed(seed)
        tensors, parameters = make_case(c)
        path = a.out / f"{name}.safetensors"
        if a.check:
            compare(tensors, path, parameters)
            print(f"{name:17} as it was")
            continue
        config = json.dumps(configuration(name, c, parameters))
        save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata={"config": config})
        first, *_, last = tensors["losses/adamw"].tolist()
        print(f"{name:17} {path.stat().st_size:7} bytes, loss {first:.4f} -> {last:.4f} under AdamW")


if __name__ == "__main__":
    main()
