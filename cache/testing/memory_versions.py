"""The twin of `Versions`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, cast

from torchord.cache import keys
from torchord.cache.errors import CacheError
from torchord.cache.ledger.records import LedgerEntry, VersionRecord
from torchord.cache.testing.memory_control_plane import MemoryControlPlane


class MemoryVersions(MemoryControlPlane):
    """Versions and ledger entries, without a server."""

    def manifest(self) -> dict[str, Any]:
        """See `Ledger.manifest`."""
        text = self.plane.get(self.keys.manifest)
        if text is None:
            raise CacheError(f"run {self.run!r} has no parameters yet; a training server must start it first")
        return cast(dict[str, Any], json.loads(text))

    def version(self, version: int) -> VersionRecord | None:
        """See `Ledger.version`."""
        text = self.plane.hash(self.keys.versions).get(str(version))
        return None if text is None else VersionRecord.from_json(text)

    def versions(self) -> dict[int, VersionRecord]:
        """See `Ledger.versions`."""
        found = self.plane.hash(self.keys.versions)
        return {int(version): VersionRecord.from_json(text) for version, text in found.items()}

    def kept_versions(self) -> tuple[tuple[int, ...], frozenset[int]]:
        """See `Ledger.kept_versions`."""
        now, pins = self.plane.clock() * 1000, self.plane.hash(self.keys.pins)
        held = {int(version) for version, until in pins.items() if float(until) > now}
        return tuple(sorted(map(int, self.plane.hash(self.keys.versions)))), frozenset(held)

    def put_version(self, record: VersionRecord, *, token: int) -> bool:
        """See `Ledger.put_version`."""
        with self.plane.changed:
            if not self._holds(token):
                return False
            ttl = keys.RUN_TTL_SECONDS
            self.plane.hset(self.keys.versions, {str(record.version): record.to_json()}, ttl)
            return True

    def drop_versions(self, versions: Iterable[int], *, token: int) -> bool:
        """See `Ledger.drop_versions`."""
        with self.plane.changed:
            if not self._holds(token):
                return False
            self.plane.hdel(self.keys.versions, *versions)
            return True

    def pin(self, version: int, *, seconds: float) -> None:
        """See `Ledger.pin`."""
        until = int((self.plane.clock() + seconds) * 1000)
        self.plane.hset(self.keys.pins, {str(version): until}, keys.RUN_TTL_SECONDS)

    def pinned(self, version: int) -> bool:
        """See `Ledger.pinned`."""
        until = self.plane.hash(self.keys.pins).get(str(version))
        return until is not None and int(until) > self.plane.clock() * 1000

    def entries(self, first: int = 1, last: int | None = None) -> list[LedgerEntry]:
        """See `Ledger.entries`."""
        found = {int(version): text for version, text in self.plane.hash(self.keys.ledger).items()}
        wanted = sorted(v for v in found if v >= first and (last is None or v <= last))
        return [LedgerEntry.from_json(found[version]) for version in wanted]

    def entry_texts(self, first: int = 1, last: int | None = None) -> dict[int, str]:
        """See `Ledger.entry_texts`."""
        return {entry.version: entry.to_json() for entry in self.entries(first, last)}

    def ledger_size(self) -> int:
        """See `Ledger.ledger_size`."""
        return len(self.plane.hash(self.keys.ledger))

    def trim_entries(self, versions: Iterable[int]) -> None:
        """See `Ledger.trim_entries`."""
        self.plane.hdel(self.keys.ledger, *versions)
