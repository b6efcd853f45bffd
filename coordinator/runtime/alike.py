"""Whether this process's kernels are those that a run is computed with: asked at its start, and of each run.

The digests of the self-test (`torchord.coordinator.compute.self_test`) are compared where like machines meet.
Portable kernels of a known release of torch have one set of digests, which a process must have to start at
all. Else the first worker of a run tells its own in the run's claims, and who has others leaves the run to
those that have not. Nobody computes with another BLAS, or with memory that errs, and is not told.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache

import torch

from torchord.cache.errors import InvalidInput, Skewed
from torchord.cache.ledger.fields import KERNELS
from torchord.cache.ledger.incarnation import revision
from torchord.cache.settings import portable
from torchord.coordinator.compute.determinism import pinned
from torchord.coordinator.compute.known_kernels import PORTABLE_DIGESTS
from torchord.coordinator.compute.self_test import OF_NUMPY, digests
from torchord.coordinator.runtime.context import RunContext
from torchord.coordinator.runtime.environment import device, environment

_SHOWN = 4
_LOOK = (
    "look at its memory, its torch and the libraries below it (BLAS, MKL_* and ONEDNN_* in its environment)"
)


@cache
def kernels() -> Mapping[str, str]:
    """The digests of this process's self-test, made once.

    Raises:
        InvalidInput: an operator gives other bits when it is computed again, or than the portable kernels of
            this release of torch do; the message names it.
    """
    with pinned(1, True):
        first, again = digests(), digests()
    if unsteady := _differing(first, again):
        raise InvalidInput(f"this machine computes {_named(unsteady)} twice and gets unequal bits: {_LOOK}")
    known = PORTABLE_DIGESTS.get(torch.__version__) if portable() else None
    if known is not None and (other := _differing(known, first)):
        raise InvalidInput(
            f"this machine computes {_named(other)} with other bits than portable kernels of torch "
            f"{torch.__version__} have: {_LOOK}, import torchord before torch, or start it without "
            "TORCHORD_HARDWARE=portable"
        )
    return first


def require_same_kernels(context: RunContext, worker: str, *, updates: bool = False) -> None:
    """Compare this process's kernels with those of the first process that worked on the run.

    A run that was submitted before there were self-tests has no such comparison, nor has one that admits
    unlike workers, nor a process that computes on a GPU.

    Args:
        worker: id of this process.
        updates: whether it is to be the run's training server, and not a Client.

    Raises:
        Skewed: an operator gives other bits here; the message names it. Nothing was computed.
    """
    if device() != "cpu" or not _compared(context):
        return
    name = _claim(context, updates=updates)
    said = {"worker": worker, "environment": environment(), "digests": dict(kernels())}
    _compare(context, context.ledger.claim(name, json.dumps(said))[name])


def compare_kernels(context: RunContext) -> None:
    """As `require_same_kernels` of a training server that has not taken the run yet, and so claims nothing.

    Raises:
        Skewed: as there.
    """
    if device() == "cpu" and _compared(context):
        claimed = context.ledger.claims().get(_claim(context, updates=True))
        if claimed is not None:
            _compare(context, claimed)


def _claim(context: RunContext, *, updates: bool) -> str:
    return f"{'server ' if updates else ''}kernels {revision(context.incarnation)}"


def _compared(context: RunContext) -> bool:
    config = context.spec.get("config", {})
    return "hardware" in config and context.spec.get("skew", context.config.skew) == "refuse"


def _compare(context: RunContext, claimed: str) -> None:
    first = KERNELS.read(claimed)
    if first["environment"] != environment():
        return  # that is said elsewhere
    theirs, ours = first["digests"], kernels()
    if not portable():  # what numpy does with a recipe's data, its batches show
        theirs = {name: digest for name, digest in theirs.items() if name != OF_NUMPY}
    if other := _differing(theirs, ours):
        raise Skewed(
            f"run {context.run!r} is computed by machines like that of worker {first['worker']}, and this "
            f"one computes {_named(other)} with other bits, though both have {environment()}: {_LOOK}, or "
            "run.resume(admit_skew=True)"
        )


def _differing(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """Operators of both that have another digest."""
    return [name for name, digest in one.items() if other.get(name, digest) != digest]


def _named(operators: list[str]) -> str:
    more = len(operators) - _SHOWN
    return ", ".join(map(repr, operators[:_SHOWN])) + (f" and {more} more" if more > 0 else "")
