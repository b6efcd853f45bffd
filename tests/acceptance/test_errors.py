"""Every error is one clear sentence that says what happened and what to do, and nothing is lost by it.

| part | who raises |
| --- | --- |
| before anything is sent | the submitter: recipe, config, name, URL |
| on a worker | the recipe's own code, or the worker's allow-list; the run fails with the worker's message |
| in between | nobody there, cancelled, paused, timed out |
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.support import models, recipes_leaving, recipes_more, recipes_optim, reference
from tests.support.fleet import WAIT_SECONDS, Fleet, finished, fleet
from tests.support.waiting import PATIENCE_SECONDS, wait_until
from torchord import Master, Recipe, Run, TrainingConfig
from torchord.cache.errors import (
    CacheError,
    CacheUnreachable,
    ConfigError,
    ConfigMismatch,
    InvalidInput,
    NoWorker,
    RecipeError,
    RunCancelled,
    RunError,
    RunFailed,
    RunNotFound,
    TorchordError,
    VersionMissing,
    WaitTimeout,
)
from torchord.cache.ledger.heartbeat import Heartbeat
from torchord.cache.ledger.workers import new_info
from torchord.cache.servers.address import masked
from torchord.cache.settings import Settings
from torchord.coordinator.local_cluster.embedded_server import EmbeddedServer, free_port
from torchord.coordinator.local_cluster.import_path import ROOT
from torchord.coordinator.messages.task_names import GRADIENTS, UPDATES
from torchord.coordinator.runtime.services import Services
from torchord.coordinator.spec.plan import Plan

CONFIG = TrainingConfig(epochs=1, batch_size=8, shards=4, seed=1)
SIZE = 40


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A training server and one Client, so that shards are computed in their order."""
    with fleet(tmp_path_factory.mktemp("errors"), workers=1) as started:
        yield started


@pytest.fixture
def master(redis_url: str, tmp_path: Path) -> Master:
    """A Master of an empty database that no worker serves."""
    return Master(redis_url, checkpoint_dir=str(tmp_path))


def plain(**changes: Any) -> Recipe:
    """A recipe without evaluation."""
    return models.mlp(**{"evaluation": None, "metrics": None, **changes})


def failed(run: Run) -> str:
    """The message of a run that fails, which must say how to go on."""
    with pytest.raises(RunFailed) as caught:
        run.wait(timeout=WAIT_SECONDS)
    message = str(caught.value)
    assert message.startswith(f"run {run.name!r} stopped at version ")
    assert f".run({run.name!r}).resume()" in message
    status = run.status()
    assert status.state == "failed" and status.error and status.error in message
    return message


# --- before anything is sent ----------------------------------------------------------------


def in_the_script(*_: Any) -> Any:
    """Stands for a function of the script that is being run."""


in_the_script.__module__ = "__main__"


class Method:
    """An object whose method is no name that a worker can import."""

    def loss(self, outputs: Any, targets: Any) -> Any:
        """A method."""


def _local() -> Any:
    class Local(models.Mlp):
        pass

    return Local


UNSENDABLE: dict[str, tuple[dict[str, Any], str]] = {
    "lambda": ({"loss": lambda o, t: F.cross_entropy(o, t)}, r"'loss'.*a lambda.*move it to a module"),
    "__main__": ({"dataset": in_the_script}, r"'dataset'.*script or session.*move it to a module"),
    "local class": ({"model": _local()}, r"'model'.*inside a function.*move it to a module"),
    "method": ({"loss": Method().loss}, r"'loss'.*method of an object.*move it to a module"),
    "tensor argument": (
        {"model": partial(models.Mlp, hidden=torch.tensor(3))},
        r"'model': argument 'hidden' is of type Tensor, which does not travel as JSON",
    ),
    "an object": ({"model": models.Mlp()}, r"'model' is an object of class Mlp.*not called"),
    "no name": ({"loss": "cross_entropy"}, r"'loss' is 'cross_entropy'.*package\.module:attribute"),
    "loss and step": ({"step": models.classifier_step}, r"exactly one of loss.*both were given"),
    "neither": ({"loss": None}, r"exactly one of loss.*neither was given"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNSENDABLE)
def test_a_recipe_that_cannot_travel(master: Master, case: str) -> None:
    changes, expected = UNSENDABLE[case]
    with pytest.raises(RecipeError, match=expected):
        master.submit(plain(**changes), CONFIG, name="never")
    assert master.runs() == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"epochs": 0}, r"epochs must be an integer, at least 1, not 0"),
        ({"batch_size": 2.5}, r"batch_size must be an integer, at least 1, not 2.5"),
        ({"clip_norm": -1.0}, r"clip_norm must be a finite number greater than 0, or None, not -1.0"),
        ({"precision": "fp8"}, r"precision must be one of 'fp32', 'bf16', 'fp16', not 'fp8'"),
        ({"nonfinite": "ignore"}, r"nonfinite must be one of 'stop', 'skip', not 'ignore'"),
    ],
)
def test_a_config_out_of_range(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        TrainingConfig(**changes)


def test_the_arguments_of_submit(master: Master) -> None:
    with pytest.raises(InvalidInput, match="takes a Recipe first, got TrainingConfig"):
        master.submit(CONFIG, plain(), name="swapped")  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="takes a TrainingConfig second, got dict"):
        master.submit(plain(), {"epochs": 3}, name="a-dict")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["", "two words", "../up", ".hidden", "a/b", "é", "x" * 101, "{tag}", 7])
def test_a_name_that_cannot_be_one(master: Master, name: Any) -> None:
    for call in (lambda: master.submit(plain(), CONFIG, name=name), lambda: master.run(name)):
        with pytest.raises(InvalidInput, match=r"run name .* cannot be used: give 1 to 100") as caught:
            call()
        assert "such as 'digits-01'" in str(caught.value)
    assert master.runs() == []


def test_the_same_name_with_something_else(master: Master) -> None:
    master.submit(plain(), CONFIG, name="taken")
    other = TrainingConfig(epochs=2, batch_size=8, shards=2, seed=1)
    changed = plain(model=partial(models.Mlp, hidden=32), optimizer=torch.optim.Adam)
    with pytest.raises(ConfigMismatch) as caught:
        master.submit(changed, other, name="taken")
    message = str(caught.value)
    assert "run 'taken' exists" in message and "choose another name" in message
    for part in ("recipe.model", "recipe.optimizer", "epochs: 2 here, 1 there", "shards: 2 here, 4 there"):
        assert part in message
    assert "recipe.loss" not in message and "batch_size" not in message
    assert master.submit(plain(), CONFIG, name="taken").status().version == 0


def test_a_run_from_before_arguments_had_kinds(master: Master) -> None:
    def adam(*betas: Any) -> Recipe:
        return plain(optimizer=partial(torch.optim.AdamW, betas=betas[0] if betas else (0.8, 0.9)))

    ledger = master.submit(adam(), CONFIG, name="older")._ledger
    with pytest.raises(ConfigMismatch, match=r"another recipe\.optimizer;"):
        master.submit(adam([0.8, 0.9]), CONFIG, name="older")
    spec = ledger.spec()
    del spec["recipe"]["optimizer"]["kinds"]
    del spec["recipe"]["loss_over"]  # which came later still
    ledger.client.set(ledger.keys.spec, json.dumps(spec), keepttl=True)
    assert master.submit(adam(), CONFIG, name="older").status().version == 0
    with pytest.raises(ConfigMismatch, match=r"another recipe\.optimizer;"):
        master.submit(adam((0.8, 0.99)), CONFIG, name="older")


def test_an_unknown_run(master: Master) -> None:
    run = master.run("nobody")
    calls: list[Any] = [
        run.status, run.history, run.verify, run.model, run.state_dict, run.wait, run.pause, run.cancel,
        run.resume, lambda: next(run.events()), lambda: run.predict(torch.zeros(1, 6)),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(RunNotFound, match="'nobody'"):
            call()
    with pytest.raises(RunNotFound, match=r"neither in Redis nor under.*TORCHORD_CHECKPOINT_DIR"):
        run.resume()


# --- the server -----------------------------------------------------------------------------


def test_a_url_that_nobody_serves() -> None:
    """Within seconds: the module's timeout would tell."""
    url = f"redis://:secret@127.0.0.1:{free_port()}/0"
    expected = r"no Redis answers at redis://:\*\*\*@127.0.0.1.*TORCHORD_URL"
    with pytest.raises(CacheUnreachable, match=expected) as caught:
        Master(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1:80", "127.0.0.1:6379", "redis://host:port/0", "redis://host/zero", "", "amqp://x"],
)
def test_a_url_that_is_none(url: str) -> None:
    with pytest.raises(CacheUnreachable, match=r"cannot be used: .*; use redis://HOST:PORT/DB") as caught:
        Master(url)
    assert masked(url) in str(caught.value)


def test_a_server_that_is_no_redis() -> None:
    """Something else listens there: an HTTP server, or one that never says a word."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            connection.recv(1024)
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            connection.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        with pytest.raises(CacheError, match=r"127\.0\.0\.1"):
            Master(f"redis://127.0.0.1:{listener.getsockname()[1]}/0")
    finally:
        listener.close()


def test_a_password_or_database_that_is_wrong(redis_server: EmbeddedServer) -> None:
    place = redis_server.url.rpartition("@")[2]
    for user in ("", ":mistaken@"):
        with pytest.raises(CacheError, match="refuses the user or password; give them") as caught:
            Master(f"redis://{user}{place}")
        assert "mistaken" not in str(caught.value)
    assert isinstance(Master(redis_server.url).runs(), list)
    with pytest.raises(CacheError, match="DB index is out of range"):
        Master(f"{redis_server.url}99999")


def _worker(url: str, folder: Path) -> subprocess.Popen[bytes]:
    log = (folder / "worker.log").open("wb")
    with log:
        return subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-m",
                "celery",
                "-A",
                "torchord",
                "worker",
                "-n",
                "lonely@%h",
                "-l",
                "INFO",
            ],
            env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "TORCHORD_URL": url, "HOME": str(folder)},
            cwd=folder,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def test_a_worker_waits_for_its_server(tmp_path: Path) -> None:
    """It says what it waits for, and starts to work when the server is there."""
    port = free_port()
    worker = _worker(f"redis://127.0.0.1:{port}/0", tmp_path)
    log = tmp_path / "worker.log"
    try:
        wait_until(
            lambda: (
                f"Cannot connect to redis://:**@127.0.0.1:{port}/0" in log.read_text()
                and "Trying again in" in log.read_text()
            ),
            message=lambda: f"the message; {log.read_text()}",
        )
        assert "Traceback" not in log.read_text() and worker.poll() is None
        with EmbeddedServer(port=port, password=False):
            wait_until(lambda: re.search("lonely@.* ready", log.read_text()), message="readiness")
            worker.terminate()
            assert worker.wait(PATIENCE_SECONDS) == 0
    finally:
        worker.kill()
        worker.wait(PATIENCE_SECONDS)


@pytest.mark.parametrize("url", ["http://127.0.0.1:80", "redis://host/zero"])
def test_a_worker_whose_url_is_none(tmp_path: Path, url: str) -> None:
    worker = _worker(url, tmp_path)
    assert worker.wait(PATIENCE_SECONDS) != 0
    last = (tmp_path / "worker.log").read_text().strip().splitlines()[-1]
    assert f"the URL {url} cannot be used: " in last and "use redis://HOST:PORT/DB" in last


# --- on a worker ----------------------------------------------------------------------------


def test_a_dataset_that_raises_and_is_repaired(one: Fleet, tmp_path: Path) -> None:
    """The last shard of step 2 raises: the three before it are kept, and after the repair not done again."""
    plan = Plan(SIZE, CONFIG)
    at = int(plan.indices(2, 3)[1])
    recipe = recipes_more.fixable(str(tmp_path / "mounted"), at, SIZE)
    run = one.master.submit(recipe, CONFIG, name="repaired")
    message = failed(run)
    samples = [int(i) for i in plan.indices(2, 3)]
    assert f"shard 3 of step 2 (samples {samples}) failed on worker client1@" in message
    assert f": OSError: cannot read sample {at}: the disk is not mounted" in message
    frames = run.status().traceback.splitlines()
    assert 1 <= len(frames) <= 6 and any("recipes_more.py" in f and "in __getitem__" in f for f in frames)
    kept = run._ledger.slots(2)
    assert set(kept) == {0, 1, 2} and run.status().version == 2
    (tmp_path / "mounted").touch()
    run.resume()
    trained = finished(run)
    assert reference.bits(trained.module) == reference.accumulate(recipe, CONFIG).bits
    applied = {slot.shard: slot for slot in run._ledger.entries(3, 3)[0].slots}
    for shard, slot in kept.items():
        assert (applied[shard].digest, applied[shard].seconds) == (slot.digest, slot.seconds)
    assert run.status().error is None


def test_work_under_way_elsewhere_is_kept(one: Fleet, tmp_path: Path) -> None:
    """A shard that another Client was computing when the run failed is written all the same."""
    one.resize(2)
    plan = Plan(SIZE, CONFIG)
    gate, fix = tmp_path / "gate", tmp_path / "fix"
    dataset = partial(
        recipes_more.Fixable,
        str(fix),
        int(plan.indices(0, 3)[0]),
        SIZE,
        gate=str(gate),
        gate_at=int(plan.indices(0, 0)[0]),
    )
    recipe = plain(dataset=dataset)
    try:
        config = replace(CONFIG, audit_fraction=0)  # else either Client reads the held sample first
        run = one.master.submit(recipe, config, name="elsewhere")
        assert "cannot read sample" in failed(run)
        assert set(run._ledger.slots(0)) == {1, 2}
        gate.touch()
        wait_until(lambda: set(run._ledger.slots(0)) == {0, 1, 2}, message="the slot of the held shard")
        kept = run._ledger.slots(0)
        fix.touch()
        run.resume()
        trained = finished(run)
        assert reference.bits(trained.module) == reference.accumulate(recipe, CONFIG).bits
        applied = run._ledger.entries(1, 1)[0].slots
        assert [slot.seconds for slot in applied[:3]] == [kept[shard].seconds for shard in range(3)]
    finally:
        gate.touch()
        one.resize(1)


RAISING: dict[str, tuple[dict[str, Any], str]] = {
    "model": (
        {"model": recipes_more.Broken},
        r"shard \d of step 0 .* on worker client\d@.*: ZeroDivisionError: this model always raises",
    ),
    "loss": (
        {"loss": models.raising_loss},
        r"shard \d of step 0 .*: ArithmeticError: this loss always raises",
    ),
    "vector loss": (
        {"loss": models.vector_loss},
        r"loss has shape \(2,\), but must be a scalar; take its mean",
    ),
    "number loss": ({"loss": models.number_loss}, r"the loss is a float, but must be a scalar tensor"),
    "detached loss": ({"loss": models.detached_loss}, r"the loss depends on no trainable parameter"),
    "wrong features": (
        {"dataset": recipes_more.wide_points},
        r"RuntimeError: mat1 and mat2 shapes cannot be multiplied \(2x7 and 6x16\)",
    ),
    "wrong classes": ({"dataset": recipes_more.wrong_targets}, r"IndexError: Target \d is out of bounds"),
    "no pairs": (
        {"dataset": partial(recipes_more.OnlyInputs, 16)},
        r"a batch must be a pair \(inputs, targets\)",
    ),
    "model that cannot be made": (
        {"model": recipes_more.unbuildable},
        r"FileNotFoundError on the training server: no pretrained weights at weights/backbone.bin",
    ),
    "dataset that cannot be opened": (
        {"dataset": recipes_more.unreadable},
        r"FileNotFoundError on the training server: no data at data/train.bin",
    ),
    "empty dataset": (
        {"dataset": partial(models.points, size=0)},
        r"the dataset is empty; a run needs at least one example",
    ),
    "no dataset": (
        {"dataset": models.Mlp},
        r"dataset entry returned a Mlp; give a map-style dataset, with __len__ and __getitem__",
    ),
    "no model": (
        {"model": models.points},
        r"model entry returned a TensorDataset; it must return a torch.nn.Module",
    ),
    "buffer without a rule": (
        {"model": models.Odd},
        r"shard \d of step 0 .*the forward changes 'mean' .*a rule, Recipe\(buffers=\{'mean': 'shard0'\}\)",
    ),
    "rule without a buffer": ({"buffers": {"queu": "shard0"}}, r"'queu' fits no buffer"),
    "norm over all processes": (
        {"model": partial(torch.nn.SyncBatchNorm, 6)},
        r"'the model' is a SyncBatchNorm.*use a BatchNorm",
    ),
    "operator that is not deterministic": (
        {"loss": recipes_more.putting_loss},
        r"shard \d of step 0 .*the operator put_ has no deterministic implementation.*deterministic=False",
    ),
    "two optimizers": ({"optimizer": recipes_optim.two}, r"returned several optimizers.*parameter_groups"),
    "metric": (
        {"evaluation": models.points, "metrics": {"bad": models.raising_loss}},
        r"run 'raises-\d+' stopped at version 0: ArithmeticError .*raised while trying the metrics",
    ),
    "evaluation": (
        {"evaluation": partial(recipes_more.Fixable, "/nowhere/fixed", at=39)},
        r"part \d of the evaluation of version 5 failed on worker client\d@.*sample 39",
    ),
    "not allowed": (
        {"dataset": "json:loads"},
        r"'dataset': this worker may not import 'json'.*start the worker with TORCHORD_ALLOWED_MODULES=",
    ),
    "no such module": (
        {"dataset": "no_such_module:data"},
        r"'dataset': there is no module 'no_such_module' on this machine",
    ),
    "no such attribute": (
        {"dataset": "tests.support.models:nothing"},
        r"has no attribute 'nothing' on this worker; does it run the same code",
    ),
    # What would end the worker ends the run: the same two workers go on to the next one.
    "exit in a sample": (
        {"dataset": recipes_leaving.ExpiresAt},
        r"SystemExit: the licence has expired\. sys\.exit\(\) would end the worker.*raise an error.*"
        r"\(raised while reading sample 17 from the dataset\)(?s:.*)in __getitem__",
    ),
    "exit in the forward": (
        {"model": recipes_leaving.Leaving},
        r"KeyboardInterrupt: no more\. a KeyboardInterrupt would end the worker(?s:.*)in forward",
    ),
    "exit in the loss": ({"loss": recipes_leaving.leaving_loss}, r"GeneratorExit: (?s:.*)in leaving_loss"),
    "exit in the optimizer": (
        {"optimizer": partial(recipes_leaving.LeavingSGD, lr=0.1)},
        r"RecipeExit on the training server: SystemExit: diverged(?s:.*)in step",
    ),
    "exit in a metric": (
        {"evaluation": models.points, "metrics": {"bad": recipes_leaving.leaving_metric}},
        r"stopped at version 0: RecipeExit .*SystemExit: 3\..*raised while trying the metrics",
    ),
    "exit of an import": (
        {"dataset": "tests.support.leaving_module:points"},
        r"SystemExit: no GPU here\..*\(raised while importing module 'tests.support.leaving_module'\)",
    ),
    "command line of the worker": (
        {"model": recipes_leaving.of_the_command_line},
        r"SystemExit: 2\. argparse, called by of_the_command_line \(recipes_leaving\.py:\d+\), met the "
        r"worker's command line, not yours.*functools\.partial",
    ),
}


@pytest.mark.parametrize("case", RAISING)
def test_what_raises_on_a_worker_is_the_runs_own_message(one: Fleet, case: str) -> None:
    changes, expected = RAISING[case]
    run = one.master.submit(plain(**changes), CONFIG, name=f"raises-{list(RAISING).index(case)}")
    message = failed(run)
    assert re.search(expected, message), message
    assert len(message.splitlines()) <= 14


def test_a_nan_stops_the_run_and_names_its_shards(one: Fleet) -> None:
    plan = Plan(SIZE, CONFIG)
    at = int(plan.indices(1, 2)[0])
    recipe = plain(dataset=partial(models.poisoned, at))
    run = one.master.submit(recipe, CONFIG, name="nan-stops")
    message = failed(run)
    for part in ("step 1 has loss nan", "arose in shards [2]", "lower the learning rate"):
        assert part in message
    assert "clip_norm" in message and "nonfinite='skip'" in message
    assert run.status().version == 1
    assert torch.isfinite(torch.cat([t.flatten() for t in run.state_dict().values()])).all()
    # Under another name it can go on without such steps.
    skipping = TrainingConfig(**{**CONFIG.to_json(), "nonfinite": "skip"})
    _, trained = one.train(recipe, skipping, "nan-skips")
    assert [report.step for report in trained.history if report.skipped] == [1]
    assert torch.isfinite(torch.cat([t.flatten() for t in trained.module.state_dict().values()])).all()


def test_an_infinite_gradient_of_a_finite_loss(one: Fleet) -> None:
    run = one.master.submit(plain(loss=recipes_more.steep_loss), CONFIG, name="infinite")
    message = failed(run)
    assert re.search("step 0 has loss 0.0 and gradient norm (nan|inf)", message)
    assert "arose in shards [0, 1, 2, 3]" in message


# --- in between -----------------------------------------------------------------------------


def test_nobody_works(master: Master, redis_url: str) -> None:
    run = master.submit(plain(), CONFIG, name="lonely")
    assert run.status().state == "pending" and set(run.status().waiting_for) == {GRADIENTS, UPDATES}
    with pytest.raises(NoWorker) as caught:
        run.wait(worker_timeout=0.0)
    message = str(caught.value)
    for part in (
        "'torchord.updates' and 'torchord.gradients'", "run 'lonely'",
        "celery -A torchord worker -Q gradients -c 1",
        "celery -A torchord worker -Q updates -c 1", "it stays queued",
    ):  # fmt: skip
        assert part in message
    # Someone who serves updates only: the other queue is named, and only that.
    heartbeat = Heartbeat(Services(Settings(redis_url)).registry, new_info("server@there", (UPDATES,)))
    heartbeat.start()
    try:
        with pytest.raises(NoWorker, match=r"queue 'torchord\.gradients', so") as caught:
            run.wait(worker_timeout=0.0)
        assert "-Q updates" not in str(caught.value)
        assert run.status().waiting_for == (GRADIENTS,)
    finally:
        heartbeat.stop()


def test_predicting_without_workers_or_without_a_model(master: Master) -> None:
    run = master.submit(plain(), CONFIG, name="untrained")
    for call in (run.model, run.state_dict, lambda: run.predict(torch.zeros(2, 6))):
        with pytest.raises(TorchordError, match="run 'untrained' has no parameters yet"):
            call()


def test_predicting_when_the_workers_have_gone(one: Fleet) -> None:
    run, _ = one.train(plain(), CONFIG, "deserted")
    one.resize(0)
    with pytest.raises(WaitTimeout, match=r"'deserted': 0 parts in 0\.01 s"):
        run.predict(torch.zeros(2, 6), timeout=0.01)
    with pytest.raises(
        NoWorker, match=r"queue 'torchord.gradients'; start one: celery -A torchord worker -Q gradients"
    ):
        run.predict(torch.zeros(2, 6))
    one.resize(1)
    assert run.predict(torch.zeros(2, 6)).shape == (2, models.CLASSES)


def test_wait_has_a_timeout(one: Fleet, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    recipe = recipes_more.gated(str(gate), 0, SIZE)
    run = one.master.submit(recipe, CONFIG, name="slow")
    try:
        expected = r"run 'slow' is \w+ at version \d.*it goes on, call wait\(\) again"
        with pytest.raises(WaitTimeout, match=expected) as caught:
            run.wait(timeout=0.01)
        assert isinstance(caught.value, TimeoutError)
    finally:
        gate.touch()
    assert reference.bits(finished(run).module) == reference.accumulate(recipe, CONFIG).bits


def test_pause_and_resume(one: Fleet, tmp_path: Path) -> None:
    """Nothing begins after a pause; what was under way is kept; the end has the same bits."""
    gate = tmp_path / "gate"
    recipe = recipes_more.gated(str(gate), int(Plan(SIZE, CONFIG).indices(1, 1)[0]), SIZE)
    run = one.master.submit(recipe, CONFIG, name="paused")
    try:
        wait_until(Path(f"{gate}.waiting").exists, message="the held shard")
        run.pause()
        run.pause()
        assert run.status().state == "paused"
    finally:
        gate.touch()
    log = one.cluster.processes[one.clients[0]].log
    wait_until(
        lambda: all(f"step 1 slot {shard} of run paused: stopped" in log.read_text() for shard in (2, 3)),
        message="the other shards to be turned away",
    )
    assert (run.status().version, set(run._ledger.slots(1))) == (1, {0, 1})
    with pytest.raises(WaitTimeout, match="'paused' is paused at version 1 of 5"):
        run.wait(timeout=0.01)
    kept = run._ledger.slots(1)
    run.resume()
    trained = finished(run)
    assert reference.bits(trained.module) == reference.accumulate(recipe, CONFIG).bits
    assert [s.seconds for s in run._ledger.entries(2, 2)[0].slots[:2]] == [kept[0].seconds, kept[1].seconds]
    with pytest.raises(RunError, match="run 'paused' is done; only a running run can be paused"):
        run.pause()
    with pytest.raises(RunError, match="run 'paused' is done"):
        run.cancel()
    with pytest.raises(RunError, match="run 'paused' is done"):
        run.resume()


def test_submitting_a_paused_run_again_continues_it(one: Fleet, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    recipe = recipes_more.gated(str(gate), 0, SIZE)
    run = one.master.submit(recipe, CONFIG, name="continued")
    wait_until(Path(f"{gate}.waiting").exists, message="the held shard")
    run.pause()
    gate.touch()
    again = one.master.submit(recipe, CONFIG, name="continued")
    assert reference.bits(finished(again).module) == reference.accumulate(recipe, CONFIG).bits


def test_cancel(one: Fleet, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    recipe = recipes_more.gated(str(gate), int(Plan(SIZE, CONFIG).indices(2, 0)[0]), SIZE)
    run = one.master.submit(recipe, CONFIG, name="cancelled")
    try:
        wait_until(Path(f"{gate}.waiting").exists, message="the held shard")
        run.cancel()
        run.cancel()
    finally:
        gate.touch()
    with pytest.raises(RunCancelled, match="run 'cancelled' was cancelled at version 2"):
        run.wait()
    with pytest.raises(RunError, match="run 'cancelled' is cancelled; submit it under a new name"):
        run.resume()
    assert [event.type for event in run.events()][-1] == "cancelled"
    # What it had computed stays readable, and the workers are free for others.
    assert len(run.history()) == 2 and run.verify().ok and len(run.state_dict()) == 4
    one.train(plain(), CONFIG, "after-cancelled")
    assert run.status().version == 2


def test_versions_that_are_not_there(one: Fleet) -> None:
    run, _ = one.train(plain(), CONFIG, "versions")
    for version in (3, 99):
        for call in (run.model, run.state_dict, partial(run.predict, torch.zeros(2, 6), version=version)):
            with pytest.raises(VersionMissing, match=rf"version {version} of run 'versions'.*\[5\]"):
                call(version=version)
    for wrong in (-1, 1.5, "last", True):
        for call in (run.model, partial(run.predict, torch.zeros(2, 6))):
            with pytest.raises(InvalidInput, match="version must be a whole number from 0 to 5"):
                call(version=wrong)  # type: ignore[arg-type]
    assert reference.bits(run.model(5)) == reference.bits(run.model())


UNPREDICTABLE: dict[str, tuple[Any, type[TorchordError], str]] = {
    "a number": (
        3.0,
        InvalidInput,
        "takes a tensor, a mapping of tensors, a Dataset or a list .*, got float",
    ),
    "an iterator of nothing": (iter([]), InvalidInput, "no examples"),
    "a scalar": (torch.tensor(1.0), InvalidInput, "first dimension counts examples, got a 0-d tensor"),
    "nothing": (torch.zeros(0, 6), InvalidInput, "no examples"),
    "too wide": (torch.zeros(5, 7), RunFailed, r"part 0 failed on worker client\d@.*mat1 and mat2 shapes"),
    "the wrong type": (torch.zeros(5, 6, dtype=torch.int64), RunFailed, r"part 0 failed.*RuntimeError"),
}


@pytest.mark.parametrize("case", UNPREDICTABLE)
def test_inputs_that_cannot_be_predicted(one: Fleet, case: str) -> None:
    inputs, kind, expected = UNPREDICTABLE[case]
    run = one.master.submit(plain(), CONFIG, name="predicted")
    finished(run)
    with pytest.raises(kind, match=expected):
        run.predict(inputs, batch_size=3)
    with pytest.raises(InvalidInput, match="batch_size must be a whole number of examples, at least 1"):
        run.predict(torch.zeros(2, 6), batch_size=0)
    assert run.status().state == "done"
    assert run.predict(torch.zeros(2, 6)).shape == (2, models.CLASSES)
