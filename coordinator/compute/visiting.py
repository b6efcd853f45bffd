"""The recipe's own order: which indices each epoch visits, asked of `order` or `batches`.

They are a pure function of (seed, epoch, dataset), as everything is: all generators are seeded from
(seed, epoch) before an epoch is asked for, and a sampler that has a memory is asked epoch after epoch
from the first one on, as a `DataLoader` asks it.
"""

from __future__ import annotations

import hashlib
import operator
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from torchord.cache.errors import RecipeError
from torchord.coordinator.compute.batch import during
from torchord.coordinator.compute.determinism import pinned, seed_everything
from torchord.coordinator.spec.config import TrainingConfig
from torchord.coordinator.spec.epochs import Visits
from torchord.coordinator.spec.offered import offered
from torchord.coordinator.spec.plan import Indices, derive_seed
from torchord.coordinator.spec.resolving import ResolvedRecipe

_LOOKED_AT = 10_000_000  # indices of an `order` that are made at the start to see that epochs have one length
_AT_MOST = 10_000_000  # indices of an epoch, or 100 times the dataset where that is more
_SEQUENCES = (Sequence, np.ndarray, Tensor)


class Visiting:
    """What a recipe's `order` or `batches` gives, epoch by epoch.

    Args:
        resolved: the run's recipe, with one of the two.
        config: the run's config.
        dataset: what the recipe's dataset entry returned.
        recorded: what the training server found when the run began; None on itself at that time.

    Raises:
        RecipeError: the entry needs a value that it is not given.
    """

    def __init__(
        self, resolved: ResolvedRecipe, config: TrainingConfig, dataset: Any, recorded: Visits | None = None
    ) -> None:
        self.name = "order" if resolved.batches is None else "batches"
        call = resolved.order if resolved.batches is None else resolved.batches
        assert call is not None
        self._parts = (resolved, config, dataset)
        self._call: Callable[..., Any] = call
        self._named = offered(self.name, call)
        self._config = config
        self._dataset = dataset
        self._recorded = recorded
        self._sampler: Any = None  # what is asked epoch after epoch, and the epoch that it is asked for next
        self._next = 0
        self._lock = threading.Lock()

    def __call__(self, epoch: int) -> Indices:
        """Return the indices that an epoch visits, in order, batch after batch.

        Returns:
            int64 array.

        Raises:
            RecipeError: the entry gave what are no indices, or others than on the training server.
        """
        batches = self._asked(epoch)
        if self._recorded is not None:
            self._require_recorded(epoch, batches, self._recorded)
        return np.concatenate(batches) if len(batches) != 1 else batches[0]

    def survey(self) -> Visits:
        """Ask for the epochs beforehand: how long they are, and whether asking twice gives the same.

        Of an `order`, whose epochs have one length, as many as are made in some seconds; each of the others
        is looked at when it comes. Of `batches` all.

        Raises:
            RecipeError: what is given cannot be used.
        """
        first = self._asked(0)
        if digest_of(first) != digest_of(Visiting(*self._parts)._asked(0)):
            raise self._wrong(
                "gave two different orders for the same epoch: it depends on something other than size, "
                "epoch, seed and dataset, such as a generator of its own; draw from torch's, numpy's or "
                "random's global one, which are seeded for (seed, epoch)"
            )
        found, looked_at = [first], len(first[0])
        for epoch in range(1, self._config.epochs):
            if self.name == "order" and looked_at > _LOOKED_AT:
                break
            found.append(self._asked(epoch))
            looked_at += len(found[-1][0]) + 1000  # what asking itself takes
            if self.name == "order":
                self._require_length(epoch, len(found[-1][0]), len(first[0]))
        digests = tuple(map(digest_of, found))
        if self.name == "order":
            return Visits(length=len(first[0]), digests=digests)
        return Visits(sizes=tuple(tuple(map(len, batches)) for batches in found), digests=digests)

    def _require_recorded(self, epoch: int, batches: list[Indices], recorded: Visits) -> None:
        if epoch < len(recorded.digests) and digest_of(batches) != recorded.digests[epoch]:
            raise self._wrong(
                f"gives another order of epoch {epoch} here than on the training server: it depends on "
                "something other than size, epoch, seed and dataset, such as the order of a set, the clock "
                "or a file"
            )
        if recorded.length is not None:
            self._require_length(epoch, len(batches[0]), recorded.length)

    def _require_length(self, epoch: int, length: int, first: int) -> None:
        if length != first:
            raise self._wrong(
                f"gives {length} indices in epoch {epoch} and {first} in epoch 0; each epoch must have as "
                "many (repeat or leave some out), or give batches="
            )

    # --- asking the entry ---------------------------------------------------------------------

    def _asked(self, epoch: int) -> list[Indices]:
        """The batches of an epoch; of an `order` one, the epoch itself."""
        pins = pinned(self._config.threads, self._config.deterministic, restore=True)
        with self._lock, pins, during(f"making the {self.name} of epoch {epoch}"):
            return self._checked(epoch, self._iterated(epoch))

    def _iterated(self, epoch: int) -> Any:
        """What the entry gives for an epoch: indices, or lists of them, or an iterator of either."""
        if "epoch" in self._named:
            found = self._made(epoch)
            return found if isinstance(found, _SEQUENCES) else self._through(found)
        if self._sampler is None or epoch < self._next:
            found = self._made(0)
            if isinstance(found, (*_SEQUENCES, Iterator)):
                return found if epoch == 0 else self._made(epoch)
            self._sampler, self._next = found, 0
        for earlier in range(self._next, epoch):
            for _ in self._bounded(self._sampled(earlier), earlier):
                pass
        self._next = epoch + 1
        return self._sampled(epoch)

    def _made(self, epoch: int) -> Any:
        config = self._config
        values = {
            "size": len(self._dataset),
            "epoch": epoch,
            "seed": config.seed,
            "dataset": self._dataset,
            "data_source": self._dataset,
            "batch_size": config.batch_size,
        }
        seed_everything(derive_seed(config.seed, "order", epoch))
        return self._call(**{name: values[name] for name in self._named})

    def _sampled(self, epoch: int) -> Iterator[Any]:
        """Ask a sampler, as a loop over a `DataLoader` does."""
        if callable(getattr(self._sampler, "set_epoch", None)):
            self._sampler.set_epoch(epoch)
        seed_everything(derive_seed(self._config.seed, "order", epoch))
        return self._through(self._sampler)

    def _through(self, found: Any) -> Iterator[Any]:
        if not isinstance(found, Iterable):
            raise self._wrong(
                f"returned a {type(found).__name__}; it must return indices, or a sampler of them"
            )
        return iter(found)

    def _bounded(self, found: Iterable[Any], epoch: int) -> Iterator[Any]:
        """What is given, unless it has no end."""
        most = max(_AT_MOST, 100 * len(self._dataset))
        for number, item in enumerate(found):
            if number >= most:
                raise self._wrong(
                    f"gave more than {most} items in epoch {epoch}, and has no end; an epoch must end"
                )
            yield item

    # --- what it gave -------------------------------------------------------------------------

    def _checked(self, epoch: int, found: Any) -> list[Indices]:
        if self.name == "order":
            return [self._indices(epoch, found)]
        batches = [self._indices(epoch, batch) for batch in self._bounded(self._through(found), epoch)]
        if not batches:
            raise self._wrong(f"has no batch in epoch {epoch}")
        return batches

    def _indices(self, epoch: int, found: Any) -> Indices:
        if isinstance(found, (str, bytes)) or not isinstance(found, Iterable):
            raise self._wrong(f"gave a {type(found).__name__} in epoch {epoch}, where it must give indices")
        if isinstance(found, Tensor):
            found = found.detach().cpu().numpy()
        if isinstance(found, np.ndarray):
            if found.ndim != 1 or found.dtype.kind not in "iu":
                raise self._wrong(
                    f"gave an array of {found.dtype} with {found.ndim} dimensions in epoch {epoch}, where it "
                    "must give integer indices in one dimension"
                )
            array = found.astype(np.int64)
        else:
            array = np.fromiter((self._index(epoch, item) for item in self._bounded(found, epoch)), np.int64)
        size = len(self._dataset)
        if not len(array):
            raise self._wrong(
                f"gave no index in epoch {epoch}" + (" for a batch" if self.name == "batches" else "")
            )
        wrong = array[(array < 0) | (array >= size)]
        if len(wrong):
            raise self._wrong(
                f"gave index {wrong[0]} in epoch {epoch}, outside the dataset's 0 to {size - 1}"
            )
        return array

    def _index(self, epoch: int, item: Any) -> int:
        try:
            if isinstance(item, (bool, np.bool_)):
                raise TypeError
            return operator.index(item)
        except TypeError:
            way = "; lists of indices are what batches= gives" if isinstance(item, (list, tuple)) else ""
            raise self._wrong(
                f"gave a {type(item).__name__} in epoch {epoch} where it must give an index{way}"
            ) from None

    def _wrong(self, what: str) -> RecipeError:
        return RecipeError(f"recipe entry {self.name!r} {what}")


def digest_of(batches: list[Indices]) -> str:
    """BLAKE2b of an epoch's batches and of where they are cut, 16 hex digits."""
    found = hashlib.blake2b(digest_size=8)
    for batch in batches:
        found.update(len(batch).to_bytes(8, "little") + batch.astype("<i8", copy=False).tobytes())
    return found.hexdigest()


def visiting_of(
    resolved: ResolvedRecipe, config: TrainingConfig, dataset: Any, recorded: Visits | None = None
) -> Visiting | None:
    """What a recipe's `order` or `batches` gives; None if it has neither."""
    if resolved.order is None and resolved.batches is None:
        return None
    return Visiting(resolved, config, dataset, recorded)
