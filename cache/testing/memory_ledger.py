"""An in-memory twin of a run's ledger, for unit tests, in as many parts as the ledger has.

Each method does by hand what its script does in Redis. A property test drives both side by side
and compares every answer and every key, so that the twin cannot drift from the scripts.
"""

from __future__ import annotations

from torchord.cache.testing.memory_commits import MemoryCommits
from torchord.cache.testing.memory_evaluations import MemoryEvaluations
from torchord.cache.testing.memory_events import MemoryEvents
from torchord.cache.testing.memory_outbox import MemoryOutbox
from torchord.cache.testing.memory_rounds import MemoryRounds
from torchord.cache.testing.memory_run_life import MemoryRunLife
from torchord.cache.testing.memory_versions import MemoryVersions


class MemoryLedger(
    MemoryRunLife, MemoryRounds, MemoryCommits, MemoryVersions, MemoryEvaluations, MemoryOutbox, MemoryEvents
):
    """`Ledger` without a server.

    Args:
        plane: the keys, shared by all that talk to the same "server".
        run: the run's name.

    Example:
        >>> ledger = MemoryLedger(MemoryPlane(), "digits-01")
        >>> ledger.create({"recipe": {}, "config": {}}, incarnation="a") is None
        True
        >>> ledger.acquire(worker="w", node="n", queue="updates.n")[0]
        'acquired'
    """
