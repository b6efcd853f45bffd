"""The REST interface: what it answers, to whom, and that it is as its description says."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import torch
from fastapi.openapi.models import OpenAPI
from flower import urls
from jsonschema import Draft202012Validator

from tests.support import models
from tests.support.waiting import wait_until
from tests.support.web import Asker, served
from torchord import LocalCluster, Master
from torchord.cache.settings import Settings
from torchord.coordinator.local_cluster.import_path import ROOT
from torchord.coordinator.pages.answers import Answers
from torchord.coordinator.pages.tokens import Tokens, made
from torchord.tasks.flower_pages.api import OPERATIONS, Api
from torchord.tasks.flower_pages.asking import Asking
from torchord.tasks.flower_pages.handlers import handlers
from torchord.tasks.flower_pages.routes import BODY_NBYTES, ROUTES, description

RECIPE = """
adjustable = ["epochs"]
[recipe]
model = "tests.support.models:Mlp"
dataset = {target = "tests.support.models:points", size = 40}
loss = "torch.nn.functional:cross_entropy"
optimizer = {target = "torch.optim:AdamW", lr = 0.01}
[config]
epochs = 1
batch_size = 8
shards = 2
checkpoint_every = 1000
"""
TOKENS = {scope: made(f"a-{scope}", scope) for scope in ("read", "predict", "write")}
WITH_BODY = {"submitRun": {"recipe": "points"}, "predict": {"inputs": [[0.0] * models.FEATURES]}}


class Fixture:
    """A fleet with a REST interface.

    Attributes:
        cluster: of one Client.
        ask: whoever may write.
        api: its handlers, for other servers.
    """

    def __init__(self, cluster: LocalCluster, folder: Path, address: str, api: Api) -> None:
        self.cluster, self.folder, self.api = cluster, folder, api
        self.address = address
        self.ask = Asker(address, TOKENS["write"][0])


def interface(url: str, folder: Path) -> Api:
    recipes = folder / "recipes"
    recipes.mkdir(exist_ok=True)
    (recipes / "points.toml").write_text(RECIPE)
    (recipes / "broken.toml").write_text("[recipe]\nmodel = 3")
    (folder / "secret.toml").write_text(RECIPE)
    make = lambda: Answers(Settings(url=url, checkpoint_dir=str(folder / "checkpoints")))  # noqa: E731
    tokens = Tokens("\n".join(["# of tests", *(entry for _, entry in TOKENS.values())]))
    return Api(Asking(make), Asking(make), tokens, str(recipes))


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fixture]:
    folder = tmp_path_factory.mktemp("rest")
    with LocalCluster(1, checkpoint_dir=folder / "checkpoints", log_dir=folder / "logs") as cluster:
        api = interface(cluster.url, folder)
        with served([*handlers(api.asking, frozenset()), *api.addresses()]) as address:
            made = Fixture(cluster, folder, address, api)
            code, said = made.ask("POST", "/api/runs", {"recipe": "points", "name": "done"})
            assert code == 202 and said == {"name": "done", "state": "pending"}
            wait_until(lambda: made.ask("GET", "/api/runs/done")[1]["state"] == "done", message="the run")
            yield made


# --- what is asked --------------------------------------------------------------------------


def test_a_run_is_submitted_by_the_name_of_its_recipe_with_what_it_lets_one_choose(fleet: Fixture) -> None:
    ask = fleet.ask
    assert ask("GET", "/api/recipes") == (
        200,
        {"recipes": [{"recipe": "points", "adjustable": ["epochs"]}]},
    )
    body = {"recipe": "points", "name": "long", "config": {"epochs": 4000}}
    assert ask("POST", "/api/runs", body)[0] == 202
    assert ask("POST", "/api/runs", body)[0] == 202, "the same is the same run"
    assert ask("POST", "/api/runs", {**body, "config": {"epochs": 3}})[0] == 409
    wait_until(lambda: ask("GET", "/api/runs/long")[1]["version"] > 3, message="steps")
    assert ask("POST", "/api/runs/long/pause") == (200, {"name": "long", "state": "paused"})
    assert ask("POST", "/api/runs/long/resume") == (200, {"name": "long", "state": "running"})
    inputs = models.points(3).tensors[0]
    question = {"inputs": inputs.tolist(), "timeout": 60}
    first = ask("POST", "/api/runs/long/predict", question)
    assert first[0] == 200 and len(first[1]["outputs"]) == 3, first
    wait_until(lambda: ask("GET", "/api/runs/long")[1]["version"] > first[1]["version"] + 3, message="more")
    code, later = ask("POST", "/api/runs/long/predict", question)
    assert code == 200, later
    assert later["version"] > first[1]["version"] and later["outputs"] != first[1]["outputs"]
    assert ask("POST", "/api/runs/long/cancel") == (200, {"name": "long", "state": "cancelled"})
    code, said = ask("POST", "/api/runs/long/pause")
    assert code == 409 and "only a running run can be paused" in said["error"]


def test_history_comes_in_parts(fleet: Fixture) -> None:
    first = fleet.ask("GET", "/api/runs/done/history?limit=3")[1]
    assert [step["version"] for step in first["steps"]] == [1, 2, 3] and first["next"] == 3
    rest = fleet.ask("GET", f"/api/runs/done/history?after={first['next']}")[1]
    assert [step["version"] for step in rest["steps"]] == [4, 5] and rest["next"] is None
    assert rest["steps"][0]["loss"] > 0 and rest["version"] == 5


def test_events_come_as_a_list_and_as_a_stream_that_ends_with_the_run(fleet: Fixture) -> None:
    found = fleet.ask("GET", "/api/runs/done/events")[1]
    assert found["ended"] and [each["type"] for each in found["events"]].count("step") == 5
    after = found["events"][2]["id"]
    assert fleet.ask("GET", f"/api/runs/done/events?after={after}")[1]["events"] == found["events"][3:]
    status, text, headers = fleet.ask.whole(
        "GET", "/api/runs/done/events", Accept="text/event-stream", Last_Event_ID=after
    )
    assert status == 200 and headers["Content-Type"] == "text/event-stream"
    parts = [
        dict(line.split(": ", 1) for line in part.splitlines())
        for part in text.split("\n\n")
        if len(part) > 1
    ]
    assert [json.loads(part["data"]) for part in parts[:-1]] == found["events"][3:]
    assert parts[0]["id"] == found["events"][3]["id"] and parts[-1] == {
        "event": "end",
        "data": '{"state": "done"}',
    }


def test_a_stream_goes_on_while_the_run_does(fleet: Fixture) -> None:
    body = {"recipe": "points", "name": "streamed", "config": {"epochs": 4000}}
    assert fleet.ask("POST", "/api/runs", body)[0] == 202
    asked = fleet.ask.request("GET", "/api/runs/streamed/events", Accept="text/event-stream")
    with urlopen(asked, timeout=60) as reply:
        seen = next(line for line in reply if line.startswith(b'data: {"id"') and b'"step": 3,' in line)
        assert b'"type": "step"' in seen
        assert fleet.ask("POST", "/api/runs/streamed/cancel")[0] == 200
        assert reply.read().decode().rstrip().endswith('event: end\ndata: {"state": "cancelled"}')


def test_predictions_are_those_of_the_model(fleet: Fixture) -> None:
    inputs = models.points(6).tensors[0]
    code, found = fleet.ask("POST", "/api/runs/done/predict", {"inputs": inputs.tolist(), "batch_size": 4})
    assert code == 200 and found["version"] == 5
    model = Master(fleet.cluster.url, checkpoint_dir=fleet.folder / "checkpoints").run("done").model()
    assert torch.allclose(torch.tensor(found["outputs"]), model(inputs))


def test_the_program_of_the_page_runs(fleet: Fixture) -> None:
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "rest.md").read_text(), flags=re.DOTALL)
    printed: list[Any] = []
    given = {
        "FLOWER": fleet.address,
        "TOKEN": TOKENS["write"][0],
        "ROWS": models.points(2).tensors[0].tolist(),
    }
    exec(code, {**given, "print": printed.append})  # noqa: S102  # the page
    assert len(printed[0]) == 2


def test_a_prediction_whose_time_passed_in_the_queue_is_not_begun(
    fleet: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet.api.working, "_threads", Late(1))
    code, said = fleet.ask("POST", "/api/runs/done/predict", {**WITH_BODY["predict"], "timeout": 0.001})
    assert code == 503 and "others' predictions have taken all of the time" in said["error"]


class Late(ThreadPoolExecutor):
    """Begins what it is given when its time has passed."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        asked = time.monotonic()

        def late() -> Any:
            wait_until(lambda: time.monotonic() - asked > 0.01, message="a hundredth of a second")
            return fn(*args, **kwargs)

        return super().submit(late)


# --- who may ask ----------------------------------------------------------------------------


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.id)
def test_every_route_asks_for_its_scope(fleet: Fixture, route: Any) -> None:
    method, path = route.method.upper(), route.path.replace("{name}", "nobody")
    body = WITH_BODY.get(route.id)
    order = ("read", "predict", "write")
    for scope in order:
        code, said = Asker(fleet.address, TOKENS[scope][0])(method, path, body)
        if order.index(scope) < order.index(route.scope):
            assert code == 403 and f"token a-{scope} is of scope {scope}" in said["error"]
        else:
            assert code not in (401, 403, 500), said
    for token in ("", "nobody's", TOKENS["write"][0][:-1], TOKENS["write"][1], "ü"):
        code, text, headers = Asker(fleet.address).whole(
            method, path, body, Authorization=f"Bearer {token}".encode().decode("latin-1")
        )
        assert (
            code == 401 and headers["WWW-Authenticate"] == "Bearer" and "a token" in json.loads(text)["error"]
        )


def test_no_login_changes_anything(fleet: Fixture) -> None:
    """A browser sends a password or a cookie by itself, whichever page asks."""
    password = {"Authorization": "Basic dXNlcjpzZWNyZXQ="}
    with served(fleet.api.addresses(), basic_auth=["user:secret"]) as address:
        ask = Asker(address)
        assert ask("GET", "/api/runs")[0] == 401 and ask("GET", "/api/runs", **password)[0] == 200
        assert ask("GET", "/api/runs", Authorization="Basic dXNlcjp4")[0] == 401
        assert Asker(address, TOKENS["read"][0])("GET", "/api/runs")[0] == 200, (
            "a token does without a password"
        )
        for route in ROUTES:
            if route.method == "post":
                path = route.path.replace("{name}", "done")
                code, said = ask("POST", path, WITH_BODY.get(route.id), **password)
                assert code == 403 and "a login does not do" in said["error"]
    for route in ROUTES:
        if route.method == "post":  # nor does a Flower that is open to everybody
            path = route.path.replace("{name}", "done")
            assert Asker(fleet.address)("POST", path, WITH_BODY.get(route.id), Origin="http://evil")[0] == 403


def test_read_only_lets_nothing_be_changed(fleet: Fixture) -> None:
    with served(fleet.api.addresses(), read_only=True) as address:
        ask = Asker(address, TOKENS["write"][0])
        for path, body in (("/api/runs", {"recipe": "points"}), ("/api/runs/done/cancel", None)):
            assert ask("POST", path, body) == (403, {"error": "Flower was started with --read_only"})
        assert ask("POST", "/api/runs/done/predict", WITH_BODY["predict"])[0] == 200


def test_nothing_is_submitted_where_no_recipes_are_listed(fleet: Fixture) -> None:
    api = Api(fleet.api.asking, fleet.api.working, fleet.api.tokens, "")
    with served(api.addresses()) as address:
        ask = Asker(address, TOKENS["write"][0])
        code, said = ask("POST", "/api/runs", {"recipe": "points"})
        assert code == 403 and "TORCHORD_API_RECIPES" in said["error"]
        assert ask("GET", "/api/recipes") == (200, {"recipes": []})


# --- what goes wrong ------------------------------------------------------------------------

WRONG: list[tuple[str, str, Any, int, str]] = [
    ("GET", "/api/runs/nobody", None, 404, "'nobody' is neither in Redis nor"),
    ("GET", "/api/runs/nobody/history", None, 404, "'nobody'"),
    ("GET", "/api/runs/nobody/events", None, 404, "'nobody'"),
    ("POST", "/api/runs/nobody/pause", None, 404, "'nobody'"),
    ("GET", "/api/runs/..%2Fetc", None, 422, "cannot be used"),
    ("GET", "/api/runs/done/history?after=x", None, 400, "after must be a whole number from 0"),
    ("GET", "/api/runs/done/history?limit=0", None, 400, "limit must be a whole number from 1 to 5000"),
    ("GET", "/api/runs/done/history?limit=99999999999999999999", None, 400, "limit must be"),
    ("GET", "/api/runs/done/events?after=%00", None, 422, "two numbers with a dash"),
    ("GET", "/api/runs/done/nothing", None, 404, "no such address; GET /api/openapi.json"),
    ("GET", "/api/runs/", None, 404, "no such address"),
    ("DELETE", "/api/runs/done", None, 405, "this address takes GET"),
    ("PUT", "/api/runs", {"recipe": "points"}, 405, "this address takes GET, POST"),
    ("POST", "/api/runs", b"{", 400, "the body is no JSON"),
    ("POST", "/api/runs", b"[" * 100_000, 400, "the body is no JSON"),
    ("POST", "/api/runs", b"\xff", 400, "the body is no JSON"),
    ("POST", "/api/runs", b'{"recipe": NaN}', 400, "NaN is no JSON"),
    ("POST", "/api/runs", [], 400, "must be a JSON object"),
    ("POST", "/api/runs", {}, 400, "the body lacks 'recipe'"),
    ("POST", "/api/runs", {"recipe": "points", "model": "os:system"}, 400, "the body has 'model'"),
    ("POST", "/api/runs", {"recipe": 3}, 400, "'recipe' must be string"),
    ("POST", "/api/runs", {"recipe": "nobody"}, 422, "no recipe 'nobody' may be submitted here"),
    ("POST", "/api/runs", {"recipe": "../secret"}, 422, "no recipe '../secret' may be submitted"),
    ("POST", "/api/runs", {"recipe": "broken"}, 422, "[recipe] lacks 'dataset'"),
    ("POST", "/api/runs", {"recipe": "points", "name": "a b"}, 422, "cannot be used"),
    ("POST", "/api/runs", {"recipe": "points", "config": {"threads": 9}}, 422, "it lets epochs be chosen"),
    ("POST", "/api/runs", {"recipe": "points", "config": {"epochs": -1}}, 422, "epochs"),
    ("POST", "/api/runs/done/predict", {"inputs": [[1, 2], [3]]}, 422, "no rows of numbers"),
    ("POST", "/api/runs/done/predict", {"inputs": [["a"]]}, 422, "no rows of numbers"),
    ("POST", "/api/runs/done/predict", {"inputs": []}, 422, "lists of numbers"),
    ("POST", "/api/runs/done/predict", {"inputs": {}}, 422, "an empty mapping"),
    ("POST", "/api/runs/done/predict", {"inputs": [[1.0]]}, 422, "shapes cannot be multiplied"),
    ("POST", "/api/runs/done/predict", {"inputs": [[0.0] * 6], "version": 77}, 404, "version 77"),
    ("POST", "/api/runs/done/predict", {"inputs": [[0.0] * 6], "timeout": 61}, 400, "'timeout' must be"),
    (
        "POST",
        "/api/runs/done/predict",
        {"inputs": [[0.0] * 6], "timeout": 0},
        400,
        "'timeout' must be more than 0",
    ),
    (
        "POST",
        "/api/runs/done/predict",
        {"inputs": [[0.0] * 6], "batch_size": True},
        400,
        "'batch_size' must be",
    ),
]


@pytest.mark.parametrize(("method", "path", "body", "code", "said"), WRONG)
def test_an_error_is_one_sentence_with_the_right_code(
    fleet: Fixture, method: str, path: str, body: Any, code: int, said: str
) -> None:
    found, answer = fleet.ask(method, path, body)
    assert found == code and answer.keys() == {"error"} and said in answer["error"], answer


def test_a_form_is_no_json_and_a_large_body_is_not_read(fleet: Fixture) -> None:
    form = {"Content_Type": "application/x-www-form-urlencoded"}
    assert fleet.ask("POST", "/api/runs", b"recipe=points", **form) == (
        415,
        {"error": "the body must be application/json"},
    )
    host, _, port = fleet.address.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=60) as line:
        head = f"POST /api/runs HTTP/1.1\r\nHost: h\r\nContent-Length: {BODY_NBYTES + 1}\r\n"
        line.sendall(f"{head}Authorization: Bearer {TOKENS['write'][0]}\r\n\r\n".encode())
        assert line.recv(100).startswith(b"HTTP/1.1 413 ")  # with no byte of the body sent


def test_a_redis_that_is_away_is_said(tmp_path: Path) -> None:
    api = interface("redis://127.0.0.1:1/0", tmp_path)
    with served(api.addresses()) as address:
        code, said = Asker(address, TOKENS["read"][0])("GET", "/api/runs")
        assert code == 503 and "no Redis answers" in said["error"]


def test_streams_are_few(fleet: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchord.tasks.flower_pages.api._STREAMS_MOST", 0)
    code, said = fleet.ask("GET", "/api/runs/done/events", Accept="text/event-stream")
    assert code == 503 and "streams are open" in said["error"]


# --- its description ------------------------------------------------------------------------


def test_the_description_is_openapi_and_names_every_route(fleet: Fixture) -> None:
    code, document = fleet.ask("GET", "/api/openapi.json")
    assert code == 200 and document == json.loads(json.dumps(description("")))
    OpenAPI.model_validate(document)
    assert description("/watch")["servers"] == [{"url": "/watch"}]
    operations = [each for path in document["paths"].values() for each in path.values()]
    assert {each["operationId"] for each in operations} == OPERATIONS.keys() and len(operations) == len(
        ROUTES
    )
    for schema in document["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)
    for reference in json.dumps(document).split('"$ref": "#/')[1:]:
        found: Any = document
        for key in reference.partition('"')[0].split("/"):
            found = found[key]


def test_answers_are_as_described(fleet: Fixture) -> None:
    document = description("")
    asked = [
        ("/api/runs", "/api/runs", "get", None),
        ("/api/recipes", "/api/recipes", "get", None),
        ("/api/runs/{name}", "/api/runs/done", "get", None),
        ("/api/runs/{name}/history", "/api/runs/done/history", "get", None),
        ("/api/runs/{name}/events", "/api/runs/done/events", "get", None),
        ("/api/runs/{name}/predict", "/api/runs/done/predict", "post", WITH_BODY["predict"]),
        ("/api/runs", "/api/runs", "post", {"recipe": "points", "name": "done"}),
    ]
    for path, address, method, body in asked:
        code, answer = fleet.ask(method.upper(), address, body)
        schema = document["paths"][path][method]["responses"][str(code)]["content"]["application/json"][
            "schema"
        ]
        Draft202012Validator({**schema, "components": document["components"]}).validate(answer)
        if body is not None:
            given = document["paths"][path][method]["requestBody"]["content"]["application/json"]["schema"]
            Draft202012Validator({**given, "components": document["components"]}).validate(body)


def test_flowers_own_addresses_are_not_taken() -> None:
    theirs = [pattern for pattern, *_ in (rule for rule in urls.handlers if isinstance(rule, tuple))]
    assert "/api/workers" in theirs and theirs.pop() == ".*", "what nobody else takes is not found"
    for route in ROUTES:
        path = route.path.replace("{name}", "x")
        assert not any(re.fullmatch(pattern, path) for pattern in theirs), path
