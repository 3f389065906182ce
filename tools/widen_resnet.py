#!/usr/bin/env python3
"""A PyTorch ResNet-18 on CIFAR-shaped data, widened by `mupscale widen-tensors` in the middle of training.

  widen_resnet.py target/release/mupscale

Trains a narrow ResNet some steps, widens weights, batch-norm statistics and optimizer state, gives the wide model's
optimizer one group per tensor with the printed multipliers, and trains both for 20 steps on the same random data in f64:
losses must agree to 1e-9, for AdamW and for SGD. Needs torch and safetensors.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

NARROW, TIMES, CLASSES, BATCH, STEPS = 4, 3, 10, 8, 20
SETTINGS = {
    "adamw": (torch.optim.AdamW, dict(lr=3e-3, weight_decay=0.1, eps=1e-4), ["exp_avg", "exp_avg_sq"]),
    "sgd": (torch.optim.SGD, dict(lr=0.05, weight_decay=0.01, momentum=0.9), ["momentum_buffer"]),
}


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet18(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        widths = [width * 2**i for i in range(4)]
        stages = [[Block(a, b, stride), Block(b, b, 1)] for a, b, stride in zip([width] + widths, widths, [1, 2, 2, 2])]
        self.layers = nn.ModuleList(nn.Sequential(*stage) for stage in stages)
        self.fc = nn.Linear(widths[-1], CLASSES)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        for layer in self.layers:
            x = layer(x)
        return self.fc(x.mean((2, 3)))


def train(model, optimizer, batches):
    losses = []
    for images, labels in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def save(tensors, path):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def main(program):
    worst = 0.0
    for name, (kind, settings, moments) in SETTINGS.items():
        torch.manual_seed(0)
        batch = lambda: (torch.randn(BATCH, 3, 32, 32).double(), torch.randint(0, CLASSES, (BATCH,)))
        batches = [batch() for _ in range(5 + STEPS)]
        narrow, wide = ResNet18(NARROW).double(), ResNet18(NARROW * TIMES).double()
        optimizer = kind(narrow.parameters(), **settings)
        train(narrow, optimizer, batches[:5])
        with tempfile.TemporaryDirectory() as folder:
            at = lambda file: str(Path(folder) / file)
            save(narrow.state_dict(), at("narrow.safetensors"))
            save(wide.state_dict(), at("shapes.safetensors"))
            parameters = dict(narrow.named_parameters())
            states = {n: optimizer.state[p] for n, p in parameters.items()}
            save({f"{m}.{n}": s[m] for n, s in states.items() for m in moments}, at("moments.safetensors"))
            command = [program, "widen-tensors", at("narrow.safetensors"), "--infer", at("narrow.safetensors"),
                       at("shapes.safetensors"), "--optimizer", name, "-o", at("wide.safetensors"), "--moments",
                       at("moments.safetensors"), "--moments-out", at("wide-moments.safetensors")]
            factors = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            wide.load_state_dict(load_file(at("wide.safetensors")))
            grown = load_file(at("wide-moments.safetensors"))
        groups = []
        for n, p in wide.named_parameters():
            factor = factors[n]
            group = dict(params=[p], lr=settings["lr"] * factor["lr"],
                         weight_decay=settings["weight_decay"] * factor["weight_decay"])
            if "eps" in settings:
                group["eps"] = settings["eps"] * factor["eps"]
            groups.append(group)
        wide_optimizer = kind(groups, **settings)
        for n, p in wide.named_parameters():
            # The count of steps, which no width changes, but which is updated in place.
            state = {key: value.clone() for key, value in states[n].items() if key not in moments}
            wide_optimizer.state[p] = state | {m: grown[f"{m}.{n}"] for m in moments}
        expected, found = train(narrow, optimizer, batches[5:]), train(wide, wide_optimizer, batches[5:])
        error = max(abs(a - b) / abs(a) for a, b in zip(expected, found))
        worst = max(worst, error)
        # Evaluation reads the running statistics.
        narrow.eval(), wide.eval()
        images = batches[0][0]
        logits = (narrow(images) - wide(images)).abs().max().item() / narrow(images).abs().max().item()
        worst = max(worst, logits)
        print(f"{name}: loss {expected[0]:.4f} to {expected[-1]:.4f}, error {error:.1e}; evaluated, {logits:.1e}")
    sys.exit(worst > 1e-9)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
