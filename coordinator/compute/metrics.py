"""Metrics over many batches: means of functions, and those that no mean of parts gives.

An evaluation is computed in micro-batches, which are spread over the workers. What is measured of it is one
of

    a function (outputs, targets) -> number     the mean over the examples: Σ n_k v_k / Σ n_k
    a pair (state, finish)                      finish([state(outputs_0, targets_0), ...]), the states of all
                                                micro-batches in their order
    a class with update, compute, merge_state   one object a part, updated with each of its micro-batches;
                                                the objects are merged in the order of the parts

An accuracy is a mean; an AUROC, an F1 or a perplexity is not: its mean over parts is another number, which
changes with the size of the parts. `tried` finds a function that is taken for a mean and is none.
"""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torchord.cache.errors import InvalidInput, TorchordError
from torchord.cache.tensors import tree
from torchord.coordinator.compute.shares import Shares
from torchord.coordinator.spec.resolving import MetricPair

Metric = Callable[..., Any] | MetricPair

_ALIKE = 1e-4  # of the larger one, from which on two figures are not alike

_WAYS_OUT = (
    "give a pair (state, finish), where state(outputs, targets) returns what finish([states of all batches]) "
    "needs, or a class with update, compute and merge_state such as those of torchmetrics"
)


class Tally:
    """What is measured of one part, micro-batch by micro-batch.

    Args:
        metrics: name -> metric, those of the resolved recipe.
        device: where outputs and targets will be.
    """

    def __init__(self, metrics: Mapping[str, Metric], device: torch.device | str = "cpu") -> None:
        self._metrics = metrics
        self._states: dict[str, list[Any]] = {}
        self._objects: dict[str, Any] = {}
        for name, metric in metrics.items():
            if isinstance(metric, MetricPair):
                self._states[name] = []
            elif _makes_objects(metric):
                self._objects[name] = _made(name, metric, device)

    def take(self, outputs: Any, targets: Any) -> dict[str, float]:
        """Measure one micro-batch.

        Returns:
            name -> value of those metrics that are functions.

        Raises:
            InvalidInput: a function returned no number; the message names it.
        """
        values: dict[str, float] = {}
        for name, metric in self._metrics.items():
            if isinstance(metric, MetricPair):
                self._states[name].append(_carried(name, metric.state(outputs, targets)))
            elif name in self._objects:
                self._objects[name].update(outputs, targets)
            else:
                values[name] = number(f"metric {name!r}", metric(outputs, targets))
        return values

    def states(self) -> dict[str, Any]:
        """Return name -> state of the part, of those metrics that are no functions: trees with tensors on
        the CPU, as for `torchord.cache.tensors.tree.flatten`; a pair's is the list of its micro-batches'.

        Raises:
            InvalidInput: a state holds what cannot travel.
        """
        objects = {name: _carried(name, state_of(made)) for name, made in self._objects.items()}
        return {name: self._states.get(name, objects.get(name)) for name in self._metrics if name in self}

    def __contains__(self, name: str) -> bool:
        return name in self._states or name in self._objects


def finished(metrics: Mapping[str, Metric], parts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Work the figures out that no mean gives.

    Args:
        metrics: name -> metric.
        parts: of each part, in order, its `Tally.states`.

    Returns:
        name -> figure; a metric that ends in a mapping has one for each of its keys, "name.key".

    Raises:
        InvalidInput: a metric ended in something else than numbers.
    """
    found: dict[str, float] = {}
    for name, metric in metrics.items():
        states = [part[name] for part in parts if name in part]
        if not states:
            continue
        if isinstance(metric, MetricPair):
            value = metric.finish([state for part in states for state in part])
        else:
            value = merged(name, metric, states).compute()
        if isinstance(value, Mapping):
            prefix = f"{name}." if name else ""
            found |= {f"{prefix}{key}": number(f"metric {name!r}", each) for key, each in value.items()}
        else:
            found[name] = number(f"metric {name!r}", value)
    return found


def number(name: str, value: Any) -> float:
    """A figure as Python's float.

    Raises:
        InvalidInput: it is none; the message begins with `name`.
    """
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        shown = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
        raise InvalidInput(
            f"{name} returned a {type(value).__name__}{shown}, but must return a number or a scalar tensor"
        ) from None


@dataclass(frozen=True)
class Sample:
    """What a metric gets of some examples.

    Attributes:
        outputs: of the model.
        targets: what they are measured against.
        examples: how many they are.
        weight: what a mean of them weighs; None: the examples.
    """

    outputs: Any
    targets: Any
    examples: int
    weight: float | None = None


def tried(metrics: Mapping[str, Metric], whole: Sample, parts: Sequence[Sample]) -> None:
    """Try every metric on one batch, so that none fails at the end of all training.

    Each must give numbers. A function must give for the batch what the mean over its parts is, and an object
    what merged ones give: on these outputs, and on random ones of the same form, since a model at its start
    may give every example the same. Where outputs or targets cannot be cut by examples, these are all that is
    looked at. Draws random numbers.

    Args:
        whole: the batch.
        parts: the same examples in several parts, computed each by itself; none: only numbers are asked for.

    Raises:
        InvalidInput: the message names the metric, what it gave and what to write instead.
        Exception: what a metric raises.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of metrics about classes that a small batch lacks
        measured(metrics, [whole])
        additive = {name: metric for name, metric in metrics.items() if not isinstance(metric, MetricPair)}
        for name, metric in additive.items() if parts else ():
            _compare(name, metric, whole, parts)
            for draw in (torch.rand_like, torch.randn_like) if _has_rows(whole) else ():
                drawn = replace(whole, outputs=_mapped(whole.outputs, draw, floating=True))
                with suppress(_UnfitOutputs):
                    _compare(name, metric, drawn, list(_cut(drawn, parts)), drawn=True)


class _UnfitOutputs(Exception):
    """Random outputs that a metric has no use for, such as numbers that are no probabilities."""


def _cut(whole: Sample, parts: Sequence[Sample]) -> Iterator[Sample]:
    first = 0
    for part in parts:
        rows = slice(first, first + part.examples)
        outputs, targets = (_rows_of(value, rows) for value in (whole.outputs, whole.targets))
        yield Sample(outputs, targets, part.examples, part.weight)
        first += part.examples


def _compare(
    name: str, metric: Metric, whole: Sample, parts: Sequence[Sample], *, drawn: bool = False
) -> None:
    """Require that a metric of a batch is what those of its parts come to."""
    try:
        together = measured({name: metric}, [whole])
    except Exception as error:
        if drawn:
            raise _UnfitOutputs from error
        raise
    try:
        apart = measured({name: metric}, parts)
    except TorchordError:
        raise
    except Exception as error:
        raise InvalidInput(
            f"metric {name!r} gives {_shown(together)} for a batch of {whole.examples} examples and raises "
            f"{type(error).__name__} for a part of it ({error}), so it is no mean over examples; {_WAYS_OUT}"
        ) from error
    for key, value in together.items():
        if not _alike(value, apart[key]):
            how = "merged from its parts" if _makes_objects(metric) else "as the mean of its parts"
            raise InvalidInput(
                f"metric {key!r} is {value:.6g} for a batch of {whole.examples} examples and "
                f"{apart[key]:.6g} {how}, so it would change with batch_size and shards; {_WAYS_OUT}"
            )


def measured(metrics: Mapping[str, Metric], parts: Sequence[Sample]) -> dict[str, float]:
    """The figures of some examples in parts, each of which is one micro-batch."""
    shares = Shares()
    counts = [shares.take(part.examples, part.weight) for part in parts]
    means: dict[str, float] = {}
    states = []
    for part, count in zip(parts, counts, strict=True):
        tally = Tally(metrics, _device_of(part.outputs))
        for name, value in tally.take(part.outputs, part.targets).items():
            means[name] = means.get(name, 0.0) + (value * count / shares.total if count else 0.0)
        states.append(tally.states())
    return means | finished(metrics, states)


def _alike(one: float, other: float) -> bool:
    if math.isfinite(one) and math.isfinite(other):
        return abs(one - other) <= _ALIKE * max(abs(one), abs(other), 1.0)
    return one == other or (math.isnan(one) and math.isnan(other))


def _shown(values: Mapping[str, float]) -> str:
    return ", ".join(f"{value:.6g}" for value in values.values())


# --- objects ----------------------------------------------------------------------------


def _makes_objects(metric: Metric) -> bool:
    return inspect.isclass(metric.func if isinstance(metric, functools.partial) else metric)


def _made(name: str, metric: Metric, device: torch.device | str) -> Any:
    assert not isinstance(metric, MetricPair)
    made = metric()
    lacking = [verb for verb in ("update", "compute", "merge_state") if not hasattr(made, verb)]
    if not (hasattr(made, "metric_state") or hasattr(made, "state_dict")):
        lacking.append("state_dict")
    if lacking:
        raise InvalidInput(
            f"metric {name!r} makes a {type(made).__name__}, which has no {' and no '.join(lacking)}: states "
            f"of several workers cannot be put together; {_WAYS_OUT}"
        )
    return made.to(device) if callable(getattr(made, "to", None)) else made


def state_of(made: Any) -> Any:
    """What another process makes the same object from: torchmetrics' states, or a state dict."""
    if hasattr(made, "metric_state"):
        return {"states": dict(made.metric_state), "updates": int(getattr(made, "_update_count", 1))}
    return {"state_dict": made.state_dict()}


def _restored(name: str, metric: Metric, state: Mapping[str, Any]) -> Any:
    made = _made(name, metric, "cpu")
    if "states" in state:
        for key, value in state["states"].items():
            setattr(made, key, value)
        made._update_count = state["updates"]
    else:
        made.load_state_dict(state["state_dict"])
    return made


def merged(name: str, metric: Metric, states: Sequence[Mapping[str, Any]]) -> Any:
    """One object of the states of several, merged in their order.

    Args:
        name: of the metric, for messages.
        metric: makes an empty object.
        states: as `state_of` returns them, at least one.

    Raises:
        InvalidInput: they cannot be merged.
    """
    whole = _restored(name, metric, states[0])
    try:
        for state in states[1:]:
            other = _restored(name, metric, state)
            whole.merge_state(other if "states" in state else [other])
    except Exception as error:
        raise InvalidInput(
            f"metric {name!r} cannot be put together from parts: {type(whole).__name__}.merge_state raised "
            f"{type(error).__name__}: {error}; {_WAYS_OUT}"
        ) from error
    return whole


# --- trees of values --------------------------------------------------------------------


def _carried(name: str, value: Any) -> Any:
    """A state as plain values with tensors on the CPU, or the reason why it cannot travel."""
    found = _mapped(value, lambda tensor: tensor.detach().cpu())
    try:
        tree.flatten(found)
    except TorchordError as error:
        raise InvalidInput(f"the state of metric {name!r} cannot travel: {error}") from error
    return found


def _mapped(value: Any, change: Callable[[Tensor], Tensor], *, floating: bool = False) -> Any:
    """A tree with all its tensors changed, or only the floating ones."""
    if isinstance(value, Tensor):
        return change(value) if not floating or value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _mapped(item, change, floating=floating) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_mapped(item, change, floating=floating) for item in value)
    return value


def _has_rows(sample: Sample) -> bool:
    """Whether outputs and targets are plain trees of tensors that have an example a row."""
    return all(_rows(value, sample.examples) for value in (sample.outputs, sample.targets))


def _rows(value: Any, examples: int) -> bool:
    if isinstance(value, Tensor):
        return value.ndim > 0 and len(value) == examples
    items = list(value.values()) if type(value) is dict else value if type(value) in (list, tuple) else []
    return bool(items) and all(_rows(item, examples) for item in items)


def _rows_of(value: Any, rows: slice) -> Any:
    return _mapped(value, lambda tensor: tensor[rows])


def _device_of(value: Any) -> torch.device | str:
    if isinstance(value, Tensor):
        return value.device
    items = value.values() if isinstance(value, Mapping) else value if type(value) in (list, tuple) else ()
    return next((_device_of(item) for item in items), "cpu")
