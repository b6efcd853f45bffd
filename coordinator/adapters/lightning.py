"""`lightning`: the recipe of a LightningModule, from its `training_step` and `configure_optimizers`.

Nothing of Lightning is imported here: the module's own class brings it. What a module does beside its steps,
in hooks that Lightning's Trainer calls between them, has no place in a shard, which is a function of (run,
version, shard): such a hook is refused by its name, or left out by `ignore=`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torchord.cache.errors import InvalidInput, RecipeError, TorchordError
from torchord.coordinator.adapters.lightning_trainer import UNKNOWN, TrainerFacts
from torchord.coordinator.adapters.logged import Log, finish, state
from torchord.coordinator.compute.determinism import generators, set_generators
from torchord.coordinator.compute.schedules import EachEpoch
from torchord.coordinator.spec.recipe import Recipe
from torchord.coordinator.spec.targets import Entry, Target

_LAST = "torchord_validated"  # the batch that was validated last, and what was logged
_HOOKS = {
    **dict.fromkeys(("backward", "on_before_backward"), "return the whole loss from training_step"),
    **dict.fromkeys(
        ("on_after_backward", "on_before_optimizer_step", "configure_gradient_clipping"),
        "give gradients=(gradients, parameters) -> None, or set clip_norm in the config",
    ),
    **dict.fromkeys(
        ("optimizer_step", "optimizer_zero_grad", "on_before_zero_grad", "lr_scheduler_step"),
        "put it into an Optimizer or a scheduler of your own",
    ),
    **dict.fromkeys(
        ("on_train_batch_start", "on_train_batch_end", "on_train_epoch_start", "on_train_epoch_end"),
        "put it into training_step",
    ),
    **dict.fromkeys(("on_fit_start", "on_train_start", "configure_sharded_model"), "put it into __init__"),
    **dict.fromkeys(("on_fit_end", "on_train_end"), "do it with the model that run.wait() returns"),
    **dict.fromkeys(
        (
            *("on_validation_start", "on_validation_end", "on_validation_epoch_start"),
            *("on_validation_epoch_end", "on_validation_batch_start", "on_validation_batch_end"),
        ),
        "log it in validation_step, as a number or as an object of torchmetrics",
    ),
    "configure_callbacks": "use what a run has in their place (docs/models.md)",
    "transfer_batch_to_device": "give collate=",
}
"""Hook that a module may override -> what to do in its place; with a mere loop of steps around, none is
called."""


def lightning(
    module: Entry,
    dataset: Entry,
    *,
    evaluation: Entry | None = None,
    ignore: Sequence[str] = (),
    trainer: Mapping[str, Any] | None = None,
    check: bool = True,
    **entries: Any,
) -> Recipe:
    """Make the recipe of a LightningModule.

    The loss is what `training_step` returns; optimizer and scheduler are `configure_optimizers`'. An
    evaluation measures what `validation_step` logs and, as "loss", what it returns (without one, or where it
    returns nothing, the loss of `training_step` in evaluation mode). Predictions are `predict_step`'s, or the
    module's outputs for the first of a pair.

    Args:
        module: the class, or a `partial` of it with its arguments; importable like any entry of a recipe.
        dataset: () -> map-style dataset, whose batches `training_step` gets. Batch size, order and number of
            epochs are the run's (`TrainingConfig`), so that a module's own dataloaders are not asked.
        evaluation: () -> map-style dataset for `validation_step`.
        ignore: names of hooks that the module has and that are to be left out.
        trainer: what the module may read of `self.trainer`, such as {"estimated_stepping_batches": 500}.
        check: whether the module is made here, on torch's meta device, to be refused before it is submitted.
        entries: of `Recipe`, in place of the module's or beside them, such as `collate`, `scheduler` or
            `average`.

    Raises:
        InvalidInput: the module does what a run cannot do (manual optimization, several optimizers, hooks
            that change a step, ...); the message names it and the way out.
        RecipeError: an entry cannot be one of a recipe.

    Example:
        >>> recipe = lightning(partial(Net, hidden=64), load_digits)  # doctest: +SKIP
    """
    given: Any = Target(module) if isinstance(module, str) else module
    facts = dict(trainer or {})
    if unknown := set(ignore) - _HOOKS.keys():
        raise RecipeError(f"ignore names {min(unknown)!r}, which is no hook that is refused")
    if not isinstance(given, Target):
        _refuse_class(given, ignore)
        if check:
            _try(given, ignore, facts, entries)
    measured: dict[str, Any] = {}
    if evaluation is not None:
        measured = {"evaluation": evaluation, "metrics": {"": (state, partial(finish, make=given))}}
    ours: dict[str, Any] = {
        "model": partial(made, given, ignore=list(ignore), trainer=facts),
        "dataset": dataset,
        "step": step,
        "parameter_groups": partial(configured, scheduled="scheduler" not in entries),
        "optimizer": optimizer_of,
        "scheduler": scheduler_of,
        "predict": predict,
        **measured,
    }
    if "optimizer" in entries:
        ours |= {"parameter_groups": None, "scheduler": None}
    return Recipe(**{**ours, **entries})


# --- entries of the recipe ----------------------------------------------------------------


def made(
    module: Callable[..., Any], *, ignore: Sequence[str] = (), trainer: Mapping[str, Any] | None = None
) -> nn.Module:
    """Make the module as Lightning's Trainer has it when it begins.

    Raises:
        InvalidInput: as `lightning`.
    """
    found = module()
    base = _base(type(found))
    if base is None or not isinstance(found, nn.Module):
        raise InvalidInput(
            f"torchord.lightning needs a LightningModule; {_shown(module)} makes a {_shown(found)}"
        )
    _refuse_class(type(found), ignore)
    if not getattr(found, "automatic_optimization", True):
        raise InvalidInput(
            f"{_shown(found)} steps its optimizers by hand (automatic_optimization=False), which a shard "
            "cannot: return one loss from training_step, of a GAN the sum of both, each part reaching its "
            "own network alone (docs/recipes.md)"
        )
    facts = TrainerFacts(_shown(found), dict(trainer or {}))
    found.__dict__["torchord_facts"] = facts
    with attached(found, "setup"):
        for name, arguments in (("setup", ("fit",)), ("configure_model", ())):
            if _overrides(type(found), name):
                getattr(found, name)(*arguments)
    return found


def step(model: Any, batch: Any) -> Any:
    """Loss of a batch and what is logged: `training_step`'s, in evaluation mode `validation_step`'s.

    Where that is missing or returns no loss, an evaluation has the one of `training_step`.
    """
    model.__dict__.pop(_LAST, None)
    validated: Log | None = None
    if not model.training and _overrides(type(model), "validation_step"):
        returned, validated = _called(model, "validation_step", batch)
        model.__dict__[_LAST] = batch, validated
        if (loss := _loss_in(returned)) is not None:
            return _with(loss, validated.beside(loss, training=False))
    returned, log = _called(model, "training_step", batch)
    loss = _loss_in(returned)
    if loss is None:
        shown = (
            "nothing, as for a batch to be skipped" if returned is None else f"a {type(returned).__name__}"
        )
        raise InvalidInput(
            f"training_step of {_shown(model)} returned {shown}, but must return the loss, or a dict with it "
            "under 'loss'"
        )
    if validated is not None:
        return _with(loss, validated.beside(loss, training=False))
    return _with(loss, log.beside(loss, training=True) if model.training else {})


def configured(model: Any, *, scheduled: bool = True) -> Configured:
    """What `configure_optimizers` returns, as the groups of the one optimizer.

    Args:
        model: the module.
        scheduled: whether its scheduler is wanted, and the recipe has no other.

    Raises:
        InvalidInput: it has no optimizer or several, or a scheduler that cannot step as Lightning's would.
    """
    with attached(model, "configure_optimizers"):
        returned = model.configure_optimizers()
    return Configured(*_taken_apart(_shown(model), returned, scheduled))


class Configured(list[Any]):
    """Parameter groups, with the optimizer that has them already and its scheduler."""

    def __init__(self, optimizer: Any, scheduler: Any) -> None:
        super().__init__(optimizer.param_groups)
        self.optimizer = optimizer
        optimizer.torchord_scheduler = scheduler


def optimizer_of(groups: Any) -> Any:
    """The optimizer of `configured`."""
    return groups.optimizer


def scheduler_of(optimizer: Any) -> Any:
    """The scheduler of `configured`; None if the module has none."""
    return optimizer.torchord_scheduler


def predict(model: Any, batch: Any) -> Any:
    """What `predict_step` returns; without one the outputs for a batch, or for the first of a pair."""
    if _overrides(type(model), "predict_step"):
        return _called(model, "predict_step", batch)[0]
    pair = isinstance(batch, (list, tuple)) and len(batch) == 2
    with attached(model, "forward"):
        return model(batch[0] if pair else batch)


def measured(model: Any, batch: Any) -> dict[str, Any]:
    """What `validation_step` logs beside plain numbers: what metrics get in place of predictions."""
    if not _overrides(type(model), "validation_step"):
        return {}
    last, log = model.__dict__.pop(_LAST, (None, None))
    if log is None or last is not batch:
        log = _called(model, "validation_step", batch)[1]
    states: dict[str, Any] = log.states()
    return states


predict.measured = measured  # type: ignore[attr-defined]


# --- parts --------------------------------------------------------------------------------


@contextmanager
def attached(model: Any, doing: str) -> Iterator[Log]:
    """The module with a trainer that has only what a shard knows, and a log that is kept.

    Args:
        model: the module, left as it was.
        doing: the method that is called, for messages.
    """
    log = Log(model)
    facts = model.__dict__.get("torchord_facts") or TrainerFacts(_shown(model), {})
    put = {"log": log.log, "log_dict": log.log_dict, "_trainer": facts.within(doing, training=model.training)}
    those = [each for each in model.modules() if _base(type(each)) is not None]
    before = [{name: each.__dict__[name] for name in put if name in each.__dict__} for each in those]
    for each in those:
        each.__dict__.update(put)
    try:
        yield log
    finally:
        for each, had in zip(those, before, strict=True):
            for name in put:
                each.__dict__.pop(name, None)
            each.__dict__.update(had)


def _called(model: Any, name: str, batch: Any) -> tuple[Any, Log]:
    """What a step of the module returns and logs; a number of the batch that it asks for is not known."""
    with attached(model, name) as log:
        for hook in ("on_before_batch_transfer", "on_after_batch_transfer"):
            if _overrides(type(model), hook):
                batch = getattr(model, hook)(batch, 0)
        log.begin(batch)
        method = getattr(model, name)
        return (method(batch, UNKNOWN) if _numbered(method) else method(batch)), log


def _numbered(method: Callable[..., Any]) -> bool:
    """Whether a step takes the batch's number, by whatever name: its second argument."""
    kinds = [parameter.kind for parameter in inspect.signature(method).parameters.values()]
    several = inspect.Parameter.VAR_POSITIONAL in kinds
    return several or kinds.count(inspect.Parameter.POSITIONAL_OR_KEYWORD) > 1


def _with(loss: Tensor, beside: Mapping[str, Any]) -> Any:
    return (loss, beside) if beside else loss


def _loss_in(returned: Any) -> Tensor | None:
    found = returned.get("loss") if isinstance(returned, Mapping) else returned
    return found if isinstance(found, Tensor) else None


def _taken_apart(shown: str, returned: Any, scheduled: bool) -> tuple[Any, Any]:
    """Optimizer and scheduler in what `configure_optimizers` returned, in any of Lightning's forms."""
    optimizers: list[Any] = [returned]
    schedulers: list[Any] = []
    watched = None
    if isinstance(returned, (list, tuple)):
        two = len(returned) == 2 and isinstance(returned[0], (list, tuple))
        optimizers, schedulers = map(_several, returned) if two else ([*returned], [])
    if len(optimizers) == 1 and isinstance(optimizers[0], Mapping):
        only = optimizers[0]
        optimizers, schedulers = [only.get("optimizer")], _several(only.get("lr_scheduler"))
        watched = only.get("monitor")
    if len(optimizers) != 1:
        raise InvalidInput(
            f"configure_optimizers of {shown} returns {len(optimizers)} optimizers, but a step has one; "
            "give one with a group for each network, or an Optimizer of yours that steps them all"
        )
    if not isinstance(optimizers[0], torch.optim.Optimizer):
        raise InvalidInput(
            f"configure_optimizers of {shown} returns a {type(optimizers[0]).__name__}, and no "
            "torch.optim.Optimizer"
        )
    if not scheduled or not schedulers:
        return optimizers[0], None
    if len(schedulers) > 1:
        raise InvalidInput(
            f"configure_optimizers of {shown} returns {len(schedulers)} schedulers; give one, such as a "
            "ChainedScheduler or a SequentialLR of them"
        )
    return optimizers[0], _scheduler(shown, schedulers[0], watched)


def _several(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def _scheduler(shown: str, given: Any, watched: Any) -> Any:
    options = dict(given) if isinstance(given, Mapping) else {"scheduler": given}
    found: Any = options.get("scheduler")
    interval = options.get("interval", "epoch")
    frequency = options.get("frequency", 1)
    if isinstance(found, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise InvalidInput(
            f"the ReduceLROnPlateau of {shown} watches {options.get('monitor', watched)!r}, but a run's "
            "scheduler is given the step's training loss alone; return another scheduler, or give "
            "scheduler= to torchord.lightning, which then watches that loss"
        )
    if interval == "epoch":
        return EachEpoch(found, frequency)
    if interval != "step" or frequency != 1:
        raise InvalidInput(
            f"the scheduler of {shown} has the interval {interval!r} and the frequency {frequency!r}; a run "
            "steps one each 'step', or at the end of every so many epochs"
        )
    return found


def _try(
    module: Callable[..., Any], ignore: Sequence[str], facts: Mapping[str, Any], entries: Mapping[str, Any]
) -> None:
    """Refuse here what only the made module shows. What else it raises without real tensors says nothing."""
    before = generators()
    try:
        with suppress(Exception):
            with torch.device("meta"):
                try:
                    tried = made(module, ignore=ignore, trainer=facts)
                    if "optimizer" not in entries:
                        configured(tried, scheduled="scheduler" not in entries)
                except TorchordError as error:
                    refused: TorchordError | None = error
                else:
                    refused = None
            if refused is not None:
                raise _Refused(refused)
    except _Refused as told:
        raise told.error from None
    finally:
        set_generators(before)


class _Refused(BaseException):
    """Carries a refusal past whatever else is let pass."""

    def __init__(self, error: TorchordError) -> None:
        super().__init__()
        self.error = error


def _refuse_class(module: Any, ignore: Iterable[str]) -> None:
    """Refuse what a class shows before it is called; of anything else nothing is known."""
    kind = module.func if isinstance(module, partial) else module
    if not isinstance(kind, type):
        return
    if _base(kind) is None:
        raise InvalidInput(f"torchord.lightning needs a LightningModule, and {kind.__name__} is none")
    for name, instead in _HOOKS.items():
        if name not in ignore and _overrides(kind, name):
            raise InvalidInput(
                f"{kind.__name__}.{name} would not be called between the steps of a run: {instead}, or "
                f"leave it out by ignore=[{name!r}]"
            )
    for name in ("training_step", "configure_optimizers"):
        if not _overrides(kind, name):
            raise InvalidInput(f"{kind.__name__} has no {name}, of which its recipe is made")
    steps = [name for name in ("training_step", "validation_step") if _overrides(kind, name)]
    for name in steps:
        for asked in ("dataloader_iter", "optimizer_idx"):
            if asked in inspect.signature(getattr(kind, name)).parameters:
                raise InvalidInput(
                    f"{kind.__name__}.{name} takes {asked}, which a shard has not; take the batch"
                )


def _base(kind: type) -> type | None:
    """Lightning's own class among the bases of one, from whichever of its two packages."""
    for each in kind.__mro__:
        home = each.__module__.partition(".")[0]
        if each.__name__ == "LightningModule" and home in ("lightning", "pytorch_lightning"):
            return each
    return None


def _overrides(kind: type, name: str) -> bool:
    return getattr(kind, name, None) is not getattr(_base(kind), name, None)


def _shown(value: Any) -> str:
    inner = value.func if isinstance(value, partial) else value
    return str(getattr(inner, "__name__", type(inner).__name__))
