"""Submit and walk away: a run belongs to nobody's process, and any process can follow and use it."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support import models, recipes_more, reference
from tests.support.fleet import WAIT_SECONDS, Fleet, finished, fleet
from tests.support.waiting import PATIENCE_SECONDS, wait_until
from torchord import Master, Recipe, TrainingConfig
from torchord.cache.servers.address import masked
from torchord.cache.servers.redis_client import connect
from torchord.coordinator.local_cluster.import_path import ROOT
from torchord.coordinator.spec.plan import Plan

CONFIG = TrainingConfig(epochs=2, batch_size=8, shards=4, seed=6, evaluate_every=3)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A training server and two Clients."""
    with fleet(tmp_path_factory.mktemp("runs"), workers=2) as started:
        yield started


def plain(**changes: Any) -> Recipe:
    """A recipe without evaluation."""
    return models.mlp(**{"evaluation": None, "metrics": None, **changes})


class Program:
    """A Python program of a person who is somewhere else, at a terminal, and knows the URL and a run's name.

    Args:
        body: its source; `URL`, `FOLDER` and `Master` are there.
    """

    def __init__(self, one: Fleet, folder: Path, body: str) -> None:
        head = f"from torchord import *\nURL = {one.cluster.url!r}\nFOLDER = {str(folder)!r}\n"
        self.script = folder / "program.py"
        self.script.write_text(head + dedent(body))
        self.out, self.err = folder / "stdout", folder / "stderr"
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-u", self.script],
                cwd=ROOT,
                env={"PATH": os.defpath, "PYTHONPATH": str(ROOT), "HOME": str(folder), "FORCE_COLOR": "1"},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    def says(self, word: str) -> None:
        """Wait until it has printed `word`."""
        wait_until(
            lambda: word in self.out.read_text() or self.process.poll() is not None,
            message=lambda: f"{word!r}; {self.err.read_text()}",
        )
        assert word in self.out.read_text(), self.err.read_text()

    def end(self) -> int:
        """Wait for its end and return its exit code."""
        return self.process.wait(PATIENCE_SECONDS)


@pytest.fixture
def program(one: Fleet, tmp_path: Path) -> Iterator[Any]:
    """A function (body) -> `Program`; killed afterwards if it still runs."""
    programs: list[Program] = []

    def start(body: str) -> Program:
        folder = tmp_path / f"program{len(programs)}"
        folder.mkdir()
        programs.append(Program(one, folder, body))
        return programs[-1]

    yield start
    for program in programs:
        if program.process.poll() is None:
            program.process.kill()
        program.process.wait()


# --- nobody's process -----------------------------------------------------------------------


def test_submit_returns_before_anything_is_done(redis_url: str, tmp_path: Path) -> None:
    """No worker exists, and yet the run does."""
    run = Master(redis_url, checkpoint_dir=str(tmp_path)).submit(plain(), CONFIG, name="queued")
    status = run.status()
    assert (status.name, status.state, status.version, status.total_steps) == ("queued", "pending", 0, None)
    assert status.epoch is None and status.server == "" and status.submitted_at > 0
    assert run.history() == [] and run.evaluations() == {} and not list(tmp_path.iterdir())
    assert Master(redis_url).runs() == ["queued"]


def test_ctrl_c_detaches_and_the_run_goes_on(one: Fleet, program: Any, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    plan = Plan(40, CONFIG)
    recipe = recipes_more.gated(str(gate), int(plan.indices(2, 0)[0]))
    run = one.master.submit(recipe, CONFIG, name="detached")
    wait_until(Path(f"{gate}.waiting").exists, message="the held shard")
    waiting = program(
        """
        run = Master(URL).run("detached")
        print("state", run.status().state, run.status().version, flush=True)
        try:
            run.wait(progress=True)
        finally:
            print("left", flush=True)
        """
    )
    waiting.says("state running 2")
    try:
        # The progress bar is up: it is waiting.
        wait_until(
            lambda: "detached" in waiting.out.read_text().partition("2")[2], message="the progress bar"
        )
        os.killpg(waiting.process.pid, signal.SIGINT)  # as a terminal does
        assert waiting.end() != 0
        assert "left" in waiting.out.read_text()
        hint = waiting.err.read_text()
        assert "Detached. Run 'detached' goes on" in hint
        assert f"Master({masked(one.cluster.url)!r}).run('detached').wait(progress=True)" in hint
        assert "Traceback" not in hint and hint.strip().endswith("wait(progress=True)")
        assert run.status().state == "running"
    finally:
        gate.touch()
    assert reference.bits(finished(run).module) == reference.accumulate(recipe, CONFIG).bits


def test_the_submitter_is_gone_when_the_run_ends(one: Fleet, program: Any, tmp_path: Path) -> None:
    """One process submits and is killed; a second one, which knows the name only, gets the model."""
    gate = tmp_path / "gate"
    at = int(Plan(40, CONFIG).indices(1, 0)[0])
    submitter = program(
        f"""
        from tests.support import recipes_more
        config = TrainingConfig(epochs=2, batch_size=8, shards=4, seed=6, evaluate_every=3)
        Master(URL).submit(recipes_more.gated({str(gate)!r}, {at}), config, name="orphan")
        print("submitted", flush=True)
        import time; time.sleep(600)
        """
    )
    submitter.says("submitted")
    submitter.process.kill()
    submitter.process.wait()
    gate.touch()
    follower = program(
        """
        import json
        master = Master(URL)
        assert "orphan" in master.runs()
        run = master.run("orphan")
        trained = run.wait(timeout=100)
        print(json.dumps({"state": run.status().state, "losses": [r.loss for r in run.history()]}))
        trained.save(FOLDER + "/model.safetensors")
        """
    )
    assert follower.end() == 0, follower.err.read_text()
    assert follower.err.read_text() == ""
    said = json.loads(follower.out.read_text())
    plain_loop = reference.accumulate(recipes_more.gated(str(gate), at), CONFIG)
    assert said["state"] == "done" and said["losses"] == pytest.approx(plain_loop.losses, rel=1e-12)
    saved = load_file(follower.script.parent / "model.safetensors")
    assert reference.bits(dict(sorted(saved.items()))) == dict(sorted(plain_loop.bits.items()))


def test_submitting_the_same_again_returns_the_run(one: Fleet) -> None:
    recipe = plain()
    run, trained = one.train(recipe, CONFIG, "again")
    before = [report.version for report in run.history()], list(run.events())
    second = one.master.submit(recipe, CONFIG, name="again")
    assert second.status().state == "done"
    other = Master(one.cluster.url, checkpoint_dir=str(one.folder / "checkpoints"))
    third = other.fit(recipe, CONFIG, name="again", progress=False, timeout=WAIT_SECONDS)
    assert reference.bits(third.module) == reference.bits(trained.module)
    assert ([report.version for report in second.history()], list(second.events())) == before
    assert [run for run in one.master.runs() if run == "again"] == ["again"]


def test_a_run_without_a_name_gets_one(one: Fleet) -> None:
    first, second = (one.master.submit(plain(), CONFIG) for _ in range(2))
    assert first.name != second.name and {first.name, second.name} <= set(one.master.runs())
    assert reference.bits(finished(first).module) == reference.bits(finished(second).module)


def test_runs_are_listed_in_the_order_of_their_submission(one: Fleet) -> None:
    names = ["listed-c", "listed-a", "listed-b"]
    runs = [one.master.submit(plain(), CONFIG, name=name) for name in names]
    assert [name for name in one.master.runs() if name in names] == names
    for run in runs:
        finished(run)


# --- what can be seen -----------------------------------------------------------------------


def test_history_events_and_status(one: Fleet) -> None:
    recipe = models.mlp(37, scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=2))
    config = TrainingConfig(epochs=2, batch_size=10, shards=3, seed=6, evaluate_every=3)
    run, trained = one.train(recipe, config, "seen")
    plan = Plan(37, config)
    plain_loop = reference.average(recipe, config)
    history = run.history()
    assert trained.history == history and len(history) == plan.total_steps == 8
    for step, report in enumerate(history):
        assert (report.step, report.version) == (step, step + 1)
        assert report.examples == plan.examples(step)
        assert len(report.workers) == plan.shards_in(step)
        assert all(worker.startswith(("client1@", "client2@")) for worker in report.workers)
        assert report.lr == pytest.approx((1e-2 * 0.1 ** (step // 2),))
        assert report.nbytes >= plan.shards_in(step) * 4 * sum(p.numel() for p in trained.module.parameters())
        assert report.seconds > 0 and report.grad_norm > 0 and not report.skipped
    assert [report.loss for report in history] == pytest.approx(plain_loop.losses, rel=1e-12)
    # The commits follow one another, so their distances add up to the time from start to end.
    commits = [entry.committed_at for entry in run._ledger.entries()]
    assert sum(r.seconds for r in history[1:]) == pytest.approx(commits[-1] - commits[0], abs=1e-3)

    events = list(run.events())
    kinds = [event.type for event in events]
    assert kinds[0] == "started" and kinds[-1] == "done" and kinds.count("step") == 8
    assert events[0].data["total_steps"] == 8
    steps = [event.data for event in events if event.type == "step"]
    assert [(data["step"], data["loss"]) for data in steps] == [(r.step, r.loss) for r in history]
    assert {event.data["version"] for event in events if event.type == "evaluation"} == {3, 6, 8}
    later = events[3]
    assert [event.id for event in run.events(after=later.id)] == [event.id for event in events[4:]]
    status = run.status()
    assert (status.state, status.version, status.total_steps, status.epoch) == ("done", 8, 8, 1)
    assert status.waiting_for == () and status.traceback == ""


def test_events_are_live(one: Fleet, tmp_path: Path) -> None:
    """An iterator that began before the run did sees it go by, and ends with it."""
    gate = tmp_path / "gate"
    recipe = recipes_more.gated(str(gate), int(Plan(40, CONFIG).indices(3, 0)[0]))
    run = one.master.submit(recipe, CONFIG, name="live")
    seen = []
    try:
        for event in run.events():
            seen.append(event.type)
            if event.type == "step" and event.data["version"] == 3:
                assert run.status().version == 3, "the fourth step is held back: nothing is ahead of us"
                gate.touch()
    finally:
        gate.touch()
    assert seen.count("step") == 10 and seen[-1] == "done"


def test_evaluations(one: Fleet) -> None:
    """Every third version and the last one, each as one pass over the evaluation data gives it."""
    recipe = models.mlp()
    run, trained = one.train(recipe, CONFIG, "evaluated")
    assert list(trained.evaluations) == [3, 6, 9, 10] == list(run.evaluations())
    assert trained.metrics == trained.evaluations[10] and set(trained.metrics) == {"loss", "accuracy"}
    data = models.points(20, seed=1).tensors
    with torch.no_grad():
        outputs = trained.module(data[0])
    assert trained.metrics["loss"] == pytest.approx(
        torch.nn.functional.cross_entropy(outputs, data[1]).item(), rel=1e-5
    )
    assert trained.metrics["accuracy"] == pytest.approx((outputs.argmax(1) == data[1]).float().mean().item())
    # One Client or two: the same bits (and see test_exactness for three).
    one.resize(1)
    try:
        assert one.train(recipe, CONFIG, "evaluated-alone")[1].evaluations == trained.evaluations
    finally:
        one.resize(2)


def test_metrics_that_are_not_finite_neither_stop_a_run_nor_its_restart(one: Fleet) -> None:
    metrics = {"accuracy": models.accuracy, "auroc": models.undefined, "perplexity": models.unbounded}
    run, trained = one.train(models.mlp(metrics=metrics), CONFIG, "not-finite")
    assert list(trained.evaluations) == [3, 6, 9, 10]
    for found in trained.evaluations.values():
        assert math.isnan(found["auroc"]) and found["perplexity"] == math.inf
        assert 0 <= found["accuracy"] <= 1 and math.isfinite(found["loss"])
    client = connect(one.cluster.url)
    client.delete(*client.keys("torchord:{not-finite}:*"))
    client.close()
    run.resume()
    assert repr(finished(run).evaluations) == repr(trained.evaluations)


# --- what can be used -----------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 7, 13, 20, 256])
def test_predictions_come_in_the_order_of_the_inputs(one: Fleet, batch_size: int) -> None:
    run = one.master.submit(plain(), CONFIG, name="predicts")
    finished(run)
    data = models.points(41, seed=9)
    inputs = data.tensors[0]
    module = run.model()
    assert not module.training
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            # Copies: where a slice starts in memory decides the last bits of a product on some processors.
            parts = [module(inputs[i : i + batch_size].clone()) for i in range(0, 41, batch_size)]
    finally:
        torch.set_num_threads(threads)
    expected = torch.cat(parts)
    from_tensor = run.predict(inputs, batch_size=batch_size)
    assert torch.equal(from_tensor, expected)
    assert torch.equal(run.predict(data, batch_size=batch_size), expected)  # pairs: the input is taken
    alone = run.predict(recipes_more.OnlyInputs(41), batch_size=batch_size)
    assert alone.shape == expected.shape
    # Another order of inputs is that order of outputs.
    order = torch.randperm(41, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(run.predict(inputs[order], batch_size=batch_size), expected[order])


def test_predicting_while_it_trains(one: Fleet, tmp_path: Path) -> None:
    """A prediction is pinned to a version, and the run's bits do not notice it."""
    gate = tmp_path / "gate"
    recipe = recipes_more.gated(str(gate), int(Plan(40, CONFIG).indices(4, 0)[0]))
    run = one.master.submit(recipe, CONFIG, name="busy")
    try:
        wait_until(Path(f"{gate}.waiting").exists, message="the held shard")
        inputs = models.points(30, seed=9).tensors[0]
        found = run.predict(inputs, batch_size=4)
        held = run.model(4)
        with torch.no_grad():
            torch.testing.assert_close(found, held(inputs))
        assert run.status().version == 4
    finally:
        gate.touch()
    assert reference.bits(finished(run).module) == reference.accumulate(recipe, CONFIG).bits


def test_a_saved_model_is_the_model(one: Fleet, tmp_path: Path) -> None:
    for name, recipe in (
        ("saved-gpt", models.gpt(16)),
        ("saved-odd", models.odd(16)),
        ("saved-cnn", models.cnn(16)),
    ):
        run, trained = one.train(recipe, CONFIG, f"saved-{name}")
        path = trained.save(tmp_path / f"{name}.safetensors")
        assert path == tmp_path / f"{name}.safetensors" and path.is_file()
        fresh = recipe.model()  # type: ignore[operator]
        fresh.load_state_dict(load_file(path))
        assert reference.bits(fresh) == reference.bits(trained.module) == reference.bits(run.state_dict())
        assert trained.version == run.status().version


def test_the_module_is_the_callers_own(one: Fleet) -> None:
    """Changing what a run handed out changes nothing in the run."""
    run, trained = one.train(plain(), CONFIG, "own")
    before = reference.bits(run.state_dict())
    with torch.no_grad():
        for parameter in trained.module.parameters():
            parameter.zero_()
    for tensor in run.state_dict().values():
        tensor.zero_()
    assert reference.bits(run.state_dict()) == before
    state = torch.get_rng_state()
    run.model()
    assert torch.equal(torch.get_rng_state(), state), "nor do the caller's random numbers change"
