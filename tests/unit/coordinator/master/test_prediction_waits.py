"""What a prediction waits for is said, and what a worker is at is not sent to another one as well."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.control import worker
from torchord.cache.errors import WaitTimeout
from torchord.coordinator.master import prediction
from torchord.coordinator.master.prediction import Prediction
from torchord.coordinator.runtime import activity

AT = activity.prediction("run-1", 3, 0)


class Bench:
    """A prediction of two parts that nobody ever answers; one worker lives."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **says: Any) -> None:
        monkeypatch.setattr(prediction, "_RESEND_SECONDS", 0.0)
        monkeypatch.setattr(prediction, "_SAY_SECONDS", 0.0)
        info = worker("w0", **says)
        record = SimpleNamespace(as_dict=dict)
        self.sent: list[int] = []
        services = SimpleNamespace(
            registry=SimpleNamespace(alive=lambda: {"w0": info}, consumers=lambda queue: [info]),
            predictions=SimpleNamespace(
                put_inputs=lambda *_: record,
                keep_inputs=lambda *_: None,
                question=lambda *_: "",
                answers=lambda *_: {},
            ),
            parameters=SimpleNamespace(record=lambda *_: SimpleNamespace(blob=None)),
            chunks=SimpleNamespace(touch=lambda *_: None),
            settings=SimpleNamespace(url="redis://nowhere"),
        )
        sender = SimpleNamespace(send=lambda task, kwargs, **_: self.sent.append(kwargs["part"]))
        ledger = SimpleNamespace(run="run-1", pin=lambda *_, **__: None)
        batches = iter([(torch.zeros(1), False), (torch.ones(1), False)])
        self.prediction = Prediction(services, sender, ledger, 3, batches)  # type: ignore[arg-type]

    def waited(self) -> str:
        with pytest.raises(WaitTimeout) as caught:
            self.prediction.outputs(0.1)
        return str(caught.value)


def test_a_part_that_never_ends_is_said_with_its_worker_and_place_and_takes_no_other(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    bench = Bench(monkeypatch, task=AT, where={AT: "model.py:12 in forward"})
    said = bench.waited()
    assert "0 parts in 0.1 s; for" in said and "part 0 on w0 (model.py:12 in forward); restart" in said
    assert any("part 0 on w0" in message and "predict(timeout=...)" in message for message in caplog.messages)
    assert bench.sent.count(0) == 1
    assert bench.sent.count(1) > 1, "nobody is at it: a worker may have died with it"


def test_parts_that_nobody_has_begun_are_said_to_wait_in_their_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, task=activity.gradient("run-2", 0, 0))
    assert "2 parts in queue 'torchord.gradients', none of which a worker has begun" in bench.waited()
    assert bench.sent.count(0) > 1
