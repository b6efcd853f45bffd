"""What the pages ask for: every run has its line, whatever its records are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import redis
import torch
from safetensors.torch import load_file

from tests.support.control import SPEC, history
from torchord.cache import keys
from torchord.cache.errors import CacheUnreachable, InvalidInput, RunError, RunNotFound
from torchord.cache.files.checkpoint import CheckpointStore
from torchord.cache.ledger.ledger import Ledger
from torchord.cache.servers.redis_client import connect
from torchord.cache.settings import Settings
from torchord.coordinator.commands import report_page
from torchord.coordinator.pages.pages import Pages
from torchord.coordinator.spec.config import TrainingConfig
from torchord.coordinator.spec.recipe import Recipe

ENTRIES = history(12, 2)


def committed(
    url: str, name: str, *, spec: dict[str, Any] = SPEC, status: str = "running", **head: Any
) -> Ledger:
    """A run with twelve of its twenty steps."""
    made = Ledger(connect(url), url, name)
    made.create(spec, incarnation="life")
    client = redis.Redis.from_url(url)
    client.hset(made.keys.ledger, mapping={str(each.version): each.to_json() for each in ENTRIES})
    client.expire(made.keys.ledger, 60)
    fields = {"status": status, "version": 12, "total_steps": 20, "committed_at": 1000.0, **head}
    client.hset(made.keys.head, mapping=fields)
    made.record_evaluation(10, {"loss": 0.4, "accuracy": 0.9})
    client.close()
    return made


@pytest.fixture
def pages(redis_url: str, tmp_path: Path) -> Pages:
    return Pages(Settings(url=redis_url, checkpoint_dir=str(tmp_path / "checkpoints")))


def lines(pages: Pages) -> dict[str, dict[str, Any]]:
    return {line["name"]: line for line in pages.listed()["runs"]}


def test_a_line_says_where_a_run_stands_and_what_it_waits_for(redis_url: str, pages: Pages) -> None:
    committed(redis_url, "digits-01")
    line = lines(pages)["digits-01"]
    assert (line["state"], line["version"], line["total"]) == ("running", 12, 20)
    assert line["left_seconds"] == pytest.approx(0.8) and line["rate"] == pytest.approx(80)
    assert line["loss"] == 0.5 and line["workers"] == 1
    assert line["metrics"] == {"loss": 0.4, "accuracy": 0.9} and line["evaluated"] == 10
    assert [wait["what"] for wait in line["waits"]] == [
        "a worker on queue 'torchord.updates': none lives",
        "a worker on queue 'torchord.gradients': none lives",
    ]
    assert all(wait["since"] > 0 and "celery -A torchord worker" in wait["ends"] for wait in line["waits"])


def test_what_has_ended_is_said_with_its_reason_and_goes_on_if_resumed(redis_url: str, pages: Pages) -> None:
    made = committed(redis_url, "digits-01")
    made.transition("failed", allowed=("running",), event="failed", error={"kind": "E", "message": "a NaN"})
    line = lines(pages)["digits-01"]
    assert (line["state"], line["error"], line["waits"], line["left_seconds"]) == (
        "failed",
        "a NaN",
        [],
        None,
    )
    assert lines(pages)["digits-01"] == line
    made.transition("running", allowed=("failed",), event="resumed", error=None)
    assert lines(pages)["digits-01"]["state"] == "running"


def test_a_run_whose_records_are_none_hides_no_other(redis_url: str, pages: Pages) -> None:
    names = keys.RunKeys
    with redis.Redis.from_url(redis_url) as client:
        for number, broken in enumerate(({"status": "running"}, {"version": "x"}, None)):
            committed(redis_url, f"broken-{number}")
            if broken is None:
                client.hset(names(f"broken-{number}").ledger, "12", "<b>{")
            else:
                client.hset(names(f"broken-{number}").head, mapping={**broken, "submitted_at": "never"})
        client.zadd(keys.RUNS, {"<script>alert(1)</script>": 1})
        client.hset(names("<script>alert(1)</script>").head, "status", "running")
        client.expire(names("<script>alert(1)</script>").head, 60)
        client.expire(keys.RUNS, 60)
        committed(redis_url, "whole")
        found = lines(pages)
        client.delete(keys.RUNS)
    assert found["whole"]["state"] == "running"
    assert {name for name, line in found.items() if line["state"] == "unreadable"} == found.keys() - {"whole"}
    assert len(found) == 4 and all(line["error"] for name, line in found.items() if name != "whole")
    assert "<script>alert(1)</script>" not in found  # no run can have that name: the registry leaves it out


def test_a_run_that_redis_has_lost_is_found_on_disk(redis_url: str, pages: Pages, tmp_path: Path) -> None:
    place = str(tmp_path / "checkpoints")
    CheckpointStore(place, "lost").save_spec({**SPEC, "incarnation": "life"})
    CheckpointStore(place, "lost", "life").append_ledger([each.to_json() for each in ENTRIES])
    meta = {"chain": ENTRIES[7].chain, "evaluations": {"8": {"loss": 0.2}}}
    CheckpointStore(place, "lost", "life").save(8, {}, {}, meta)
    (tmp_path / "checkpoints" / "garbage").mkdir()
    (tmp_path / "checkpoints" / "garbage" / "run.json").write_text("[")
    (tmp_path / "checkpoints" / "empty").mkdir()
    committed(redis_url, "known")
    CheckpointStore(place, "known").save_spec({**SPEC, "incarnation": "life"})
    found = lines(pages)
    assert found.keys() == {"lost", "garbage", "known"}
    assert (found["lost"]["state"], found["lost"]["version"]) == ("on disk", 12)
    assert found["lost"]["metrics"] == {"loss": 0.2} and found["garbage"]["state"] == "unreadable"
    assert found["known"]["state"] == "running"
    json.dumps(found, allow_nan=False)


def test_a_server_that_is_away_is_said_within_seconds(tmp_path: Path) -> None:
    with pytest.raises(CacheUnreachable, match="no Redis answers"):
        Pages(Settings(url="redis://127.0.0.1:1/0", checkpoint_dir=str(tmp_path))).listed()


def test_a_runs_page_says_what_happened_and_what_was_submitted(redis_url: str, pages: Pages) -> None:
    made = committed(redis_url, "digits-01", duplicates=3)
    reason = {
        "kind": "E",
        "message": "a NaN",
        "traceback": "model.py:3 in forward",
        "worker": "w0",
        "log": ["a"],
    }
    made.transition("failed", allowed=("running",), event="failed", data={"message": "a NaN"}, error=reason)
    found = pages.overview("digits-01")
    assert found["failure"] == {key: value for key, value in reason.items() if key != "kind"}
    assert found["recipe"] == SPEC["recipe"] and found["config"] == SPEC["config"]
    assert found["counted"]["duplicates ignored"] == 3 and found["evaluations"] == [
        (10, {"loss": 0.4, "accuracy": 0.9})
    ]
    assert [event["type"] for event in found["events"]] == ["evaluation", "failed"]
    assert [(one["worker"], one["shards"], one["alive"]) for one in found["crew"]] == [("w0", 24, False)]
    assert (found["loaded"], found["steps_known"], found["problem"]) == (12, 12, "")


def test_why_a_rule_ended_a_run_is_on_its_page(redis_url: str, pages: Pages) -> None:
    made = committed(redis_url, "digits-01")
    assert pages.overview("digits-01")["reason"] == ""
    head = made.head()
    assert made.stop(head.version, rule="Plateau", reason="no better", token=head.token) == "ok"
    found = pages.overview("digits-01")
    assert found["reason"] == "stopped: no better"
    curves, timeline = pages.curves("digits-01", points=9), pages.timeline("digits-01")
    assert "stopped: no better" in report_page.page(found, curves, timeline, None)


def test_a_run_on_disk_has_its_page(pages: Pages, tmp_path: Path) -> None:
    place = str(tmp_path / "checkpoints")
    CheckpointStore(place, "lost").save_spec({**SPEC, "incarnation": "life"})
    CheckpointStore(place, "lost", "life").append_ledger([each.to_json() for each in ENTRIES])
    found = pages.overview("lost")
    assert (found["state"], found["version"], found["steps_known"]) == ("on disk", 12, 12)
    assert found["crew"] and found["recipe"] == SPEC["recipe"]
    with pytest.raises(RunNotFound, match="neither in Redis nor under"):
        pages.overview("nowhere")
    with pytest.raises(InvalidInput, match="cannot be used"):
        pages.overview("../etc")


def test_a_run_is_paused_resumed_and_cancelled(redis_url: str, pages: Pages) -> None:
    recipe = Recipe(
        model="torch.nn:Identity",
        dataset="nowhere:data",
        optimizer="torch.optim:SGD",
        loss="torch.nn:MSELoss",
    )
    committed(redis_url, "digits-01", spec={"recipe": recipe.to_spec(), "config": TrainingConfig().to_json()})
    assert pages.act("digits-01", "pause") == {"state": "paused"}
    with pytest.raises(RunNotFound):
        pages.act("nowhere", "pause")
    assert pages.act("digits-01", "resume") == {"state": "running"}
    assert pages.act("digits-01", "cancel") == {"state": "cancelled"}
    with pytest.raises(RunError, match="submit it under a new name"):
        pages.act("digits-01", "resume")


def test_curves_are_told_once_until_something_is_new(redis_url: str, pages: Pages) -> None:
    committed(redis_url, "digits-01")
    found = pages.curves("digits-01", points=100)
    assert found["series"]["loss"]["step"] == list(range(1, 13)) and found["metrics"]["accuracy"]["step"] == [
        10
    ]
    again = pages.curves("digits-01", points=100, have=found["mark"])
    assert "series" not in again and again["mark"] == found["mark"]
    part = pages.curves("digits-01", points=100, first=3, last=5, have=found["mark"])
    assert part["series"]["loss"]["step"] == [3, 4, 5]


def test_a_timeline_knows_who_lives_and_whether_the_run_goes_on(redis_url: str, pages: Pages) -> None:
    committed(redis_url, "digits-01")
    found = pages.timeline("digits-01")
    assert found["moving"] and found["newest"] == 12 and [lane["worker"] for lane in found["lanes"]] == ["w0"]
    pages.act("digits-01", "cancel")
    assert not pages.timeline("digits-01", first=2, last=3)["moving"]


def test_an_audit_says_what_is_wrong(redis_url: str, pages: Pages) -> None:
    made = committed(redis_url, "digits-01")
    with redis.Redis.from_url(redis_url) as client:
        client.hdel(made.keys.ledger, "5")
    found = pages.audit("digits-01")
    assert not found["ok"] and "NOT clean" in found["said"]
    assert "the entry of version 5 is missing from the ledger" in found["problems"]


def test_runs_are_compared_wherever_they_are(redis_url: str, pages: Pages, tmp_path: Path) -> None:
    committed(redis_url, "one")
    place = str(tmp_path / "checkpoints")
    CheckpointStore(place, "two").save_spec({**SPEC, "config": {"epochs": 5}, "incarnation": "life"})
    found = pages.compared(["one", "two"])
    assert [line["state"] for line in found["runs"]] == ["running", "on disk"]
    assert {"name": "config.epochs", "values": ["1", "5"]} in found["differences"]
    with pytest.raises(InvalidInput, match="at most 8"):
        pages.compared([f"run-{number}" for number in range(9)])


def test_weights_are_those_that_the_model_has(redis_url: str, pages: Pages, tmp_path: Path) -> None:
    committed(redis_url, "digits-01")
    stored = {
        "weight": torch.ones(2),
        "torchord/average/weight": torch.full((2,), 3.0),
        "bias": torch.zeros(1),
        "torchord/loss_scale": torch.ones(1),
    }
    subject = pages._subject("digits-01")
    subject.run.tensors = lambda version=None: (12, stored)  # type: ignore[method-assign]
    assert pages.write_weights("digits-01", str(tmp_path / "m.safetensors")) == 12
    found = load_file(tmp_path / "m.safetensors")
    assert found.keys() == {"weight", "bias"} and found["weight"].tolist() == [3.0, 3.0]


def test_a_runs_page_says_what_others_could_not_be_told(redis_url: str, pages: Pages) -> None:
    spec = {"recipe": {}, "config": {}, "on": {"evaluated": ["shop.look"]}}
    made = committed(redis_url, "digits-01", spec=spec)
    assert pages.overview("digits-01")["untold"] == [], "nothing has gone wrong yet"
    taken = made.claim_telling("w0", seconds=60)
    assert taken is not None
    made.settle_telling(taken, "w0", "again", seconds=60, error="answered 503")
    (said,) = pages.overview("digits-01")["untold"]
    assert said == "evaluated (evaluated-10.0), 1 try so far: answered 503"
