"""How a process becomes a run's training server: the first version, or the newest that can be restored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from torch import Tensor

from tests.support import models
from tests.support.control import entry, slot, worker, write
from tests.support.inprocess import same
from tests.support.shuffle import Shuffle
from torchord import Master, Run, TrainingConfig
from torchord.cache.errors import Fenced, Skewed
from torchord.cache.ledger.ledger import Ledger
from torchord.cache.settings import Settings
from torchord.coordinator.compute.trainer import Trainer
from torchord.coordinator.runtime.context import RunContext
from torchord.coordinator.runtime.services import Services
from torchord.coordinator.server.takeover import TakeOver
from torchord.coordinator.server.upkeep import Upkeep
from torchord.coordinator.server.warm_run import WarmRun

CONFIG = TrainingConfig(epochs=3, batch_size=8, shards=2, seed=3)
RECIPE = models.mlp(24, model=partial(models.Mlp, hidden=1000))
"""Too large for the ledger's records: the bytes of a version lie in chunks, which may get lost."""


class Site:
    """A run in a real ledger, whose training servers are made here and do as this test says.

    Attributes:
        points: the points of the protocol that a takeover has passed.
        act: called at each of them.
    """

    def __init__(self, url: str, folder: Path, config: TrainingConfig = CONFIG) -> None:
        self.services = Services(Settings(url=url, checkpoint_dir=str(folder), host_cache=False))
        self.run: Run = Master(url, checkpoint_dir=str(folder)).submit(RECIPE, config, name="taken")
        self.ledger: Ledger = self.services.ledger("taken")
        self.points: list[str] = []
        self.act: Callable[[str], None] = lambda point: None
        self.config = config

    def fault(self, point: str) -> None:
        self.points.append(point)
        self.act(point)

    def acquire(self, node: str = "celery@s0") -> int:
        info = worker("s0", node=node)
        self.services.registry.leave(info)  # whoever had the run before is gone
        verdict, token = self.ledger.acquire(worker=info.id, node=info.node, queue="updates.s0")
        assert verdict == "acquired"
        return int(token)

    def take_over(self, token: int | None = None) -> WarmRun:
        """What the next server of the run starts from."""
        self.points.clear()
        context = RunContext(self.services, "taken", self.ledger.head().incarnation)
        token = self.acquire() if token is None else token
        return TakeOver(self.services, self.fault, context, token).warm(self.ledger.head())

    def step(self, warm: WarmRun, *, state: bool) -> dict[str, Tensor]:
        """Commit a step whose gradients are made up; the new version's parameters.

        Args:
            state: whether its optimizer state is stored, too.
        """
        step, trainer, parameters = warm.version, warm.trainer, self.services.parameters
        for tensor in trainer.replica.state_tensors().values():
            tensor.add_(1)
        slots = [slot(step, shard) for shard in range(self.config.shards)]
        for each in slots:
            write(self.ledger, step, each)
        made = entry(step + 1, slots, warm.chain, token=warm.token)
        record = parameters.publish(self.ledger, step + 1, trainer.replica.pack(None), chain=made.chain)
        if state:
            record = parameters.publish_state(self.ledger, record, trainer.state(copies=False))
        done = self.ledger.commit(
            step=step, token=warm.token, shards=len(slots), entry=made, record=record, event={}
        )
        assert done.verdict == "ok"
        warm.version, warm.chain, warm.record = step + 1, made.chain, record
        return parameters_of(warm)

    def checkpoint(self, warm: WarmRun) -> None:
        Upkeep(self.services, lambda point: None).checkpoint(warm)

    def lose(self, warm: WarmRun) -> None:
        """The bytes of a warm run's version go; it is recorded all the same."""
        self.services.chunks.delete([warm.record.blob])


def parameters_of(warm: WarmRun) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in warm.trainer.replica.state_tensors().items()}


def assert_at(warm: WarmRun, version: int, expected: dict[str, Tensor]) -> None:
    """A warm run and the head of its ledger are at a version with these parameters."""
    head = warm.ledger.head()
    assert (warm.version, head.version, head.chain) == (version, version, warm.chain)
    found = parameters_of(warm)
    assert found.keys() == expected.keys()
    assert all(same(found[name], expected[name]) for name in found)


@pytest.fixture
def site(redis_url: str, tmp_path: Path) -> Iterator[Site]:
    made = Site(redis_url, tmp_path)
    yield made
    made.services.close()


# --- the first version --------------------------------------------------------------------------


def test_a_run_that_waits_is_initialised(site: Site) -> None:
    warm = site.take_over()
    head = site.ledger.head()
    assert (head.status, head.version, head.total_steps) == ("running", 0, 9)
    initial = Trainer.build(warm.context.recipe, CONFIG).replica.state_tensors()
    assert_at(warm, 0, dict(initial))
    assert warm.record.state is not None and site.ledger.versions() == {0: warm.record}
    saved = warm.checkpoints.load_spec()
    assert saved is not None and saved["incarnation"] == warm.context.incarnation
    assert site.points == ["server.before_initialise", "server.after_initialise"]


def test_a_run_that_was_cancelled_meanwhile_is_not_initialised(site: Site) -> None:
    site.act = lambda point: site.run.cancel() if point == "server.before_initialise" else None
    with pytest.raises(Fenced, match="run 'taken': another server or a person acted"):
        site.take_over()
    assert site.ledger.head().status == "cancelled"
    assert site.points == ["server.before_initialise"]


# --- restored -----------------------------------------------------------------------------------


def test_the_newest_version_with_its_optimizer_state_is_taken_as_it_is(site: Site) -> None:
    first = site.take_over()
    site.step(first, state=True)
    newest = site.step(first, state=True)
    warm = site.take_over()
    assert_at(warm, 2, newest)
    assert (warm.token > first.token, warm.state_version, warm.spilled) == (True, 2, 0)
    assert site.points == []


def test_without_its_state_the_head_goes_back_and_what_is_above_is_dropped(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    first = site.take_over()
    site.step(first, state=True)
    restored = site.step(first, state=True)
    site.step(first, state=False)
    site.step(first, state=False)
    warm = site.take_over()
    assert_at(warm, 2, restored)
    assert sorted(site.ledger.versions()) == [0, 1, 2]
    assert site.ledger.head().replayed == 2
    assert site.points == ["server.before_rollback", "server.after_rollback"]
    assert "replaying from version 2 to 4" in caplog.text


def test_a_version_whose_bytes_are_lost_is_passed_over(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    first = site.take_over()
    restored = site.step(first, state=True)
    site.step(first, state=True)
    site.lose(first)
    assert_at(site.take_over(), 1, restored)
    assert "version 2 cannot be restored" in caplog.text


@pytest.mark.parametrize("lost", [1, 2])
def test_with_staleness_it_needs_the_versions_before_it_too(
    redis_url: str, tmp_path: Path, lost: int
) -> None:
    """Version 3 is restored with version 2, at which its step is computed; without it, an earlier one is."""
    site = Site(redis_url, tmp_path, replace(CONFIG, staleness=1))
    warm = site.take_over()
    held = {}
    for version in (1, 2, 3):
        held[version] = site.step(warm, state=True)
        if version == lost:
            site.lose(warm)
    assert_at(site.take_over(), {1: 3, 2: 1}[lost], held[{1: 3, 2: 1}[lost]])
    site.services.close()


# --- from the disk ------------------------------------------------------------------------------


def test_a_checkpoint_that_is_newer_than_what_can_be_restored_is_taken(site: Site) -> None:
    first = site.take_over()
    site.step(first, state=True)
    kept = site.step(first, state=True)
    site.checkpoint(first)
    site.lose(first)
    site.step(first, state=False)
    warm = site.take_over()
    assert_at(warm, 2, kept)
    assert warm.spilled == 2 and warm.record.state is not None
    assert site.services.parameters.fetch(site.ledger, 2)[0] == site.ledger.versions()[2], (
        "it is stored again"
    )


def test_a_damaged_checkpoint_is_passed_over(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    first = site.take_over()
    kept = site.step(first, state=False)
    site.checkpoint(first)
    site.step(first, state=False)
    site.checkpoint(first)
    site.services.chunks.delete([record.blob for record in site.ledger.versions().values()])
    [damaged] = Path(first.checkpoints.path(2)).parent.glob("version-000000002.tensors*")
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert_at(site.take_over(), 1, kept)
    assert "checkpoint 2 passed over" in caplog.text


def test_a_checkpoint_of_another_course_is_passed_over(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """Its chain is not the ledger's: the version of that number was committed with other bytes."""
    first = site.take_over()
    initial = parameters_of(first)
    site.step(first, state=False)
    first.chain = "another"
    site.checkpoint(first)
    site.lose(first)
    site.services.chunks.delete([site.ledger.versions()[0].blob])
    assert_at(site.take_over(), 0, initial)
    assert "is of another course of run 'taken'" in caplog.text


def test_where_nothing_is_left_the_run_begins_anew(site: Site) -> None:
    first = site.take_over()
    initial = parameters_of(first)
    site.step(first, state=True)
    site.services.chunks.delete([record.blob for record in site.ledger.versions().values()])
    warm = site.take_over()
    assert_at(warm, 0, initial)
    assert warm.record.state is not None


# --- who may not --------------------------------------------------------------------------------


def test_a_process_whose_code_builds_another_model_is_refused(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.step(site.take_over(), state=True)
    build, other = Trainer.build, partial(models.Mlp, hidden=9)
    monkeypatch.setattr(
        Trainer, "build", lambda recipe, *rest, **named: build(replace(recipe, model=other), *rest, **named)
    )
    with pytest.raises(Skewed, match="run 'taken': tensor"):
        site.take_over()
    assert site.ledger.head().version == 1, "nothing was taken back for it"


@pytest.mark.parametrize("state", [True, False], ids=["at the head", "behind it"])
def test_who_was_overtaken_while_restoring_is_fenced(site: Site, state: bool) -> None:
    first = site.take_over()
    site.step(first, state=True)
    site.step(first, state=state)
    old = site.acquire()
    site.acquire("celery@s1")
    if state:
        assert site.take_over(old).version == 2, "it writes nothing, and its first commit is refused"
    else:
        with pytest.raises(Fenced, match="overtaken while restoring"):
            site.take_over(old)
    assert site.ledger.head().version == 2


def test_who_was_overtaken_stores_no_version_from_the_disk(site: Site) -> None:
    first = site.take_over()
    site.step(first, state=False)
    site.checkpoint(first)
    old = site.acquire()
    site.acquire("celery@s1")
    with pytest.raises(Fenced, match="overtaken while restoring"):
        site.take_over(old)
    assert site.ledger.head().version == 1


def test_a_server_that_takes_over_at_the_step_of_a_switch_has_the_same_bits(
    redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state of a version is that of the optimizer that made it; the next one starts afresh after it."""
    monkeypatch.setattr(Upkeep, "state_due", lambda upkeep, warm: True)
    config = TrainingConfig(epochs=2, batch_size=8, shards=2, local_steps=2, seed=3)
    found = []
    for name in ("undisturbed", "taken-over"):
        run = Master(redis_url, checkpoint_dir=tmp_path).submit(
            models.mlp(evaluation=None), config, name=name
        )
        lab = Shuffle(Settings(url=redis_url, checkpoint_dir=str(tmp_path)), run, None)
        lab._in_order()
        at = run.switch(local_steps=1)
        while run.status().version < at:
            lab._in_order()
        if name == "taken-over":
            lab.server._warm.clear()
            lab.post.callbacks += 1
        found.append(lab.train())
    assert found[0] == found[1]
