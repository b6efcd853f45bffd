"""The workloads that the benchmarks train: importable callables, as a recipe needs them.

| name | model | global batch |
| --- | --- | --- |
| noop | a linear map of two inputs: all that is left of a step is what the queue costs | K examples |
| small | 784-128-10, ReLU: gradients of 0.4 MB | K examples |
| mlp | 784-512-512-10, ReLU | 256 |
| cnn | conv 1-32-64 (3x3, padded, ReLU, 2x2 max pool each), 3136-128-10 | 256 |
| gpt | 6 layers, width 384, 6 heads, context 128, vocabulary 256 | 16 sequences |
| gpt100 | the same with 14 layers, width 768, 12 heads, context 256: 99.6 million parameters | 16 sequences |
| gpt-tiny | the same with 1 layer, width 32, 2 heads, context 16: to try a script out | 4 sequences |

Data are synthetic, of the real shapes: the figures are about speed, not accuracy.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from torchord import Recipe


def noop_model() -> nn.Module:
    """The smallest model that has a gradient."""
    return nn.Linear(2, 1)


def noop_data(size: int) -> TensorDataset:
    """Zeros, `size` examples."""
    return TensorDataset(torch.zeros(size, 2), torch.zeros(size, 1))


def small_model() -> nn.Module:
    """784-128-10: 0.1 million parameters."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))


def mlp_model() -> nn.Module:
    """784-512-512-10."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    )


def cnn_model() -> nn.Module:
    """conv 1-32-64, then 3136-128-10."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(3136, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


def images(size: int, seed: int = 0) -> TensorDataset:
    """Random 28x28 images of ten classes, fixed by the seed."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(size, 1, 28, 28, generator=generator)
    return TensorDataset(pixels, torch.randint(0, 10, (size,), generator=generator))


class Block(nn.Module):
    """A pre-norm transformer block with causal attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first = nn.LayerNorm(width)
        self.attention = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        self.second = nn.LayerNorm(width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, time, width) to the same."""
        batch, time, width = x.shape
        q, k, v = self.attention(self.first(x)).view(batch, time, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        heads = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.mix(heads.transpose(1, 2).reshape(batch, time, width))
        return x + self.feed(self.second(x))


class Gpt(nn.Module):
    """A small GPT over bytes; the output layer shares the embedding's weights."""

    def __init__(self, layers: int, width: int, heads: int, context: int, vocabulary: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.places = nn.Parameter(torch.zeros(context, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, vocabulary, bias=False)
        self.out.weight = self.tokens.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(batch, time) of token numbers to (batch, time, vocabulary)."""
        x = self.tokens(tokens) + self.places[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.out(self.norm(x))


def gpt_model(layers: int = 6, width: int = 384, heads: int = 6, context: int = 128) -> nn.Module:
    """10.7 M parameters with the defaults."""
    return Gpt(layers, width, heads, context, 256)


def sequences(size: int, context: int = 128, seed: int = 0) -> TensorDataset:
    """Random byte sequences and their successors."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(0, 256, (size, context + 1), generator=generator)
    return TensorDataset(text[:, :-1].contiguous(), text[:, 1:].contiguous())


def next_token_loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy over all places."""
    return functional.cross_entropy(outputs.flatten(0, 1), targets.flatten())


SGD = partial(torch.optim.SGD, lr=0.01, momentum=0.9)


def recipe(name: str, *, examples: int) -> Recipe:
    """The recipe of one workload over `examples` examples.

    Raises:
        KeyError: for an unknown name.
    """
    cross_entropy = functional.cross_entropy
    made = {
        "noop": lambda: Recipe(
            model=noop_model,
            dataset=partial(noop_data, size=examples),
            loss=functional.mse_loss,
            optimizer=partial(torch.optim.SGD, lr=0.01),
        ),
        "small": lambda: Recipe(
            model=small_model, dataset=partial(images, size=examples), loss=cross_entropy, optimizer=SGD
        ),
        "mlp": lambda: Recipe(
            model=mlp_model, dataset=partial(images, size=examples), loss=cross_entropy, optimizer=SGD
        ),
        "cnn": lambda: Recipe(
            model=cnn_model, dataset=partial(images, size=examples), loss=cross_entropy, optimizer=SGD
        ),
        "gpt": lambda: Recipe(
            model=gpt_model, dataset=partial(sequences, size=examples), loss=next_token_loss, optimizer=SGD
        ),
        "gpt100": lambda: Recipe(
            model=partial(gpt_model, layers=14, width=768, heads=12, context=256),
            dataset=partial(sequences, size=examples, context=256), loss=next_token_loss, optimizer=SGD,
        ),
        "gpt-tiny": lambda: Recipe(
            model=partial(gpt_model, layers=1, width=32, heads=2, context=16),
            dataset=partial(sequences, size=examples, context=16), loss=next_token_loss, optimizer=SGD,
        ),
    }  # fmt: skip
    return made[name]()


BATCH = {"mlp": 256, "cnn": 256, "gpt": 16, "gpt100": 16, "gpt-tiny": 4}
