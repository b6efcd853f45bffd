"""Faults that pass are outlived, and those that do not pause the run with the reason: then `resume` goes on.

On a fleet in one process whose clock runs a minute with each look, so that no test waits.
"""

from __future__ import annotations

import errno
import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support import models
from tests.support.one_process import RUN, Fleet, Outcome
from torchord import TrainingConfig
from torchord.cache.errors import CacheError, CacheUnreachable, ChunkMissing
from torchord.cache.files import folder
from torchord.cache.testing.memory_chunks import MemoryChunkStore
from torchord.coordinator.runtime.hindrances import TRIES

CONFIG = TrainingConfig(epochs=2, batch_size=8, shards=2, seed=3, checkpoint_every=3, audit_fraction=0)
RECIPE = models.mlp(size=40, model=partial(models.Mlp, hidden=512), evaluation=None, metrics={})


class Faulty:
    """Fails so often, or for ever, where a test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.times, self.met, self.error, self.at = 0.0, 0, Exception(), ""
        put, written = MemoryChunkStore.put, folder.LocalFiles.write

        def faulty_put(store: MemoryChunkStore, key: str, *args: Any, **kwargs: Any) -> Any:
            self.reach(key)
            return put(store, key, *args, **kwargs)

        def faulty_write(files: folder.LocalFiles, name: str, data: bytes) -> None:
            try:
                self.reach(name)
            except OSError as error:
                raise folder._cannot_write(files.where(name), error) from error
            written(files, name, data)

        monkeypatch.setattr(MemoryChunkStore, "put", faulty_put)
        monkeypatch.setattr(folder.LocalFiles, "write", faulty_write)

    def reach(self, name: str) -> None:
        if self.times > 0 and self.at in name:
            self.times -= 1
            self.met += 1
            raise self.error

    def fail(self, at: str, error: Exception, times: float) -> None:
        self.at, self.error, self.times = at, error, times


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Faulty:
    return Faulty(monkeypatch)


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fleet]:
    monkeypatch.setattr("tests.support.one_process._IDLE_ROUNDS", 200)
    found = Fleet(str(tmp_path / "disturbed"), 2)
    minutes = itertools.count(0, 60)
    for each in (found.server, *(client.lease for client in found.clients)):
        each.hindrances._clock = lambda: float(next(minutes))
    yield found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return Fleet(str(tmp_path_factory.mktemp("undisturbed")), 2).run(RECIPE, CONFIG)


def resumed(fleet: Fleet) -> Outcome:
    """What the run comes to after `Run.resume`."""
    fleet.ledger.transition("running", allowed=("paused",), event="resumed", error=None)
    fleet.post.advance(RUN)
    fleet._until_rest()
    return fleet._outcome()


SPACE = OSError(errno.ENOSPC, "No space left on device")
DENIED = CacheError("cannot store: redis://there answered 'NOPERM'")
WHERE = {
    "the checkpoint": ("version-", SPACE),
    "the ledger's segments": ("ledger", SPACE),
    "a version": ("parameters:", DENIED),
    "a gradient": ("gradient:", DENIED),
    "bytes that are lost again": ("gradient:", ChunkMissing("chunk 0 is gone")),
}


@pytest.mark.parametrize("where", WHERE)
def test_what_passes_is_outlived(fleet: Fleet, faulty: Faulty, undisturbed: Outcome, where: str) -> None:
    faulty.fail(*WHERE[where], times=TRIES - 2)
    found = fleet.run(RECIPE, CONFIG)
    assert faulty.met == TRIES - 2
    assert found.state == "done" and found.bits == undisturbed.bits and found.losses == undisturbed.losses


@pytest.mark.parametrize("where", WHERE)
def test_what_does_not_pauses_the_run(fleet: Fleet, faulty: Faulty, undisturbed: Outcome, where: str) -> None:
    faulty.fail(*WHERE[where], times=float("inf"))
    found = fleet.run(RECIPE, CONFIG)
    assert found.state == "paused" and f"failed {TRIES} times in" in found.error
    assert str(WHERE[where][1]) in found.error and "run.resume() goes on" in found.error
    faulty.times = 0
    found = resumed(fleet)
    assert found.state == "done" and found.bits == undisturbed.bits and found.losses == undisturbed.losses


def test_a_store_that_is_away_is_waited_for(fleet: Fleet, faulty: Faulty, undisturbed: Outcome) -> None:
    faulty.fail("parameters:", CacheUnreachable("no Redis answers"), times=5 * TRIES)
    assert fleet.run(RECIPE, CONFIG).bits == undisturbed.bits
    assert faulty.met == 5 * TRIES
