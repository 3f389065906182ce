"""The models that are measured: shapes, micro-batches, and the arithmetic that follows from them.

Those of src/bench/preset.rs, for what compares with it: tools/budget and the PyTorch baselines.
"""

import math
from dataclasses import dataclass


@dataclass
class Preset:
    """A decoder, and the sequences and their tokens that are a step."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    samples: int
    gated: bool = False
    context: int = 1024

    @property
    def head(self):
        return self.width // self.heads

    @property
    def row(self):
        return self.width + 2 * self.kv_heads * self.head

    @property
    def tokens(self):
        return self.samples * self.context

    @property
    def padded(self):
        return math.ceil(self.vocab / 64) * 64

    @property
    def up(self):
        return self.ffn * (2 if self.gated else 1)

    @property
    def parameters(self):
        """Without biases and norms, as the embedding and the readout are one matrix."""
        d = self.width
        block = d * self.row + d * d + d * self.up + self.ffn * d
        return self.layers * block + self.padded * d + (0 if self.gated else self.context * d)

    @property
    def model_flops(self):
        """Of a token: products of forward and backward, attention counted causally."""
        matrices = self.parameters - (0 if self.gated else self.context * self.width)
        return 6 * matrices + 6 * self.layers * self.context * self.width


def proxy(width):
    return Preset(4, width, 4, 4, 4 * width, 8192, 8, context=256)


def gpt2(layers, width, heads, samples):
    return Preset(layers, width, heads, heads, 4 * width, 50257, samples)


def qwen(layers, width, heads, ffn, samples):
    return Preset(layers, width, heads, 2, ffn, 151936, samples, gated=True)


PRESETS = {
    "w64": proxy(64),
    "w128": proxy(128),
    "w256": proxy(256),
    "w512": proxy(512),
    "gpt2-124m": gpt2(12, 768, 12, 32),
    "gpt2-355m": gpt2(24, 1024, 16, 32),
    "gpt2-774m": gpt2(36, 1280, 20, 24),
    "gpt2-1.5b": gpt2(48, 1600, 25, 16),
    "qwen2.5-0.5b": qwen(24, 896, 14, 4864, 24),
    "qwen2.5-1.5b": qwen(28, 1536, 12, 8960, 16),
}
