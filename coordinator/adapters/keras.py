"""`keras`: the recipe of a compiled Keras 3 model on the torch backend, with its own loss, optimizer and
metrics.

Nothing of Keras is imported before a model is made: the module that builds it brings it.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torchord.cache.errors import InvalidInput, RecipeError
from torchord.coordinator.compute.metrics import number
from torchord.coordinator.compute.step_metrics import Measure
from torchord.coordinator.spec.recipe import Recipe
from torchord.coordinator.spec.targets import Entry, Target

_KEPT = "torchord_measured"  # the batch that was measured last, and the state of its metrics


def keras(build: Entry, dataset: Entry, *, evaluation: Entry | None = None, **entries: Any) -> Recipe:
    """Make the recipe of a Keras model that `build` makes and compiles.

    The loss is the compiled one with the layers' own terms, and the optimizer is Keras' own, with its
    arithmetic, schedule, decay and clipping. Compiled metrics are measured in evaluations, as Keras measures
    all of them at once, and in each step as the mean of what they are of its shards.

    Args:
        build: () -> a `keras.Model` that was compiled; importable like any entry of a recipe.
        dataset: () -> map-style dataset of (inputs, targets) or (inputs, targets, sample weights); inputs and
            targets may be dicts.
        evaluation: () -> map-style dataset of the same form.
        entries: of `Recipe`, in place of these or beside them, such as `loss_over`, `weight` or `collate`.

    Raises:
        RecipeError: Keras is not installed, or computes with another backend than torch in this process; or
            an entry cannot be one of a recipe.

    Example:
        >>> recipe = keras(build_model, load_digits)  # doctest: +SKIP
    """
    if importlib.util.find_spec("keras") is None:
        raise RecipeError(
            "torchord.keras needs Keras, which is not installed: pip install 'torchord[models]'"
        )
    _require_backend(RecipeError)
    given: Any = Target(build) if isinstance(build, str) else build
    measuring: dict[str, Any] = {}
    if evaluation is not None:
        measuring = {"evaluation": evaluation, "metrics": {"": (state, partial(finish, build=given))}}
    ours: dict[str, Any] = {
        "model": partial(made, given),
        "dataset": dataset,
        "step": step,
        "parameter_groups": groups_of,
        "optimizer": optimizer_of,
        "predict": predict,
        **measuring,
    }
    if "optimizer" in entries:
        ours["parameter_groups"] = None
    return Recipe(**{**ours, **entries})


# --- entries of the recipe ----------------------------------------------------------------


def made(build: Callable[..., Any]) -> nn.Module:
    """The compiled model.

    Raises:
        InvalidInput: it is none, or does what a run cannot do; the message names it and the way out.
    """
    found = build()
    _require_backend(InvalidInput)
    kind = _base(type(found))
    if kind is None:
        raise InvalidInput(
            f"torchord.keras needs a keras.Model, and the build function made a {_name(found)}"
        )
    if not found.compiled:
        raise InvalidInput(
            f"the Keras model {found.name!r} is not compiled; call its compile() in the build function"
        )
    for method in ("train_step", "test_step"):
        if getattr(type(found), method) is not getattr(kind, method):
            raise InvalidInput(
                f"{_name(found)} has a {method} of its own, which would not be called; put it into "
                "compute_loss, or write step=(model, batch) -> loss in a recipe"
            )
    _require_optimizer(found.optimizer)
    return found  # type: ignore[no-any-return]


def step(model: Any, batch: Any) -> Any:
    """The compiled loss of a batch with the layers' own terms, and the compiled metrics."""
    x, y, weight = _taken_apart(batch)
    outputs = model(x)
    training = {"training": model.training} if _takes_training(model.compute_loss) else {}
    loss = model.compute_loss(x=x, y=y, y_pred=outputs, sample_weight=weight, **training)
    with torch.no_grad():
        values = _measured(model, x, y, _detached(outputs), weight)
    if not model.training:
        model.__dict__[_KEPT] = batch, _state(model, y, outputs, weight)
        return loss
    scalars = {
        name: value for name, value in values.items() if not torch.is_tensor(value) or value.numel() == 1
    }
    return (loss, {name: Measure(value, how="shard") for name, value in scalars.items()}) if scalars else loss


def groups_of(model: Any) -> Groups:
    """The trained parameters in the order of Keras' variables, with the model."""
    return Groups(model)


class Groups(list[Any]):
    """Parameters of a Keras model, with the model whose optimizer steps them."""

    def __init__(self, model: Any) -> None:
        super().__init__(variable.value for variable in model.trainable_variables)
        self.model = model


def optimizer_of(parameters: Any) -> KerasOptimizer:
    """The compiled optimizer, as at the start."""
    return KerasOptimizer(parameters, parameters.model)


class KerasOptimizer(torch.optim.Optimizer):
    """Steps a Keras model with the optimizer that it was compiled with.

    Args:
        parameters: those of the model's trained variables.
        model: the model.
    """

    def __init__(self, parameters: Sequence[Tensor], model: Any) -> None:
        self._variables = list(model.trainable_variables)
        self._keras = model.optimizer
        if not self._keras.built:
            self._keras.build(self._variables)
            self._keras.torchord_start = self._values()
        else:
            self._assign(self._keras.torchord_start)
        super().__init__(parameters, {"lr": float(self._keras.learning_rate)})
        self._rate = self.param_groups[0]["lr"]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Let Keras apply the gradients of those parameters that have one."""
        group = self.param_groups[0]
        if group["lr"] != self._rate:  # a scheduler of torch has set it
            self._keras.learning_rate = group["lr"]
        pairs = [(v.value.grad, v) for v in self._variables if v.value.grad is not None]
        self._keras.apply(*map(list, zip(*pairs, strict=True)))
        self._rate = group["lr"] = float(self._keras.learning_rate)

    def state_dict(self) -> dict[str, Any]:
        """The groups, and the values of the optimizer's variables in their order."""
        return {**super().state_dict(), "variables": self._values()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        rest = {name: value for name, value in state_dict.items() if name != "variables"}
        super().load_state_dict(rest)
        self._assign(state_dict["variables"])
        self._rate = self.param_groups[0]["lr"]

    def _values(self) -> list[Tensor]:
        return [variable.value.detach().clone() for variable in self._keras.variables]

    def _assign(self, values: Sequence[Tensor]) -> None:
        for variable, value in zip(self._keras.variables, values, strict=True):
            variable.assign(value)


def predict(model: Any, batch: Any) -> Any:
    """The model's outputs for a batch, of a pair for its inputs."""
    return model(_taken_apart(batch)[0])


def measured(model: Any, batch: Any) -> dict[str, Any]:
    """The state of the compiled metrics after one batch: what metrics get in place of predictions."""
    last, kept = model.__dict__.pop(_KEPT, (None, None))
    if kept is not None and last is batch:
        found: dict[str, Any] = kept
        return found
    x, y, weight = _taken_apart(batch)
    outputs = model(x)
    _measured(model, x, y, outputs, weight)
    return _state(model, y, outputs, weight)


predict.measured = measured  # type: ignore[attr-defined]


def state(outputs: dict[str, Any], targets: Any) -> dict[str, Any]:
    """The state of one batch, as `measured` returns it."""
    return outputs


def finish(states: Sequence[Mapping[str, Any]], *, build: Callable[..., Any]) -> dict[str, float]:
    """What the compiled metrics are of all batches.

    Args:
        states: of the batches, in order.
        build: makes the model, whose metrics the states are of.
    """
    model = build()
    batches = states if "variables" not in states[0] else states[:1]
    result: Mapping[str, Any] = {}
    model.reset_metrics()
    for each in batches:
        result = model.compute_metrics(None, each["y"], each["outputs"], each["weight"])
    if batches is not states:
        several = zip(*(each["variables"] for each in states), strict=True)
        for variable, values in zip(_variables(model), several, strict=True):
            variable.assign(torch.stack(values).sum(0))
        result = model.get_metrics_result()
    others = _trackers(model)
    return {name: number(f"metric {name!r}", value) for name, value in result.items() if name not in others}


# --- parts --------------------------------------------------------------------------------


def _taken_apart(batch: Any) -> tuple[Any, Any, Any]:
    """Inputs, targets and sample weights of a batch, None for what it lacks."""
    if not isinstance(batch, (list, tuple)):
        return batch, None, None
    if not 1 <= len(batch) <= 3:
        raise InvalidInput(
            f"a batch of {len(batch)} parts is none of Keras': (inputs, targets, sample weights)"
        )
    x, y, weight = [*batch, None, None][:3]
    return x, y, weight


def _takes_training(method: Callable[..., Any]) -> bool:
    return "training" in inspect.signature(method).parameters


def _measured(model: Any, x: Any, y: Any, outputs: Any, weight: Any) -> dict[str, Any]:
    """What the compiled metrics are of one batch alone, but for the loss."""
    model.reset_metrics()
    found = model.compute_metrics(x, y, outputs, weight)
    others = _trackers(model)
    return {name: value for name, value in found.items() if name not in others}


def _state(model: Any, y: Any, outputs: Any, weight: Any) -> dict[str, Any]:
    """What the metrics of many batches are made from: sums where Keras keeps such, else all there is.

    A metric of Keras' own is a function of sums over examples. Of others nothing is known.
    """
    if all(_keeps_sums(each) for each in model.metrics):
        kept = [variable.value.detach().clone() for variable in _variables(model)]
        return {"variables": kept, **_rows(y, outputs, weight, 1)}
    return _rows(y, outputs, weight, None)


def _rows(y: Any, outputs: Any, weight: Any, first: int | None) -> dict[str, Any]:
    return {name: _cut(value, first) for name, value in (("y", y), ("outputs", outputs), ("weight", weight))}


def _cut(value: Any, first: int | None) -> Any:
    if torch.is_tensor(value):
        return value[:first].detach()
    if isinstance(value, Mapping):
        return {name: _cut(each, first) for name, each in value.items()}
    return type(value)(_cut(each, first) for each in value) if isinstance(value, (list, tuple)) else value


def _detached(value: Any) -> Any:
    return _cut(value, None)


def _variables(model: Any) -> list[Any]:
    others = _trackers(model)
    return [
        variable for metric in model.metrics if metric.name not in others for variable in metric.variables
    ]


def _trackers(model: Any) -> set[str]:
    """Names of the means of losses that Keras keeps beside the metrics: of the whole, and of each output."""
    outputs = getattr(model, "_compile_loss", None)
    return {"loss", *(metric.name for metric in (outputs.metrics if outputs is not None else ()))}


def _keeps_sums(metric: Any) -> bool:
    inner = getattr(metric, "metrics", None) or [metric]
    return all(type(each).__module__.startswith("keras.") for each in inner)


def _require_backend(error: type[Exception]) -> None:
    config = sys.modules.get("keras.src.backend.config")
    if config is not None and config.backend() != "torch":
        raise error(
            f"Keras computes with {config.backend()} in this process; set KERAS_BACKEND=torch in the "
            "environment, or in your module before it imports keras"
        )


def _require_optimizer(optimizer: Any) -> None:
    name = _name(optimizer)
    if hasattr(optimizer, "inner_optimizer"):
        raise InvalidInput(
            f"{name} scales losses for float16, which a run does itself; compile with the optimizer inside "
            "of it and auto_scale_loss=False, and set precision='fp16' in the config"
        )
    if getattr(optimizer, "use_ema", False):
        raise InvalidInput(
            f"{name}(use_ema=True) overwrites weights at times of its own; give average= in its place"
        )


def _base(kind: type) -> type | None:
    """Keras' own class among the bases of one: the first in its modules."""
    names = ("keras.src.models.model", "keras.src.models.sequential", "keras.src.models.functional")
    several = [each for each in kind.__mro__ if each.__module__ in names]
    return several[0] if several else None


def _name(value: Any) -> str:
    return type(value).__name__
