"""Prediction by the Clients."""

from __future__ import annotations

from typing import Any

from torchord.coordinator.messages.task_names import PREDICT
from torchord.tasks.registry import task


@task(PREDICT)
def predict(
    *, run: str, version: int, request: str, part: int, inputs: dict[str, Any], samples: bool = False
) -> dict[str, Any]:
    """Compute the outputs of one part of a prediction.

    Safe to run twice: the outputs are a function of (run, version, inputs), written once.
    """
    from torchord.tasks.worker import process

    return process().client.inference.predict(run, version, request, part, inputs, samples=samples)
