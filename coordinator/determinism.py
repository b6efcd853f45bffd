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

_memory: Any = torch.utils.deterministic  # its one switch is a property that stubs do not know
_cuda: Any = torch.cuda  # partly untyped

COMPUTE_LOCK = threading.RLock()
"""Guards the process-wide state that `pinned` sets; re-entrant."""

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS when its first handle is made


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
    algorithms, cuDNN's algorithm search, TF32, the float32 matmul precision (float32 means
    float32), flushing of denormals, the default dtype (float32) and the filling of fresh
    memory. Random generators are not touched: see `seed_everything`.

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
        restore: whether to put the switches and the CPU generators back afterwards, for
            computations in a process that belongs to somebody else (the submitter's).
    """
    with COMPUTE_LOCK:
        before = _snapshot() if restore else None
        _set_switches(threads, deterministic, fill=fill, cuda=torch.device(device).type == "cuda")
        try:
            yield
        finally:
            if before is not None:
                _put_back(before)


def seed_everything(seed: int) -> None:
    """Seed every generator that a recipe's code can be expected to draw from.

    These are torch's (CPU and each CUDA device), numpy's legacy global generator and the
    `random` module. A generator that the recipe makes itself, such as
    `numpy.random.default_rng()` without a seed, cannot be reached and would break the run's
    reproducibility; seed it from `torch.initial_seed()` or draw from a global one.

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


def _set_switches(threads: int, deterministic: bool, *, fill: bool, cuda: bool) -> None:
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    if torch.get_default_dtype() is not torch.float32:
        torch.set_default_dtype(torch.float32)
    if (
        torch.are_deterministic_algorithms_enabled() != deterministic
        or torch.is_deterministic_algorithms_warn_only_enabled()
    ):
        torch.use_deterministic_algorithms(deterministic)
    _memory.fill_uninitialized_memory = fill
    torch.set_flush_denormal(False)
    if torch.get_float32_matmul_precision() != "highest":
        torch.set_float32_matmul_precision("highest")
    if cuda:
        _cuda.init()  # so that its generators can be seeded
        torch.backends.cudnn.deterministic = deterministic
        torch.backends.cudnn.benchmark = not deterministic
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch announces another name for this switch
            torch.backends.cudnn.allow_tf32 = False


def _snapshot() -> dict[str, Any]:
    return {
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "fill": _memory.fill_uninitialized_memory,
        "matmul": torch.get_float32_matmul_precision(),
        "cudnn": (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark),
        "torch_rng": torch.get_rng_state(),
        "numpy_rng": np.random.get_state(),
        "random_rng": random.getstate(),
    }


def _put_back(before: dict[str, Any]) -> None:
    torch.set_num_threads(before["threads"])
    torch.set_default_dtype(before["dtype"])
    torch.use_deterministic_algorithms(before["deterministic"], warn_only=before["warn_only"])
    _memory.fill_uninitialized_memory = before["fill"]
    torch.set_float32_matmul_precision(before["matmul"])
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before["cudnn"]
    torch.set_rng_state(before["torch_rng"])
    np.random.set_state(before["numpy_rng"])
    random.setstate(before["random_rng"])
