"""Calls the callbacks of the runs that this training server holds: from the event streams, beside the steps.

Each callback has a thread of its own, which reads the run's events: it hears of the steps of rounds as of
others, holds nothing up, and goes on where it was after a server's death. What it raises is logged and told.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torchord.cache.errors import CacheUnreachable, RecordDamaged, RunNotFound, TorchordError
from torchord.cache.ledger.answers import Event
from torchord.cache.ledger.ledger import Ledger
from torchord.cache.reading import FOREIGN
from torchord.cache.tensors.codec import Manifest, views
from torchord.coordinator.runtime.failures import contained, noted, short_traceback
from torchord.coordinator.runtime.happenings import METHODS, RunInfo, StepMade, VersionStored, happening
from torchord.coordinator.runtime.services import Services
from torchord.coordinator.spec.callback_entries import named, resolved

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5
FAILURES_MOST = 20
"""In a row, before a callback is called no more."""

_TOLD_MOST = 5  # failures of one callback that are events; the log has the others
_BATCH = 200
_PIN_SECONDS = 120.0
_LEAVING_SECONDS = 5.0
_ENDED_KEPT = 64
_MOST_SIGNS = 1000
_RESTING = ("paused", "failed", "cancelled", "done")


@dataclass(frozen=True)
class _Post:
    """A callback's place.

    Attributes:
        number: among the run's callbacks.
        target: its import path.
        entry: of the spec.
    """

    number: int
    target: str
    entry: Any


class Callbacks:
    """The callbacks of this process's runs.

    Args:
        services: of the process.
        worker: its id, which the heads of its runs name as their owner.
    """

    def __init__(self, services: Services, worker: str) -> None:
        self.services = services
        self.worker = worker
        self._listeners: dict[tuple[str, int], Listener] = {}

    def follow(self, ledger: Ledger, spec: dict[str, Any], token: int) -> None:
        """See to it that the callbacks of a run are called that is served here; nothing if it has none.

        Args:
            token: under which it is served; a callback that has failed under it is not made again.
        """
        for number, (target, entry) in enumerate(named(spec)):
            key = (ledger.run, number)
            before = self._listeners.get(key)
            if before is not None and (before.alive or (before.failed and before.token == token)):
                continue
            for gone in [k for k, each in self._listeners.items() if not each.alive][:-_ENDED_KEPT]:
                del self._listeners[gone]
            post = _Post(number, target, entry)
            made = self._listeners[key] = Listener(self.services, ledger, spec, self.worker, post, token)
            made.start()

    def stop(self) -> None:
        """Let each finish what is there, within seconds."""
        for listener in self._listeners.values():
            listener.leave()
        for listener in self._listeners.values():
            listener.join(_LEAVING_SECONDS)


class Listener:
    """Calls one callback of one run, until the run rests or is another server's.

    Args:
        services: of the process.
        ledger: the run's control plane.
        spec: of the run.
        worker: id of this process.
        post: the callback's place.
        token: under which the run is served.

    Attributes:
        failed: whether it has ended because the callback cannot be made, or failed time after time.
    """

    def __init__(
        self, services: Services, ledger: Ledger, spec: dict[str, Any], worker: str, post: _Post, token: int
    ) -> None:
        self.services = services
        self.ledger = ledger
        self.post = post
        self.token = token
        self.failed = False
        self._spec = spec
        self._worker = worker
        self._failures = 0  # in a row
        self._told = 0
        self._leaving = threading.Event()
        self._thread = threading.Thread(
            target=self._run, name=f"torchord-callback-{post.number}", daemon=True
        )

    @property
    def alive(self) -> bool:
        """Whether it goes on."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Begin, in a thread."""
        self._thread.start()

    def leave(self) -> None:
        """End once what is there is told."""
        self._leaving.set()

    def join(self, seconds: float) -> None:
        """Wait for its end."""
        if self._thread.is_alive():
            self._thread.join(seconds)

    def _run(self) -> None:
        try:
            callback = self._tried("its making", self._made)
            self.failed = callback is None
            if callback is not None:
                self._follow(callback)
                self._tried("close", partial(_called, callback, "close"))
        except RunNotFound:
            pass
        except TorchordError as error:
            log.warning("run %s: callback %s ends: %s", self.ledger.run, self.post.target, error)
        except Exception:
            log.exception("run %s: callback %s ends", self.ledger.run, self.post.target)

    def _made(self) -> Any:
        settings = self.services.settings
        make = resolved(self.post.number, self.post.entry, allowed=settings.allowed_modules)
        callback, place = make(), settings.checkpoint_dir
        local = None if "://" in place else Path(place) / self.ledger.run / "callbacks"
        if hasattr(callback, "begin"):
            config, recipe = self._spec.get("config", {}), self._spec.get("recipe", {})
            callback.begin(RunInfo(self.ledger.run, config, recipe, local))
        return callback

    def _follow(self, callback: Any) -> None:
        after = self.ledger.heard().get(str(self.post.number), "0-0")
        while self._failures < FAILURES_MOST:
            try:
                leaving = self._leaving.is_set()
                events = self.ledger.read_events(after, count=_BATCH)
                if events:
                    self._tell(callback, events)
                    after = events[-1].id
                    self.ledger.hear(str(self.post.number), after)
                    continue
                if leaving or self._is_over():
                    return
            except CacheUnreachable as error:
                log.debug("run %s: %s", self.ledger.run, error)
            self._leaving.wait(POLL_SECONDS)
        self.failed = True
        log.error(
            "run %s: callback %s failed %d times in a row: it is called no more, till a server takes it up",
            *(self.ledger.run, self.post.target, FAILURES_MOST),
        )

    def _is_over(self) -> bool:
        """Whether the run rests, with all its events read, or somebody else serves it."""
        head = self.ledger.head()
        return head.status in _RESTING or head.owner not in ("", self._worker)

    def _tell(self, callback: Any, events: Sequence[Event]) -> None:
        stepped = False
        for event in events:
            try:
                found = happening(event)
            except FOREIGN:  # somebody wrote it who is none of ours
                continue
            if found is not None:
                stepped = stepped or isinstance(found, StepMade)
                self._call(callback, METHODS[type(found)], found)
        if stepped and hasattr(callback, METHODS[VersionStored]):
            self._tell_version(callback)
        if hasattr(callback, "flush"):
            self._tried("flush", callback.flush)

    def _tell_version(self, callback: Any) -> None:
        """Of the versions that are stored the newest, which stays so long as it is looked at."""
        versions = self.ledger.kept_versions()[0]
        if versions:
            newest = max(versions)
            self.ledger.pin(newest, seconds=_PIN_SECONDS)
            made = VersionStored(newest, partial(self._tensors, newest))
            self._call(callback, METHODS[VersionStored], made)

    def _tensors(self, version: int) -> dict[str, Any]:
        _, flat, _ = self.services.parameters.fetch(self.ledger, version)
        return views(flat, Manifest.from_json(self.ledger.manifest()))

    def _call(self, callback: Any, method: str, found: Any) -> None:
        if hasattr(callback, method) and self._failures < FAILURES_MOST:
            self._tried(method, partial(getattr(callback, method), found))

    def _tried(self, what: str, call: Callable[[], Any]) -> Any:
        """What a call of the callback's code returns; None if it raised, which is logged and told."""
        try:
            with contained():
                found = call()
        except (CacheUnreachable, RecordDamaged):
            raise
        except Exception as error:  # noqa: BLE001  # whatever it is, the run goes on
            self._failures += 1
            frames = short_traceback(error)
            message = f"{type(error).__name__}: {error}{noted(error)}"
            log.error(
                "run %s: callback %s failed in %s: %s at %s",
                *(self.ledger.run, self.post.target, what, message, "; ".join(frames.splitlines())),
            )
            if self._told < _TOLD_MOST:
                self._told += 1
                self.ledger.emit(
                    "callback failed",
                    {"callback": self.post.target, "in": what, "message": message[:_MOST_SIGNS]},
                )
            return None
        self._failures = 0
        return found


def _called(callback: Any, method: str) -> None:
    if hasattr(callback, method):
        getattr(callback, method)()
