"""A shard's gradients on their way to the chunk store while the backward still computes the others.

A parameter's gradient is final when the backward has accumulated it, layers before the loss runs out of
work. A hook copies it to its place in the packed buffer then, and a thread stores each chunk that is
complete (`torchord.cache.blobs.upload`). Li et al., "PyTorch Distributed: Experiences on Accelerating Data
Parallel Training", VLDB 2020 (arXiv 2006.15704), overlap in the same way; here a hook's copy is a guess:
before the slot is written every byte is compared with what was to be stored, and what differs is sent again.
So tied parameters, nested backwards, accumulation or a recipe's own hooks cannot change the bits.

It is done only where it can pay: gradients of two chunks and more whose reader does not share this host's
memory, as they are (compression "none", no local steps), computed on the CPU without `compile` (whose
backward hands all gradients over at its end). Which gradients there will be, the shard before has shown.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from torchord.cache.ledger.ledger import Ledger
from torchord.cache.stores.gradients import GradientStore, GradientUpload, StoredGradient
from torchord.cache.tensors.codec import Manifest, TensorSpec, dtype_name
from torchord.coordinator.compute.loss_scale import LossScale
from torchord.coordinator.compute.replica import Replica
from torchord.coordinator.runtime.context import RunContext
from torchord.coordinator.spec.config import TrainingConfig

log = logging.getLogger(__name__)

LEAST_CHUNKS = 2
_MOST_RESTS = 1024


class Outgoing:
    """One shard's gradients while they are computed.

    Args:
        upload: where they go.
        parameters: name -> parameter of the replica that computes.
    """

    def __init__(self, upload: GradientUpload, parameters: Mapping[str, nn.Parameter]) -> None:
        self.upload = upload
        self._parameters = parameters
        self._broken = False

    @contextmanager
    def during_backward(self, scale: LossScale | None) -> Iterator[None]:
        """Hand over gradients as they are accumulated.

        Args:
            scale: what the gradients will be divided by after the backward.
        """
        factor = None if scale is None else 1.0 / scale.scale
        hooks = []
        for name, parameter in self._parameters.items():
            if parameter.requires_grad and self.upload.place(name) is not None:
                register: Any = parameter.register_post_accumulate_grad_hook  # untyped
                hooks.append(register(self._hook(name, factor)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, name: str, factor: float | None) -> Any:
        def accumulated(parameter: Tensor) -> None:
            gradient, place = parameter.grad, self.upload.place(name)
            if gradient is None or place is None or self._broken:
                return
            try:
                with torch.no_grad():
                    if factor is None:
                        place.copy_(gradient)
                    else:
                        torch.mul(gradient, factor, out=place)
                self.upload.written(name)
            except Exception:  # nothing of this may fail a shard: it is stored in the end as ever
                log.warning("gradients are not sent ahead from %s on", name, exc_info=True)
                self._broken = True

        return accumulated


@dataclass
class _Course:
    """What is known of one run in this process.

    Attributes:
        expected: layout of the gradients of the shard before; None if they cannot go ahead.
        nbytes: length of its whole buffer, changed buffers of the model included.
        buffer: what the shard before was sent from.
        misses: guesses that were wrong, in a row.
        resting: shards to come for which none is made.
    """

    expected: tuple[TensorSpec, ...] | None = None
    nbytes: int = 0
    buffer: Tensor | None = None
    misses: int = 0
    resting: int = 0


class GradientUploads:
    """Stores the gradients of one worker process, ahead of their time where that pays.

    Args:
        gradients: where they go.
        ahead: whether any may go ahead.
        announced: whether the training server is told of what is on its way, so that it may read along.
    """

    def __init__(self, gradients: GradientStore, *, ahead: bool, announced: bool = False) -> None:
        self._gradients = gradients
        self._ahead = ahead
        self._announced = announced
        self._courses: WeakKeyDictionary[RunContext, _Course] = WeakKeyDictionary()

    def begin(
        self, context: RunContext, step: int, shard: int, replica: Replica, config: TrainingConfig
    ) -> Outgoing | None:
        """Prepare for a shard that is about to be computed; None if its gradients do not go ahead."""
        course = self._courses.get(context)
        if course is None or course.expected is None or not _may_go_ahead(replica, config):
            return None
        if course.resting:
            course.resting -= 1
            return None
        if not all(_fits(spec, replica.parameters.get(spec.name)) for spec in course.expected):
            return None
        ledger = context.services.ledger(context.run)
        if context.plan().fan_in(step).parent(shard) is not None:
            if self._gradients.chunks.tiered(course.nbytes):  # its sum may be taken on this host
                return None
        elif self._gradients.near(ledger, course.nbytes):
            course.expected = None
            return None
        buffer, course.buffer = course.buffer, None
        if buffer is None or buffer.numel() != course.nbytes:
            buffer = torch.empty(course.nbytes, dtype=torch.uint8)
        upload = self._gradients.upload(
            ledger, step, shard, course.expected, buffer, announced=self._announced
        )
        return Outgoing(upload, replica.parameters)

    def put(
        self,
        outgoing: Outgoing | None,
        context: RunContext,
        ledger: Ledger,
        step: int,
        shard: int,
        tensors: Mapping[str, Tensor],
        count: int,
        server_memory: str | None = None,
    ) -> StoredGradient:
        """Store a shard's tensors, the rest of them where they went ahead.

        Args:
            tensors: gradients, then buffers.
            count: how many of them are gradients.
            server_memory: as for `GradientStore.put`.

        Raises:
            CacheError: that failed.
        """
        course = self._courses.setdefault(context, _Course())
        if outgoing is not None:
            stored = outgoing.upload.finish(tensors)
            if stored is not None:
                course.misses, course.buffer = 0, outgoing.upload.buffer
                return stored
            course.misses += 1
            course.resting = min(_MOST_RESTS, 4**course.misses // 4 - 1)
        near = context.plan().fan_in(step).parent(shard) is None
        stored = self._gradients.put(
            ledger, step, shard, tensors, for_server=near, server_memory=server_memory
        )
        self._learn(course, stored, count)
        return stored

    def _learn(self, course: _Course, stored: StoredGradient, count: int) -> None:
        """Expect of the next shard what this one had."""
        blob = stored.blob
        if not self._ahead or blob.local or blob.data or blob.nbytes < LEAST_CHUNKS * blob.chunk_nbytes:
            course.expected = course.buffer = None
            return
        manifest = Manifest.from_json(stored.manifest)
        course.expected, course.nbytes = manifest.tensors[:count] or None, manifest.nbytes


def _may_go_ahead(replica: Replica, config: TrainingConfig) -> bool:
    plain = config.compression == "none" and config.local_steps == 1 and not config.compile
    return plain and config.micro_batch_size is None and replica.memory is None


def _fits(spec: TensorSpec, parameter: nn.Parameter | None) -> bool:
    """Whether the gradient of a parameter has this place."""
    if parameter is None or not parameter.requires_grad:
        return False
    return spec.shape == tuple(parameter.shape) and spec.dtype == dtype_name(parameter.dtype)
