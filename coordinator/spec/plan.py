"""Which examples belong to which shard of which step: pure arithmetic on seeds.

A `Plan` answers for any (step, shard) without state: everything follows from the dataset's
size and the config (and from the recipe's own `order` or `batches`, where it has one), so any
process can work out any shard at any time.
"""

from __future__ import annotations

import hashlib
import operator
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from torchord.cache.errors import InvalidInput
from torchord.coordinator.spec.config import TrainingConfig
from torchord.coordinator.spec.epochs import Epochs, Visits, epochs_of
from torchord.coordinator.spec.sum_tree import FanIn, fan_in

Indices = npt.NDArray[np.int64]

_KEPT_EPOCHS = 2
_KEPT_TREES = 64
_FIRST_CHECKED = 4  # shards of the first step, at most
_STEPS_CHECKED = 4  # the first steps, each of which has a check
_SEEDS = 1 << 63
_SAMPLES_SHOWN = 8


def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed that depends on every part, its type and its place.

    Args:
        parts: integers of any size and strings, e.g. `derive_seed(seed, "data", step, shard)`.

    Returns:
        An integer from 0 to 2**63 - 1: BLAKE2b of an unambiguous encoding of the parts, the
        same on every platform and in every version of every library.

    Example:
        >>> derive_seed(0, "init") == derive_seed(0, "init")
        True
        >>> derive_seed(1, 23) == derive_seed(12, 3)
        False
    """
    digest = hashlib.blake2b(digest_size=8, person=b"torchord-seed")
    for part in parts:
        if isinstance(part, str):
            tag, body = b"s", part.encode()
        else:
            tag, body = b"i", b"%d" % operator.index(part)
        digest.update(tag + len(body).to_bytes(8, "little") + body)
    return int.from_bytes(digest.digest(), "little") >> 1


def epoch_order(seed: int, epoch: int, size: int) -> Indices:
    """Return the order in which an epoch visits the dataset, unless config or recipe say otherwise.

    Args:
        seed: the run's seed.
        epoch: the epoch, from 0.
        size: examples in the dataset.

    Returns:
        int64 array of shape (size,), the `permutation` of the seed and the epoch.
    """
    return permutation(derive_seed(seed, "order", epoch), size)


def permutation(seed: int, size: int) -> Indices:
    """Return a permutation that is the same on every platform and in every version of every library.

    It sorts one 64-bit random key per example (equal keys: lower index first).
    The keys are the raw stream of the Philox counter generator, which is fixed by its paper
    (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11) and whose stream
    numpy promises to keep; sorting has one right answer. Library permutations
    (`torch.randperm`, `numpy.random.Generator.permutation`) promise neither across versions.

    Args:
        seed: from 0, say of `derive_seed`.
        size: how many numbers.

    Returns:
        int64 array of shape (size,), a permutation of range(size).
    """
    generator = np.random.Philox(key=seed)
    keys = np.asarray(generator.random_raw(size), dtype=np.uint64)
    return np.argsort(keys, kind="stable").astype(np.int64, copy=False)


@dataclass(frozen=True)
class _Segment:
    """Steps from `start` on that share one config, beginning at a batch of an epoch."""

    start: int
    config: TrainingConfig
    epoch: int
    batch: int
    epochs: Epochs

    def _first(self) -> int:
        """The steps in its first epoch."""
        return -(-(self.epochs.batches(self.epoch) - self.batch) // self.config.local_steps)

    def place(self, step: int) -> tuple[int, int]:
        """(epoch, first batch) of a step of this segment."""
        past, stride = step - self.start, self.config.local_steps
        first = self._first()
        if past < first:
            return self.epoch, self.batch + past * stride
        epoch, rest = self.epochs.passed(self.epoch + 1, past - first, stride)
        return epoch, rest * stride

    def end(self, epochs: int) -> int:
        """The step after the last one, if no other segment follows."""
        return self.start + self._first() + self.epochs.steps(self.epoch + 1, epochs, self.config.local_steps)


def shown(samples: Sequence[int] | Indices) -> str:
    """The first few sample indices, for a message.

    Example:
        >>> shown(range(20))
        '[0, 1, 2, 3, 4, 5, 6, 7, … 20 in all]'
    """
    head = ", ".join(str(int(s)) for s in samples[:_SAMPLES_SHOWN])
    return f"[{head}, … {len(samples)} in all]" if len(samples) > _SAMPLES_SHOWN else f"[{head}]"


class Plan:
    """The whole run's partition of examples into steps and shards.

    Steps count from 0 over all epochs; step s leads from version s to version s + 1. Each
    epoch is a permutation of the dataset, cut into batches (the last may be smaller, or left out
    by `drop_last`), or what the recipe's `order` or `batches` gives; each batch is cut into
    contiguous shards whose sizes differ by at most one, the larger first. A step
    takes one batch, or with local steps the next `local_steps` batches of the epoch (fewer at
    its end); a shard then has its part of each of them.

    Args:
        size: examples in the dataset, at least 1.
        config: gives epochs, batch_size, shards, local_steps, staleness, seed, shuffle and drop_last.
        switches: step -> config fields that change from that step on (see `Run.switch`).
        visits: what the recipe's `order` or `batches` gives; None: it has neither.
        visited: epoch -> the indices that it visits, in order, with `visits`; None: this process cannot
            say which samples a shard has, but still how many.

    Raises:
        InvalidInput: the dataset is empty, or too small for `drop_last`.

    Example:
        >>> plan = Plan(10, TrainingConfig(batch_size=4, shards=3))
        >>> plan.total_steps, plan.shards_in(2), plan.shard_sizes(0)
        (3, 2, [2, 1, 1])
    """

    def __init__(
        self,
        size: int,
        config: TrainingConfig,
        switches: Mapping[int, Mapping[str, Any]] | None = None,
        *,
        visits: Visits | None = None,
        visited: Callable[[int], Indices] | None = None,
    ) -> None:
        if size < 1:
            raise InvalidInput("the dataset is empty; a run needs at least one example")
        self.size = size
        self.config = config
        self.switches = {step: dict(fields) for step, fields in sorted((switches or {}).items())}
        self.visits = visits
        self._visited = visited
        self._epochs = epochs_of(size, config, visits)
        self._segments = [_Segment(0, config, 0, 0, self._epochs)]
        for step, fields in self.switches.items():
            last = self._segments[-1]
            if step >= last.end(config.epochs):
                break
            here = replace(last.config, **fields)
            self._segments.append(_Segment(step, here, *last.place(step), self._epochs))
        self.steps_per_epoch = self._epochs.steps(0, 1, config.local_steps)
        self._starts = [segment.start for segment in self._segments]
        self.all_steps = self._segments[-1].end(config.epochs)
        self.total_steps = min(self.all_steps, config.most_steps or self.all_steps)
        self._asked: tuple[int | None, list[int]] = (None, [])
        self._orders: OrderedDict[int, Indices] = OrderedDict()
        self._trees: dict[int, FanIn] = {}  # each is asked for several times
        self._lock = threading.Lock()

    @property
    def knows_samples(self) -> bool:
        """Whether this process can say which samples a shard has."""
        return self.visits is None or self._visited is not None

    def with_samples(self, visited: Callable[[int], Indices] | None) -> Plan:
        """Return the same plan where the recipe's order or batches are at hand; itself if it has neither."""
        if self.visits is None:
            return self
        return Plan(self.size, self.config, self.switches, visits=self.visits, visited=visited)

    def _segment(self, step: int) -> _Segment:
        if not 0 <= step < self.total_steps:
            raise InvalidInput(f"step {step} is outside the run's steps 0 to {self.total_steps - 1}")
        return self._segments[bisect_right(self._starts, step) - 1]

    def config_at(self, step: int) -> TrainingConfig:
        """Return the config that is in force at a step."""
        return self._segment(step).config

    def locate(self, step: int) -> tuple[int, int]:
        """Return (epoch, number of the step's first batch within it), both from 0.

        Raises:
            InvalidInput: the run has no such step.
        """
        return self._segment(step).place(step)

    def ends_epoch(self, step: int) -> bool:
        """Return whether a step is its epoch's last."""
        return step + 1 == self.total_steps or self.locate(step + 1)[0] != self.locate(step)[0]

    def version_for(self, step: int) -> int:
        """Return the version that the gradients of a step are computed at.

        That is `step` itself, or with staleness s the version s commits earlier. The first steps
        of a run, and those after a switch, have no such version and take the first there is.
        """
        segment = self._segment(step)
        return max(segment.start, step - segment.config.staleness)

    def window(self, head: int) -> range:
        """Return the steps that may be computed while the head is at version `head`."""
        last = head
        while last + 1 < self.total_steps and self.version_for(last + 1) <= head:
            last += 1
        return range(head, min(last + 1, self.total_steps))

    def batch_sizes(self, step: int) -> list[int]:
        """Return the example count of each batch of the step (one, without local steps)."""
        return [end - start for start, end in pairwise(self._bounds(step))]

    def _bounds(self, step: int) -> list[int]:
        """Where the step's batches begin in the order of its epoch, and where the last one ends."""
        last, bounds = self._asked  # most questions in a row are about one step
        if last != step:
            segment = self._segment(step)
            bounds = self._epochs.bounds(*segment.place(step), segment.config.local_steps)
            self._asked = step, bounds
        return bounds

    def examples(self, step: int) -> int:
        """Return how many examples the step has over all its shards."""
        return sum(self.batch_sizes(step))

    def shards_in(self, step: int) -> int:
        """Return how many shards the step has: `config.shards`, or one an example if those are fewer."""
        return min(self.config_at(step).shard_count, self.batch_sizes(step)[0])

    def fan_in(self, step: int) -> FanIn:
        """Return the slots of the step: its shards, the partial sums where those are many, its checks."""
        tree = self._trees.get(step)
        if tree is None:
            tree = fan_in(self.shards_in(step), self.config_at(step).fan_in, self.checked(step))
            if len(self._trees) >= _KEPT_TREES:
                self._trees.clear()
            self._trees[step] = tree
        return tree

    def has(self, step: int, slot: int) -> bool:
        """Return whether the run has such a step, and the step such a slot: a message may ask for any."""
        return 0 <= step < self.total_steps and 0 <= slot < self.fan_in(step).total

    def checked(self, step: int) -> tuple[int, ...]:
        """Return the shards of the step that are computed twice, in order; mostly none.

        The run's first step has its last shards checked, up to four, since whoever computes those may have
        computed others before. One shard is checked in each of the three steps that follow, in the
        first step of the second epoch, where every sample has been read before, and then in
        `TrainingConfig.audit_fraction` of all steps; which shard and which step follows from the seed.
        """
        config = self.config_at(step)
        if not config.audit_fraction or not config.deterministic:
            return ()
        shards = self.shards_in(step)
        if step == 0:
            return tuple(range(max(0, shards - _FIRST_CHECKED), shards))
        drawn = derive_seed(config.seed, "check", step)
        if step < _STEPS_CHECKED or self.locate(step) == (1, 0) or drawn < config.audit_fraction * _SEEDS:
            return (derive_seed(config.seed, "checked shard", step) % shards,)
        return ()

    def shard_sizes(self, step: int) -> list[int]:
        """Return the example count of each shard of the step, in shard order; none is 0."""
        shards = self.shards_in(step)
        parts = [divmod(examples, shards) for examples in self.batch_sizes(step)]
        return [sum(each + (shard < extra) for each, extra in parts) for shard in range(shards)]

    def parts(self, step: int, shard: int) -> list[Indices]:
        """Return the dataset indices of one shard, an array for each local step.

        A last batch with fewer examples than the step has shards leaves the later shards one local
        step fewer.

        Returns:
            int64 arrays, read-only, none empty.

        Raises:
            InvalidInput: the run has no such step, or the step no such shard.
        """
        epoch, shards = self.locate(step)[0], self.shards_in(step)
        if not 0 <= shard < shards:
            raise InvalidInput(f"shard {shard} is outside the shards 0 to {shards - 1} of step {step}")
        order, found = self._order(epoch), []
        for begin, end in pairwise(self._bounds(step)):
            each, extra = divmod(end - begin, shards)
            start = begin + shard * each + min(shard, extra)
            part = order[start : start + each + (shard < extra)]
            if len(part):
                found.append(part)
        return found

    def indices(self, step: int, shard: int) -> Indices:
        """Return the dataset indices of one shard, in the order in which they are computed.

        Returns:
            int64 array of shape (examples in the shard,), read-only.

        Raises:
            InvalidInput: the run has no such step, or the step no such shard.
        """
        parts = self.parts(step, shard)
        if len(parts) == 1:
            return parts[0]
        joined = np.concatenate(parts)
        joined.setflags(write=False)
        return joined

    def alone(self) -> tuple[int, int] | None:
        """Return the first (step, shard) that computes on one example, itself or in one local step, if any.

        Every epoch being cut alike unless the recipe gives the batches, its ends tell of all others.
        """
        uneven = self.visits is not None and self.visits.sizes is not None
        last = self._epochs.steps(0, 1, self.config_at(0).local_steps) - 1
        for step in range(self.total_steps) if uneven else sorted({0, min(last, self.total_steps - 1)}):
            shards = self.shards_in(step)
            for examples in self.batch_sizes(step):
                if examples < 2 * shards:
                    return step, min(examples, shards) - 1
        return None

    def _order(self, epoch: int) -> Indices:
        with self._lock:
            order = self._orders.get(epoch)
        if order is None:
            order = self._made(epoch)  # outside the lock: the recipe's code may be in it
            order.setflags(write=False)
        with self._lock:
            order = self._orders.setdefault(epoch, order)
            self._orders.move_to_end(epoch)
            while len(self._orders) > _KEPT_EPOCHS:
                self._orders.popitem(last=False)
            return order

    def _made(self, epoch: int) -> Indices:
        if self.visits is None:
            if self.config.shuffle:
                return epoch_order(self.config.seed, epoch, self.size)
            return np.arange(self.size, dtype=np.int64)
        if self._visited is None:
            raise InvalidInput(
                "which samples a shard has is said by the recipe's order or batches, which this process has "
                "not loaded"
            )
        return self._visited(epoch)
