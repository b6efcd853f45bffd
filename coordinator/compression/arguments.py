"""Checks of codec arguments, which come from a config's text and so may be of any type."""

from __future__ import annotations

from torchord.cache.errors import ConfigError


def require_switch(name: str, value: object) -> bool:
    """Return an argument that is on or off.

    Raises:
        ConfigError: it is neither.
    """
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be on or off, not {value!r}")
    return value


def require_integer(name: str, value: object, *, minimum: int) -> int:
    """Return an argument that is an integer of at least `minimum`.

    Raises:
        ConfigError: it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ConfigError(f"{name} must be an integer, at least {minimum}, not {value!r}")
    return value


def require_fraction(name: str, value: object) -> float:
    """Return an argument that is a number above 0 and at most 1.

    Raises:
        ConfigError: it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise ConfigError(f"{name} must be a number above 0 and at most 1, not {value!r}")
    return float(value)
