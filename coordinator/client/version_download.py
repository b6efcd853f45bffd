"""A Client reads the next version while the training server still stores it.

Between hosts a version takes as long to a Client as it took from the server. A Client that has written its
slot and shares no memory with the server looks whether the server tells of a version on its way
(`torchord.cache.blobs.read_ahead`) and reads the chunks that are stored: into the host's tier, where all
Clients of the host find it, or into memory of its own. It is used only if the ledger then names a version of
the same checksums; a version that is never committed was read in vain.
"""

from __future__ import annotations

import logging
import threading
import time
from weakref import WeakKeyDictionary

from torch import Tensor

from torchord.cache.blobs.blob import BlobRef
from torchord.cache.blobs.notice import Notice
from torchord.cache.blobs.read_ahead import ReadAhead
from torchord.cache.blobs.tiered_store import TieredStore
from torchord.cache.errors import CacheError, TorchordError
from torchord.cache.keys import PARAMETERS_UNDERWAY
from torchord.cache.ledger.ledger import Ledger
from torchord.coordinator.runtime.context import RunContext

log = logging.getLogger(__name__)

LEAST_CHUNKS = 2
_PAUSES_SECONDS = (0.004, 0.05)
_NEXT_PAUSE_SECONDS = 0.002  # while it comes
_PATIENCE_SECONDS = 120.0  # for the first notice
_STALL_SECONDS = 3.0  # between two chunks


class VersionDownload:
    """One worker process's versions on their way; at most one a run.

    Args:
        chunks: where they are read from.
        on: whether any are read ahead.
    """

    def __init__(self, chunks: TieredStore, *, on: bool) -> None:
        self._chunks = chunks
        self._on = on
        self._following: WeakKeyDictionary[RunContext, _Arrival] = WeakKeyDictionary()

    def idle(self, context: RunContext, server_memory: str | None) -> None:
        """Called after a shard's slot was written: look out for the next version, if that can pay.

        Args:
            server_memory: what `Ledger.server_memory` says; None: not known.
        """
        held = context.loaded
        if not self._on or held is None or context.config.parameter_compression != "none":
            return
        replica = context.replica()
        if replica.flat is None:
            return
        nbytes = replica.flat.numel()  # of the next version, too, unless what rests changes
        if nbytes < LEAST_CHUNKS * self._chunks.chunk_nbytes:
            return
        if self._chunks.tiered(nbytes):
            if server_memory in (None, self._chunks.memory_id):
                return
        elif replica.memory is not None:  # it would not be page-locked
            return
        present = self._following.get(context)
        if present is not None and present.after == held and present.alive:
            return
        if present is not None:
            present.stop()
        ledger = context.services.ledger(context.run)
        self._following[context] = _Arrival(self._chunks, ledger, held, nbytes)

    def take(self, context: RunContext, ref: BlobRef) -> ReadAhead | None:
        """What this process has read of a version, which is needed now; None if nothing."""
        found = self._following.pop(context, None)
        return None if found is None else found.end(ref)


class _Arrival:
    """The version after one, as it comes."""

    def __init__(self, chunks: TieredStore, ledger: Ledger, after: int, nbytes: int) -> None:
        self.after = after
        self._chunks = chunks
        self._ledger = ledger
        self._nbytes = nbytes
        self._ahead: ReadAhead | None = None
        self._mapped: Tensor | None = None  # keeps the host's tier from letting it go
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="torchord-version-download", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether it still looks out."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """Read no more; does not wait for what is being read."""
        self._stopped.set()

    def end(self, ref: BlobRef) -> ReadAhead | None:
        """Hand over what is in memory of this process.

        In the host's tier the thread goes on: whoever fetches the version from there waits for it.
        """
        with self._lock:
            if not self._chunks.tiered(ref.nbytes):
                self.stop()
            return self._ahead

    # --- in the thread --------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            notice = self._await()
            ref = None if notice is None else notice.ref
            if notice is None or ref is None:
                return
            if self._chunks.host is not None and self._chunks.tiered(ref.nbytes):
                first = notice
                self._mapped = self._chunks.host.fetch(
                    ref,
                    lambda view: self._follow(
                        first, self._chunks.read_ahead(ref.nbytes, ref.chunk_nbytes, view)
                    ),
                )
            else:
                ahead = self._chunks.read_ahead(ref.nbytes, ref.chunk_nbytes)
                with self._lock:
                    if self._stopped.is_set():  # it was needed before it was heard of: once is enough
                        return
                    self._ahead = ahead
                self._follow(notice, ahead)
        except TorchordError as error:
            log.info("no version after %d is read ahead: %s", self.after, error)
        except Exception:  # nothing of this may end a worker
            log.warning("no version after %d is read ahead", self.after, exc_info=True)

    def _await(self) -> Notice | None:
        """The first notice of a later version; None if none comes."""
        began = time.monotonic()
        while not self._stopped.is_set():
            notice = self._look()
            if notice is not None and notice.number > self.after:
                return notice if notice.nbytes == self._nbytes else None
            waited = time.monotonic() - began
            if waited > _PATIENCE_SECONDS:
                return None
            self._stopped.wait(min(max(waited / 50, _PAUSES_SECONDS[0]), _PAUSES_SECONDS[1]))
        return None

    def _follow(self, notice: Notice, ahead: ReadAhead) -> None:
        """Read a version to its end.

        Raises:
            CacheError: it does not come to its end, or is not wanted any more.
        """
        key, last = notice.key, time.monotonic()
        while True:
            moved = ahead.follow(notice)
            if notice.whole and not moved:
                return
            if moved:
                last = time.monotonic()
            elif self._stopped.is_set() or time.monotonic() - last > _STALL_SECONDS:
                raise CacheError(f"version {notice.number} does not come to its end")
            else:
                self._stopped.wait(_NEXT_PAUSE_SECONDS)
            later = self._look()
            if later is None or later.key != key:
                raise CacheError(f"version {notice.number} was overtaken on its way")
            notice = later

    def _look(self) -> Notice | None:
        told, _ = self._ledger.underway([PARAMETERS_UNDERWAY], self.after)
        return told.get(PARAMETERS_UNDERWAY)
