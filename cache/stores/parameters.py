"""Versioned parameters: published once by the training server, fetched by every worker.

The bytes of a version are a pure function of the run and the version number, so a worker that
holds version v never asks for it again (the process tier); below that lies the chunk store. What rests from
version to version is published once, and fetched by whoever does not hold it.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from torchord.cache import keys
from torchord.cache.blobs.blob import BlobRef
from torchord.cache.blobs.notice import Notice
from torchord.cache.blobs.read_ahead import ReadAhead
from torchord.cache.blobs.tiered_store import TieredStore
from torchord.cache.errors import (
    CacheError,
    ChunkLost,
    ChunkMissing,
    ManifestMismatch,
    RecordDamaged,
    VersionMissing,
)
from torchord.cache.ledger.delta_record import DeltaRecord
from torchord.cache.ledger.ledger import Ledger
from torchord.cache.ledger.records import StateRecord, VersionRecord
from torchord.cache.ledger.rest_record import RestRecord
from torchord.cache.stores.damage import require_fitting, telling
from torchord.cache.stores.trees import get_tree, put_tree
from torchord.cache.tensors.codec import Manifest, as_bytes, layout, pack, views
from torchord.cache.tensors.halves import Halves, Rest, VersionBytes
from torchord.cache.tensors.pieces import checksums, split


@dataclass(frozen=True, slots=True)
class FetchCounters:
    """How fetches were served since the process began.

    Attributes:
        process_hits: the version was loaded already.
        host_hits: another process of this host had read it.
        host_nbytes: bytes of those.
        deltas: differences to the version before that were read in the version's place.
        misses: the version was read from the chunk store.
        nbytes: bytes read from the chunk store.
        seconds: time spent on all of these.
    """

    process_hits: int = 0
    host_hits: int = 0
    host_nbytes: int = 0
    deltas: int = 0
    misses: int = 0
    nbytes: int = 0
    seconds: float = 0.0


class ParameterCache:
    """Publishes and fetches versions.

    Args:
        chunks: where the bytes go.
    """

    def __init__(self, chunks: TieredStore) -> None:
        self.chunks = chunks
        self._lock = threading.Lock()
        self._counters = FetchCounters()

    @property
    def counters(self) -> FetchCounters:
        """A snapshot of the counters."""
        return self._counters

    def publish(
        self,
        ledger: Ledger,
        version: int,
        flat: torch.Tensor,
        *,
        chain: str,
        announced: bool = False,
        rest: RestRecord | None = None,
        digest: str | None = None,
    ) -> VersionRecord:
        """Store the bytes of a version; the commit that follows makes it visible.

        Args:
            flat: uint8, 1-D, laid out by the run's manifest; beside a `rest`, by that of what moves.
            chain: ledger chain of this version; filled in later with `dataclasses.replace`
                when it depends on the digest that this call computes.
            announced: whether Clients are told while it is stored, so that they may read along.
            rest: what the version has beside `flat`; it is stored already.
            digest: of the whole state, beside a `rest`; None: `flat` is the whole.
        """
        key = ledger.keys.parameters_blob(version, uuid.uuid4().hex[:12])

        def tell(ref: BlobRef, stored: Iterable[int]) -> None:
            ledger.announce(keys.PARAMETERS_UNDERWAY, Notice.all_of(version, ref, list(stored)))

        blob = self.chunks.put(
            key,
            flat,
            ttl_seconds=keys.BLOB_TTL_SECONDS,
            inline=True,
            digest=ledger.digest,
            tell=tell if announced else None,
        )
        return VersionRecord(version, blob.digest if digest is None else digest, blob, chain, rest=rest)

    def publish_rest(
        self, ledger: Ledger, buffer: torch.Tensor, tensors: int, *, stored: RestRecord | None
    ) -> RestRecord:
        """Store what rests from version to version, or prolong the life of what is stored.

        Its key follows from its content: whoever stores it again mends every version that names it.

        Args:
            buffer: uint8, 1-D.
            tensors: which tensors of the run's layout these are, as bits.
            stored: where it was stored before, if it is these bytes.
        """
        size = self.chunks.chunk_nbytes
        digest = BlobRef.of("", as_bytes(buffer), size).digest
        if stored is not None and (stored.blob.digest, stored.tensors) == (digest, tensors):
            try:
                self.chunks.touch(stored.blob, keys.BLOB_TTL_SECONDS)
                return stored
            except ChunkLost:
                pass
        key = ledger.keys.rest_blob(digest)
        blob = self.chunks.put(key, buffer, ttl_seconds=keys.BLOB_TTL_SECONDS, digest=ledger.digest)
        return RestRecord(blob, tensors)

    def publish_delta(
        self,
        ledger: Ledger,
        record: VersionRecord,
        before: VersionRecord,
        compression: str,
        payload: Mapping[str, torch.Tensor],
        buffers: Mapping[str, torch.Tensor],
    ) -> VersionRecord:
        """Store how a version follows from the one before and return the record that names it.

        Args:
            payload: the difference as a codec wrote it.
            buffers: buffers that changed, whole.
        """
        tensors = {**payload, **buffers}
        manifest = layout(tensors)
        if not 0 < manifest.nbytes < record.blob.nbytes:
            return record
        key = ledger.keys.delta_blob(record.version, uuid.uuid4().hex[:12])
        flat = pack(tensors, manifest)
        blob = self.chunks.put(key, flat, ttl_seconds=keys.BLOB_TTL_SECONDS, digest=ledger.digest)
        delta = DeltaRecord(before.digest, compression, manifest.to_json(), tuple(buffers), blob)
        return replace(record, delta=delta)

    def deltas(self, ledger: Ledger, version: int, *, base: str) -> list[VersionRecord] | None:
        """The versions whose deltas lead from the parameters with the digest `base` to a version, in order.

        None if there is no such chain, or a download of the version has fewer bytes. Empty if
        the version has the very bytes of `base`.
        """
        found: list[VersionRecord] = []
        nbytes = 0
        while True:
            record = ledger.version(version - len(found))
            if record is None:
                return None
            if record.digest == base:
                return found[::-1]
            if record.delta is None:
                return None
            found.append(record)
            nbytes += record.delta.blob.nbytes
            if nbytes >= found[0].blob.nbytes:
                return None
            if record.delta.base == base:
                return found[::-1]

    def fetch_delta(self, delta: DeltaRecord) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """(difference as the codec wrote it, buffers) of a version, as views of one received buffer."""
        began = time.perf_counter()
        manifest = Manifest.from_json(delta.manifest)
        require_fitting("the difference of two versions", delta.blob, manifest)
        tensors = views(self.chunks.get(delta.blob), manifest)
        if not set(delta.buffers) <= tensors.keys():
            raise ManifestMismatch("the difference of two versions names buffers that it has not")
        buffers = {name: tensors.pop(name) for name in delta.buffers}
        with self._lock:
            c = self._counters
            c = replace(c, deltas=c.deltas + 1, nbytes=c.nbytes + delta.blob.nbytes)
            self._counters = replace(c, seconds=c.seconds + time.perf_counter() - began)
        return tensors, buffers

    def publish_state(self, ledger: Ledger, record: VersionRecord, state: Any) -> VersionRecord:
        """Store the tree of the optimizer's state beside a version and return the record that names it."""
        key = ledger.keys.state_blob(record.version, uuid.uuid4().hex[:12])
        put = partial(
            self.chunks.put,
            key,
            ttl_seconds=keys.BLOB_TTL_SECONDS,
            inline=True,
            shown=False,
            digest=ledger.digest,
        )
        return replace(record, state=put_tree(state, put))

    def fetch_state(self, state: StateRecord) -> Any:
        """The tree of a published state; errors as for `get_tree`."""
        return get_tree("optimizer state", state, self.chunks.get)

    def publish_start(self, ledger: Ledger, weights: Mapping[str, torch.Tensor]) -> StateRecord:
        """Store the weights that a run is to start from, until it ends."""
        key = ledger.keys.start_blob(uuid.uuid4().hex[:12])
        life = keys.BLOB_TTL_SECONDS
        put = partial(self.chunks.put, key, ttl_seconds=life, shown=False, digest=ledger.digest)
        return put_tree(dict(weights), put)

    def fetch_start(self, start: StateRecord) -> dict[str, torch.Tensor]:
        """The weights of `publish_start`; errors as for `get_tree`."""
        found: dict[str, torch.Tensor] = get_tree("weights to start from", start, self.chunks.get)
        return found

    def record(self, ledger: Ledger, version: int) -> VersionRecord:
        """Where a version is, and what its slots kept.

        Raises:
            VersionMissing: it is not stored (any more); the message lists which are.
        """
        try:
            record = ledger.version(version)
        except RecordDamaged as error:  # its training server writes it again, or goes back
            raise VersionMissing(str(error)) from error
        if record is None:
            raise VersionMissing(
                f"version {version} of run {ledger.run!r} is not in the cache; stored: "
                f"{sorted(ledger.versions())}"
            )
        return record

    def fetch(
        self, ledger: Ledger, version: int, *, rest: Rest | None = None, record: VersionRecord | None = None
    ) -> tuple[VersionRecord, torch.Tensor, str]:
        """Read a version into one buffer.

        Args:
            rest, record: as for `fetch_bytes`.

        Returns:
            (record, uint8 tensor of the manifest's length, "host" or "store").

        Raises:
            VersionMissing: if it is not stored (any more).
        """
        record, found, source = self.fetch_bytes(ledger, version, rest=rest, record=record)
        return record, found.flat(), source

    def fetch_bytes(
        self,
        ledger: Ledger,
        version: int,
        *,
        manifest: Manifest | None = None,
        rest: Rest | None = None,
        room: Callable[[int], torch.Tensor | None] = lambda nbytes: None,
        record: VersionRecord | None = None,
        ahead: Callable[[BlobRef], ReadAhead | None] | None = None,
    ) -> tuple[VersionRecord, VersionBytes, str]:
        """Read a version: what moves, and of what rests what is not here.

        Args:
            manifest: the layout that is expected; None: the run's.
            rest: what the caller holds of what rests, or may; compared where its digest is another.
            room: preallocated uint8 buffer of a length, to read what moves into; None: new memory.
            record: where it is, if that is known already.
            ahead: finds what was read of it before it was committed.

        Returns:
            (record, its bytes, "host" or "store").

        Raises:
            VersionMissing: if it is not stored (any more).
            ManifestMismatch: it is not laid out by `manifest`.
        """
        began = time.perf_counter()
        if record is None or record.version != version:
            record = self.record(ledger, version)
        what, nbytes = f"version {version} of run {ledger.run!r}", record.blob.nbytes
        beside = None
        if record.rest is None:
            if manifest is not None and nbytes != manifest.nbytes:
                raise ManifestMismatch(
                    f"{what} has {nbytes} bytes, the model here {manifest.nbytes}; this worker runs other "
                    "code than the run's"
                )
        else:
            whole = Manifest.from_json(ledger.manifest()) if manifest is None else manifest
            beside = self._rest(what, record.rest, whole, nbytes, rest)
        layout_of = ledger.manifest if beside is None else beside.halves.moving_layout.to_json
        with _lost(what, record.blob, layout_of):
            flat, source = self.chunks.get_from(record.blob, room(nbytes), ahead and ahead(record.blob))
        seconds = time.perf_counter() - began
        with self._lock:
            c = self._counters
            if source == "host":
                c = replace(c, host_hits=c.host_hits + 1, host_nbytes=c.host_nbytes + nbytes)
            else:
                c = replace(c, misses=c.misses + 1, nbytes=c.nbytes + nbytes)
            self._counters = replace(c, seconds=c.seconds + seconds)
        return record, VersionBytes(flat, beside), source

    def _rest(
        self, what: str, record: RestRecord, whole: Manifest, moving_nbytes: int, held: Rest | None
    ) -> Rest:
        """What rests of a version: what is held, else what is made of that, else what is downloaded."""
        blob = record.blob
        same = held is not None and held.is_of(blob.digest, record.tensors)
        halves = held.halves if held is not None and same else Halves(whole, record.tensors)
        try:
            halves.require_lengths(moving_nbytes, blob.nbytes)
        except ManifestMismatch as error:
            raise ManifestMismatch(f"{what}: {error}; this worker runs other code than the run's") from error
        if held is not None and same:
            return held
        found = None if held is None or self.chunks.here(blob) else _among(held, halves, blob)
        if found is None:
            with _lost(what, blob, halves.resting_layout.to_json):
                found, source = self.chunks.get_from(blob)
            if source == "store":
                with self._lock:
                    self._counters = replace(self._counters, nbytes=self._counters.nbytes + blob.nbytes)
        return Rest(halves, blob.digest, found)

    def hit(self) -> None:
        """Count a fetch that the process tier answered."""
        with self._lock:
            self._counters = replace(self._counters, process_hits=self._counters.process_hits + 1)

    def keep(self, record: VersionRecord) -> None:
        """Give the bytes of a run's last version the life of its results."""
        for blob in record.blobs():
            self.chunks.touch(blob, keys.RESULT_TTL_SECONDS)

    def drop(self, ledger: Ledger, versions: Iterable[int], *, token: int) -> None:
        """Forget versions and delete their bytes, unless another server has taken the run over."""
        doomed = list(versions)
        if not doomed:
            return
        stored = ledger.versions()
        if not ledger.drop_versions(doomed, token=token):
            return
        gone = [stored.pop(version) for version in doomed if version in stored]
        kept = {blob.key for record in stored.values() for blob in record.blobs()}
        refs = {blob.key: blob for record in gone for blob in record.blobs() if blob.key not in kept}
        try:
            self.chunks.delete(refs.values())
        except CacheError:
            return  # the chunks carry a TTL; a node that is away loses them by itself

    def outlived(
        self, ledger: Ledger, dropped: Iterable[VersionRecord], present: VersionRecord
    ) -> list[BlobRef]:
        """The bytes of versions without slots that a commit dropped, but for what others share with them.

        Args:
            present: the newest version.
        """
        gone = list(dropped)
        shared = {blob.key: blob for record in gone for blob in record.shared_blobs()}
        for blob in present.shared_blobs():
            shared.pop(blob.key, None)
        if shared:  # what rests has changed; an older version may be kept that has it still
            for record in ledger.versions().values():
                for blob in record.shared_blobs():
                    shared.pop(blob.key, None)
        own = [blob for record in gone for blob in replace(record, rest=None).blobs()]
        return [*own, *shared.values()]


@contextmanager
def _lost(what: str, blob: BlobRef, manifest: Callable[[], Mapping[str, Any]]) -> Iterator[None]:
    """Have errors about a version's bytes say whose they are."""
    try:
        with telling(what, blob, manifest):
            yield
    except ChunkMissing as error:
        raise VersionMissing(f"a chunk is lost: {error}") from error


def _among(held: Rest, halves: Halves, blob: BlobRef) -> torch.Tensor | None:
    """The bytes of what rests, where all of it is among what is held (some of which moves by now)."""
    wanted = {spec.name: held.tensors.get(spec.name) for spec in halves.resting_layout.tensors}
    tensors = {name: tensor for name, tensor in wanted.items() if tensor is not None}
    if len(tensors) < len(wanted):
        return None
    found = pack(tensors, halves.resting_layout)
    return found if checksums(split(as_bytes(found), blob.chunk_nbytes)) == blob.checksums else None
