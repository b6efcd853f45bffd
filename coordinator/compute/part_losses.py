"""The losses of a batch and of parts of it, as a shard would compute them, and whether they fit together."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from statistics import fmean
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from torchord.cache.errors import InvalidInput
from torchord.cache.ledger.step_metrics import Row
from torchord.cache.tensors.codec import views
from torchord.coordinator.compute import step_metrics
from torchord.coordinator.compute.aligned_chance import AlignedChance
from torchord.coordinator.compute.batch import Batch, formatted, to_device
from torchord.coordinator.compute.buffer_rules import AGREE
from torchord.coordinator.compute.determinism import seed_everything
from torchord.coordinator.compute.gradient import autocast
from torchord.coordinator.compute.part_gradients import require_mean, sampled
from torchord.coordinator.compute.readback import take_gradients
from torchord.coordinator.compute.replica import Replica
from torchord.coordinator.compute.shares import mean_loss
from torchord.coordinator.compute.step_metrics import Part
from torchord.coordinator.compute.weights import checked, given, is_sum, left, loss_of, reads, require_scalar
from torchord.coordinator.spec.config import TrainingConfig
from torchord.coordinator.spec.plan import derive_seed
from torchord.coordinator.spec.resolving import ResolvedRecipe

_ROUNDING = {"fp32": 2e-5, "bf16": 2e-3, "fp16": 2e-3}

Measured = tuple[float, int, float | None]
"""A loss, how many examples it is of, and its weight."""


class CannotLook(Exception):
    """Why the loss of the first batch says nothing about its parts."""


class PartsRaise(CannotLook):
    """Parts as small as those of one shard have no loss."""


@contextmanager
def looking() -> Iterator[None]:
    """What the recipe's code raises here is no reason to stop: the shards that it concerns will say it."""
    try:
        yield
    except (Exception, SystemExit) as error:
        raise CannotLook(f"{type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class Mode:
    """How the loss is computed.

    Attributes:
        training: in training mode, but for dropout and batch normalisation.
        gradients: with a graph, for code that differentiates by itself.
    """

    training: bool = False
    gradients: bool = False


MODES = (Mode(), Mode(gradients=True), Mode(training=True, gradients=True))


class PartLosses:
    """Some examples, and the losses of parts of them.

    Args:
        replica: what computes them; nothing else may need it.
        batch_of: (numbers of some of the examples, in order) -> their batch, fresh each time.
        examples: how many there are.

    Attributes:
        all: the examples' numbers.
        mode: how losses are computed.
        chance: what lets an example draw the same in every batch; None: as it comes.
        rounding: how far losses may be apart, as a part of them, whose order of additions differs.
        measures: whether anything was measured beside a loss.
    """

    def __init__(
        self,
        replica: Replica,
        resolved: ResolvedRecipe,
        config: TrainingConfig,
        batch_of: Callable[[list[int]], Batch],
        examples: int,
    ) -> None:
        self._replica = replica
        self._resolved = resolved
        self._config = config
        self._batch_of = batch_of
        self.all = list(range(examples))
        self.rounding = _ROUNDING[config.precision]
        self.mode = MODES[0]
        self.chance: AlignedChance | None = None
        self._still = list(_of_batches(replica))
        self._metrics: dict[str, Row] | None = None  # of the loss before
        self.measures = False

    def _traced(self, examples: list[int]) -> tuple[Measured, dict[str, Tensor]]:
        """The loss of some examples, and elements of their gradient."""
        try:
            with looking():
                measured = self._computed(examples, 0, backward=True)
                return measured, sampled(take_gradients(self._replica))
        finally:
            self._replica.model.zero_grad(set_to_none=True)

    def compare_gradients(self, sizes: Sequence[int]) -> None:
        """Compare the gradient of all examples with those of their parts.

        Raises:
            InvalidInput: it is not put together from them.
        """
        _, whole = self._traced(self.all)
        _, reordered = self._traced(self.all[::-1])
        parts, start = [], 0
        for size in sizes:
            parts.append(self._traced(self.all[start : start + size]))
            start += size
        counts = [float(count if weight is None else weight) for (_, count, weight), _ in parts]
        if is_sum(self._resolved):
            counts, total = [1.0] * len(counts), 1.0
        elif not (total := math.fsum(counts)):
            return
        shares = [(found, count / total) for (_, found), count in zip(parts, counts, strict=True) if count]
        require_mean(whole, reordered, shares, self._config.precision)

    # --- one loss ---------------------------------------------------------------------------

    def first(self) -> float:
        """The loss of all examples, in the first mode in which the model gives one."""
        reason = ""
        for self.mode in MODES:
            try:
                found, _, weight = self._measure(self.all, 0)
            except CannotLook as error:
                reason = reason or str(error)
                continue
            if not math.isfinite(found) or weight == 0:
                raise CannotLook(f"that of its first examples is {math.nan if weight == 0 else found}")
            return found
        raise CannotLook(reason)

    def loss(self, examples: list[int], draw: int = 0) -> float:
        """The loss of some examples, in a draw of all random numbers."""
        return self._measure(examples, draw)[0]

    def measured(self, examples: list[int], draw: int = 0) -> Part:
        """What some examples measure beside their loss, in a draw of all random numbers."""
        _, count, weight = self._measure(examples, draw)
        return self._metrics, count, weight

    def draws(self) -> bool:
        """Whether the loss of all examples is made with random numbers."""
        self.loss(self.all)
        return moved(derive_seed(self._config.seed, "probe", 0), self._replica.device)

    def parts(self, sizes: Sequence[int], draw: int = 0) -> list[Measured]:
        """What the parts of all examples have, one after the other.

        Raises:
            PartsRaise: one of them has no loss.
        """
        found, start = [], 0
        for size in sizes:
            try:
                found.append(self._measure(self.all[start : start + size], draw))
            except CannotLook as error:
                raise PartsRaise(str(error)) from error
            start += size
        return found

    def _measure(self, examples: list[int], draw: int) -> Measured:
        with looking():
            return self._computed(examples, draw)

    def _computed(self, examples: list[int], draw: int, *, backward: bool = False) -> Measured:
        replica, config, seed = self._replica, self._config, derive_seed(self._config.seed, "probe", draw)
        seed_everything(seed)
        read = self._batch_of(examples)
        self._metrics = None
        if read.kept == 0:
            return 0.0, len(examples), None if is_sum(self._resolved) else 0.0
        batch = formatted(to_device(read.value, replica.device), config)
        replica.reset_buffers()
        model = replica.eval()
        if self.mode.training:
            replica.train()
            for module in self._still:
                module.training = False
        said = given(self._resolved, batch)
        replica.watch.begin(whole=True)  # what a forward may not change is the shard's to say
        seed_everything(seed)
        with nullcontext() if self.chance is None else self.chance.drawn(examples):
            with torch.set_grad_enabled(self.mode.gradients), autocast(config, replica.device):
                loss, weight, _, terms = loss_of(
                    self._resolved, model, batch, said, reads=reads(self._resolved, config)
                )
            require_scalar(loss)
            if backward:
                loss.backward()
        replica.watch.end()
        self._metrics = step_metrics.read(terms, [float(each) for each in step_metrics.figures(terms)])
        self.measures = self.measures or self._metrics is not None
        weight = left(self._resolved, weight, read.kept)
        self.rounding = max(self.rounding, 8 * torch.finfo(loss.dtype).eps)
        value, count = float(loss.detach()), len(examples)
        if weight is not None:
            weight = checked(float(weight), count, f"a part of the first batch, of {count} examples,")
        return 0.0 if weight == 0 else value, count, weight

    @torch.no_grad()
    def draw_zeros(self) -> bool:
        """Put random values in the place of trained matrices that are zero; whether there are any."""
        replica = self._replica
        trained = ((name, p) for name, p in replica.parameters.items() if p.requires_grad)
        zero = [name for name, p in trained if p.dim() > 1 and p.numel() and not p.any()]
        if zero:
            seed_everything(derive_seed(self._config.seed, "probe", "parameters"))
            flat = replica.pack()
            values = views(flat, replica.manifest)
            for name in zero:
                values[name].copy_(torch.randn(values[name].shape) / math.sqrt(values[name][0].numel()))
            replica.load(flat)
        return bool(zero)

    # --- two losses -------------------------------------------------------------------------

    def joined(self, parts: Sequence[Measured]) -> float:
        """What the parts' losses come to for all examples."""
        if is_sum(self._resolved):
            return math.fsum(loss for loss, _, _ in parts)
        return mean_loss(parts)

    def apart(self, one: float, other: float, scale: float = 0.0) -> float:
        """How far two losses are apart, as a part of the larger one; infinite if one is not finite."""
        if not (math.isfinite(one) and math.isfinite(other)):
            return math.inf
        return abs(one - other) / max(abs(one), abs(other), scale, 1e-30)

    def refuse_beyond(
        self, allowed: float, whole: float, sizes: Sequence[int], parts: Sequence[Measured]
    ) -> None:
        """Refuse parts whose losses come to another than the whole's.

        Raises:
            InvalidInput: they are further apart than what is allowed, as a part of them.
        """
        if self.apart(whole, self.joined(parts), scale_of(parts)) > allowed:
            self.refuse(allowed, whole, sizes, parts)

    def refuse(
        self, allowed: float, whole: float, sizes: Sequence[int], parts: Sequence[Measured]
    ) -> NoReturn:
        """Say that whole and parts do not fit together, and the ways out.

        Raises:
            InvalidInput: always.
        """
        joined, scale = self.joined(parts), scale_of(parts)
        total = math.fsum(loss for loss, _, _ in parts)
        summed = not is_sum(self._resolved) and self.apart(whole, total, scale) <= allowed
        by = "weights" if any(weight is not None for _, _, weight in parts) else "examples"
        which = "sum of its parts' losses"
        if not is_sum(self._resolved):
            which = f"mean of its parts' losses, weighed by their {by}"
        raise InvalidInput(
            f"the loss of a batch is not the {which}: that of the first "
            f"{len(self.all)} examples is {whole:.6g}, and in parts of {', '.join(map(str, sizes))} it "
            f"comes to {joined:.6g}, so no step would be that of the whole batch; "
            f"{_SUM if summed else _WAYS_OUT}"
        )


def moved(seed: int, device: torch.device) -> bool:
    """Whether the process's generators have given something since they were seeded; they are seeded anew."""

    def following() -> tuple[float, ...]:
        places = {torch.device("cpu"), device}
        return (*(float(torch.rand((), device=each)) for each in places), np.random.rand(), random.random())

    after = following()
    seed_everything(seed)
    return after != following()


def scale_of(parts: Sequence[Measured]) -> float:
    """How large the parts' losses are, whatever their signs."""
    return sum(abs(loss) for loss, _, _ in parts) / len(parts)


def averaged(found: Sequence[tuple[float, Sequence[Measured]]]) -> tuple[float, list[Measured]]:
    """The mean over several draws: of the whole, and of each part, with its count and weight of the first."""
    parts = zip(*(each for _, each in found), strict=True)
    mean = [(fmean(loss for loss, _, _ in each), *each[0][1:]) for each in parts]
    return fmean(whole for whole, _ in found), mean


_WAYS_OUT = (
    "give Recipe(weight=...), which says what a shard's loss is a mean over (its labelled tokens, say), or "
    "return (sum, weight) in the loss's place, or declare with Recipe(loss_over='shard') that the loss "
    "within each shard is what you mean"
)
_SUM = (
    "it is their sum: declare that with Recipe(loss_over='sum'), or return (sum, weight) in the loss's "
    "place, or take the mean over the examples"
)


def _of_batches(replica: Replica) -> Iterator[nn.Module]:
    """The modules that are random in training mode, or whose shards' statistics have a rule to join them."""
    ruled = {name.rpartition(".")[0] for name, rule in replica.rules.items() if rule != AGREE}
    for path, module in replica.model.named_modules():
        if path in ruled or isinstance(module, (_BatchNorm, _DropoutNd)):
            yield module
