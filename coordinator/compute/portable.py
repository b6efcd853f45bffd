"""Kernels that give the same bits on all x86-64 processors with AVX2, for `hardware="portable"`.

The libraries below torch choose kernels by the processor, once, when they are first used; what pins them is
read from the environment (`torchord.cache.settings.pin_kernels`). That leaves operators whose pinned kernels
start from an approximation that the instruction set does not define (RSQRTPS, RCPPS: each maker has a table
of its own), and oneDNN's cells of an LSTM. `install` gives torch others for them:

- square roots, and powers of a half: numpy's, which are rounded as IEEE 754 says, and MKL's are not;
- arc tangents: those of two arguments, which are torch's own;
- LSTMs: torch's own cells.
"""

from __future__ import annotations

import platform
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch import library as operators

from torchord.cache.errors import InvalidInput

CAPABILITY = "AVX2"
_C: Any = torch._C
_torch: Any = torch  # partly untyped
_operators: Any = operators  # likewise
_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_REAL = (torch.float32, torch.float64)
_library: Any = None  # what is registered lives as long as it


def install() -> None:
    """Replace the kernels of this process, once; nothing that is portable may be computed before.

    Raises:
        InvalidInput: this machine or its torch has not the kernels that are shared; the message says which.
    """
    global _library
    if _library is not None:
        return
    _require()
    library = _operators.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that a kernel is replaced
        for name, root in (("sqrt", _root), ("atan", _arc_tangent)):
            _replace_unary(library, name, root)
        _replace_powers(library)
        for overload in ("input", "data"):
            _replace_lstm(library, f"lstm.{overload}")
    _library = library


def _require() -> None:
    found = torch.backends.cpu.get_cpu_capability()
    if platform.machine() not in ("x86_64", "AMD64"):
        what = f"a processor of kind {platform.machine()}"
    elif not _torch.backends.mkl.is_available():
        what = "a torch that was built without MKL"
    elif not hasattr(operators, "get_kernel"):
        what = f"torch {torch.__version__}, in which kernels cannot be replaced"
    elif found != CAPABILITY:
        what = f"the kernels of {found}"
    else:
        return
    raise InvalidInput(
        f"hardware='portable' is for x86-64 processors with AVX2 and a torch with MKL, and this process has "
        f"{what}; start it with TORCHORD_HARDWARE=portable in its environment and import torchord before "
        "torch, or leave that out and let it work on other runs"
    )


def _root(given: Tensor, out: Tensor) -> None:
    np.sqrt(given.detach().numpy(), out=out.detach().numpy())


def _arc_tangent(given: Tensor, out: Tensor) -> None:
    torch.atan2(given, torch.ones((), dtype=given.dtype), out=out)


def _replace_unary(library: Any, name: str, compute: Callable[[Tensor, Tensor], None]) -> None:
    """Three overloads of an operator; other dtypes keep the kernel that they have."""
    plain, inplace, into = (operators.get_kernel(f"aten::{each}", "CPU") for each in _overloads(name))

    def of(given: Tensor) -> Any:
        if given.dtype not in _REAL:
            return plain.call_boxed(_CPU, given)
        out = torch.empty_like(given)
        compute(given, out)
        return out

    def of_itself(given: Tensor) -> Any:
        if given.dtype not in _REAL:
            return inplace.call_boxed(_CPU, given)
        compute(given, given)
        return given

    def of_into(given: Tensor, *, out: Tensor) -> Any:
        if given.dtype not in _REAL or out.dtype is not given.dtype:
            return into.call_boxed(_CPU, given, out=out)
        if out.shape != given.shape:
            out.resize_(given.shape)
        compute(given, out)
        return out

    for overload, replacement in zip(_overloads(name), (of, of_itself, of_into), strict=True):
        library.impl(overload, replacement, "CPU", allow_override=True)


def _overloads(name: str) -> tuple[str, str, str]:
    return name, f"{name}_", f"{name}.out"


def _replace_powers(library: Any) -> None:
    """A power of a half is a square root; others keep their kernel."""
    names = ("pow.Tensor_Scalar", "pow_.Scalar", "pow.Tensor_Scalar_out")
    plain, inplace, into = (operators.get_kernel(f"aten::{name}", "CPU") for name in names)

    def power(given: Tensor, exponent: Any) -> Any:
        return given.sqrt() if _half(given, exponent) else plain.call_boxed(_CPU, given, exponent)

    def power_of_itself(given: Tensor, exponent: Any) -> Any:
        return given.sqrt_() if _half(given, exponent) else inplace.call_boxed(_CPU, given, exponent)

    def power_into(given: Tensor, exponent: Any, *, out: Tensor) -> Any:
        if _half(given, exponent):
            return torch.sqrt(given, out=out)
        return into.call_boxed(_CPU, given, exponent, out=out)

    for name, replacement in zip(names, (power, power_of_itself, power_into), strict=True):
        library.impl(name, replacement, "CPU", allow_override=True)


def _half(given: Tensor, exponent: Any) -> bool:
    return bool(exponent == 0.5) and given.dtype in _REAL


def _replace_lstm(library: Any, name: str) -> None:
    composed = operators.get_kernel(f"aten::{name}", "CPU")

    def lstm(*arguments: Any) -> Any:
        before = _C._get_mkldnn_enabled()
        _C._set_mkldnn_enabled(False)
        try:
            return composed.call_boxed(_CPU, *arguments)
        finally:
            _C._set_mkldnn_enabled(before)

    for key in ("CPU", "AutogradCPU"):
        library.impl(name, lstm, key, allow_override=True)
