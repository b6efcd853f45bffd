"""What a person at a shell of 80 columns reads of runs, whatever state they are in."""

from __future__ import annotations

from typing import Any

import pytest
import redis

from tests.support.control import SPEC, history
from torchord.cache.ledger.ledger import Ledger
from torchord.cache.servers.redis_client import connect
from torchord.cache.settings import Settings
from torchord.coordinator import views
from torchord.coordinator.runtime.control_plane import ControlPlane

LONG = "a-run-whose-name-is-as-long-as-somebody-who-sweeps-over-learning-rates-makes-it-0001"


def committed(url: str, name: str, **head: Any) -> Ledger:
    """A run with twelve of its twenty steps."""
    made = Ledger(connect(url), url, name)
    made.create(SPEC, incarnation="life")
    with redis.Redis.from_url(url) as client:
        client.hset(made.keys.ledger, mapping={str(each.version): each.to_json() for each in history(12, 2)})
        client.expire(made.keys.ledger, 60)
        fields = {"status": "running", "version": 12, "total_steps": 20, "committed_at": 1000.0, **head}
        client.hset(made.keys.head, mapping=fields)
    made.record_evaluation(10, {"loss": 0.4, "accuracy": 0.9})
    return made


@pytest.fixture
def plane(redis_url: str) -> ControlPlane:
    return ControlPlane(Settings(url=redis_url))


def test_a_line_of_the_list_has_what_one_looks_for_in_eighty_columns(
    redis_url: str, plane: ControlPlane
) -> None:
    committed(redis_url, "digits")
    reason = {"kind": "E", "message": "a NaN " * 60}
    committed(redis_url, LONG).transition("failed", allowed=("running",), event="failed", error=reason)
    with redis.Redis.from_url(redis_url) as client:
        client.hset(committed(redis_url, "broken").keys.head, "version", "x")
    lines = [text for line in views.listed(plane) for text in views.in_lines(line, len(LONG))]
    assert max(map(len, lines)) <= views.WIDTH
    assert lines[0].split() == [
        "digits",
        "running",
        "step",
        "12",
        "of",
        "20,",
        "loss",
        "0.5,",
        "1",
        "s",
        "left",
    ]
    assert lines[1].strip().startswith("waits for a worker on queue 'torchord.updates': none lives")
    failed = next(place for place, text in enumerate(lines) if " failed " in text)
    assert lines[failed].startswith(f"{LONG[:23]}…  failed") and lines[failed + 1].startswith(
        "    a NaN a NaN"
    )
    assert lines[failed + 3].endswith(" …")
    assert any(text.startswith("broken") and "unreadable" in text for text in lines)


def test_status_says_how_fast_a_run_is_and_when_it_moved_last(redis_url: str, plane: ControlPlane) -> None:
    committed(redis_url, "digits")
    found = views.found(plane, "digits")
    said = list(views.in_full({**found, "submitted_at": 900.0}, now=1060.0))
    assert said[0] == "digits: running, step 12 of 20"
    assert said[1:] == [
        "  loss         0.5 (the last step's)",
        "  evaluation   accuracy 0.9, loss 0.4 (version 10)",
        "  speed        80 examples/s on 1 worker",
        "  left         1 s",
        "  submitted    2 min ago",
        "  last commit  1 min ago",
        "  server       none",
    ]
    assert found["workers"] == 1 and found["waits"][0]["kind"] == "server"


def test_events_are_sentences() -> None:
    step = {"step": 3, "loss": 0.25, "examples": 8, "seconds": 0.5}
    assert views.worded("step", step) == "step 3: loss 0.25, 8 examples in 0.50 s"
    measured = views.worded("step", {**step, "metrics": {"accuracy": 0.9}})
    assert measured == "step 3: loss 0.25, accuracy 0.9, 8 examples in 0.50 s"
    told = views.worded("evaluation", {"version": 4, "metrics": {"accuracy": 0.5}})
    assert told == "evaluation: version 4, metrics.accuracy 0.5"
