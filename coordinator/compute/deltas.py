"""Parameters as compressed deltas: how a version follows from the one before in few bytes.

The training server takes its optimizer step, compresses by how much the parameters moved, and goes on
from what everybody else decodes. So *the parameters* of a version are the decoded ones: gradients,
evaluation, prediction, checkpoints and the optimizer's next step all see the same bytes, and a Client
that adds the delta to the version before has exactly them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torchord.cache.blobs.blob import BlobRef
from torchord.cache.errors import CacheError, ManifestMismatch
from torchord.cache.ledger.ledger import Ledger
from torchord.cache.stores.parameters import ParameterCache
from torchord.cache.tensors.codec import Manifest, as_bytes, pack, views
from torchord.cache.tensors.halves import VersionBytes
from torchord.coordinator.compression.codec import Codec
from torchord.coordinator.compute.determinism import pinned
from torchord.coordinator.compute.replica import Replica
from torchord.coordinator.spec.codecs import CodecOf

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Delta:
    """What leads from one version of a run to the next.

    Attributes:
        compression: how the payload is encoded (`TrainingConfig.parameter_compression`).
        payload: by how much the parameters moved, as the codec wrote it; frozen ones are left out.
        buffers: the buffers that changed, whole; on the CPU.
    """

    compression: str
    payload: dict[str, Tensor]
    buffers: dict[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        """All that travels."""
        return {**self.payload, **self.buffers}


@dataclass
class DeltaEncoder:
    """The training server's half; its memory belongs to the version, like the optimizer's state.

    Equation:
        d_t = opt(w_t) - w_t + e_t,   payload_t = C(d_t),   e_{t+1} = d_t - D(payload_t)
        w_{t+1} = w_t + D(payload_t)

    Paper:
        Tang et al., "DoubleSqueeze: parallel stochastic gradient descent with double-pass
        error-compensated compression", arXiv 1905.05957.

    Deviations:
        The paper compresses the averaged gradient on its way back and every worker steps its own copy
        of the optimizer; here the optimizer's step itself is compressed, so that any optimizer will
        do and its state stays on the server. The sum w_t + D is rounded to the parameter's dtype, which is
        not in e.

    Attributes:
        compression: spec of the codec.
        codec: the codec itself.
        memory: e and what else the codec keeps, on the CPU.
    """

    compression: str
    codec: Codec
    memory: dict[str, Tensor] = field(default_factory=dict)

    def encode(
        self, before: Mapping[str, Tensor], parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
    ) -> Delta:
        """Compress a step that was taken, and take it back to what the payload stands for.

        Call with the process pinned. On the CPU whatever the device, like the Clients' half.

        Args:
            before: name -> parameter before the step, on the CPU; not written to. Others may be among them.
            parameters: name -> parameter after the step, any device; set to the decoded value.
            buffers: name -> new value, for those that changed; on the CPU, kept.
        """
        moved: dict[str, Tensor] = {}
        with torch.no_grad():
            for name, parameter in parameters.items():
                after = parameter.detach().cpu()
                if name in self.memory or not torch.equal(before[name], after):
                    moved[name] = after - before[name]
            encoded = self.codec.encode(moved, self.memory)
            self.memory = encoded.residual
            for name, difference in self.codec.decode(encoded.payload, moved).items():
                parameters[name].copy_(before[name] + difference)
        return Delta(self.compression, encoded.payload, dict(buffers))

    def state(self) -> dict[str, Any]:
        """A tree of copies that `load` takes."""
        return {"compression": self.compression, "memory": {k: v.clone() for k, v in self.memory.items()}}

    def load(self, tree: Mapping[str, Any] | None) -> None:
        """Take over what `state` returned; the memory of another codec is set aside."""
        same = tree is not None and tree["compression"] == self.compression
        self.memory = {k: v.clone() for k, v in tree["memory"].items()} if tree is not None and same else {}

    def nbytes(self) -> int:
        """Bytes of the memory."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.memory.values())


def forward(
    replica: Replica,
    parameters: ParameterCache,
    ledger: Ledger,
    version: int,
    codec_of: CodecOf,
) -> bool:
    """Bring a replica from the version that it holds to a later one by their deltas.

    The result is checked against the version's digest: it has the bytes that a download would have
    given, or the replica is left as it is.

    Args:
        codec_of: finds the codec of each delta, see `ResolvedRecipe.codec`.

    Returns:
        Whether the replica holds the version now; if not, it has to be downloaded.
    """
    config, flat = replica.config, replica.flat
    assert flat is not None
    try:
        chain = parameters.deltas(ledger, version, base=replica.digest)
        if chain is None:
            return False
        flat = VersionBytes(flat, replica.rest).flat()
        for record in chain:
            assert record.delta is not None
            delta = Delta(record.delta.compression, *parameters.fetch_delta(record.delta))
            with pinned(config.threads, config.deterministic, replica.device):
                flat = advanced(flat, replica.manifest, delta, codec_of(delta.compression))
    except (CacheError, ManifestMismatch) as error:
        log.warning("version %d of run %s is downloaded whole: %s", version, ledger.run, error)
        return False
    if chain:
        last = chain[-1]
        shown = last.blob if last.rest is None else last.rest.blob
        if BlobRef.of("", as_bytes(flat), shown.chunk_nbytes).digest != last.digest:
            log.warning(
                "version %d of run %s is downloaded whole: this machine decodes its delta to other bytes",
                version,
                ledger.run,
            )
            return False
        rest = replica.rest
        if rest is not None and last.rest is not None and rest.is_of(shown.digest, last.rest.tensors):
            replica.attach(rest.halves.parted(flat), rest)
        else:
            replica.attach(flat)
        replica.digest = last.digest
    return True


def advanced(flat: Tensor, manifest: Manifest, delta: Delta, codec: Codec) -> Tensor:
    """Return the version after the one in `flat`: a Client's half. Call with the process pinned.

    Args:
        flat: 1-D uint8 on the CPU, laid out by the run's manifest; not written to.
        delta: of the version that follows it; its tensors may be views of a received buffer.
        codec: what its payload was encoded with.

    Raises:
        ManifestMismatch: the delta is not of this model, or of another codec.
    """
    tensors = dict(views(flat, manifest))
    with torch.no_grad():
        moved = codec.decode(delta.payload, manifest)
        tensors.update({name: tensors[name] + difference for name, difference in moved.items()})
    tensors.update(delta.buffers)
    return pack(tensors, manifest)
