"""What rests from version to version is stored once and fetched once, and no bit depends on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.acceptance.test_lost_bytes import go_on
from tests.support import models, reference, resting
from tests.support.shuffle import Shuffle
from torchord import Master, Recipe, Run, TrainingConfig
from torchord.cache.ledger.heartbeat import Heartbeat
from torchord.cache.ledger.workers import new_info
from torchord.cache.settings import Settings
from torchord.coordinator.messages.task_names import GRADIENTS, UPDATES
from torchord.coordinator.runtime.context import Contexts
from torchord.coordinator.runtime.services import Services
from torchord.coordinator.server.server import TrainingServer

CONFIG = TrainingConfig(epochs=1, batch_size=8, shards=2, seed=3, checkpoint_every=2)  # six steps
LAST = 6

WAKING = {"late": "mean", "offset": "mean"}
RECIPES: dict[str, Callable[[], Recipe]] = {
    "adapters": resting.recipe,
    "statistics move": partial(resting.recipe, resting.Backbone),
    "begins to move": partial(resting.recipe, resting.Waking, buffers=WAKING),
    "frozen, and written": partial(resting.recipe, partial(resting.Waking, parameter=True), buffers=WAKING),
    "written past autograd": partial(
        resting.recipe, resting.Teacher, optimizer=partial(resting.Averaging, lr=0.1)
    ),
}


class Laboratory(Shuffle):
    """Delivers messages in order; a training server may die at any point and is followed by another."""

    def __init__(self, settings: Settings, run: Run) -> None:
        super().__init__(settings, run, None)
        self.settings = settings
        self.deaths: list[str] = []

    def train_to(self, version: int) -> None:
        """Deliver until a version is committed and its commit's work is done."""
        while self.run._ledger.head().version < version or self.post.callbacks:
            self._in_order()

    def die_at(self, points: list[str]) -> None:
        """Have the present server die at the second time that the first of these points comes, and so on."""
        times: list[str] = []

        def reached(point: str) -> None:
            times.append(point)
            if points and point == points[0] and times.count(point) == 2:
                self.deaths.append(points.pop(0))
                raise Death(point)

        services = Services(self.settings)
        heartbeat = Heartbeat(services.registry, new_info("server@here", (GRADIENTS, UPDATES)))
        services.registry.beat(heartbeat.info)
        self.server = TrainingServer(Contexts(services), heartbeat, self.post, fault=reached)

    def train_on(self, points: list[str]) -> dict[str, Any]:
        """Train to the end with the servers dying at these points, one after the other."""
        self.die_at(points)
        for _ in range(len(points) + 1):
            try:
                go_on(self)
                break
            except Death:
                self.post.advance(self.run.name)  # as the supervisor does
                self.die_at(points)
        return reference.bits(self.run.model())


class Death(BaseException):
    """A process ends here."""


@pytest.fixture
def start(redis_url: str, tmp_path: Path) -> Iterator[Callable[..., Laboratory]]:
    made: list[Laboratory] = []

    def start(recipe: Recipe, name: str, *, host_cache: bool = False, **changes: Any) -> Laboratory:
        master = Master(redis_url, checkpoint_dir=str(tmp_path))
        run = master.submit(recipe, TrainingConfig(**{**CONFIG.to_json(), **changes}), name=name)
        settings = Settings(url=redis_url, checkpoint_dir=str(tmp_path), host_cache=host_cache)
        made.append(Laboratory(settings, run))
        return made[-1]

    yield start
    for lab in made:
        for part in (lab.server, *lab.clients):
            part.contexts.close()


def rest_keys(lab: Laboratory) -> set[str]:
    """Blobs of what rests that are in the store."""
    client = redis.Redis.from_url(lab.settings.url)
    return {
        key.decode().rpartition(":")[0] for key in client.scan_iter(f"torchord:blob:{lab.run.name}:rest:*")
    }


def named(lab: Laboratory) -> set[str]:
    """Blobs of what rests that a record names."""
    return {r.rest.blob.key for r in lab.run._ledger.versions().values() if r.rest is not None}


@pytest.mark.parametrize(
    ("name", "host_cache"),
    [*((name, False) for name in RECIPES), ("adapters", True), ("begins to move", True)],
)
def test_the_bits_of_a_plain_loop(
    start: Callable[..., Laboratory], monkeypatch: pytest.MonkeyPatch, name: str, host_cache: bool
) -> None:
    """And of versions stored whole: whatever rests, for however long, and wherever it is fetched from."""
    recipe = RECIPES[name]()
    lab = start(recipe, "run", host_cache=host_cache)
    rested = []
    for version in range(LAST):
        lab.train_to(version)
        record = lab.run._ledger.version(version)
        rested.append(0 if record.rest is None else record.rest.blob.nbytes)
        assert rest_keys(lab) == named(lab), "what nobody names is gone"
    found, chain = lab.train(), lab.run._ledger.head().chain
    monkeypatch.setattr("torchord.coordinator.runtime.version_writer.LEAST_NBYTES", 1 << 40)
    whole = start(recipe, "whole")
    assert found == whole.train() and chain == whole.run._ledger.head().chain
    assert not rest_keys(whole)
    if name != "frozen, and written":  # by each shard of the loop, one after the other
        assert found == reference.accumulate(recipe, CONFIG).bits
    assert lab.run.verify(reexecute=[1, LAST - 1]).ok
    assert all(rested), rested
    if name == "adapters":
        assert len(set(rested)) == 1
    else:
        assert rested == sorted(rested, reverse=True) and len(set(rested)) > 1, rested


def test_bytes_a_step_of_a_model_with_adapters(start: Callable[..., Laboratory]) -> None:
    """12.8 MB of which 0.06 MB are trained: a step moves what is trained, not what is frozen."""
    recipe = resting.recipe(width=512, layers=12)
    model = recipe.model()
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    whole = sum(p.nbytes for p in model.parameters())
    lab = start(recipe, "lora", checkpoint_every=1000)
    stores = [part.contexts.services.chunks for part in (lab.server, *lab.clients)]

    def moved() -> tuple[int, int]:
        return sum(s.counters.written_nbytes for s in stores), sum(s.counters.store_nbytes for s in stores)

    lab.train_to(1)
    first = moved()
    lab.train_to(5)
    wrote, read = ((now - before) / 4 for now, before in zip(moved(), first, strict=True))
    print(
        f"\n{whole / 1e6:.1f} MB, {trained / 1e6:.3f} MB trained: first step {first[0] / 1e6:.2f} MB in and "
        f"{first[1] / 1e6:.2f} MB out, each one after it {wrote / 1e6:.3f} MB in and {read / 1e6:.3f} MB out"
    )
    assert first[0] > whole and first[1] > whole
    shards, versions, moments = 2, 1, 2
    assert wrote < 1.1 * trained * (versions + 2 * shards + moments), "a shard may be computed twice"
    assert read < 1.1 * trained * (versions + 2 * shards)
    assert len(rest_keys(lab)) == 1


def test_a_server_reads_what_rests_once_and_no_more(start: Callable[..., Laboratory]) -> None:
    """When it takes the run over, with staleness, too; checkpoints of a stale run's window read none."""
    lab = start(resting.recipe(), "server", staleness=2)
    lab.train_to(3)
    record = lab.run._ledger.version(3)
    assert record is not None and record.rest is not None
    services = lab.server.contexts.services
    assert services.chunks.counters.store_nbytes < record.rest.blob.nbytes / 2, "what moves, and gradients"
    lab.die_at([])
    lab.post.advance(lab.run.name)
    lab.train_to(5)
    read = lab.server.contexts.services.chunks.counters.store_nbytes
    assert record.rest.blob.nbytes < read < 1.5 * record.rest.blob.nbytes
    go_on(lab)
    assert lab.run.verify().ok


def test_a_model_that_moves_is_stored_whole(start: Callable[..., Laboratory]) -> None:
    """Buffers that are small beside the rest are none of it: one blob a version, as ever."""
    lab = start(models.cnn(48), "moves")
    lab.train()
    assert all(r.rest is None for r in lab.run._ledger.versions().values())
    assert not rest_keys(lab)


DEATHS = [
    "server.after_publish",
    "server.after_commit",
    "server.after_state",
    "server.after_apply",
]


@pytest.mark.parametrize("name", ["adapters", "begins to move", "written past autograd"])
def test_a_server_dies_at_any_point(
    start: Callable[..., Laboratory], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Its successor goes on with what is stored; what rests is named by digest and stored once for both."""
    monkeypatch.setattr("torchord.coordinator.server.server.contained", nullcontext)  # nothing stops a death
    recipe = RECIPES[name]()
    lab = start(recipe, "dies")
    assert lab.train_on(list(DEATHS)) == reference.accumulate(recipe, CONFIG).bits
    assert lab.deaths == DEATHS
    assert lab.run.verify().ok
    assert rest_keys(lab) == named(lab)


MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "stale": {"staleness": 1},
    "deltas": {"parameter_compression": "int8"},
    "local steps": {"local_steps": 2, "batch_size": 4},
}


@pytest.mark.parametrize(
    ("mode", "lost"), [*((mode, "what rests") for mode in MODES), ("plain", "all"), ("stale", "all")]
)
def test_stored_bytes_are_lost(start: Callable[..., Laboratory], mode: str, lost: str) -> None:
    """The server stores them again, or goes back and replays; a Client that has none is served."""
    recipe, found, changes = resting.recipe(), [], {**MODES[mode]}
    for loses in (False, True):
        lab = start(recipe, f"loses-{loses}", **changes)
        lab.train_to(3)
        if loses:
            records = lab.run._ledger.versions().values()
            gone = {
                b.key: b for r in records for b in (r.shared_blobs() if lost == "what rests" else r.blobs())
            }
            lab.server.contexts.services.chunks.delete(gone.values())
            lab.clients[0].contexts.forget(lab.run.name)  # it held what rests
        go_on(lab)
        assert lab.run.status().state == "done" and lab.run.verify().ok
        sources = {slot.fetched for entry in lab.run._ledger.entries() for slot in entry.slots}
        assert ("delta" in sources) == (mode == "deltas")
        found.append((reference.bits(lab.run.model()), lab.run._ledger.head().chain))
        assert rest_keys(lab) == named(lab) != set()
    assert found[0] == found[1]
