"""When a batch is read ahead, which one, and when that is given up."""

from __future__ import annotations

import threading
from typing import Any, cast

import pytest

from tests.support import models
from tests.support.inprocess import resolved
from torchord import TrainingConfig
from torchord.coordinator.client import batch_prefetch as prefetch
from torchord.coordinator.client.batch_prefetch import Prefetcher
from torchord.coordinator.runtime.services import RunContext
from torchord.coordinator.spec.plan import Plan

SLOW = 1.0  # seconds: worth reading ahead


class Context:
    """As much of a `RunContext` as is needed, for 3 shards of 2 examples a step."""

    run = "unit"

    def __init__(self, **changes: Any) -> None:
        self.lock = threading.RLock()
        self.recipe = resolved(models.cnn(24))
        self.data = models.Images(24)
        config = {"epochs": 40, "batch_size": 6, "shards": 3, "seed": 1, **changes}
        self._plan = Plan(24, TrainingConfig(**config))

    def plan(self) -> Plan:
        return self._plan

    def dataset(self) -> Any:
        return self.data

    def indices(self, step: int, shard: int) -> Any:
        return self._plan.indices(step, shard)


class Watched:
    """A prefetcher, with what waits in its queue and what it says that it does."""

    def __init__(self, **changes: Any) -> None:
        self.queue = 0
        self.said: list[str] = []
        self.prefetcher = Prefetcher(lambda: self.queue, self.said.append)
        self.plain = Context(**changes)
        self.context = cast(RunContext, self.plain)

    def idle(self, step: int, present: int, seconds: float = SLOW) -> str:
        """The slot is written; what it then says that it reads, "" for nothing."""
        self.said.clear()
        self.prefetcher.observe(self.context, seconds)
        self.prefetcher.idle(self.context, step, present)
        return "".join(self.said)

    def take(self, step: int, shard: int) -> Any:
        indices = self.plain.indices(step, shard)
        return self.prefetcher.take(self.context, step, shard, indices, self.plain.data)


def test_who_becomes_idle_first_reads_the_first_shard() -> None:
    for rank, present in enumerate((1, 2, 3)):
        one = Watched()
        one.idle(4, 1)  # it has seen two others at work
        assert one.idle(5, present) == f"unit: gradient of shard {rank}, step 6"


def test_a_batch_is_handed_out_once_and_for_its_place_only() -> None:
    one = Watched()
    one.idle(4, 1)
    batch = one.take(5, 0)
    assert batch is not None and batch.examples == 2
    assert one.take(5, 0) is None
    one.idle(5, 1)
    assert one.take(6, 1) is None, "another shard"
    one.idle(6, 1)
    one.plain.data = models.Images(24)
    assert one.take(7, 0) is None, "another dataset"


def test_the_bits_are_those_of_reading_it_later() -> None:
    from torchord.coordinator.compute.determinism import pinned
    from torchord.coordinator.compute.gradient import read_batch

    one = Watched()
    one.idle(4, 1)
    ahead = one.take(5, 0)
    with pinned(1, True):
        plan = one.plain.plan()
        later = read_batch(one.plain.recipe, plan.config_at(5), one.plain.data, plan.indices(5, 0), (5, 0))
    assert all(a.equal(b) for a, b in zip(ahead.value, later.value, strict=True))


@pytest.mark.parametrize(
    ("changes", "step", "seconds", "queue"),
    [
        ({}, 4, prefetch.LEAST_SECONDS / 2, 0),  # quickly read
        ({}, 4, SLOW, 1),  # work waits
        ({}, 159, SLOW, 0),  # the last step
        ({"local_steps": 2}, 4, SLOW, 0),
    ],
)
def test_nothing_is_read_where_it_cannot_pay(
    changes: dict[str, Any], step: int, seconds: float, queue: int
) -> None:
    one = Watched(**changes)
    one.queue = queue
    assert one.idle(step, 1, seconds) == ""


def test_with_staleness_the_next_launched_step_is_meant() -> None:
    one = Watched(staleness=2)
    assert one.idle(4, 1) == "unit: gradient of shard 0, step 7"


def test_another_thread_at_work_on_the_run_is_not_held_up() -> None:
    one = Watched()
    taken, free = threading.Event(), threading.Event()

    def work() -> None:
        with one.plain.lock:
            taken.set()
            free.wait(60)

    thread = threading.Thread(target=work)
    thread.start()
    taken.wait(60)
    try:
        assert one.idle(4, 1) == ""
    finally:
        free.set()
        thread.join()


def test_wrong_guesses_are_given_up_for_a_while() -> None:
    one = Watched()
    for step in range(4, 4 + prefetch.TRIES):
        assert one.idle(step, 1)
        assert one.take(step + 1, 1) is None
    resting = step + 1 + prefetch.REST_STEPS
    assert one.idle(resting - 1, 1) == ""
    assert one.idle(resting, 1)


def test_a_dataset_that_raises_is_left_to_who_computes_the_shard() -> None:
    one = Watched()

    def missing(index: int) -> Any:
        raise OSError("no such file")

    one.plain.data.__class__ = type("Broken", (models.Images,), {"__getitem__": lambda self, i: missing(i)})
    assert one.idle(4, 1) == "unit: gradient of shard 0, step 5"
    assert one.take(5, 0) is None
