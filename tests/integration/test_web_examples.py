"""The examples of web applications: a run is submitted, and its newest version answers while it trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.test import Client
from fastapi.testclient import TestClient

from examples import digits, web_django, web_fastapi
from tests.support.waiting import wait_until
from torchord import LocalCluster

Ask = Callable[..., tuple[int, Any]]
EPOCHS = 2000


def by_fastapi() -> Ask:
    client = TestClient(web_fastapi.api)

    def ask(method: str, path: str, body: Any = None) -> tuple[int, Any]:
        if path.endswith("/cancel"):
            method, path = "DELETE", path.removesuffix("/cancel")
        answer = client.request(method, path, json=body)
        return answer.status_code, answer.json()

    return ask


def by_django() -> Ask:
    client = Client(enforce_csrf_checks=True)

    def ask(method: str, path: str, body: Any = None) -> tuple[int, Any]:
        call = client.post if method == "POST" else client.get
        given = {} if body is None else {"data": body, "content_type": "application/json"}
        answer = call(path, **given)
        return answer.status_code, answer.json()

    return ask


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Workers, at the address that the environment says."""
    folder = tmp_path_factory.mktemp("web")
    environment: dict[str, str | None] = {"TORCHORD_ALLOWED_MODULES": "examples,torch"}
    with (
        LocalCluster(
            1, checkpoint_dir=folder / "checkpoints", log_dir=folder / "logs", env=environment
        ) as cluster,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("TORCHORD_URL", cluster.url)
        patch.setenv("TORCHORD_CHECKPOINT_DIR", str(folder / "checkpoints"))
        web_fastapi.master.cache_clear()
        web_django.master.cache_clear()
        yield


@pytest.mark.parametrize("by", [by_fastapi, by_django])
def test_it_answers_from_the_newest_version_while_the_run_trains(by: Callable[[], Ask], fleet: None) -> None:
    ask, name = by(), f"/train/{by.__name__.replace('_', '-')}"
    images = digits.load_digits("test").tensors[0][:4].tolist()

    def version() -> int:
        return int(ask("GET", name)[1]["version"])

    assert ask("GET", name)[0] == 404 and ask("POST", f"{name}/answers", {"images": images})[0] == 404
    code, said = ask("POST", f"{name}?epochs={EPOCHS}")
    assert code in (200, 202) and said["state"] in ("pending", "running")
    wait_until(lambda: version() > 2, message="steps")
    code, first = ask("POST", f"{name}/answers", {"images": images})
    assert code == 200 and first["version"] > 2 and len(first["digits"]) == 4
    wait_until(lambda: version() > first["version"] + 2, message="more steps")
    code, later = ask("POST", f"{name}/answers", {"images": images})
    assert code == 200 and later["version"] > first["version"]
    assert ask("GET", name)[1]["state"] == "running"
    assert ask("POST", f"{name}/answers", {"images": [[1.0], 2.0]})[0] == 422
    assert ask("POST", f"{name}/cancel")[1] == {"state": "cancelled"}
