#!/usr/bin/env python3
"""The peer of `mupscale bench train`: one training step of the same shapes in PyTorch, timed.

  torch_gpt.py --preset gpt2-124m --mode default
  torch_gpt.py --device cpu --width 256 --layers 4 --heads 4 --vocab 8192 --batch 8 --context 256

float32 on the CPU; on CUDA what one writes who wants speed: bf16 autocast over float32 weights, fused AdamW, the
attention that PyTorch chooses, torch.compile in the mode that is asked for. Prints one JSON object: median milliseconds
of a step (forward, backward, clipping, AdamW), tokens a second, and the share of 989 TFLOP/s that the model's products are.
Where a micro-batch does not fit in memory, half as many samples and twice as many micro-batches are taken, and said.
"""

import argparse
import gc
import json
import statistics
import time

import torch
import torch.nn.functional as F
from presets import PRESETS, Preset
from torch import nn

MODES = ("eager", "default", "reduce-overhead", "max-autotune")
PEAK = 989e12


def turn(x, angles):
    """Rotary positions: halves of a head as the parts of complex numbers."""
    cos, sin = angles
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).type_as(x)


class Attention(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.sizes = [p.width, p.kv_heads * p.head, p.kv_heads * p.head]
        self.head, self.grouped = p.head, p.kv_heads != p.heads
        self.qkv = nn.Linear(p.width, p.row)
        self.output = nn.Linear(p.width, p.width, bias=not p.gated)

    def forward(self, x, angles):
        batch, context, width = x.shape
        parts = self.qkv(x).split(self.sizes, dim=-1)
        q, k, v = (part.view(batch, context, -1, self.head).transpose(1, 2) for part in parts)
        if angles is not None:
            q, k = turn(q, angles), turn(k, angles)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.grouped)
        return self.output(out.transpose(1, 2).reshape(batch, context, width))


class Block(nn.Module):
    def __init__(self, p):
        super().__init__()
        norm = nn.RMSNorm if p.gated else nn.LayerNorm
        self.gated = p.gated
        self.norm1, self.norm2, self.attention = norm(p.width), norm(p.width), Attention(p)
        self.up = nn.Linear(p.width, p.up, bias=not p.gated)
        self.down = nn.Linear(p.ffn, p.width, bias=not p.gated)

    def forward(self, x, angles):
        x = x + self.attention(self.norm1(x), angles)
        hidden = self.up(self.norm2(x))
        if self.gated:
            gate, up = hidden.chunk(2, dim=-1)
            return x + self.down(F.silu(gate) * up)
        return x + self.down(F.gelu(hidden, approximate="tanh"))


class Decoder(nn.Module):
    """GPT-2, or with `gated` a Llama with biases on Q, K and V; the readout is the embedding."""

    def __init__(self, p):
        super().__init__()
        # Padded as ours is: products of odd sizes are slow.
        self.tokens = nn.Embedding(p.padded, p.width)
        self.positions = None if p.gated else nn.Embedding(p.context, p.width)
        self.blocks = nn.ModuleList(Block(p) for _ in range(p.layers))
        self.norm = (nn.RMSNorm if p.gated else nn.LayerNorm)(p.width)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
        if p.gated:
            frequencies = 1e6 ** (-torch.arange(0, p.head, 2) / p.head)
            angles = torch.arange(p.context)[:, None] * frequencies
            self.register_buffer("cos", angles.cos())
            self.register_buffer("sin", angles.sin())

    def forward(self, inputs, targets):
        x = self.tokens(inputs)
        if self.positions is not None:
            x = x + self.positions.weight[: inputs.shape[1]]
        angles = None if self.positions is not None else (self.cos, self.sin)
        for block in self.blocks:
            x = block(x, angles)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Clock:
    """Milliseconds of steps: by events on a GPU, which is not made to wait, and by the host's clock on a CPU."""

    def __init__(self, cuda):
        self.cuda, self.marks = cuda, []

    def mark(self):
        if self.cuda:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def milliseconds(self):
        pairs = list(zip(self.marks, self.marks[1:], strict=False))
        if not self.cuda:
            return [(b - a) * 1e3 for a, b in pairs]
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in pairs]


def measure(p, device, mode, samples, micro_batches, steps, warm_up):
    """Milliseconds of each step, seconds until the first one was done, and the last loss."""
    cuda = device == "cuda"
    torch.manual_seed(0)
    model = Decoder(p).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    run = model if mode == "eager" else torch.compile(model, mode=None if mode == "default" else mode)
    data = torch.randint(0, p.vocab, (8, samples, p.context + 1), device=device)
    batches = [(x[:, :-1].contiguous(), x[:, 1:].contiguous()) for x in data]

    def step():
        total = torch.zeros((), device=device)
        for micro in range(micro_batches):
            torch.compiler.cudagraph_mark_step_begin()
            with torch.autocast("cuda", dtype=torch.bfloat16, enabled=cuda):
                loss = run(*batches[micro % len(batches)]) / micro_batches
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    start = time.perf_counter()
    step().item()
    first = time.perf_counter() - start
    for _ in range(warm_up):
        step()
    clock = Clock(cuda)
    clock.mark()
    for _ in range(steps):
        loss = step()
        clock.mark()
    return clock.milliseconds(), first, loss.item()


def fitting(p, a):
    """Measures with as many samples in a micro-batch as there is memory for."""
    samples, micro_batches = a.batch or p.samples, a.accumulate
    while True:
        try:
            return samples, micro_batches, *measure(p, a.device, a.mode, samples, micro_batches, a.steps, a.warm_up)
        except torch.OutOfMemoryError:
            if samples == 1:
                raise
        samples, micro_batches = samples // 2, micro_batches * 2
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS)
    for name, default in {"width": 256, "layers": 4, "heads": 4, "vocab": 8192, "context": 256}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="without a preset")
    parser.add_argument("--batch", type=int, help="samples of a micro-batch; the preset's, or 8")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches of a step")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--mode", choices=MODES, default="eager")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0)
    return parser.parse_args()


def main():
    a = arguments()
    if a.threads:
        torch.set_num_threads(a.threads)
    torch.set_float32_matmul_precision("high" if a.device == "cuda" else "highest")
    shape = Preset(a.layers, a.width, a.heads, a.heads, 4 * a.width, a.vocab, 8, context=a.context)
    p = PRESETS[a.preset] if a.preset else shape
    samples, micro_batches, times, first, loss = fitting(p, a)
    ms, tokens = statistics.median(times), samples * p.context * micro_batches
    result = {
        "what": "torch_gpt",
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if a.device == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "mode": a.mode,
        "preset": a.preset,
        "width": p.width,
        "layers": p.layers,
        "heads": p.heads,
        "vocab": p.vocab,
        "context": p.context,
        "batch": samples,
        "micro_batches": micro_batches,
        "steps": len(times),
        "ms_per_step": ms,
        "ms_best": min(times),
        "tokens_per_second": tokens / ms * 1e3,
        "utilisation": tokens * p.model_flops / (ms / 1e3) / PEAK if a.device == "cuda" else None,
        "seconds_to_first_step": first,
        "memory": torch.cuda.max_memory_allocated() if a.device == "cuda" else None,
        "loss": loss,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
