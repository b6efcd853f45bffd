"""A run starts from another run's version or from a file: version 0 has those weights, whatever dies."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tests.support import models, reference
from tests.support import recipes_optim as R
from tests.support.fleet import Fleet, finished, fleet
from tests.support.inprocess import InProcess, resolved
from tests.support.waiting import wait_until
from torchord import TrainingConfig
from torchord.cache.errors import (
    ConfigMismatch,
    InvalidInput,
    RunFailed,
    RunNotFound,
    TorchordError,
    VersionMissing,
)
from torchord.coordinator.compute.starting_weights import put_weights

pytestmark = pytest.mark.slow
CONFIG = TrainingConfig(epochs=4, batch_size=8, shards=2, seed=4, checkpoint_every=5, keep_checkpoints=1)
OTHER = TrainingConfig(**{**vars(CONFIG), "seed": 9, "epochs": 3})
GIVEN = R.normed(evaluation=None, metrics=None)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with fleet(
        tmp_path_factory.mktemp("start"), workers=1, env={"TORCHORD_ALLOWED_MODULES": "tests,torch"}
    ) as made:
        made.train(GIVEN, CONFIG, "parent")
        yield made


def from_these(weights: dict[str, torch.Tensor], config: TrainingConfig) -> InProcess:
    """The plain run of a model that has these weights."""
    plain = InProcess(resolved(GIVEN), config)
    put_weights(plain.trainer.replica.model, weights, "them")
    return plain.train()


def test_a_fork_starts_from_its_parents_version_and_says_so(one: Fleet) -> None:
    parent = one.master.run("parent")
    weights = parent.state_dict()
    run = one.master.submit(GIVEN, OTHER, name="fork", start_from=parent)
    trained = finished(run)
    assert reference.all_bits(trained.module) == reference.all_bits(
        from_these(weights, OTHER).trainer.replica.model
    )
    assert reference.bits(run.state_dict(version=0)) == reference.bits(weights)
    (first,) = run._ledger.entries(1, 1)
    assert first.notes["start_from"]["source"] == f"run 'parent', version {parent.status().version}"
    assert run.verify(reexecute=[0, 14]).ok, "checkpoint 0 is kept, whatever is pruned"
    again = one.master.submit(GIVEN, OTHER, name="fork", start_from=("parent", parent.status().version))
    assert again.status().state == "done"
    for start in (None, ("fork", 15)):
        with pytest.raises(ConfigMismatch, match="another start_from"):
            one.master.submit(GIVEN, OTHER, name="fork", start_from=start)


def test_a_file_is_read_where_it_is_submitted(
    one: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = R.Normed()
    state = {name: value.clone() for name, value in model.state_dict().items() if name != "third.weight"}
    file = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(state, file)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    expected = reference.all_bits(from_these(state, OTHER).trainer.replica.model)
    runs = [
        one.master.submit(GIVEN, OTHER, name=f"file-{number}", start_from=start)
        for number, start in enumerate((file, "~/weights.safetensors", "weights.safetensors"))
    ]
    os.remove(file)
    for run in runs:
        assert reference.all_bits(finished(run).module) == expected


def test_it_survives_what_a_run_survives(one: Fleet) -> None:
    weights = one.master.run("parent").state_dict()
    config = TrainingConfig(**{**vars(OTHER), "epochs": 8, "checkpoint_every": 1000})
    one.cluster.processes["server"].kill()
    one.cluster.processes["server"].wait()
    run = one.master.submit(GIVEN, config, name="killed", start_from="parent")
    one.cluster.restart("server")
    wait_until(lambda: run.status().version >= 3, message="version 3")
    one.cluster.processes["server"].kill()
    one.cluster.processes["server"].wait()
    keys = run._services.ledger("killed").keys
    client = run._services._clients.get(run._services.settings.url, 5.0)
    doomed = [*client.scan_iter(f"torchord:blob:{keys.run}:*")]
    assert any(":start:" in key for key in doomed)
    client.delete(*doomed)  # every version, and the weights that it began from: what is left is checkpoint 0
    one.cluster.restart("server")
    trained = finished(run)
    assert reference.all_bits(trained.module) == reference.all_bits(
        from_these(weights, config).trainer.replica.model
    )
    assert not [*client.scan_iter(f"torchord:blob:{keys.run}:start:*")]


def test_a_fork_of_an_averaged_run_has_its_average(one: Fleet) -> None:
    averaged = copy.copy(R.normed(evaluation=None, metrics=None, average=R.AVERAGES["ema"]))
    parent, trained = one.train(averaged, OTHER, "mean")
    run = one.master.submit(GIVEN, OTHER, name="from-mean", start_from="mean")
    finished(run)
    assert reference.bits(run.state_dict(version=0)) == reference.bits(trained.module)
    assert reference.bits(parent.state_dict(averaged=False)) != reference.bits(trained.module)


def test_what_cannot_be_started_from_is_one_sentence(one: Fleet, tmp_path: Path) -> None:
    wrong = one.master.submit(
        models.mlp(evaluation=None, metrics=None), CONFIG, name="wrong", start_from="parent"
    )
    with pytest.raises(
        RunFailed, match=r"start_from: run 'parent', version 20 does not fit .*: the model lacks"
    ):
        wrong.wait(timeout=60)
    (tmp_path / "weights.pt").write_bytes(b"whatever")
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    for start, kind, told in [
        (tmp_path / "weights.pt", InvalidInput, "is a pickle"),
        ("weights.bin", InvalidInput, "is a pickle"),
        (tmp_path / "bad.safetensors", InvalidInput, "cannot be read as safetensors"),
        ("./nowhere", InvalidInput, "there is no file"),
        (tmp_path, InvalidInput, "there is no file"),
        (3, InvalidInput, "got int"),
        (("parent", "7"), InvalidInput, "version must be"),
        ("no-such-run", RunNotFound, "no-such-run"),
        (("parent", 3), VersionMissing, "version 3 of run 'parent'"),
    ]:  # fmt: skip
        with pytest.raises(kind, match=told):
            one.master.submit(GIVEN, CONFIG, name="never", start_from=start)  # type: ignore[arg-type]
    with pytest.raises(TorchordError):
        one.master.run("never").status()
