"""A run's model as a program that needs neither the recipe's code nor torchord."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from torchord.cache.errors import CheckpointError, InvalidInput
from torchord.coordinator.compute.batch import open_dataset, pair, read_batch
from torchord.coordinator.compute.determinism import pinned
from torchord.coordinator.master.master import Master

_EXAMPLES = 2  # torch.export takes a dimension of 0 or 1 for fixed


def write_program(master: Master, name: str, path: Path, kind: str) -> int:
    """Write the newest version of a run's model as a program; its version.

    What it takes is shaped like the dataset's first examples, and has any number of them where the model
    admits that.

    Args:
        master: knows the run.
        name: of the run.
        path: of the file.
        kind: "torch-export" or "onnx".

    Raises:
        InvalidInput: the model cannot be traced.
        CheckpointError: the file cannot be written.
        RunNotFound, VersionMissing: there is nothing to write.
    """
    run = master.run(name)
    version = run.tensors()[0]
    module = run.model(version)
    args, kwargs = _inputs(run)
    dynamic = _any_number(kwargs or args)
    try:
        program = torch.export.export(module, args, kwargs, dynamic_shapes=dynamic)
        if kind == "onnx":
            torch.onnx.export(program, f=str(path), dynamo=True, verbose=False)
        else:
            torch.export.save(program, path)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error}; choose a directory that exists") from error
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise InvalidInput(
            f"{type(module).__name__} cannot be a program: {type(error).__name__}: {reason:.300}; "
            "its weights can be written, with --format safetensors"
        ) from error
    return version


def _inputs(run: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the model for the dataset's first examples, as a prediction has them."""
    recipe, config = run.recipe(), run.config()
    with pinned(config.threads, config.deterministic, restore=True):
        dataset = open_dataset(recipe, config)
        value = read_batch(recipe, config, dataset, range(min(_EXAMPLES, len(dataset))), (0,)).value
    if recipe.loss is not None:
        value = pair(value)[0]
    if recipe.step is not None and isinstance(value, Mapping):
        return (), dict(value)
    return (dict(value) if isinstance(value, Mapping) else value,), {}


def _any_number(value: Any) -> Any:
    """Each tensor's first dimension may be of any length."""

    def first(leaf: Any) -> Any:
        return {0: torch.export.Dim.AUTO} if isinstance(leaf, torch.Tensor) and leaf.ndim else None

    return pytree.tree_map(first, value)
