#!/usr/bin/env python3
"""The peer of `mupscale bench upscale`: GPT-2's weights and both of Adam's moments widened in PyTorch, timed.

  torch_widen.py --device cuda --width 768 --layers 12 --vocab 50257 --times 4 --noise 0.1

Rows and columns are repeated, matrices scaled, and with noise normal numbers added to the weights: float32, into memory
that is there already. Prints one JSON object: the best of some runs in seconds, and GB/s written (12 bytes a
parameter).
"""

import argparse
import json
import time

import torch

RUNS = 5


def matrices(width, layers, vocab):
    """Rows, columns, and whether the rows are repeated too."""
    block = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    return [(vocab, width, False), (1024, width, False), *((rows, columns, True) for rows, columns in layers * block)]


def widen(source, target, times, rows, scale):
    """Every row (if `rows`) and every column `times` times, times `scale`."""
    height, width = source.shape
    copies = times if rows else 1
    # A view of the target whose last but one and last but three axes are the copies: one pass, nothing in between.
    target.view(height, copies, width, times).copy_(source.view(height, 1, width, 1).expand(-1, copies, -1, times))
    if scale != 1:
        target.mul_(scale)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    for name, default in {"width": 768, "layers": 12, "vocab": 50257, "times": 2, "threads": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--noise", type=float, default=0.0)
    a = parser.parse_args()
    if a.threads:
        torch.set_num_threads(a.threads)
    cuda = a.device == "cuda"
    pairs = []
    for rows, columns, hidden in matrices(a.width, a.layers, a.vocab):
        wide = (rows * (a.times if hidden else 1), columns * a.times)
        for power in range(3):
            source = torch.randn(rows, columns, device=a.device)
            # A hidden matrix has `times` as many inputs, each with a share of the weight; moments follow gradients.
            scale = a.times**-1.0 if power == 0 and hidden else float(a.times) ** -power
            pairs.append((source, torch.empty(wide, device=a.device), hidden, scale, power))
    seconds = []
    for _ in range(RUNS):
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for source, target, hidden, scale, power in pairs:
            widen(source, target, a.times, hidden, scale)
            if a.noise and power == 0:
                target.add_(torch.randn_like(target), alpha=a.noise)
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    written = sum(target.numel() * target.element_size() for _, target, *_ in pairs)
    result = {
        "what": "torch_widen",
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
        **{name: getattr(a, name) for name in ("width", "layers", "vocab", "times", "noise")},
        "wide_parameters": written // 12,
        "seconds": min(seconds),
        "gb_per_second": written / min(seconds) / 1e9,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
