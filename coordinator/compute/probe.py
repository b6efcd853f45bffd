"""Whether a recipe's shards add up to its batches, tried once, on a run's first examples.

The step of a whole batch can be put together from its shards if the batch's loss is the mean of its parts'
losses, each weighed by what it is a mean over (`torchord.coordinator.compute.weights`). That holds for any
batch, at any parameters, for any split, so a few are looked at, by each of the first shards with its own
examples: in evaluation mode and without gradients, their loss together against the losses of parts of them,
even ones and lopsided ones, since parts that happen to have equally many tokens would show nothing. The
samples are read once, and collated for each part from copies.

The loss is looked at in training mode, too, without dropout and with running statistics as they are, if it
is another there (a term that is added in training alone). So are the gradients, or in evaluation mode where
the chance of training cannot be held: see `torchord.coordinator.compute.part_gradients`.

What may differ by rounding is measured: the same samples in other orders. Where the loss draws random
numbers, each example draws the same in the whole and in its part
(`torchord.coordinator.compute.aligned_chance`); where that cannot be had, the loss is computed several times,
and refused only where chance cannot explain what is seen. Parameters that are all zero, as a last layer's may
be at first, would make all examples alike: then it is looked a second time with random ones in their place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from statistics import fmean, variance
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from torchord.coordinator.compute.aligned_chance import AlignedChance
from torchord.coordinator.compute.batch import Batch, read_samples
from torchord.coordinator.compute.determinism import pinned, seed_everything
from torchord.coordinator.compute.gradient import micro_batches
from torchord.coordinator.compute.metric_trial import try_metrics
from torchord.coordinator.compute.part_losses import (
    MODES,
    CannotLook,
    Measured,
    PartLosses,
    PartsRaise,
    averaged,
    looking,
    moved,
    scale_of,
)
from torchord.coordinator.compute.replica import Replica
from torchord.coordinator.spec.plan import Plan, derive_seed
from torchord.coordinator.spec.resolving import ResolvedRecipe

_SHARDS = 4
_LEAST_EXAMPLES = 2
_MOST_PARTS = 4
_DRAWS = 16
_ALIKE = 1  # the number of the draw by which whole and parts have agreed exactly, or have not
_ROWS = 64  # so many examples, whose chance is drawn one by one
_TIMES_ROUNDING = 20
_TIMES_CHANCE = 6  # standard errors


class ByChance(CannotLook):
    """Its chance hides what it may be, beyond what several draws show."""


def due(resolved: ResolvedRecipe, plan: Plan, step: int, shard: int) -> bool:
    """Whether a recipe is to be tried with this shard: one of the first, in the first step made of shards."""
    if shard >= _SHARDS or resolved.loss_over == "shard" or not plan.config.probe:
        return False
    starts = (start for start in (0, *plan.switches) if start < plan.total_steps)
    return step == next((start for start in starts if _is_made_of_shards(plan, start)), None)


def _is_made_of_shards(plan: Plan, step: int) -> bool:
    config = plan.config_at(step)
    if config.local_steps > 1:
        return False
    return plan.shards_in(step) > 1 or plan.shard_sizes(step)[0] > (config.micro_batch_size or math.inf)


def _parts(plan: Plan, step: int, shard: int) -> list[list[int]]:
    """The samples of what is computed at once: the shards from this one on, or their micro-batches."""
    size = plan.config_at(step).micro_batch_size
    shards = (plan.indices(step, each) for each in range(shard, plan.shards_in(step)))
    return [list(map(int, part)) for indices in shards for part in micro_batches(indices, size)]


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
    for part in _parts(plan, step, shard):
        if len(indices) < _LEAST_EXAMPLES:
            indices += part
    if len(indices) < 2:
        return ""
    try:
        with looking():  # there may be no memory for one more
            replica = Replica.build(resolved, config, like.device)
            replica.arrange(like.manifest)
            replica.load(like.pack() if like.flat is None else like.flat, like.rest)

        def trial(samples: list[int], sizes: list[int] | None = None) -> str:
            seed_everything(derive_seed(config.seed, "data", step, shard))
            with looking():
                batch_of = read_samples(dataset, samples, resolved.collate)
            losses = PartLosses(replica, resolved, config, batch_of, len(samples))
            tried = _Trial(losses, replica, batch_of, sizes)
            said = tried.compare()
            try_metrics(losses, tried.splits())
            return said

        with pinned(config.threads, config.deterministic, replica.device):
            try:
                return trial(indices)
            except PartsRaise:  # no part of a run is smaller than its shards
                first, second = _two(plan, step, shard)
                return trial(first + second, [len(first), len(second)])
    except CannotLook as reason:
        return f"{_WHETHER} could not be looked at: {reason}"


def _two(plan: Plan, step: int, shard: int) -> list[list[int]]:
    """A part and its neighbour."""
    found = _parts(plan, step, shard)
    return found[:2] if len(found) > 1 else _parts(plan, step, 0)[-2:]


class _Trial:
    """The first examples of a run, and what is to be seen of them.

    Args:
        losses: of parts of them.
        replica: what computes these.
        batch_of: as for `PartLosses`.
        sizes: of their parts; None: even ones.
    """

    def __init__(
        self,
        losses: PartLosses,
        replica: Replica,
        batch_of: Callable[[list[int]], Batch],
        sizes: list[int] | None = None,
    ) -> None:
        self._losses = losses
        self._replica = replica
        self._batch_of = batch_of
        self._sizes = sizes
        # A Keras layer has no mode of its own within a model: statistics and chance cannot be held still
        self._keras = any("_torch_params" in name for name in replica.parameters)

    def compare(self) -> str:
        """See `probe`."""
        losses = self._losses
        if any(_by_batch(module) for module in self._replica.model.modules()):
            raise CannotLook("a batch normalisation without running statistics ties the examples together")
        whole = losses.first()
        if self._changes(whole, draw=0):
            raise CannotLook("with the same samples and seeds it changes from call to call")  # not pure
        if self._is_random(whole):
            self._look_at_chance()
        else:
            self._look(whole)
            if losses.draw_zeros():
                self._look(losses.loss(losses.all))
        looked = losses.mode
        try:
            self._look_in_training()
        except ByChance as reason:
            return f"{_WHETHER} could not be looked at in training mode: {reason}"
        except PartsRaise:
            raise
        except CannotLook:
            pass  # the shard itself says what is wrong there
        if looked != MODES[-1]:
            return ""
        return f"{_WHETHER} was looked at in training mode, since in evaluation mode the model gives no loss"

    def _changes(self, loss: float, draw: int) -> bool:
        """Whether all examples have another loss than that now."""
        losses = self._losses
        return losses.apart(loss, losses.loss(losses.all, draw)) > losses.rounding / 10

    def _is_random(self, loss: float) -> bool:
        """Whether random numbers go into the loss of all examples, even if they make no difference."""
        return self._changes(loss, draw=1) or self._draws_in_data() or self._losses.draws()

    def _even(self) -> list[int]:
        """Sizes of parts that are about equal."""
        if self._sizes is not None:
            return self._sizes
        examples = self._losses.all
        count = min(_MOST_PARTS, max(2, len(examples) // 2))
        return [len(part) for part in torch.arange(len(examples)).tensor_split(count)]

    def splits(self) -> list[list[int]]:
        """Sizes of parts, in some ways."""
        return [self._even(), *(self._lopsided() if self._sizes is None else [])]

    def _lopsided(self) -> list[list[int]]:
        count = len(self._losses.all)
        return [[first, count - first] for first in sorted({1, max(1, count // 3), count - 1})]

    def _allowed(self, draws: Sequence[int] = (0,)) -> float:
        """How far losses may be apart by rounding, which other orders of the same examples show.

        Raises:
            CannotLook: another order makes more of a difference than that.
        """
        losses = self._losses
        middle = max(1, len(losses.all) // 2)
        noise = 0.0
        for draw in draws:
            whole = losses.loss(losses.all, draw)
            for order in (losses.all[::-1], losses.all[middle:] + losses.all[:middle]):
                noise = max(noise, losses.apart(whole, losses.loss(order, draw)))
        if noise > 50 * losses.rounding:
            raise CannotLook("it depends on the order of the samples")
        return max(losses.rounding, _TIMES_ROUNDING * noise)

    def _look(self, whole: float) -> None:
        """Compare the loss of all examples with those of their parts."""
        losses, allowed = self._losses, self._allowed()
        losses.refuse_beyond(allowed, whole, self._even(), losses.parts(self._even()))
        for sizes in self._lopsided():
            with suppress(CannotLook):  # the run may have no batches that are so small
                parts = losses.parts(sizes)
                if all(math.isfinite(loss) for loss, _, _ in parts):
                    losses.refuse_beyond(allowed, whole, sizes, parts)

    def _look_in_training(self) -> None:
        """Look at what evaluation mode does not show: a loss of training mode alone, and the gradients.

        Raises:
            ByChance: it is random there, and the chance of an example cannot be held.
        """
        losses = self._losses
        evaluated, before = losses.loss(losses.all), losses.mode
        losses.mode = MODES[-1]
        if self._keras:
            losses.mode = MODES[1]
        elif losses.mode != before:
            in_evaluation, losses.chance = losses.chance is not None, None
            trained = losses.loss(losses.all)
            if self._changes(trained, draw=0):
                return  # not pure
            if self._is_random(trained):
                self._look_at_random_training(in_evaluation)
                return
            if losses.apart(trained, evaluated) > losses.rounding:
                try:
                    self._look(trained)
                except PartsRaise:
                    raise
                except CannotLook:
                    pass
        self._look_at_gradients()

    def _look_at_random_training(self, in_evaluation: bool) -> None:
        """Look at a loss that is random in training mode, and at the gradients where its chance is held.

        Args:
            in_evaluation: whether it is random in evaluation mode as well; else gradients can be had there.
        """
        losses, unseen = self._losses, None
        try:
            self._look_at_chance()
        except ByChance as reason:
            unseen = reason
        if not in_evaluation and (losses.chance is None or not losses.chance.whole):
            losses.chance, losses.mode = None, MODES[1]
        if losses.chance is not None or not in_evaluation:
            self._look_at_gradients()
        if unseen is not None:
            raise unseen

    def _look_at_gradients(self) -> None:
        chance = self._losses.chance
        if chance is None or chance.whole:
            with suppress(CannotLook):
                self._losses.compare_gradients(self._even())

    # --- chance -----------------------------------------------------------------------------

    def _look_at_chance(self) -> None:
        """Compare a random loss, of examples that draw the same in the whole and in their parts.

        Raises:
            ByChance: they do not; what several draws show has been looked at.
        """
        losses = self._losses
        if self._sizes is None:
            losses.all = losses.all[:_ROWS]
        allowed = self._align()
        if allowed is None:
            self._by_spread()
            raise ByChance(_RANDOM)
        exact = self._by_pairs(self._even(), allowed)
        for sizes in self._lopsided():
            with suppress(CannotLook):
                self._by_pairs(sizes, allowed)
        if not exact:
            losses.chance = None
            raise ByChance(_RANDOM)

    def _align(self) -> float | None:
        """Let each example draw the same in every batch.

        Returns:
            How far losses may be apart by rounding; None where examples in another order draw other numbers.
        """
        losses = self._losses
        losses.chance = None
        if self._draws_in_data():
            return None
        losses.chance = AlignedChance()
        losses.loss(losses.all)
        losses.loss(losses.all[:-1])
        losses.chance.settle()
        try:
            return self._allowed(draws=(0, 1))
        except CannotLook:
            losses.chance = None
            return None

    def _draws_in_data(self) -> bool:
        """Whether `collate` draws random numbers: the batch of a part is then no part of the batch."""
        seed_everything(0)
        with looking():
            self._batch_of(self._losses.all)
        return moved(0, self._replica.device)

    def _by_pairs(self, sizes: Sequence[int], allowed: float) -> bool:
        """Compare whole and parts draw by draw; whether they agree exactly in the first draws.

        Raises:
            InvalidInput: they do not, and chance does not explain it.
            PartsRaise: a part has no loss.
        """
        losses, found = self._losses, list[tuple[float, list[Measured]]]()
        for _ in range(2):  # what chance does once in ten thousand times, it does not do twice
            differences = []
            for _ in range(_DRAWS):
                draw = len(found)
                found.append((losses.loss(losses.all, draw), losses.parts(sizes, draw)))
                whole, parts = found[-1]
                differences.append(whole - losses.joined(parts))
                if not math.isfinite(differences[-1]):
                    raise PartsRaise("that of a part of its first examples is infinite or NaN")
                if draw == _ALIKE and all(
                    losses.apart(each, losses.joined(its), scale_of(its)) <= allowed for each, its in found
                ):
                    return True
            whole, parts = averaged(found)
            by_chance = _TIMES_CHANCE * math.sqrt(variance(differences) / _DRAWS)
            if abs(fmean(differences)) <= max(by_chance, allowed * scale_of(parts)):
                return False
        losses.refuse(allowed, whole, sizes, parts)

    def _by_spread(self) -> None:
        """Compare several draws of a loss whose examples draw other numbers in the whole than in their parts.

        Raises:
            InvalidInput: chance does not explain what is seen.
        """
        losses, sizes = self._losses, self._even()
        found = [(losses.loss(losses.all, draw), losses.parts(sizes, draw)) for draw in range(_DRAWS)]
        wholes, joined = [whole for whole, _ in found], [losses.joined(parts) for _, parts in found]
        if not all(map(math.isfinite, [*wholes, *joined])):
            return
        by_chance = _TIMES_CHANCE * math.sqrt((variance(wholes) + variance(joined)) / _DRAWS)
        if abs(fmean(wholes) - fmean(joined)) > by_chance:
            whole, parts = averaged(found)
            scale = max(abs(fmean(wholes)), abs(fmean(joined)))
            losses.refuse_beyond(max(by_chance / scale, losses.rounding), whole, sizes, parts)


_RANDOM = "it is random, so that only what chance does not explain would have been seen"
_WHETHER = "whether the shards' losses have the batch's loss as their mean"


def _by_batch(module: nn.Module) -> bool:
    """Whether a module normalises by the batch in evaluation mode, too."""
    normalises = isinstance(module, _BatchNorm) and not isinstance(module, _InstanceNorm)
    return normalises and module.running_mean is None
