"""What a run's records say of its plan beside its config: live switches, and the order that it visits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchord.cache.ledger.fields import SWITCH
from torchord.cache.ledger.ledger import Ledger
from torchord.cache.reading import number_of
from torchord.coordinator.spec.epochs import Visits


def switches_of(spec: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """The live switches of a run: step -> config fields that change from it on."""
    return {
        number_of(step, "a switch"): SWITCH.of(fields) for step, fields in spec.get("switches", {}).items()
    }


def recorded_visits(ledger: Ledger, spec: Mapping[str, Any]) -> Visits | None:
    """What a run's training server recorded of its recipe's order or batches; None if it has neither."""
    if not {"order", "batches"} & spec["recipe"].keys():
        return None
    return Visits.from_json(ledger.manifest().get("visits"))
