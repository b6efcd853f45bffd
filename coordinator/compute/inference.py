"""Evaluation and prediction of one version: figures and outputs that no shard's place shows in."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch

from torchord.coordinator.compute import metrics, step_metrics
from torchord.coordinator.compute.batch import Batch, IndexArray, during, filtered_batch, pair, to_device
from torchord.coordinator.compute.determinism import pinned, seed_everything
from torchord.coordinator.compute.gradient import autocast
from torchord.coordinator.compute.metrics import Sample, Tally
from torchord.coordinator.compute.outputs import collated, plain
from torchord.coordinator.compute.replica import Replica
from torchord.coordinator.compute.shares import mean_loss, total_weight
from torchord.coordinator.compute.weights import Weighed, given, is_sum, left, loss_of, weight_of
from torchord.coordinator.spec.config import TrainingConfig
from torchord.coordinator.spec.plan import derive_seed
from torchord.coordinator.spec.resolving import ResolvedRecipe

log = logging.getLogger(__name__)

_TRIED_EXAMPLES = 32
_PART = "a part of the evaluation"
_BESIDE = "/step"  # among the states: what the recipe's `loss` or `step` measured beside the loss


@dataclass(frozen=True)
class Measured:
    """What was measured of one part of an evaluation.

    Attributes:
        examples: in the part.
        means: "loss" and name of each metric that is a function -> mean.
        states: name of each other metric -> what its figure is worked out from, a tree; under "/step", what
            the recipe's `loss` or `step` measured beside the loss.
        weights: name -> what its mean is over, where that is not the examples.
    """

    examples: int
    means: dict[str, float]
    states: dict[str, Any]
    weights: dict[str, float] = field(default_factory=dict)


def evaluate(
    replica: Replica,
    resolved: ResolvedRecipe,
    config: TrainingConfig,
    dataset: Any,
    indices: IndexArray,
) -> Measured:
    """Measure loss and metrics on some examples, in evaluation mode, without gradients.

    The examples go through the model in micro-batches of ceil(batch_size / shards), the size
    of a training shard, each seeded by its first index.

    Args:
        replica: the model, loaded with the version to measure; where the recipe has an average, that is.
        resolved: the run's recipe.
        config: the run's config.
        dataset: the evaluation dataset.
        indices: which examples, in order.

    Returns:
        The part's figures; the means are summed in order in float64. The loss of each micro-batch weighs
        what it is a mean over, and so do metrics where the recipe has a `weight`; others weigh by examples.
        A loss that is a sum over its examples is the sum over the dataset's.

    Raises:
        InvalidInput: the recipe's code returned what cannot be used.
        Exception: what it raises, with a note.
    """
    size = -(-config.batch_size // config.shard_count)
    size = min(size, config.micro_batch_size or size)
    parts: list[Measured] = []
    beside: list[step_metrics.Part] = []
    tally = Tally(resolved.metrics, replica.device)
    with replica.averaged():
        for start in range(0, len(indices), size):
            some = indices[start : start + size]
            with _evaluating(replica, resolved, config, dataset, some) as (model, batch):
                if batch.kept != 0:
                    found, terms = _measure(resolved, model, batch, len(dataset), tally)
                    parts.append(found)
                    values = [float(each) for each in step_metrics.figures(terms)]
                    beside.append(
                        (step_metrics.read(terms, values), found.examples, found.weights.get("loss"))
                    )
    joined = step_metrics.joined(beside)
    return replace(_mean(parts), states=tally.states() | ({_BESIDE: joined} if joined else {}))


def combine(parts: Sequence[Measured], resolved: ResolvedRecipe, config: TrainingConfig) -> dict[str, float]:
    """Merge what `evaluate` measured of disjoint examples, in the order given.

    Returns:
        name -> figure: weighted means, in float64, and what the other metrics come to; {} for no parts.
    """
    beside = [(part.states.get(_BESIDE), part.examples, part.weights.get("loss")) for part in parts]
    found = step_metrics.combined(beside) | _mean(parts).means
    if resolved.metrics and parts:
        with pinned(config.threads, config.deterministic), during("finishing the metrics"), torch.no_grad():
            seed_everything(derive_seed(config.seed, "evaluation", "finish"))
            found |= metrics.finished(resolved.metrics, [part.states for part in parts])
    return found


def try_metrics(like: Replica, resolved: ResolvedRecipe, config: TrainingConfig, dataset: Any) -> None:
    """Try the recipe's metrics on the first examples of its evaluation; see `metrics.tried`.

    Where there is no memory for one more copy of the model, they are not tried, and the log says so.

    Args:
        like: holds the version to try them at; a copy of it computes.
        resolved: the run's recipe.
        config: the run's config.
        dataset: the evaluation dataset, not empty.

    Raises:
        InvalidInput: a metric returns no number, or is not what it is taken for.
        Exception: whatever the recipe's code raises, with a note.
    """
    try:
        replica = Replica.build(resolved, config, like.device)
        replica.arrange(like.manifest)
        replica.load(like.pack())
    except (MemoryError, torch.OutOfMemoryError) as error:
        log.warning("the metrics are not tried before the first step: %s", error)
        return
    size = min(len(dataset), _TRIED_EXAMPLES)
    cuts = [0, max(1, size // 3), size] if size > 1 else []

    def sample(first: int, last: int) -> Sample | None:
        with _evaluating(replica, resolved, config, dataset, range(first, last)) as (model, batch):
            if batch.kept == 0:
                return None
            weight = left(resolved, given(resolved, batch.value), batch.kept)
            weight = weight_of(Weighed(None, weight), last - first, _PART)
            return Sample(*_measurable(resolved, model, batch.value), last - first, weight)

    whole = sample(0, size)
    if whole is None:
        return
    parts = [part for cut in pairwise(cuts) if (part := sample(*cut)) is not None]
    with pinned(config.threads, config.deterministic, replica.device), torch.no_grad():
        seed_everything(derive_seed(config.seed, "evaluation", "trial"))
        with during("trying the metrics"):
            metrics.tried(resolved.metrics, whole, parts)


def predict(
    replica: Replica,
    resolved: ResolvedRecipe,
    batch: Any,
    config: TrainingConfig | None = None,
    *,
    samples: bool = False,
) -> Any:
    """Return the outputs for a batch in evaluation mode, without gradients.

    The recipe's `predict` computes them; without one the model does, called as the recipe's `loss` has it,
    or beside a `step` with the keys of a mapping as its arguments.

    Args:
        replica: the model, loaded with the version to use.
        resolved: the run's recipe.
        batch: what goes in: a tensor, or dicts, lists and tuples of tensors, an example a row.
        config: the run's config; None: the replica's.
        samples: whether `batch` is a list of samples of the dataset, for the recipe's collate.

    Returns:
        The outputs with their tensors on the CPU, as `torchord.coordinator.compute.outputs.plain` has them.

    Raises:
        InvalidInput: the outputs cannot travel.
        Exception: what the recipe's code raises, with a note.
    """
    config = replica.config if config is None else config
    with pinned(config.threads, config.deterministic, replica.device), replica.averaged():
        replica.reset_buffers()
        seed_everything(derive_seed(config.seed, "predict"))
        if samples:
            batch = collated(resolved, batch)
        with (
            replica.evaluating() as model,
            during("predicting"),
            torch.no_grad(),
            autocast(config, replica.device),
        ):
            outputs = _outputs(resolved, model, to_device(batch, replica.device))
        replica.reset_buffers()
        return to_device(plain(outputs), torch.device("cpu"))


def _outputs(resolved: ResolvedRecipe, model: Any, batch: Any) -> Any:
    if resolved.predict is not None:
        return resolved.predict(model, batch)
    if resolved.step is not None and isinstance(batch, Mapping):
        return model(**batch)
    return model(batch)


def _measure(
    resolved: ResolvedRecipe, model: Any, read: Batch, whole: int, tally: Tally
) -> tuple[Measured, step_metrics.Terms]:
    """The means of one micro-batch of a dataset of `whole` examples, and what is measured beside the loss."""
    batch, examples = read.value, read.examples
    asked = given(resolved, batch)
    said, found = left(resolved, asked, read.kept), loss_of(resolved, model, batch, asked)
    weight = weight_of(found._replace(weight=left(resolved, found.weight, read.kept)), examples, _PART)
    loss = metrics.number(_loss_name(resolved), found.loss)
    if is_sum(resolved):
        loss *= whole / examples
    means = {"loss": 0.0 if weight == 0 else loss}
    if resolved.metrics:
        own = resolved.predict is None
        means |= tally.take(
            *((found.outputs, pair(batch)[1]) if own else _measurable(resolved, model, batch))
        )
    weights = {"loss": weight}
    if said is not None:
        weights = {**dict.fromkeys(means, weight_of(Weighed(None, said), examples, _PART)), **weights}
    kept = {name: w for name, w in weights.items() if w is not None}
    return Measured(examples, means, {}, kept), found.terms


def _measurable(resolved: ResolvedRecipe, model: Any, batch: Any) -> tuple[Any, Any]:
    """What metrics get: the outputs for a batch, and its targets."""
    if resolved.predict is None:
        inputs, targets = pair(batch)
        return model(inputs), targets
    measured = getattr(resolved.predict, "measured", resolved.predict)  # an adapter's may be another
    outputs = measured(model, batch)
    return outputs, batch[1] if type(batch) in (list, tuple) and len(batch) == 2 else batch


@contextmanager
def _evaluating(
    replica: Replica, resolved: ResolvedRecipe, config: TrainingConfig, dataset: Any, some: IndexArray
) -> Iterator[tuple[Any, Batch]]:
    """The model in evaluation mode and a micro-batch on its device, seeded by the first index."""
    first = int(some[0])
    with pinned(config.threads, config.deterministic, replica.device):
        seed_everything(derive_seed(config.seed, "evaluation data", first))
        batch = filtered_batch(dataset, some, resolved.collate)
        replica.reset_buffers()
        seed_everything(derive_seed(config.seed, "evaluation", first))
        with (
            replica.evaluating() as model,
            during("evaluating"),
            torch.no_grad(),
            autocast(config, replica.device),
        ):
            yield model, replace(batch, value=to_device(batch.value, replica.device))
        replica.reset_buffers()


def _loss_name(resolved: ResolvedRecipe) -> str:
    return "loss" if resolved.step is None else "step"


def _mean(parts: Sequence[Measured]) -> Measured:
    """The means of all parts together, in float64; none for no parts."""
    means: dict[str, float] = {}
    weights: dict[str, float] = {}
    parts = [part for part in parts if part.means]  # of the others the collate has left nothing
    for name in parts[0].means if parts else ():
        each = [(part.means[name], part.examples, part.weights.get(name)) for part in parts]
        means[name] = mean_loss(each)
        if (weight := total_weight((examples, weight) for _, examples, weight in each)) is not None:
            weights[name] = weight
    return Measured(sum(part.examples for part in parts), means, {}, weights)
