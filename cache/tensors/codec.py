"""Bytes <-> tensors: a manifest that says where each tensor lies in one flat buffer.

The buffer holds raw little-endian elements and nothing else; names, shapes and dtypes are in
the manifest, which is plain JSON. Nothing here is ever executed, so a manifest or a buffer
from an untrusted peer can at worst be refused.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from torchord.cache.errors import InvalidInput, ManifestMismatch
from torchord.cache.reading import FOREIGN
from torchord.cache.tensors.pinned import host_memory

ALIGNMENT_NBYTES = 64
"""Address of each tensor that is computed with, and its offset in a buffer, is a multiple of this.

It suits any vector load, and torch's own allocators keep it. Products of matrices give other bits on some
processors (AMD with AVX-512) where their operands start elsewhere or have other strides.
"""

MOST_DIMENSIONS = 64
"""Of a tensor: torch itself takes no more in most operations."""

_SAME_SIZE_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

if sys.byteorder != "little":  # pragma: no cover
    raise ImportError("torchord stores little-endian elements; big-endian hosts are not supported")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor in a flat buffer.

    Attributes:
        name: key of the tensor in its mapping.
        shape: extent of each dimension, in elements; () for a 0-d tensor.
        dtype: name of the torch dtype without its prefix, such as "float32".
        offset: first byte in the buffer, a multiple of 64.
        nbytes: length in bytes; 0 for an empty tensor.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    nbytes: int

    @property
    def end(self) -> int:
        """The first byte behind it."""
        return self.offset + self.nbytes


@dataclass(frozen=True, slots=True)
class Manifest:
    """The layout of a flat buffer.

    Attributes:
        tensors: one entry per tensor, in order of offset.
        nbytes: length of the whole buffer in bytes, a multiple of 64.
    """

    tensors: tuple[TensorSpec, ...]
    nbytes: int

    def between(self, start: int, stop: int) -> list[str]:
        """Names of the tensors of which a byte lies in [start, stop)."""
        return [t.name for t in self.tensors if t.offset < stop and start < t.offset + t.nbytes]

    def to_json(self) -> dict[str, Any]:
        """Return the manifest as dicts, lists, strings and integers."""
        rows = [[t.name, list(t.shape), t.dtype, t.offset, t.nbytes] for t in self.tensors]
        return {"nbytes": self.nbytes, "tensors": rows}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Manifest:
        """Rebuild a manifest that `to_json` produced, trusting nothing in it.

        Raises:
            ManifestMismatch: a field is missing or of the wrong type, a dtype is unknown, or the
                tensors overlap or reach beyond the buffer.
        """
        try:
            specs = tuple(map(_row, value["tensors"]))
            manifest = cls(specs, _count(value["nbytes"]))
        except FOREIGN as error:
            raise ManifestMismatch(
                f"this is not a manifest ({error!r:.200}); was it written by torchord?"
            ) from error
        _validate(manifest)
        return manifest


def layout(tensors: Mapping[str, Tensor]) -> Manifest:
    """Plan the flat buffer of `tensors`, in the order of the mapping.

    Args:
        tensors: name -> dense tensor of any shape, dtype and device.

    Returns:
        A manifest with each tensor at the next multiple of 64 bytes.

    Raises:
        InvalidInput: a tensor is sparse, quantized or on the meta device.

    Example:
        >>> layout({"w": torch.zeros(3, 5), "b": torch.zeros(())}).nbytes
        128
    """
    specs: list[TensorSpec] = []
    offset = 0
    for name, tensor in tensors.items():
        _require_dense(name, tensor)
        nbytes = tensor.numel() * tensor.dtype.itemsize
        specs.append(TensorSpec(name, tuple(tensor.shape), dtype_name(tensor.dtype), offset, nbytes))
        offset = padded(offset + nbytes)
    return Manifest(tuple(specs), offset)


def pack(tensors: Mapping[str, Tensor], manifest: Manifest, out: Tensor | None = None) -> Tensor:
    """Copy `tensors` into one flat buffer, each byte once.

    The bytes are a function of the values alone: gaps are zero, strides, conjugate bits and
    devices do not show, and no element passes through arithmetic (NaN payloads survive).

    Args:
        tensors: name -> tensor, as described by `manifest` (any strides, CPU or CUDA).
        manifest: from `layout`, of these or of equally shaped tensors.
        out: 1-D uint8 tensor of `manifest.nbytes` bytes to write into, on the CPU (pinned memory lets
            CUDA sources copy asynchronously) or on the sources' device (then enqueued like any other
            computation). Allocated on the CPU if None (pinned for CUDA sources, if it can be had).

    Returns:
        `out`; on the CPU it is complete: CUDA copies have finished.

    Raises:
        ManifestMismatch: names, shapes or dtypes differ from the manifest.
        InvalidInput: `out` has another dtype, shape, size or alignment.
    """
    check(manifest, tensors)
    on_cuda = {tensor.device for tensor in tensors.values() if tensor.is_cuda}
    if out is None:
        out = host_memory(manifest.nbytes) if on_cuda else torch.empty(manifest.nbytes, dtype=torch.uint8)
    _require_buffer(out, manifest.nbytes)
    targets = views(out, manifest)
    asynchronous = bool(on_cuda) and out.is_pinned()
    for gap in gaps(manifest):
        out[gap].zero_()
    with torch.no_grad():
        for spec in manifest.tensors:
            source = tensors[spec.name].detach().resolve_conj().resolve_neg()
            _as_bits(targets[spec.name]).copy_(_as_bits(source), non_blocking=asynchronous)
    if asynchronous:
        for device in on_cuda:
            torch.cuda.current_stream(device).synchronize()
    return out


def views(buffer: Tensor, manifest: Manifest) -> dict[str, Tensor]:
    """Return each tensor of the manifest as a view into `buffer`; nothing is copied.

    Args:
        buffer: 1-D uint8 tensor of `manifest.nbytes` bytes, on any device.
        manifest: what the buffer contains.

    Returns:
        name -> tensor that shares the buffer's memory and keeps it alive.

    Raises:
        InvalidInput: the buffer has another dtype, shape, size or alignment.
        ManifestMismatch: the manifest names an unknown dtype.
    """
    _require_buffer(buffer, manifest.nbytes)
    return {
        spec.name: buffer[spec.offset : spec.end].view(dtype_of(spec.dtype)).view(spec.shape)
        for spec in manifest.tensors
    }


def check(manifest: Manifest, tensors: Mapping[str, Tensor]) -> None:
    """Compare names, shapes and dtypes of `tensors` with the manifest; the order is free.

    Raises:
        ManifestMismatch: names the first difference, in the order of the manifest.
    """
    for spec in manifest.tensors:
        tensor = tensors.get(spec.name)
        if tensor is None:
            raise ManifestMismatch(f"tensor {spec.name!r} is in the manifest but not in the model")
        if tuple(tensor.shape) != spec.shape:
            raise ManifestMismatch(
                f"tensor {spec.name!r} has shape {tuple(tensor.shape)}, the manifest says {spec.shape}"
            )
        if dtype_name(tensor.dtype) != spec.dtype:
            raise ManifestMismatch(
                f"tensor {spec.name!r} has dtype {dtype_name(tensor.dtype)}, the manifest says {spec.dtype}"
            )
    known = {spec.name for spec in manifest.tensors}
    for name in tensors:
        if name not in known:
            raise ManifestMismatch(f"tensor {name!r} is in the model but not in the manifest")


def aligned(tensor: Tensor) -> Tensor:
    """Bring a tensor into the one layout that bits are computed in, whatever view of what it is.

    That layout is the one of a fresh tensor: row-major, on a boundary of 64 bytes.

    Args:
        tensor: any dtype and device.

    Returns:
        The tensor itself where it has that layout, or has no dense memory of its own (sparse, quantized,
        nested, meta); else a copy, through which gradients flow as through the tensor. The copy of a leaf is
        a leaf.
    """
    tensor = tensor.resolve_conj().resolve_neg() if tensor.layout is torch.strided else tensor
    if has_layout(tensor):
        return tensor
    copy = tensor.clone(memory_format=torch.contiguous_format)
    return copy.detach().requires_grad_(tensor.requires_grad) if tensor.is_leaf else copy


def has_layout(tensor: Tensor) -> bool:
    """Whether `aligned` leaves a tensor as it is."""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        return True
    if tensor.is_conj() or tensor.is_neg():
        return False
    return row_major(tensor) and starts_aligned(tensor)


def row_major(tensor: Tensor) -> bool:
    """Whether strides are those of a fresh tensor, in dimensions of one element too: kernels look at them."""
    if not tensor.is_contiguous():
        return False
    expected = 1
    for extent, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if stride != expected:
            return False
        expected *= max(extent, 1)
    return True


def padded(nbytes: int) -> int:
    """A length in bytes, and what is missing to the next boundary of 64."""
    return -(-nbytes // ALIGNMENT_NBYTES) * ALIGNMENT_NBYTES


def starts_aligned(tensor: Tensor) -> bool:
    """Whether a dense tensor starts on a boundary of 64 bytes; an empty one does."""
    try:
        return tensor.data_ptr() % ALIGNMENT_NBYTES == 0
    except RuntimeError:  # a subclass that wraps others has no memory of its own
        return True


def copy_bits(target: Tensor, source: Tensor) -> None:
    """Copy a tensor into one of the same shape and dtype; no element passes through arithmetic."""
    with torch.no_grad():
        _as_bits(target).copy_(_as_bits(source.detach().resolve_conj().resolve_neg()))


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of the same shape and dtype, on the CPU, have the same elements, bit for bit.

    False for two equal ones is possible where no integer has the elements' size (complex128 with NaN).
    """
    with torch.no_grad():
        return torch.equal(_as_bits(one), _as_bits(other.detach().resolve_conj().resolve_neg()))


def gaps(manifest: Manifest) -> Iterator[slice]:
    """The bytes of a buffer that belong to no tensor."""
    end = 0
    for spec in manifest.tensors:
        if spec.offset > end:
            yield slice(end, spec.offset)
        end = spec.end
    if manifest.nbytes > end:
        yield slice(end, manifest.nbytes)


def require_same(ours: Manifest, theirs: Manifest) -> None:
    """Compare what two layouts hold: a model's here, and the one that bytes were written with.

    The order is free: the model takes what was written by name.

    Raises:
        ManifestMismatch: names the first tensor that differs in shape or dtype, or is in one of them only.
    """
    mine = {spec.name: spec for spec in ours.tensors}
    for other in theirs.tensors:
        own = mine.pop(other.name, None)
        if own is None:
            raise ManifestMismatch(f"{other.name!r} {other.shape} {other.dtype}: not in the model here")
        if (own.shape, own.dtype) != (other.shape, other.dtype):
            raise ManifestMismatch(
                f"tensor {own.name!r} is {own.shape} {own.dtype} in the model here, and {other.shape} "
                f"{other.dtype} there"
            )
    if mine:
        named = ", ".join(repr(name) for name in [*mine][:3])
        raise ManifestMismatch(
            f"{named}: only in the model here ({ours.nbytes} bytes, {theirs.nbytes} there)"
        )


def memory(tensor: Tensor) -> memoryview:
    """Expose a contiguous CPU tensor's own memory as writable bytes, without a copy.

    The view keeps the tensor alive.

    Args:
        tensor: CPU tensor of any dtype and shape, contiguous.

    Returns:
        memoryview of format "B" and `numel * itemsize` bytes.

    Raises:
        InvalidInput: the tensor is not on the CPU or not contiguous.
    """
    try:  # few calls into torch: right after a large transfer each of them is a cache miss
        usable = tensor.is_cpu and tensor.is_contiguous()
    except RuntimeError:  # sparse
        usable = False
    if not usable:
        raise InvalidInput("only a contiguous CPU tensor has bytes to send; pack it first")
    nbytes = tensor.nbytes
    if nbytes == 0:
        return memoryview(bytearray())
    array = _array_of(nbytes).from_address(tensor.data_ptr())
    array._owner = tensor  # type: ignore[attr-defined]  # the ctypes array owns no memory
    return memoryview(array).cast("B")


@lru_cache(maxsize=64)
def _array_of(nbytes: int) -> type[ctypes.Array[ctypes.c_ubyte]]:
    return ctypes.c_ubyte * nbytes  # making a type takes longer than all else that `memory` does


def as_bytes(buffer: Tensor | memoryview) -> memoryview:
    """Return the buffer's own memory as bytes, without a copy."""
    return memory(buffer) if isinstance(buffer, Tensor) else buffer.cast("B")


def dtype_name(dtype: torch.dtype) -> str:
    """Return "float32" for torch.float32, and so on."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """Return torch.float32 for "float32", and so on.

    Raises:
        ManifestMismatch: this torch has no such dtype.
    """
    dtype = getattr(torch, name, None) if name.isidentifier() else None
    if not isinstance(dtype, torch.dtype):
        raise ManifestMismatch(f"this torch ({torch.__version__}) has no dtype {name!r}")
    return dtype


def _as_bits(tensor: Tensor) -> Tensor:
    """View elements as integers of their size, so that a copy is a move of bits (complex128 has none)."""
    integer = _SAME_SIZE_INTEGER.get(tensor.dtype.itemsize)
    return tensor if integer is None else tensor.view(integer)


def _require_dense(name: str, tensor: Tensor) -> None:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise InvalidInput(
            f"tensor {name!r} is sparse, quantized or without data; only dense tensors have bytes to store"
        )


def _require_buffer(buffer: Tensor, nbytes: int) -> None:
    if buffer.dtype != torch.uint8 or buffer.dim() != 1 or not buffer.is_contiguous():
        raise InvalidInput(
            f"the buffer must be 1-D contiguous uint8, not {buffer.dim()}-D {dtype_name(buffer.dtype)}"
        )
    if buffer.numel() != nbytes:
        raise InvalidInput(f"the buffer has {buffer.numel()} bytes, the manifest says {nbytes}")
    if nbytes and not (starts_aligned(buffer) and buffer.storage_offset() % 16 == 0):
        raise InvalidInput("the buffer must start at a multiple of 64 bytes; allocate it with torch.empty")


def _row(row: Any) -> TensorSpec:
    """One row of a manifest; bounds first: the product of sixty thousand extents takes half a minute."""
    name, shape, dtype, offset, nbytes = row
    if type(name) is not str or type(dtype) is not str or type(shape) not in (list, tuple):
        raise TypeError("a row is no [name, shape, dtype, offset, length]")
    if len(shape) > MOST_DIMENSIONS:
        raise ValueError(f"tensor {name!r:.60} has {len(shape)} dimensions, more than {MOST_DIMENSIONS}")
    return TensorSpec(name, tuple(map(_count, shape)), dtype, _count(offset), _count(nbytes))


def _count(value: Any) -> int:
    if type(value) is int and 0 <= value < 1 << 63:
        return value
    shown = value if type(value) in (int, float) and abs(value) < 1e300 else type(value).__name__
    raise ValueError(f"{shown} is no count")


def _validate(manifest: Manifest) -> None:
    end = 0
    seen: set[str] = set()
    for spec in manifest.tensors:
        if spec.name in seen:
            raise ManifestMismatch(f"the manifest names tensor {spec.name!r} twice")
        seen.add(spec.name)
        expected = math.prod(spec.shape) * dtype_of(spec.dtype).itemsize
        if spec.nbytes != expected:
            raise ManifestMismatch(
                f"tensor {spec.name!r}: {spec.nbytes} bytes do not make {spec.shape} {spec.dtype}"
            )
        if spec.offset < end or spec.offset % ALIGNMENT_NBYTES:
            raise ManifestMismatch(
                f"tensor {spec.name!r} overlaps its neighbour or is not aligned (at {spec.offset})"
            )
        end = spec.end
    if manifest.nbytes < end:
        raise ManifestMismatch(f"the tensors reach byte {end}, the manifest says {manifest.nbytes}")
