"""The training server reads gradients while they are on their way, so that the update finds them here.

Between hosts a gradient takes as long to come to the server as it took to leave its Client. While a step is
computed, a thread looks which chunks of it are stored already, of slots that are written and of slots whose
Client tells of its upload (`torchord.cache.blobs.read_ahead`), and reads them into memory of its own. The
update is called and decides as ever: it takes from here what has the checksums that the slot's record names,
and reads the rest. So this thread decides nothing, and whatever goes wrong with it costs only time.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable

from torch import Tensor

from torchord.cache import keys
from torchord.cache.blobs.notice import Notice
from torchord.cache.blobs.read_ahead import ReadAhead
from torchord.cache.blobs.tiered_store import TieredStore
from torchord.cache.errors import CacheError, TorchordError
from torchord.cache.ledger.ledger import Ledger
from torchord.cache.ledger.records import SlotRecord

log = logging.getLogger(__name__)

LEAST_CHUNKS = 2
_LOOKS = 25  # a step, where there is nothing to read
_PAUSES_SECONDS = (0.002, 0.05)
_PATIENCE_SECONDS = 60.0  # without news, or three steps


class GradientDownload:
    """Reads the gradients of one step ahead of its update.

    Args:
        ledger: of the run.
        step: the step.
        roots: numbers of the slots that the update reads.
        chunks: where their bytes are.
        most_nbytes: memory that it may take.
        step_seconds: what a step takes usually.
        wanted: whether anybody still waits for it; asked again and again.
    """

    def __init__(
        self,
        ledger: Ledger,
        step: int,
        roots: Iterable[int],
        chunks: TieredStore,
        *,
        most_nbytes: int,
        step_seconds: float,
        wanted: Callable[[], bool],
    ) -> None:
        self.step = step
        self._ledger = ledger
        self._roots = list(roots)
        self._chunks = chunks
        self._free_nbytes = most_nbytes
        self._pause_seconds = min(max(step_seconds / _LOOKS, _PAUSES_SECONDS[0]), _PAUSES_SECONDS[1])
        self._patience_seconds = max(_PATIENCE_SECONDS, 3 * step_seconds)
        self._wanted = wanted
        self._ahead: dict[int, ReadAhead | None] = {}
        self._whole: set[int] = set()  # those that there is nothing more to read of
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name="torchord-gradient-download", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Read no more; does not wait for what is being read."""
        self._stopped.set()

    def read(self, slot: SlotRecord) -> Tensor:
        """The bytes of a slot: from here as far as they are those that its record names.

        Raises:
            ChunkMissing, ChunkCorrupt, CacheUnreachable: as the chunk store says.
        """
        ahead = self._ahead.get(slot.shard)
        self._ahead[slot.shard] = None  # the thread leaves it alone from now on
        if ahead is not None and not self._chunks.here(slot.blob):
            read = ahead.read_nbytes
            found = ahead.complete(slot.blob)
            if found is not None:
                self._chunks.collected(slot.blob, read)
                return found
        return self._chunks.get(slot.blob)

    # --- in the thread --------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            last = time.monotonic()
            while len(self._whole) < len(self._roots) and time.monotonic() - last < self._patience_seconds:
                if self._stopped.is_set() or not self._wanted():
                    return
                if self._look():
                    last = time.monotonic()
                else:
                    self._stopped.wait(self._pause_seconds)
        except TorchordError as error:
            log.info("gradients of step %d are not read ahead: %s", self.step, error)
        except Exception:  # nothing of this may end a run
            log.warning("gradients of step %d are not read ahead", self.step, exc_info=True)

    def _look(self) -> bool:
        """Read what is new; False if nothing is."""
        open_ones = [root for root in self._roots if root not in self._whole]
        names = {keys.slot_underway(root): root for root in open_ones}
        told, present = self._ledger.underway(list(names), self.step)
        moved = False
        written = [root for root in open_ones if root in present]
        records = self._ledger.some_slots(self.step, written)[0] if written else {}
        for root in open_ones:
            notice = told.get(keys.slot_underway(root))
            if root in present:
                self._whole.add(root)
                record = records.get(root)
                if record is not None and not self._chunks.here(record.blob):
                    moved |= self._follow(root, Notice.all_of(self.step, record.blob))
            elif notice is not None and notice.number == self.step:
                moved |= self._follow(root, notice)
        return moved

    def _follow(self, root: int, notice: Notice) -> bool:
        if self._stopped.is_set():
            return False
        if root not in self._ahead:
            if notice.nbytes < LEAST_CHUNKS * notice.chunk_nbytes or notice.nbytes > self._free_nbytes:
                self._whole.add(root)
                return False
            self._free_nbytes -= notice.nbytes
            made = self._chunks.read_ahead(notice.nbytes, notice.chunk_nbytes)
            self._ahead.setdefault(root, made)
        ahead = self._ahead[root]
        try:
            return ahead is not None and ahead.follow(notice)
        except CacheError as error:  # the update reads it, or finds what is wrong with it
            log.info("slot %d of step %d is not read ahead: %s", root, self.step, error)
            self._whole.add(root)
            return False
