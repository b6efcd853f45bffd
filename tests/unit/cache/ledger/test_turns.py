"""Whose shard is taken next: several runs share a fleet by weight and priority, in the order of one queue."""

from __future__ import annotations

import heapq
import json
import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import redis

from torchord.cache import keys
from torchord.cache.errors import ConfigError
from torchord.cache.ledger.share import checked, share_of
from torchord.cache.scripts import source
from torchord.cache.testing import memory_turns
from torchord.cache.testing.memory_plane import MemoryPlane
from torchord.cache.testing.memory_turns import rank_of

QUEUE = "torchord.gradients"


@dataclass
class Fleet:
    """Workers that take from the queue, and runs whose next step goes out when their last shard is done.

    Attributes:
        runs: name -> (weight, priority, shards of a step, seconds of a shard).
        worked: name -> seconds that workers were at it.
        waited: seconds that each prediction waited.
    """

    workers: int
    runs: dict[str, tuple[float, int, int, float]]
    plane: MemoryPlane = field(default_factory=MemoryPlane)
    worked: dict[str, float] = field(default_factory=dict)
    waited: list[float] = field(default_factory=list)

    def simulate(self, seconds: float, *, predict_every: float | None = None) -> Fleet:
        now, idle = 0.0, self.workers
        events: list[tuple[float, int, str, str]] = []  # (when, tie, kind, run)
        count = iter(range(10**9))
        missing = {}
        for name, (weight, priority, _, _) in self.runs.items():
            self.plane.hset(keys.RunKeys(name).head, {"weight": weight, "priority": priority})
            heapq.heappush(events, (0.0, next(count), "step", name))
        if predict_every:
            heapq.heappush(events, (predict_every, next(count), "predict", next(iter(self.runs))))
        while events and now < seconds:
            now, _, kind, name = heapq.heappop(events)
            if kind == "step":
                _, _, shards, each = self.runs[name]
                missing[name] = shards
                self.put(name, [{"of": name}] * shards, seconds=each)
            elif kind == "predict":
                self.put(name, [{"of": name, "asked": now}], flow=f"{name}?")
                heapq.heappush(events, (now + predict_every, next(count), "predict", name))  # type: ignore[operator]
            else:
                idle += 1
                if kind == "shard":
                    missing[name] -= 1
                    if not missing[name]:
                        heapq.heappush(events, (now + 0.01, next(count), "step", name))
            while idle and (message := self.take()):
                idle -= 1
                name, each = message["of"], self.runs[message["of"]][3]
                if "asked" in message:
                    self.waited.append(now - message["asked"])
                    heapq.heappush(events, (now + 0.02, next(count), "predicted", name))
                    continue
                self.worked[name] = self.worked.get(name, 0.0) + each
                heapq.heappush(events, (now + each, next(count), "shard", name))
        return self

    def put(self, run: str, messages: list[dict[str, Any]], **options: Any) -> None:
        memory_turns.put(self.plane, QUEUE, run, [json.dumps(each) for each in messages], **options)

    def take(self) -> dict[str, Any] | None:
        waiting = list(self.plane.get(QUEUE) or [])
        if not waiting:
            return None
        found: dict[str, Any] = json.loads(waiting.pop())
        self.plane.put(QUEUE, waiting)
        return found

    def share(self, name: str) -> float:
        return self.worked[name] / sum(self.worked.values())


# Between two steps of a heavy run every worker takes from the other one: beyond three they would be too many.
@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("weights", [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("sizes", [((8, 0.1), (8, 0.1)), ((64, 0.1), (8, 0.1)), ((32, 0.05), (16, 0.1))])
def test_runs_share_workers_by_their_weights(workers: int, weights: Any, sizes: Any) -> None:
    runs = {n: (w, 0, *size) for n, w, size in zip("ab", weights, sizes, strict=True)}
    share = Fleet(workers, runs).simulate(400).share("a")
    assert share == pytest.approx(weights[0] / sum(weights), rel=0.1)


@pytest.mark.parametrize("weights", [(3, 1), (1, 4)])
def test_a_run_of_much_weight_has_its_share(weights: Any) -> None:
    runs = {name: (weight, 0, 16, 0.1) for name, weight in zip("ab", weights, strict=True)}
    assert Fleet(2, runs).simulate(400).share("a") == pytest.approx(weights[0] / sum(weights), rel=0.1)


def test_work_of_a_higher_priority_is_taken_first() -> None:
    made = Fleet(2, {"low": (100.0, 0, 8, 0.1), "high": (0.01, 1, 8, 0.1)}).simulate(60)
    assert made.share("high") > 0.75  # all but the pauses between its steps
    made.put("low", [{"of": "low"}] * 3)
    made.put("high", [{"of": "high"}])
    assert (made.take() or {})["of"] == "high"


@pytest.mark.parametrize("shards", [8, 256])
def test_a_prediction_waits_for_what_is_at_work_alone(shards: int) -> None:
    made = Fleet(2, {"big": (1.0, 0, shards, 0.1)}).simulate(60, predict_every=0.37)
    assert len(made.waited) > 100 and max(made.waited) <= 0.2


def test_a_small_run_is_not_starved_by_a_large_one() -> None:
    made = Fleet(2, {"large": (1.0, 0, 512, 0.1), "small": (1.0, 0, 4, 0.1)}).simulate(200)
    assert made.share("small") > 0.4


def test_a_long_rest_earns_one_batch_and_no_more() -> None:
    made = Fleet(1, {"a": (1.0, 0, 4, 0.1), "b": (1.0, 0, 4, 0.1)})
    for _ in range(100):
        made.put("a", [{"of": "a"}] * 4)
    for _ in range(200):
        made.take()
    made.put("b", [{"of": "b"}] * 4)
    made.put("b", [{"of": "b"}] * 4)
    first = [made.take()["of"] for _ in range(12)]  # type: ignore[index]
    assert first[:4] == ["b"] * 4 and 3 <= first[4:].count("b") <= 5


def test_what_has_no_rank_is_never_overtaken() -> None:
    made = Fleet(1, {})
    made.put("a", [{"of": "a"}] * 2)
    made.plane.put(QUEUE, [*made.plane.get(QUEUE), '{"of": "sum"}'])
    made.plane.put(QUEUE, ['{"of": "old"}', *made.plane.get(QUEUE)])
    made.put("b", [{"of": "b"}] * 2)
    order = [made.take()["of"] for _ in range(6)]  # type: ignore[index]
    assert order == ["sum", "a", "a", "old", "b", "b"]


@pytest.mark.parametrize("seed", range(8))
def test_server_and_twin_order_alike(redis_url: str, seed: int) -> None:
    random_, plane = random.Random(seed), MemoryPlane()
    client = redis.Redis.from_url(redis_url, decode_responses=True)
    script = client.register_script(source("enqueue"))
    for run in "abc":
        head = {"weight": random_.choice([0.5, 1.0, 3.0]), "priority": random_.choice([0, 0, 1])}
        plane.hset(keys.RunKeys(run).head, head)
        client.hset(keys.RunKeys(run).head, mapping=head)
    for number in range(60):
        run, count = random_.choice("abc"), random_.randrange(1, 9)
        seconds = random_.choice(["", 0.3, 2.0])
        flow = random_.choice([run, f"{run}?"])
        messages = [json.dumps({"of": run, "number": f"{number}.{k}"}) for k in range(count)]
        memory_turns.put(plane, QUEUE, run, messages, flow=flow, seconds=seconds)
        names = [QUEUE, keys.TURNS, keys.RunKeys(run).head]
        script(keys=names, args=[flow, seconds, keys.WORK_TTL_SECONDS, "", "", *messages])
        for _ in range(random_.randrange(8)):
            waiting = list(plane.get(QUEUE) or [])
            assert client.rpop(QUEUE) == (waiting.pop() if waiting else None)
            plane.put(QUEUE, waiting)
        assert client.lrange(QUEUE, 0, -1) == (plane.get(QUEUE) or [])
        assert dict(client.zrange(keys.TURNS, 0, -1, withscores=True)) == plane.get(keys.TURNS)
    client.delete(QUEUE, *(keys.RunKeys(run).head for run in "abc"))
    client.close()


@pytest.mark.parametrize(
    "text", ['{"rank": "0 9999999999999"}', '{"rank": "x 1"}', "{}", "[]", '{"rank": 3}']
)
def test_what_is_no_rank_counts_as_none(text: str) -> None:
    assert rank_of(text) is None


@pytest.mark.parametrize(
    ("weight", "priority", "said"),
    [
        *((weight, 0, "weight") for weight in (0, 101, "1", float("nan"), True)),
        *((1, priority, "priority") for priority in (1.5, 2000, True)),
    ],
)
def test_a_share_is_in_range(weight: Any, priority: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=f"^{said} must be"):
        checked(weight, priority)
    assert share_of({"config": {"weight": weight, "priority": priority}}) == (1.0, 0)
