"""What a training step measures beside its loss: `step` may return `(loss, {"accuracy": ...})`.

Each shard measures its own examples, and the step's metric is put together from the shards' in their order,
so that it has the same bits on any fleet:

    a number            the mean over the shards, each weighed as its loss is: Σ w_k m_k / Σ w_k
    (sum, weight)       Σ sum_k / Σ weight_k, where the weights are the metric's own
    Measure(..., how)   the same, and then what `how` says

A metric changes nothing of the training, and may be NaN or infinite.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from torchord.cache.errors import InvalidInput
from torchord.cache.ledger.step_metrics import HOW, MOST, MOST_NAME, Row
from torchord.coordinator.compute.shares import mean_loss

Number = Tensor | float

Part = tuple[Mapping[str, Row] | None, int, float | None]
"""What a shard or a local step has measured, its examples, and its loss's weight (None: the examples)."""


@dataclass(frozen=True)
class Measure:
    """A metric of a step, with how those of several shards are put together.

    Args:
        value: a number or a tensor of one element; with a weight, a sum that is to be divided by that.
        weight: what the value is a sum over; None: the value is a mean over what the loss is a mean over.
        how: "mean"; "exp" and "sqrt": that function of the mean, as of a perplexity and a root mean square;
            "sum": the sum over the shards; "shard": the mean of what each shard measures by itself, where
            the whole batch would have another (a maximum, an area under a curve).

    Raises:
        InvalidInput: `how` is none of these, or a sum has a weight.

    Example:
        >>> Measure(12.0, 8, "exp").how
        'exp'
    """

    value: Any
    weight: Any = None
    how: str = "mean"

    def __post_init__(self) -> None:
        if self.how not in HOW:
            raise InvalidInput(
                f"how of a Measure must be one of {', '.join(map(repr, HOW))}, not {self.how!r:.60}"
            )
        if self.how == "sum" and self.weight is not None:
            raise InvalidInput("a Measure that is a sum over the shards has no weight; leave it out")


Terms = Mapping[str, Measure]
"""Metrics as the recipe's code returned them, checked: value and weight are numbers or real scalars."""


def apart(returned: Any, entry: str) -> tuple[Any, Terms]:
    """Take what a recipe's `loss` or `step` returned apart into the loss and the metrics beside it.

    Args:
        entry: "loss" or "step", for messages.

    Raises:
        InvalidInput: a metric is no number, has a name that cannot be shown, or there are too many.
    """
    if type(returned) is not tuple or not returned or not isinstance(returned[-1], Mapping):
        return returned, {}
    *loss, found = returned
    if len(found) > MOST:
        raise InvalidInput(
            f"{entry} returned {len(found)} metrics beside its loss; at most {MOST} are logged"
        )
    terms = {name: _term(name, value, entry) for name, value in found.items()}
    return loss[0] if len(loss) == 1 else tuple(loss), terms


def figures(terms: Terms) -> list[Tensor]:
    """What of them has to be brought from a device, in order."""
    return [each for term in terms.values() for each in (term.value, term.weight) if isinstance(each, Tensor)]


def read(terms: Terms, found: Sequence[float]) -> dict[str, Row] | None:
    """The metrics as a record has them, None if there are none.

    Args:
        found: the values of `figures`.
    """
    values = iter(found)

    def number(value: Any) -> Any:
        return next(values) if isinstance(value, Tensor) else value

    return {name: [number(t.value), number(t.weight), t.how] for name, t in terms.items()} or None


def joined(parts: Sequence[Part]) -> dict[str, Row] | None:
    """The metrics of several shards or local steps as those of one, in their order; None for none."""
    names = dict.fromkeys(name for metrics, _, _ in parts for name in metrics or ())
    found: dict[str, Row] = {}
    for name in names:
        rows = [
            (metrics[name], examples, weight)
            for metrics, examples, weight in parts
            if metrics is not None and name in metrics
        ]
        found[name] = _joined(rows, whole=len(rows) == len(parts))
    return found or None


def combined(parts: Sequence[Part]) -> dict[str, float]:
    """The metrics of a step from those of its shards, in slot order; {} if there are none.

    Example:
        >>> half, all_right = {"accuracy": [0.5, None, "mean"]}, {"accuracy": [1.0, None, "mean"]}
        >>> combined([(half, 2, None), (all_right, 6, None)])
        {'accuracy': 0.875}
    """
    return {name: _finished(*row) for name, row in (joined(parts) or {}).items()}


# --- parts ------------------------------------------------------------------------------


def _term(name: Any, value: Any, entry: str) -> Measure:
    if not isinstance(name, str) or not 0 < len(name) <= MOST_NAME or not name.isprintable():
        raise InvalidInput(
            f"{entry} returned a metric with the name {name!r:.80}; a name is a printable text of 1 to "
            f"{MOST_NAME} characters"
        )
    term = value if isinstance(value, Measure) else Measure(value)
    if type(value) is tuple and len(value) == 2:
        term = Measure(*value)
    what = f"metric {name!r} that {entry} returned"
    weight = None if term.weight is None else _number(term.weight, f"the weight of {what}")
    return Measure(_number(term.value, what), weight, term.how)


def _number(value: Any, what: str) -> Number:
    if isinstance(value, Tensor):
        if value.numel() == 1 and not value.is_complex():
            return value.detach().reshape(()).clone()  # what it is a view of may change before it is read
        shown = f"tensor of {value.dtype} and shape {tuple(value.shape)}"
    else:
        shown = type(value).__name__
        if not isinstance(value, (str, bytes, bytearray, complex, np.complexfloating)):
            try:
                return float(value)
            except (TypeError, ValueError, OverflowError):
                pass
    raise InvalidInput(
        f"{what} is a {shown}, but must be a number or a real tensor of one element, or (sum, weight) of such"
    )


def _joined(rows: Sequence[tuple[Row, int, float | None]], *, whole: bool) -> Row:
    """The rows of one metric as one.

    Args:
        whole: whether it was measured wherever there is a loss.
    """
    how = rows[0][0][2]
    if how == "sum":
        return [sum(value for (value, _, _), _, _ in rows), None, how]
    if whole and all(own is None for (_, own, _), _, _ in rows):
        mean = mean_loss((value, examples, weight) for (value, _, _), examples, weight in rows)
        return [mean, None, how]
    total, over = 0.0, 0.0
    for (value, own, _), examples, weight in rows:
        if own is None:
            own = float(examples if weight is None else weight)
            value = value * own if own else 0.0
        total += value
        over += own
    return [total, over, how]


def _finished(value: float, weight: float | None, how: str) -> float:
    if weight is not None:
        value = value / weight if weight else math.nan
    try:
        return {"exp": math.exp, "sqrt": math.sqrt}[how](value) if how in ("exp", "sqrt") else float(value)
    except OverflowError:
        return math.inf
    except ValueError:
        return math.nan
