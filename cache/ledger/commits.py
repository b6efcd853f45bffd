"""The training server's side: takeover under a fencing token, commits, launches, rollback."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from typing import Any, cast

from torchord.cache import keys
from torchord.cache.errors import RecordDamaged
from torchord.cache.ledger.answers import (
    Committed,
)
from torchord.cache.ledger.control_plane import ControlPlane
from torchord.cache.ledger.figures import to_text
from torchord.cache.ledger.launch import Launch
from torchord.cache.ledger.records import (
    LedgerEntry,
    VersionRecord,
)
from torchord.cache.reading import number_of


class Commits(ControlPlane):
    """What only the server of a run may do: take it over, commit, launch, roll back."""

    def acquire(
        self, *, worker: str, node: str, queue: str, environment: str = "", memory: str = ""
    ) -> tuple[str, int | str]:
        """Take the run over.

        Args:
            memory: identity of the memory that the taker shares with its host; "" for none.
            environment: what of the taker could change bits; "" if that does not matter.

        Returns:
            ("acquired", token), ("owned", queue of the live owner), ("skewed", environment that the
            run's updates need) or ("missing", 0).
        """
        with self._during("take over", ""):
            verdict, value = self._script(
                "acquire", [self.keys.head], [worker, node, keys.worker(""), queue, environment, memory]
            )
            return verdict, int(value) if verdict == "acquired" else value

    def release(self, token: int) -> bool:
        """Give the run up, if it is still ours: a standby may take it at once."""
        with self._during("release", ""):
            return bool(self._script("release", [self.keys.head], [token]))

    def initialise(
        self,
        *,
        token: int,
        manifest: dict[str, Any],
        record: VersionRecord,
        dataset_size: int,
        evaluation_size: int,
        total_steps: int,
        dataset_digest: str = "",
    ) -> str:
        """Record the first version and start the run; returns "ok", "fenced" or "stopped".

        Args:
            dataset_digest: of the training dataset's content, "" if it does not know it.
        """
        with self._during("initialise", ""):
            return cast(
                str,
                self._script(
                    "initialise",
                    [self.keys.head, self.keys.manifest, self.keys.versions, self.keys.events],
                    [
                        token,
                        self._sealed("server", self.places.manifest, text=json.dumps(manifest)),
                        record.version,
                        self._sealed_version(record),
                        dataset_size,
                        total_steps,
                        keys.RUN_TTL_SECONDS,
                        time.time(),
                        keys.EVENTS_KEPT,
                        evaluation_size,
                        dataset_digest,
                    ],
                ),
            )

    def commit(
        self,
        *,
        step: int,
        token: int,
        shards: int,
        entry: LedgerEntry,
        record: VersionRecord,
        event: dict[str, Any],
        drop: Iterable[int] = (),
        launch: Launch | None = None,
    ) -> Committed:
        """Move the head from `step` to `step + 1`: see scripts/commit.lua.

        Args:
            drop: versions that nobody needs once this one is there; pinned ones stay.
            launch: the chord of a further step that this commit makes possible.
        """
        names = self.keys
        now = time.time()
        published = [] if launch is None else launch.arguments(self.run)
        with self._during(f"commit version {step + 1}"):
            reply = self._script(
                "commit",
                [
                    names.head,
                    names.slots(step),
                    names.leases(step),
                    names.ledger,
                    names.versions,
                    names.pins,
                    names.events,
                    names.expected,
                    names.spec,
                    names.manifest,
                    names.evaluations,
                    keys.ACTIVE,
                    keys.RUNS,
                    *([] if launch is None else [launch.size_key, launch.queue, keys.TURNS]),
                ],
                [
                    step,
                    token,
                    shards,
                    # Bound to its place by its chain, which outlives a life of the name.
                    self.keyring.sealed("server", self.places.entry(entry.version), entry.to_json()),
                    self._sealed_version(record),
                    record.chain,
                    now,
                    keys.RUN_TTL_SECONDS,
                    to_text(event),
                    keys.EVENTS_KEPT,
                    int(now * 1000),
                    ",".join(map(str, drop)),
                    *published,
                ],
            )
        return Committed.of(reply)

    def stop(self, version: int, *, rule: str, reason: str, token: int) -> str:
        """Record that the run ends with its present version: see scripts/stop.lua.

        Args:
            version: the head's.
            rule: name of the rule that says so.
            reason: why, in words.
        """
        verdict = {"version": version, "rule": rule, "reason": reason}
        with self._during(f"record that it stops at version {version}"):
            names = [self.keys.head, self.keys.events]
            values = [token, version, json.dumps(verdict), keys.RUN_TTL_SECONDS, keys.EVENTS_KEPT]
            return cast(str, self._script("stop", names, values))

    def mark_launched(self, step: int, *, token: int) -> str:
        """Record that the chord of the present step was published; returns "ok", "fenced" or "stale"."""
        with self._during(f"record the launch of step {step}"):
            return cast(str, self._script("mark", [self.keys.head], [token, step, "launched"]))

    def mark_called(self, step: int, *, token: int) -> str:
        """Record that the chord of the present step called back; returns "ok", "fenced" or "stale"."""
        with self._during(f"record the callback of step {step}"):
            return cast(str, self._script("mark", [self.keys.head], [token, step, "called"]))

    def rollback(self, *, token: int, version: int, chain: str) -> tuple[bool, tuple[int, ...]]:
        """Take the head back to `version`.

        Returns:
            (done, versions above it whose records are still stored).
        """
        names = self.keys
        with self._during(f"roll back to version {version}"):
            fields = cast(list[str | None], self.client.hmget(names.head, ["version", "reached"]))
            under_way = steps_under_way(*fields)
            # Of a round there are slots of steps that are committed, too.
            under_way = range(
                max(min(version, under_way.start), under_way.start - _MOST_UNDER_WAY), under_way.stop
            )
            reply = self._script(
                "rollback",
                [
                    *(names.head, names.ledger, names.expected, names.versions, names.events),
                    *(key(step) for step in under_way for key in (names.slots, names.leases)),
                ],
                [token, version, chain, keys.RUN_TTL_SECONDS, keys.EVENTS_KEPT],
            )
            return reply[0] == "ok", tuple(int(v) for v in reply[1:])


_MOST_UNDER_WAY = 1 << 17


def steps_under_way(version: str | None, reached: str | None) -> range:
    """The steps of which slots and leases may be left, from a head's two fields.

    More may be launched than is recorded, and a rollback leaves `reached` as it is.

    Raises:
        RecordDamaged: a field is no number, or they are further apart than any rollback takes a run.
    """
    present = number_of(version or "0", "field 'version' of a run's head")
    furthest = -1 if reached in (None, "", "-1") else number_of(reached, "field 'reached' of a run's head")
    if furthest - present > _MOST_UNDER_WAY:
        raise RecordDamaged(
            f"field 'reached' of a run's head is {furthest}, more than {_MOST_UNDER_WAY} steps above its "
            f"version, {present}"
        )
    return range(present, max(present, furthest) + 3)
