"""The twin of `Evaluations`."""

from __future__ import annotations

import json
from typing import Any

from torchord.cache import keys
from torchord.cache.ledger.figures import from_text, to_text
from torchord.cache.ledger.outbox import entry_text
from torchord.cache.testing.memory_control_plane import MemoryControlPlane


class MemoryEvaluations(MemoryControlPlane):
    """Evaluations and predictions, without a server."""

    def write_part(
        self, version: int, part: int, value: dict[str, Any], *, parts: int
    ) -> tuple[str, list[Any]]:
        """See `Ledger.write_part`."""
        plane, name = self.plane, self.keys.parts(version)
        with plane.changed:
            if str(version) in plane.hash(self.keys.evaluations):
                return "done", []
            fields = {str(part): to_text(value), **plane.hash(name)}
            plane.hset(name, fields, keys.WORK_TTL_SECONDS)
            if len(fields) < parts:
                return "written", []
            return "complete", [from_text(fields[str(index)]) for index in range(parts)]

    def drop_part(self, version: int, part: int) -> None:
        """See `Ledger.drop_part`."""
        self.plane.hdel(self.keys.parts(version), str(part))

    def parts_present(self, version: int) -> set[int]:
        """See `Ledger.parts_present`."""
        return {int(part) for part in self.plane.hash(self.keys.parts(version))}

    def record_evaluation(self, version: int, metrics: dict[str, Any]) -> bool:
        """See `Ledger.record_evaluation`."""
        plane, names, field = self.plane, self.keys, str(version)
        with plane.changed:
            first = field not in plane.hash(names.evaluations)
            plane.hset(
                names.evaluations,
                {field: to_text(metrics), **plane.hash(names.evaluations)},
                keys.RUN_TTL_SECONDS,
            )
            plane.delete(names.parts(version))
            plane.hdel(names.pins, field)
            plane.hdel(names.pending_evaluations, field)
            if first:
                data = {"version": version, "metrics": metrics}
                self._event("evaluation", data)
                entry = entry_text("evaluated", plane.clock(), data)
                self._to_tell("evaluated", f"evaluated-{version}", entry)
            return first

    def launch_evaluation(self, version: int, parts: int, *, pin_seconds: float) -> bool:
        """See `Ledger.launch_evaluation`."""
        plane, names, field = self.plane, self.keys, str(version)
        with plane.changed:
            if field in plane.hash(names.evaluations):
                return False
            pending = plane.hash(names.pending_evaluations)
            plane.hset(names.pending_evaluations, {field: parts, **pending}, keys.RUN_TTL_SECONDS)
            self.pin(version, seconds=pin_seconds)
            return field not in pending

    def abandon_evaluation(self, version: int, reason: str) -> bool:
        """See `Ledger.abandon_evaluation`."""
        plane, names, field = self.plane, self.keys, str(version)
        with plane.changed:
            if field not in plane.hash(names.pending_evaluations):
                return False
            plane.hdel(names.pending_evaluations, field)
            plane.delete(names.parts(version))
            plane.hdel(names.pins, field)
            self._event("evaluation lost", {"version": version, "message": reason})
            return True

    def pending_evaluations(self) -> dict[int, int]:
        """See `Ledger.pending_evaluations`."""
        found = self.plane.hash(self.keys.pending_evaluations)
        return {int(version): int(parts) for version, parts in found.items()}

    def evaluations(self) -> dict[int, dict[str, float]]:
        """See `Ledger.evaluations`."""
        found = self.plane.hash(self.keys.evaluations)
        return {int(v): from_text(text) for v, text in sorted(found.items(), key=lambda item: int(item[0]))}

    def write_output(self, request: str, part: int, answer: dict[str, Any]) -> bool:
        """See `Ledger.write_output`."""
        name = self.keys.predict(request)
        with self.plane.changed:
            there = self.plane.hash(name)
            self.plane.hset(name, {str(part): json.dumps(answer), **there}, keys.PREDICT_TTL_SECONDS)
            return str(part) not in there

    def outputs(self, request: str) -> dict[int, dict[str, Any]]:
        """See `Ledger.outputs`."""
        found = self.plane.hash(self.keys.predict(request))
        return {int(part): json.loads(text) for part, text in found.items()}

    def drop_output(self, request: str, part: int) -> None:
        """See `Ledger.drop_output`."""
        self.plane.hdel(self.keys.predict(request), part)

    def drop_outputs(self, request: str) -> None:
        """See `Ledger.drop_outputs`."""
        self.plane.delete(self.keys.predict(request))
