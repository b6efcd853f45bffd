"""What records say of a shard's metrics: name -> [value, weight or None, how shards are put together]."""

from __future__ import annotations

from typing import Any

from torchord.cache.reading import FIGURE, Kind

MOST = 32
"""Metrics of a step."""

MOST_NAME = 64
"""Characters in the name of one."""

HOW = ("mean", "sum", "exp", "sqrt", "shard")

METRICS = "metrics"
"""In the notes of a ledger entry, and in the event of a step: name -> the step's metric."""

Row = list[Any]
"""[value, weight or None, one of `HOW`]."""


def _figure(value: Any) -> bool:
    return type(value) in FIGURE.types and (FIGURE.fits is None or FIGURE.fits(value))


def _fits(value: Any) -> bool:
    return len(value) <= MOST and all(
        len(name) <= MOST_NAME
        and type(row) is list
        and len(row) == 3
        and _figure(row[0])
        and (row[1] is None or _figure(row[1]))
        and row[2] in HOW
        for name, row in value.items()
    )


ROWS_OF_METRICS = Kind(frozenset({dict}), _fits, f"at most {MOST} metrics, each [value, weight, how]")

NAMED = Kind(
    frozenset({dict}),
    lambda value: (
        len(value) <= MOST and all(len(name) <= MOST_NAME and _figure(each) for name, each in value.items())
    ),
    f"at most {MOST} numbers by name",
)
