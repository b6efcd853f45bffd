"""Which runs are asked for: by state, time, metric and tag, in an order."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any

from torchord.cache.errors import CheckpointError, InvalidInput, RunNotFound, TorchordError
from torchord.cache.files.run_store import RunRecord, store_of
from torchord.coordinator.runtime.known_runs import rebuild, record_of
from torchord.coordinator.runtime.services import Services

_COMPARED: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_EXPRESSION = re.compile(r"(.+?)\s*(>=|<=|>|<)\s*(\S+)")
_ORDERS = ("submitted", "changed", "name", "version", "loss", "metric")


def known(services: Services) -> dict[str, RunRecord]:
    """All runs by name: as Redis knows them, and those that it has forgotten as the database does.

    Raises:
        CacheUnreachable: Redis does not answer.
        CheckpointError: the database does not.
    """
    found: dict[str, RunRecord] = {}
    store = store_of(services.settings)
    if store is not None:
        try:
            if not store.exists():
                rebuild(store, services.settings.checkpoint_dir)
            found = store.records() if store.exists() else {}
        except CheckpointError:
            if store.exists():
                raise  # there are no checkpoints here either, and no runs but those of Redis
    for name in services.runs.known():
        try:
            ledger = services.ledger(name)
            found[name] = record_of(ledger, ledger.head(), ledger.evaluations())
        except RunNotFound:
            continue
        except TorchordError as error:
            found[name] = RunRecord(name, state="unreadable", error=str(error))
    return found


def chosen(
    records: Iterable[RunRecord],
    *,
    state: str | Iterable[str] | None = None,
    since: float | datetime | None = None,
    metric: str | None = None,
    tag: str | Iterable[str] | None = None,
    order: str | None = None,
) -> list[RunRecord]:
    """The records that fit, in order; arguments as for `Master.runs`.

    Raises:
        InvalidInput: an argument is none that is known.
    """
    states = {state} if isinstance(state, str) else None if state is None else set(state)
    tags = {tag} if isinstance(tag, str) else set(tag or ())
    begin = since.timestamp() if isinstance(since, datetime) else since
    name, compared, bound = _metric(metric)
    found = [
        record
        for record in records
        if (states is None or record.state in states)
        and (begin is None or record.submitted_at >= begin)
        and tags <= set(record.tags)
        and (not name or (name in _metrics(record) and compared(_metrics(record)[name], bound)))
    ]
    word = "submitted" if order is None else order
    key = word.removeprefix("-")
    if key not in _ORDERS and not (key == "metric" and name):
        raise InvalidInput(
            f"order must be one of {', '.join(map(repr, _ORDERS))}, or one of these after a '-' for the "
            f"largest first, not {order!r:.60}"
        )
    if key == "metric" and not name:
        raise InvalidInput("order='metric' needs metric=, which says by which one")
    found.sort(key=lambda record: record.name)
    return sorted(found, key=lambda record: _rank(record, key, name, word.startswith("-")))


def _rank(record: RunRecord, key: str, metric: str, falling: bool) -> tuple[bool, Any]:
    """By what a record is sorted; what has no value comes last."""
    values: Mapping[str, Any] = {
        "submitted": record.submitted_at,
        "changed": record.changed_at,
        "name": record.name,
        "version": record.version,
        "loss": record.loss,
        "metric": _metrics(record).get(metric),
    }
    value = values[key]
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return True, 0.0
    if isinstance(value, str):
        return False, tuple(-ord(sign) for sign in value) if falling else tuple(map(ord, value))
    return False, -value if falling else value


def _metrics(record: RunRecord) -> dict[str, float]:
    return record.metrics if record.loss is None else {"loss": record.loss, **record.metrics}


def _metric(text: str | None) -> tuple[str, Callable[[float, float], bool], float]:
    """A metric's name, and what its value has to be."""
    if text is None:
        return "", lambda value, bound: True, 0.0
    if not isinstance(text, str):
        raise InvalidInput(
            f"metric must be a name, or a comparison such as 'accuracy>=0.9', not {text!r:.60}"
        )
    found = _EXPRESSION.fullmatch(text.strip())
    if found is None:
        return text, lambda value, bound: True, 0.0
    try:
        return found[1], _COMPARED[found[2]], float(found[3])
    except ValueError:
        raise InvalidInput(
            f"metric={text!r:.80} compares with {found[3]!r:.40}, which is no number"
        ) from None
