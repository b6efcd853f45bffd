"""The bytes of a version are lost before it was evaluated: the run goes on, and says what it could not do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cache.connection import WORKER_PATIENCE_SECONDS
from cache.errors import CacheUnreachable, ChunkMissing
from cache.settings import Settings
from coordinator import Master, Run, TrainingConfig
from tests.support import models, reference
from tests.support.shuffle import Post, Shuffle

# Six steps of two shards; versions 2, 4 and 6 are evaluated, each in two parts.
CONFIG = TrainingConfig(epochs=1, batch_size=8, shards=2, seed=3, evaluate_every=2)
SIZE, LAST = 48, 6


class EvaluatingPost(Post):
    """Keeps the parts of evaluations, too."""

    def __init__(self) -> None:
        super().__init__(callbacks=1)
        self.parts: list[tuple[int, int, int]] = []  # waiting (version, part, parts)

    def evaluation(self, run: str, version: int, parts: Any, of: int) -> None:
        self.parts += [(version, part, of) for part in parts]


class Laboratory(Shuffle):
    """Trains on the first Client and evaluates on the second.

    Attributes:
        statuses: of each delivery of a part of an evaluation, in order.
    """

    def __init__(self, settings: Settings, run: Run) -> None:
        super().__init__(settings, run, None)
        self.post = EvaluatingPost()
        self.statuses: list[str] = []
        for process in (*self.clients, self.server):
            process.sender = self.post

    def train_to(self, version: int) -> None:
        """Deliver everything but evaluations until a version is committed and its commit's work is done."""
        while self.run._ledger.head().version < version or self.post.callbacks:
            self._in_order()

    def evaluate(self, client: int = 1) -> None:
        """Deliver the first part that waits, and the calls that it leads to."""
        version, part, of = self.post.parts.pop(0)
        self.statuses.append(self.clients[client].evaluate(self.run.name, version, part, of)["status"])
        while self.post.callbacks:
            self.post.callbacks -= 1
            self.server.advance(self.run.name)

    def lose(self, version: int) -> None:
        """Delete a version's bytes from the cache."""
        record = self.run._ledger.version(version)
        assert record is not None
        self.server.services.chunks.delete(record.blobs())

    def events(self, kind: str) -> list[dict[str, Any]]:
        """What the run's events of a kind say."""
        return [event.data for event in self.run._ledger.read_events() if event.type == kind]


@pytest.fixture
def start(redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Laboratory]:
    monkeypatch.setattr("cache.tiered.INLINE_NBYTES", 0)  # bytes inside a record are lost with it only
    monkeypatch.setattr("coordinator.client._REFUSAL_SECONDS", (0.0, 0.0))
    recipe = models.mlp(SIZE)

    def make(name: str) -> Laboratory:
        master = Master(redis_url, checkpoint_dir=str(tmp_path))
        run = master.submit(recipe, CONFIG, name=name)
        return Laboratory(Settings(url=redis_url, checkpoint_dir=str(tmp_path)), run)

    return make


@pytest.fixture
def expected(start: Callable[[str], Laboratory]) -> tuple[Any, dict[int, Any]]:
    """Bits and evaluations of a run that nothing happens to."""
    lab = start("quiet")
    for version in range(1, LAST + 1):
        lab.train_to(version)
        while lab.post.parts:
            lab.evaluate()
    assert lab.run.status().state == "done"
    assert set(lab.statuses) == {"written", "complete"}
    found = lab.run.evaluations()
    assert list(found) == [2, 4, 6]
    return reference.bits(lab.run.model()), found


def test_an_earlier_version_is_lost(start: Callable[[str], Laboratory], expected: Any) -> None:
    """Its evaluation is given up with an event; the run ends with the same bits and the other ones."""
    bits, evaluations = expected
    lab = start("earlier")
    lab.train_to(3)
    lab.evaluate()  # one of the two parts is in
    lab.train_to(4)
    lab.lose(2)
    lab.evaluate(client=0)  # the other one holds the version still
    while lab.post.parts:
        lab.evaluate()
    lab.train_to(LAST)
    while lab.post.parts:
        lab.evaluate()
    assert lab.statuses == ["written", "version lost", "written", "complete", "written", "complete"]
    assert lab.run.status().state == "done"
    assert reference.bits(lab.run.model()) == bits
    assert lab.run.evaluations() == {version: evaluations[version] for version in (4, 6)}
    (lost,) = lab.events("evaluation lost")
    assert lost["version"] == 2
    assert "version 2 cannot be evaluated any more" in lost["message"]
    assert lab.run.verify().ok


def test_the_run_waits_for_nothing_but_it(start: Callable[[str], Laboratory], expected: Any) -> None:
    """All other evaluations are in: giving it up calls the training server, which ends the run."""
    bits, evaluations = expected
    lab = start("waits")
    lab.train_to(LAST)
    last = [message for message in lab.post.parts if message[0] != 2]
    first = [message for message in lab.post.parts if message[0] == 2]
    lab.post.parts = last + first
    lab.lose(2)
    for _ in last:
        lab.evaluate()
    assert lab.run.status().state == "running"
    lab.evaluate()
    assert lab.run.status().state == "done"
    lab.evaluate()
    assert lab.statuses[-2:] == ["version lost", "nothing to do"]
    assert lab.run.evaluations() == {version: evaluations[version] for version in (4, 6)}
    assert reference.bits(lab.run.model()) == bits


@pytest.mark.parametrize("version", [4, LAST])
def test_the_present_version_is_lost(start: Callable[[str], Laboratory], expected: Any, version: int) -> None:
    """The training server stores it again, under way and at the end, and nothing is missing."""
    bits, evaluations = expected
    lab = start("present")
    for earlier in range(1, version):
        lab.train_to(earlier)
        while lab.post.parts:
            lab.evaluate()
    lab.train_to(version)
    lab.lose(version)
    del lab.statuses[:]
    lab.evaluate()
    assert lab.statuses == ["handed back"]
    while lab.post.parts:
        lab.evaluate()
    assert lab.statuses == ["handed back", "written", "complete"]
    lab.train_to(LAST)
    while lab.post.parts:
        lab.evaluate()
    assert lab.run.status().state == "done"
    assert lab.run.evaluations() == evaluations
    assert reference.bits(lab.run.model()) == bits
    assert lab.events("evaluation lost") == []


def test_a_node_that_may_come_back(
    start: Callable[[str], Laboratory], expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a cache node is silent the part goes back to the queue; it is given up when patience ends."""
    lab = start("silent")
    lab.train_to(3)
    client, now = lab.clients[1], [0.0]

    def silent(*_: Any) -> Any:
        raise ChunkMissing("on none of the nodes; silent: b") from CacheUnreachable("b is away")

    monkeypatch.setattr("coordinator.client.time.monotonic", lambda: now[0])
    monkeypatch.setattr(client.services.chunks, "get_from", silent)
    lab.evaluate()
    now[0] = WORKER_PATIENCE_SECONDS - 1
    lab.evaluate()
    lab.evaluate()
    assert lab.statuses == ["handed back"] * 3
    assert len(lab.post.parts) == 2
    assert lab.run._ledger.pending_evaluations() == {2: 2}
    now[0] = WORKER_PATIENCE_SECONDS
    lab.evaluate()
    assert lab.statuses[-1] == "version lost"
    assert lab.run._ledger.pending_evaluations() == {}
    assert lab.run.status().state == "running"


def test_a_store_that_is_away_ends_no_run(
    start: Callable[[str], Laboratory], expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often a part goes back because of the store, it waits in the queue and counts as no failure."""
    bits, evaluations = expected
    lab = start("away")
    lab.train_to(2)

    def away(*_: Any) -> Any:
        raise CacheUnreachable("no node answers")

    with monkeypatch.context() as patched:
        patched.setattr(lab.clients[1].services.chunks, "get_from", away)
        for _ in range(10):
            lab.evaluate()
    assert lab.statuses == ["handed back"] * 10
    while lab.post.parts:
        lab.evaluate()
    for version in range(3, LAST + 1):
        lab.train_to(version)
        while lab.post.parts:
            lab.evaluate()
    assert lab.run.evaluations() == evaluations
    assert reference.bits(lab.run.model()) == bits
