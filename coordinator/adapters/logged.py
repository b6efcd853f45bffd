"""What a LightningModule logs in a step: kept for the time of the call, and put together over many
batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchord.cache.errors import InvalidInput
from torchord.coordinator.compute.metrics import merged, number, state_of
from torchord.coordinator.compute.step_metrics import Measure

_EXTREMES: dict[str, Callable[[Iterable[float]], float]] = {"min": min, "max": max}


class Log:
    """Takes the place of `LightningModule.log` in one call of a step.

    Args:
        model: the module that logs.
    """

    def __init__(self, model: nn.Module) -> None:
        self._metrics: dict[str, Any] = {
            name: each for name, each in model.named_modules() if hasattr(each, "metric_state")
        }
        self._names = {id(each): name for name, each in self._metrics.items()}
        self._values: dict[str, Any] = {}
        self._examples = 1

    def begin(self, batch: Any) -> None:
        """Forget what the module's own metrics have seen, and count the batch's examples."""
        for each in self._metrics.values():
            each.reset()
        self._examples = _examples(batch)

    def log(
        self,
        name: str,
        value: Any,
        prog_bar: bool = False,
        logger: Any = None,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: Any = "mean",
        *args: Any,
        batch_size: int | None = None,
        **options: Any,
    ) -> None:
        """Keep a value, with what it weighs among those of other batches; signature as Lightning's.

        Raises:
            InvalidInput: it is to be reduced by a function.
        """
        if id(value) in self._names:
            self._values[name] = {"metric": self._names[id(value)], **state_of(value)}
            return
        how = reduce_fx if isinstance(reduce_fx, str) else getattr(reduce_fx, "__name__", "a function")
        if how not in ("mean", "sum", *_EXTREMES):
            raise InvalidInput(
                f"{name!r} is logged with reduce_fx={how}, which no worker can apply to the others' values; "
                "log it as a mean, min, max or sum"
            )
        weight = self._examples if batch_size is None else int(batch_size)
        kept = value.detach() if isinstance(value, Tensor) else value
        self._values[name] = {"value": kept, "weight": weight, "how": how}

    def log_dict(self, dictionary: Mapping[str, Any], *args: Any, **options: Any) -> None:
        """Keep several values."""
        for name, value in dictionary.items():
            self.log(name, value, *args, **options)

    def beside(self, loss: Any, *, training: bool) -> dict[str, Any]:
        """The numbers that were logged, as a step's metrics: means over examples, or what they say.

        Args:
            loss: what the step returned as its loss: logged itself, it weighs what the loss does.
            training: whether extremes and objects of torchmetrics are wanted, too, as the shards' own.
        """
        found: dict[str, Any] = {}
        for name, each in self._values.items():
            if "metric" in each or each["how"] in _EXTREMES:
                value = (
                    self._metrics[each["metric"]].compute()
                    if training and "metric" in each
                    else each.get("value")
                )
                if training and torch.is_tensor(value) and value.numel() == 1:
                    found[name] = Measure(value, how="shard")
            elif each["how"] == "sum":
                found[name] = Measure(each["value"], how="sum")
            elif _same(each["value"], loss):
                found[name] = Measure(each["value"], how="shard")
            else:
                found[name] = Measure(each["value"] * each["weight"], each["weight"], how="shard")
        return found

    def states(self) -> dict[str, Any]:
        """The rest of what was logged, as a metric's state: objects of torchmetrics, and extremes.

        Raises:
            InvalidInput: a value is no number.
        """
        return {
            name: each
            if "metric" in each
            else {**each, "value": number(f"self.log({name!r})", each["value"])}
            for name, each in self._values.items()
            if "metric" in each or each["how"] in _EXTREMES
        }


def state(outputs: Mapping[str, Any], targets: Any) -> Mapping[str, Any]:
    """The state of one batch: what was logged of it."""
    return outputs


def finish(states: Sequence[Mapping[str, Any]], *, make: Callable[[], nn.Module]) -> dict[str, float]:
    """What the rest of all batches' logs comes to, by name.

    Args:
        states: of the batches, in order.
        make: makes the module, whose metrics the states are of.
    """
    found: dict[str, float] = {}
    module: nn.Module | None = None
    for name in dict.fromkeys(name for each in states for name in each):
        several = [each[name] for each in states if name in each]
        if "metric" in several[0]:
            module = make() if module is None else module
            prototype: Any = module.get_submodule(several[0]["metric"])
            value = merged(name, prototype.clone, several).compute()
            many = value if isinstance(value, Mapping) else {name: value}
            found |= {str(key): number(f"metric {key!r}", each) for key, each in many.items()}
        else:
            found[name] = _EXTREMES[several[0]["how"]](each["value"] for each in several)
    return found


def _same(value: Any, loss: Tensor) -> bool:
    """Whether a value is the loss, or what `detach` makes of it: one in memory."""
    return isinstance(value, Tensor) and value.numel() == 1 and value.data_ptr() == loss.data_ptr() != 0


def _examples(batch: Any) -> int:
    """The examples of a batch, by the first dimension of the first tensor in it; 1 where there is none."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.dim() else 1
    items = (
        batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else ()
    )
    for each in items:
        if torch.is_tensor(each) or isinstance(each, (Mapping, list, tuple)):
            return _examples(each)
    return 1
