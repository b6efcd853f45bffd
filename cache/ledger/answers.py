"""What the control plane's scripts answer, and what they say of leases, groups and events."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, cast

from torchord.cache.errors import TorchordError
from torchord.cache.keyring import bare
from torchord.cache.ledger.fields import LEASE
from torchord.cache.ledger.records import VersionRecord

log = logging.getLogger(__name__)

BeginVerdict = Literal["compute", "duplicate", "late", "early", "held", "stopped", "skewed"]
SlotVerdict = Literal["written", "group", "spare", "duplicate", "divergent", "late", "early", "stopped"]
CommitVerdict = Literal["ok", "fenced", "stale", "incomplete", "stopped", "diverged"]


@dataclass(frozen=True, slots=True)
class Lease:
    """Who is at a shard.

    Attributes:
        shard: number of the shard in its step.
        worker: id of the worker process.
        attempt: which try it is, counted from 1; a hand-back counts as none.
        delivery: id of the Celery task.
        open: whether the hold is in force.
        since: Unix time (s) at which it was taken, by the server's clock.
        backups: how many backups of the shard were asked for.
        asked: Unix time (s) of the last of them, 0.0 once it was begun.
    """

    shard: int
    worker: str
    attempt: int
    open: bool
    delivery: str = ""
    since: float = 0.0
    backups: int = 0
    asked: float = 0.0

    @classmethod
    def from_json(cls, text: str, shard: int = -1) -> Lease:
        """A lease as its hash has it: who reads it knows its shard.

        Raises:
            RecordDamaged: it is none; the message names the field.
        """
        return cls(shard=shard, **LEASE.read(text))


class Group(NamedTuple):
    """The slots that one partial sum adds up.

    Attributes:
        slot: number of the partial sum.
        first: the first slot that goes into it.
        last: the last one.
    """

    slot: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Committed:
    """The answer to a commit.

    Attributes:
        verdict: "ok", or why nothing changed.
        stored: on "ok", which versions are stored.
        pinned: those that readers hold.
        launched: whether the step that was to be launched with the commit is.
        incarnation: the one in force.
        dropped: records of the versions that the commit dropped; the caller deletes their bytes.
    """

    verdict: CommitVerdict
    stored: tuple[int, ...] = ()
    pinned: frozenset[int] = frozenset()
    launched: bool = field(default=False, compare=False)
    incarnation: str = field(default="", compare=False)
    dropped: tuple[VersionRecord, ...] = field(default=(), compare=False)

    @classmethod
    def of(cls, reply: Sequence[str]) -> Committed:
        """Read what scripts/commit.lua answers: a verdict, and after "ok" lists with "|" between them."""
        if reply[0] != "ok":
            return cls(cast(CommitVerdict, reply[0]))
        first = reply.index("|", 3)
        second = reply.index("|", first + 1)
        return cls(
            "ok",
            tuple(int(v) for v in reply[3:first]),
            frozenset(int(v) for v in reply[first + 1 : second]),
            launched=reply[1] == "1",
            incarnation=reply[2],
            dropped=tuple(readable(reply[second + 1 :])),
        )


def readable(texts: Iterable[str]) -> Iterator[VersionRecord]:
    """The records of versions among these texts; one that is none is logged and left out."""
    for text in texts:
        try:
            yield VersionRecord.from_json(bare(text))
        except TorchordError as error:
            log.error("the record of a version is passed over: %s", error)


@dataclass(frozen=True, slots=True)
class Begun:
    """The answer to a Client that wants to compute a shard: see scripts/begin_shard.lua.

    Attributes:
        verdict: "compute", or why not.
        attempt: which try it is.
        incarnation: of the run.
        record: where the version is that the shard is computed at; None if it was not asked for, or
            is not stored.
        memory: what `Ledger.server_memory` would say, with the verdict "compute".
    """

    verdict: BeginVerdict
    attempt: int
    incarnation: str
    record: VersionRecord | None = None
    memory: str = ""


@dataclass(frozen=True, slots=True)
class Event:
    """One line of a run's event stream: its id (resume point), type and data."""

    id: str
    type: str
    data: dict[str, Any]

    @property
    def at(self) -> float:
        """When it happened, by the server's clock (Unix time, s)."""
        return int(self.id.partition("-")[0]) / 1000

    def as_row(self) -> dict[str, Any]:
        """What pages and programs are told of it."""
        return {"id": self.id, "at": self.at, "type": self.type, "data": self.data}


@dataclass(frozen=True, slots=True)
class Finished:
    """The answer to a Client that has written a slot: see scripts/write_slot.lua.

    Attributes:
        verdict: "written", or what was there before.
        present: slots written in the step.
        called: the step's chord has called back already, before its last slot was in (see
            `Ledger.mark_called`): then the last slot's writer has to call.
        answer: to the command that was to follow; None if it was not sent.
        late: a shard that its holder takes far too long for, None if there is none or nobody asked.
    """

    verdict: SlotVerdict
    present: int
    called: bool
    answer: Any = None
    late: int | None = None
