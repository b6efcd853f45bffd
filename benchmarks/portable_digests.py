"""What one process computes for `bench_portable`: digests of operators and models, or seconds a step.

    python -m benchmarks.portable_digests --small          a dozen operators and one model, in a JSON object
    python -m benchmarks.portable_digests                  all of them
    python -m benchmarks.portable_digests --speed          seconds of a step of each workload

The operators are those of the self-test and, without --small, more that models have; the models are trained
for three steps each, their weights' digest is taken.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchord.coordinator.compute.determinism import pinned
from torchord.coordinator.compute.self_test import OPERATORS, digest_of, grown, values

SMALL = (
    "matmul", "matrix times vector", "linear", "conv2d", "layer norm", "softmax", "attention", "exp and log",
    "gelu", "square roots", "adam", "random numbers",
)  # fmt: skip
Batch = tuple[Tensor, Tensor]


# --- operators ------------------------------------------------------------------------------------


def _complex(size: int) -> Tensor:
    return torch.complex(values(size), values(size, seed=2))


def _recurrent(kind: Any) -> list[Tensor]:
    cell = kind(19, 24, batch_first=True)
    for i, parameter in enumerate(cell.parameters()):
        parameter.data = values(*parameter.shape, seed=i + 3) / 4
    return grown(lambda x: cell(x)[0], values(3, 11, 19))


def _definite() -> Tensor:
    return values(20, 30) @ values(20, 30).T + 40 * torch.eye(20)


def _halves(dtype: torch.dtype) -> list[Tensor]:
    a, b = values(70, 130).to(dtype), values(130, 65, seed=2).to(dtype)
    images, kernels = values(4, 3, 14, 14).to(dtype), values(16, 3, 3, 3).to(dtype)
    return [(a @ b).float(), functional.conv2d(images, kernels).float(), a.softmax(1).float()]


def _unary(*names: str) -> list[Tensor]:
    return [grown(getattr(torch, name), values(999) / 2.1)[0] for name in names]


MORE: dict[str, Callable[[], list[Tensor]]] = {
    "lstm": lambda: _recurrent(nn.LSTM),
    "gru": lambda: _recurrent(nn.GRU),
    "simple recurrent": lambda: _recurrent(nn.RNN),
    "conv3d": lambda: grown(functional.conv3d, values(2, 3, 8, 8, 8), values(4, 3, 3, 3, 3)),
    "group norm": lambda: grown(
        lambda x, w: functional.group_norm(x, 3, w), values(4, 9, 7, 7), values(9, seed=2)
    ),
    "rms norm": lambda: grown(
        lambda x, w: functional.rms_norm(x, (67,), w), values(24, 67), values(67, seed=2)
    ),
    "activations": lambda: [
        each
        for name in ("softplus", "elu", "mish", "selu", "logsigmoid", "hardswish", "leaky_relu")
        for each in grown(getattr(functional, name), values(999))
    ],
    "unary functions": lambda: _unary(
        "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "erfc", "erfinv", "expm1",
        "exp2",
    ),
    "logarithms": lambda: [f(values(999).abs() + 0.1) for f in (torch.log2, torch.log10, torch.lgamma)],
    "powers": lambda: [values(999).abs().pow(e) for e in (0.5, -0.5, 1.5, 2, 3, 0.3)],
    "distances": lambda: [torch.cdist(values(40, 7), values(30, 7, seed=3))],
    "fourier": lambda: [torch.view_as_real(torch.fft.fft(values(8, 100))), torch.fft.irfft(_complex(65))],
    "complex": lambda: [torch.view_as_real(_complex(500).exp()), _complex(500).abs()],
    "cholesky and solve": lambda: [
        torch.linalg.cholesky(_definite()), torch.linalg.solve(_definite(), values(20, 3)),
    ],
    "qr and svd": lambda: [*torch.linalg.qr(values(20, 12)), torch.linalg.svdvals(values(20, 12))],
    "eigenvalues": lambda: list(torch.linalg.eigh(_definite())),
    "float64": lambda: [
        values(70, 130).double() @ values(130, 65).double(), values(999).double().exp(),
        values(999).double().abs().sqrt(), values(999).double().sin(),
    ],
    "bfloat16": lambda: _halves(torch.bfloat16),
    "float16": lambda: _halves(torch.float16),
    "interpolation": lambda: grown(
        lambda x: functional.interpolate(x, size=(15, 15), mode="area"), values(2, 3, 9, 9)
    ),
}  # fmt: skip


# --- models ---------------------------------------------------------------------------------------


class Small(nn.Module):
    """A bit of everything in a model that starts at once: convolution, norms, attention, embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.batch_norm = nn.BatchNorm2d(8)
        self.places = nn.Embedding(49, 32)
        self.into = nn.Linear(8 * 16, 32)
        self.attention = nn.MultiheadAttention(32, 4, dropout=0.1, batch_first=True)
        self.norm = nn.LayerNorm(32)
        self.out = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        """(batch, 1, 28, 28) to (batch, 10)."""
        x = functional.gelu(self.batch_norm(self.conv(images)))
        x = x.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(len(x), 49, -1)
        x = self.into(x) + self.places(torch.arange(49))
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        return self.out(x.mean(1))


class Residual(nn.Module):
    """A basic block of a ResNet (He et al. 2015), or one that halves the image."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(outputs) for _ in range(3))
        self.short = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, inputs, height, width) to (batch, outputs, height / stride, width / stride)."""
        made = self.norms[1](self.second(functional.relu(self.norms[0](self.first(x)))))
        return functional.relu(made + self.norms[2](self.short(x)))


def resnet(*widths: int) -> nn.Module:
    """A ResNet for images of one channel, two blocks a width."""
    blocks: list[nn.Module] = []
    before = widths[0]
    for i, width in enumerate(widths):
        blocks += [Residual(before, width, 2 if i else 1), Residual(width, width, 1)]
        before = width
    return nn.Sequential(
        nn.Conv2d(1, widths[0], 3, padding=1),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(before, 10),
    )


class Recurrent(nn.Module):
    """An LSTM over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(28, 32, batch_first=True)
        self.out = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        """(batch, 1, 28, 28) to (batch, 10)."""
        return self.out(self.lstm(images[:, 0])[0][:, -1])


class Named(nn.Module):
    """A model of transformers, made of its config and random weights: its logits."""

    def __init__(self, architecture: str, config: str, **fields: Any) -> None:
        super().__init__()
        import transformers

        self.model = getattr(transformers, architecture)(getattr(transformers, config)(**fields))

    def forward(self, inputs: Tensor) -> Tensor:
        """Whatever the model takes first, to logits."""
        return self.model(inputs).logits


_BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 100, "n_positions": 32}
_RESNET = {
    "num_channels": 1,
    "embedding_size": 8,
    "hidden_sizes": [8, 16],
    "depths": [1, 1],
    "num_labels": 10,
}
TRANSFORMERS: dict[str, Callable[[], nn.Module]] = {
    "transformers GPT-2": partial(Named, "GPT2LMHeadModel", "GPT2Config", **_GPT2),
    "transformers BERT": partial(Named, "BertForMaskedLM", "BertConfig", **_BERT, vocab_size=100),
    "transformers ViT": partial(
        Named, "ViTForImageClassification", "ViTConfig", **_BERT, image_size=28, patch_size=7, num_channels=1,
        num_labels=10,
    ),
    "transformers ResNet": partial(Named, "ResNetForImageClassification", "ResNetConfig", **_RESNET),
}  # fmt: skip


def images(size: int) -> Batch:
    """Random images of 28 x 28 and their classes."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size, 1, 28, 28, generator=generator), torch.arange(size) % 10


def texts(size: int, length: int = 24, vocabulary: int = 100) -> Batch:
    """Random words and their successors."""
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(vocabulary, (size, length + 1), generator=generator)
    return words[:, :-1], words[:, 1:]


def loss_of(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy, over places where there are some."""
    return functional.cross_entropy(outputs.reshape(-1, outputs.shape[-1]), targets.reshape(-1))


def train(make: Callable[[], nn.Module], batch: Batch, optimizer: Any, steps: int = 3) -> list[Tensor]:
    """A few steps of a plain loop from weights of a seed; what the state is then, and the losses."""
    torch.manual_seed(3)
    model = make().train()
    step = None if optimizer is None else optimizer(model.parameters())
    losses = []
    for _ in range(steps):
        model.zero_grad()
        loss: Any = loss_of(model(batch[0]), batch[1])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if step is None:
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.data -= 0.1 * parameter.grad
        else:
            step.step()
        losses.append(loss.detach())
    return [*losses, *(each.float() for each in model.state_dict().values())]


def models(small: bool) -> dict[str, Callable[[], list[Tensor]]]:
    """The models by name, each trained."""
    if small:
        return {"small": partial(train, Small, images(4), None)}
    from benchmarks import workloads

    adamw = partial(torch.optim.AdamW, lr=1e-3)
    sgd = partial(torch.optim.SGD, lr=0.01, momentum=0.9)
    rmsprop = partial(torch.optim.RMSprop, lr=1e-3)
    gpt = partial(workloads.gpt_model, layers=2, width=48, heads=3, context=24)
    found = {
        "small": partial(train, Small, images(4), None),
        "mlp, AdamW": partial(train, workloads.mlp_model, images(64), adamw),
        "cnn, SGD": partial(train, workloads.cnn_model, images(16), sgd),
        "cnn, RMSprop": partial(train, workloads.cnn_model, images(16), rmsprop),
        "gpt, AdamW": partial(train, gpt, texts(4), adamw),
        "resnet, SGD": partial(train, partial(resnet, 8, 16), images(8), sgd),
        "lstm, AdamW": partial(train, Recurrent, images(8), adamw),
    }
    for name, make in TRANSFORMERS.items():
        batch = images(4) if name.endswith(("ViT", "ResNet")) else texts(4)
        found[f"{name}, AdamW"] = partial(train, make, batch, adamw)
    return found


# --- speed ----------------------------------------------------------------------------------------


def seconds_of(make: Callable[[], nn.Module], batch: Batch, optimizer: Any, rounds: int) -> float:
    """Median seconds of a step on one thread."""
    torch.manual_seed(3)
    model = make().train()
    step = optimizer(model.parameters())
    times = []
    for _ in range(rounds + 2):
        began = time.perf_counter()
        model.zero_grad()
        loss: Any = loss_of(model(batch[0]), batch[1])
        loss.backward()
        step.step()
        times.append(time.perf_counter() - began)
    return statistics.median(times[2:])


def speed() -> dict[str, float]:
    """Seconds of a step of each workload, named by its model, batch and optimizer."""
    from benchmarks import workloads

    adamw, sgd = partial(torch.optim.AdamW, lr=1e-3), partial(torch.optim.SGD, lr=0.01, momentum=0.9)
    gpt = partial(workloads.gpt_model, layers=4, width=256, heads=4, context=128)
    bert = partial(
        Named, "BertForMaskedLM", "BertConfig", hidden_size=256, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=1024, vocab_size=1000,
    )  # fmt: skip
    return {
        "mlp, batch 128, SGD": seconds_of(workloads.mlp_model, images(128), sgd, 20),
        "mlp, batch 128, AdamW": seconds_of(workloads.mlp_model, images(128), adamw, 20),
        "cnn, batch 64, SGD": seconds_of(workloads.cnn_model, images(64), sgd, 7),
        "gpt of 3.3 M, 8 x 128 tokens, AdamW": seconds_of(gpt, texts(8, 128, 256), adamw, 5),
        "resnet 16-32-64, batch 16, SGD": seconds_of(partial(resnet, 16, 32, 64), images(16), sgd, 5),
        "lstm 28-32, batch 32, AdamW": seconds_of(Recurrent, images(32), adamw, 15),
        "transformers BERT of 3.6 M, 8 x 128 tokens, AdamW": seconds_of(bert, texts(8, 128, 1000), adamw, 5),
    }


def main() -> int:
    """Print what was asked for as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.portable_digests")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--speed", action="store_true")
    options = parser.parse_args()
    with pinned(1, True):
        if options.speed:
            print(json.dumps(speed()))
            return 0
        operators = {name: OPERATORS[name] for name in SMALL} if options.small else {**OPERATORS, **MORE}
        found: dict[str, dict[str, str]] = {}
        for kind, made in (("operators", operators), ("models", models(options.small))):
            for name, compute in made.items():
                print(f"\r{name:<40}", end="", file=sys.stderr, flush=True)
                found.setdefault(kind, {})[name] = digest_of(compute())
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
