"""What a run's head says of environments before its first worker has: which ones may compute it."""

from __future__ import annotations

from typing import Any

PORTABLE = "portable"
"""The environment of a run with hardware="portable" that nobody has computed for yet; a part of what workers
that may do so say of themselves, as in "torch 2.13.0, portable x86-64"."""


def wanted(spec: dict[str, Any]) -> str:
    """The environment that the head of a new run has: "" where the first worker decides."""
    return PORTABLE if spec.get("config", {}).get("hardware") == PORTABLE else ""


def is_portable(environment: str) -> bool:
    """Whether a run's environment, or a worker's, is that of portable kernels."""
    return environment == PORTABLE or f", {PORTABLE} " in environment


def fits(environment: str, here: str) -> bool:
    """Whether a worker may compute for a run that refuses unlike ones.

    Args:
        environment: the run's, as its head has it.
        here: the worker's.
    """
    return environment in ("", here) or (environment == PORTABLE and is_portable(here))
