"""The table of the REST interface: its addresses, and the OpenAPI description that is made from it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from torchord.cache import keys
from torchord.coordinator.pages.answers import EVENTS_MOST, STEPS_MOST

Schema = dict[str, Any]

BODY_NBYTES = 8 << 20
_NUMBER: Schema = {"type": ["number", "null"]}
_TEXT: Schema = {"type": "string"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_NAME: Schema = {"type": "string", "pattern": f"^{keys.NAME_PATTERN}$"}


def _object(required: Iterable[str] = (), more: bool = True, /, **properties: Schema) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": more,
    }


def _list(of: Schema, **more: Any) -> Schema:
    return {"type": "array", "items": of, **more}


def _named(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


SCHEMAS: dict[str, Schema] = {
    "Error": _object(("error",), False, error={**_TEXT, "description": "what is wrong, one sentence"}),
    "Wait": _object(("kind", "what", "ends", "since"), kind=_TEXT, what=_TEXT, ends=_TEXT, since=_NUMBER),
    "Run": _object(
        ("name", "state", "version", "total", "loss", "metrics", "waits", "error"),
        name=_TEXT,
        state={
            **_TEXT,
            "description": "pending, running, paused, failed, cancelled, done, on disk or unreadable",
        },
        version={"type": ["integer", "null"], "description": "committed steps"},
        total={"type": ["integer", "null"], "description": "steps of the whole run"},
        left_seconds=_NUMBER,
        loss=_NUMBER,
        metrics={"type": "object", "description": "of the last evaluation"},
        rate={**_NUMBER, "description": "examples a second"},
        workers={"type": ["integer", "null"]},
        submitted_at={**_NUMBER, "description": "Unix time (s)"},
        committed_at={**_NUMBER, "description": "Unix time (s)"},
        waits=_list(_named("Wait")),
        error={**_TEXT, "description": "why it failed"},
    ),
    "Runs": _object(("runs", "workers", "now"), runs=_list(_named("Run")), workers=_COUNT, now=_NUMBER),
    "Recipes": _object(
        ("recipes",),
        False,
        recipes=_list(_object(("recipe", "adjustable"), recipe=_TEXT, adjustable=_list(_TEXT))),
    ),
    "State": _object(("state",), name=_TEXT, state=_TEXT),
    "Step": _object(
        ("version", "committed_at", "seconds", "skipped", "loss"),
        version=_COUNT,
        committed_at=_NUMBER,
        seconds=_NUMBER,
        skipped={"type": "boolean"},
        loss=_NUMBER,
        grad_norm=_NUMBER,
        lr=_NUMBER,
        rate=_NUMBER,
        nbytes=_NUMBER,
    ),
    "History": _object(
        ("steps", "version", "next"),
        False,
        steps=_list(_named("Step")),
        version={**_COUNT, "description": "the run's"},
        next={"type": ["integer", "null"], "description": "`after` of the next part, null at the end"},
    ),
    "Event": _object(
        ("id", "at", "type", "data"), False, id=_TEXT, at=_NUMBER, type=_TEXT, data={"type": "object"}
    ),
    "Events": _object(
        ("events", "state", "ended"),
        False,
        events=_list(_named("Event")),
        state=_TEXT,
        ended={"type": "boolean"},
    ),
    "Submission": _object(
        ("recipe",),
        False,
        recipe={**_TEXT, "description": "name of a recipe of /api/recipes"},
        name={**_NAME, "description": "of the run; the same name with the same recipe is the same run"},
        config={"type": "object", "description": "adjustable fields of the config"},
    ),
    "Question": _object(
        ("inputs",),
        False,
        inputs={
            "type": ["array", "object"],
            "description": "rows of numbers as nested lists, or a mapping of such; whole numbers are int64, "
            "others float32",
        },
        version={"type": ["integer", "null"], "minimum": 0, "description": "null: the newest"},
        batch_size={"type": "integer", "minimum": 1, "maximum": 65536, "default": 256},
        timeout={"type": "number", "exclusiveMinimum": 0, "maximum": 60, "default": 30, "description": "s"},
    ),
    "Answer": _object(("version", "outputs"), False, version=_COUNT, outputs={}),
}


@dataclass(frozen=True)
class Query:
    """A parameter behind the question mark.

    Attributes:
        name: of it.
        schema: of its value.
        says: what it is for.
    """

    name: str
    schema: Schema
    says: str


@dataclass(frozen=True)
class Route:
    """What can be asked at one address by one method.

    Attributes:
        id: its operation's name.
        method: "get" or "post".
        path: with {name} for a run's.
        scope: of the token that it takes.
        says: what it does, one sentence.
        answer: name of the answer's schema; "" for a stream of events; "OpenAPI" for the description.
        query: what may stand behind the question mark.
        body: name of the body's schema, "" for none.
        status: of an answer that is no error.
    """

    id: str
    method: str
    path: str
    scope: str
    says: str
    answer: str
    query: tuple[Query, ...] = field(default=())
    body: str = ""
    status: int = 200

    def pattern(self) -> str:
        """The address as a regular expression."""
        return re.sub(r"\{\w+\}", "([^/]+)", self.path)


_RUN = "/api/runs/{name}"
ROUTES = (
    Route("listRuns", "get", "/api/runs", "read", "All runs, the newest first.", "Runs"),
    Route("listRecipes", "get", "/api/recipes", "read", "What may be submitted by its name.", "Recipes"),
    Route(
        "submitRun",
        "post",
        "/api/runs",
        "write",
        "Queue a run of a recipe; it goes on by itself.",
        "State",
        body="Submission",
        status=202,
    ),
    Route("getRun", "get", _RUN, "read", "Where a run stands, and what it was submitted as.", "Run"),
    Route(
        "getHistory",
        "get",
        f"{_RUN}/history",
        "read",
        "Its committed steps, oldest first.",
        "History",
        (
            Query("after", {**_COUNT, "default": 0}, "the version that the first of them comes after"),
            Query(
                "limit",
                {"type": "integer", "minimum": 1, "maximum": STEPS_MOST, "default": 1000},
                "at most so many",
            ),
        ),
    ),
    Route(
        "getEvents",
        "get",
        f"{_RUN}/events",
        "read",
        "Its events, steps among them. With `Accept: text/event-stream` they come as they happen, until the "
        "run rests; the last one is `end`.",
        "Events",
        (
            Query(
                "after",
                {**_TEXT, "default": "0-0"},
                "id of the last event seen; a stream also takes Last-Event-ID",
            ),
            Query(
                "limit",
                {"type": "integer", "minimum": 1, "maximum": EVENTS_MOST, "default": 500},
                "at most so many",
            ),
        ),
    ),
    *(
        Route(f"{verb}Run", "post", f"{_RUN}/{verb}", "write", f"{says}.", "State")
        for verb, says in (
            ("pause", "Stop within the step; what is done is kept"),
            ("resume", "Go on after a pause, a failure or the loss of Redis"),
            ("cancel", "End the run for good"),
        )
    ),
    Route(
        "predict",
        "post",
        f"{_RUN}/predict",
        "predict",
        "The outputs of a version for some inputs, computed by the workers.",
        "Answer",
        body="Question",
    ),
    Route("getOpenAPI", "get", "/api/openapi.json", "read", "This description.", "OpenAPI"),
)

_ERRORS = {
    "400": "the request is malformed",
    "401": "no token, or one that nobody has",
    "403": "the token does not permit that, or the server was not told to",
    "404": "no such run or version",
    "409": "not in the run's state, or not with this recipe",
    "413": "the body is too large",
    "415": "the body is no application/json",
    "422": "what was asked for cannot be",
    "503": "Redis, the workers or this server cannot answer now; ask again",
    "504": "the workers took too long",
}


def description(prefix: str) -> Schema:
    """The OpenAPI 3.1 description of `ROUTES`.

    Args:
        prefix: what stands before each address, without a slash at its end.
    """
    paths: dict[str, Schema] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "torchord",
            "version": version("torchord"),
            "description": "Runs that train PyTorch models. A figure that is NaN or infinite is null.",
        },
        "servers": [{"url": prefix or "/"}],
        "security": [{"token": []}],
        "paths": paths,
        "components": {
            "schemas": SCHEMAS,
            "responses": {
                f"Error{code}": {"description": says, "content": _json(_named("Error"))}
                for code, says in _ERRORS.items()
            },
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def _json(schema: Schema) -> Schema:
    return {"application/json": {"schema": schema}}


def _operation(route: Route) -> Schema:
    content = _json({"type": "object"} if route.answer == "OpenAPI" else _named(route.answer))
    if route.id == "getEvents":
        content["text/event-stream"] = {"schema": _TEXT}
    posts = route.method == "post"
    codes = [code for code in _ERRORS if posts or code not in ("409", "413", "415", "504")]
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": _NAME}
        for name in re.findall(r"\{(\w+)\}", route.path)
    ]
    parameters += [
        {
            "name": query.name,
            "in": "query",
            "required": False,
            "schema": query.schema,
            "description": query.says,
        }
        for query in route.query
    ]
    return {
        "operationId": route.id,
        "summary": route.says,
        "description": f"Needs a token of scope {route.scope}, or one of a later scope.",
        "parameters": parameters,
        "responses": {
            str(route.status): {"description": "as asked", "content": content},
            **{code: {"$ref": f"#/components/responses/Error{code}"} for code in codes},
        },
        **({"requestBody": {"required": True, "content": _json(_named(route.body))}} if route.body else {}),
    }
