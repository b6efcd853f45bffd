"""What a worker's heartbeat says it is doing, for people and for the supervisor, which compares."""

from __future__ import annotations

from collections.abc import Callable


def gradient(run: str, step: int, shard: int) -> str:
    """A Client at one shard."""
    return f"{run}: gradient of shard {shard}, step {step}"


def in_round(run: str, step: int) -> str:
    """A Client in a round, between two shards."""
    return f"{run}: round, step {step}"


def partial_sum(run: str, step: int, slot: int) -> str:
    """A Client at one partial sum."""
    return f"{run}: partial sum {slot}, step {step}"


def update(run: str, step: int) -> str:
    """A training server at one run."""
    return f"{updates(run)}step {step}"


def updates(run: str) -> str:
    """How every `update` of a run begins."""
    return f"{run}: update of "


def evaluation(run: str, version: int, part: int) -> str:
    """A Client at one part of an evaluation."""
    return f"{evaluations(run, version)}part {part}"


def evaluations(run: str, version: int) -> str:
    """How every `evaluation` of a version begins."""
    return f"{run}: evaluation of version {version}, "


def prediction(run: str, version: int, part: int) -> str:
    """A Client at one part of a prediction."""
    return f"{run}: prediction at version {version}, part {part}"


def predicted(task: str) -> tuple[str, int] | None:
    """The run and version that a `prediction` is at, None of any other task."""
    run, _, what = task.rpartition(": ")
    head, _, version = what.partition(",")[0].rpartition(" ")
    return (run, int(version)) if head == "prediction at version" else None


def of(run: str) -> Callable[[str], bool]:
    """Whether a worker that says so is at something of a run."""
    return lambda said: said.startswith(f"{run}: ")


def trained(task: str) -> str:
    """The run that a task moves on, "" of a prediction: a run that is at rest has no use for it."""
    run, _, what = task.rpartition(": ")
    return "" if what.startswith("prediction") else run
