"""Page-locked host memory: what a GPU copies from and to without waiting, where the system grants it."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

log = logging.getLogger(__name__)

_refused = False


def host_memory(nbytes: int) -> Tensor:
    """New page-locked memory for copies between this process and a GPU, or pageable memory instead.

    torch keeps page-locked blocks and gives them out again, and not before the asynchronous copies that
    were started on them are done; so a buffer may be dropped while such a copy is under way.

    Returns:
        uint8, 1-D, with any content. Once the system has refused page-locked memory (which is logged
        once), the process does without: the copies are then slower and the caller waits for each.
    """
    if not _refused:
        try:
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            _do_without(error)
    return torch.empty(nbytes, dtype=torch.uint8)


def pinned_copy(tensor: Tensor) -> Tensor:
    """A copy of a CPU tensor in page-locked memory; the tensor itself where there is none."""
    if not _refused:
        try:
            return tensor.pin_memory()
        except RuntimeError as error:
            _do_without(error)
    return tensor


def _do_without(error: RuntimeError) -> None:
    global _refused
    _refused = True
    log.warning(
        "page-locked memory is refused, so that copies from and to the GPU are slower; raise `ulimit -l` or "
        "the container's memory limit (%s)",
        str(error).partition("\n")[0],
    )
