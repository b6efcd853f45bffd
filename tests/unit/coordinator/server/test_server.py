"""When a training server launches an evaluation, and that it does one thing at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.support.control import worker
from tests.support.waiting import PATIENCE_SECONDS, wait_until
from torchord.cache.errors import RunNotFound
from torchord.cache.settings import Settings
from torchord.coordinator.runtime.context import Contexts
from torchord.coordinator.runtime.services import Services
from torchord.coordinator.server.finish import Finish
from torchord.coordinator.server.server import TrainingServer
from torchord.coordinator.server.warm_run import WarmRun
from torchord.coordinator.spec.config import TrainingConfig


class Ends(Finish):
    """Notes the versions whose evaluation it would launch."""

    def __init__(self) -> None:
        self.launched: list[int] = []

    def launch_evaluation(self, warm: Any) -> bool:
        self.launched.append(warm.version)
        return True


class Warm(WarmRun):
    """A run at one version, of which nothing is made."""

    def __init__(self, version: int, context: Any) -> None:
        self.version, self.context = version, context


def evaluated(
    every: int | None, evaluation: object = "a dataset", total: int = 6, start: bool = False
) -> list[int]:
    """The versions of a run of `total` steps at which an evaluation is launched beside the steps."""
    ends = Ends()
    for version in range(total + 1):
        context = SimpleNamespace(
            config=TrainingConfig(evaluate_every=every, evaluate_at_start=start),
            plan=lambda: SimpleNamespace(total_steps=total),
            recipe=SimpleNamespace(evaluation=evaluation),
        )
        ends.evaluate_if_due(Warm(version, context))
    return ends.launched


@pytest.mark.parametrize(
    ("every", "versions"),
    [(2, [2, 4]), (4, [4]), (1, [1, 2, 3, 4, 5]), (7, []), (None, [])],
    ids=["not the first, nor the last, which its end evaluates", "4", "each", "beyond the end", "never"],
)
def test_an_evaluation_is_launched_at_each_version_that_the_config_asks_for(
    every: int | None, versions: list[int]
) -> None:
    assert evaluated(every) == versions


def test_no_evaluation_without_a_dataset_for_it() -> None:
    assert evaluated(2, evaluation=None) == []


def test_version_0_is_evaluated_where_the_config_asks_for_it() -> None:
    assert evaluated(4, start=True) == [0, 4]


# --- one thing at a time ------------------------------------------------------------------


class Lock:
    """A lock that says when somebody has to wait for it."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.waited_for = threading.Event()

    def __enter__(self) -> None:
        if not self.lock.acquire(blocking=False):
            self.waited_for.set()
            self.lock.acquire()

    def __exit__(self, *_: object) -> None:
        self.lock.release()


class Busy:
    """A training server whose first call is in the middle of its work until `go` is set.

    Attributes:
        begun: the runs that calls have begun to work on.
    """

    def __init__(self, redis_url: str) -> None:
        services = Services(Settings(url=redis_url))
        heartbeat = SimpleNamespace(info=worker("s0"), doing=lambda task: None)
        self.server = TrainingServer(Contexts(services), cast(Any, heartbeat), cast(Any, None))
        self.server._lock = cast(Any, Lock())
        self.begun: list[str] = []
        self.go = threading.Event()
        services.ledger = self.working  # type: ignore[method-assign, assignment]

    def working(self, run: str) -> Any:
        self.begun.append(run)
        assert len(self.begun) > 1 or self.go.wait(PATIENCE_SECONDS)
        raise RunNotFound(run)

    def advance(self, run: str) -> None:
        with pytest.raises(RunNotFound):
            self.server.advance(run)

    def meanwhile(self, act: Callable[[], None]) -> list[str]:
        """Begin a call, act in another thread until that waits or is done; what has begun by then."""
        with ThreadPoolExecutor(2) as threads:
            first = threads.submit(self.advance, "first")
            try:
                wait_until(lambda: self.begun, message="the first call to be at work")
                second = threads.submit(act)
                lock = cast(Lock, self.server._lock)
                wait_until(
                    lambda: lock.waited_for.is_set() or second.done() or len(self.begun) > 1,
                    message="the second call to wait",
                )
                assert not second.done()
                return list(self.begun)
            finally:
                self.go.set()
                first.result()
                second.result()


def test_a_call_waits_for_the_one_before(redis_url: str) -> None:
    """A worker with several threads gets the calls of two runs, or of one run twice, at once."""
    busy = Busy(redis_url)
    assert busy.meanwhile(lambda: busy.advance("second")) == ["first"]
    assert busy.begun == ["first", "second"]


def test_the_end_of_the_process_waits_for_the_step_under_way(redis_url: str) -> None:
    """Else its runs would be handed over with a version that is not committed yet."""
    busy = Busy(redis_url)
    assert busy.meanwhile(busy.server.leave) == ["first"]
