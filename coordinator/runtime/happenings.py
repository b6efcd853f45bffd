"""What callbacks of a run are called with: its steps, versions, evaluations and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchord.cache.ledger.answers import Event


@dataclass(frozen=True)
class RunInfo:
    """The run that a callback is made for.

    Attributes:
        name: of the run.
        config: as submitted, JSON-able.
        recipe: as submitted, JSON-able: its entries by name.
        directory: where files about the run may go, on the training server's disk: made when it is asked for.
            None where checkpoints go to a URL.
    """

    name: str
    config: Mapping[str, Any]
    recipe: Mapping[str, Any]
    directory: Path | None


@dataclass(frozen=True)
class StepMade:
    """A committed global step.

    Attributes:
        id: of the event, the same if it is told again: milliseconds, a dash, a number.
        at: Unix time (s).
        step: its number, from 0.
        version: what it made, `step + 1`.
        loss: mean loss over the batch, before the update.
        grad_norm: L2 norm of the gradient, before clipping.
        examples: in the step.
        seconds: from the commit before.
        nbytes: of gradients.
        lr: learning rate of each parameter group.
        skipped: whether the update was left out for a NaN.
        metrics: what the loss measured besides.
    """

    id: str
    at: float
    step: int
    version: int
    loss: float
    grad_norm: float
    examples: int
    seconds: float
    nbytes: int
    lr: tuple[float, ...] = ()
    skipped: bool = False
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class VersionStored:
    """A version that is stored: of those since the last call the newest.

    Attributes:
        version: its number.
        load: its tensors by name, on the CPU.
    """

    version: int
    load: Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Evaluated:
    """The metrics of a version; `id` and `at` as of `StepMade`."""

    id: str
    at: float
    version: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Checkpointed:
    """A checkpoint that was written, at `path`; `id` and `at` as of `StepMade`."""

    id: str
    at: float
    version: int
    path: str


Happening = StepMade | Evaluated | Checkpointed

METHODS: dict[type, str] = {
    StepMade: "on_step",
    VersionStored: "on_version",
    Evaluated: "on_evaluation",
    Checkpointed: "on_checkpoint",
}
"""What a callback is called with -> its method that is called."""


def happening(event: Event) -> Happening | None:
    """What an event of a run is for callbacks; None for what they are not told.

    Raises:
        KeyError, TypeError, ValueError: somebody wrote it who is none of ours.
    """
    data, id, at = event.data, event.id, event.at
    if event.type == "step":
        return StepMade(
            id=id,
            at=at,
            step=int(data["version"]) - 1,
            version=int(data["version"]),
            loss=float(data["loss"]),
            grad_norm=float(data["grad_norm"]),
            examples=int(data["examples"]),
            seconds=float(data["seconds"]),
            nbytes=int(data["nbytes"]),
            lr=tuple(map(float, data["lr"])),
            skipped=bool(data.get("skipped")),
            metrics=dict(data.get("metrics") or {}),
        )
    if event.type == "evaluation":
        return Evaluated(id, at, int(data["version"]), dict(data["metrics"]))
    if event.type == "checkpoint":
        return Checkpointed(id, at, int(data["version"]), str(data["path"]))
    return None


def scalars(event: Event) -> list[tuple[str, float, int]]:
    """(tag, value, global step) of each number that an event carries, by the names that TensorBoard shows."""
    found = happening(event)
    return [] if found is None else scalars_of(found)


def scalars_of(found: Happening) -> list[tuple[str, float, int]]:
    """`scalars` of what a callback is called with."""
    if isinstance(found, Evaluated):
        return [(f"evaluation/{name}", value, found.version) for name, value in found.metrics.items()]
    if isinstance(found, Checkpointed):
        return []
    step = found.version
    told = [("train/loss", found.loss, step), ("train/gradient norm", found.grad_norm, step)]
    told += [(f"train/learning rate {group}", lr, step) for group, lr in enumerate(found.lr)]
    taken = {tag for tag, _, _ in told}
    for name, value in found.metrics.items():
        tag = f"train/{name}"
        told.append((tag if tag not in taken else f"train/metric {name}", value, step))
    told.append(("speed/gradient bytes a step", found.nbytes, step))
    if found.seconds > 0:
        told.append(("speed/samples a second", found.examples / found.seconds, step))
    return told
