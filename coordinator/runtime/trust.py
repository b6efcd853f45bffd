"""Whether this process may compute: a node that was found to lie leaves shards to others."""

from __future__ import annotations

from torchord.cache.errors import Skewed
from torchord.cache.ledger.heartbeat import Heartbeat
from torchord.coordinator.runtime.context import RunContext


def checks(context: RunContext) -> bool:
    """Whether shards of the run are computed twice, so that a lie can be told from an impure recipe."""
    return bool(context.config.audit_fraction) and context.config.deterministic


def require_trusted(context: RunContext, heartbeat: Heartbeat) -> None:
    """Refuse to compute with other sources than the run's, or for a run that checks on a node that lied.

    Raises:
        Skewed: as `RunContext.require_same_code`, or it lied: the message says where, and how it comes back.
    """
    context.require_same_code()
    found = heartbeat.distrusted.get(heartbeat.info.node)
    if found is not None and checks(context):
        raise Skewed(found.said())
