"""What people write on a run: tags, and a note."""

from __future__ import annotations

import json
from collections.abc import Iterable

from torchord.cache.ledger.control_plane import ControlPlane
from torchord.cache.ledger.peoples_fields import checked_notes, checked_tags


class Labels(ControlPlane):
    """Tags and notes of a run."""

    def label(self, *, tags: Iterable[str] | None = None, notes: str | None = None) -> str:
        """Write tags or notes in the place of those before; returns the run's status, or "missing"."""
        text = "" if tags is None else json.dumps(checked_tags(tags))
        said = "" if notes is None else checked_notes(notes)
        with self._during("label", " "):
            return str(self._script("label", [self.keys.head], [text, int(notes is not None), said]))
