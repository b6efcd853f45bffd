"""The control plane of one run: head, slots, ledger, events. One method per operation.

The ledger is the truth and Celery's chord is only the fast path: each method here is one
atomic script (or a single command), may be sent twice without harm, and decides by itself
whether the caller came early, late or a second time.
"""

from __future__ import annotations

from torchord.cache.ledger.commits import Commits
from torchord.cache.ledger.evaluations import Evaluations
from torchord.cache.ledger.events import Events
from torchord.cache.ledger.labels import Labels
from torchord.cache.ledger.outbox import Outbox
from torchord.cache.ledger.rounds import Rounds
from torchord.cache.ledger.run_life import RunLife
from torchord.cache.ledger.share import Shares
from torchord.cache.ledger.versions import Versions


class Ledger(RunLife, Rounds, Commits, Versions, Evaluations, Outbox, Events, Shares, Labels):
    """All operations on one run's control keys; arguments as for `control_plane.ControlPlane`.

    Raises:
        CacheUnreachable: from any method, when the server stays away longer than the
            connection's patience.
    """
