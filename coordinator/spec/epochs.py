"""How each epoch's order is cut into batches: into equal ones, or as the recipe's `batches` entry says."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any, Protocol, Self

from torchord.cache.errors import InvalidInput
from torchord.coordinator.spec.config import TrainingConfig


@dataclass(frozen=True)
class Visits:
    """What the epochs visit, where the recipe says it: found by the training server before the first step.

    A process without the dataset, such as one that audits, so knows the sizes of all batches.

    Attributes:
        length: indices in the order of each epoch; None with `sizes`.
        sizes: of each epoch, the examples of each of its batches; None with `length`.
        digests: of the epochs' orders, from epoch 0 on, as far as the training server has made them.
    """

    length: int | None = None
    sizes: tuple[tuple[int, ...], ...] | None = None
    digests: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any] | None) -> Self | None:
        """Rebuild what `to_json` gave, None from None.

        Raises:
            InvalidInput: it is malformed.
        """
        if value is None:
            return None
        try:
            length, sizes = value["length"], value["sizes"]
            made = cls(
                None if length is None else int(length),
                None if sizes is None else tuple(tuple(int(n) for n in epoch) for epoch in sizes),
                tuple(str(digest) for digest in value["digests"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidInput(f"the run's record of its batches is malformed: {error!r}") from error
        counts = (
            [made.length] if made.sizes is None else [n for epoch in made.sizes for n in (len(epoch), *epoch)]
        )
        if not counts or any(n is None or n < 1 for n in counts):
            raise InvalidInput("the run's record of its batches is malformed: it has an empty one")
        return made


class Epochs(Protocol):
    """The batches of every epoch, as places in its order."""

    def batches(self, epoch: int) -> int:
        """Return how many batches an epoch has."""

    def bounds(self, epoch: int, first: int, count: int) -> list[int]:
        """Return where up to `count` batches from `first` on begin in the order, and where they end."""

    def steps(self, epoch: int, until: int, stride: int) -> int:
        """Return the steps, of `stride` batches each, of the epochs from `epoch` to before `until`."""

    def passed(self, epoch: int, steps: int, stride: int) -> tuple[int, int]:
        """Return (epoch, step in it) so many steps after the beginning of an epoch."""


class Even:
    """Every epoch has one length, cut into batches of one size, the last of which may be smaller.

    Args:
        length: indices in the order of an epoch.
        batch_size: of them in a batch.
    """

    def __init__(self, length: int, batch_size: int) -> None:
        self._length = length
        self._batch_size = batch_size
        self._batches = -(-length // batch_size)

    def batches(self, epoch: int) -> int:
        """See `Epochs`."""
        return self._batches

    def bounds(self, epoch: int, first: int, count: int) -> list[int]:
        """See `Epochs`."""
        last = min(first + count, self._batches)
        return [min(n * self._batch_size, self._length) for n in range(first, last + 1)]

    def steps(self, epoch: int, until: int, stride: int) -> int:
        """See `Epochs`."""
        return (until - epoch) * -(-self._batches // stride)

    def passed(self, epoch: int, steps: int, stride: int) -> tuple[int, int]:
        """See `Epochs`."""
        epochs, rest = divmod(steps, -(-self._batches // stride))
        return epoch + epochs, rest


class Given:
    """Every epoch has batches of its own.

    Args:
        sizes: of each epoch, the examples of each of its batches.
    """

    def __init__(self, sizes: Sequence[Sequence[int]]) -> None:
        self._sizes = sizes
        self._bounds: dict[int, list[int]] = {}
        self._ends: dict[int, list[int]] = {}

    def batches(self, epoch: int) -> int:
        """See `Epochs`."""
        return len(self._sizes[epoch])

    def bounds(self, epoch: int, first: int, count: int) -> list[int]:
        """See `Epochs`."""
        found = self._bounds.get(epoch)
        if found is None:
            found = self._bounds[epoch] = [0, *accumulate(self._sizes[epoch])]
        return found[first : first + count + 1]

    def steps(self, epoch: int, until: int, stride: int) -> int:
        """See `Epochs`."""
        ends = self._ends_of(stride)
        return ends[until] - ends[epoch]

    def passed(self, epoch: int, steps: int, stride: int) -> tuple[int, int]:
        """See `Epochs`."""
        ends = self._ends_of(stride)
        step = ends[epoch] + steps
        found = bisect_right(ends, step) - 1
        return found, step - ends[found]

    def _ends_of(self, stride: int) -> list[int]:
        """The steps before each epoch, and before the one after the last."""
        if stride not in self._ends:
            self._ends[stride] = [0, *accumulate(-(-len(batches) // stride) for batches in self._sizes)]
        return self._ends[stride]


def epochs_of(size: int, config: TrainingConfig, visits: Visits | None) -> Epochs:
    """The batches of a run's epochs.

    Args:
        size: examples in the dataset.
        config: gives epochs, batch_size and drop_last.
        visits: what the recipe's `order` or `batches` gives, None if it has neither.

    Raises:
        InvalidInput: without the examples that `drop_last` leaves out there are none, or `visits` is of
            another number of epochs.
    """
    if visits is not None and visits.sizes is not None:
        if len(visits.sizes) != config.epochs:
            raise InvalidInput(
                f"the run's record has the batches of {len(visits.sizes)} epochs, not {config.epochs}"
            )
        return Given(visits.sizes)
    length = size if visits is None or visits.length is None else visits.length
    if config.drop_last and length < config.batch_size:
        raise InvalidInput(
            f"drop_last leaves nothing to train on: an epoch has {length} examples and batch_size is "
            f"{config.batch_size}; choose a smaller batch_size, or set drop_last=False"
        )
    return Even(length - length % config.batch_size if config.drop_last else length, config.batch_size)
