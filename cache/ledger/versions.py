"""Records of stored versions, and the ledger's entries."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any, cast

from torchord.cache import keys
from torchord.cache.errors import CacheError
from torchord.cache.keyring import bare
from torchord.cache.ledger.control_plane import ControlPlane
from torchord.cache.ledger.fields import MANIFEST
from torchord.cache.ledger.records import (
    LedgerEntry,
    VersionRecord,
)


class Versions(ControlPlane):
    """Where versions are stored, and the entries that say how each came about."""

    def manifest(self) -> dict[str, Any]:
        """Layout of the parameters.

        Raises:
            CacheError: before a training server has initialised the run.
        """
        with self._during("read the manifest"):
            text = self.client.get(self.keys.manifest)
            if text is None:
                raise CacheError(
                    f"run {self.run!r} has no parameters yet; a training server must start it first"
                )
            return MANIFEST.read(self._opened("server", self.places.manifest, text=cast(str, text)))

    def version(self, version: int) -> VersionRecord | None:
        """Where a version is stored, None if it is not (any more)."""
        with self._during(f"look up version {version}"):
            text = self.client.hget(self.keys.versions, str(version))
            return None if text is None else self._version(version, cast(str, text))

    def versions(self) -> dict[int, VersionRecord]:
        """All stored versions."""
        with self._during("list the versions"):
            found = cast(dict[str, str], self.client.hgetall(self.keys.versions))
            return self._sound(
                found,
                VersionRecord.from_json,
                self.keys.versions,
                number_in=lambda record: record.version,
                opened=self._opened_version,
                forged_stay=True,
            )

    def kept_versions(self) -> tuple[tuple[int, ...], frozenset[int]]:
        """(the stored versions, those of them that readers hold)."""
        with self._during("list the versions"):
            pipe = self.client.pipeline(transaction=True)
            pipe.hkeys(self.keys.versions)
            pipe.hgetall(self.keys.pins)
            stored, pins = cast(tuple[list[str], dict[str, str]], tuple(pipe.execute()))
        now = time.time() * 1000
        held = {int(version) for version, until in pins.items() if float(until) > now}
        return tuple(sorted(int(version) for version in stored)), frozenset(held)

    def put_version(self, record: VersionRecord, *, token: int) -> bool:
        """Record or replace a stored version (its state was published after the commit).

        Returns:
            False if another server has taken the run over; then nothing changed.
        """
        with self._during(f"record version {record.version}"):
            reply = self._script(
                "put_version",
                [self.keys.head, self.keys.versions],
                [token, record.version, self._sealed_version(record), keys.RUN_TTL_SECONDS],
            )
        return bool(reply == "ok")

    def drop_versions(self, versions: Iterable[int], *, token: int) -> bool:
        """Forget stored versions; the caller then deletes their bytes.

        Returns:
            False if another server has taken the run over; then nothing changed.
        """
        with self._during("drop versions"):
            reply = self._script("drop_versions", [self.keys.head, self.keys.versions], [token, *versions])
        return bool(reply == "ok")

    def pin(self, version: int, *, seconds: float) -> None:
        """Keep a version stored for a while, beyond its place in the retention."""
        with self._during(f"pin version {version}"):
            pipe = self.client.pipeline(transaction=True)
            pipe.hset(self.keys.pins, str(version), int((time.time() + seconds) * 1000))
            pipe.expire(self.keys.pins, keys.RUN_TTL_SECONDS)
            pipe.execute()

    def pinned(self, version: int) -> bool:
        """Whether somebody still keeps a version stored by `pin`."""
        with self._during(f"look at the pins of version {version}"):
            until = cast(str | None, self.client.hget(self.keys.pins, str(version)))
        return until is not None and int(until) > time.time() * 1000

    def entries(self, first: int = 1, last: int | None = None) -> list[LedgerEntry]:
        """Ledger entries still in Redis, versions `first` to `last`, in order; seals are left to an audit."""
        texts = self.entry_texts(first, last)
        with self._during("read the ledger"):
            return [LedgerEntry.from_json(bare(text)) for text in texts.values()]

    def entry_texts(self, first: int = 1, last: int | None = None) -> dict[int, str]:
        """The entries of `entries` as they are stored, seals and all, by version."""
        with self._during("read the ledger"):
            if last is None:
                found = cast(dict[str, str], self.client.hgetall(self.keys.ledger))
                numbered = sorted((int(version), text) for version, text in found.items())
                return {version: text for version, text in numbered if version >= first}
            wanted = list(range(first, last + 1))
            if not wanted:
                return {}
            listed = cast(list[str | None], self.client.hmget(self.keys.ledger, list(map(str, wanted))))
            return {n: text for n, text in zip(wanted, listed, strict=True) if text is not None}

    def ledger_size(self) -> int:
        """How many entries Redis holds."""
        with self._during("measure the ledger"):
            return self.client.hlen(self.keys.ledger)

    def trim_entries(self, versions: Iterable[int]) -> None:
        """Drop entries that are safe on disk."""
        fields = [str(version) for version in versions]
        if fields:
            with self._during("trim the ledger"):
                self.client.hdel(self.keys.ledger, *fields)
