"""A run's share of the fleet: its weight beside others', and its priority."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torchord.cache import keys
from torchord.cache.errors import ConfigError
from torchord.cache.ledger.control_plane import ControlPlane
from torchord.cache.ledger.figures import to_text

WEIGHTS = (0.01, 100.0)
PRIORITIES = (-1000, 1000)


def checked(weight: object, priority: object) -> tuple[float, int]:
    """A weight and a priority in range.

    Raises:
        ConfigError: they are not; the message names the field.
    """
    least, most = WEIGHTS
    number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    if not number or not math.isfinite(weight) or not least <= weight <= most:  # type: ignore[arg-type,operator]
        raise ConfigError(f"weight must be a number from {least:g} to {most:g}, not {weight!r:.60}")
    least, most = PRIORITIES
    if not isinstance(priority, int) or isinstance(priority, bool) or not least <= priority <= most:
        raise ConfigError(f"priority must be an integer from {least} to {most}, not {priority!r:.60}")
    return float(weight), priority  # type: ignore[arg-type]


def share_of(spec: Mapping[str, Any]) -> tuple[float, int]:
    """Weight and priority that a run is submitted with; 1 and 0 where it says none, or nothing that is."""
    config = spec.get("config", {})
    try:
        return checked(config.get("weight", 1.0), config.get("priority", 0))
    except ConfigError:
        return 1.0, 0


class Shares(ControlPlane):
    """What a run's messages are ranked by, see scripts/ranked.lua."""

    def share(self, *, weight: float | None = None, priority: int | None = None) -> str:
        """Give the run another share from its next messages on; returns its status, or "missing"."""
        told = {"weight": weight, "priority": priority}
        said = {name: value for name, value in told.items() if value is not None}
        with self._during("share the fleet with", " "):
            return str(
                self._script(
                    "share",
                    [self.keys.head, self.keys.events],
                    [
                        *("" if value is None else value for value in told.values()),
                        to_text(said),
                        keys.EVENTS_KEPT,
                        keys.RUN_TTL_SECONDS,
                    ],
                )
            )
