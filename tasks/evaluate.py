"""Evaluation by the Clients."""

from __future__ import annotations

from typing import Any

from torchord.coordinator.messages.task_names import EVALUATE
from torchord.tasks.registry import task


@task(EVALUATE)
def evaluate(*, run: str, version: int, part: int, parts: int) -> dict[str, Any]:
    """Evaluate one part of the evaluation dataset at one version.

    Safe to run twice: the metrics are a function of (run, version, part), written once.
    """
    from torchord.tasks.worker import process

    return process().client.inference.evaluate(run, version, part, parts)
