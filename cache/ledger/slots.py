"""The shards of a step: who computes which, what is written, who is late."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, cast

from torchord.cache import keys
from torchord.cache.blobs.notice import Notice, notices
from torchord.cache.errors import TorchordError
from torchord.cache.ledger.answers import (
    Begun,
    Finished,
    Group,
    Lease,
)
from torchord.cache.ledger.control_plane import ControlPlane
from torchord.cache.ledger.incarnation import revision
from torchord.cache.ledger.records import Head, SlotRecord
from torchord.cache.ledger.run_life import head_of
from torchord.cache.servers.fast_client import Command, script_command

log = logging.getLogger(__name__)

BACKUP_FACTOR = 1.5  # a holder may keep an idle worker waiting for so many of the idle one's shards,
BACKUP_SECONDS = 0.05  # and so much longer: what a backup costs, and what a machine's hiccups are
BACKUPS_MOST = 2
BACKUP_LOST_SECONDS = 5.0  # a backup that nobody began by then was lost
BACKUP_ASKED_ALWAYS = 8  # with so few shards missing each question of an idle worker is answered


class Slots(ControlPlane):
    """Leases and slots of a step's shards, and what is told of blobs on their way to it."""

    def begin(
        self,
        step: int,
        shard: int,
        *,
        worker: str,
        delivery: str,
        backup: bool = False,
        environment: str = "",
        version: int | None = None,
        lacking: bool = True,
    ) -> Begun:
        """Ask whether to compute a shard, and take its lease.

        Args:
            worker: id under which this process keeps its heartbeat.
            delivery: id of the Celery task, so that a request sent twice is known again.
            backup: compute beside a live holder (a backup task).
            environment: what of the worker could change bits; "" if that does not matter.
            version: what the step is computed at; None: the version of its own number.
            lacking: whether the caller has to load that version and wants its record.
        """
        wanted = step if version is None else version
        names = [self.keys.head, self.keys.slots(step), self.keys.leases(step)]
        lease = [step, shard, worker, keys.worker(""), int(backup), keys.WORK_TTL_SECONDS, delivery]
        commands = [script_command("begin_shard", names, [*lease, environment, wanted])]
        if lacking:
            commands.append(("HGET", self.keys.versions, wanted))
        with self._during(f"begin shard {shard} of step {step}"):
            (verdict, attempt, incarnation, *memory), *found = self._call(*commands)
            if verdict != "compute":
                return Begun(verdict, int(attempt), incarnation)
            self._incarnation = incarnation
            record = None
            if found and found[0] is not None:
                try:
                    record = self._version(wanted, found[0])
                except TorchordError as error:
                    log.error("the record of version %d is passed over: %s", wanted, error)
            return Begun(verdict, int(attempt), incarnation, record, *memory)

    def end_lease(self, step: int, shard: int, *, worker: str, delivery: str, counts: bool = False) -> bool:
        """Hand a shard back so that it can be computed elsewhere at once.

        Args:
            counts: whether the try counts towards `max_attempts`.

        Returns:
            False if the lease is not this delivery's (any more).
        """
        with self._during(f"hand back shard {shard} of step {step}"):
            return bool(
                self._script("end_lease", [self.keys.leases(step)], [shard, worker, delivery, int(counts)])
            )

    def finish_slot(
        self,
        step: int,
        slot: SlotRecord,
        *,
        incarnation: str | None = None,
        version: int | None = None,
        into: Group | None = None,
        then: Command | None = None,
        idle: tuple[int, float] | None = None,
    ) -> Finished:
        """Write a gradient slot, or a partial sum's, once; its bytes are already stored.

        Args:
            incarnation: what `begin` answered: another run of the same name takes no slot of this one.
                None if that is not known.
            version: what it was computed at; None: the version of the step's own number.
            into: the partial sum that the slot goes into, None for none.
            then: a command of the caller's that may follow in the same round trip.
            idle: what the caller asks `late_shard` with (shards, seconds), None if it does not.
        """
        names = [self.keys.head, self.keys.slots(step)]
        arguments = [
            step,
            slot.shard,
            self._sealed_slot(step, slot, incarnation),
            slot.nonce,
            slot.digest,
            keys.WORK_TTL_SECONDS,
            revision(incarnation or ""),
            step if version is None else version,
            *(("", "", "") if into is None else into),
        ]
        commands: list[Command] = [
            script_command("write_slot", names, arguments),
            ("HGET", self.keys.head, "called"),
        ]
        if then is not None:
            commands.append(then)
        if idle is not None:
            commands.append(script_command("late_shard", *self._late(step, *idle, slot=slot)))
        with self._during(f"write slot {slot.shard} of step {step}"):
            (verdict, present), called, *answers = self._call(*commands)
            if verdict in ("duplicate", "divergent") and self._stands_no_more(step, slot.shard):
                before = verdict
                (verdict, present), called, *answers = self._call(*commands)
                if verdict in ("written", "group", "spare"):
                    self._uncount(before)
            late = -1 if idle is None else int(answers.pop())
            answer = answers[0] if answers else None
            return Finished(
                verdict, int(present), called == str(step), answer, late=None if late < 0 else late
            )

    def _stands_no_more(self, step: int, number: int) -> bool:
        """Whether what stood in a slot's place is gone, or was none of ours and is deleted."""
        if not self.keyring:
            return False
        text = cast(str | None, self.client.hget(self.keys.slots(step), str(number)))
        return text is None or not self._slots(step, {str(number): text})

    def _uncount(self, verdict: str) -> None:
        """Take back what was counted of a slot that was none."""
        for name in ("duplicates", *(("divergent",) if verdict == "divergent" else ())):
            self.client.hincrby(self.keys.head, name, -1)

    def late_shard(self, step: int, *, shards: int, seconds: float) -> int | None:
        """Ask, with nothing else to do, for a shard that its holder takes far too long for.

        Args:
            shards: how many the step has.
            seconds: what the asker takes for a shard.

        Returns:
            The shard to compute once more, None if there is none: see scripts/late_shard.lua.
        """
        with self._during(f"look for a late shard of step {step}"):
            shard = int(self._script("late_shard", *self._late(step, shards, seconds)))
        return None if shard < 0 else shard

    def _late(
        self, step: int, shards: int, seconds: float, *, slot: SlotRecord | None = None
    ) -> tuple[list[str], list[Any]]:
        """Keys and arguments of scripts/late_shard.lua."""
        names = [self.keys.head, self.keys.slots(step), self.keys.leases(step)]
        limits = [BACKUP_FACTOR, BACKUP_SECONDS, BACKUPS_MOST, BACKUP_LOST_SECONDS]
        own = (0, "", "") if slot is None else (BACKUP_ASKED_ALWAYS, slot.shard, slot.nonce)
        return names, [step, shards, seconds, *limits, keys.worker(""), self.run, *own]

    def head_and_slots(self, step: int) -> tuple[Head, dict[int, SlotRecord]]:
        """The present head and the slots of a step, in one round trip.

        Raises:
            RunNotFound: if no run of that name is known here.
        """
        with self._during(f"read the slots of step {step}"):
            found, slots = self._call(("HGETALL", self.keys.head), ("HGETALL", self.keys.slots(step)))
            head = head_of(self.run, found)
            self._incarnation = head.incarnation
            return head, self._slots(step, slots)

    def slots(self, step: int) -> dict[int, SlotRecord]:
        """The slots that are written, by shard."""
        with self._during(f"read the slots of step {step}"):
            found = cast(dict[str, str], self.client.hgetall(self.keys.slots(step)))
            return self._slots(step, found)

    def some_slots(self, step: int, numbers: Iterable[int]) -> tuple[dict[int, SlotRecord], int]:
        """Chosen slots (at least one), where they are written, and how many of the step are in all."""
        wanted = list(numbers)
        with self._during(f"read slots of step {step}"):
            pipe = self.client.pipeline(transaction=True)
            pipe.hmget(self.keys.slots(step), [str(number) for number in wanted])
            pipe.hlen(self.keys.slots(step))
            texts, present = cast(tuple[list[str | None], int], pipe.execute())
            written = {str(number): text for number, text in zip(wanted, texts, strict=True) if text}
            found = self._slots(step, written)
            return found, int(present) - len(written) + len(found)

    def slots_present(self, step: int) -> set[int]:
        """Which shards of a step are written."""
        with self._during(f"count the slots of step {step}"):
            found = cast(list[str], self.client.hkeys(self.keys.slots(step)))
            return set(self._sound(dict.fromkeys(found, ""), str, self.keys.slots(step)))

    def leases(self, step: int) -> dict[int, Lease]:
        """Who is at which shard of a step."""
        with self._during(f"read the leases of step {step}"):
            found = cast(dict[str, str], self.client.hgetall(self.keys.leases(step)))
            leases = self._sound(found, Lease.from_json, self.keys.leases(step))
            return {shard: replace(lease, shard=shard) for shard, lease in leases.items()}

    def drop_slot(
        self,
        step: int,
        shard: int,
        *,
        nonce: str,
        token: int | None,
        into: int | None = None,
        below: Iterable[int] = (),
    ) -> str:
        """Open a slot again whose bytes are lost; returns "ok", "fenced" or "stale".

        Args:
            nonce: of the slot that was read, so that a newer one stays.
            token: the training server's fencing token; None for a Client that adds slots up.
            into: the partial sum that the Client was to make.
            below: the slots that this one was made from, whose bytes are gone, too.
        """
        names = self.keys
        with self._during(f"open slot {shard} of step {step} again"):
            reply = self._script(
                "drop_slot",
                [names.head, names.slots(step), names.leases(step)],
                [
                    *("" if token is None else token, step, shard, nonce),
                    *("" if into is None else into, *below),
                ],
            )
        return cast(str, reply)

    def announce(self, name: str, notice: Notice) -> None:
        """Tell of a blob that is on its way; it replaces what was told under this name.

        Args:
            name: `keys.slot_underway` of a slot, or `keys.PARAMETERS_UNDERWAY`.
        """
        with self._during(f"tell of {name}"):
            args = [name, notice.to_json(), keys.UNDERWAY_TTL_SECONDS]
            self._script("announce", [self.keys.underway], args)

    def underway(self, names: Sequence[str], step: int) -> tuple[dict[str, Notice], set[int]]:
        """What was told of blobs on their way, by name, and which slots of a step are written.

        Args:
            names: as for `announce`; at least one.
        """
        told, slots = self.keys.underway, self.keys.slots(step)
        with self._during(f"look what is on its way to step {step}"):
            found = self._call(("HMGET", told, *names), ("HKEYS", slots))
            return notices(zip(names, found[0], strict=True)), {int(slot) for slot in found[1]}

    def called(self, step: int) -> bool:
        """Whether the chord of a step called back already: then nobody calls when its last slot is in."""
        with self._during(f"read the callback of step {step}"):
            return bool(self.client.hget(self.keys.head, "called") == str(step))

    def _sealed_slot(self, step: int, slot: SlotRecord, incarnation: str | None) -> str:
        text = slot.to_json()
        if not self.keyring:
            return text
        bound = revision(incarnation or self._incarnation or self._look())
        return self.keyring.sealed("worker", self.places.slot(step, slot.shard, bound), text)

    def _slots(self, step: int, found: Any) -> dict[int, SlotRecord]:
        def opened(number: int, text: str) -> str:
            return self._opened_for(revision, "worker", self.places.slot, step, number, text=text)

        names = self.keys.slots(step), self.keys.leases(step)
        return self._sound(
            found, SlotRecord.from_json, *names, number_in=lambda slot: slot.shard, opened=opened
        )
