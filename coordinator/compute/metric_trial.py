"""Whether what a step measures beside its loss is what its shards' metrics come to, tried once.

A metric that is taken for a mean and is none (the exponential of a loss, a maximum, an F1) would change with
the number of shards. It is looked at as the loss is (`torchord.coordinator.compute.probe`), and left alone
where it is random, depends on the order of the samples, or has no value for a part.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress

from torchord.cache.errors import InvalidInput
from torchord.coordinator.compute.part_losses import MODES, CannotLook, PartLosses
from torchord.coordinator.compute.step_metrics import Part, combined

_ALIKE = 1e-4
_TIMES_ROUNDING = 20
_LEAST = 1e-6

_WAYS_OUT = (
    "return (sum, weight) in its place for a mean over something else, Measure(sum, weight, 'exp') or 'sqrt' "
    "for a function of a mean, Measure(value, how='sum') for a sum, and Measure(value, how='shard') for what "
    "each shard measures by itself"
)


def try_metrics(losses: PartLosses, splits: Sequence[Sequence[int]]) -> None:
    """Compare what all examples measure with what parts of them come to.

    Args:
        losses: of the examples; whether and how they are looked at is changed.
        splits: sizes of parts of all examples, in several ways.

    Raises:
        InvalidInput: a metric is not put together from its parts in any of these ways; the message names it.
    """
    losses.chance = None
    for mode in MODES if losses.measures else ():
        losses.mode = mode
        with suppress(CannotLook):
            if found := _steady(losses):
                _compare(losses, found, splits)
                return


def _steady(losses: PartLosses) -> dict[str, tuple[float, float]]:
    """Name -> (value for all examples, how far it moves with their order), of metrics without chance."""
    order = losses.all
    whole, *others = (
        combined([losses.measured(examples, draw)])
        for examples, draw in ((order, 0), (order, 0), (order, 1), (order[::-1], 0))
    )
    again, drawn, turned = others
    return {
        name: (value, abs(value - turned.get(name, math.nan)))
        for name, value in whole.items()
        if math.isfinite(value) and value == again.get(name) == drawn.get(name)
    }


def _compare(
    losses: PartLosses, found: Mapping[str, tuple[float, float]], splits: Sequence[Sequence[int]]
) -> None:
    unlike: dict[str, tuple[float, Sequence[int]]] = {}
    alike: set[str] = set()
    for sizes in splits:
        with suppress(CannotLook):
            parts = _parts(losses, sizes)
            together = combined(parts)
            for name, (value, noise) in found.items():
                each = [combined([part]).get(name, math.nan) for part in parts]
                if not all(map(math.isfinite, each)) or _how(parts, name) == "shard":
                    continue
                scale = max(abs(value), *map(abs, each), _LEAST)
                allowed = max(_ALIKE, _TIMES_ROUNDING * losses.rounding) * scale + _TIMES_ROUNDING * noise
                if not abs(value - together[name]) > allowed:
                    alike.add(name)
                unlike.setdefault(name, (together[name], sizes))
    for name in unlike.keys() - alike:
        joined, sizes = unlike[name]
        raise InvalidInput(
            f"metric {name!r} beside the loss is {found[name][0]:.6g} for the first {len(losses.all)} "
            f"examples, and {joined:.6g} put together from parts of {', '.join(map(str, sizes))}, so it "
            f"would change with batch_size and shards; {_WAYS_OUT}"
        )


def _parts(losses: PartLosses, sizes: Sequence[int]) -> list[Part]:
    parts, start = [], 0
    for size in sizes:
        parts.append(losses.measured(losses.all[start : start + size]))
        start += size
    return parts


def _how(parts: Sequence[Part], name: str) -> str:
    return next(str(metrics[name][2]) for metrics, _, _ in parts if metrics is not None and name in metrics)
