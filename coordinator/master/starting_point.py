"""`start_from=`: the weights of another run's version or of a safetensors file, read by whoever submits.

They are read here because a file may lie on no other machine, and a run's version may be gone when a
training server begins. They are stored for the new run as one blob, which its spec names.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from torchord.cache.errors import InvalidInput
from torchord.cache.ledger.records import canonical
from torchord.cache.settings import located
from torchord.coordinator.master.run import Run

if TYPE_CHECKING:
    from torch import Tensor

StartFrom: TypeAlias = Run | str | os.PathLike[str] | tuple[Run | str, int]

_PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")
_FILES = (".safetensors", *_PICKLES)


@dataclass(frozen=True)
class StartingPoint:
    """Weights to start from.

    Attributes:
        source: where they were, in words.
        digest: of names, shapes, dtypes and bytes.
        weights: name -> tensor on the CPU.
    """

    source: str
    digest: str
    weights: Mapping[str, Tensor]


def read_start(start_from: StartFrom, run_of: Callable[[str], Run]) -> StartingPoint:
    """Read what a run is to start from.

    Args:
        start_from: a run, or its name, for its newest version; (run or name, version); or the path of a
            safetensors file: a `Path`, or a string with a slash or the ending ".safetensors".
        run_of: makes the handle of a run.

    Raises:
        InvalidInput: it is something else, or the file cannot be read or is a pickle.
        RunNotFound: there is no such run.
        RunError: the run has no weights yet.
        VersionMissing: that version is not stored any more.
    """
    if isinstance(start_from, os.PathLike) or (isinstance(start_from, str) and _is_path(start_from)):
        source, weights = _of_file(start_from)
    else:
        run, version = (
            start_from if isinstance(start_from, tuple) and len(start_from) == 2 else (start_from, None)
        )
        if isinstance(run, str):
            run = run_of(run)
        if not isinstance(run, Run):
            raise InvalidInput(
                "start_from takes a run or its name, (run or name, version), or the path of a safetensors "
                f"file, got {type(start_from).__name__}"
            )
        source, weights = _of_run(run, version)
    return StartingPoint(source, _digest(weights), weights)


def _is_path(text: str) -> bool:
    return "/" in text or os.sep in text or text.lower().endswith(_FILES)


def _of_run(run: Run, version: int | None) -> tuple[str, dict[str, Tensor]]:
    from torchord.coordinator.compute.starting_weights import final_tensors

    version, tensors = run.tensors(version)
    return f"run {run.name!r}, version {version}", final_tensors(tensors)


def _of_file(path: str | os.PathLike[str]) -> tuple[str, dict[str, Tensor]]:
    import safetensors.torch
    from safetensors import SafetensorError

    where = located(path)
    if where.lower().endswith(_PICKLES):
        raise InvalidInput(
            f"start_from: {where} is a pickle, which runs code when it is read; write it as safetensors "
            "first, safetensors.torch.save_file(torch.load(path, weights_only=True), 'weights.safetensors')"
        )
    if not Path(where).is_file():
        raise InvalidInput(
            f"start_from: there is no file {where} here; a run is named without a slash, as in "
            "start_from='digits-01'"
        )
    try:
        return f"file {where}", safetensors.torch.load_file(where)
    except (SafetensorError, OSError) as error:
        raise InvalidInput(f"start_from: {where} cannot be read as safetensors: {error}") from error


def _digest(weights: Mapping[str, Any]) -> str:
    """A digest of names, shapes, dtypes and bytes, whatever the order."""
    from torchord.cache.tensors.codec import as_bytes, layout, pack

    found = hashlib.blake2b(digest_size=16)
    for name in sorted(weights):
        manifest = layout({name: weights[name]})
        found.update(canonical(manifest.to_json()).encode())
        found.update(as_bytes(pack({name: weights[name]}, manifest)))
    return found.hexdigest()
