"""A run's model as a program that needs neither the recipe's code nor torchord."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from torchord.cache.errors import CheckpointError, InvalidInput
from torchord.coordinator.compute.batch import open_dataset, pair, read_batch
from torchord.coordinator.compute.determinism import pinned
from torchord.coordinator.master.run_versions import RunVersions

_EXAMPLES = 2  # torch.export takes a dimension of 0 or 1 for fixed


def write_program(run: RunVersions, path: Path, kind: str) -> int:
    """Write the newest version of a run's model as a program; its version.

    What it takes is shaped like the dataset's first examples, and has any number of them where the model
    admits that.

    Args:
        run: whose model.
        path: of the file.
        kind: "torch-export" or "onnx".

    Raises:
        InvalidInput: the model cannot be traced, or nothing says what it takes.
        CheckpointError: the file cannot be written.
        RunNotFound, VersionMissing: there is nothing to write.
    """
    version = run.tensors()[0]
    module = run.model(version)
    args, kwargs = _inputs(run, module)
    dynamic = (*map(_any_number, args), *map(_any_number, kwargs.values()))
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


def _inputs(run: RunVersions, module: torch.nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the model for the dataset's first examples, without a `labels` that it can do without.

    Beside a `step` they are those that its first call of the model has.

    Raises:
        InvalidInput: the step does not call the model as a whole.
    """
    recipe, config = run.recipe(), run.config()
    with pinned(config.threads, config.deterministic, restore=True), torch.no_grad():
        dataset = open_dataset(recipe, config)
        value = read_batch(recipe, config, dataset, range(min(_EXAMPLES, len(dataset))), (0,)).value
        if recipe.step is None:
            return (pair(value)[0],), {}
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def seen(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append((args, dict(kwargs)))

        handle = module.register_forward_pre_hook(seen, with_kwargs=True)
        try:
            recipe.step(module, value)
        finally:
            handle.remove()
    if not calls:
        raise InvalidInput(
            f"the recipe's step never calls {type(module).__name__} as a whole, so nobody knows its inputs; "
            "its weights can be written, with --format safetensors"
        )
    args, kwargs = calls[0]
    labels = inspect.signature(module.forward).parameters.get("labels")
    if labels is not None and labels.default is not inspect.Parameter.empty:
        kwargs.pop("labels", None)
    return args, kwargs


def _any_number(value: Any) -> Any:
    """Each tensor's first dimension may be of any length."""

    def first(leaf: Any) -> Any:
        return {0: torch.export.Dim.AUTO} if isinstance(leaf, torch.Tensor) and leaf.ndim else None

    return pytree.tree_map(first, value)
