"""A grammar of small models, with everything that people put into them, and what each part is entitled to.

A `Sentence` is a recipe and a config in words. What its words are entitled to is stated with them: a word
that may be refused names the sentence that refuses it, a word that makes a shard see its own examples
(BatchNorm, dropout) is compared with a loop over shards instead of one over whole batches.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.data import TensorDataset

from tests.support import recipes_optim
from torchord import Recipe, TrainingConfig
from torchord.coordinator.averages import ema, swa
from torchord.coordinator.spec.plan import Plan

FEATURES, WIDTH, CLASSES = 5, 6, 3


@dataclass(frozen=True)
class Word:
    """What a part of a sentence is entitled to.

    Attributes:
        refusals: patterns of the sentences that may refuse it; empty: it must train.
        batch: whether one batch is what its shards are together, so that it is compared with the loop
            over whole batches.
        shards: whether the loop over shards of `tests.support.reference` knows it.
    """

    refusals: tuple[str, ...] = ()
    batch: bool = True
    shards: bool = True


PLAIN = Word()


# --- layers -----------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.inner(hidden).tanh()


class Tied(nn.Module):
    """Two layers with one weight, and one that is its transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.two.weight = self.one.weight

    def forward(self, hidden: Tensor) -> Tensor:
        return self.two(self.one(hidden).tanh()).tanh() @ self.one.weight


class Odd(nn.Module):
    """Parameters of odd shapes: a scalar, an empty one, one that is not row-major, one that nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.nothing = nn.Parameter(torch.empty(0, 3))
        self.columns = nn.Parameter(torch.randn(WIDTH, WIDTH).t())
        self.unused = nn.Parameter(torch.randn(2))

    def forward(self, hidden: Tensor) -> Tensor:
        return (hidden @ self.columns * self.scale).tanh() + self.nothing.sum()


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.still = nn.Linear(WIDTH, WIDTH).requires_grad_(False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.still(hidden).tanh()


class Embedded(nn.Module):
    """Looks a bin of the first number up."""

    def __init__(self, limit: float | None = None) -> None:
        super().__init__()
        self.table = nn.Embedding(4, WIDTH, max_norm=limit)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.table((hidden[:, 0].detach().tanh() * 2 + 2).long().clamp(0, 3))


class Shared(nn.Module):
    """Two parameters on one memory, the one the transpose of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.randn(WIDTH, WIDTH, dtype=torch.float64) * 0.3)
        self.two = nn.Parameter(self.one.data.t())

    def forward(self, hidden: Tensor) -> Tensor:
        return (hidden @ self.one).tanh() @ self.two


class Complex(nn.Module):
    """A filter with a complex weight."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(WIDTH // 2 + 1, dtype=torch.complex128))

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.fft.irfft(torch.fft.rfft(hidden) * self.filter, n=WIDTH)


class Sometimes(nn.Module):
    """A layer that a shard uses or not, by its own examples."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.inner(hidden) if bool(hidden.detach().mean() > 0) else hidden


class Fixed(nn.Module):
    """A BatchNorm that stays in evaluation mode, by an overridden train()."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)
        self.norm.running_mean.normal_()
        self.norm.eval()

    def train(self, mode: bool = True) -> Fixed:
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden)


class Trains(nn.Module):
    """Adds a constant in training only."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + 0.5 if self.training else hidden


class Buffered(nn.Module):
    """Keeps something beside its parameters: `kind` says what. Its output is its input."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        if kind == "late":
            self.register_buffer("kept", None)
        elif kind == "constant":
            self.register_buffer("kept", torch.arange(3.0), persistent=False)
        elif kind == "counter":
            self.register_buffer("kept", torch.zeros((), dtype=torch.int64))
        elif kind == "flag":
            self.register_buffer("kept", torch.zeros((), dtype=torch.bool))
        elif kind == "expanded":
            self.register_buffer("kept", torch.ones(1, WIDTH).expand(3, WIDTH))
        elif kind == "count":
            self.register_buffer("kept", torch.zeros((), dtype=torch.int64))
        elif kind in ("mean", "queue"):
            self.register_buffer("kept", torch.zeros(WIDTH) if kind == "mean" else torch.zeros(8, WIDTH))
            self.register_buffer("place", torch.zeros((), dtype=torch.int64))

    def forward(self, hidden: Tensor) -> Tensor:
        if self.kind == "constant":
            return hidden + self.kept[1]
        if self.kind == "expanded":
            return hidden * self.kept[0]
        if not self.training:
            return hidden
        with torch.no_grad():
            if self.kind == "counter":
                self.kept += 1
            elif self.kind == "count":
                self.kept += len(hidden)
            elif self.kind == "flag":
                self.kept |= True
            elif self.kind == "mean":
                self.kept.mul_(0.9).add_(hidden.mean(0), alpha=0.1)
            elif self.kind == "late":
                self.kept = hidden.mean(0)
            elif self.kind == "queue":
                rows = (torch.arange(len(hidden)) + self.place) % 8
                self.kept[rows] = F.normalize(hidden, dim=1)
                self.place.add_(len(hidden)).remainder_(8)
        return hidden


class Writing(nn.Module):
    """A linear layer that bounds its weight in the forward, in one of the ways that are in use."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.way = way

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.no_grad():
            bounded = torch.renorm(self.inner.weight, 2, 0, 0.3)
            if self.way == "copy":
                self.inner.weight.copy_(bounded)
            elif self.way == "data":
                self.inner.weight.data.copy_(bounded)
            else:
                self.inner.weight.data = bounded
        return self.inner(hidden)


class Remembering(nn.Module):
    """A plain attribute that changes the output: the process's, not the version's."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, hidden: Tensor) -> Tensor:
        self.calls += 1
        return hidden * (1.0 + 0.1 * (self.calls % 7))


BUFFERS = ("constant", "expanded", "counter", "flag", "count", "mean", "late", "queue")
RULED = {"count": "sum", "mean": "mean", "queue": "shard0"}
"""Buffers that each batch enters, and a rule for them."""
MAKES: dict[str, Any] = {
    "linear": partial(nn.Linear, WIDTH, WIDTH),
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "layernorm": partial(nn.LayerNorm, WIDTH),
    "batchnorm": partial(nn.BatchNorm1d, WIDTH),
    "batchnorm without running statistics": partial(nn.BatchNorm1d, WIDTH, track_running_stats=False),
    "dropout": partial(nn.Dropout, 0.3),
    "residual": Residual,
    "tied": Tied,
    "odd": Odd,
    "frozen": Frozen,
    "embedding": Embedded,
    "embedding with a bound": partial(Embedded, 0.2),
    "sometimes": Sometimes,
    "fixed batchnorm": Fixed,
    "in training only": Trains,
    "shared": Shared,
    "complex": Complex,
    **{f"{kind} buffer": partial(Buffered, kind) for kind in BUFFERS},
    **{f"{kind} buffer with a rule": partial(Buffered, kind) for kind in RULED},
    **{f"writes by {way}": partial(Writing, way) for way in ("copy", "data", "assignment")},
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)),
    "remembers": Remembering,
}
_SHARDWISE = Word(batch=False)
_NORMED = Word((r"a BatchNorm cannot train on a shard of one example",), batch=False)
_WRITES = Word(
    (r"the forward wrote to the trained parameter 'blocks\.\d+\.(inner|table)\.weight'",), False, False
)
_LATE = Word((r"the forward made the buffer 'blocks\.\d+\.kept'",), False, False)
_UNRULED = Word((r"the forward changes 'blocks\.\d+\.(kept|place)' .* give it a rule, Recipe\(buffers=",))
LAYERS: dict[str, Word] = {
    **dict.fromkeys(("linear", "tanh", "gelu", "layernorm", "residual", "tied", "odd", "frozen"), PLAIN),
    **dict.fromkeys(
        ("embedding", "fixed batchnorm", "in training only", "weight norm", "spectral norm"), PLAIN
    ),
    **dict.fromkeys(
        ("constant buffer", "expanded buffer", "counter buffer", "flag buffer", "complex"), PLAIN
    ),
    **dict.fromkeys(("count buffer with a rule", "mean buffer with a rule"), Word(shards=False)),
    "queue buffer with a rule": Word((_UNRULED.refusals), batch=False, shards=False),
    "shared": Word((r"share memory",)),
    **dict.fromkeys(("batchnorm", "batchnorm without running statistics"), _NORMED),
    "dropout": _SHARDWISE,
    "sometimes": Word((r"loss_over=",), batch=False),
}
UNRULED = dict.fromkeys(("count buffer", "mean buffer", "queue buffer"), _UNRULED)
"""Layers that train with one shard only."""
REFUSED: dict[str, Word] = {
    **dict.fromkeys(("writes by copy", "writes by data", "writes by assignment"), _WRITES),
    "embedding with a bound": _WRITES,
    "late buffer": _LATE,
    "remembers": Word((r"is not pure: .*computed .*once more",), False, False),
}
"""Layers that no sentence with them may train."""


class Net(nn.Module):
    """Layers in a row between two linear ones."""

    def __init__(self, blocks: list[str]) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, WIDTH)
        self.blocks = nn.ModuleList(MAKES[block]() for block in blocks)
        self.last = nn.Linear(WIDTH, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs.to(self.first.weight.dtype))
        for block in self.blocks:
            hidden = block(hidden)
        return self.last(hidden)


def net(blocks: list[str]) -> nn.Module:
    """The model of a sentence, in float64: what rounds otherwise is then far below what goes wrong."""
    return Net(blocks).double()


# --- losses, optimizers, schedulers -------------------------------------------------------


def data(size: int) -> TensorDataset:
    """Points and their classes."""
    drawn = torch.Generator().manual_seed(size)
    inputs = torch.randn(size, FEATURES, generator=drawn, dtype=torch.float64)
    classes = torch.tensor([0, 0, 2, 2, 2, 1])[torch.randint(6, (size,), generator=drawn)]
    return TensorDataset(inputs, classes)


def backwards(size: int, epoch: int) -> list[int]:
    """From the last example to the first, the epoch-th one twice."""
    return [*range(size - 1, -1, -1), epoch % size]


def uneven(size: int, epoch: int) -> list[list[int]]:
    """Batches of three and two examples in turns, more of them in the second epoch."""
    places = [*range(size), *range(epoch)]
    cuts = [0]
    while cuts[-1] < len(places):
        cuts.append(cuts[-1] + 3 - len(cuts) % 2)
    return [places[start:stop] for start, stop in pairwise(cuts) if places[start:stop]]


ORDERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "shuffled": ({}, {}),
    "in order": ({}, {"shuffle": False}),
    "without the last": ({}, {"drop_last": True}),
    "backwards": ({"order": backwards}, {}),
    "uneven batches": ({"batches": uneven}, {}),
}


def squared(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - F.one_hot(targets, CLASSES)).square().mean()


def stepped(model: nn.Module, batch: list[Tensor]) -> Tensor:
    """A loss of two parts, by a step."""
    inputs, targets = batch
    outputs = model(inputs)
    return F.cross_entropy(outputs, targets) + 0.01 * outputs.square().mean()


def balanced(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, weight=torch.tensor([1.0, 5.0, 0.2]).to(outputs))


def each_and_mask(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return F.cross_entropy(outputs, targets, reduction="none").square(), (targets != 1).to(outputs)


def masked(outputs: Tensor, targets: Tensor) -> Tensor:
    each, mask = each_and_mask(outputs, targets)
    return (each * mask).sum() / mask.sum()


def masked_pair(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    each, mask = each_and_mask(outputs, targets)
    return (each * mask).sum(), mask.sum()


def mask_weight(targets: Tensor) -> Tensor:
    return (targets != 1).sum()


def contrasted(outputs: Tensor, targets: Tensor) -> Tensor:
    """Each example against the others of its batch."""
    normal = F.normalize(outputs, dim=1)
    return F.cross_entropy(normal @ normal.t() * 5, torch.arange(len(outputs)))


PROBED = frozenset({"mask", "contrast"})
"""Losses that the probe refuses where there are several shards."""
_NAN = r"has loss nan and gradient norm"
_PROBED = r"loss_over="
LOSSES: dict[str, tuple[dict[str, Any], Word]] = {
    "cross entropy": ({"loss": F.cross_entropy}, PLAIN),
    "label smoothing": ({"loss": partial(F.cross_entropy, label_smoothing=0.1)}, PLAIN),
    "squares": ({"loss": squared}, PLAIN),
    "step": ({"step": stepped}, PLAIN),
    "ignored labels": ({"loss": partial(F.cross_entropy, ignore_index=1)}, Word((_NAN,), shards=False)),
    "class weights": ({"loss": balanced}, Word(shards=False)),
    "sum": ({"loss": partial(F.cross_entropy, reduction="sum")}, Word(shards=False)),
    "mask": ({"loss": masked}, Word((_NAN, _PROBED), shards=False)),
    "mask and its weight": ({"loss": masked, "weight": mask_weight}, Word((_NAN,), shards=False)),
    "mask as a pair": ({"loss": masked_pair}, Word((_NAN,), shards=False)),
    "contrast": ({"loss": contrasted}, Word((_PROBED,), shards=False)),
    "contrast in a shard": ({"loss": contrasted, "loss_over": "shard"}, Word(batch=False)),
}


def two_groups(model: nn.Module) -> list[dict[str, Any]]:
    """The last layer at another rate, without decay."""
    last = list(model.last.parameters())  # type: ignore[union-attr, operator]
    held = {id(parameter) for parameter in last}
    return [{"params": [p for p in model.parameters() if id(p) not in held]},
            {"params": last, "lr": 0.02, "weight_decay": 0.0}]  # fmt: skip


_OPTIM = torch.optim
_TORCHS_OWN = r"LBFGS doesn't support per-parameter options .*raised while making the optimizer"
OPTIMIZERS: dict[str, tuple[Any, Word]] = {
    "sgd": (partial(_OPTIM.SGD, lr=0.1), PLAIN),
    "momentum": (partial(_OPTIM.SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01), PLAIN),
    "adam": (partial(_OPTIM.Adam, lr=0.01, eps=1e-3), PLAIN),
    "adamw": (partial(_OPTIM.AdamW, lr=0.01, eps=1e-3, amsgrad=True), PLAIN),
    "rmsprop": (partial(_OPTIM.RMSprop, lr=0.01, eps=1e-3, momentum=0.5), PLAIN),
    "adagrad": (partial(_OPTIM.Adagrad, lr=0.05, eps=1e-3), PLAIN),
    "nadam": (partial(_OPTIM.NAdam, lr=0.01, eps=1e-3), PLAIN),
    "asgd": (partial(_OPTIM.ASGD, lr=0.05), PLAIN),
}
REFUSED_OPTIMIZERS: dict[str, tuple[Any, Word]] = {
    "lbfgs": (
        _OPTIM.LBFGS,
        Word((r"LBFGS evaluates the loss several times .* use an optimizer", _TORCHS_OWN)),
    ),
    "two": (recipes_optim.two, Word((r"returned several optimizers .* give one",))),
}
SCHEDULERS: dict[str, Any] = {
    "none": None,
    "steps": partial(lr_scheduler.StepLR, step_size=2, gamma=0.5),
    "cosine": partial(lr_scheduler.CosineAnnealingLR, T_max=5),
    "one cycle": partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=60, cycle_momentum=False),
    "plateau": partial(lr_scheduler.ReduceLROnPlateau, patience=0, factor=0.5),
}
AVERAGES: dict[str, Any] = {
    "none": None,
    "ema": partial(ema, decay=0.7),
    "swa": partial(swa, start=2),
}
RULES: dict[str, Any] = {"none": None, "each": partial(recipes_optim.clip_each, limit=0.1)}


# --- sentences --------------------------------------------------------------------------


@dataclass(frozen=True)
class Sentence:
    """A recipe and a config in words."""

    blocks: tuple[str, ...]
    loss: str
    optimizer: str
    scheduler: str
    groups: bool
    average: str
    gradients: str
    clip_norm: float | None
    size: int
    batch_size: int
    shards: int
    fan_in: int
    order: str
    mode: str
    seed: int

    def recipe(self) -> Recipe:
        """The recipe that it means."""
        return Recipe(
            model=partial(net, blocks=list(self.blocks)),
            dataset=partial(data, size=self.size),
            optimizer=(OPTIMIZERS | REFUSED_OPTIMIZERS)[self.optimizer][0],
            scheduler=SCHEDULERS[self.scheduler],
            parameter_groups=two_groups if self.groups else None,
            average=AVERAGES[self.average],
            gradients=RULES[self.gradients],
            buffers=self.buffers() or None,
            **LOSSES[self.loss][0],
            **ORDERS[self.order][0],
        )

    def config(self) -> TrainingConfig:
        """The config that it means."""
        return TrainingConfig(
            epochs=2,
            batch_size=self.batch_size,
            shards=self.shards,
            fan_in=self.fan_in,
            seed=self.seed,
            clip_norm=self.clip_norm,
            checkpoint_every=1 + self.seed % 3,
            **MODES[self.mode],
            **ORDERS[self.order][1],
        )

    def buffers(self) -> dict[str, str]:
        """The rules of its buffers."""
        kinds = {
            number: block.partition(" ")[0]
            for number, block in enumerate(self.blocks)
            if block.endswith("a rule")
        }
        found = {f"blocks.{number}.kept": RULED[kind] for number, kind in kinds.items()}
        return found | {
            f"blocks.{number}.place": "shard0" for number, kind in kinds.items() if kind == "queue"
        }

    def batches(self) -> list[list[int]]:
        """The global batches of a plain loop, in the order of the steps."""
        found: list[list[int]] = []
        size, batch = self.size, self.batch_size
        if self.mode == "local steps":
            plan = Plan(size, self.config())
            return [
                [int(i) for i in part] for step in range(plan.total_steps) for part in plan.parts(step, 0)
            ]
        for epoch in range(2):
            if self.order == "uneven batches":
                found += uneven(size, epoch)
                continue
            if self.order in ("shuffled", "without the last"):
                plan = Plan(size, self.config())
                steps = range(epoch * plan.total_steps // 2, (epoch + 1) * plan.total_steps // 2)
                places = [
                    int(i)
                    for step in steps
                    for shard in range(plan.shards_in(step))
                    for i in plan.indices(step, shard)
                ]
            else:
                places = list(range(size)) if self.order == "in order" else backwards(size, epoch)
            cut = [places[start : start + batch] for start in range(0, len(places), batch)]
            found += cut
        return found

    @property
    def words(self) -> list[Word]:
        """What its parts are entitled to."""
        layers, optimizers = LAYERS | UNRULED | REFUSED, OPTIMIZERS | REFUSED_OPTIMIZERS
        blocks = [layers[block] for block in self.blocks]
        return [*blocks, LOSSES[self.loss][1], optimizers[self.optimizer][1]]

    def refused_by(self, error: str) -> str | None:
        """The sentence, among those that its words are entitled to be refused with, that an error is."""
        stated = [pattern for word in self.words for pattern in word.refusals]
        if self.mode == "local steps":  # a shard's last round is shorter
            stated += _UNRULED.refusals
        return next((pattern for pattern in stated if re.search(pattern, error)), None)

    @property
    def must_be_refused(self) -> bool:
        """Whether one of its words can be trained by nobody but a plain loop."""
        return self.optimizer in REFUSED_OPTIMIZERS or any(block in REFUSED for block in self.blocks)

    @property
    def batchwise(self) -> bool:
        """Whether it is a plain loop over whole batches; local steps of one shard are one, too."""
        one_shard = self.mode == "local steps" and self.shards == 1 and not ORDERS[self.order][0]
        alone = one_shard and self.average == "none" == self.scheduler and LOSSES[self.loss][1].shards
        return (self.mode == "plain" or alone) and all(word.batch for word in self.words)

    @property
    def shardwise(self) -> bool:
        """Whether the loop over shards knows all of it."""
        plain = self.mode == "plain" and self.average == "none" == self.gradients
        plain = plain and not ORDERS[self.order][0]
        return plain and all(word.shards for word in self.words)


MODES: dict[str, Mapping[str, Any]] = {
    "plain": {},
    "local steps": {"local_steps": 2},
    "stale": {"staleness": 1},
    "compressed": {"compression": "int8"},
    "compressed parameters": {"parameter_compression": "int8"},
}


def often(*values: Any, rare: list[Any]) -> st.SearchStrategy[Any]:
    """One of `values` mostly, one time in ten one of the rare ones."""
    return st.integers(0, 9).flatmap(lambda drawn: st.sampled_from(rare if drawn == 7 else values))


SENTENCES = st.builds(
    Sentence,
    blocks=st.tuples(
        st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=4),
        often((), rare=[(name,) for name in sorted(UNRULED | REFUSED)]),
    ).map(lambda drawn: (*drawn[0], *drawn[1])),
    loss=often("cross entropy", *sorted(LOSSES.keys() - PROBED), "step", "squares", rare=sorted(PROBED)),
    optimizer=often(*sorted(OPTIMIZERS), rare=sorted(REFUSED_OPTIMIZERS)),
    scheduler=often("none", rare=sorted(SCHEDULERS)),
    groups=st.booleans(),
    average=often("none", rare=sorted(AVERAGES)),
    gradients=often("none", rare=sorted(RULES)),
    clip_norm=st.sampled_from([None, None, 0.5]),
    size=st.integers(8, 16),
    batch_size=st.integers(2, 6),
    shards=st.integers(1, 4),
    fan_in=st.sampled_from([2, 8]),
    order=often("shuffled", rare=sorted(ORDERS)),
    mode=often("plain", rare=sorted(MODES)),
    seed=st.integers(0, 3),
)
