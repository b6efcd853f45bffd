"""Letting a run that is done go on for more epochs."""

from __future__ import annotations

from typing import Any

from torchord.cache.errors import RunError
from torchord.cache.ledger.incarnation import revised
from torchord.cache.ledger.ledger import Ledger
from torchord.coordinator.spec.config import TrainingConfig

_OF_A_LENGTH = ("total_steps", "T_max", "total_iters", "num_training_steps", "max_steps", "epochs")
"""Arguments by which a scheduler is told how long a run is."""


def extend(ledger: Ledger, epochs: int) -> str:
    """See `Run.extend`.

    Returns:
        What of the recipe still says how long the run was, in words; "" if nothing does.
    """
    head, spec, run = ledger.head(), ledger.spec(), ledger.run
    before = TrainingConfig.from_json(spec["config"])
    if type(epochs) is not int or epochs < 1:
        raise RunError(f"run {run!r}: extend() takes how many epochs more, at least 1, not {epochs!r:.80}")
    if before.staleness:
        raise RunError(
            f"run {run!r} has staleness={before.staleness}: the versions that its next steps would be "
            "computed at are gone; submit it under another name with the epochs that it should have"
        )
    config = TrainingConfig.from_json({**before.to_json(), "epochs": before.epochs + epochs})
    said = _said_of_length(spec["recipe"].get("scheduler"), config.epochs)
    data = {"version": head.version, "epochs": config.epochs, **({"message": said} if said else {})}
    verdict = ledger.extend(
        {**spec, "config": config.to_json()},
        incarnation=head.incarnation,
        following=revised(head.incarnation),
        data=data,
    )
    if verdict == "stopped":
        assert head.stopped is not None
        raise RunError(
            f"run {run!r} was ended by one of its rules ({head.stopped['reason']}), which more epochs do "
            "not change; run.fork(name=..., stop_when=None) goes on from its last version"
        )
    if verdict != "ok":
        raise RunError(f"run {run!r} is {verdict}; only a run that is done is extended")
    return said


def _said_of_length(entry: Any, epochs: int) -> str:
    """What a scheduler's entry says of the run's length."""
    for name, value in _arguments(entry):
        if name in _OF_A_LENGTH:
            return (
                f"its scheduler has {name}={value!r:.40}, which stays: its learning rates are not those of a "
                f"run that is submitted with {epochs} epochs and another {name}"
            )
    return ""


def _arguments(entry: Any) -> list[tuple[str, Any]]:
    """The arguments by name that an entry binds, at any depth."""
    if isinstance(entry, dict):
        own = list(entry["kwargs"].items()) if isinstance(entry.get("kwargs"), dict) else []
        return [*own, *(pair for value in entry.values() for pair in _arguments(value))]
    return [pair for value in entry for pair in _arguments(value)] if isinstance(entry, list) else []
