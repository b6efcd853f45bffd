"""The code of docs/coming-from.md that is for torchord: one module, each of whose recipes learns."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.inprocess import InProcess, resolved
from torchord.cache.ledger.ledger import Ledger
from torchord.cache.servers.redis_client import connect

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The page's module."""
    folder = tmp_path_factory.mktemp("page")
    text = (ROOT / "docs" / "coming-from.md").read_text()
    (folder / "coming_from_page.py").write_text(
        "\n\n".join(re.findall(r"^```python\n(.*?)^```", text, re.S | re.M))
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield importlib.import_module("coming_from_page")


@pytest.mark.parametrize("name", ["from_ddp", "from_lightning", "from_hivemind", "from_horovod", "tried"])
def test_what_comes_from_elsewhere_learns(page: ModuleType, name: str) -> None:
    recipe = page.tried(1e-2) if name == "tried" else getattr(page, name)
    config = page.local_config if name == "from_hivemind" else page.ddp_config
    run = InProcess(resolved(recipe), config).train()
    assert len(run.losses) == run.plan.total_steps > 5
    assert run.losses[-1] < run.losses[0]


def test_the_run_is_submitted_from_any_program(page: ModuleType, redis_url: str) -> None:
    run = page.submit("digits-01", redis_url)
    assert run.status().state == "pending"
    assert Ledger(connect(redis_url), redis_url, "digits-01").spec()["config"]["clip_norm"] == 1.0
