"""Which examples belong to which shard of which step: pure arithmetic on seeds.

A `Plan` answers for any (step, shard) without state: everything follows from the dataset's
size and the config, so any process can work out any shard at any time.
"""

from __future__ import annotations

import hashlib
import operator
import threading
from collections import OrderedDict

import numpy as np
import numpy.typing as npt

from cache.errors import InvalidInput
from coordinator.config import TrainingConfig

Indices = npt.NDArray[np.int64]

_KEPT_EPOCHS = 2


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
    """Return the order in which an epoch visits the dataset.

    The permutation sorts one 64-bit random key per example (equal keys: lower index first).
    The keys are the raw stream of the Philox counter generator, which is fixed by its paper
    (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11) and whose stream
    numpy promises to keep; sorting has one right answer. Library permutations
    (`torch.randperm`, `numpy.random.Generator.permutation`) promise neither across versions.

    Args:
        seed: the run's seed.
        epoch: the epoch, from 0.
        size: examples in the dataset.

    Returns:
        int64 array of shape (size,), a permutation of range(size).
    """
    generator = np.random.Philox(key=derive_seed(seed, "order", epoch))
    keys = np.asarray(generator.random_raw(size), dtype=np.uint64)
    return np.argsort(keys, kind="stable").astype(np.int64, copy=False)


class Plan:
    """The whole run's partition of examples into steps and shards.

    Steps count from 0 over all epochs; step s leads from version s to version s + 1. Each
    epoch is a permutation of the dataset, cut into batches (the last may be smaller), each
    cut into contiguous shards whose sizes differ by at most one, the larger first.

    Args:
        size: examples in the dataset, at least 1.
        config: gives epochs, batch_size, shards and seed.

    Raises:
        InvalidInput: the dataset is empty.

    Example:
        >>> plan = Plan(10, TrainingConfig(batch_size=4, shards=3))
        >>> plan.steps_per_epoch, plan.shards_in(2), plan.shard_sizes(0)
        (3, 2, [2, 1, 1])
    """

    def __init__(self, size: int, config: TrainingConfig) -> None:
        if size < 1:
            raise InvalidInput("the dataset is empty; a run needs at least one example.")
        self.size = size
        self.config = config
        self.steps_per_epoch = -(-size // config.batch_size)
        self.total_steps = self.steps_per_epoch * config.epochs
        self._orders: OrderedDict[int, Indices] = OrderedDict()
        self._lock = threading.Lock()

    def locate(self, step: int) -> tuple[int, int]:
        """Return (epoch, index of the step within its epoch), both from 0.

        Raises:
            InvalidInput: the run has no such step.
        """
        if not 0 <= step < self.total_steps:
            raise InvalidInput(f"step {step} is outside the run's steps 0 to {self.total_steps - 1}.")
        return divmod(step, self.steps_per_epoch)

    def examples(self, step: int) -> int:
        """Return how many examples the step has over all its shards."""
        _, index = self.locate(step)
        return min(self.config.batch_size, self.size - index * self.config.batch_size)

    def shards_in(self, step: int) -> int:
        """Return how many shards the step has: `config.shards`, or one an example if those are fewer."""
        return min(self.config.shards, self.examples(step))

    def shard_sizes(self, step: int) -> list[int]:
        """Return the example count of each shard of the step, in shard order; none is 0."""
        each, extra = divmod(self.examples(step), self.shards_in(step))
        return [each + (shard < extra) for shard in range(self.shards_in(step))]

    def indices(self, step: int, shard: int) -> Indices:
        """Return the dataset indices of one shard, in the order in which they are computed.

        Returns:
            int64 array of shape (examples in the shard,), read-only.

        Raises:
            InvalidInput: the run has no such step, or the step no such shard.
        """
        epoch, index = self.locate(step)
        shards = self.shards_in(step)
        if not 0 <= shard < shards:
            raise InvalidInput(f"shard {shard} is outside the shards 0 to {shards - 1} of step {step}.")
        each, extra = divmod(self.examples(step), shards)
        start = index * self.config.batch_size + shard * each + min(shard, extra)
        return self._order(epoch)[start : start + each + (shard < extra)]

    def _order(self, epoch: int) -> Indices:
        with self._lock:
            order = self._orders.get(epoch)
            if order is None:
                order = epoch_order(self.config.seed, epoch, self.size)
                order.setflags(write=False)
                self._orders[epoch] = order
            self._orders.move_to_end(epoch)
            while len(self._orders) > _KEPT_EPOCHS:
                self._orders.popitem(last=False)
            return order
