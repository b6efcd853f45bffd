"""A worker's log says what there was without a line a task, and no failure twice."""

from __future__ import annotations

import logging

import pytest

from torchord.tasks.log_lines import Brief, _no_chord_of_ours


def record(
    level: int = logging.INFO, name: str = "torchord.compute_gradient", **data: str
) -> logging.LogRecord:
    found = logging.LogRecord("celery.app.trace", level, "", 0, "Task %(name)s", ({"name": name},), None)
    found.data = {"name": name, **data}
    return found


def written(run: str, step: int) -> logging.LogRecord:
    return record(return_value=str({"run": run, "step": step, "shard": 1, "status": "written"}))


def test_tasks_are_a_line_every_ten_seconds() -> None:
    now = [100.0]
    brief = Brief(lambda: now[0])
    first = written("a", 0)
    assert brief.filter(first) and first.getMessage() == "run a: 1 compute_gradient, step 0"
    for step in range(1, 200):
        now[0] += 0.04
        assert not brief.filter(written("a" if step < 150 else "b", step))
    now[0] += 5
    last = written("b", 200)
    assert brief.filter(last)
    assert last.getMessage() == (
        "run a: 149 compute_gradient, steps 1 to 149; run b: 51 compute_gradient, steps 150 to 200"
    )


def test_receipts_go_and_what_is_others_or_in_earnest_stays() -> None:
    brief = Brief()
    assert not brief.filter(record(args="()"))
    assert not brief.filter(record(exc="ShardFailed()"))
    assert brief.filter(record(exc="RunNotFound()"))
    assert brief.filter(record(logging.WARNING, exc="Reject()"))
    assert brief.filter(record(name="shop.tasks.add", return_value="3"))
    assert brief.filter(logging.LogRecord("celery.app.trace", logging.INFO, "", 0, "plain", (), None))


@pytest.mark.parametrize(("reason", "stays"), [("ShardFailed('a NaN')", False), ("OSError('away')", True)])
def test_a_chord_that_the_recipe_ended_is_not_told_again(reason: str, stays: bool) -> None:
    error = f"ChordError('Dependency 1 raised {reason}')"
    said = logging.LogRecord(
        "celery.backends.redis", logging.ERROR, "", 0, "Chord %r raised: %r", ("g", error), None
    )
    assert _no_chord_of_ours(said) is stays
