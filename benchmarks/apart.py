"""torchord's app as if each process ran on a machine of its own: none sees another's process end.

For `python -m benchmarks.chaos --apart`: there a lease alone tells of a death.
"""

from __future__ import annotations

from torchord.cache.ledger import process
from torchord.tasks import app

process.place = lambda: ""  # type: ignore[assignment]

__all__ = ["app"]
