"""torch's switches: what a process, or one of its threads, computes under, whoever set it.

Any module that a worker has imported, and any run that it computed for, may have left one of them
otherwise: gradients off, another default device, a mode that rewrites every call, another kernel for
attention. Each computation sets them to what torch has from the start.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.overrides
import torch.utils._python_dispatch as _dispatch

_C: Any = torch._C  # what of it is asked for here, the stubs do not all know
_torch: Any = torch


class _Switch(NamedTuple):
    """One switch: how it is read and set, and what torch has from the start."""

    get: Any
    set: Any
    value: Any


def _flag(read: str, write: str, value: Any) -> _Switch | None:
    """A switch of torch's C module; None for a torch that does not have it."""
    if not (hasattr(_C, read) and hasattr(_C, write)):
        return None
    return _Switch(getattr(_C, read), getattr(_C, write), value)


def _autocast(device: str) -> _Switch:
    return _Switch(
        partial(torch.is_autocast_enabled, device), partial(torch.set_autocast_enabled, device), False
    )


def _precision(backend: str, operation: str) -> _Switch | None:
    """How float32 is computed by one backend; torch has had these since 2.9."""
    if not hasattr(_C, "_get_fp32_precision_getter"):
        return None
    return _Switch(
        partial(_C._get_fp32_precision_getter, backend, operation),
        partial(_C._set_fp32_precision_setter, backend, operation),
        "none",
    )


def _there(*switches: _Switch | None) -> tuple[_Switch, ...]:
    return tuple(switch for switch in switches if switch is not None)


_ALL = _there(
    # Of this thread.
    _Switch(torch.is_grad_enabled, _C._set_grad_enabled, True),
    _autocast("cpu"),
    _autocast("cuda"),
    _Switch(torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled, True),
    # Of the process.
    _Switch(torch.is_anomaly_enabled, _C.set_anomaly_enabled, False),
    _flag("_get_mkldnn_enabled", "_set_mkldnn_enabled", True),
    _flag("_get_mkldnn_deterministic", "_set_mkldnn_deterministic", False),
    _flag("_get_nnpack_enabled", "_set_nnpack_enabled", True),
    _flag("_get_cudnn_enabled", "_set_cudnn_enabled", True),
    _flag("_get_flash_sdp_enabled", "_set_sdp_use_flash", True),
    _flag("_get_mem_efficient_sdp_enabled", "_set_sdp_use_mem_efficient", True),
    _flag("_get_math_sdp_enabled", "_set_sdp_use_math", True),
    _flag("_get_cudnn_sdp_enabled", "_set_sdp_use_cudnn", True),
    _flag("_get_math_sdp_allow_fp16_bf16_reduction", "_set_math_sdp_allow_fp16_bf16_reduction", False),
    _Switch(torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled, True),
    _precision("generic", "all"),
    _precision("cuda", "all"),
    _precision("mkldnn", "all"),
    _precision("mkldnn", "conv"),
    _precision("mkldnn", "rnn"),
)
_READS, _VALUES = [switch.get for switch in _ALL], [switch.value for switch in _ALL]
_MATMULS = _there(_precision("mkldnn", "matmul"), _precision("cuda", "matmul"))  # and their older name


def set_switches() -> None:
    """Set every switch to what torch has from the start; float32 means float32."""
    if [read() for read in _READS] != _VALUES:  # at each shard's every turn: as short as it can be
        for read, write, value in _ALL:
            if read() != value:
                write(value)
    if matmul_precision() != "highest":
        torch.set_float32_matmul_precision("highest")


def read_switches() -> list[Any]:
    """The switches as they are, for `put_back_switches`."""
    precision = matmul_precision()
    matmuls = [switch.get() for switch in _MATMULS] if precision is None else []
    return [precision, matmuls, *(switch.get() for switch in _ALL)]


def put_back_switches(values: list[Any]) -> None:
    """Set every switch to what `read_switches` has found."""
    precision, matmuls, *others = values
    for switch, value in zip(_ALL, others, strict=True):
        if switch.get() != value:
            switch.set(value)
    if precision is not None:
        torch.set_float32_matmul_precision(precision)
    for switch, value in zip(_MATMULS, matmuls, strict=False):
        switch.set(value)


def matmul_precision() -> str | None:
    """How float32 matrices are multiplied; None where somebody set that for one backend alone."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # torch will not say it by the older name then
        return None


def own_thread() -> Callable[[], None]:
    """Turn gradients on in this thread, and inference mode, default device and all modes of torch off.

    Returns:
        What leaves the thread as it was found: without what was left on since, and with what was on
        before, since this may run inside of somebody's `with`.
    """
    if _untouched():
        return _clear
    after = ExitStack()
    if torch.is_inference_mode_enabled():
        after.enter_context(torch.inference_mode(False))
    after.callback(_put_back, *_set_aside())
    after.enter_context(torch.set_grad_enabled(True))
    after.callback(_clear)
    return after.close


def _untouched() -> bool:
    return (
        torch.is_grad_enabled()
        and not torch.is_inference_mode_enabled()
        and not _C._len_torch_function_stack()
        and not _C._len_torch_dispatch_stack()
    )


def _clear() -> None:
    if not _untouched():
        _set_aside()
        torch._C._set_grad_enabled(True)


def _set_aside() -> tuple[torch.device | None, list[Any], list[Any]]:
    """Take the default device and all modes off; returns them, the modes innermost first."""
    context = getattr(_torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
    if context is not None:
        torch.set_default_device(None)
    functions = [_torch.overrides._pop_mode() for _ in range(_C._len_torch_function_stack())]
    calls = [_dispatch._pop_mode() for _ in range(_C._len_torch_dispatch_stack())]
    return None if context is None else context.device, functions, calls


def _put_back(device: torch.device | None, functions: list[Any], calls: list[Any]) -> None:
    if device is not None:
        torch.set_default_device(device)
    for mode in reversed(functions):
        _torch.overrides._push_mode(mode)
    for mode in reversed(calls):
        _dispatch._push_mode(mode)
