"""The models that are measured: shapes, micro-batches, and the arithmetic that follows from them.

Those of src/bench/train.rs, for what compares with it: tools/budget and the PyTorch baselines.
"""

import math
from dataclasses import dataclass


@dataclass
class Preset:
    """A decoder and its batch: `micro_batches` × `samples` sequences of `context` tokens a step."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    samples: int
    micro_batches: int
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


def gpt2(layers, width, heads, samples, micro_batches, vocab=50257):
    return Preset(layers, width, heads, heads, 4 * width, vocab, samples, micro_batches)


def qwen(layers, width, heads, ffn, samples, micro_batches):
    return Preset(layers, width, heads, 2, ffn, 151936, samples, micro_batches, gated=True)


PRESETS = {
    "gpt2-124m": gpt2(12, 768, 12, 64, 8),
    "gpt2-355m": gpt2(24, 1024, 16, 32, 16),
    "gpt2-774m": gpt2(36, 1280, 20, 32, 16),
    "gpt2-1.5b": gpt2(48, 1600, 25, 16, 32),
    "qwen2.5-0.5b": qwen(24, 896, 14, 4864, 32, 16),
    "qwen2.5-1.5b": qwen(28, 1536, 12, 8960, 16, 32),
    **{f"proxy-w{w}": gpt2(4, w, 4, 8, 1, vocab=8192) for w in (64, 128, 256, 512)},
}
