"""Bytes that were committed are lost: the run goes on to the same bits, and says what it could not do."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import models, reference
from tests.support.shuffle import EvaluatingPost, Shuffle
from torchord import Master, Run, TrainingConfig
from torchord.cache.blobs.blob import BlobRef
from torchord.cache.errors import CacheError, CacheUnreachable, ChunkMissing, RunFailed, VersionMissing
from torchord.cache.ledger.records import VersionRecord
from torchord.cache.servers.redis_client import WORKER_PATIENCE_SECONDS
from torchord.cache.settings import Settings
from torchord.coordinator.master.prediction import predict

MOST_DELIVERIES = 300

# Six steps of two shards; versions 2, 4 and 6 are evaluated, each in two parts.
CONFIG = TrainingConfig(epochs=1, batch_size=8, shards=2, seed=3, evaluate_every=2)
SIZE, LAST = 48, 6


def record_of(run: Run, version: int) -> VersionRecord:
    """Where a stored version is."""
    record = run._ledger.version(version)
    assert record is not None
    return record


class Laboratory(Shuffle):
    """Trains on the first Client and evaluates on the second.

    Attributes:
        statuses: of each delivery of a part of an evaluation, in order.
    """

    POST = EvaluatingPost

    def __init__(self, settings: Settings, run: Run) -> None:
        super().__init__(settings, run, None)
        self.statuses: list[str] = []

    def train_to(self, version: int) -> None:
        """Deliver everything but evaluations until a version is committed and its commit's work is done."""
        while self.run._ledger.head().version < version or self.post.callbacks:
            self._in_order()

    def evaluate(self, client: int = 1) -> None:
        """Deliver the first part that waits, and the calls that it leads to."""
        version, part, of = self.post.parts.pop(0)
        self.statuses.append(
            self.clients[client].inference.evaluate(self.run.name, version, part, of)["status"]
        )
        while self.post.callbacks:
            self.post.callbacks -= 1
            self.server.advance(self.run.name)

    def evaluate_all(self) -> None:
        """Deliver every part that waits."""
        while self.post.parts:
            self.evaluate()

    def lose(self, version: int) -> None:
        """Delete a version's bytes from the cache."""
        self.server.services.chunks.delete(record_of(self.run, version).blobs())

    def events(self, kind: str) -> list[dict[str, Any]]:
        """What the run's events of a kind say."""
        return [event.data for event in self.run._ledger.read_events() if event.type == kind]


@pytest.fixture
def start(redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Laboratory]:
    monkeypatch.setattr(
        "torchord.cache.blobs.tiered_store.INLINE_NBYTES", 0
    )  # bytes inside a record are lost with it only
    monkeypatch.setattr("torchord.coordinator.client.slot_lease._REFUSAL_SECONDS", (0.0, 0.0))
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
        lab.evaluate_all()
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
    lab.evaluate_all()
    lab.train_to(LAST)
    lab.evaluate_all()
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
        lab.evaluate_all()
    lab.train_to(version)
    lab.lose(version)
    del lab.statuses[:]
    lab.evaluate()
    assert lab.statuses == ["handed back"]
    lab.evaluate_all()
    assert lab.statuses == ["handed back", "written", "complete"]
    lab.train_to(LAST)
    lab.evaluate_all()
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

    monkeypatch.setattr("torchord.coordinator.client.inference_task.time.monotonic", lambda: now[0])
    monkeypatch.setattr(client.contexts.services.chunks, "get_from", silent)
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
        patched.setattr(lab.clients[1].contexts.services.chunks, "get_from", away)
        for _ in range(10):
            lab.evaluate()
    assert lab.statuses == ["handed back"] * 10
    lab.evaluate_all()
    for version in range(3, LAST + 1):
        lab.train_to(version)
        lab.evaluate_all()
    assert lab.run.evaluations() == evaluations
    assert reference.bits(lab.run.model()) == bits


# --- what the next steps are computed from -----------------------------------------------------------------

KEEPING: dict[str, dict[str, Any]] = {
    "local steps": {"local_steps": 2, "batch_size": 4},
    "compressed": {"compression": "topk:0.2,minimum=1"},
    "deltas": {"parameter_compression": "int8"},
    "stale": {"staleness": 1},
    "stale and compressed": {"staleness": 1, "compression": "topk:0.2,minimum=1"},
    "tree of local steps": {"shards": 4, "fan_in": 2, "local_steps": 2, "batch_size": 4},
}


def lost_slot_states(run: Run, version: int) -> list[BlobRef]:
    """What the slots kept at the present version."""
    return [blob for state in record_of(run, version).slots.values() for blob in state.blobs()]


def lost_version(run: Run, version: int) -> list[BlobRef]:
    """All that the present version points to: parameters, optimizer state, slots' states."""
    return record_of(run, version).blobs()


def lost_delta(run: Run, version: int) -> list[BlobRef]:
    """How the present version follows from the one before."""
    delta = record_of(run, version).delta
    assert delta is not None
    return [delta.blob]


def lost_earlier(run: Run, version: int) -> list[BlobRef]:
    """The parameters of the version before, which a stale step is computed at."""
    return [record_of(run, version - 1).blob]


def lost_all(run: Run, version: int) -> list[BlobRef]:
    """Every version that is stored, with all that it points to."""
    return [blob for record in run._ledger.versions().values() for blob in record.blobs()]


def go_on(lab: Shuffle) -> None:
    """Deliver what there is to the end of the run; slots that nobody is at are sent again."""
    run, ledger = lab.run, lab.run._ledger
    for _ in range(MOST_DELIVERIES):
        head = ledger.head()
        if head.status not in ("pending", "running"):
            return
        lab.post.arrived(ledger.client)
        if lab.post.callbacks or lab.post.gradients:
            lab._in_order()
        else:  # as the supervisor does
            plan = lab.clients[0].contexts.of(run.name, head.incarnation).plan()
            for step in plan.window(head.version):
                tree, present = plan.fan_in(step), ledger.slots_present(step)
                missing = [slot for slot in tree.gradients if slot not in present]
                for shard in missing:
                    lab.post.gradient(run.name, step, shard, version=plan.version_for(step))
                for slot in tree.ready(present):
                    lab.post.partial_sum(run.name, step, slot, version=plan.version_for(step))
                if not missing and not tree.ready(present):
                    lab.post.advance(run.name)
    raise AssertionError(f"not done after {MOST_DELIVERIES} deliveries: {run.status()}, {lab.verdicts}")


@pytest.mark.parametrize("checkpoints", [True, False], ids=["checkpoints", "no checkpoint"])
@pytest.mark.parametrize(
    ("mode", "lost"),
    [
        ("local steps", lost_slot_states),
        ("local steps", lost_version),
        ("local steps", lost_all),
        ("compressed", lost_slot_states),
        ("compressed", lost_all),
        ("deltas", lost_delta),
        ("deltas", lost_version),
        ("deltas", lost_all),
        ("stale", lost_earlier),
        ("stale", lost_version),
        ("stale and compressed", lost_slot_states),
        ("stale and compressed", lost_earlier),
        ("stale and compressed", lost_all),
        ("tree of local steps", lost_slot_states),
    ],
)
def test_what_the_next_steps_start_from_is_lost(
    redis_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    lost: Callable[[Run, int], list[BlobRef]],
    checkpoints: bool,
) -> None:
    """Nobody has a copy: the run goes back to what can be restored, and replays to the same bits."""
    monkeypatch.setattr("torchord.cache.blobs.tiered_store.INLINE_NBYTES", 0)
    changes = {**KEEPING[mode], "evaluate_every": None, "checkpoint_every": 2 if checkpoints else 1_000}
    config = TrainingConfig(**{**CONFIG.to_json(), **changes})
    master = Master(redis_url, checkpoint_dir=str(tmp_path))
    settings = Settings(url=redis_url, checkpoint_dir=str(tmp_path))
    recipe = models.mlp(SIZE, evaluation=None, metrics=None)
    bits, chains = [], []
    for loses in (False, True):
        run = master.submit(recipe, config, name=f"loses-{loses}")
        lab = Shuffle(settings, run, None)
        while run._ledger.head().version < 3 or lab.post.callbacks:
            lab._in_order()
        if loses:
            version = run._ledger.head().version
            gone = lost(run, version)
            assert gone
            lab.server.services.chunks.delete(gone)
        go_on(lab)
        assert run.status().state == "done"
        bits.append(reference.bits(run.model()))
        chains.append(run._ledger.head().chain)
        audit = run.verify()
        assert audit.ok
    if lost is lost_delta:  # the version is downloaded whole
        assert not lab.verdicts["handed back"] and not audit.replayed
    else:
        assert lab.verdicts["handed back"] or audit.replayed, "nobody missed what was lost"
    assert bits[0] == bits[1]
    assert audit.divergent == 0


# --- predictions --------------------------------------------------------------------------------------------


class Predicting:
    """A `Sender` that has a Client of the laboratory predict at once; what the store refuses stays undone.

    Attributes:
        lose: called before each part is delivered, with its message.
        calls: how often the training server was called.
    """

    def __init__(self, lab: Laboratory, lose: Callable[[dict[str, Any]], None]) -> None:
        self.lab, self.lose, self.calls = lab, lose, 0

    def send(self, task: str, kwargs: dict[str, Any], **_: Any) -> None:
        self.lose(kwargs)
        with suppress(CacheError):
            self.lab.clients[1].inference.predict(**kwargs)

    def advance(self, run: str, *, queue: str) -> None:
        self.calls += 1
        self.lab.server.advance(run)


def predicted(lab: Laboratory, sender: Any, version: int) -> torch.Tensor:
    """Outputs for some inputs, in four parts."""
    inputs = torch.linspace(-1, 1, 48).reshape(8, 6)
    found = predict(
        lab.clients[0].contexts.services,
        sender,
        lab.run._ledger,
        inputs,
        batch_size=2,
        version=version,
        timeout_seconds=20,
        recipe=lab.run._spec()["recipe"],
    )
    assert isinstance(found, torch.Tensor)
    return found


@pytest.fixture
def resent_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchord.coordinator.master.prediction._RESEND_SECONDS", 0.0)


@pytest.mark.usefixtures("resent_at_once")
def test_inputs_of_a_prediction_are_lost(start: Callable[[str], Laboratory]) -> None:
    """They are stored again by whoever asked, and the outputs are those of an undisturbed prediction."""
    lab = start("inputs")
    lab.train_to(3)
    expected = predicted(lab, Predicting(lab, lambda kwargs: None), 3)
    lost: list[int] = []

    def lose(kwargs: dict[str, Any]) -> None:
        if kwargs["part"] in (1, 2) and kwargs["part"] not in lost:
            lost.append(kwargs["part"])
            lab.server.services.chunks.delete([BlobRef.from_json(kwargs["inputs"]["blob"])])

    assert torch.equal(predicted(lab, Predicting(lab, lose), 3), expected)
    assert lost == [1, 2]


@pytest.mark.usefixtures("resent_at_once")
def test_the_version_of_a_prediction_is_lost(start: Callable[[str], Laboratory]) -> None:
    """The training server stores the present one again; of an earlier one the caller is told, at once."""
    lab = start("version")
    lab.train_to(3)
    expected = predicted(lab, Predicting(lab, lambda kwargs: None), 3)
    lab.clients[1].contexts.forget(lab.run.name)  # it held the version
    lab.lose(3)
    sender = Predicting(lab, lambda kwargs: None)
    assert torch.equal(predicted(lab, sender, 3), expected)
    assert sender.calls == 1

    lab.run._ledger.pin(3, seconds=60)
    lab.train_to(5)
    lab.clients[1].contexts.forget(lab.run.name)
    lab.lose(3)
    with pytest.raises(VersionMissing, match=r"version 3 of run 'version' was lost .* Predict from another"):
        predicted(lab, sender, 3)
    assert sender.calls == 1


@pytest.mark.usefixtures("resent_at_once")
def test_inputs_of_a_prediction_are_damaged(start: Callable[[str], Laboratory]) -> None:
    """Whoever asked is told, with the key of the chunk."""
    lab = start("damaged")
    lab.train_to(3)

    def damage(kwargs: dict[str, Any]) -> None:
        if kwargs["part"] == 1:
            key = next(iter(BlobRef.from_json(kwargs["inputs"]["blob"]).chunk_keys()))
            stored = lab.run._ledger.client
            stored.set(key, bytes(stored.strlen(key)).decode())

    with pytest.raises(RunFailed, match=r"part 1 cannot be computed: .*torchord:blob:damaged:predict"):
        predicted(lab, Predicting(lab, damage), 3)
