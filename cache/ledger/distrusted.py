"""Who has lied: workers whose gradients were found not to be what anybody else computes."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from torchord.cache.errors import RecordDamaged
from torchord.cache.reading import COUNT, FINITE, TEXT, Fields

log = logging.getLogger(__name__)

_FIELDS = Fields(
    "a record of a distrusted worker",
    {"node": TEXT, "worker": TEXT, "run": TEXT, "step": COUNT, "shard": COUNT, "what": TEXT, "at": FINITE},
    open=True,
)


def node_of(worker: str) -> str:
    """The Celery node of a worker process, from its id.

    Example:
        >>> node_of("client1@here/4711-0a1b2c3d")
        'client1@here'
    """
    return worker.rpartition("/")[0] or worker


@dataclass(frozen=True, slots=True)
class Distrusted:
    """A node that gets no shard of any run that checks, until somebody lets it back in.

    Attributes:
        node: Celery node name, as in `client1@host`.
        worker: id of the process that computed the shard.
        run, step, shard: where it was found out.
        what: how its gradient differed.
        at: Unix time (s).
    """

    node: str
    worker: str
    run: str
    step: int
    shard: int
    what: str
    at: float

    @classmethod
    def now(cls, worker: str, run: str, step: int, shard: int, what: str) -> Distrusted:
        """A worker that was found out just now."""
        return cls(node_of(worker), worker, run, step, shard, what, time.time())

    def said(self) -> str:
        """What to tell people: what it did, and how it is let back in."""
        return (
            f"worker {self.worker} is quarantined: its gradient of shard {self.shard} of step {self.step} of "
            f"run {self.run!r} is not what others compute ({self.what}); look at its memory, its device and "
            f"its files, then `torchord readmit {self.node}` lets it compute again"
        )

    def to_json(self) -> str:
        """Text for the hash."""
        return json.dumps(asdict(self))


def read_distrusted(found: Mapping[str, str]) -> dict[str, Distrusted]:
    """The records of a hash, by node; what is none is logged and left out."""
    read = {}
    for node, text in found.items():
        try:
            fields = _FIELDS.read(text)
        except RecordDamaged as error:
            log.error("who is distrusted: %.100r is passed over: %s", node, error)
            continue
        read[node] = Distrusted(**{name: fields[name] for name in Distrusted.__slots__})
    return read
