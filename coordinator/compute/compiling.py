"""torch.compile for shards, such that the kernels depend on the run and the shard and on no history.

By default torch.compile lets the past decide: a second size of batch makes kernels for any size, the ninth
size runs uncompiled, timings choose between kernels. Each gives other bits, and a worker that
joined later has another past. So here each size gets kernels of its own, there is no limit after which some
run uncompiled, and nothing is chosen by the clock.

The kernels depend on the compiler and the vector instructions that it may use, too: that is the *toolchain*,
which all workers that compute for a run must share.
"""

from __future__ import annotations

import functools
import importlib.metadata
import subprocess
from typing import Any, cast

import torch
from torch import nn

from torchord.cache.errors import CompilerMissing

_LIMIT = 1 << 20
"""Kernels of one model: as many as it has sizes and modes, without end."""


def compiled(model: nn.Module) -> nn.Module:
    """The model with its forward and backward compiled at their first use, for each size of inputs anew."""
    import torch._dynamo.config as dynamo
    import torch._inductor.config as inductor

    tracing, backend = cast(Any, dynamo), cast(Any, inductor)  # their fields vary from version to version
    tracing.recompile_limit = tracing.accumulated_recompile_limit = _LIMIT
    backend.compile_threads = 1  # a worker leaves no pool of compilers behind
    options: dict[str, Any] = {"deterministic": True} if hasattr(backend, "deterministic") else {}
    return cast(nn.Module, torch.compile(model, dynamic=False, options=options))


@functools.cache
def toolchain(device: str) -> str:
    """What of this machine the kernels for a device depend on, in one line.

    Args:
        device: "cpu", "cuda" or "cuda:N".

    Raises:
        CompilerMissing: there is no compiler for the device.
    """
    kind = device.partition(":")[0]
    try:
        return _for_cuda() if kind == "cuda" else _for_cpu()
    except CompilerMissing:
        raise
    except Exception as error:
        raise CompilerMissing(
            f"the run asks for compile=True, and this worker has no compiler that it can use for {kind} "
            f"({type(error).__name__}: {error}). Install {_NEEDED.get(kind, 'one')} on it, or submit with "
            "compile=False"
        ) from error


_NEEDED = {"cpu": "g++ or clang++ (Debian and Ubuntu: apt install g++)", "cuda": "triton and a C compiler"}


def _for_cpu() -> str:
    from torch._inductor import cpp_builder, cpu_vec_isa

    compiler = cpp_builder.get_cpp_compiler()
    shown = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=60)
    isa = str(cpu_vec_isa.pick_vec_isa()) or "no vector instructions"
    return f"{shown.stdout.splitlines()[0]}, {isa}"


def _for_cuda() -> str:
    return f"triton {importlib.metadata.version('triton')}"  # comes with torch's builds for CUDA
