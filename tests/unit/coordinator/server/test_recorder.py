"""What is known of runs outlives Redis, and its database the checkpoints."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.control import SPEC, entry, record, slot
from torchord import Master
from torchord.cache.errors import InvalidInput, RunNotFound
from torchord.cache.files.checkpoint import CheckpointStore
from torchord.cache.files.run_store import RunRecord, store_of
from torchord.cache.ledger.ledger import Ledger
from torchord.cache.servers.redis_client import connect
from torchord.cache.settings import Settings
from torchord.coordinator.master.querying import chosen
from torchord.coordinator.runtime.services import Services
from torchord.coordinator.server.supervisor.recorder import Recorder


def committed(ledger: Ledger, *, accuracy: float | None = None) -> None:
    """A run of two steps, one of which is taken."""
    assert ledger.create(SPEC, incarnation=f"life-{ledger.run}") is None
    _, token = ledger.acquire(worker="s0", node="s@h", queue="q")
    assert isinstance(token, int)
    ledger.initialise(
        token=token, manifest={}, record=record(0), dataset_size=8, evaluation_size=4, total_steps=2
    )
    one = slot(0, 0)
    ledger.begin(0, 0, worker="w0", delivery="d")
    ledger.finish_slot(0, one)
    made = entry(1, [one], loss=0.25)
    ledger.commit(step=0, token=token, shards=1, entry=made, record=record(1, made.chain), event={})
    if accuracy is not None:
        ledger.record_evaluation(1, {"loss": 0.5, "accuracy": accuracy})


@pytest.fixture
def made(redis_url: str, tmp_path: Path) -> Any:
    services = Services(Settings(url=redis_url, checkpoint_dir=str(tmp_path)))
    yield Master(redis_url, checkpoint_dir=str(tmp_path)), services, Recorder(services)
    services.close()


def test_runs_are_found_after_redis_was_emptied(made: Any, redis_url: str) -> None:
    master, services, recorder = made
    store = store_of(services.settings)
    for name, accuracy in (("one", 0.9), ("two", 0.7), ("three", None)):
        committed(services.ledger(name), accuracy=accuracy)
    master.run("one").label(tags=["baseline", "night"], notes="the first")
    master.run("two").label(tags=["night"])
    services.ledger("two").transition(
        "failed", allowed=("running",), event="failed", error={"message": "a NaN", "kind": "Error"}
    )
    recorder.look(store)
    queries: list[dict[str, Any]] = [
        {"state": "failed"}, {"tag": "night"}, {"tag": ["night", "baseline"]}, {"metric": "accuracy>0.8"},
        {"metric": "accuracy", "order": "-metric"}, {"order": "name"}, {"since": 0.0},
        {"since": time.time() + 9},
        {"state": ["failed", "running"], "order": "-name"}, {"metric": "loss<=0.5", "order": "metric"},
    ]  # fmt: skip
    live = [master.runs(**query) for query in queries]
    assert live[:6] == [["two"], ["one", "two"], ["one"], ["one"], ["one", "two"], ["one", "three", "two"]]
    assert live[7:] == [[], ["two", "three", "one"], ["three", "one", "two"]]
    records = master.records()
    client = connect(redis_url)
    client.flushdb()  # the test's own database
    client.close()
    assert master.runs() == [] and [master.runs(**query) for query in queries] == live
    assert master.records() == records
    [one] = master.records(tag="baseline")
    assert (one.notes, one.metrics["accuracy"], one.loss, one.version, one.total_steps) == (
        "the first",
        0.9,
        0.25,
        1,
        2,
    )
    assert master.records(state="failed")[0].error == "a NaN"


def test_who_asks_makes_nothing_and_who_records_makes_its_folder(redis_url: str, tmp_path: Path) -> None:
    place = tmp_path / "not" / "there"
    services = Services(Settings(url=redis_url, checkpoint_dir=str(place)))
    assert Master(redis_url, checkpoint_dir=str(place)).runs(order="name") == [] and not place.parent.exists()
    recorder, store = Recorder(services), store_of(services.settings)
    assert store is not None
    recorder.look(store)
    assert not place.parent.exists(), "there are no runs"
    committed(services.ledger("one"))
    recorder.look(store)
    assert set(store.records()) == {"one"}
    services.close()


def test_only_what_changes_is_written(made: Any) -> None:
    _, services, recorder = made
    store, ledger = store_of(services.settings), services.ledger("one")
    committed(ledger)
    recorder.look(store)
    before = Path(store.place).stat().st_mtime_ns
    recorder.look(store)
    assert Path(store.place).stat().st_mtime_ns == before
    ledger.transition("paused", allowed=("running",), event="paused")
    recorder.look(store)
    assert store.records()["one"].state == "paused"


def test_a_lost_database_is_made_again_from_checkpoints(made: Any) -> None:
    master, services, recorder = made
    place = services.settings.checkpoint_dir
    said = {"total_steps": 6, "submitted_at": 10.0, "committed_at": 20.0, "tags": ["kept"], "notes": "n"}
    for name, version in (("ended", 6), ("halfway", 3), ("old", 3)):
        CheckpointStore(place, name).save_spec({**SPEC, "incarnation": "life"})
        meta = {"evaluations": {"2": {"accuracy": 0.1}, "3": {"accuracy": 0.8}}, "chain": ""}
        meta |= {} if name == "old" else {"run_record": said}
        CheckpointStore(place, name, "life").save(version, {"w": torch.zeros(1)}, {}, meta)
    CheckpointStore(place, "garbage").save_spec({"incarnation": "life"})
    (Path(place) / "garbage" / "run.json").write_text("[")
    found = {each.name: each for each in master.records()}
    assert found.keys() == {"ended", "halfway", "old"}
    assert (found["ended"].state, found["halfway"].state, found["old"].state) == (
        "done",
        "on disk",
        "on disk",
    )
    assert found["halfway"].metrics == {"accuracy": 0.8} and found["ended"].tags == ("kept",)
    committed(services.ledger("live"))
    recorder.look(store_of(services.settings))
    assert set(store_of(services.settings).records()) == {"ended", "halfway", "old", "live"}  # type: ignore[union-attr]


def test_labels_are_checked_and_need_a_run(made: Any) -> None:
    master, services, _ = made
    with pytest.raises(RunNotFound):
        master.run("nobody").label(tags=["a"])
    committed(services.ledger("one"))
    run = master.run("one")
    for tags in ("text", ["a\nb"], [""], ["x" * 101], [str(n) for n in range(33)], [3]):
        with pytest.raises(InvalidInput, match="tag"):
            run.label(tags=tags)
    with pytest.raises(InvalidInput, match="notes are a text"):
        run.label(notes="x" * 10_001)
    run.label(tags=["b", "a", "a"])
    run.label(notes="one")
    head = services.ledger("one").head()
    assert (head.tags, head.notes) == (("a", "b"), "one")


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ({"order": "size"}, "order must be one of 'submitted'"),
        ({"order": "metric"}, "needs metric="),
        ({"metric": "accuracy>much"}, "'much', which is no number"),
        ({"metric": 3}, "metric must be a name"),
    ],
)
def test_a_question_that_nobody_can_answer_is_refused(query: Any, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        chosen([RunRecord("a")], **query)


def test_what_has_no_value_comes_last() -> None:
    records = [RunRecord("a"), RunRecord("b", loss=2.0, submitted_at=5.0), RunRecord("c", loss=float("nan"))]
    for order, names in (("loss", "bac"), ("-loss", "bac"), ("-name", "cba")):
        assert "".join(each.name for each in chosen(records, order=order)) == names
    since = datetime.fromtimestamp(4.0, UTC)
    assert [each.name for each in chosen(records, since=since)] == ["b"]
