"""Tells others what their runs have come to: one delivery a run at a time, beside the supervisor's rounds.

It is no part of any step: whoever does not answer costs a thread for some seconds. At least once: the entry's
lease ends with its deliverer, and a call that was made and not recorded is made again, under the same id.
"""

from __future__ import annotations

import json
import logging
import random
import threading
from collections.abc import Callable
from typing import Any, Protocol

from torchord.cache.errors import (
    CacheError,
    CacheUnreachable,
    InvalidInput,
    NotTold,
    RunNotFound,
    TorchordError,
)
from torchord.cache.ledger.figures import for_others
from torchord.cache.ledger.incarnation import life
from torchord.cache.ledger.ledger import Ledger
from torchord.cache.ledger.outbox import Telling
from torchord.cache.ledger.workers import Registry
from torchord.cache.settings import Settings
from torchord.coordinator.messages import webhook
from torchord.coordinator.messages.addressees import check, is_url, named, require_allowed, shown
from torchord.coordinator.messages.sender import Sender
from torchord.coordinator.runtime.faults import Hook, nothing

log = logging.getLogger(__name__)

TRIES = 16
"""Of one entry; with the waits between them, some four to five hours."""

LEASE_SECONDS = 3 * webhook.SECONDS
"""Of an entry; beyond any call, and shorter where its deliverer is known to have died."""

_NOTHING: dict[str, Any] = {"version": None, "metrics": {}, "kind": "", "message": ""}
_AT_ONCE = 8
_LONGEST_SECONDS = 3600.0


class Office(Protocol):
    """What a messenger needs of its process."""

    settings: Settings

    def ledger(self, run: str) -> Ledger:
        """The control plane of a run."""


class Messenger:
    """Delivers what lies in outboxes.

    Args:
        office: connections and settings of the process.
        worker: id of the process, which lives as long as its heartbeat.
        sender: sends tasks.
        fault: called with the name of each point of the protocol; tests use it to die there.
        post: calls an address; tests have others.
        chance: a number from 0 to 1 for the waits, so that what failed together does not come back so.
    """

    def __init__(
        self,
        office: Office,
        worker: str,
        sender: Sender,
        *,
        fault: Hook = nothing,
        post: Callable[..., None] = webhook.post,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.office = office
        self.worker = worker
        self.sender = sender
        self.fault = fault
        self._post = post
        self._chance = chance
        self._lock = threading.Lock()
        self._at: dict[str, threading.Thread] = {}  # run -> who delivers of it
        self._first = 0

    def look(self, registry: Registry) -> None:
        """Begin to deliver what is due, of each run at most one entry; to be called again and again."""
        runs = registry.telling_runs()
        if not runs:
            return
        self._first = (self._first + 1) % len(runs)  # none is always the last
        for run in runs[self._first :] + runs[: self._first]:
            with self._lock:
                if run in self._at or len(self._at) >= _AT_ONCE:
                    continue
            try:
                ledger = self.office.ledger(run)
                telling = ledger.claim_telling(self.worker, seconds=LEASE_SECONDS)
            except CacheUnreachable:
                raise
            except TorchordError as error:
                log.error("run %s: its outbox cannot be read: %s", run, error)
                continue
            if telling is not None:
                thread = threading.Thread(
                    target=self._work, args=(ledger, telling), name="torchord-messenger", daemon=True
                )
                with self._lock:
                    self._at[run] = thread
                thread.start()

    def join(self, seconds: float) -> None:
        """Wait until what is being delivered is, or for so long."""
        with self._lock:
            threads = list(self._at.values())
        for thread in threads:
            thread.join(seconds)

    def _work(self, ledger: Ledger, telling: Telling) -> None:
        try:
            self._deliver(ledger, telling)
        except TorchordError as error:
            log.warning("run %s: %s", ledger.run, error)
        except Exception:
            log.exception("run %s: unexpected error of a messenger; going on", ledger.run)
        finally:
            with self._lock:
                self._at.pop(ledger.run, None)

    def _deliver(self, ledger: Ledger, telling: Telling) -> None:
        """Tell one addressee of one event, and record how that went."""
        to = ""
        try:
            addressee = _addressee(ledger, telling)
            to = shown(addressee)
            self._tell(addressee, notice(ledger, telling))
        except CacheUnreachable:
            raise  # the lease says when it is tried again
        except (TorchordError, OSError, ValueError) as error:
            last = telling.tries >= TRIES
            log.warning(
                "run %s: %s was not told to %s at try %d of %d: %s",
                *(ledger.run, telling.event, to or "anybody", telling.tries, TRIES, error),
            )
            ledger.settle_telling(
                telling,
                self.worker,
                "dead" if last else "again",
                seconds=self.wait_seconds(telling.tries),
                error=str(error),
                to=to,
            )
            return
        ledger.settle_telling(telling, self.worker, "told", to=to)

    def wait_seconds(self, tries: int) -> float:
        """Until it is tried again: 1 to 2 s after the first try, twice that after each, an hour at most."""
        return float(min(2.0 ** min(tries, 30), _LONGEST_SECONDS)) * (0.5 + 0.5 * self._chance())

    def _tell(self, addressee: str, told: dict[str, Any]) -> None:
        settings = self.office.settings
        try:
            check(told["event"], addressee)
            require_allowed(addressee, settings)
        except InvalidInput as error:
            raise NotTold(str(error)) from None
        self.fault("messenger.before_send")
        if is_url(addressee):
            self._post(addressee, told, key=settings.tell_key, private=named(addressee, settings))
        else:
            try:
                self.sender.tell(addressee, told, queue=settings.tell_queue)
            except CacheError as error:  # a role that may not write to that queue, say
                raise NotTold(str(error)) from error
        self.fault("messenger.after_send")


def notice(ledger: Ledger, telling: Telling) -> dict[str, Any]:
    """What is told: small, and the same at each try."""
    said = {
        "id": f"{ledger.run}/{life(ledger.incarnation())}/{telling.id}",
        "run": ledger.run,
        "event": telling.event,
        "at": telling.at,
        **{name: telling.data.get(name, empty) for name, empty in _NOTHING.items()},
    }
    # A figure that is NaN or infinite is null: not every reader of JSON has them.
    found: dict[str, Any] = json.loads(for_others(said))
    return found


def _addressee(ledger: Ledger, telling: Telling) -> str:
    """Whom an entry is for, as the run's spec says.

    Raises:
        NotTold: the spec names nobody, or is nobody's that this process trusts.
    """
    try:
        on = ledger.spec().get("on")
    except RunNotFound as error:
        raise NotTold(str(error)) from None
    to = on.get(telling.event) if isinstance(on, dict) else None
    if not isinstance(to, list) or telling.place >= len(to):
        raise NotTold(f"its spec names nobody who is to be told of {telling.event!r}")
    return str(to[telling.place])
