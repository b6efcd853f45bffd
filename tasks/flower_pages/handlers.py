"""The addresses of the pages about runs, as handlers of Flower's: its authentication, prefix and look."""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from flower.views import BaseHandler
from tornado.web import HTTPError, RequestHandler, StaticFileHandler, authenticated, url

from torchord.cache.errors import (
    CacheUnreachable,
    InvalidInput,
    RunError,
    RunNotFound,
    TorchordError,
    VersionMissing,
)
from torchord.cache.ledger.figures import for_others
from torchord.tasks.flower_pages.asking import Asking, Busy

log = logging.getLogger(__name__)

STATIC = Path(__file__).parent / "static"
VERBS = ("pause", "resume", "cancel")
_LIST_SECONDS = 1.0
_RUN_SECONDS = 0.5
_CHUNK_NBYTES = 1 << 20
_STATUS: tuple[tuple[type[Exception], int], ...] = (
    (RunNotFound, 404),
    (VersionMissing, 404),
    (InvalidInput, 400),
    (CacheUnreachable, 503),
    (Busy, 503),
    (RunError, 409),
)
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'self'"
)


class RunsHandler(BaseHandler):
    """What all the handlers have.

    Args (of `initialize`):
        asking: answers.
        allows: what the pages may do.
    """

    def initialize(self, asking: Asking, allows: frozenset[str]) -> None:
        """See `tornado.web.RequestHandler`."""
        self.asking = asking
        self.allows = allows

    def page(self, template: str, **values: Any) -> None:
        """Render one of torchord's templates."""
        self.set_header("Content-Security-Policy", _POLICY)
        self.set_header("Referrer-Policy", "same-origin")
        self.render(
            template, asset=lambda name: self.reverse_url("torchord_static", name) + _version(name), **values
        )

    async def answer(self, question: Callable[[Any], Any], **sharing: Any) -> None:
        """Write the answer to a question as JSON, or why there is none: {"error": one sentence}."""
        try:
            found = await self.asking.ask(lambda pages: for_others(question(pages)), **sharing)
        except Exception as error:  # whatever it is, the page says so and asks again
            self.set_status(code_of(error))
            if not isinstance(error, TorchordError):
                log.exception("a page about runs got no answer")
            said = str(error) if isinstance(error, TorchordError) else f"{type(error).__name__}: {error}"
            found = for_others({"error": said})
        self.set_header("Content-Type", "application/json; charset=UTF-8")
        self.set_header("Cache-Control", "no-store")
        self.finish(found)


class RunsPage(RunsHandler):
    """The list of runs."""

    @authenticated
    def get(self) -> None:
        """The page, which asks for its lines itself."""
        self.page("torchord-runs.html")


class RunsLines(RunsHandler):
    """The lines of the list."""

    @authenticated
    async def get(self) -> None:
        """See `Pages.listed`."""
        await self.answer(lambda pages: pages.listed(), key=("listed",), seconds=_LIST_SECONDS)


class ComparePage(RunsHandler):
    """Several runs beside one another."""

    @authenticated
    def get(self) -> None:
        """The page, which asks for what it shows itself."""
        self.page("torchord-compare.html", names=self.get_arguments("run"))


class CompareLines(RunsHandler):
    """In what several runs differ."""

    @authenticated
    async def get(self) -> None:
        """See `Pages.compared`."""
        names = tuple(dict.fromkeys(self.get_arguments("run")))
        await self.answer(
            lambda pages: pages.compared(names), key=("compared", *names), seconds=_LIST_SECONDS
        )


class RunPage(RunsHandler):
    """One run."""

    @authenticated
    def get(self, name: str) -> None:
        """The page, which asks for what it shows itself."""
        verbs = [] if self.application.options.read_only else [verb for verb in VERBS if verb in self.allows]
        self.page("torchord-run.html", name=name, verbs=verbs, download="download" in self.allows)


class RunOverview(RunsHandler):
    """Where one run stands."""

    @authenticated
    async def get(self, name: str) -> None:
        """See `Pages.overview`."""
        await self.answer(lambda pages: pages.overview(name), key=("overview", name), seconds=_RUN_SECONDS)


class RunCurves(RunsHandler):
    """A run's curves."""

    @authenticated
    async def get(self, name: str) -> None:
        """See `Pages.curves`."""
        points = self.get_argument("points", "800", type=int)
        first, last = self.get_argument("first", "0", type=int), self.get_argument("last", None, type=int)
        have = self.get_argument("have", "", escape=False)
        await self.answer(
            lambda pages: pages.curves(name, points=points, first=first, last=last, have=have),
            key=("curves", name, points, first, last, have),
            seconds=_RUN_SECONDS,
        )


class RunTimeline(RunsHandler):
    """Who computed which shard when."""

    @authenticated
    async def get(self, name: str) -> None:
        """See `Pages.timeline`."""
        first, last = (self.get_argument(word, None, type=int) for word in ("first", "last"))
        await self.answer(
            lambda pages: pages.timeline(name, first=first, last=last),
            key=("timeline", name, first, last),
            seconds=_RUN_SECONDS,
        )


class RunAudit(RunsHandler):
    """The audit of a run's ledger."""

    @authenticated
    async def get(self, name: str) -> None:
        """See `Pages.audit`."""
        await self.answer(
            lambda pages: pages.audit(name), key=("audit", name), seconds=_LIST_SECONDS, slow=True
        )


class RunWeights(RunsHandler):
    """A run's newest weights, where Flower was started so that it hands them out."""

    @authenticated
    async def get(self, name: str) -> None:
        """See `Pages.write_weights`."""
        if "download" not in self.allows:
            raise HTTPError(403, "start Flower with --runs-allow=download, or set TORCHORD_FLOWER_ALLOWS")
        with tempfile.TemporaryDirectory(prefix="torchord-pages-") as folder:
            path = Path(folder) / "model.safetensors"
            try:
                version = await self.asking.ask(lambda pages: pages.write_weights(name, str(path)), slow=True)
            except TorchordError as error:
                raise HTTPError(code_of(error), "%s", error) from error
            self.set_header("Content-Type", "application/octet-stream")
            self.set_header("Content-Length", path.stat().st_size)
            self.set_header("Content-Disposition", f'attachment; filename="{name}-{version}.safetensors"')
            with path.open("rb") as file:
                while data := file.read(_CHUNK_NBYTES):
                    self.write(data)
                    await self.flush()


class RunAct(RunsHandler):
    """What the buttons of a run's page do."""

    def check_xsrf_cookie(self) -> None:
        """Refuse what no page of this Flower asks for; Flower's own asks so only where there is a login."""
        site = self.request.headers.get("Sec-Fetch-Site", "same-origin")
        origin = self.request.headers.get("Origin")
        if site != "same-origin" or (origin and urlsplit(origin).netloc != self.request.host):
            raise HTTPError(403, "a page of another site asks for this")
        RequestHandler.check_xsrf_cookie(self)

    @authenticated
    async def post(self, name: str, verb: str) -> None:
        """See `Pages.act`."""
        if self.application.options.read_only:
            raise HTTPError(403, "Flower was started with --read_only")
        if verb not in self.allows:
            raise HTTPError(403, f"start Flower with --runs-allow={verb}, or set TORCHORD_FLOWER_ALLOWS")
        log.info("%s of run %r, asked for by %s", verb, name, self.request.remote_ip)
        await self.answer(lambda pages: pages.act(name, verb))
        self.asking.forget()

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """Why not, as JSON."""
        error = kwargs.get("exc_info", (None, None))[1]
        message = getattr(error, "log_message", None) or f"Flower answered {status_code}"
        self.set_header("Content-Type", "application/json; charset=UTF-8")
        self.finish(for_others({"error": message}))


def code_of(error: Exception) -> int:
    """The status of an answer that is an error."""
    return next((code for kind, code in _STATUS if isinstance(error, kind)), 500)


@cache
def _version(name: str) -> str:
    """What makes a browser fetch a file anew once it is another."""
    return f"?v={hashlib.blake2b((STATIC / name).read_bytes(), digest_size=6).hexdigest()}"


def handlers(asking: Asking, allows: frozenset[str]) -> list[url]:
    """The addresses, for Flower's list."""
    given = {"asking": asking, "allows": allows}
    return [
        url(r"/runs", RunsPage, given, name="torchord_runs"),
        url(r"/runs/lines", RunsLines, given),
        url(r"/runs/compare", ComparePage, given, name="torchord_compare"),
        url(r"/runs/compare/lines", CompareLines, given),
        url(r"/run/([^/]+)", RunPage, given, name="torchord_run"),
        url(r"/run/([^/]+)/overview", RunOverview, given),
        url(r"/run/([^/]+)/curves", RunCurves, given),
        url(r"/run/([^/]+)/timeline", RunTimeline, given),
        url(r"/run/([^/]+)/audit", RunAudit, given),
        url(r"/run/([^/]+)/model.safetensors", RunWeights, given),
        url(rf"/run/([^/]+)/({'|'.join(VERBS)})", RunAct, given),
        url(r"/runs/static/(.+)", StaticFileHandler, {"path": str(STATIC)}, name="torchord_static"),
    ]
