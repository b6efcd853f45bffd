"""What a run has to tell others: entries that are written with the events that cause them.

An entry lies in the outbox from its event on until somebody was told, or until nobody could be: then it stays
there, dead, as long as the run can be asked about. Who delivers takes its lease, so that a dead deliverer's
entry goes to the next one; an addressee may be told twice, and knows that by the entry's id.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from torchord.cache import keys
from torchord.cache.errors import CacheUnreachable, RecordDamaged, TorchordError
from torchord.cache.ledger.control_plane import ControlPlane
from torchord.cache.ledger.fields import ENTRY_TOLD, TELLING
from torchord.cache.ledger.figures import figures_in, to_text
from torchord.cache.reading import FOREIGN, number_of

log = logging.getLogger(__name__)

TOLD = ("done", "failed", "cancelled", "paused", "resumed", "evaluated")
"""What others may be told of a run."""

MOST_ADDRESSEES = 4
"""Of one event."""

_MOST_ENTRIES = 1000
_MOST_EVALUATED = 900  # evaluations leave room for the run's end
_MOST_SIGNS = 2000
_MOST_METRICS = 100


@dataclass(frozen=True, slots=True)
class Telling:
    """An entry of the outbox, and how its delivery stands.

    Attributes:
        id: the same at each try, and no other entry's in this life of the run.
        event: one of `TOLD`.
        place: which of the event's addressees it is for, from 0.
        at: Unix time (s) of the event.
        data: what is told of it: version, metrics, message, kind; as far as the event has them.
        tries: how often it was tried.
        due: Unix time (s) from which on it may be tried again; of one that is being delivered, when its
            deliverer is given up.
        error: what went wrong the last time, "" if nothing did.
        dead: whether it is tried no more.
    """

    id: str
    event: str
    place: int
    at: float
    data: dict[str, Any]
    tries: int = 0
    due: float = 0.0
    error: str = ""
    dead: bool = False

    @classmethod
    def of(cls, id: str, text: str, **standing: Any) -> Telling:
        """An entry as its hash has it.

        Raises:
            RecordDamaged: it is none.
        """
        entry = ENTRY_TOLD.read(text, figures_in(text))
        if entry["event"] not in TOLD:
            raise RecordDamaged(f"no event {entry['event']:.60} is told")
        return cls(
            id=id, place=number_of(id.rpartition(".")[2], "the place of an addressee"), **entry, **standing
        )


class Outbox(ControlPlane):
    """A run's outbox."""

    def claim_telling(self, worker: str, *, seconds: float) -> Telling | None:
        """Take an entry that is due, for so long; None if there is none. See scripts/claim_telling.lua.

        Args:
            worker: id of the process that will deliver it; its entries are others' once its lease has ended.
        """
        names = self.keys
        with self._during("take an entry of the outbox"):
            reply = self._script(
                "claim_telling",
                [names.outbox, names.telling, keys.TELLING],
                [self.run, worker, keys.worker(""), seconds, secrets.token_hex(6), keys.RUN_TTL_SECONDS],
            )
            if not reply:
                return None
            id, text, tries = cast(list[str], reply)
            return self._telling(id, text, {"tries": number_of(tries, "the number of tries")})

    def settle_telling(
        self,
        telling: Telling,
        worker: str,
        verdict: Literal["told", "again", "dead"],
        *,
        seconds: float = 0.0,
        error: str = "",
        to: str = "",
    ) -> None:
        """Say how a delivery went: see scripts/settle_telling.lua. Event `told` or `not told`.

        Args:
            seconds: until it is tried again.
            error: what went wrong.
            to: whom it was for, in words.
        """
        names, error = self.keys, error[:_MOST_SIGNS]
        data = {"id": telling.id, "event": telling.event, "to": to, "tries": telling.tries}
        with self._during("settle an entry of the outbox"):
            self._script(
                "settle_telling",
                [names.outbox, names.telling, names.events],
                [
                    *(telling.id, worker, verdict, seconds, error),
                    to_text({**data, "message": error} if error else data),
                    *(keys.RUN_TTL_SECONDS, keys.EVENTS_KEPT),
                ],
            )

    def outbox(self) -> list[Telling]:
        """What has not been told, oldest first: what waits, and what nobody could be told."""
        with self._during("read the outbox"):
            pipe = self.client.pipeline(transaction=True)
            pipe.hgetall(self.keys.outbox)
            pipe.hgetall(self.keys.telling)
            texts, standings = cast(list[dict[str, str]], pipe.execute())
            found = [self._telling(id, text, _standing(standings.get(id))) for id, text in texts.items()]
        return sorted((each for each in found if each is not None), key=lambda each: (each.at, each.id))

    def tell_again(self) -> int:
        """Have tried anew what is dead; returns how many entries that were."""
        dead = [telling.id for telling in self.outbox() if telling.dead]
        if dead:
            with self._during("have the outbox told again"):
                pipe = self.client.pipeline(transaction=True)
                pipe.hdel(self.keys.telling, *dead)
                pipe.sadd(keys.TELLING, self.run)
                pipe.expire(keys.TELLING, keys.RUN_TTL_SECONDS)
                pipe.execute()
        return len(dead)

    def _telling(self, id: str, text: str, standing: dict[str, Any]) -> Telling | None:
        """An entry; one that is none is deleted and logged: nobody of ours wrote it."""
        try:
            opened = self._opened_by_any(self.places.telling, id.rpartition(".")[0], text=text)
            return Telling.of(id, opened, **standing)
        except CacheUnreachable:
            raise
        except (TorchordError, *FOREIGN) as error:
            log.error("%s: %.99r is no entry: deleted (%.300s)", self.keys.outbox, id, error)
            self.client.hdel(self.keys.outbox, id)
            self.client.hdel(self.keys.telling, id)
            return None


def subscribed(spec: Mapping[str, Any]) -> str:
    """What is to be told of a run, to how many, as its head has it: ",done=1,failed=2,"; "" for nothing."""
    on = spec.get("on")
    if not isinstance(on, dict):
        return ""
    counts = {event: len(to) for event, to in on.items() if event in TOLD and isinstance(to, list)}
    said = [f"{event}={min(count, MOST_ADDRESSEES)}" for event, count in sorted(counts.items()) if count]
    return f",{','.join(said)}," if said else ""


def entry_text(event: str, at: float, *said: Mapping[str, Any]) -> str:
    """The text of an entry: of what an event says, what is small and for others to know."""
    known: dict[str, Any] = {key: value for each in said for key, value in each.items()}
    data: dict[str, Any] = {key: known[key] for key in ("version",) if type(known.get(key)) is int}
    data |= {key: str(known[key])[:_MOST_SIGNS] for key in ("kind", "message") if key in known}
    if isinstance(metrics := known.get("metrics"), Mapping):
        data["metrics"] = dict(list(metrics.items())[:_MOST_METRICS])
    return to_text({"event": event, "at": at, "data": data})


def entry_arguments(event: str, id: str, sealed: str) -> Iterable[Any]:
    """The last arguments of a script that writes an entry: id, text, most entries, event where it is full."""
    full = {"id": id, "event": event, "message": "the outbox is full: nobody could be told of what is in it"}
    return (id, sealed, _MOST_EVALUATED if event == "evaluated" else _MOST_ENTRIES, to_text(full))


def _standing(text: str | None) -> dict[str, Any]:
    """How a delivery stands; of what nobody of ours wrote: nothing was tried."""
    try:
        found = TELLING.read(text or "{}")
    except RecordDamaged:
        return {}
    return {name: found[name] for name in ("tries", "due", "error", "dead") if name in found}
