"""Batches: samples read, collated, and brought to a device in one layout.

What is read depends on (seed, place, indices) alone; see `torchord.coordinator.compute.determinism`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
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
from torchord.coordinator.compute.filtering import collated
from torchord.coordinator.compute.kernels import worded
from torchord.coordinator.spec.config import TrainingConfig
from torchord.coordinator.spec.default_dtype import require_float32
from torchord.coordinator.spec.plan import derive_seed
from torchord.coordinator.spec.resolving import ResolvedRecipe
from torchord.coordinator.spec.targets import STREAMED, map_style, stream

IndexArray = Sequence[int] | npt.NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """A collated batch, on the CPU, to be used once: a model may write to its inputs.

    Attributes:
        value: what the collate made; None where it had nothing to make it of (`kept` is 0).
        examples: how many were read for it.
        kept: how many the collate has left, where it has left some out and that can be told.
    """

    value: Any
    examples: int
    kept: int | None = None


def open_dataset(
    resolved: ResolvedRecipe, config: TrainingConfig, kind: str = "dataset", *, seeded: str | None = None
) -> Any:
    """Call the recipe's dataset entry, seeded by the run, so that every process makes the same one.

    Args:
        resolved: the run's recipe.
        config: the run's config.
        kind: "dataset" for training, or "evaluation".
        seeded: the kind by whose seed it is made; None: its own.

    Returns:
        A map-style dataset. The process's switches and generators are put back.

    Raises:
        InvalidInput: the recipe has no such entry, or it made something else.
    """
    make = resolved.dataset if kind == "dataset" else resolved.evaluation
    if make is None:
        raise InvalidInput(f"the recipe has no {kind}")
    with pinned(config.threads, config.deterministic, restore=True), during(f"making the {kind}"):
        seed_everything(derive_seed(config.seed, seeded or kind))
        made = make()
        require_float32(f"the recipe's {kind} entry")
    if not map_style(type(made)):
        found = stream(type(made))
        why = (
            f", {found}, whose examples have no places by which workers could share them: " if found else "; "
        )
        raise InvalidInput(f"the recipe's {kind} entry returned a {type(made).__name__}{why}{STREAMED}")
    if isinstance(made, Mapping) and not all(index in made for index in range(len(made))):
        raise InvalidInput(
            f"the recipe's {kind} entry returned a {type(made).__name__} with the keys "
            f"{', '.join(map(repr, list(made)[:4]))}; it must return one dataset, whose examples have the "
            "places 0, 1, 2, ..."
        )
    return made


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
    return filtered_batch(dataset, indices, resolved.collate)


def filtered_batch(
    dataset: Any, indices: IndexArray, collate: Callable[[list[Any]], Any] | None = None
) -> Batch:
    """Read a batch as `load_batch` does, and count what the collate has left in it."""
    if collate is None:
        return Batch(load_batch(dataset, indices), len(indices))
    return _filtered(_samples(dataset, [int(index) for index in indices]), collate)


def _filtered(samples: list[Any], collate: Callable[[list[Any]], Any] | None) -> Batch:
    with during("collating the samples"):
        value, kept = (default_collate(samples), None) if collate is None else collated(samples, collate)
    return Batch(value, len(samples), kept)


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
        with during("reading the dataset"):
            chosen = torch.as_tensor(np.array(indices, dtype=np.int64))
            return [tensor[chosen] for tensor in dataset.tensors]
    samples = _samples(dataset, [int(index) for index in indices])
    with during("collating the samples"):
        return (collate or default_collate)(samples)


def read_samples(
    dataset: Any, indices: IndexArray, collate: Callable[[list[Any]], Any] | None = None
) -> Callable[[list[int]], Batch]:
    """Read samples once, to be collated many times.

    Args:
        dataset, indices, collate: as for `load_batch`.

    Returns:
        (numbers of some of the samples, in the order of `indices`) -> their batch, made from copies.

    Raises:
        Exception: what the dataset raises, with a note.
    """
    if type(dataset) is TensorDataset and collate is None:
        return lambda some: filtered_batch(dataset, [int(indices[number]) for number in some])
    samples = _samples(dataset, [int(index) for index in indices])
    return lambda some: _filtered(copy.deepcopy([samples[number] for number in some]), collate)


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


def _samples(dataset: Any, indices: list[int]) -> list[Any]:
    if hasattr(dataset, "__getitems__"):
        with during(f"reading samples {indices[0]}, ... from the dataset"):
            samples = list(dataset.__getitems__(indices))
        if len(samples) != len(indices):
            raise InvalidInput(
                f"the dataset's __getitems__ returned {len(samples)} samples for {len(indices)} indices"
            )
        return samples
    samples = []
    for index in indices:
        with during(f"reading sample {index} from the dataset"):
            samples.append(dataset[index])
    return samples


def pair(batch: Any) -> tuple[Any, Any]:
    """The inputs and targets of a batch.

    Raises:
        InvalidInput: it is no pair.
    """
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


@contextmanager
def during(what: str) -> Iterator[None]:
    """Let what the recipe's code raises pass, with a note that says where it happened.

    It passes as it is, but for torch's alert of an operator that is not deterministic (see `worded`).
    """
    try:
        yield
    except BaseException as error:  # sys.exit() included
        told = worded(error)
        told.add_note(f"torchord: raised while {what}")
        if told is error:
            raise
        raise told from error
