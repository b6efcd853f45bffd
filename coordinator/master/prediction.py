"""Prediction by the workers: inputs out as parts, outputs back in input order."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torchord.cache import keys
from torchord.cache.blobs.chunk_store import BlobRef
from torchord.cache.errors import (
    ChunkMissing,
    InvalidInput,
    NoWorker,
    RunFailed,
    VersionMissing,
    WaitTimeout,
)
from torchord.cache.ledger.ledger import Ledger
from torchord.coordinator.local_cluster.starting import coming, starting
from torchord.coordinator.messages.task_names import GRADIENTS, PREDICT, UPDATES, worker_command

if TYPE_CHECKING:
    import torch

    from torchord.coordinator.messages.sender import Sender
    from torchord.coordinator.runtime.services import Services

_WINDOW = 16  # parts in flight: bounds the cache's memory whatever the input's length
_POLL_SECONDS = 0.01
_RESEND_SECONDS = 10.0
_ALONE_SECONDS = 3.0  # longer than the lease of a worker that died
_PIN_SECONDS = 600.0


def predict(
    services: Services,
    sender: Sender,
    ledger: Ledger,
    inputs: Any,
    *,
    batch_size: int,
    version: int,
    timeout_seconds: float | None,
) -> Any:
    """See `Run.predict`."""
    import torch

    from torchord.cache.tensors import tree
    from torchord.cache.tensors.codec import Manifest, layout, pack, views

    if type(batch_size) is not int or batch_size < 1:
        raise InvalidInput(f"batch_size must be a whole number of examples, at least 1, got {batch_size!r}")
    if ledger.version(version) is None:
        raise VersionMissing(
            f"version {version} of run {ledger.run!r} is not in the cache; stored: "
            f"{sorted(ledger.versions())}. Predict from one of these, or from the newest (version=None)"
        )
    request = uuid.uuid4().hex[:12]
    waiting = _batches(inputs, batch_size)
    sent: dict[int, tuple[torch.Tensor, dict[str, Any]]] = {}  # part -> its inputs' bytes, its message
    kwargs: dict[str, Any]
    done: dict[int, Any] = {}
    number = 0
    exhausted = False
    began = time.monotonic()
    progressed = looked = began
    ledger.pin(version, seconds=_PIN_SECONDS)
    pinned = began
    try:
        while not exhausted or sent:
            while not exhausted and len(sent) < _WINDOW:
                batch = next(waiting, None)
                if batch is None:
                    exhausted = True
                    break
                skeleton, tensors = tree.flatten(batch)
                manifest = layout(tensors)
                key = ledger.keys.predict_blob(request, number, "inputs")
                packed = pack(tensors, manifest)
                blob = services.chunks.put(key, packed, ttl_seconds=keys.PREDICT_TTL_SECONDS)
                reference = {"blob": blob.to_json(), "manifest": manifest.to_json(), "skeleton": skeleton}
                kwargs = {"run": ledger.run, "version": version, "request": request, "part": number}
                kwargs["inputs"] = reference
                sender.send(PREDICT, kwargs, queue=GRADIENTS, hidden="inputs")
                sent[number] = (packed, kwargs)
                number += 1
            for part, answer in ledger.outputs(request).items():
                if part not in sent:
                    continue
                if "error" in answer:
                    raise RunFailed(f"prediction from run {ledger.run!r}: {answer['error']}")
                blob = BlobRef.from_json(answer["blob"])
                found = views(services.chunks.get(blob), Manifest.from_json(answer["manifest"]))
                done[part] = tree.unflatten(answer["skeleton"], found)
                services.chunks.delete([blob, BlobRef.from_json(sent[part][1]["inputs"]["blob"])])
                del sent[part]
                progressed = time.monotonic()
            now = time.monotonic()
            if now - pinned > _PIN_SECONDS / 2:
                ledger.pin(version, seconds=_PIN_SECONDS)
                pinned = now
            if timeout_seconds is not None and now - began > timeout_seconds:
                raise WaitTimeout(
                    f"prediction from run {ledger.run!r}: {len(done)} parts in {timeout_seconds:g} s"
                )
            if sent and now - max(progressed, looked) > _ALONE_SECONDS:
                looked = now
                started = starting(services.settings.url)  # before the registry, see there
                if not services.registry.consumers(GRADIENTS) and not coming(started, [GRADIENTS]):
                    raise NoWorker(
                        f"no worker is consuming queue {GRADIENTS!r}; start one: {worker_command(GRADIENTS)}"
                    )
            if sent and now - progressed > _RESEND_SECONDS:
                _require_version(services, sender, ledger, version)
                for packed, kwargs in sent.values():  # a worker may have died with one; each is written once
                    _keep_stored(services, BlobRef.from_json(kwargs["inputs"]["blob"]), packed)
                    sender.send(PREDICT, kwargs, queue=GRADIENTS, hidden="inputs")
                progressed = now
            if sent:
                time.sleep(_POLL_SECONDS)
    finally:
        ledger.drop_outputs(request)
        services.chunks.delete(BlobRef.from_json(kwargs["inputs"]["blob"]) for _, kwargs in sent.values())
    if not done:
        raise InvalidInput("predict() was given no examples")
    return _joined([done[part] for part in range(number)], torch)


def _require_version(services: Services, sender: Sender, ledger: Ledger, version: int) -> None:
    """Make sure that the workers can load the version, which they may have tried in vain.

    Raises:
        VersionMissing: it is lost, and no training server can store it again.
    """
    try:
        services.chunks.touch(services.parameters.record(ledger, version).blob, keys.BLOB_TTL_SECONDS)
    except (VersionMissing, ChunkMissing) as error:
        head = ledger.head()
        if isinstance(error, VersionMissing) or head.status != "running" or head.version != version:
            raise VersionMissing(
                f"version {version} of run {ledger.run!r} was lost while workers predicted from it: {error}. "
                "Predict from another version, or load a checkpoint with run.model(version)"
            ) from error
        sender.advance(ledger.run, queue=head.queue or UPDATES)


def _keep_stored(services: Services, blob: BlobRef, packed: torch.Tensor) -> None:
    """Have a part's inputs live on; stored again, under their name, if they were lost."""
    try:
        services.chunks.touch(blob, keys.PREDICT_TTL_SECONDS)
    except ChunkMissing:
        services.chunks.put(blob.key, packed, ttl_seconds=keys.PREDICT_TTL_SECONDS)


def _batches(inputs: Any, batch_size: int) -> Iterator[Any]:
    """Inputs cut into batches, in order."""
    import torch
    from torch.utils.data import default_collate

    if isinstance(inputs, torch.Tensor):
        if inputs.ndim == 0:
            raise InvalidInput(
                "predict() takes a tensor whose first dimension counts examples, got a 0-d tensor"
            )
        for batch in torch.split(inputs.detach().cpu(), batch_size):
            if len(batch):
                yield batch
        return
    if not hasattr(inputs, "__getitem__") or not hasattr(inputs, "__len__"):
        raise InvalidInput(f"predict() takes a tensor or a map-style Dataset, got {type(inputs).__name__}")
    for first in range(0, len(inputs), batch_size):
        samples = [inputs[i] for i in range(first, min(first + batch_size, len(inputs)))]
        inner = [s[0] if isinstance(s, (tuple, list)) else s for s in samples]
        yield default_collate(inner)


def _joined(parts: list[Any], torch: Any) -> Any:
    """Outputs of all parts as one value of the same form."""
    first = parts[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(parts) if first.ndim else torch.stack(parts)
    if isinstance(first, dict):
        return {name: _joined([part[name] for part in parts], torch) for name in first}
    if isinstance(first, (list, tuple)):
        return type(first)(_joined([part[i] for part in parts], torch) for i in range(len(first)))
    return parts
