"""Whether a recipe's shards add up to its batches, tried once, on a run's first examples.

The step of a whole batch can be put together from its shards if the batch's loss is the mean of its parts'
losses, each weighed by what it is a mean over (`torchord.coordinator.compute.weights`). That holds for any
batch, at any parameters, for any split, so a few are looked at, by each of the first shards with its own
examples: in evaluation mode and without gradients, their loss together against the losses of parts of them,
even ones and lopsided ones, since parts that happen to have equally many tokens would show nothing. The
samples are read once, and collated for each part from copies.

The loss is looked at in training mode, too, without dropout and with running statistics as they are, if it
is another there (a term that is added in training alone). So are the gradients, or in evaluation mode where
training is random: see `torchord.coordinator.compute.part_gradients`.

What may differ by rounding is measured: the same samples in other orders. A loss that draws random numbers is
computed several times, and refused only where chance cannot explain what is seen. Parameters that are all
zero, as a last layer's may be at first, would make all examples alike: then it is looked a second time with
random ones in their place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from statistics import fmean, variance
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm

from torchord.cache.errors import InvalidInput
from torchord.cache.tensors.codec import views
from torchord.coordinator.compute.batch import Batch, formatted, read_samples, to_device
from torchord.coordinator.compute.buffer_rules import AGREE
from torchord.coordinator.compute.determinism import pinned, seed_everything
from torchord.coordinator.compute.gradient import autocast
from torchord.coordinator.compute.part_gradients import require_mean, sampled
from torchord.coordinator.compute.readback import take_gradients
from torchord.coordinator.compute.replica import Replica
from torchord.coordinator.compute.shares import mean_loss
from torchord.coordinator.compute.weights import checked, given, is_sum, left, loss_of, reads, require_scalar
from torchord.coordinator.spec.config import TrainingConfig
from torchord.coordinator.spec.plan import Plan, derive_seed
from torchord.coordinator.spec.resolving import ResolvedRecipe

_SHARDS = 4
_LEAST_EXAMPLES = 2
_MOST_PARTS = 4
_DRAWS = 16
_ROUNDING = {"fp32": 2e-5, "bf16": 2e-3, "fp16": 2e-3}
_TIMES_ROUNDING = 20
_TIMES_CHANCE = 6  # standard errors

_Measured = tuple[float, int, float | None]  # loss, examples, weight


class _CannotLook(Exception):
    """Why the loss of the first batch says nothing about its parts."""


def due(resolved: ResolvedRecipe, plan: Plan, step: int, shard: int) -> bool:
    """Whether a recipe is to be tried with this shard: one of the first, in the first step made of shards."""
    if shard >= _SHARDS or resolved.loss_over == "shard" or not plan.config.probe:
        return False
    starts = (start for start in (0, *plan.switches) if start < plan.total_steps)
    return step == next((start for start in starts if _is_made_of_shards(plan, start)), None)


def _is_made_of_shards(plan: Plan, step: int) -> bool:
    return plan.config_at(step).local_steps == 1 and plan.shards_in(step) > 1


def probe(like: Replica, resolved: ResolvedRecipe, plan: Plan, dataset: Any, step: int, shard: int) -> str:
    """Try with one shard whether the losses of shards have the whole batch's as their mean.

    Args:
        like: holds the version to try it at; a copy of it computes, so that nothing of this stays.
        plan: says which examples the shard has; if that is one, the next one's is taken besides.
        dataset: the training dataset.

    Returns:
        What it could not look at, in a sentence; "" where it could.

    Raises:
        InvalidInput: they have not: the steps would be others than the whole batch's.
    """
    config = plan.config_at(step)
    indices: list[int] = []
    for each in range(shard, plan.shards_in(step)):
        if len(indices) < _LEAST_EXAMPLES:
            indices += plan.indices(step, each).tolist()
    if len(indices) < 2:
        return ""
    try:
        with _looking():  # there may be no memory for one more
            replica = Replica.build(resolved, config, like.device)
            replica.arrange(like.manifest)
            replica.load(like.pack() if like.flat is None else like.flat, like.rest)
        with pinned(config.threads, config.deterministic, replica.device):
            seed_everything(derive_seed(config.seed, "data", step, shard))
            with _looking():
                batch_of = read_samples(dataset, indices, resolved.collate)
            return _Trial(replica, resolved, config, batch_of, len(indices)).compare()
    except _CannotLook as reason:
        return f"{_WHETHER} could not be looked at: {reason}"


@contextmanager
def _looking() -> Iterator[None]:
    """What the recipe's code raises here is no reason to stop: the shards that it concerns will say it."""
    try:
        yield
    except (Exception, SystemExit) as error:
        raise _CannotLook(f"{type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class _Mode:
    """How the loss is computed.

    Attributes:
        training: in training mode, but for dropout and batch normalisation.
        gradients: with a graph, for code that differentiates by itself.
    """

    training: bool = False
    gradients: bool = False


_MODES = (_Mode(), _Mode(gradients=True), _Mode(training=True, gradients=True))


class _Trial:
    """The first examples of a run, and the losses of parts of them.

    Args:
        batch_of: (numbers of some of the examples, in order) -> their batch, fresh each time.
        examples: how many there are.
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
        self._all = list(range(examples))
        self._rounding = _ROUNDING[config.precision]
        self._mode = _MODES[0]
        self._still = list(_of_batches(replica))
        # A Keras layer has no mode of its own within a model: its statistics and chance cannot be held still
        self._keras = any("_torch_params" in name for name in replica.parameters)

    def compare(self) -> str:
        """See `probe`."""
        if any(_by_batch(module) for module in self._replica.model.modules()):
            raise _CannotLook("a batch normalisation without running statistics ties the examples together")
        count = min(_MOST_PARTS, max(2, len(self._all) // 2))
        sizes = [len(part) for part in torch.arange(len(self._all)).tensor_split(count)]
        whole = self._first()
        if self._apart(whole, self._loss(self._all)) > self._rounding / 10:
            raise _CannotLook("with the same samples and seeds it changes from call to call")  # not pure
        if self._apart(whole, self._loss(self._all, draw=1)) > self._rounding / 10:
            return self._by_chance(sizes)
        self._look(whole, sizes)
        if self._draw_zeros():
            self._look(self._loss(self._all), sizes)
        looked = self._mode
        with suppress(_CannotLook):
            self._look_in_training(sizes)
        if looked != _MODES[-1]:
            return ""
        return f"{_WHETHER} was looked at in training mode, since in evaluation mode the model gives no loss"

    def _look(self, whole: float, sizes: Sequence[int]) -> None:
        """Compare the loss of all examples with those of their parts."""
        middle = max(1, len(self._all) // 2)
        orders = (self._all[::-1], self._all[middle:] + self._all[:middle])
        noise = max(self._apart(whole, self._loss(order)) for order in orders)
        if noise > 50 * self._rounding:
            raise _CannotLook("it depends on the order of the samples")
        allowed = max(self._rounding, _TIMES_ROUNDING * noise)
        self._refuse_beyond(allowed, whole, sizes, self._parts(sizes))
        for first in sorted({1, max(1, len(self._all) // 3), len(self._all) - 1}):
            lopsided = (first, len(self._all) - first)
            with suppress(_CannotLook):  # the run may have no batches that are so small
                parts = self._parts(lopsided)
                if all(math.isfinite(loss) for loss, _, _ in parts):
                    self._refuse_beyond(allowed, whole, lopsided, parts)

    def _look_in_training(self, sizes: Sequence[int]) -> None:
        """Look at what evaluation mode does not show: a loss of training mode alone, and the gradients."""
        evaluated, before = self._loss(self._all), self._mode
        self._mode = _MODES[-1]
        if self._keras:
            self._mode = _MODES[1]
        elif self._mode != before:
            trained = self._loss(self._all)
            if self._apart(trained, self._loss(self._all)) > self._rounding / 10:
                return  # not pure
            if self._apart(trained, self._loss(self._all, draw=1)) > self._rounding / 10:
                self._mode = _MODES[1]  # its chance would hide the gradients
            elif self._apart(trained, evaluated) > self._rounding:
                with suppress(_CannotLook):
                    self._look(trained, sizes)
        with suppress(_CannotLook):
            self._look_at_gradients(sizes)

    def _look_at_gradients(self, sizes: Sequence[int]) -> None:
        """Compare the gradient of all examples with those of their parts."""
        _, whole = self._traced(self._all)
        _, reordered = self._traced(self._all[::-1])
        parts, start = [], 0
        for size in sizes:
            parts.append(self._traced(self._all[start : start + size]))
            start += size
        counts = [float(count if weight is None else weight) for (_, count, weight), _ in parts]
        if is_sum(self._resolved):
            counts, total = [1.0] * len(counts), 1.0
        elif not (total := math.fsum(counts)):
            return
        shares = [(found, count / total) for (_, found), count in zip(parts, counts, strict=True) if count]
        require_mean(whole, reordered, shares, self._config.precision)

    def _traced(self, examples: list[int]) -> tuple[_Measured, dict[str, Tensor]]:
        """The loss of some examples, and elements of their gradient."""
        try:
            with _looking():
                measured = self._computed(examples, 0, backward=True)
                return measured, sampled(take_gradients(self._replica))
        finally:
            self._replica.model.zero_grad(set_to_none=True)

    def _by_chance(self, sizes: Sequence[int]) -> str:
        """Compare several draws of a loss that is random."""
        whole = [self._loss(self._all, draw) for draw in range(_DRAWS)]
        parts = [self._parts(sizes, draw) for draw in range(_DRAWS)]
        joined = [self._joined(each) for each in parts]
        if all(map(math.isfinite, [*whole, *joined])):
            error = math.sqrt((variance(whole) + variance(joined)) / _DRAWS)
            if abs(fmean(whole) - fmean(joined)) > _TIMES_CHANCE * error:
                mean = [
                    (fmean(loss for loss, _, _ in each), *each[0][1:]) for each in zip(*parts, strict=True)
                ]
                allowed = _TIMES_CHANCE * error / max(abs(fmean(whole)), abs(fmean(joined)))
                self._refuse_beyond(allowed, fmean(whole), sizes, mean)
        raise _CannotLook("it is random, so that only what chance does not explain would have been seen")

    # --- one loss ---------------------------------------------------------------------------

    def _first(self) -> float:
        """The loss of all examples, in the first mode in which the model gives one."""
        reason = ""
        for self._mode in _MODES:
            try:
                found, _, weight = self._measure(self._all, 0)
            except _CannotLook as error:
                reason = reason or str(error)
                continue
            if not math.isfinite(found) or weight == 0:
                raise _CannotLook(f"that of its first examples is {math.nan if weight == 0 else found}")
            return found
        raise _CannotLook(reason)

    def _loss(self, examples: list[int], draw: int = 0) -> float:
        return self._measure(examples, draw)[0]

    def _parts(self, sizes: Sequence[int], draw: int = 0) -> list[_Measured]:
        """What the parts of all examples have, one after the other."""
        found, start = [], 0
        for size in sizes:
            found.append(self._measure(self._all[start : start + size], draw))
            start += size
        return found

    def _measure(self, examples: list[int], draw: int) -> _Measured:
        with _looking():
            return self._computed(examples, draw)

    def _computed(self, examples: list[int], draw: int, *, backward: bool = False) -> _Measured:
        replica, config, seed = self._replica, self._config, derive_seed(self._config.seed, "probe", draw)
        seed_everything(seed)
        read = self._batch_of(examples)
        if read.kept == 0:
            return 0.0, len(examples), None if is_sum(self._resolved) else 0.0
        batch = formatted(to_device(read.value, replica.device), config)
        replica.reset_buffers()
        model = replica.eval()
        if self._mode.training:
            replica.train()
            for module in self._still:
                module.training = False
        said = given(self._resolved, batch)
        replica.watch.begin(whole=True)  # what a forward may not change is the shard's to say
        seed_everything(seed)
        with torch.set_grad_enabled(self._mode.gradients), autocast(config, replica.device):
            loss, weight, _ = loss_of(self._resolved, model, batch, said, reads=reads(self._resolved, config))
        require_scalar(loss)
        if backward:
            loss.backward()
        replica.watch.end()
        weight = left(self._resolved, weight, read.kept)
        self._rounding = max(self._rounding, 8 * torch.finfo(loss.dtype).eps)
        value, count = float(loss.detach()), len(examples)
        if weight is not None:
            weight = checked(float(weight), count, f"a part of the first batch, of {count} examples,")
        return 0.0 if weight == 0 else value, count, weight

    @torch.no_grad()
    def _draw_zeros(self) -> bool:
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

    def _joined(self, parts: Sequence[_Measured]) -> float:
        if is_sum(self._resolved):
            return math.fsum(loss for loss, _, _ in parts)
        return mean_loss(parts)

    def _apart(self, one: float, other: float, scale: float = 0.0) -> float:
        """How far two losses are apart, as a part of the larger one; infinite if one is not finite."""
        if not (math.isfinite(one) and math.isfinite(other)):
            return math.inf
        return abs(one - other) / max(abs(one), abs(other), scale, 1e-30)

    def _refuse_beyond(
        self, allowed: float, whole: float, sizes: Sequence[int], parts: Sequence[_Measured]
    ) -> None:
        joined = self._joined(parts)
        scale = sum(abs(loss) for loss, _, _ in parts) / len(parts)
        if self._apart(whole, joined, scale) <= allowed:
            return
        total = math.fsum(loss for loss, _, _ in parts)
        summed = not is_sum(self._resolved) and self._apart(whole, total, scale) <= allowed
        by = "weights" if any(weight is not None for _, _, weight in parts) else "examples"
        which = "sum of its parts' losses"
        if not is_sum(self._resolved):
            which = f"mean of its parts' losses, weighed by their {by}"
        raise InvalidInput(
            f"the loss of a batch is not the {which}: that of the first "
            f"{len(self._all)} examples is {whole:.6g}, and in parts of {', '.join(map(str, sizes))} it "
            f"comes to {joined:.6g}, so no step would be that of the whole batch; "
            f"{_SUM if summed else _WAYS_OUT}"
        )


_WHETHER = "whether the shards' losses have the batch's loss as their mean"
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


def _by_batch(module: nn.Module) -> bool:
    """Whether a module normalises by the batch in evaluation mode, too."""
    normalises = isinstance(module, _BatchNorm) and not isinstance(module, _InstanceNorm)
    return normalises and module.running_mean is None
