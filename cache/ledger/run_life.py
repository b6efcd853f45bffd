"""What happens to a run as a whole: created, respecified, switched, brought to another status, retired."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable
from typing import Any, Literal, cast

from torchord.cache import keys
from torchord.cache.errors import RunNotFound
from torchord.cache.keyring import bare
from torchord.cache.ledger.control_plane import ControlPlane, pairs
from torchord.cache.ledger.fields import SPEC
from torchord.cache.ledger.figures import to_text
from torchord.cache.ledger.hardware import wanted
from torchord.cache.ledger.outbox import entry_arguments, entry_text, subscribed
from torchord.cache.ledger.records import (
    GENESIS,
    Head,
)
from torchord.cache.ledger.share import share_of


class RunLife(ControlPlane):
    """Creating a run, reading and replacing its spec, its head and its status."""

    def create(
        self,
        spec: dict[str, Any],
        *,
        incarnation: str,
        version: int = 0,
        chain: str = GENESIS,
        sealed: str | None = None,
    ) -> dict[str, Any] | None:
        """Create the run, once.

        Args:
            spec: recipe and config as JSON-able dicts.
            incarnation: unique id of this life of the name; caches are keyed by it.
            version: head to start from (above 0 when restored from a checkpoint).
            chain: chain of that version.
            sealed: the spec as it was stored before, by whoever had submitted it; None: it is sealed here.

        Returns:
            None if this call created it, else the spec of the run that is there.
        """
        names = self.keys
        left_behind = [name for name in names.lasting() if name not in (names.spec, names.head)]
        with self._during("create", ""):
            verdict, text = self._script(
                "create_run",
                [
                    *(names.spec, names.head, keys.RUNS, keys.ACTIVE),
                    *left_behind,
                    *(names.slots(version), names.leases(version)),
                ],
                [
                    self.run,
                    self._sealed_spec(spec, incarnation) if sealed is None else sealed,
                    time.time(),
                    keys.RUN_TTL_SECONDS,
                    incarnation,
                    version,
                    chain,
                    spec.get("config", {}).get("skew", "admit"),
                    wanted(spec),
                    subscribed(spec),
                    *share_of(spec),
                ],
            )
            return None if verdict == "created" else SPEC.read(bare(text))

    def _sealed_spec(self, spec: dict[str, Any], incarnation: str) -> str:
        return self.keyring.sealed("submit", self.places.spec(incarnation), json.dumps(spec))

    def spec(self) -> dict[str, Any]:
        """Recipe and config as submitted.

        Raises:
            RunNotFound: if no run of that name is known here.
            NotAuthentic: this process has keys, and none that it trusts has sealed it for this run.
        """
        with self._during("read the spec"):
            text, incarnation = self._stored_spec()
            opened = self.keyring.opened("submit", self.places.spec(incarnation), text)
            return SPEC.read(opened)

    def sealed_spec(self) -> str:
        """The spec as it is stored, for `create`."""
        return self._stored_spec()[0]

    def _stored_spec(self) -> tuple[str, str]:
        """The spec as it is stored, and the incarnation that it is of."""
        with self._during("read the spec"):
            pipe = self.client.pipeline(transaction=True)
            pipe.get(self.keys.spec)
            pipe.hget(self.keys.head, "incarnation")
            text, incarnation = cast(tuple[str | None, str | None], tuple(pipe.execute()))
            if text is None:
                raise RunNotFound(
                    f"no run {self.run!r} is known at {keys.PREFIX} on this server; see Master.runs()"
                )
            return text, incarnation or ""

    def respec(self, spec: dict[str, Any], *, incarnation: str, skew: str) -> bool:
        """Replace the spec of a run that stands still.

        Args:
            spec: recipe and config, as `create` takes them.
            incarnation: from `incarnation.revised`: the same life of the name, another revision.
            skew: "refuse" or "admit" workers of another environment from now on.

        Returns:
            False if the run is not paused or failed; nothing changed then.
        """
        with self._during("replace the spec"):
            return bool(
                self._script(
                    "respec",
                    [self.keys.spec, self.keys.head, self.keys.expected],
                    [self._sealed_spec(spec, incarnation), keys.RUN_TTL_SECONDS, incarnation, skew],
                )
            )

    def switch(
        self,
        spec: dict[str, Any],
        *,
        step: int,
        incarnation: str,
        following: str,
        total_steps: int | None,
        data: dict[str, Any],
    ) -> str:
        """Change the config from a step on: see scripts/switch.lua.

        Args:
            spec: with the switch among its "switches".
            incarnation: what the caller read; `following` replaces it.
            total_steps: of the whole run after the switch, None before the run is initialised.
            data: for the event.
        """
        with self._during(f"switch the config from step {step} on"):
            return cast(
                str,
                self._script(
                    "switch",
                    [self.keys.spec, self.keys.head, self.keys.events],
                    [
                        self._sealed_spec(spec, following),
                        step,
                        incarnation,
                        following,
                        "" if total_steps is None else total_steps,
                        keys.RUN_TTL_SECONDS,
                        to_text(data),
                        keys.EVENTS_KEPT,
                    ],
                ),
            )

    def extend(self, spec: dict[str, Any], *, incarnation: str, following: str, data: dict[str, Any]) -> str:
        """Let a run that is done go on: see scripts/extend.lua.

        Args:
            spec: with the config that holds from now on.
            incarnation: what the caller read; `following` replaces it.
            data: for the event.
        """
        names = self.keys
        others = [name for name in names.lasting() if name not in (names.spec, names.head, names.events)]
        with self._during("let it go on"):
            return cast(
                str,
                self._script(
                    "extend",
                    [names.spec, names.head, names.events, keys.ACTIVE, *others],
                    [
                        self.run,
                        self._sealed_spec(spec, following),
                        incarnation,
                        following,
                        keys.RUN_TTL_SECONDS,
                        to_text(data),
                        keys.EVENTS_KEPT,
                    ],
                ),
            )

    def server_memory(self) -> str:
        """Identity of the memory that the training server shares with its host; "" for none."""
        with self._during("ask where the training server is"):
            return cast(str | None, self.client.hget(self.keys.head, "memory")) or ""

    def incarnation(self) -> str:
        """The incarnation in force; "" if the run is unknown."""
        with self._during("read the incarnation"):
            return cast(str | None, self.client.hget(self.keys.head, "incarnation")) or ""

    def head(self) -> Head:
        """The present head.

        Raises:
            RunNotFound: if no run of that name is known here.
        """
        with self._during("read the head"):
            return head_of(self.run, self._call(("HGETALL", self.keys.head))[0])

    def transition(
        self,
        status: str,
        *,
        allowed: Iterable[str],
        event: str,
        data: dict[str, Any] | None = None,
        error: dict[str, Any] | Literal["keep"] | None = "keep",
        token: int | None = None,
        incarnation: str | None = None,
        shard: tuple[int, int] | None = None,
    ) -> tuple[bool, str]:
        """Change the status if the present one is in `allowed`.

        Args:
            error: stored as the reason; None clears it, "keep" leaves it.
            token: the training server's fencing token, None for anybody else.
            incarnation: life of the run that the change is about, None for any.
            shard: (step, shard) that the change is about: nothing changes once its slot is written
                or its step committed, as when a straggler fails.

        Returns:
            (done, status before).
        """
        reason = "-" if error == "keep" else "" if error is None else to_text(error)
        nonce, said = secrets.token_hex(6), data or {}
        id = f"{event}-{said.get('version') if event == 'done' else nonce}"
        entry = entry_text(event, time.time(), error if isinstance(error, dict) else {}, said)
        with self._during(f"set status {status!r}"):
            step = self.client.hget(self.keys.head, "version") or 0 if shard is None else shard[0]
            verdict, before = self._script(
                "transition",
                [
                    self.keys.head,
                    keys.ACTIVE,
                    self.keys.events,
                    self.keys.slots(int(cast(str, step))),
                    self.keys.leases(int(cast(str, step))),
                    *(self.keys.outbox, keys.TELLING),
                ],
                [
                    *(self.run, status, "," + ",".join(allowed) + ",", event, to_text(said), reason),
                    *(keys.RUN_TTL_SECONDS, keys.EVENTS_KEPT, "" if token is None else token, nonce),
                    incarnation or "",
                    *(("", "") if shard is None else shard),
                    *entry_arguments(event, id, self._sealed_by_any(self.places.telling, id, text=entry)),
                ],
            )
        return verdict == "ok", before

    def retire(self, working_steps: Iterable[int] = ()) -> None:
        """Give every key of a run at rest its last TTL and delete its working set."""
        with self._during("retire the keys"):
            pipe = self.client.pipeline(transaction=False)
            for name in self.keys.lasting():
                pipe.expire(name, keys.RESULT_TTL_SECONDS)
            for step in working_steps:
                pipe.delete(self.keys.slots(step), self.keys.leases(step))
            pipe.execute()

    def claim_toolchain(self, toolchain: str) -> str:
        """Say what compiles a run's kernels here; returns what the first worker said, which is in force."""
        with self._during("claim the toolchain"):
            return cast(str, self._script("claim_toolchain", [self.keys.head], [toolchain]))

    def claim(self, what: str, text: str) -> dict[str, str]:
        """Say something of the run that other processes are to agree with; the first to say it is heard.

        Returns:
            All that was claimed, this among it, in the words of whoever said it first.
        """
        names = [self.keys.head, self.keys.claims]
        with self._during(f"claim {what!r}"):
            return pairs(self._script("claim", names, [what, text, keys.RUN_TTL_SECONDS]))

    def claims(self) -> dict[str, str]:
        """All that was claimed."""
        with self._during("read the claims"):
            return cast(dict[str, str], self.client.hgetall(self.keys.claims))


def head_of(run: str, found: Any) -> Head:
    """The head that a server's hash describes.

    Raises:
        RunNotFound: the hash is empty: no run of that name is known.
    """
    if not found:
        raise RunNotFound(f"no run {run!r} is known on this server; see Master.runs()")
    return Head.from_hash(pairs(found))
