"""Rounds: steps that Clients take by themselves, each of them in one round trip or two."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from torchord.cache import keys
from torchord.cache.errors import RecordDamaged
from torchord.cache.ledger.figures import to_text
from torchord.cache.ledger.incarnation import revision
from torchord.cache.ledger.records import LedgerEntry, SlotRecord, VersionRecord
from torchord.cache.ledger.slots import Slots
from torchord.cache.reading import number_of
from torchord.cache.servers.fast_client import Command, script_command

KEPT_STEPS = 2
"""So many of the steps that were committed last keep slots and bytes, for whoever is behind."""


@dataclass(frozen=True, slots=True)
class Report:
    """The version that a participant has made.

    Attributes:
        entry: what the ledger is to say of it, if this is the first report.
        event: for the run's events, likewise.
        slots: how many the step had.
    """

    entry: LedgerEntry
    event: dict[str, Any]
    slots: int


@dataclass(frozen=True, slots=True)
class Seat:
    """Who takes turns in which round.

    Attributes:
        worker: id of the process.
        memory: identity of the memory that it shares with its host, "" for none.
        token, first: fencing token of the round, and its first step: they name it.
        incarnation: of the run, as the round was joined.
        attempts: tries of a shard, at most.
    """

    worker: str
    memory: str
    token: int
    first: int
    incarnation: str
    attempts: int


@dataclass(frozen=True, slots=True)
class Turn:
    """What a participant is to do next; verdicts as in scripts/take_turn.lua.

    Attributes:
        shard, attempt, memory: with "compute".
        slots: with "complete".
        other: the worker that made another version, with "divergent".
    """

    verdict: str
    written: str = ""
    reported: str = ""
    shard: int = -1
    attempt: int = 0
    memory: str = ""
    slots: dict[int, SlotRecord] = field(default_factory=dict)
    other: str = ""


@dataclass(frozen=True, slots=True)
class RoundState:
    """An open round, as a training server or the supervisor sees it.

    Attributes:
        first, last: its steps.
        token: under which it was opened.
        participants: ids of the workers in it; they may have died.
        waiting: those that have waited for others since a step was last complete.
        ending: whether it is to end before its last step.
        apart: whether its participants share no memory.
        published: the version that was stored at its end, None before that.
        disputed: the version of which two participants made different bytes, None if there is none.
        rivals: digest of that version's parameters by worker, as each of the two had reported it.
    """

    first: int
    last: int
    token: int
    participants: tuple[str, ...] = ()
    published: int | None = None
    disputed: int | None = None
    rivals: dict[str, str] = field(default_factory=dict)
    waiting: tuple[str, ...] = ()
    ending: bool = False
    apart: bool = False

    @classmethod
    def of(cls, fields: Mapping[str, str]) -> RoundState:
        """Read the round's hash."""

        def number(name: str) -> int | None:
            return number_of(fields[name], f"field {name!r} of a round") if name in fields else None

        first, last, token = number("first"), number("last"), number("token")
        if first is None or last is None or token is None:
            raise RecordDamaged("a round has no first step, last step or token")
        disputed = number("disputed")
        other, _, theirs = fields.get("other", "").partition(" ")
        rivals = {fields.get(f"w{disputed}", ""): fields.get(f"d{disputed}", ""), other: theirs}
        return cls(
            first,
            last,
            token,
            participants=tuple(name[2:] for name in fields if name.startswith("p:")),
            published=number("published"),
            disputed=disputed,
            rivals=rivals if disputed is not None else {},
            waiting=tuple(filter(None, fields.get("waiting", "").split(","))),
            ending="ending" in fields,
            apart=fields.get("memory") == "",
        )


class Rounds(Slots):
    """What participants and training servers do with a round."""

    def open_round(self, first: int, last: int, *, token: int) -> str:
        """Open a round from the present step on; see scripts/open_round.lua."""
        with self._during(f"open a round at step {first}"):
            lasting = [name for name in self.keys.lasting() if name != self.keys.head]
            names = [self.keys.head, self.keys.round, *lasting]
            return cast(str, self._script("open_round", names, [token, first, last, keys.RUN_TTL_SECONDS]))

    def close_round(self, *, token: int, committed: int) -> bool:
        """Close the round; False if another server has taken the run over.

        Args:
            committed: the run's version: the slots of the steps before it go.
        """
        spent = [self.keys.slots(step) for step in range(max(0, committed - KEPT_STEPS - 1), committed)]
        with self._during("close a round", ""):
            reply = self._script("close_round", [self.keys.head, self.keys.round, *spent], [token])
        return bool(reply == "ok")

    def forget_expected(self, first: int) -> None:
        """Let a replay make other versions than before, from one on."""
        with self._during(f"forget what version {first} was"):
            known = cast(list[str], self.client.hkeys(self.keys.expected))
            if doubtful := [version for version in known if int(version) >= first]:
                self.client.hdel(self.keys.expected, *doubtful)

    def round(self) -> RoundState | None:
        """The open round, None if there is none."""
        with self._during("read a round"):
            found = cast(dict[str, str], self.client.hgetall(self.keys.round))
            return RoundState.of(found) if found else None

    def turn(
        self,
        seat: Seat,
        step: int,
        *,
        shards: int,
        slot: SlotRecord | None = None,
        report: Report | None = None,
        late_seconds: float | None = None,
        wait_seconds: float | None = None,
    ) -> Turn:
        """Report, write a slot, and ask what is next, in one round trip; see scripts/take_turn.lua.

        Args:
            step: the version that the participant holds.
            shards: of that step; 0 if the round does not have it.
            slot: of that step; its bytes are stored.
            report: of that version, if it was made here.
            late_seconds: after so long a live holder's shard is computed once more.
            wait_seconds: wait so long for others first, or until the step is complete.
        """
        names = self.keys
        with self._during(f"take a turn in step {step}"):
            command = script_command(
                "take_turn",
                [
                    *(names.head, names.round, names.slots(step), names.leases(step)),
                    *(names.ledger, names.expected, names.events),
                    *(names.slots(step - 1), names.leases(step - 1), names.slots(step - 1 - KEPT_STEPS)),
                    names.versions,
                ],
                [
                    *(step, seat.token, seat.worker, keys.worker(""), names.wake(""), seat.memory, shards),
                    *(keys.WORK_TTL_SECONDS, seat.attempts, "" if late_seconds is None else late_seconds),
                    revision(seat.incarnation),
                    *self._slot_arguments(step, slot, seat),
                    *self._report_arguments(report),
                    *(keys.EVENTS_KEPT, keys.RUN_TTL_SECONDS, keys.WAKE_TTL_SECONDS, seat.first),
                ],
            )
            return self._turn(step, self._awake(seat, command, wait_seconds))

    def _slot_arguments(self, step: int, slot: SlotRecord | None, seat: Seat) -> list[Any]:
        if slot is None:
            return [""] * 4
        return [slot.shard, self._sealed_slot(step, slot, seat.incarnation), slot.nonce, slot.digest]

    def _report_arguments(self, report: Report | None) -> list[Any]:
        if report is None:
            return ["", "", "", "", 0, 0]
        entry = report.entry
        sealed = self.keyring.sealed("server", self.places.entry(entry.version), entry.to_json())
        return [
            *(entry.parameters, entry.chain, sealed, to_text(report.event), report.slots),
            entry.committed_at,
        ]

    def _turn(self, step: int, found: list[Any]) -> Turn:
        verdict, written, reported, *more = found
        if verdict == "compute":
            return Turn(verdict, written, reported, int(more[0]), int(more[1]), more[2])
        if verdict == "complete":
            return Turn(verdict, written, reported, slots=self._slots(step, more))
        return Turn(verdict, written, reported, other=str(more[0]) if more else "")

    def end_round(
        self,
        seat: Seat,
        version: int,
        *,
        record: VersionRecord | None = None,
        leaving: bool = False,
        wait_seconds: float | None = None,
    ) -> str:
        """Come to the round's end; see scripts/end_round.lua.

        Args:
            version: what the participant holds.
            record: of that version, once it is stored with its optimizer state.
            leaving: whether this process has to end before the round does.
            wait_seconds: as for `turn`.
        """
        names = self.keys
        with self._during(f"end a round at version {version}"):
            text = "" if record is None else self._sealed_version(record)
            command = script_command(
                "end_round",
                [names.head, names.round, names.versions],
                [
                    *(seat.token, seat.worker, keys.worker(""), names.wake(""), version, text),
                    *(keys.RUN_TTL_SECONDS, int(leaving), keys.WAKE_TTL_SECONDS, seat.first),
                ],
            )
            return cast(str, self._awake(seat, command, wait_seconds))

    def _awake(self, seat: Seat, command: Command, wait_seconds: float | None) -> Any:
        """Send a command, at once or when somebody wakes this worker, in one round trip; its answer."""
        if wait_seconds is None:
            return self._call(command)[0]
        return self._call(("BRPOP", self.keys.wake(seat.worker), f"{wait_seconds:.3f}"), command)[1]

    def leave_round(self, worker: str) -> None:
        """Say that a worker is not in the round any more."""
        with self._during("leave a round", ""):
            self.client.hdel(self.keys.round, f"p:{worker}")
