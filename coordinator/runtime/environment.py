"""The device of this process, and what of the process and its machine could change bits."""

from __future__ import annotations

import platform
from functools import cache

import torch

from torchord.cache.ledger.hardware import PORTABLE, is_portable
from torchord.cache.settings import cublas_workspace, portable
from torchord.coordinator.compute.determinism import CUBLAS_WORKSPACE

_VENDOR_FIELDS = ("vendor_id", "CPU implementer")  # of /proc/cpuinfo on x86 and on Arm

_device: str | None = None


def set_device(name: str) -> None:
    """Choose the device of this process: "auto", "cpu", "cuda" or "cuda:N"."""
    global _device
    _device = None if name == "auto" else name


def device() -> str:
    """The device of this process; "auto" picks CUDA if there is one, unless kernels are portable."""
    global _device
    if _device is None:
        _device = "cuda:0" if torch.cuda.is_available() and not portable() else "cpu"
    return _device


@cache
def processor_vendor() -> str:
    """Who made the processor, "" if unknown: libraries choose other code for another vendor's."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            fields = (line.partition(":") for line in file)
            named = (value.strip() for name, _, value in fields if name.strip() in _VENDOR_FIELDS)
            return next(named, "")
    except OSError:
        return ""


def unlike(run: str, there: str, here: str, *, does: str = "computed") -> str:
    """Why a worker with one environment may not work on a run that has another.

    Args:
        there: the run's.
        here: the worker's.
        does: what the run has from workers like that.
    """
    if is_portable(there) and not is_portable(here):
        return (
            f"run {run!r} has hardware='portable', for which a worker pins its kernels when it starts, and "
            f"this worker has {here}; start workers with TORCHORD_HARDWARE=portable in their environment, or "
            "LocalCluster(hardware='portable')"
        )
    return (
        f"run {run!r} is {does} on {there}; this worker has {here}, which may give other bits. Start a "
        "worker like the first, or run.resume(admit_skew=True)"
    )


def environment(toolchain: str = "") -> str:
    """What of this process could change the bits of a gradient, in one line.

    Args:
        toolchain: what compiles the kernels of a compiled run, see `torchord.coordinator.compute.compiling`.
    """
    if portable():
        return f"torch {torch.__version__}, {PORTABLE} {platform.machine().replace('_', '-')}"
    kind = device()
    on_cuda = kind.startswith("cuda")
    name = torch.cuda.get_device_name(kind) if on_cuda else torch.backends.cpu.get_cpu_capability()
    if on_cuda and cublas_workspace() != CUBLAS_WORKSPACE:
        name += f", cuBLAS {cublas_workspace()}"
    machine = f"{platform.machine()} {processor_vendor()}".strip()
    here = f"torch {torch.__version__}, {kind.split(':')[0]} {name}, {machine}"
    return f"{here}, {toolchain}" if toolchain else here
