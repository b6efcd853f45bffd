"""Evaluation and prediction of one version: figures and outputs that no shard's place shows in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchord.cache.errors import InvalidInput
from torchord.coordinator.compute.batch import IndexArray, during, load_batch, pair, to_device
from torchord.coordinator.compute.determinism import pinned, seed_everything
from torchord.coordinator.compute.gradient import autocast
from torchord.coordinator.compute.replica import Replica
from torchord.coordinator.spec.config import TrainingConfig
from torchord.coordinator.spec.plan import derive_seed
from torchord.coordinator.spec.resolving import ResolvedRecipe


def evaluate(
    replica: Replica,
    resolved: ResolvedRecipe,
    config: TrainingConfig,
    dataset: Any,
    indices: IndexArray,
) -> tuple[int, dict[str, float]]:
    """Measure loss and metrics on some examples, in evaluation mode, without gradients.

    The examples go through the model in micro-batches of ceil(batch_size / shards), the size
    of a training shard, each seeded by its first index.

    Args:
        replica: the model, loaded with the version to measure.
        resolved: the run's recipe.
        config: the run's config.
        dataset: the evaluation dataset.
        indices: which examples, in order.

    Returns:
        (examples, {"loss": mean loss, metric name: mean}); the means weigh each micro-batch by
        its examples and are summed in order in float64.

    Raises:
        ShardFailed: the recipe's code raised, or returned what cannot be used.
    """
    size = -(-config.batch_size // config.shards)
    parts: list[tuple[int, dict[str, float]]] = []
    for start in range(0, len(indices), size):
        some = indices[start : start + size]
        first = int(some[0])
        with pinned(config.threads, config.deterministic, replica.device):
            seed_everything(derive_seed(config.seed, "evaluation data", first))
            batch = load_batch(dataset, some, resolved.collate)
            replica.reset_buffers()
            model = replica.eval()
            seed_everything(derive_seed(config.seed, "evaluation", first))
            with during("evaluating"), torch.no_grad(), autocast(config, replica.device):
                parts.append((len(some), _measure(resolved, model, to_device(batch, replica.device))))
            replica.reset_buffers()
    return combine(parts)


def combine(parts: Sequence[tuple[int, Mapping[str, float]]]) -> tuple[int, dict[str, float]]:
    """Merge results of `evaluate` over disjoint examples, in the order given.

    Returns:
        (examples together, name -> mean weighted by examples, in float64); (0, {}) for none.
    """
    total = sum(examples for examples, _ in parts)
    sums: dict[str, float] = {}
    for examples, values in parts:
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value * examples
    return total, {name: value / total for name, value in sums.items()}


def predict(replica: Replica, inputs: Any, config: TrainingConfig | None = None) -> Any:
    """Return model(inputs) in evaluation mode, without gradients.

    Args:
        replica: the model, loaded with the version to use.
        inputs: what the model takes as its one argument: a tensor, or dicts, lists and tuples
            of tensors, with the batch dimension first.
        config: the run's config; None: the replica's.

    Returns:
        The model's outputs with their tensors on the CPU.

    Raises:
        Exception: what the model raises, with a note.
    """
    config = replica.config if config is None else config
    with pinned(config.threads, config.deterministic, replica.device):
        replica.reset_buffers()
        model = replica.eval()
        seed_everything(derive_seed(config.seed, "predict"))
        with during("predicting"), torch.no_grad(), autocast(config, replica.device):
            outputs = model(to_device(inputs, replica.device))
        replica.reset_buffers()
        return to_device(outputs, torch.device("cpu"))


def _measure(resolved: ResolvedRecipe, model: Any, batch: Any) -> dict[str, float]:
    if resolved.step is not None:
        return {"loss": _number("step", resolved.step(model, batch))}
    assert resolved.loss is not None
    inputs, targets = pair(batch)
    outputs = model(inputs)
    values = {"loss": _number("loss", resolved.loss(outputs, targets))}
    for name, metric in resolved.metrics.items():
        values[name] = _number(f"metric {name!r}", metric(outputs, targets))
    return values


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        shown = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
        raise InvalidInput(
            f"{name} returned a {type(value).__name__} {shown}, but must return a number or a scalar tensor"
        ) from None
