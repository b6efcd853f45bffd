"""The REST interface: the addresses of `routes`, on Flower's port, for programs with a token.

Reading is admitted to whoever Flower admits to its pages, and to a token. What changes or computes something
needs a token in the header of the request, always: no page of another site can make a browser send that, so a
login or its cookie alone changes nothing here.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from flower.views import BaseHandler
from tornado.iostream import StreamClosedError
from tornado.web import HTTPError, stream_request_body, url

from torchord.cache.errors import (
    CacheError,
    ConfigError,
    ConfigMismatch,
    InvalidInput,
    NoWorker,
    RecipeError,
    RunFailed,
    RunNotFound,
    TorchordError,
    VersionMissing,
    WaitTimeout,
)
from torchord.cache.ledger.figures import for_others
from torchord.coordinator.pages.tokens import Holder, Tokens
from torchord.tasks.flower_pages.asking import Asking, Busy
from torchord.tasks.flower_pages.handlers import code_of
from torchord.tasks.flower_pages.routes import BODY_NBYTES, ROUTES, SCHEMAS, Route, description

log = logging.getLogger(__name__)

_STATUS: tuple[tuple[type[Exception], int], ...] = (
    (RunNotFound, 404),
    (VersionMissing, 404),
    (ConfigMismatch, 409),
    (NoWorker, 503),
    (WaitTimeout, 504),
    (RunFailed, 422),
    (InvalidInput, 422),
    (ConfigError, 422),
    (RecipeError, 422),
    (CacheError, 503),
    (Busy, 503),
)
_BODY_SECONDS = 30.0
_LIST_SECONDS, _EVENT_SECONDS = 1.0, 0.4
_STREAMS_MOST = 64
_STREAM_SECONDS = 3600.0
_SIGN_OF_LIFE_SECONDS = 15.0
_OTHERS = r"/api/(?:runs|recipes)/.*"
_TYPES: dict[str, Any] = {
    "integer": int,
    "string": str,
    "object": dict,
    "array": list,
    "number": (int, float),
}


@dataclass
class Api:
    """What the handlers share.

    Attributes:
        asking: answers what is read.
        working: answers what takes long or changes something, so that the pages never wait for it.
        tokens: those that are admitted.
        recipes: the directory of what may be submitted, "" for nothing.
        streams: how many are open.
    """

    asking: Asking
    working: Asking
    tokens: Tokens
    recipes: str
    streams: int = field(default=0)

    def addresses(self) -> list[url]:
        """The addresses, for Flower's list."""
        found: dict[str, dict[str, Route]] = {}
        for route in ROUTES:
            found.setdefault(route.pattern(), {})[route.method] = route
        return [
            url(
                pattern,
                ApiHandler,
                {"api": self, "routes": routes},
            )
            for pattern, routes in [*found.items(), (_OTHERS, {})]
        ]


@stream_request_body
class ApiHandler(BaseHandler):
    """One address; what it does for a method is the function of `OPERATIONS` that the route names.

    Args (of `initialize`):
        api: what all of them share.
        routes: by method.
    """

    def initialize(self, api: Api, routes: dict[str, Route]) -> None:
        """See `tornado.web.RequestHandler`."""
        self.api, self.routes = api, routes
        self._read = bytearray()
        self.body: dict[str, Any] = {}
        self.holder: Holder | None = None

    # --- before an operation --------------------------------------------------------------

    def check_xsrf_cookie(self) -> None:
        """Nothing: what a browser sends by itself admits to no method that a page of another site may use."""

    def get_current_user(self) -> Any:
        """Whoever has a token, else as Flower has it."""
        kind, _, token = self.request.headers.get("Authorization", "").partition(" ")
        if kind.lower() != "bearer":
            return super().get_current_user()
        self.holder = self.api.tokens.holder(token.strip())
        return None if self.holder is None else self.holder.name

    def prepare(self) -> None:
        """Refuse what is not admitted before its body is read."""
        self.request.connection.set_body_timeout(_BODY_SECONDS)
        length = self.request.headers.get("Content-Length", "0")
        if length.isdecimal() and int(length) > BODY_NBYTES:
            raise HTTPError(413, f"the body is larger than {BODY_NBYTES:,} bytes")
        self.request.connection.set_max_body_size(BODY_NBYTES)
        route = self.routes.get(self.request.method.lower())
        if not self.routes:
            raise HTTPError(404, "no such address; GET /api/openapi.json lists those that there are")
        if route is None:
            raise HTTPError(405, f"this address takes {', '.join(sorted(self.routes)).upper()}")
        if self.current_user is None:
            raise HTTPError(
                401, "a token that nobody has, or none; give one as `Authorization: Bearer TOKEN`"
            )
        if self.holder is not None and not self.holder.may(route.scope):
            raise HTTPError(
                403, f"token {self.holder.name} is of scope {self.holder.scope}, this needs {route.scope}"
            )
        if route.method != "get":
            self._require_token(route)

    def _require_token(self, route: Route) -> None:
        if self.holder is None:
            way = "make one with `torchord token` and start Flower with TORCHORD_API_TOKENS"
            raise HTTPError(403, f"this needs a token of scope {route.scope}, a login does not do; {way}")
        if route.scope == "write" and self.application.options.read_only:
            raise HTTPError(403, "Flower was started with --read_only")
        kind = self.request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if route.body and kind != "application/json":
            raise HTTPError(415, "the body must be application/json")

    def data_received(self, chunk: bytes) -> None:
        """A part of the body."""
        self._read += chunk

    def _parsed(self, route: Route) -> dict[str, Any]:
        """The body, checked against its schema's names and types."""
        try:
            found = json.loads(self._read, parse_constant=_refuse)
        except (ValueError, RecursionError) as error:
            raise HTTPError(
                400, f"the body is no JSON: {type(error).__name__}: {str(error)[:200]}"
            ) from error
        schema = SCHEMAS[route.body]
        if not isinstance(found, dict):
            raise HTTPError(400, "the body must be a JSON object")
        if unknown := sorted(found.keys() - schema["properties"].keys()):
            raise HTTPError(
                400, f"the body has {unknown[0]!r:.60}; it may have {', '.join(schema['properties'])}"
            )
        if lacking := [name for name in schema["required"] if name not in found]:
            raise HTTPError(400, f"the body lacks {lacking[0]!r}")
        for name, value in found.items():
            if fault := _fault(value, schema["properties"][name]):
                raise HTTPError(400, f"{name!r} {fault}")
        return found

    # --- the operations -------------------------------------------------------------------

    async def get(self, *path: str) -> None:
        """See `routes`."""
        await self._perform(*path)

    async def post(self, *path: str) -> None:
        """See `routes`."""
        await self._perform(*path)

    async def _perform(self, *path: str) -> None:
        route = self.routes[self.request.method.lower()]
        self.body = self._parsed(route) if route.body else {}
        if route.method == "post" and self.holder is not None:
            log.info("%s%s, asked for by %s at %s", route.id, path, self.holder.name, self.request.remote_ip)
        await OPERATIONS[route.id](self, *path)

    def number(self, name: str) -> int:
        """A query parameter that is a whole number, by its route."""
        route = self.routes["get"]
        schema = next(query.schema for query in route.query if query.name == name)
        text = self.get_query_argument(name, str(schema["default"]))
        least, most = schema.get("minimum", 0), schema.get("maximum", 10**15)
        if not (text.isascii() and text.isdigit() and len(text) < 16 and least <= int(text) <= most):
            raise HTTPError(400, f"{name} must be a whole number from {least} to {most}, not {text!r:.40}")
        return int(text)

    async def told(
        self,
        question: Callable[[Any], Any],
        *,
        status: int = 200,
        slow: bool = False,
        changes: bool = False,
        **sharing: Any,
    ) -> None:
        """Answer with what a question gives, as JSON.

        Args:
            status: of the answer.
            slow: it waits for workers or imports something, so nothing that is quick waits for it.
            changes: what was answered before is so no more.
        """
        asking = self.api.working if slow else self.api.asking
        found = await asking.ask(lambda pages: for_others(question(pages)), **sharing)
        if changes:
            self.api.asking.forget()
        self.set_status(status)
        self.send(found)

    def send(self, text: str) -> None:
        """End the answer with some JSON."""
        self.set_header("Content-Type", "application/json; charset=UTF-8")
        self.set_header("Cache-Control", "no-store")
        self.finish(text)

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """{"error": one sentence}."""
        error = (kwargs.get("exc_info") or (None, None))[1]
        if isinstance(error, TorchordError):
            status_code, said = (
                next((c for kind, c in _STATUS if isinstance(error, kind)), code_of(error)),
                str(error),
            )
        elif isinstance(error, HTTPError):
            said = error.get_message() or f"the server answered {status_code}"
        else:
            said = f"the server could not answer: {type(error).__name__}" if error else f"error {status_code}"
        self.set_status(status_code)
        if status_code == 401:
            self.set_header("WWW-Authenticate", "Bearer")
        if status_code == 405:
            self.set_header("Allow", ", ".join(sorted(self.routes)).upper())
        self.send(for_others({"error": said}))

    def log_exception(self, typ: Any, value: Any, tb: Any) -> None:
        """What the asker is told is no error of the server's."""
        if not isinstance(value, TorchordError):
            super().log_exception(typ, value, tb)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _fault(value: Any, schema: dict[str, Any]) -> str:
    """What is wrong with a value of the body, "" if nothing."""
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if value is None and "null" in kinds:
        return ""
    if isinstance(value, bool) or not any(
        isinstance(value, _TYPES[kind]) for kind in kinds if kind in _TYPES
    ):
        return f"must be {' or '.join(kinds)}"
    low, most = schema.get("minimum"), schema.get("maximum")
    if (
        (low is not None and value < low)
        or (most is not None and value > most)
        or value == schema.get("exclusiveMinimum")
    ):
        return f"must be {'at least ' + str(low) if low is not None else 'more than 0'}" + (
            f" and at most {most}" if most is not None else ""
        )
    if "exclusiveMinimum" in schema and value < schema["exclusiveMinimum"]:
        return "must be more than 0"
    return ""


async def _list(handler: ApiHandler) -> None:
    await handler.told(lambda pages: pages.listed(), key=("listed",), seconds=_LIST_SECONDS)


async def _recipes(handler: ApiHandler) -> None:
    await handler.told(lambda pages: {"recipes": pages.recipes(handler.api.recipes)})


async def _submit(handler: ApiHandler) -> None:
    body, folder = handler.body, handler.api.recipes
    if not folder:
        raise HTTPError(403, "nothing may be submitted here; start Flower with TORCHORD_API_RECIPES")
    await handler.told(
        lambda pages: pages.submit(folder, body["recipe"], name=body.get("name"), config=body.get("config")),
        status=202,
        slow=True,
        changes=True,
    )


async def _run(handler: ApiHandler, name: str) -> None:
    await handler.told(lambda pages: pages.overview(name), key=("overview", name), seconds=_EVENT_SECONDS)


async def _history(handler: ApiHandler, name: str) -> None:
    after, limit = handler.number("after"), handler.number("limit")
    await handler.told(lambda pages: pages.steps(name, after=after, limit=limit))


async def _events(handler: ApiHandler, name: str) -> None:
    after, limit = handler.get_query_argument("after", "0-0"), handler.number("limit")
    if "text/event-stream" in handler.request.headers.get("Accept", ""):
        await _stream(handler, name, handler.request.headers.get("Last-Event-ID") or after)
    else:
        await handler.told(lambda pages: pages.events(name, after=after, limit=limit))


async def _stream(handler: ApiHandler, name: str, after: str) -> None:
    """Server-sent events (the WHATWG's HTML standard, 9.2), until the run rests, or for an hour."""
    api = handler.api
    if api.streams >= _STREAMS_MOST:
        raise Busy(f"{api.streams} streams are open; ask again in a while")
    api.streams += 1
    try:
        began = alive = time.monotonic()
        while time.monotonic() - began < _STREAM_SECONDS:
            question = _after(name, after)
            found = await api.asking.ask(question, key=("events", name, after), seconds=_EVENT_SECONDS)
            handler.set_header("Content-Type", "text/event-stream")
            handler.set_header("Cache-Control", "no-store")
            handler.set_header("X-Accel-Buffering", "no")
            for event in found["events"]:
                after = event["id"]
                said = for_others(event)
                handler.write(f"id: {after}\nevent: {event['type']}\ndata: {said}\n\n")
            if not found["events"] and found["ended"]:
                handler.write(f"event: end\ndata: {for_others({'state': found['state']})}\n\n")
                break
            if found["events"] or time.monotonic() - alive > _SIGN_OF_LIFE_SECONDS:
                alive = time.monotonic()
                handler.write(":\n\n")
                await handler.flush()
            if not found["events"]:
                await asyncio.sleep(_EVENT_SECONDS)
        handler.finish()
    except StreamClosedError:  # the asker has gone
        return
    finally:
        api.streams -= 1


def _after(name: str, after: str) -> Callable[[Any], Any]:
    return lambda pages: pages.events(name, after=after)


def _acts(verb: str) -> Callable[..., Awaitable[None]]:
    async def act(handler: ApiHandler, name: str) -> None:
        await handler.told(lambda pages: {"name": name, **pages.act(name, verb)}, changes=True)

    return act


async def _predict(handler: ApiHandler, name: str) -> None:
    body, asked = handler.body, time.monotonic()
    timeout = body.get("timeout", 30.0)

    def question(pages: Any) -> Any:
        left = timeout - (time.monotonic() - asked)
        if left <= 0:
            raise Busy("others' predictions have taken all of the time; ask again in a while")
        version, size = body.get("version"), body.get("batch_size", 256)
        return pages.predict(name, body["inputs"], version=version, batch_size=size, timeout=left)

    await handler.told(question, slow=True)


async def _openapi(handler: ApiHandler) -> None:
    prefix = (handler.application.options.url_prefix or "").strip("/")
    handler.send(for_others(description(f"/{prefix}" if prefix else "")))


OPERATIONS: dict[str, Callable[..., Awaitable[None]]] = {
    "listRuns": _list,
    "listRecipes": _recipes,
    "submitRun": _submit,
    "getRun": _run,
    "getHistory": _history,
    "getEvents": _events,
    "pauseRun": _acts("pause"),
    "resumeRun": _acts("resume"),
    "cancelRun": _acts("cancel"),
    "predict": _predict,
    "getOpenAPI": _openapi,
}
"""The function of each of `ROUTES`."""
