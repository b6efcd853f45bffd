"""`Recipe`: what is trained, as names that every worker can import.

A recipe holds callables; what travels is its spec, plain JSON that says for each entry which
module and attribute to import and which arguments to bind. Nothing is pickled. A worker
resolves a spec only within its allow-list (`torchord.coordinator.spec.admission`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from torchord.cache.errors import RecipeError, TorchordError
from torchord.cache.reading import FOREIGN
from torchord.coordinator.spec.admission import (
    present_name,
)
from torchord.coordinator.spec.buffer_entries import check_buffers, decoded, functions_of, words_of
from torchord.coordinator.spec.config import TrainingConfig
from torchord.coordinator.spec.offered import OFFERED, offered
from torchord.coordinator.spec.stopping import require_decidable
from torchord.coordinator.spec.targets import Entry, Target, check_kind, decode, encode

_REQUIRED = ("model", "dataset", "optimizer")
_HALVES = ("state", "finish")  # of a metric that is a pair
_LOSS_OVER = ("batch", "sum", "shard")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is trained. Each entry is an importable callable, a `functools.partial` of one with
    arguments bound, or the string "package.module:attribute".

    Attributes:
        model: () -> torch.nn.Module.
        dataset: () -> map-style dataset (`__len__` and `__getitem__`, optionally `__getitems__`).
        optimizer: (parameters, or the groups of `parameter_groups`) -> torch.optim.Optimizer.
        loss: (outputs, targets) -> mean loss over the shard, a scalar tensor, or (sum, weight): a sum and
            what it is to be divided by; the batch must then be a pair (inputs, targets) and the model is
            called as model(inputs).
        step: (model, batch) -> the same, for any other model; give exactly one of `loss` and `step`. Both may
            return (that, {name: metric}): what the step measures besides, see
            `torchord.coordinator.compute.step_metrics`.
        weight: (targets), or with `step` (batch), on the model's device -> what the mean loss of these is a
            mean over (labelled tokens, say), a finite number of at least 0. None: torch's own losses say it
            themselves, and any other loss is a mean over the examples. A shard of weight 0 contributes
            nothing.
        loss_over: "batch": the loss of the global batch is wanted, which the shards' losses, by their
            weights, have as their mean; the run's first batch is tried for that (`TrainingConfig.probe`).
            "sum": the loss is a sum over its examples, and so is the step's. "shard": the loss of each shard
            by itself is meant, whatever the whole batch's would be, as that of a contrastive loss in a shard.
        scheduler: (optimizer) -> torch learning-rate scheduler, stepped once a global step.
        evaluation: () -> map-style dataset for evaluations, made by the same seed as `dataset`, so that a
            random split in both is one split.
        metrics: name -> what is measured in evaluations. A function (outputs, targets) -> mean over the
            examples, a number or scalar tensor; a pair (state, finish), of state(outputs, targets) for each
            micro-batch and finish(list of all states, in order) -> number, for what is no mean; or a class,
            or a `partial` of one, whose objects have update(outputs, targets), compute() and merge_state(),
            such as those of torchmetrics. With `step`, it takes `predict`. See
            `torchord.coordinator.compute.metrics`.
        collate: (list of samples) -> batch; None: torch's default collate.
        order: given what it names of size, epoch, seed and dataset -> the indices that an epoch visits, in
            order, or a torch Sampler that gives them. They may repeat and leave out; each epoch has as many.
            None: what `TrainingConfig.shuffle` says. See `torchord.coordinator.orders`.
        batches: the same, with batch_size besides -> the lists of indices that an epoch's global batches
            are, or a torch BatchSampler; at most one of `order` and `batches`.
        parameter_groups: (model) -> parameter groups for the optimizer; None:
            model.parameters().
        outer_optimizer: (parameters) -> torch.optim.Optimizer that the training server applies to the
            averaged pseudo-gradients when the config asks for local steps; `optimizer` and
            `scheduler` are then the shards' own. None: the mean of the shards' weights (Local SGD);
            `torchord.coordinator.local_steps:diloco` is DiLoCo's.
        predict: (model, batch) -> outputs, in evaluation mode: what metrics measure in place of
            model(inputs), and what `Run.predict` returns. The targets of a batch that is a pair are its
            second; of any other, metrics get the batch itself.
        gradients: (name -> gradient, name -> parameter) -> None or a dict of gradients: changes a step's
            gradient, in place or by returning another, before `clip_norm` and the optimizer. In a plain
            step that is the averaged gradient; with local steps each shard's, in each of its steps.
        average: () -> what averages the weights: `torchord.coordinator.averages.ema` and `swa`, or what
            `torch.optim.swa_utils.get_ema_multi_avg_fn(decay)` returns. Evaluations, predictions and the
            run's model then use the averaged weights.
        buffers: name or pattern (`fnmatch`) of a buffer, or of a frozen parameter that the forward writes ->
            its new value in a step: "shard0", the first shard's; "mean", weighted by examples; "sum", the old
            one and what all shards added; or a function (old, [value of each shard], [its examples]) -> new.
            Running statistics, and what each shard leaves alike, need none; see docs/recipes.md.

    Arguments arrive at the workers as what they are (numbers of Python and numpy, NaN included, strings,
    bytes, lists, tuples, dicts, paths, dtypes, devices, members of enumerations, importable callables
    and partials of them), or are refused.

    Raises:
        RecipeError: an entry is missing, superfluous or not callable. Whether the workers can
            import it is checked by `to_spec`, which `Master.submit` calls.

    Example:
        >>> from functools import partial
        >>> recipe = Recipe(model=partial("my_models:Net"), ...)  # doctest: +SKIP
    """

    model: Entry
    dataset: Entry
    optimizer: Entry
    loss: Entry | None = None
    step: Entry | None = None
    scheduler: Entry | None = None
    evaluation: Entry | None = None
    metrics: Mapping[str, Entry | tuple[Entry, Entry]] | None = None
    collate: Entry | None = None
    parameter_groups: Entry | None = None
    outer_optimizer: Entry | None = None
    predict: Entry | None = None
    gradients: Entry | None = None
    average: Entry | None = None
    order: Entry | None = None
    batches: Entry | None = None
    buffers: Mapping[str, Entry] | None = None
    weight: Entry | None = None
    loss_over: str = "batch"

    def __post_init__(self) -> None:
        if (self.loss is None) == (self.step is None):
            given = "neither was" if self.loss is None else "both were"
            raise RecipeError(
                "a recipe needs exactly one of loss=(outputs, targets) -> scalar and step=(model, batch) -> "
                f"scalar; {given} given"
            )
        if self.metrics and self.step is not None and self.predict is None:
            raise RecipeError(
                "metrics need outputs to measure, and a step returns none; have it return (loss, {name: "
                "metric}), give predict=(model, batch) -> outputs beside it, or model and loss separately"
            )
        if self.loss_over not in _LOSS_OVER:
            shown = ", ".join(map(repr, _LOSS_OVER))
            raise RecipeError(f"loss_over must be one of {shown}, not {self.loss_over!r}")
        if self.weight is not None and self.loss_over == "sum":
            raise RecipeError("a loss that is a sum (loss_over='sum') has no weight; leave weight= out")
        if self.metrics is not None and not isinstance(self.metrics, Mapping):
            raise RecipeError("metrics must be a dict of name -> callable")
        for name, entry in (self.metrics or {}).items():
            if isinstance(entry, (tuple, list)) and len(entry) != 2:
                raise RecipeError(
                    f"metric {name!r} has {len(entry)} parts; a pair is (state, finish): "
                    "state(outputs, targets) of each batch, and finish([all states]) -> number"
                )
        if self.order is not None and self.batches is not None:
            raise RecipeError("a recipe has at most one of order and batches: batches has the order in it")
        check_buffers(self.buffers)
        for name, entry in entries_of(self).items():
            check_kind(name, entry)
            if name in OFFERED and callable(entry):
                offered(name, entry)

    def require_order_of(self, config: TrainingConfig) -> None:
        """Refuse a config that says another order than `order` or `batches`.

        Raises:
            RecipeError: the message names entry and field.
        """
        for name, field in (("order", "shuffle"), ("batches", "shuffle"), ("batches", "drop_last")):
            if getattr(self, name) is not None and getattr(config, field) != getattr(TrainingConfig(), field):
                raise RecipeError(
                    f"recipe entry {name!r} says itself what an epoch visits; leave {field} out of the config"
                )

    def to_spec(self) -> dict[str, Any]:
        """Return the recipe as plain JSON, after checking that each entry can be imported by name.

        Returns:
            entry name -> {"target": "package.module:attribute", "args": [...], "kwargs": {...}}, with
            "kinds" where arguments are more than JSON; entries that were not given are left out,
            "metrics" maps names to such entries, or to the two of a pair, "buffers" to such entries or words,
            and "loss_over" is the word.

        Raises:
            RecipeError: a worker could not import a callable (a lambda, a local function or
                class, something of the script that is being run, a method of an object), or an
                argument cannot arrive as what it is.
        """
        encoded: dict[str, Any] = {}
        for name, entry in entries_of(self).items():
            target = encode(name, entry)
            if name == "loss":
                _check_reduction(target, self.weight is not None)
            encoded[name] = replace(target, target=present_name(target.target)).to_json()
        metrics = {}
        for name, metric in (self.metrics or {}).items():
            halves = [encoded.pop(half) for half in metric_entries(name, metric)]
            metrics[name] = halves if len(halves) > 1 else halves[0]
        functions = {name: encoded.pop(f"buffers.{name}") for name in functions_of(self.buffers)}
        buffers = {**words_of(self.buffers), **functions}
        measured = {"metrics": metrics} if metrics else {}
        return {**encoded, **measured, "buffers": buffers, "loss_over": self.loss_over}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> Recipe:
        """Rebuild a recipe from `to_spec` without importing anything.

        A spec of before there was `loss_over` means "shard": each shard weighs its examples, and nothing is
        tried.

        Raises:
            RecipeError: the spec has an unknown or malformed entry.
        """
        try:
            return cls._of_spec(spec)
        except TorchordError:
            raise
        except FOREIGN as error:
            raise RecipeError(
                f"this is no spec of a recipe ({type(error).__name__}: {error!s:.100})"
            ) from error

    @classmethod
    def _of_spec(cls, spec: Mapping[str, Any]) -> Recipe:
        entries: dict[str, Any] = {"loss_over": "shard"}
        for name, value in spec.items():
            if name == "loss_over":
                entries[name] = value
                continue
            if name not in {field.name for field in fields(cls)}:
                raise RecipeError(f"a recipe has no entry {name!r}")
            if name == "metrics" and isinstance(value, Mapping):
                entries[name] = {metric: _decoded(f"metrics.{metric}", v) for metric, v in value.items()}
            elif name == "buffers" and isinstance(value, Mapping):
                entries[name] = decoded(value)
            else:
                entries[name] = decode(name, value)
        return cls(**entries)


def modules_of(spec: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the modules that a spec names, sorted, each once."""
    return tuple(sorted({target.partition(":")[0] for target in targets_of(Recipe.from_spec(spec))}))


def entries_of(recipe: Recipe) -> dict[str, Entry]:
    """Return the entries that were given by name, those of dicts as "metrics.<name>" and "buffers.<name>"."""
    found: dict[str, Entry] = {}
    for field in fields(recipe):
        value = getattr(recipe, field.name)
        if field.name == "metrics":
            for name, entry in (value or {}).items():
                found |= metric_entries(name, entry)
        elif field.name == "buffers":
            found |= {f"buffers.{name}": entry for name, entry in functions_of(value).items()}
        elif field.name != "loss_over" and (value is not None or field.name in _REQUIRED):
            found[field.name] = value
    return found


def metric_entries(name: str, entry: Any) -> dict[str, Entry]:
    """Return what a metric is made of by name: the function or class, or the two of a pair."""
    if isinstance(entry, (tuple, list)):
        return {f"metrics.{name} ({half})": each for half, each in zip(_HALVES, entry, strict=True)}
    return {f"metrics.{name}": entry}


def _decoded(name: str, value: Any) -> Entry | tuple[Entry, Entry]:
    if isinstance(value, list):
        if len(value) != 2:
            raise RecipeError(f"recipe entry {name!r} is malformed: {value!r}")
        return decode(name, value[0]), decode(name, value[1])
    return decode(name, value)


def targets_of(recipe: Recipe) -> set[str]:
    """Return all that a recipe made from a spec has its workers import."""
    entries = (entry for entry in entries_of(recipe).values() if isinstance(entry, Target))
    return set().union(*(entry.targets() for entry in entries))


def require_measured(recipe: Recipe, spec: Mapping[str, Any], config: TrainingConfig) -> None:
    """Refuse a config whose rules read what the recipe does not measure, as far as the recipe says that.

    Args:
        spec: of the recipe.

    Raises:
        RecipeError: as `stopping.require_decidable`.
    """
    require_decidable(
        config.rules,
        config.keep_rule,
        every=config.evaluate_every,
        evaluation=recipe.evaluation is not None,
        metrics=recipe.metrics or (),
        others=measures_more(spec),
    )


def measures_more(spec: Mapping[str, Any]) -> bool:
    """Whether a recipe may measure more than its loss and the names of its metrics, as far as that is said.

    Args:
        spec: from `Recipe.to_spec`.
    """
    loss = spec.get("loss")
    own = loss is not None and str(loss["target"]).startswith("torch.")
    return not own or "" in (spec.get("metrics") or {})


def _check_reduction(loss: Target, weighed: bool) -> None:
    """Refuse one of torch's losses that gives no mean where a mean is needed."""
    reduction = (loss.kwargs or {}).get("reduction")
    if not loss.target.startswith("torch.nn.functional:"):
        return
    if reduction == "none":
        raise RecipeError(
            f"recipe entry 'loss' is {loss.target} with reduction='none', which gives no scalar; leave "
            "reduction= out"
        )
    if reduction == "sum" and weighed:
        raise RecipeError(
            f"recipe entry 'loss' is {loss.target} with reduction='sum', which has no weight; leave one of "
            "reduction= and weight= out"
        )
