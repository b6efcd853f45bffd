"""A TOML file is the recipe and config that a program would have made, or refused in a sentence."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.support import models
from torchord.cache.errors import TorchordError
from torchord.cache.ledger.ledger import Ledger
from torchord.cache.servers.redis_client import connect
from torchord.coordinator.cli import main
from torchord.coordinator.spec.config import TrainingConfig
from torchord.coordinator.spec.recipe import Recipe
from torchord.coordinator.spec.submission import read

FILE = """
name = "points"

[recipe]
model = "tests.support.models:Mlp"
dataset = {target = "tests.support.models:points", size = 24}
loss = "torch.nn.functional:cross_entropy"
optimizer = {target = "torch.optim:AdamW", lr = 0.01, betas = [0.9, 0.99]}

[recipe.metrics]
accuracy = "tests.support.models:accuracy"

[config]
epochs = 2
batch_size = 8
"""


def test_a_file_is_what_a_program_would_have_made() -> None:
    found = read(FILE)
    meant = Recipe(
        model=models.Mlp,
        dataset=partial(models.points, size=24),
        loss=torch.nn.functional.cross_entropy,
        optimizer=partial(torch.optim.AdamW, lr=0.01, betas=[0.9, 0.99]),
        metrics={"accuracy": models.accuracy},
    )
    assert found.recipe.to_spec() == meant.to_spec()
    assert (found.name, found.config) == ("points", TrainingConfig(epochs=2, batch_size=8))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name = ", "it is no TOML"),
        ("steps = 3", "it has 'steps'"),
        ('name = "a"', r"a run needs a table \[recipe\]"),
        (FILE.replace("model =", "modle ="), "has 'modle'; known are"),
        (FILE.replace('model = "tests.support.models:Mlp"', ""), r"\[recipe\] lacks 'model'"),
        (FILE.replace('{target = "torch.optim:AdamW", lr = 0.01, betas = [0.9, 0.99]}', "3"), "'optimizer'"),
        (FILE.replace("epochs", "epoch"), r"\[config\] has 'epoch'"),
        (FILE.replace("epochs = 2", "epochs = -2"), "epochs"),
    ],
)
def test_what_is_no_run_is_refused_in_a_sentence(text: str, said: str) -> None:
    with pytest.raises(TorchordError, match=said):
        read(text)


def test_the_command_submits(redis_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.toml"
    path.write_text(FILE)
    assert main(["submit", str(path), "--url", redis_url]) == 0
    assert capsys.readouterr().out == "points: pending; `torchord watch points` follows it\n"
    assert main(["submit", str(path), "--name", "other", "--url", redis_url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"name": "other", "state": "pending"}
    with connect(redis_url) as client:
        assert Ledger(client, redis_url, "other").spec()["config"]["epochs"] == 2
    path.write_text("name = ")
    assert main(["submit", str(path), "--url", redis_url]) == 2
    assert capsys.readouterr().err.startswith(f"error: {path}: it is no TOML")
