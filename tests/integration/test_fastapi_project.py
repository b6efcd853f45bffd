"""torchord behind a web service: the program of docs/your-project.md, as it stands there."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests.support import models
from torchord import TrainingConfig
from torchord.coordinator.local_cluster.embedded_server import EmbeddedServer
from torchord.coordinator.local_cluster.import_path import ROOT

CONFIG = TrainingConfig(epochs=1, batch_size=8, shards=2)


class Service:
    """The page's program, and who calls it.

    Attributes:
        program: it; `recipe` and `config` are what the page leaves to the reader.
    """

    def __init__(self, folder: Path) -> None:
        [code] = re.findall(r"```python\n(from dataclasses.*?)```", page("FastAPI"), flags=re.DOTALL)
        file = folder / "service.py"
        file.write_text(code)
        spec = importlib.util.spec_from_file_location("service", file)
        assert spec is not None and spec.loader is not None
        self.program: Any = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.program)
        self.program.recipe, self.program.config = models.mlp(16), CONFIG
        self.client = TestClient(self.program.api)

    def start(self, name: str, **changes: Any) -> tuple[int, Any]:
        """Submit a run; status code and body. `changes` are of the program's names from then on."""
        vars(self.program).update(changes)
        answer = self.client.post(f"/runs/{name}")
        return answer.status_code, answer.json()

    def status(self, name: str) -> tuple[int, Any]:
        answer = self.client.get(f"/runs/{name}")
        return answer.status_code, answer.json()


def page(section: str) -> str:
    """One section of the page."""
    text = (ROOT / "docs" / "your-project.md").read_text()
    return text.partition(f"\n## {section}\n")[2].partition("\n## ")[0]


@pytest.fixture
def service(redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.setenv("TORCHORD_URL", redis_url)
    monkeypatch.setenv("TORCHORD_CHECKPOINT_DIR", str(tmp_path))
    yield Service(tmp_path)


def test_a_run_is_started_and_followed(service: Service) -> None:
    """Before any worker is there: a request waits for Redis and for nothing else."""
    code, status = service.start("digits")
    assert (code, status["state"], status["version"]) == (200, "pending", 0)
    assert service.status("digits") == (200, status)


def test_each_error_has_the_code_of_whose_fault_it_is(service: Service) -> None:
    assert service.status("nobody")[0] == 404
    code, said = service.start("no name", recipe=models.mlp(16))
    assert (code, "name" in said["detail"]) == (422, True)
    code, said = service.start("lambda", recipe=replace(models.mlp(16), model=lambda: None))
    assert (code, "model" in said["detail"]) == (422, True)
    assert service.start("digits", recipe=models.mlp(16))[0] == 200
    assert service.start("digits", config=replace(CONFIG, epochs=2))[0] == 409


def test_without_redis_the_service_is_not_available(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with EmbeddedServer() as server:
        monkeypatch.setenv("TORCHORD_URL", server.url)
        monkeypatch.setenv("TORCHORD_CHECKPOINT_DIR", str(tmp_path))
        service = Service(tmp_path)
        assert service.start("digits")[0] == 200
        server.kill()
        code, said = service.start("later")
        assert (code, "no Redis answers" in said["detail"]) == (503, True)
