"""Tasks in words, and the run that each belongs to."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from torchord.tasks.flower_pages.words import format_task, run_of


def task(name: str, kwargs: object, result: object = None) -> Any:
    return SimpleNamespace(name=name, kwargs=repr(kwargs), result=repr(result))


def test_arguments_and_receipt_are_words() -> None:
    receipt = {"status": "written", "step": 95, "loss": 0.04671, "nbytes": 39744, "worker": "client1@h"}
    given = {"run": "digits-01", "step": 95, "shard": 2}
    shown = format_task(task("torchord.compute_gradient", given, receipt))
    assert shown.kwargs == "step 95, shard 2, run digits-01"
    assert shown.result == "written, loss 0.04671, nbytes 39,744, worker client1@h"


def test_tasks_of_others_stay_as_they_are() -> None:
    shown = format_task(task("shop.tasks.deploy", {"run": "x"}, {"status": "ok"}))
    assert (shown.kwargs, shown.result) == ("{'run': 'x'}", "{'status': 'ok'}") and run_of(shown) == ""


@pytest.mark.parametrize("name", ["digits-01", "a", "run.2_b"])
def test_the_run_is_found_in_words_and_in_the_original(name: str) -> None:
    original = task("torchord.apply_update", {"run": name, "step": 3})
    assert run_of(original) == name and run_of(format_task(original)) == name


@pytest.mark.parametrize("kwargs", [None, "", "{'run': ", {"run": "<b>"}, {"step": 1}, "run a b"])
def test_what_is_no_name_of_a_run_is_none(kwargs: object) -> None:
    assert run_of(SimpleNamespace(name="torchord.evaluate", kwargs=kwargs and str(kwargs))) == ""
