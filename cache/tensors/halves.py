"""A version's layout in two: what moves from one version to the next, and what rests.

Frozen parameters and constant buffers have the same bytes in every version. They lie in a flat buffer of
their own, which is stored and fetched once; each version brings the other tensors alone. The tensors, and
the digest over the whole buffer, are the same in two pieces as in one.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import xxhash
from torch import Tensor

from torchord.cache.errors import ManifestMismatch
from torchord.cache.tensors.codec import Manifest, memory, pack, padded, views
from torchord.cache.tensors.pieces import chunk_count


@dataclass(frozen=True)
class Halves:
    """The layouts of what moves and of what rests.

    Attributes:
        whole: the layout of the state in one buffer.
        resting: bit i is set if tensor i of `whole` rests.
    """

    whole: Manifest
    resting: int

    @classmethod
    def of(cls, whole: Manifest, resting: Container[str]) -> Halves:
        """The halves where the tensors of these names rest."""
        return cls(whole, sum(1 << i for i, spec in enumerate(whole.tensors) if spec.name in resting))

    @cached_property
    def moving_layout(self) -> Manifest:
        """Of the buffer of what moves: its tensors in the order of `whole`."""
        return self._chosen(rests=False)

    @cached_property
    def resting_layout(self) -> Manifest:
        """Of the buffer of what rests."""
        return self._chosen(rests=True)

    def require_lengths(self, moving_nbytes: int, resting_nbytes: int) -> None:
        """Refuse buffers of other lengths than these.

        Raises:
            ManifestMismatch: names the lengths.
        """
        expected = (self.moving_layout.nbytes, self.resting_layout.nbytes)
        if (moving_nbytes, resting_nbytes) != expected or self.resting >> len(self.whole.tensors):
            raise ManifestMismatch(
                f"it has {moving_nbytes} bytes that move and {resting_nbytes} that rest, the model here "
                f"{expected[0]} and {expected[1]}"
            )

    def parted(self, flat: Tensor) -> Tensor:
        """The buffer of what moves, from one of the whole state."""
        tensors, layout = views(flat, self.whole), self.moving_layout
        return pack({spec.name: tensors[spec.name] for spec in layout.tensors}, layout)

    def _chosen(self, *, rests: bool) -> Manifest:
        specs, offset = [], 0
        for i, spec in enumerate(self.whole.tensors):
            if bool(self.resting >> i & 1) == rests:
                specs.append(replace(spec, offset=offset))
                offset = padded(offset + spec.nbytes)
        return Manifest(tuple(specs), offset)


@dataclass(frozen=True)
class Rest:
    """What rests of a run's versions, in this process. It is not to be written to.

    Attributes:
        halves: the layouts.
        digest: of the blob that it was stored as.
        buffer: uint8, 1-D, laid out by `halves.resting_layout`.
    """

    halves: Halves
    digest: str
    buffer: Tensor

    def is_of(self, digest: str, resting: int) -> bool:
        """Whether these are the bytes of a blob with that digest, for the tensors of those bits."""
        return self.digest == digest and self.halves.resting == resting

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Name -> tensor, a view of the buffer."""
        return views(self.buffer, self.halves.resting_layout)


@dataclass(frozen=True)
class VersionBytes:
    """One version's bytes in this process.

    Attributes:
        own: uint8, 1-D: the whole state, or of it what moves.
        rest: the other half; None where `own` is the whole.
    """

    own: Tensor
    rest: Rest | None = None

    def flat(self) -> Tensor:
        """The whole state in one buffer: `own` itself, or new memory."""
        if self.rest is None:
            return self.own
        halves = self.rest.halves
        return pack({**views(self.own, halves.moving_layout), **self.rest.tensors}, halves.whole)


class ChunkSums:
    """The checksums of a flat buffer's chunks, from tensors that lie elsewhere: nothing is packed.

    Args:
        manifest: layout of the buffer.
        chunk_nbytes: length of each chunk but the last.
    """

    def __init__(self, manifest: Manifest, chunk_nbytes: int) -> None:
        self._pieces: list[list[tuple[str, int, int]]] = [
            [] for _ in range(chunk_count(manifest.nbytes, chunk_nbytes))
        ]
        self._sums: list[str] = [""] * len(self._pieces)
        for name, start, stop in _spans(manifest):
            for number in range(start // chunk_nbytes, chunk_count(stop, chunk_nbytes)):
                first, last = max(start, number * chunk_nbytes), min(stop, (number + 1) * chunk_nbytes)
                self._pieces[number].append((name, first - start, last - start))

    def after(self, tensors: Mapping[str, Tensor], changed: Container[str]) -> tuple[str, ...]:
        """The checksums, once some tensors have changed; the first time, of all.

        Args:
            tensors: all of the buffer's, on the CPU.
            changed: names of those that may have other bytes than the time before.
        """
        for number, pieces in enumerate(self._pieces):
            if self._sums[number] and not any(name in changed for name, _, _ in pieces):
                continue
            digest = xxhash.xxh3_64()
            for name, start, stop in pieces:
                digest.update(bits(tensors[name])[start:stop] if name else bytes(stop - start))
            self._sums[number] = digest.hexdigest()
        return tuple(self._sums)


def bits(tensor: Tensor) -> memoryview:
    """A CPU tensor's elements as they lie in a flat buffer; copied only where it is laid out otherwise."""
    return memory(tensor.detach().resolve_conj().resolve_neg().contiguous())


def _spans(manifest: Manifest) -> Iterator[tuple[str, int, int]]:
    """(name, first byte, byte behind the last) of each tensor and, named "", of each gap, in order."""
    end = 0
    for spec in manifest.tensors:
        if spec.offset > end:
            yield "", end, spec.offset
        if spec.nbytes:
            yield spec.name, spec.offset, spec.end
        end = spec.end
    if manifest.nbytes > end:
        yield "", end, manifest.nbytes
