"""What would end a worker is an error like any other where the recipe's code raised it, and only there."""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support import recipes_leaving
from torchord.cache.testing.memory_ledger import MemoryLedger
from torchord.cache.testing.memory_plane import MemoryPlane
from torchord.coordinator.runtime.failures import Failure, RecipeExit, contained, noted, short_traceback


class OfTheirs(BaseException):
    """Some library's own."""


@pytest.mark.parametrize("end", [SystemExit, GeneratorExit, asyncio.CancelledError, OfTheirs])
def test_what_ends_a_process_is_an_error_with_its_place(end: type[BaseException]) -> None:
    def recipes_code() -> None:
        error = end("enough")
        error.add_note("torchord: raised while reading sample 3")
        raise error

    with pytest.raises(RecipeExit, match=rf"{end.__name__}: enough\..*raise an error") as caught, contained():
        recipes_code()
    assert short_traceback(caught.value).splitlines()[-1].endswith("in recipes_code: raise error")
    assert noted(caught.value) == " (raised while reading sample 3)"
    assert type(caught.value.__cause__) is end


def test_errors_and_results_pass_as_they_are() -> None:
    with pytest.raises(ValueError, match=r"^as it is$") as caught, contained():
        raise ValueError("as it is")
    assert type(caught.value) is ValueError
    with contained():
        pass


def test_argparse_is_named_with_whoever_called_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["celery", "worker", "-Q", "gradients"])
    with (
        pytest.raises(RecipeExit, match=r"argparse, called by of_the_command_line \(recipes_leaving"),
        contained(),
    ):
        recipes_leaving.of_the_command_line()


def test_a_signal_still_ends_the_process() -> None:
    with pytest.raises(KeyboardInterrupt), contained():
        signal.raise_signal(signal.SIGINT)
    handler: dict[str, Any] = {"__name__": "billiard.common"}  # what ends a child of a prefork pool
    exec("def cleanup(signum, frame):\n    raise SystemExit(-(256 - signum))", handler)  # noqa: S102
    before = signal.signal(signal.SIGTERM, handler["cleanup"])
    try:
        with pytest.raises(SystemExit), contained():
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("ours", ["a thread of a pool", "a worker's main thread"])
def test_no_ctrl_c_comes_where_none_can_be_meant(ours: str) -> None:
    """Python raises it in the main thread alone, and there only if nobody else handles the signal."""
    met: list[BaseException] = []

    def work() -> None:
        try:
            with contained():
                raise KeyboardInterrupt
        except BaseException as error:  # noqa: BLE001
            met.append(error)

    if ours == "a thread of a pool":
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    else:
        before = signal.signal(signal.SIGINT, lambda *_: None)
        try:
            work()
        finally:
            signal.signal(signal.SIGINT, before)
    assert [type(error) for error in met] == [RecipeExit]


def test_the_frames_that_are_shown_are_the_users_and_the_innermost() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Sequential(nn.Linear(2, 2)))

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.inner(x)
            return found

    try:
        Model()(torch.ones(1, 3))
    except RuntimeError as error:
        lines = short_traceback(error).splitlines()
    assert lines[-2].endswith("in forward: found: Tensor = self.inner(x)") and "test_failures.py" in lines[-2]
    assert lines[-1].startswith("linear.py") and not any("in _call_impl" in line for line in lines)


def test_a_failure_is_one_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        failure = Failure.of(error, "shard 1 of step 2", worker="w0")
    failure.stop(MemoryLedger(MemoryPlane(), "mine"))
    [record] = caplog.records
    said = record.getMessage()
    assert record.levelname == "ERROR" and "\n" not in said
    assert said.startswith(
        "run mine failed: shard 1 of step 2 failed on worker w0: ValueError: two lines at "
    )
    assert said.endswith('raise ValueError("two\\nlines")')
