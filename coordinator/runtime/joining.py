"""Processes that work on one run compare what they make of its first shard, each once, when it joins.

A shard that is computed twice shows what changes within a process. What is fixed there and another in each
(the hash of a string, and with it the order of a set; a generator that is seeded at import; a file of the
machine) shows here, before the process contributes anything.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict

from torchord.cache.errors import CacheError, Impure, Skewed
from torchord.cache.ledger import process
from torchord.cache.ledger.fields import DIGESTS, FIRST
from torchord.cache.ledger.incarnation import revision
from torchord.cache.ledger.records import UNLIKE
from torchord.coordinator.compute.first_shard import FirstShard, first_shard
from torchord.coordinator.compute.replica import Replica
from torchord.coordinator.runtime.alike import require_same_kernels
from torchord.coordinator.runtime.context import RunContext
from torchord.coordinator.runtime.environment import device, environment
from torchord.coordinator.runtime.machine import spare_memory_nbytes, used_memory_nbytes

log = logging.getLogger(__name__)

CAUSES = (
    "an unseeded generator (numpy.random.default_rng()), an attribute or a global that changes from "
    "call to call, the clock, the order of a set or another hash, or the process or machine goes into it"
)
"""What usually makes a recipe impure, for messages."""

_SERVER_SECONDS = 5.0  # a training server computes what took its Client no longer


def join(context: RunContext, worker: str) -> None:
    """Compare this Client's kernels and first shard with the run's first Client's; it is done once a process.

    Called before the process computes for the run, under the context's lock.

    Args:
        worker: id of this process.

    Raises:
        Impure: they differ, and no step was committed yet, or nobody else is at the run.
        Skewed: they differ, and the run goes on without this process; or its kernels do.
    """
    if context.joined:
        return
    try:
        require_same_kernels(context, worker)
    except Skewed as error:
        context.unlike = str(error)
        raise
    if not _compared(context):
        context.joined = True
        return
    began = time.monotonic()
    found = _found(context)
    if found is None:
        context.joined = True  # what the recipe's code raised, its shards will raise again
        return
    said = {
        "worker": worker,
        "place": process.place(),
        "environment": environment(),
        "seconds": time.monotonic() - began,
        "found": asdict(found),
    }
    name = f"first {revision(context.incarnation)}"
    first = FIRST.read(context.ledger.claim(name, json.dumps(said))[name])
    what = found.difference(FirstShard(**DIGESTS.of(first["found"])))
    if not what:
        context.joined = True
        return
    told = _told(context, first["worker"], worker, what)
    context.ledger.claim(UNLIKE + worker, told)
    others = (info for id, info in context.services.registry.alive().items() if id != worker)
    if context.ledger.head().version == 0 or not any(context.run in info.pace for info in others):
        raise Impure(told)
    context.unlike = told
    raise Skewed(told)


def compare_server(context: RunContext, worker: str) -> None:
    """Compare a training server's first shard with its first Client's, before the first commit.

    So what differs by process shows with a single Client, too. It is done where both are alike and on one
    machine, and where it took the Client little time.

    Args:
        worker: id of this process.

    Raises:
        Impure: they differ.
    """
    if not _compared(context):
        return
    claimed = context.ledger.claims().get(f"first {revision(context.incarnation)}")
    if claimed is None:
        return
    first = FIRST.read(claimed)
    if first["worker"] == worker or first["seconds"] > _SERVER_SECONDS:
        return
    if (first["place"], first["environment"]) != (process.place(), environment()):
        return
    if context.config.compile or spare_memory_nbytes() < used_memory_nbytes():
        return
    found = _found(context, apart=True)
    if found is not None and (what := found.difference(FirstShard(**DIGESTS.of(first["found"])))):
        raise Impure(_told(context, first["worker"], worker, what))


def _compared(context: RunContext) -> bool:
    """Whether the run's processes are to agree: it has checks, and unlike workers were not admitted."""
    if not context.plan().checked(0):
        return False
    return bool(context.spec.get("skew", context.config.skew) == "refuse")


def _found(context: RunContext, *, apart: bool = False) -> FirstShard | None:
    """This process's first shard; None if the recipe's code raises.

    Args:
        apart: in a model of its own, whether or not the context's is unused.
    """
    try:
        if apart or context.replica().loaded is not None:
            replica = Replica.build(context.recipe, context.config, device(), computing=True)
        else:
            replica = context.replica()
        return first_shard(replica, context.recipe, context.plan(), context.dataset())
    except CacheError:
        raise
    except Exception as error:  # noqa: BLE001  # the server need not have the data, say
        said = f"{type(error).__name__}: {error}"
        log.info("run %s: the first shard is not compared: %s", context.run, " ".join(said.split()))
        return None


def _told(context: RunContext, first: str, worker: str, what: str) -> str:
    return (
        f"run {context.run!r} is not pure: of shard 0 of step 0, at the initial weights, worker {worker} "
        f"does not make the same as worker {first}: {what}; {CAUSES}, or their files are not the same: take "
        'that out (see "Purity" in docs/recipes.md) and submit the run anew'
    )
