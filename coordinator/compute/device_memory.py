"""Copies between the host and a device: few, asynchronous, on a stream of their own.

A version arrives as one flat buffer of host bytes and goes to the device in one (page-locked source) or a
few pieces (any other source); gradients leave the device packed into one flat buffer, by one copy. The
*copy stream* does both, ordered against the *compute stream* by events, so that the host waits once for
each shard: for the bytes that it is about to send.

    version:   host bytes ──staged──▶ page-locked ──copy stream──▶ device, flat ──compute stream──▶ model
    gradient:  .grad ──compute stream──▶ device, flat ──copy stream──▶ page-locked ──one wait──▶ bytes

What a device can do is the `Copies` interface; `CudaCopies` is CUDA's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from torchord.cache.tensors.codec import Manifest, layout, pack, views
from torchord.cache.tensors.pinned import host_memory

_cuda: Any = torch.cuda  # partly untyped

STAGE_NBYTES = 4 << 20
STAGES = 4
"""A source that is not page-locked is copied through so many page-locked pieces of that length."""


class Mark(Protocol):
    """A point in the copy stream."""

    def synchronize(self) -> None:
        """Wait until everything before it is done."""


class Copies(Protocol):
    """What a device offers for moving bytes. Buffers are 1-D and uint8."""

    def host(self, nbytes: int) -> Tensor:
        """New host memory, page-locked if possible; it may be dropped before copies of it are done."""

    def device_buffer(self, nbytes: int) -> Tensor:
        """New memory on the device."""

    def pinned(self, buffer: Tensor) -> bool:
        """Whether host memory is page-locked: a copy of it does not wait."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Enqueue a copy in the copy stream, between the host and the device either way."""

    def after_compute(self) -> None:
        """Let the copies enqueued from now on wait for the computation enqueued so far."""

    def before_compute(self) -> None:
        """Let the computation enqueued from now on wait for the copies enqueued so far."""

    def mark(self) -> Mark:
        """The present end of the copy stream."""


class CudaCopies:
    """CUDA's copies, on a stream of their own.

    Args:
        device: the CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: Any = _cuda.Stream(device)

    def host(self, nbytes: int) -> Tensor:
        """New host memory, page-locked if possible; torch reuses it when its copies are done."""
        return host_memory(nbytes)

    def device_buffer(self, nbytes: int) -> Tensor:
        """New memory on the device."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def pinned(self, buffer: Tensor) -> bool:
        """Whether host memory is page-locked."""
        return buffer.is_pinned()

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Enqueue a copy in the copy stream; returns when it is done if the host side is pageable."""
        with _cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def after_compute(self) -> None:
        """Let the copy stream wait for the current stream."""
        self._stream.wait_stream(_cuda.current_stream(self.device))

    def before_compute(self) -> None:
        """Let the current stream wait for the copy stream."""
        _cuda.current_stream(self.device).wait_stream(self._stream)

    def mark(self) -> Mark:
        """An event at the end of the copy stream; a process that waits for it sleeps."""
        event: Mark = _cuda.Event(blocking=True)
        self._stream.record_event(event)
        return event


class DeviceMemory:
    """A model's flat buffers on a device, and the traffic between them and the host.

    One thread at a time. It holds device memory for one version and for the largest set of tensors
    that was gathered or scattered.

    Args:
        copies: what the device can do.
    """

    def __init__(self, copies: Copies) -> None:
        self.copies = copies
        self._version: Tensor | None = None
        self._outbox: Tensor | None = None
        self._inbox: Tensor | None = None
        self._uploaded: Mark | None = None
        self._stages: list[tuple[Tensor, Mark | None]] = []

    def upload(self, source: Tensor) -> Tensor:
        """Bring a version's bytes to the device. Does not wait.

        Args:
            source: 1-D uint8 on the CPU. A page-locked one is copied from where it is and must not
                change before `landing` has returned; any other is done with when this returns.

        Returns:
            The bytes on the device, for the computation that is enqueued from now on; the same memory
            each time, so that the version before is gone.
        """
        if self._version is None or self._version.numel() != source.numel():
            self._version = self.copies.device_buffer(source.numel())
        self.copies.after_compute()  # which may still read the version before
        if self.copies.pinned(source):
            self.copies.copy(self._version, source)
        else:
            self._staged(self._version, source)
        self._uploaded = self.copies.mark()
        self.copies.before_compute()
        return self._version

    def landing(self, nbytes: int, held: Tensor | None) -> Tensor:
        """Page-locked memory to receive a version in, from where `upload` needs no further copy.

        Args:
            held: what the last version was received in: used again if it is such memory, once its
                upload is done.
        """
        if self._uploaded is not None:
            self._uploaded.synchronize()
        if held is not None and held.numel() == nbytes and self.copies.pinned(held):
            return held
        return self.copies.host(nbytes)

    def gather(self, tensors: Mapping[str, Tensor], manifest: Manifest | None = None) -> Tensor:
        """Bring tensors from the device to the host, by one copy and one wait.

        Args:
            tensors: name -> tensor, as the computation enqueued so far leaves it; any strides.
            manifest: their layout, if it is known.

        Returns:
            1-D uint8 on the CPU, laid out by `manifest` (or by `layout(tensors)`) with its gaps zero;
            new memory, the caller's own, complete.
        """
        manifest = layout(tensors) if manifest is None else manifest
        self._outbox = self._room(self._outbox, manifest.nbytes)
        packed = pack(tensors, manifest, self._outbox[: manifest.nbytes])
        host = self.copies.host(manifest.nbytes)
        self.copies.after_compute()
        self.copies.copy(host, packed)
        self.copies.mark().synchronize()
        return host

    def scatter(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Bring tensors from the host to the device, by one copy. Does not wait.

        Args:
            tensors: name -> tensor on the CPU; any strides.

        Returns:
            name -> tensor on the device, contiguous, for the computation that is enqueued from now on;
            the next call uses their memory again.
        """
        manifest = layout(tensors)
        host = pack(tensors, manifest, self.copies.host(manifest.nbytes))
        self._inbox = self._room(self._inbox, manifest.nbytes)
        self.copies.after_compute()
        self.copies.copy(self._inbox[: manifest.nbytes], host)
        self.copies.before_compute()
        return views(self._inbox[: manifest.nbytes], manifest)

    def _room(self, buffer: Tensor | None, nbytes: int) -> Tensor:
        enough = buffer is not None and buffer.numel() >= nbytes
        return buffer if enough and buffer is not None else self.copies.device_buffer(nbytes)

    def _staged(self, target: Tensor, source: Tensor) -> None:
        """Copy through page-locked pieces in turn, each written to again once its copy is done."""
        if not self._stages:
            self._stages = [(self.copies.host(STAGE_NBYTES), None) for _ in range(STAGES)]
        if not self.copies.pinned(self._stages[0][0]):
            self.copies.copy(target, source)
            return
        for number, start in enumerate(range(0, source.numel(), STAGE_NBYTES)):
            piece = source[start : start + STAGE_NBYTES]
            stage, copied = self._stages[number % STAGES]
            if copied is not None:
                copied.synchronize()
            stage[: piece.numel()].copy_(piece)
            self.copies.copy(target[start : start + piece.numel()], stage[: piece.numel()])
            self._stages[number % STAGES] = (stage, self.copies.mark())
