"""Pins everything in the process that could change the bits of a computation.

Threads, algorithm choices and random generators of torch are global to the process, and a
worker computes for several runs in turn. So each computation sets all of them itself, to
values that depend on the run alone and never on what ran before, and holds `COMPUTE_LOCK`
while it depends on them: one process computes one thing at a time.
"""

from __future__ import annotations

import os
import random
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.utils.deterministic

from torchord.cache.errors import InvalidInput
from torchord.cache.settings import cublas_workspace, portable
from torchord.coordinator.compute.frameworks import forget_generator
from torchord.coordinator.compute.portable import install
from torchord.coordinator.compute.switches import (
    own_thread,
    put_back_switches,
    read_switches,
    set_switches,
)

_memory: Any = torch.utils.deterministic  # its one switch is a property that stubs do not know
_cuda: Any = torch.cuda  # partly untyped
_matmul: Any = torch.backends.cuda.matmul
_REDUCTIONS = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")

# Deterministic algorithms by torch's debug mode: `use_deterministic_algorithms` does the same, and imports
# torch's compiler for it, which takes a process that compiles nothing a second.
_MAY_VARY, _MUST = 0, 2

COMPUTE_LOCK = threading.RLock()
"""Guards the process-wide state that `pinned` sets; re-entrant."""

CUBLAS_WORKSPACE = ":4096:8"
_CUBLAS_WORKSPACES = (CUBLAS_WORKSPACE, ":16:8")  # with which cuBLAS is deterministic

_late = _cuda.is_initialized() and not cublas_workspace()
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACE)  # read when cuBLAS's first handle is made


@contextmanager
def pinned(
    threads: int,
    deterministic: bool,
    device: torch.device | str = "cpu",
    *,
    fill: bool = False,
    restore: bool = False,
) -> Iterator[None]:
    """Hold the compute lock with every global switch of torch in its place.

    Set are: intra-op threads (of the calling thread, which is how OpenMP counts), deterministic
    algorithms, cuDNN's algorithm search, TF32 and every precision of float32 (float32 means
    float32), how half-precision products are summed (torch's default), flushing of denormals, the
    default dtype (float32) and the filling of fresh memory. What else a process or thread may have left
    otherwise is as torch has it from the start (`switches`): gradients on, no inference mode, autocast,
    anomaly mode or default device, no mode on torch's stacks, all kernels of oneDNN and attention
    allowed. Random generators are not touched: see `seed_everything`.

    Args:
        threads: intra-op threads of torch.
        deterministic: whether operators without a deterministic implementation raise. If not,
            cuDNN may also search for the fastest algorithm.
        device: where the computation runs; CUDA's switches are set only for a CUDA device.
        fill: whether `torch.empty` and its kin return NaN instead of whatever was in memory.
            torch does that by default in deterministic mode. It costs a write of every
            temporary, and a gradient that depended on unwritten memory would be a bug in the
            model; but where a model is built (once) and a constructor leaves a tensor
            unwritten, each process would otherwise start from other values.
        restore: whether to put the switches and the generators back afterwards, for computations
            in a process that belongs to somebody else (the submitter's).

    Raises:
        InvalidInput: cuBLAS of this process cannot be deterministic any more (see `require_cublas`).
    """
    with COMPUTE_LOCK:
        cuda = torch.device(device).type == "cuda"
        before = _snapshot(cuda=cuda) if restore else None
        leave = own_thread()
        try:
            _set_switches(threads, deterministic, fill=fill, cuda=cuda)
            yield
        finally:
            if before is not None:
                _put_back(before)
            leave()


def seed_everything(seed: int) -> None:
    """Seed every generator that a recipe's code can be expected to draw from.

    These are torch's (CPU and each CUDA device), numpy's legacy global generator, the
    `random` module and Keras' generator of what is drawn without a seed. A generator that the
    recipe makes itself, such as `numpy.random.default_rng()` without a seed, cannot be reached and
    would break the run's reproducibility; seed it from `torch.initial_seed()` or draw from a global one.

    Args:
        seed: 0 to 2**63 - 1; numpy takes it modulo 2**32.
    """
    # What torch.manual_seed does, less its queue for a CUDA that is not initialised: filling that
    # formats a stack trace each time, which costs as much as a small model's forward.
    torch.default_generator.manual_seed(seed)
    if _cuda.is_initialized():
        _cuda.manual_seed_all(seed)
    np.random.seed(seed % (1 << 32))
    random.seed(seed)
    forget_generator()


def generators() -> dict[str, Any]:
    """Return where the generators of `seed_everything` are, for `set_generators`."""
    return {
        "torch": torch.get_rng_state(),
        "cuda": _cuda.get_rng_state_all() if _cuda.is_initialized() else [],
        "numpy": np.random.get_state(),
        "random": random.getstate(),
    }


def set_generators(before: dict[str, Any]) -> None:
    """Put the generators back to where they were."""
    torch.set_rng_state(before["torch"])
    if before["cuda"]:
        _cuda.set_rng_state_all(before["cuda"])
    np.random.set_state(before["numpy"])
    random.setstate(before["random"])


def _set_switches(threads: int, deterministic: bool, *, fill: bool, cuda: bool) -> None:
    if portable():
        install()
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    if torch.get_default_dtype() is not torch.float32:
        torch.set_default_dtype(torch.float32)
    mode = _MUST if deterministic else _MAY_VARY
    if torch.get_deterministic_debug_mode() != mode:
        torch.set_deterministic_debug_mode(mode)
    _memory.fill_uninitialized_memory = fill
    torch.set_flush_denormal(False)
    set_switches()
    if cuda:
        if deterministic:
            require_cublas()
        _cuda.init()  # so that its generators can be seeded
        torch.backends.cudnn.deterministic = deterministic
        torch.backends.cudnn.benchmark = not deterministic
        _allow_tf32(False)
        for name in _REDUCTIONS:
            setattr(_matmul, name, True)


def require_cublas() -> None:
    """Refuse to promise deterministic results of a cuBLAS that was set up otherwise.

    Raises:
        InvalidInput: CUDA was in use before torchord was imported, when cuBLAS may have chosen
            workspaces of its own, or the environment gives it such; the message says what to do.
    """
    if _late:
        raise InvalidInput(
            "CUDA was in use before torchord was imported, so cuBLAS may have chosen workspaces with which "
            f"its results vary; set CUBLAS_WORKSPACE_CONFIG={CUBLAS_WORKSPACE} before the process starts, "
            "import torchord first, or set deterministic=False"
        )
    if cublas_workspace() not in _CUBLAS_WORKSPACES:
        raise InvalidInput(
            f"CUBLAS_WORKSPACE_CONFIG is {cublas_workspace()!r}, with which cuBLAS's results vary; leave it "
            f"unset, set it to {CUBLAS_WORKSPACE}, or set deterministic=False"
        )


def _allow_tf32(allowed: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces another name for this switch
        torch.backends.cudnn.allow_tf32 = allowed


def _snapshot(*, cuda: bool) -> dict[str, Any]:
    return {
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "deterministic": torch.get_deterministic_debug_mode(),
        "fill": _memory.fill_uninitialized_memory,
        "switches": read_switches(),
        "cudnn": (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark),
        "tf32": torch.backends.cudnn.allow_tf32 if cuda else None,
        "reductions": [getattr(_matmul, name) for name in _REDUCTIONS] if cuda else [],
        "generators": generators(),
    }


def _put_back(before: dict[str, Any]) -> None:
    torch.set_num_threads(before["threads"])
    torch.set_default_dtype(before["dtype"])
    torch.set_deterministic_debug_mode(before["deterministic"])
    _memory.fill_uninitialized_memory = before["fill"]
    put_back_switches(before["switches"])
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before["cudnn"]
    if before["tf32"] is not None:
        _allow_tf32(before["tf32"])
    for name, value in zip(_REDUCTIONS, before["reductions"], strict=False):
        setattr(_matmul, name, value)
    set_generators(before["generators"])
