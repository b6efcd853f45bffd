"""Each block of docs/models.md that is a module trains."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
import warnings
from pathlib import Path

import pytest

from tests.support.inprocess import InProcess, resolved
from torchord import TrainingConfig

PAGE = Path(__file__).resolve().parents[3] / "docs" / "models.md"
BLOCKS = {
    name: block
    for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.S | re.M)
    for name in re.findall(r"\A# (\w+)\.py\n", block)
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BLOCKS)
def test_a_module_of_the_page_trains(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in set(re.findall(r"^(?:import|from) (\w+)", BLOCKS[name], flags=re.M)) - BLOCKS.keys():
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"NOT TESTED, {package} is not installed (pip install '.[demo,models]')")
    for each, block in BLOCKS.items():
        (tmp_path / f"{each}.py").write_text(block)
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = importlib.import_module(name)
        config = getattr(module, "config", TrainingConfig(epochs=3, batch_size=64, shards=2))
        run = InProcess(resolved(module.recipe), config).train()
        epoch = run.plan.total_steps // config.epochs
        assert sum(run.losses[-epoch:]) < sum(run.losses[:epoch])
    finally:
        for each in BLOCKS:
            sys.modules.pop(each, None)


def test_the_page_has_such_blocks() -> None:
    assert BLOCKS.keys() == {"my_lightning", "my_keras", "my_text", "my_lora", "my_table"}
