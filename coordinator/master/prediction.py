"""Prediction by the workers: inputs out as parts, outputs back in input order."""

from __future__ import annotations

import itertools
import logging
import math
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader, default_collate

from torchord.cache import keys
from torchord.cache.errors import (
    ChunkMissing,
    InvalidInput,
    NoWorker,
    RunFailed,
    TorchordError,
    VersionMissing,
    WaitTimeout,
)
from torchord.cache.ledger.ledger import Ledger
from torchord.cache.ledger.records import StateRecord
from torchord.cache.tensors import tree
from torchord.coordinator.compute.outputs import joined, restored, rows
from torchord.coordinator.local_cluster.starting import coming, starting
from torchord.coordinator.messages.sender import Sender
from torchord.coordinator.messages.task_names import GRADIENTS, PREDICT, UPDATES, worker_command
from torchord.coordinator.messages.waits import duration
from torchord.coordinator.runtime import activity
from torchord.coordinator.runtime.services import Services

log = logging.getLogger(__name__)

_WINDOW = 16  # parts in flight: bounds the cache's memory whatever the input's length
_POLL_SECONDS = 0.01
_RESEND_SECONDS = 10.0
_SAY_SECONDS = 10.0  # without progress; then after twice as long, and so on
_ALONE_SECONDS = 3.0  # longer than the lease of a worker that died
_PIN_SECONDS = 600.0


def predict(
    services: Services,
    sender: Sender,
    ledger: Ledger,
    inputs: Any,
    *,
    batch_size: int,
    version: int,
    timeout_seconds: float | None,
    recipe: Mapping[str, Any],
) -> Any:
    """See `Run.predict`.

    Args:
        recipe: the run's, as its spec has it.
    """
    if type(batch_size) is not int or batch_size < 1:
        raise InvalidInput(f"batch_size must be a whole number of examples, at least 1, got {batch_size!r}")
    if ledger.version(version) is None:
        raise VersionMissing(
            f"version {version} of run {ledger.run!r} is not in the cache; stored: "
            f"{sorted(ledger.versions())}. Predict from one of these, or from the newest (version=None)"
        )
    batches = _batches(inputs, batch_size, recipe)
    prediction = Prediction(services, sender, ledger, version, batches)
    try:
        done = prediction.outputs(timeout_seconds)
    finally:
        prediction.clean_up()
    if not done:
        raise InvalidInput("predict() was given no examples")
    return joined([restored(part) for part in done])


@dataclass(frozen=True, slots=True)
class _Part:
    """A part that is under way.

    Attributes:
        batch: its inputs.
        record: where they are stored.
        kwargs: the message's.
        question: a digest of what it asks for.
    """

    batch: Any
    record: StateRecord
    kwargs: dict[str, Any]
    question: str


class Prediction:
    """One prediction under way: a window of parts, sent again where their workers died.

    Args:
        services: connections and stores of this process.
        sender: sends the parts to the workers.
        ledger: of the run.
        version: to predict from; it is pinned until the outputs are there.
        batches: the inputs of each part, in order, and whether they are samples that are to be collated.
    """

    def __init__(
        self,
        services: Services,
        sender: Sender,
        ledger: Ledger,
        version: int,
        batches: Iterator[tuple[Any, bool]],
    ) -> None:
        self._services = services
        self._store = services.predictions
        self._sender = sender
        self._ledger = ledger
        self._version = version
        self._batches = batches
        self._request = uuid.uuid4().hex[:12]
        self._number = 0  # of the next part
        self._exhausted = False
        self._sent: dict[int, _Part] = {}
        self._done: dict[int, Any] = {}
        self._began = self._progressed = self._looked = self._resent = time.monotonic()
        self._pinned = -math.inf
        self._patience = _SAY_SECONDS

    def outputs(self, timeout_seconds: float | None) -> list[Any]:
        """Have every part computed; returns their outputs, in order.

        Raises:
            RunFailed: a part cannot be computed.
            NoWorker: nobody consumes the queue.
            VersionMissing: the version is lost for good.
            WaitTimeout: it took too long.
        """
        while not self._exhausted or self._sent:
            self._pin()
            self._send_more()
            self._collect()
            now = time.monotonic()
            if timeout_seconds is not None and now - self._began > timeout_seconds:
                raise WaitTimeout(
                    f"prediction from run {self._ledger.run!r}: {len(self._done)} parts in "
                    f"{timeout_seconds:g} s; {self._waits_for()}"
                )
            if self._sent:
                self._require_worker(now)
                if now - self._progressed > self._patience:
                    self._patience *= 2
                    log.warning("prediction from run %r: %s", self._ledger.run, self._waits_for())
                if now - max(self._progressed, self._resent) > _RESEND_SECONDS:
                    self._send_again()
                    self._resent = now
                time.sleep(_POLL_SECONDS)
        return [self._done[part] for part in range(self._number)]

    def clean_up(self) -> None:
        """Delete what is stored of it."""
        self._ledger.drop_outputs(self._request)
        self._store.delete(part.record for part in self._sent.values())

    def _pin(self) -> None:
        now = time.monotonic()
        if now - self._pinned > _PIN_SECONDS / 2:
            self._ledger.pin(self._version, seconds=_PIN_SECONDS)
            self._pinned = now

    def _send_more(self) -> None:
        """Store and send parts until the window is full."""
        while not self._exhausted and len(self._sent) < _WINDOW:
            following = next(self._batches, None)
            if following is None:
                self._exhausted = True
                return
            batch, samples = following
            record = self._store.put_inputs(self._ledger, self._request, self._number, batch)
            kwargs = {"run": self._ledger.run, "version": self._version, "request": self._request}
            kwargs |= {"part": self._number, "inputs": record.as_dict()}
            kwargs |= {"samples": True} if samples else {}
            question = self._store.question(self._version, record.as_dict(), samples)
            self._sent[self._number] = _Part(batch, record, kwargs, question)
            self._send(kwargs)
            self._number += 1

    def _send(self, kwargs: dict[str, Any]) -> None:
        self._sender.send(PREDICT, kwargs, queue=GRADIENTS, hidden="inputs")

    def _collect(self) -> None:
        """Fetch the outputs that are there."""
        asked = {number: part.question for number, part in self._sent.items()}
        for number, answer in self._store.answers(self._ledger, self._request, asked).items():
            if number not in self._sent:
                continue
            if isinstance(answer, str):
                raise RunFailed(f"prediction from run {self._ledger.run!r}: {answer}")
            self._done[number] = self._store.get(answer)
            self._store.delete([answer, self._sent[number].record])
            del self._sent[number]
            self._progressed, self._patience = time.monotonic(), _SAY_SECONDS

    def _require_worker(self, now: float) -> None:
        """Make sure, once in a while without progress, that somebody consumes the queue."""
        if now - max(self._progressed, self._looked) <= _ALONE_SECONDS:
            return
        self._looked = now
        started = starting(self._services.settings.url)  # before the registry, see there
        if not self._services.registry.consumers(GRADIENTS) and not coming(started, [GRADIENTS]):
            raise NoWorker(
                f"no worker is consuming queue {GRADIENTS!r}; start one: {worker_command(GRADIENTS)}"
            )

    def _at_work(self) -> dict[int, str]:
        """Parts that living workers are at -> who, and at which line of code, where that is known."""
        found = {}
        for info in self._services.registry.alive().values():
            for number in self._sent:
                task = activity.prediction(self._ledger.run, self._version, number)
                if task in info.tasks:
                    found[number] = f"{info.id} ({place})" if (place := info.where.get(task)) else info.id
        return found

    def _waits_for(self) -> str:
        """What it waits for, since when, and who can end it."""
        since = duration(time.monotonic() - self._progressed)
        ends = "; restart that worker if it never ends, or bound the wait by predict(timeout=...)"
        if at := self._at_work():
            parts = ", ".join(f"part {number} on {who}" for number, who in sorted(at.items()))
            return f"for {since} it has waited for {parts}{ends}"
        return (
            f"for {since} it has waited for {len(self._sent)} parts in queue {GRADIENTS!r}, none of which a "
            "worker has begun: they are at other runs, or start; more workers take them sooner"
        )

    def _send_again(self) -> None:
        """Send the parts that nobody is at again, for a worker may have died with one; each is written once.

        One that a worker is at is not: what never ends there would take one worker after the other.
        """
        self._require_version()
        at_work = self._at_work()
        for number, part in self._sent.items():
            self._store.keep_inputs(part.record, part.batch)
            if number not in at_work:
                self._send(part.kwargs)

    def _require_version(self) -> None:
        """Make sure that the workers can load the version, which they may have tried in vain.

        Raises:
            VersionMissing: it is lost, and no training server can store it again.
        """
        services, ledger, version = self._services, self._ledger, self._version
        try:
            services.chunks.touch(services.parameters.record(ledger, version).blob, keys.BLOB_TTL_SECONDS)
        except (VersionMissing, ChunkMissing) as error:
            head = ledger.head()
            if isinstance(error, VersionMissing) or head.status != "running" or head.version != version:
                raise VersionMissing(
                    f"version {version} of run {ledger.run!r} was lost while workers predicted from it: "
                    f"{error}. Predict from another version, or load a checkpoint with run.model(version)"
                ) from error
            self._sender.advance(ledger.run, queue=head.queue or UPDATES)


def _batches(inputs: Any, batch_size: int, recipe: Mapping[str, Any]) -> Iterator[tuple[Any, bool]]:
    """Inputs cut into batches, in order, each with whether it is samples for the recipe's collate."""
    cut = rows(inputs, batch_size)
    if cut is not None:
        for batch in cut:
            yield batch, False
        return
    count = 0
    found = _samples(inputs)
    while samples := list(itertools.islice(found, batch_size)):
        if "collate" in recipe:
            yield [_carried(sample, count + place) for place, sample in enumerate(samples)], True
        else:
            yield _collated(samples, whole="predict" in recipe), False
        count += len(samples)


def _samples(inputs: Any) -> Iterator[Any]:
    if isinstance(inputs, DataLoader):
        raise InvalidInput("predict() takes samples, and a DataLoader gives batches; give its dataset")
    if hasattr(inputs, "__getitem__") and hasattr(inputs, "__len__") and not isinstance(inputs, str | bytes):
        return (inputs[place] for place in range(len(inputs)))
    if isinstance(inputs, Iterable) and not isinstance(inputs, str | bytes):
        return iter(inputs)
    raise InvalidInput(
        "predict() takes a tensor, a mapping of tensors, a Dataset or a list of samples, got "
        f"{type(inputs).__name__}"
    )


def _collated(samples: Sequence[Any], *, whole: bool) -> Any:
    """Samples as torch's default collate has them, as a `whole` or of pairs the inputs alone."""
    inner = samples if whole else [s[0] if isinstance(s, (tuple, list)) else s for s in samples]
    try:
        return default_collate(list(inner))
    except (RuntimeError, TypeError, KeyError) as error:
        raise InvalidInput(
            f"these samples make no batch ({error}); where they differ in form, give the recipe a "
            "collate=(list of samples) -> batch"
        ) from error


def _carried(sample: Any, place: int) -> Any:
    """A sample as it travels: mappings as dicts."""
    found = {key: sample[key] for key in sample} if isinstance(sample, Mapping) else sample
    try:
        tree.flatten(found)
    except TorchordError as error:
        raise InvalidInput(
            f"sample {place} cannot travel to the workers: {error}; have the dataset return tensors, arrays, "
            "numbers, strings, and dicts, lists and tuples of them"
        ) from error
    return found
