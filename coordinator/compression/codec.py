"""The interface of a codec, and error feedback, which all codecs share.

A codec turns the gradients of one shard into a smaller payload and a memory, and the payload
back into gradients. The memory belongs to a shard slot of a run: it comes out of the slot's
encoding at one step and goes into its encoding at the next, on whichever worker that runs.
Nothing else is remembered, so the same gradients and the same memory give the same bytes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from torchord.cache.errors import InvalidInput, ManifestMismatch
from torchord.cache.tensors.codec import ALIGNMENT_NBYTES, Manifest, aligned, dtype_name, dtype_of
from torchord.coordinator.compression.layout import Layout
from torchord.coordinator.compression.number_formats import NumberFormat

SEPARATOR = "#"
"""Between the name of a parameter and what of it an entry holds, in payloads and memories."""

_PACKED, _NONFINITE, _HELD = "packed", "nonfinite", "held"
_WIDE = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.complex32: torch.complex64,
    torch.complex64: torch.complex64,
    torch.complex128: torch.complex128,
}
"""The dtype in which a gradient is added to its memory; gradients of other dtypes travel as they are."""

Shapes: TypeAlias = Mapping[str, Tensor] | Manifest
"""Says what the parameters are: name -> tensor (its values are not looked at), or a manifest."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """What became of one shard's gradients.

    Attributes:
        payload: what travels, in the order of the gradients: a parameter's name -> its gradient
            as it was, or "name#packed" -> its compressed form (uint8, 1-D), or "name#nonfinite" ->
            the NaN or infinity that it had (0-d).
        residual: the slot's memory after this encoding, sorted by key: a parameter's name -> what
            was held back of its gradient, in the parameter's shape, or "name#held" -> the same in
            fewer bits (uint8, 1-D); "name#part" -> other state of the codec. Empty for a codec that
            remembers nothing. May share tensors with the memory that was given, never with the
            gradients.
    """

    payload: dict[str, Tensor]
    residual: dict[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of the payload's elements, without the padding between them on the wire."""
        return sum(part.numel() * part.element_size() for part in self.payload.values())


@runtime_checkable
class Codec(Protocol):
    """What a run asks of a gradient compression. See `TensorCodec` for the easy way to write one.

    Attributes:
        stateful: whether encoding leaves a memory. If not, the residual is always empty and
            nothing need be stored for a slot.
    """

    @property
    def stateful(self) -> bool:
        """Whether encoding leaves a memory."""
        ...

    def encode(self, gradients: Mapping[str, Tensor], residual: Mapping[str, Tensor] | None) -> Encoded:
        """Compress the gradients of one shard.

        Args:
            gradients: parameter name -> gradient, any dtype, shape, strides and device; a
                parameter that the loss did not reach is left out. Never written to.
            residual: the slot's memory from the step before; None or empty at the first. Never
                written to.

        Returns:
            Payload and next memory: a pure function of the arguments' values.
        """
        ...

    def decode(self, payload: Mapping[str, Tensor], like: Shapes) -> dict[str, Tensor]:
        """Return the gradients that a payload stands for.

        Args:
            payload: from `encode`; views into a received buffer will do.
            like: shapes and dtypes of all parameters (others may be among them).

        Returns:
            parameter name -> dense gradient in the parameter's shape and dtype, for those that
            were encoded, in their order. What travelled as it was may share the payload's memory.

        Raises:
            ManifestMismatch: the payload is not this codec's for these parameters.
        """
        ...


class Plain:
    """The codec "none": gradients travel as they are, and nothing is remembered.

    Equation:
        decode(encode(g)) = g, bit for bit, in every dtype.
    """

    stateful = False

    def encode(self, gradients: Mapping[str, Tensor], residual: Mapping[str, Tensor] | None) -> Encoded:
        """See `Codec.encode`; the payload is the gradients themselves, not copies."""
        return Encoded(dict(gradients), {})

    def decode(self, payload: Mapping[str, Tensor], like: Shapes) -> dict[str, Tensor]:
        """See `Codec.decode`."""
        known = shapes_of(like)
        for name, gradient in payload.items():
            expect(name, gradient, *_known(known, name))
        return dict(payload)


@dataclass(frozen=True, slots=True)
class Kept:
    """What `TensorCodec.compress` returns, for the slot's memory.

    Attributes:
        error: values - expand(parts), in the values' shape and dtype; None: the base class works
            it out, for which `values` must be as it was.
        state: part name -> tensor to be given to the next `compress` of this parameter; any name but
            "held".
    """

    error: Tensor | None = None
    state: Mapping[str, Tensor] = field(default_factory=dict)


class TensorCodec(ABC):
    """A codec that treats one parameter at a time, with error feedback.

    A subclass says which parts a compressed tensor has and how they are filled and read; all
    else is done here. The parts of a tensor travel as one uint8 tensor, whose size depends on the
    parameter's shape and dtype alone, so that a run's payloads all have the same size.

    Equation:
        v_t = g_t + e_t,   payload_t = C(v_t),   e_{t+1} = v_t - decode(payload_t),   e_0 = 0

    so that nothing of a gradient is lost, only delayed: over any number of steps the decoded
    gradients add up to the gradients, up to the last e. The subtraction is exact where the
    decoded value is within a factor of two of v (Sterbenz), and rounds once elsewhere.

    What would not get at least 64 bytes smaller, the alignment of tensors on the wire, travels
    as it is, without a memory, and so does what is not floating point. Gradients in half precision
    are added to a float32 memory, and the error is taken after rounding to the parameter's dtype,
    so that what `decode` returns is what the memory counts. Complex gradients are compressed as
    pairs of reals.

    A gradient that is NaN or infinite anywhere decodes to NaN (or that infinity) everywhere, so
    that it is noticed however little of it would have been sent, and the whole shard's memory
    stays what it was: with nonfinite="skip" the step is left out, and so is its error.

    With `memory`, what is held back is itself rounded, to the same bytes whoever encodes:

        e_{t+1} = Q(v_t - decode(payload_t))

    and what Q drops is lost. The memory is stored with every step, so it is most of what travels.

    Paper:
        Seide et al., "1-bit stochastic gradient descent and its application to data-parallel
        distributed training of speech DNNs", Interspeech 2014; Karimireddy et al., "Error
        feedback fixes SignSGD and other gradient compression schemes", arXiv 1901.09847;
        with `memory`, Modoranu et al., "MicroAdam: accurate adaptive optimization with low space
        overhead and provable convergence", arXiv 2405.15593, whose error feedback is quantized, too.

    Deviations:
        The paper's algorithm compresses lr * g + e in each worker; here the step size is applied
        after averaging, by any optimizer, so the memory is of gradients and a change of the
        learning rate rescales what is still held back. A memory belongs to a shard slot, not to a
        worker: "worker k" of the paper is slot k, whoever computes it. Q rounds to nearest, not at
        random as MicroAdam's analysis would have it: what stays below half a level step after step
        never arrives.

    Attributes:
        feedback: whether what a step leaves out is added to the next; set by subclasses.
        memory: number format of what is held back; None: as wide as it was computed. May be set by
            subclasses.
    """

    feedback: bool
    memory: NumberFormat | None = None

    @abstractmethod
    def layout(self, shape: tuple[int, ...], dtype: torch.dtype) -> Layout | None:
        """Return the parts of such a tensor compressed; None if it is to travel as it is.

        A layout that does not save at least 64 bytes is not used either.

        Args:
            shape: of the parameter, with a last dimension of 2 for a complex one; not empty.
            dtype: float32 or float64, in which values are handed to `compress`.
        """

    @abstractmethod
    def compress(
        self,
        name: str,
        values: Tensor,
        state: Mapping[str, Tensor],
        parts: Mapping[str, Tensor],
        *,
        peak: float,
        error: bool,
    ) -> Kept:
        """Compress one tensor.

        Args:
            name: of the parameter, e.g. for a seed.
            values: float32 or float64, finite, in the parameter's shape.
            state: what the last `compress` of this parameter returned; empty at first. These tensors and
                `values` have the layout of fresh ones (`cache.codec.aligned`), so that what is multiplied
                has the same bits wherever it was.
            parts: to be written to: zeros, as `layout` says.
            peak: largest magnitude in `values`.
            error: whether the error is wanted. If so, `values` is the callee's to overwrite
                (and may become the error), else it must not be written to.
        """

    @abstractmethod
    def expand(self, parts: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return the tensor that some parts stand for, in memory of its own.

        Args:
            parts: as `layout` says; their values may be anybody's, and the first starts aligned.
            shape: of the result.
            dtype: float32 or float64, of the result.

        Raises:
            ManifestMismatch: the values make no sense.
        """

    @property
    def stateful(self) -> bool:
        """Whether encoding leaves a memory."""
        return self.feedback

    def ceiling(self, dtype: torch.dtype) -> float:
        """Return the largest magnitude that `compress` can work with; what is larger counts as NaN.

        Args:
            dtype: float32 or float64, of the values.
        """
        return float(torch.finfo(dtype).max)

    @torch.no_grad()
    def encode(self, gradients: Mapping[str, Tensor], residual: Mapping[str, Tensor] | None) -> Encoded:
        """See `Codec.encode`.

        Raises:
            InvalidInput: a parameter has "#" in its name.
            ManifestMismatch: the memory is not this codec's for these parameters.
        """
        held = dict(residual or {})
        memory = _grouped(held)
        sources = {name: self._source(name, g, memory.get(name, {})) for name, g in gradients.items()}
        peaks = _peaks(gradients, sources)
        payload: dict[str, Tensor] = {}
        fresh = {key: value for key, value in held.items() if _owner(key) not in gradients}
        finite = all(map(math.isfinite, peaks.values()))
        for name, gradient in gradients.items():
            source, peak = sources.pop(name), peaks[name]
            if source is None:
                payload[name] = gradient.detach()
            elif not peak <= self.ceiling(source.dtype):  # NaN is not
                finite = False
                payload[_key(name, _NONFINITE)] = source.new_full((), peak)
            else:
                packed, kept = self._packed(name, gradient.dtype, source, memory.get(name, {}), peak)
                payload[_key(name, _PACKED)] = packed
                fresh.update(kept)
        return Encoded(payload, dict(sorted((fresh if finite else held).items())))

    @torch.no_grad()
    def decode(self, payload: Mapping[str, Tensor], like: Shapes) -> dict[str, Tensor]:
        """See `Codec.decode`."""
        known = shapes_of(like)
        found: dict[str, Tensor] = {}
        for key, entry in payload.items():
            name, _, form = key.partition(SEPARATOR)
            shape, dtype = _known(known, name)
            if form == "":
                found[name] = expect(name, entry, shape, dtype)
            elif form == _NONFINITE:
                value = float(expect(key, entry, (), _real((), _WIDE.get(dtype, dtype))[1]))
                value = math.nan if math.isfinite(value) else value
                found[name] = torch.full(shape, value, dtype=dtype, device=entry.device)
            else:
                found[name] = self._unpacked(key, entry, shape, dtype)
        return found

    # --- one tensor -----------------------------------------------------------------------

    def _layout(self, shape: tuple[int, ...], dtype: torch.dtype) -> Layout | None:
        """Return the parts of a gradient, as reals; None for what travels as it is."""
        wide = _WIDE.get(dtype)
        if wide is None or 0 in shape:
            return None
        layout = self.layout(*_real(shape, wide))
        if layout is None or _nbytes(layout) + ALIGNMENT_NBYTES > math.prod(shape) * dtype.itemsize:
            return None
        return layout

    def _source(self, name: str, gradient: Tensor, memory: Mapping[str, Tensor]) -> Tensor | None:
        """Return gradient + memory as reals, contiguous; None for what travels as it is."""
        if SEPARATOR in name:
            raise InvalidInput(f"parameter {name!r} has {SEPARATOR!r} in its name, which compression needs")
        shape = tuple(gradient.shape)
        if self._layout(shape, gradient.dtype) is None:
            if memory:
                raise ManifestMismatch(
                    f"the slot's memory has an entry for {name!r}, which is not compressed"
                )
            return None
        wide = _WIDE[gradient.dtype]
        held = self._held(name, memory, shape, wide)
        if held is not None and not self.feedback:
            raise ManifestMismatch(f"the slot's memory has an entry for {name!r}, but feedback is off")
        if not self.feedback:
            return _as_real(aligned(gradient.detach().to(wide)))
        total = torch.empty(shape, dtype=wide, device=gradient.device)
        if held is None:
            total.copy_(gradient)
        else:
            torch.add(gradient, held.to(gradient.device), out=total)
        return _as_real(total)

    def _held(
        self, name: str, memory: Mapping[str, Tensor], shape: tuple[int, ...], wide: torch.dtype
    ) -> Tensor | None:
        """Return what was held back of a gradient, in its shape and wide dtype; None at first."""
        if (_HELD if self.memory is None else "") in memory:
            raise ManifestMismatch(f"the slot's memory of {name!r} is in another number format")
        if self.memory is None:
            return None if "" not in memory else expect(name, memory[""], shape, wide)
        if _HELD not in memory:
            return None
        real, dtype = _real(shape, wide)
        layout = self.memory.layout(math.prod(real), dtype)
        packed = aligned(expect(_key(name, _HELD), memory[_HELD], (_nbytes(layout),), torch.uint8))
        found = self.memory.unpack(_split(packed, layout), math.prod(real), dtype).view(real)
        return torch.view_as_complex(found) if wide.is_complex else found

    def _kept(self, name: str, error: Tensor, dtype: torch.dtype) -> tuple[str, Tensor]:
        """Return key and value under which an error, as reals, is remembered."""
        if self.memory is None:
            return name, torch.view_as_complex(error) if dtype.is_complex else error
        layout = self.memory.layout(error.numel(), error.dtype)
        packed = torch.zeros(_nbytes(layout), dtype=torch.uint8, device=error.device)
        low, high = torch.aminmax(error)
        peak = float(torch.maximum(-low, high))
        self.memory.pack(error.contiguous(), peak, _split(packed, layout))
        return _key(name, _HELD), packed

    def _packed(
        self, name: str, dtype: torch.dtype, source: Tensor, memory: Mapping[str, Tensor], peak: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return one tensor compressed, and its entries in the next memory."""
        rounded = _real((), dtype)[1] != source.dtype
        state = {part: aligned(value) for part, value in memory.items() if part not in ("", _HELD)}
        layout = self.layout(tuple(source.shape), source.dtype)
        assert layout is not None
        packed = torch.zeros(_nbytes(layout), dtype=torch.uint8, device=source.device)
        parts = _split(packed, layout)
        values = source.clone() if rounded and self.feedback else source
        done = self.compress(name, values, state, parts, peak=peak, error=self.feedback)
        kept = {_key(name, part): value for part, value in done.state.items()}
        if self.feedback:
            error = done.error
            if error is None or rounded:
                error = source.sub_(
                    self.expand(parts, tuple(source.shape), source.dtype).to(_real((), dtype)[1])
                )
            key, value = self._kept(name, error, dtype)
            kept[key] = value
        return packed, kept

    def _unpacked(self, key: str, packed: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return what one compressed tensor stands for."""
        layout = self._layout(shape, dtype)
        if layout is None or not key.endswith(SEPARATOR + _PACKED):
            raise ManifestMismatch(f"{key!r} is not what this compression writes; was another one used?")
        parts = _split(aligned(expect(key, packed, (_nbytes(layout),), torch.uint8)), layout)
        try:
            real = self.expand(parts, *_real(shape, _WIDE[dtype]))
        except ManifestMismatch as error:
            raise ManifestMismatch(f"{key!r} cannot be read: {error}") from error
        return (torch.view_as_complex(real) if dtype.is_complex else real).to(dtype)


# --- helpers ------------------------------------------------------------------------------


def expect(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return the tensor if it has this shape and dtype.

    Raises:
        ManifestMismatch: it has another.
    """
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise ManifestMismatch(
            f"{name!r} is {dtype_name(tensor.dtype)} of shape {tuple(tensor.shape)}, not {dtype_name(dtype)} "
            f"of shape {shape}; was it written with another compression, or by another version?"
        )
    return tensor


def shapes_of(like: Shapes) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return name -> (shape, dtype)."""
    if isinstance(like, Manifest):
        return {spec.name: (spec.shape, dtype_of(spec.dtype)) for spec in like.tensors}
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in like.items()}


def _known(
    known: Mapping[str, tuple[tuple[int, ...], torch.dtype]], name: str
) -> tuple[tuple[int, ...], torch.dtype]:
    if name not in known:
        raise ManifestMismatch(f"the payload has a gradient of {name!r}, which the model does not have")
    return known[name]


def _key(name: str, part: str) -> str:
    return f"{name}{SEPARATOR}{part}"


def _owner(key: str) -> str:
    return key.partition(SEPARATOR)[0]


def _grouped(entries: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return parameter name -> part -> tensor, "" for the entry of the name itself."""
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in entries.items():
        name, _, part = key.partition(SEPARATOR)
        groups.setdefault(name, {})[part] = tensor
    return groups


def _nbytes(layout: Layout) -> int:
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in layout.values())


def _split(packed: Tensor, layout: Layout) -> dict[str, Tensor]:
    """Return the parts as views, the widest elements first, which keeps each part aligned."""
    parts: dict[str, Tensor] = {}
    offset = 0
    for name, (dtype, shape) in sorted(layout.items(), key=lambda item: -item[1][0].itemsize):
        nbytes = math.prod(shape) * dtype.itemsize
        parts[name] = packed[offset : offset + nbytes].view(dtype).view(shape)
        offset += nbytes
    return parts


def _real(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[tuple[int, ...], torch.dtype]:
    """Return shape and dtype of the real view of a complex tensor; the same for a real one."""
    if not dtype.is_complex:
        return shape, dtype
    return (*shape, 2), dtype.to_real()


def _as_real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _peaks(gradients: Mapping[str, Tensor], sources: Mapping[str, Tensor | None]) -> dict[str, float]:
    """Return the largest magnitude of each tensor, NaN if it has one; one wait for a GPU in all."""
    found: dict[str, Tensor] = {}
    for name, gradient in gradients.items():
        source = sources[name]
        if source is None:
            if gradient.numel() == 0 or not (gradient.is_floating_point() or gradient.is_complex()):
                continue
            wide = _WIDE.get(gradient.dtype, torch.float32)
            source = _as_real(gradient.detach().to(wide).resolve_conj())
        low, high = torch.aminmax(source)
        found[name] = torch.maximum(-low, high).double()
    peaks = list(found.values())
    values = torch.stack([peak.to(peaks[0].device) for peak in peaks]).tolist() if peaks else []
    return {**dict.fromkeys(gradients, 0.0), **dict(zip(found, values, strict=True))}
