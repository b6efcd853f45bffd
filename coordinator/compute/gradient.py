"""One shard's gradient: a pure function of (run, parameter version, shard).

Computing runs in two phases, each with all generators seeded by (run, step, shard) alone:
the data phase reads samples and collates them, the model phase runs forward and backward.
Buffers start from the loaded version each time. So the same shard gives the same bytes
however often, wherever and after whatever else it is computed (like hardware and builds
provided; see `determinism`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import TensorDataset, default_collate

from torchord.cache.errors import InvalidInput
from torchord.cache.tensors.codec import aligned
from torchord.cache.tensors.pinned import pinned_copy
from torchord.coordinator.compute.determinism import pinned, seed_everything
from torchord.coordinator.compute.loss_scale import LossScale, unscale
from torchord.coordinator.compute.readback import collect, take_gradients
from torchord.coordinator.compute.replica import Replica
from torchord.coordinator.spec.config import TrainingConfig
from torchord.coordinator.spec.plan import derive_seed
from torchord.coordinator.spec.recipe import ResolvedRecipe

_HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}

Watch = Callable[[LossScale | None], AbstractContextManager[None]]


def unwatched(scale: LossScale | None) -> AbstractContextManager[None]:
    """The context of a backward that nobody watches."""
    return nullcontext()


IndexArray = Sequence[int] | npt.NDArray[np.int64]


@dataclass(frozen=True)
class ShardGradient:
    """What one shard contributes to its step.

    Attributes:
        gradients: parameter name -> gradient of the shard's mean loss, on the CPU, in the
            parameter's shape and dtype; parameters that the loss does not reach are left out.
        buffers: buffer name -> value after the forward, on the CPU, where it changed.
        loss: mean loss over the shard.
        grad_norm: L2 norm of all gradients together.
        examples: examples in the shard.
        finite: whether loss and norm are finite.
    """

    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]
    loss: float
    grad_norm: float
    examples: int
    finite: bool


@dataclass(frozen=True)
class Batch:
    """A collated batch, on the CPU, to be used once: a model may write to its inputs.

    Attributes:
        value: what the collate made.
        examples: how many are in it.
    """

    value: Any
    examples: int


def open_dataset(resolved: ResolvedRecipe, config: TrainingConfig, kind: str = "dataset") -> Any:
    """Call the recipe's dataset entry, seeded by the run, so that every process makes the same one.

    Args:
        resolved: the run's recipe.
        config: the run's config.
        kind: "dataset" for training, or "evaluation".

    Returns:
        A map-style dataset. The process's switches and generators are put back.

    Raises:
        InvalidInput: the recipe has no such entry, or it made something else.
    """
    make = resolved.dataset if kind == "dataset" else resolved.evaluation
    if make is None:
        raise InvalidInput(f"the recipe has no {kind}")
    with pinned(config.threads, config.deterministic, restore=True), _during(f"making the {kind}"):
        seed_everything(derive_seed(config.seed, kind))
        made = make()
    if not hasattr(made, "__len__") or not hasattr(made, "__getitem__"):
        raise InvalidInput(
            f"the recipe's {kind} entry returned a {type(made).__name__}; it must return a map-style "
            "dataset, with __len__ and __getitem__"
        )
    return made


def compute(
    replica: Replica,
    resolved: ResolvedRecipe,
    config: TrainingConfig,
    dataset: Any,
    indices: IndexArray,
    step: int,
    shard: int,
    watched: Watch = unwatched,
) -> ShardGradient:
    """Compute the gradient of a shard's mean loss at the replica's version.

    Args:
        replica: the model, loaded with the step's version.
        resolved: the run's recipe.
        config: the run's config.
        dataset: what the recipe's dataset entry returned, or anything map-style that gives
            the same samples for the same indices.
        indices: dataset indices of the shard's examples, in order.
        step: the global step.
        shard: the shard's number within the step.
        watched: the context that the backward runs in, made from the loss scale that its gradients will
            be divided by afterwards.

    Returns:
        Gradients, changed buffers and figures. The tensors belong to the caller.

    Raises:
        InvalidInput: there are no indices, or the recipe's code returned what cannot be used.
        Exception: whatever the recipe's code raises, with a note (PEP 678) that says in which
            phase, and for which sample.
    """
    if len(indices) == 0:
        raise InvalidInput(f"shard {shard} of step {step} has no examples")
    with pinned(config.threads, config.deterministic, replica.device):
        replica.reset_buffers()
        batch = read_batch(resolved, config, dataset, indices, (step, shard))
        loss = forward_backward(replica, resolved, config, batch, (step, shard), replica.loss_scale, watched)
        gradients = take_gradients(replica)
        with _during("collecting buffers"):
            found = collect(replica, gradients, [loss])
    value, tensors = found.figures[0], found.tensors
    finite = math.isfinite(value) and math.isfinite(found.norm)
    return ShardGradient(tensors, found.buffers, value, found.norm, len(indices), finite)


def read_batch(
    resolved: ResolvedRecipe,
    config: TrainingConfig,
    dataset: Any,
    indices: IndexArray,
    place: tuple[int, ...],
) -> Batch:
    """Read a batch with the generators seeded for its place, so that augmentation is the same anywhere.

    Called with the process pinned. Arguments as in `compute`; `place` seeds, as in `forward_backward`.
    """
    seed_everything(derive_seed(config.seed, "data", *place))
    return Batch(load_batch(dataset, indices, resolved.collate), len(indices))


def forward_backward(
    replica: Replica,
    resolved: ResolvedRecipe,
    config: TrainingConfig,
    batch: Batch,
    place: tuple[int, ...],
    scale: LossScale | None = None,
    watched: Watch = unwatched,
) -> Tensor:
    """Run forward and backward on a batch, and return the loss; the gradients are in the parameters.

    The loss is a tensor of one element on the replica's device: nothing here waits for a device.

    Called with the process pinned. Arguments as in `compute`; `place` seeds, `(step, shard)` or with
    local steps `(step, shard, local step)`; `scale` multiplies the loss that the backward starts from,
    and the gradients are divided by it; `watched` is the backward's context.
    """
    model = replica.train()
    seed_everything(derive_seed(config.seed, "model", *place))
    with _during("computing forward and loss"), _alone(batch.examples), _autocast(config, replica.device):
        loss = _loss(resolved, model, formatted(to_device(batch.value, replica.device), config))
    _require_loss(loss)
    with _during("computing the backward"), watched(scale):
        (loss if scale is None else loss.float() * scale.scale).backward()
    if scale is not None:
        unscale(replica.parameters.items(), scale)
    detached: Tensor = loss.detach()
    return detached


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
            with _during("evaluating"), torch.no_grad(), _autocast(config, replica.device):
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
        with _during("predicting"), torch.no_grad(), _autocast(config, replica.device):
            outputs = model(to_device(inputs, replica.device))
        replica.reset_buffers()
        return to_device(outputs, torch.device("cpu"))


def load_batch(
    dataset: Any,
    indices: IndexArray,
    collate: Callable[[list[Any]], Any] | None = None,
) -> Any:
    """Read samples and collate them, by the fastest way that the dataset offers.

    A plain `TensorDataset` is indexed as a whole, which gives the bytes of torch's default
    collate; a dataset with `__getitems__` is asked once; any other, sample by sample.

    Args:
        dataset: a map-style dataset.
        indices: which samples, in order.
        collate: (list of samples) -> batch; None: torch's default collate.

    Raises:
        InvalidInput: `__getitems__` returned another number of samples.
        Exception: what dataset or collate raise, with a note.
    """
    if type(dataset) is TensorDataset and collate is None:
        with _during("reading the dataset"):
            chosen = torch.as_tensor(np.array(indices, dtype=np.int64))
            return [tensor[chosen] for tensor in dataset.tensors]
    samples = _samples(dataset, [int(index) for index in indices])
    with _during("collating the samples"):
        return (collate or default_collate)(samples)


def to_device(value: Any, device: torch.device) -> Any:
    """Bring every tensor of a nested batch to a device, in the layout that is computed in (`codec.aligned`).

    Whatever views of whatever memory a dataset or collate makes, the model so sees their values alone.
    A tensor that is at several places stays one. Copies to CUDA go through page-locked memory and do not
    block.

    Args:
        value: tensors in dicts, lists, tuples, mappings and dataclasses; objects with a `to` method of
            their own (such as a Hugging Face `BatchEncoding`) are asked to move themselves first, and what
            of them is neither mapping nor dataclass is laid out as they please. The rest stays.
        device: where to.
    """
    return _brought(value, device, {})


def _brought(value: Any, device: torch.device, done: dict[int, tuple[Tensor, Tensor]]) -> Any:
    """See `to_device`; `done` is what was brought: its id -> (itself, so that it keeps its id, result)."""
    if isinstance(value, Tensor):
        if id(value) not in done:
            done[id(value)] = (value, _tensor_on(value, device))
        return done[id(value)][1]
    inner = partial(_brought, device=device, done=done)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(inner, value))
    if type(value) in (list, tuple):
        return type(value)(map(inner, value))
    if hasattr(value, "to") and callable(value.to):
        value = value.to(device)
        if isinstance(value, MutableMapping):
            for key, item in list(value.items()):
                value[key] = inner(item)
            return value
    if isinstance(value, Mapping):
        return {key: inner(item) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        value = copy.copy(value)
        for field in fields(value):
            if hasattr(value, field.name):  # frozen ones, too
                object.__setattr__(value, field.name, inner(getattr(value, field.name)))
    return value


def _tensor_on(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return aligned(tensor.to(device))
    return aligned((pinned_copy(tensor) if tensor.is_cpu else tensor).to(device, non_blocking=True))


def formatted(batch: Any, config: TrainingConfig) -> Any:
    """The batch with its 4-D floating-point tensors in the config's memory format."""
    if config.memory_format == "contiguous":
        return batch
    if isinstance(batch, Tensor):
        pictures = batch.dim() == 4 and batch.is_floating_point()
        return batch.contiguous(memory_format=torch.channels_last) if pictures else batch
    if type(batch) in (list, tuple):
        return type(batch)(formatted(item, config) for item in batch)
    if type(batch) is dict:
        return {key: formatted(item, config) for key, item in batch.items()}
    return batch


# --- parts ------------------------------------------------------------------------------


def _samples(dataset: Any, indices: list[int]) -> list[Any]:
    if hasattr(dataset, "__getitems__"):
        with _during(f"reading samples {indices[0]}, ... from the dataset"):
            samples = list(dataset.__getitems__(indices))
        if len(samples) != len(indices):
            raise InvalidInput(
                f"the dataset's __getitems__ returned {len(samples)} samples for {len(indices)} indices"
            )
        return samples
    samples = []
    for index in indices:
        with _during(f"reading sample {index} from the dataset"):
            samples.append(dataset[index])
    return samples


def _pair(batch: Any) -> tuple[Any, Any]:
    if isinstance(batch, (list, tuple)) and len(batch) == 2:
        return batch[0], batch[1]
    shown = type(batch).__name__
    if isinstance(batch, (list, tuple)):
        shown += f" of {len(batch)} items"
    elif isinstance(batch, Mapping):
        shown += f" with keys {', '.join(map(str, batch))}"
    raise InvalidInput(
        f"with loss=, a batch must be a pair (inputs, targets), but the dataset gives a {shown}; use "
        "step=(model, batch) -> loss in its place, or a collate that makes pairs"
    )


def _loss(resolved: ResolvedRecipe, model: Any, batch: Any) -> Any:
    if resolved.step is not None:
        return resolved.step(model, batch)
    assert resolved.loss is not None
    inputs, targets = _pair(batch)
    return resolved.loss(model(inputs), targets)


def _measure(resolved: ResolvedRecipe, model: Any, batch: Any) -> dict[str, float]:
    if resolved.step is not None:
        return {"loss": _number("step", resolved.step(model, batch))}
    assert resolved.loss is not None
    inputs, targets = _pair(batch)
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


def _require_loss(loss: Any) -> None:
    if not isinstance(loss, Tensor):
        raise InvalidInput(f"the loss is a {type(loss).__name__}, but must be a scalar tensor")
    if loss.numel() != 1:
        raise InvalidInput(
            f"the loss has shape {tuple(loss.shape)}, but must be a scalar; take its mean over the shard"
        )
    if not loss.is_floating_point():
        raise InvalidInput(f"the loss has dtype {loss.dtype}, but must be a floating-point tensor")
    if not loss.requires_grad:
        raise InvalidInput(
            "the loss depends on no trainable parameter (all frozen, detached or converted on the way?)"
        )


@contextmanager
def _alone(examples: int) -> Iterator[None]:
    """Explain why a BatchNorm refuses a shard of one example."""
    try:
        yield
    except ValueError as error:
        if examples == 1 and "more than 1 value per channel" in str(error):
            raise InvalidInput(
                "a BatchNorm cannot train on a shard of one example; choose batch_size and shards so that "
                "each shard of the epoch's last, smaller step has at least two (see Plan.shard_sizes)"
            ) from error
        raise


def _autocast(config: TrainingConfig, device: torch.device) -> AbstractContextManager[Any]:
    half = _HALVES.get(config.precision)
    return nullcontext() if half is None else torch.autocast(device.type, dtype=half)


@contextmanager
def _during(what: str) -> Iterator[None]:
    """Let what the recipe's code raises pass as it is, with a note that says where it happened."""
    try:
        yield
    except BaseException as error:  # sys.exit() included
        error.add_note(f"torchord: raised while {what}")
        raise
