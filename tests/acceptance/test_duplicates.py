"""Exactly once: whatever is delivered twice, late, early or out of order changes a counter and nothing else.

- relay: real workers, and between the broker's queues and theirs a relay that delivers every message,
  the callbacks too, two or three times, out of order, and old ones again;
- re-sent: real workers, and each step's shards sent again by name while it runs and after its commit;
- shuffled: Clients and a server in this process, one message at a time, in every order that a seed gives.
"""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery

from tests.support import models, recipes_more, reference
from tests.support.fleet import Fleet, finished, fleet
from tests.support.shuffle import Shuffle
from tests.support.waiting import wait_until
from torchord import Master, Run, TrainingConfig
from torchord.cache.settings import Settings
from torchord.coordinator.messages.sender import Sender
from torchord.coordinator.messages.task_names import (
    APPLY_UPDATE,
    COMPUTE_GRADIENT,
    GRADIENTS,
    UPDATES,
    private_queue,
)
from torchord.coordinator.runtime.services import Services
from torchord.coordinator.server.supervisor.supervisor import Supervisor
from torchord.coordinator.server.upkeep import Upkeep
from torchord.coordinator.spec.plan import Plan

# 33 examples in batches of 8: four steps of four shards, then one of a single example and a single shard,
# whose sample the test holds back until it has counted.
SIZE, SLOTS = 33, 17
CONFIG = TrainingConfig(epochs=1, batch_size=8, shards=4, seed=5, audit_fraction=0)
LAST = int(Plan(SIZE, CONFIG).indices(4, 0)[0])
_RELAYED = {GRADIENTS: "relayed-gradients", UPDATES: "relayed-updates"}


@pytest.fixture
def sender() -> Iterator[Any]:
    """A function (url) -> a `Sender` of this test's own."""
    apps: list[Celery] = []

    def make(url: str) -> Sender:
        app = Celery("duplicates", broker=url, set_as_current=False)
        app.conf.update(task_ignore_result=True)
        apps.append(app)
        return Sender(app)

    yield make
    for app in apps:
        app.close()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A training server and two Clients."""
    with fleet(tmp_path_factory.mktemp("duplicates"), workers=2) as one:
        yield one


def ignored(run: Run) -> int:
    """Duplicates that the ledger has counted so far."""
    head = run._ledger.head()
    return head.duplicates + head.late


def unchanged(run: Run, gate: Path) -> None:
    """The run ended with the bits of a loop that saw every shard once."""
    trained = finished(run)
    recipe = recipes_more.gated(str(gate), LAST, SIZE)
    assert reference.bits(trained.module) == reference.average(recipe, CONFIG).bits
    audit = run.verify()
    assert (audit.steps, audit.slots, audit.divergent, audit.replayed) == (5, SLOTS, 0, 0)


# --- a relay between the broker's queues and the workers' ---------------------------------


class Relay(threading.Thread):
    """Takes every message off the broker's queues and puts copies of it on those that the workers read.

    A gradient task is pushed two or three times, among what else is waiting, and may come once more
    some messages later, by when its step is often over. A callback is pushed two or three times, too.

    Attributes:
        gradients: gradient messages that were delivered, copies included.
        callbacks: the same for the server's.
    """

    def __init__(self, url: str, server_queue: str, seed: int) -> None:
        super().__init__(daemon=True)
        self.client = redis.Redis.from_url(url, decode_responses=True)
        self.sources = [GRADIENTS, UPDATES, server_queue]
        self.random = random.Random(seed)
        self.gradients = self.callbacks = 0
        self.old: list[str] = []
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.is_set():
            first = self.client.brpop(self.sources, timeout=0.1)
            if first is None:
                continue
            waiting = [first]
            for source in self.sources:  # a chord's header arrives as one: shuffle it
                while (text := self.client.rpop(source)) is not None:
                    waiting.append((source, text))
            copies = [pair for pair in waiting for _ in range(self.random.choice((2, 3)))]
            copies += [(GRADIENTS, text) for text in self.old if self.random.random() < 0.2]
            self.old += [text for source, text in waiting if source == GRADIENTS]
            self.random.shuffle(copies)
            for source, text in copies:
                if source == GRADIENTS:
                    self.gradients += 1
                    self.client.lpush(_RELAYED[GRADIENTS], text)
                else:
                    self.callbacks += 1
                    self.client.lpush(_RELAYED[UPDATES], text)

    def stop(self) -> None:
        self.ended.set()
        self.join(10)
        self.client.close()


def test_every_message_is_delivered_two_or_three_times(sender: Any, tmp_path: Path) -> None:
    queues = {"client": _RELAYED[GRADIENTS], "server": _RELAYED[UPDATES]}
    gate = tmp_path / "gate"
    with fleet(tmp_path, workers=2, queues=queues) as one:
        client = redis.Redis.from_url(one.cluster.url, decode_responses=True)
        host = str(client.zrange("torchord:workers", 0, 0)[0]).partition("@")[2].partition("/")[0]
        relay = Relay(one.cluster.url, private_queue(f"server@{host}"), seed=1)
        # The relayed server does not consume `updates`, so no supervisor runs beside it; here is one.
        supervisor = Supervisor(Services(Settings(one.cluster.url)), "test", sender(one.cluster.url))
        relay.start()
        supervisor.start()
        try:
            run = one.master.submit(recipes_more.gated(str(gate), LAST, SIZE), CONFIG, name="relayed")
            wait_until(Path(f"{gate}.waiting").exists, message="the last shard")
            # One delivery of each of the 17 shards was computed or is being; every other one was ignored.
            wait_until(
                lambda: ignored(run) == relay.gradients - SLOTS,
                message=lambda: f"{relay.gradients - SLOTS} duplicates",
            )
            gate.touch()
            unchanged(run, gate)
        finally:
            gate.touch()
            supervisor.stop()
            relay.stop()
            client.close()
        assert run.verify().duplicates_ignored == relay.gradients - SLOTS >= SLOTS
        # Callbacks came more often than there were steps, and did nothing more.
        log = one.log("server")
        assert log.count(f"{APPLY_UPDATE}[") > 5 and relay.callbacks >= 2 * 5
        assert log.count("'status': 'committed'") + log.count("'status': 'done'") >= 5


# --- tasks sent again by name ---------------------------------------------------------------


def test_shards_sent_again_while_and_after_their_step(pair: Fleet, sender: Any, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    run = pair.master.submit(recipes_more.gated(str(gate), LAST, SIZE), CONFIG, name="sent-again")
    post = sender(pair.cluster.url)
    plan = Plan(SIZE, CONFIG)
    sent = 0
    try:
        for event in run.events():
            # The step that has just begun, twice (once as a backup, which computes beside a live
            # holder), and once more all the steps before it, which are committed.
            if event.type == "started" or (event.type == "step" and event.data["version"] < 4):
                step = event.data["version"]
                for again in (*range(step), step, step):
                    for shard in range(plan.shards_in(again)):
                        post.gradient("sent-again", again, shard, backup=sent % 2 == 0)
                        sent += 1
            elif event.type == "step":
                break
        wait_until(Path(f"{gate}.waiting").exists, message="the last shard")
        post.gradient("sent-again", 4, 0)  # held by a live worker
        for shard in range(4):
            post.gradient("sent-again", 0, shard)  # late by four steps
        sent += 5
        # Others may have sent a shard of their own accord, if the machine was slow: they log that.
        sends = ("is sent again", "a backup is sent")
        extra = lambda: sum(pair.log(name).count(word) for name in pair.cluster.processes for word in sends)  # noqa: E731
        wait_until(lambda: ignored(run) == sent + extra(), message=lambda: f"{sent} + {extra()} duplicates")
    finally:
        gate.touch()
    unchanged(run, gate)
    assert run.verify().duplicates_ignored == sent + extra() >= 2 * 16


def test_a_callback_twice_and_one_that_comes_early(pair: Fleet, sender: Any, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    run = pair.master.submit(recipes_more.gated(str(gate), LAST, SIZE), CONFIG, name="callbacks")
    post = sender(pair.cluster.url)
    wait_until(Path(f"{gate}.waiting").exists, message="the last shard")
    queue = run._ledger.head().queue

    def call(step: int) -> str:
        kwargs = {"run": "callbacks", "step": step}
        result = post.app.send_task(APPLY_UPDATE, args=[[]], kwargs=kwargs, queue=queue)
        return str(result.id)

    def receipt(task: str) -> str:
        done = f"{APPLY_UPDATE}[{task}] succeeded"
        wait_until(lambda: done in pair.log("server"), message=f"callback {task}")
        return next(line for line in pair.log("server").splitlines() if done in line)

    try:
        early = [call(4), call(4)]  # its one slot is missing
        again = [call(0), call(0), call(3)]  # those of steps that are over
        ahead = [call(5), call(99)]  # of steps that do not exist
        for task in (*early, *again, *ahead):
            assert "'status': 'waiting'" in receipt(task), receipt(task)
        assert run.status().version == 4 and run._ledger.slots_present(4) == set()
    finally:
        gate.touch()
    unchanged(run, gate)
    # And after the end.
    assert "'status': 'done'" in receipt(call(4))
    assert run.status().version == 5
    assert run.verify().ok


# --- every order, one message at a time -----------------------------------------------------


MODES: dict[str, dict[str, Any]] = {
    "exact": {},
    "local steps": {"local_steps": 2, "batch_size": 4},
    "compressed": {"compression": "topk:0.2"},
    "stale": {"staleness": 1},
    "tree": {"shards": 6, "fan_in": 2},
    "tree of all of them": {
        "shards": 6,
        "fan_in": 2,
        "local_steps": 2,
        "compression": "int8:memory=int4",
        "staleness": 1,
    },
    "all of them": {"local_steps": 2, "batch_size": 4, "compression": "int8", "staleness": 1},
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("mode", MODES)
def test_shuffled_deliveries(redis_url: str, tmp_path: Path, mode: str, seed: int) -> None:
    """Any order of any copies, a server that is called at any moment: the bits of an undisturbed run."""
    config = TrainingConfig(**{**CONFIG.to_json(), **MODES[mode], "audit_fraction": 0.5})
    settings = Settings(url=redis_url, checkpoint_dir=str(tmp_path))
    master = Master(redis_url, checkpoint_dir=str(tmp_path))
    recipe = models.mlp(SIZE, evaluation=None, metrics=None)
    quiet = Shuffle(settings, master.submit(recipe, config, name="quiet"), None)
    expected = quiet.train()
    if mode in ("exact", "tree"):
        assert expected == reference.average(recipe, config).bits
    audit = quiet.run.verify()
    slots = audit.slots + audit.partial_sums + audit.checked
    assert audit.checked > 0
    assert bool(audit.partial_sums) == ("tree" in mode)
    assert quiet.verdicts == {"written": slots} and quiet.run.verify().duplicates_ignored == 0

    wild = Shuffle(settings, master.submit(recipe, config, name="wild"), random.Random(seed))
    assert wild.train() == expected
    audit = wild.run.verify()
    assert audit.slots + audit.partial_sums + audit.checked == wild.verdicts["written"] == slots
    counted = sum(wild.verdicts[verdict] for verdict in ("duplicate", "late", "held"))
    assert audit.duplicates_ignored == counted > 0
    assert audit.divergent == audit.replayed == 0
    known = {"written", "duplicate", "late", "held", "early", "stopped"}
    if "tree" in mode:
        known.add("overtaken")
    assert set(wild.verdicts) <= known, wild.verdicts


@pytest.mark.parametrize(("number", "below"), [(3, 0), (10, 2), (13, 6)], ids=["shard", "sum", "root"])
def test_lost_bytes_in_a_tree(
    redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, below: int
) -> None:
    """They are made again, with all that they were made from, and the bits stay.

    Eight shards with a fan-in of 2: the slots 8 to 11 sum two shards each, 12 and 13 two of those.
    """
    config = TrainingConfig(**{**CONFIG.to_json(), "shards": 8, "fan_in": 2, "audit_fraction": 0.5})
    settings = Settings(url=redis_url, checkpoint_dir=str(tmp_path))
    wide = partial(models.Mlp, hidden=512)  # too large to travel inside a slot's record
    recipe = models.mlp(SIZE, model=wide, evaluation=None, metrics=None)
    run = Master(redis_url, checkpoint_dir=str(tmp_path)).submit(recipe, config, name="lost")
    monkeypatch.setattr(
        "torchord.cache.blobs.tiered_store.INLINE_NBYTES", 0
    )  # bytes inside a slot are lost with the slot only
    # With each version its optimizer state, however long a step takes here: else the run goes back for it.
    monkeypatch.setattr(Upkeep, "state_due", lambda upkeep, warm: True)
    lab = Shuffle(settings, run, None)
    ledger = run._ledger
    while number not in ledger.slots_present(2):
        lab._in_order()
    lab.server.services.gradients.delete([ledger.slots(2)[number].blob])
    assert lab.train() == reference.average(recipe, config).bits
    audit = run.verify()
    assert lab.verdicts["written"] == audit.slots + audit.partial_sums + audit.checked + 1 + below
    assert lab.verdicts["input lost"] == (number != 13), "the training server finds that a root's are"
    assert audit.divergent == audit.duplicates_ignored == 0


def test_messages_say_what_a_duplicate_is_of(redis_url: str, sender: Any) -> None:
    """A gradient message is small JSON that names run, step and shard: two copies are the same work."""
    post = sender(redis_url)
    post.gradient("named", 3, 1)
    client = redis.Redis.from_url(redis_url, decode_responses=True)
    message = json.loads(client.rpop(GRADIENTS))
    client.close()
    assert message["headers"]["task"] == COMPUTE_GRADIENT
    assert message["content-type"] == "application/json"
    assert len(json.dumps(message)) < 2000
