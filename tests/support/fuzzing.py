"""Inputs that nobody has written for a parser, and the parsers, which refuse them in order.

`make test` tries some inputs for each parser, always the same ones; `make fuzz` ten thousand each, others
each time; `python -m tests.fuzzing` looks for those that reach code which no other has reached.
"""

from __future__ import annotations

import copy
import functools
import gzip
import importlib
import io
import json
import math
import os
import pkgutil
import socket
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar
from unittest import mock

import torch
import xxhash
from celery.exceptions import InvalidTaskError
from celery.worker.strategy import default
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kombu.exceptions import DecodeError
from kombu.transport import virtual

from examples.fashion_mnist import read_idx
from tests.security.test_garbage import message
from tests.support import control, models
from torchord import TrainingConfig
from torchord.cache import keyring
from torchord.cache.blobs.blob import BlobRef
from torchord.cache.blobs.notice import Notice
from torchord.cache.datasets.allowed_urls import require_allowed
from torchord.cache.datasets.datasets import Datasets
from torchord.cache.datasets.record import Record
from torchord.cache.datasets.samples import DatasetManifest, assemble
from torchord.cache.errors import CacheError, TorchordError
from torchord.cache.files.checkpoint import CheckpointStore
from torchord.cache.ledger.answers import Lease
from torchord.cache.ledger.delta_record import DeltaRecord
from torchord.cache.ledger.outbox import Telling, entry_text
from torchord.cache.ledger.records import (
    Head,
    LedgerEntry,
    SlotRecord,
    StateRecord,
    SumRecord,
    VersionRecord,
)
from torchord.cache.ledger.rest_record import RestRecord
from torchord.cache.ledger.workers import new_info
from torchord.cache.ledger.workers import read as read_heartbeat
from torchord.cache.servers import cluster, connection
from torchord.cache.servers.address import Address, ClusterAddress, celery_url, masked
from torchord.cache.servers.cluster import Cluster
from torchord.cache.servers.fast_client import Lane, LaneClosed
from torchord.cache.servers.node import Node
from torchord.cache.settings import Settings, from_environment
from torchord.cache.tensors import tree
from torchord.cache.tensors.codec import Manifest, layout, pack, views
from torchord.coordinator import cli, commands
from torchord.coordinator.commands import celery_aliases
from torchord.coordinator.messages import addressees
from torchord.coordinator.messages.inspection import fault_of, fault_of_any, fault_of_taken, fault_of_text
from torchord.coordinator.messages.task_names import OUR_TASKS
from torchord.coordinator.runtime import key_files, statement
from torchord.coordinator.runtime.faults import parse as parse_faults
from torchord.coordinator.spec.codecs import check as check_codec
from torchord.coordinator.spec.codecs import parse as parse_codec
from torchord.coordinator.spec.recipe import Recipe
from torchord.tasks.celery_app import app

T = TypeVar("T")

# --- inputs ---------------------------------------------------------------------------

ODD: list[Any] = [None, True, False, 0, 1, -1, 2**31, 2**53, 2**63 - 1, 2**63, -(2**63), 2**64, 10**40]
ODD += [
    0.5,
    -0.0,
    1e308,
    math.inf,
    -math.inf,
    math.nan,
    "",
    "x",
    "0",
    "-1",
    "\0",
    "é",
    "\ud800",
    "🙂",
    "x" * 300,
]
ODD += ["../..", "torch", "os:system", "inf", [], {}, [[]], [None], {"": None}, [0], ["x"], {"tensor": "x"}]
ODD += [{"tuple": 5}, {"dtype": "load"}, {"leaf": 0}, [1] * 100]
"""What programs stumble over."""


_PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
_VALUES = st.sampled_from(ODD).map(copy.deepcopy) | st.recursive(
    _PLAIN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
_NUMBERS = st.integers(0, 1 << 16)
_NAMES = st.text(max_size=6)
_SIGNS = st.binary(max_size=9)
_WAYS = ("replace", "replace", "replace", "remove", "add", "repeat", "wrap")
_TEARS = ("replace", "flip", "cut", "insert", "repeat", "length")
_LENGTHS = (0, -1, 1 << 20, 1 << 40, (1 << 63) - 1)


def _one_of(draw: st.DrawFn, among: Sequence[T]) -> T:
    """As `sampled_from`, of which making one costs more than drawing."""
    return among[draw(_NUMBERS) % len(among)]


def _places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of each value within."""
    yield at
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, each in inner:
        yield from _places(each, (*at, name))


@st.composite
def mutated(draw: st.DrawFn, documents: Sequence[Any]) -> Any:
    """A document of JSON in which something is replaced, added, taken away, repeated or nested."""
    found = copy.deepcopy(_one_of(draw, documents))
    for _ in range(draw(_NUMBERS) % 4):
        *path, last = (None, *_one_of(draw, list(_places(found))))
        if not path:
            return draw(_VALUES)
        parent = functools.reduce(lambda value, name: value[name], path[1:], found)
        how = _one_of(draw, _WAYS)
        if how == "remove":
            del parent[last]
        elif how == "add" and isinstance(parent, dict):
            parent[draw(_NAMES)] = draw(_VALUES)
        elif how == "repeat" and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[last]))
        elif how == "wrap":
            parent[last] = [parent[last]]
        else:
            parent[last] = draw(_VALUES)
    return found


@st.composite
def torn(draw: st.DrawFn, texts: Sequence[bytes]) -> bytes:
    """Bytes of which some are others, missing, repeated or new."""
    found = bytearray(_one_of(draw, texts))
    for _ in range(1 + draw(_NUMBERS) % 3):
        at = draw(_NUMBERS) % (len(found) + 1)
        till = min(len(found), at + draw(_NUMBERS) % 10)
        how = _one_of(draw, _TEARS)
        if how == "cut":
            del found[at:]
        elif how == "repeat":
            found[at:at] = found[at:till] * (1 + draw(_NUMBERS) % 40)
        elif how == "flip" and at < len(found):
            found[at] ^= 1 << draw(_NUMBERS) % 8
        elif how == "length":
            found[at : at + 8] = struct.pack("<q", _one_of(draw, _LENGTHS))
        else:
            found[at : at if how == "insert" else till] = draw(_SIGNS)
    return bytes(found)


def _texts(documents: Sequence[Any]) -> st.SearchStrategy[str]:
    """JSON that is a little or much out of order."""
    whole = [json.dumps(each).encode() for each in documents]
    broken = torn(whole).map(lambda data: data.decode(errors="replace"))
    return mutated(documents).map(json.dumps) | broken | st.text(max_size=20)


# --- parsers --------------------------------------------------------------------------


@dataclass(frozen=True)
class Parser:
    """What reads something that anybody may have written.

    Attributes:
        inputs: for it.
        read: raises nothing but TorchordError.
    """

    inputs: st.SearchStrategy[Any]
    read: Callable[[Any], Any]

    def harness(self, inputs: int, *, same: bool) -> Any:
        """A function without arguments that tries so many inputs.

        Args:
            same: always the same ones.
        """

        @settings(
            max_examples=inputs,
            derandomize=same,
            database=None,
            deadline=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        )
        @given(self.inputs)
        def tried(found: Any) -> None:
            try:
                self.read(found)
            except TorchordError as error:
                assert str(error), "an error says something"

        return tried


def _documents() -> dict[str, list[Any]]:
    """Some records of each kind, as JSON has them."""
    tensors = {"w": torch.zeros(3, 5), "b": torch.zeros((), dtype=torch.int64), "e": torch.zeros(0, 2)}
    manifest = layout(tensors).to_json()
    skeleton, _ = tree.flatten(
        {"state": {0: {"step": tensors["b"], "m": (tensors["w"], math.inf)}}, "n": None}
    )
    blob = BlobRef(
        "torchord:blob:r:parameters:3:n", 1 << 20, 1 << 19, ("0" * 16, "f" * 16), content="blake3:00"
    )
    state = StateRecord(skeleton, manifest, blob)
    slot = control.slot(3, 1, state=state, weight=2.0, metrics={"accuracy": [0.5, None, "mean"]})
    total = control.slot(3, 4, total=SumRecord((slot.receipt(),), (slot.receipt(),), (1,), {"w": [1]}))
    delta = DeltaRecord("0" * 32, "topk:0.1", manifest, ("b",), blob)
    version = replace(control.record(3, state=True), slots={0: state}, delta=delta, rest=RestRecord(blob, 5))
    entry = control.history(2, 2)[1]
    return {
        "blob": [
            blob.to_json(),
            {**blob.to_json(), "nbytes": 3, "chunk_nbytes": 9, "checksums": "0" * 16, "data": "AAAA"},
        ],
        "manifest": [manifest],
        "slot": [json.loads(each.to_json()) for each in (slot, total)],
        "version": [json.loads(version.to_json()), json.loads(control.record(0).to_json())],
        "entry": [json.loads(entry.to_json())],
        "lease": [{"worker": "w", "attempt": 1, "open": True, "since": 5.0, "backups": 0}],
        "heartbeat": [json.loads(json.dumps(_fields(new_info("n@h", ("torchord.gradients",)))))],
        "notice": [json.loads(Notice.of(3, "k", 1000, 400, {0: "0" * 16, 2: "f" * 16}).to_json())],
        "state": [skeleton],
        "config": [TrainingConfig(batch_size=8).to_json()],
        "recipe": [models.mlp().to_spec()],
        "message": [message(), {"body": None, "headers": None, "properties": {}}],
        "head": [
            {
                **dict.fromkeys(("version", "token", "total_steps", "launched", "reached", "late"), "3"),
                **dict.fromkeys(("submitted_at", "committed_at"), "5.5"),
                "status": "running",
                "incarnation": "i",
                "chain": "0" * 32,
                "error": '{"message": "x"}',
            }
        ],
    }


def _fields(info: Any) -> dict[str, Any]:
    return {name: getattr(info, name) for name in info.__slots__}


@functools.cache
def _files() -> dict[str, list[bytes]]:
    """Files as torchord writes them: a dataset's record and manifest, a checkpoint's, keys, an IDX file."""
    with tempfile.TemporaryDirectory(prefix="torchord-fuzz-") as folder:
        path = Path(folder)
        samples = [{"x": torch.zeros(2 + i % 2), "y": i, "name": "n" * i, "z": (1.5, None)} for i in range(4)]
        Datasets(Settings()).put("d", samples, url=str(path / "sets"), chunk_nbytes=64)
        record = (path / "sets/d.dataset.json").read_bytes()
        chunks = [each.read_bytes() for each in (path / "sets/chunks").glob("*/*")]
        store = CheckpointStore(str(path), "r")
        store.save(3, {"w": torch.zeros(3, dtype=torch.bfloat16)}, {"m": [torch.ones(2), math.nan]})
        store.append_ledger(['{"version": 3}'])
        key_files.new(path / "keys", "ed25519")
        array = b"\0\0\x08\x02" + struct.pack(">II", 2, 3) + bytes(6)
        return {
            "record": [record],
            "dataset": [each for each in chunks if each.startswith(b"{")],
            "marker": [(path / "r/version-000000003.json").read_bytes()],
            "tensors": [(path / f"r/version-000000003.{part}.safetensors").read_bytes() for part in PARTS],
            "ledger": [b'{"sequence": 1}\n{"version": 3}\n'],
            "keys": [(path / "keys/server.json").read_bytes()],
            "idx": [array, gzip.compress(array), gzip.compress(bytes(4) + array)],
        }


PARTS = ("tensors", "state")


def _json(name: str) -> list[Any]:
    return [json.loads(each) for each in _files()[name]]


@contextmanager
def _written(name: str, data: bytes) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="torchord-fuzz-", dir=_MEMORY) as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        path.chmod(0o600)
        yield path


_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _manifest(found: Any) -> None:
    manifest = Manifest.from_json(found)
    if manifest.nbytes < 1 << 20:
        tensors = views(torch.zeros(manifest.nbytes, dtype=torch.uint8), manifest)
        pack(tensors, manifest)


def _tree(found: Any) -> None:
    tree.flatten(tree.unflatten(found, {"state.0.step": torch.zeros(()), "state.0.m.0": torch.zeros(3, 5)}))


def _dataset(text: bytes) -> None:
    manifest = DatasetManifest.from_json(text)
    manifest.describe()
    assemble(manifest.skeleton, [[None]] * len(manifest.columns), 1)


def _checkpoint(files: tuple[dict[str, Any], bytes, bytes]) -> None:
    """A marker and files whose checksums are right, so that what is in them is read."""
    marker, *parts = files
    with _written(_MARKER, b"") as path:
        listed = marker.get("files") if isinstance(marker, dict) else None
        for part, data in zip(PARTS, parts, strict=True):
            path.with_name(f"version-000000003.{part}.safetensors").write_bytes(data)
            entry = listed.get(part) if isinstance(listed, dict) else None
            if isinstance(entry, dict):
                entry |= {"nbytes": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)}
        if isinstance(marker, dict):
            marker.pop("checksum", None)
            text = json.dumps(marker, sort_keys=True)
            marker["checksum"] = xxhash.xxh3_128_hexdigest(text.encode())
        path.write_text(json.dumps(marker))
        store = CheckpointStore(str(path.parent.parent), path.parent.name)
        store.latest_version()
        store.meta(3)
        store.load(3)


_MARKER = "version-000000003.json"


def _ledger(data: bytes) -> None:
    with _written("ledger-000000003-000000003.jsonl", data) as path:
        CheckpointStore(str(path.parent.parent), path.parent.name).read_ledger()


def _keys(text: str) -> None:
    with _written("server.json", text.encode(errors="replace")) as path:
        keyring.keyring(str(path), "redis://localhost").sealed("server", "place", "text")


def _statement(data: bytes) -> None:
    with _written("statement", data) as path, _written("keys", _files()["keys"][0]) as trusted:
        statement.checked(path, keyring.keyring(str(trusted), "redis://localhost"))


def _idx(data: bytes) -> None:
    for name in ("idx", "idx.gz"):
        with _written(name, data) as path, suppress(TorchordError):
            read_idx(path)


def _server(replies: bytes) -> None:
    """What a server answers, to whatever it is asked."""
    place = Address.parse("redis://:word@localhost:6379/3")
    asked: list[Callable[[Node], object]] = [
        lambda node: node.load(
            [b"a", b"b"], [memoryview(bytearray(5)), memoryview(bytearray(5))], ["0" * 16] * 2
        ),
        lambda node: node.store([(b"a", memoryview(b"12345"))], 60),
        lambda node: node.expire([b"a", b"b"], 60, extend=True),
        lambda node: node.delete([b"a"]),
    ]
    for ask in asked:
        with answering(replies), suppress(CacheError):
            node = Node(place, connect_timeout_seconds=1, timeout_seconds=1)
            ask(node)
            node.close()
    with answering(replies), suppress(CacheError):
        found = Cluster(
            ClusterAddress.parse("redis+cluster://localhost:6379"),
            connect_timeout_seconds=1,
            timeout_seconds=1,
        )
        found.delete([b"a"])
    with answering(replies), suppress(LaneClosed):
        Lane("redis://localhost:6379/0").call(("GET", "a"), ("GET", "b"))


@contextmanager
def answering(*replies: bytes) -> Iterator[None]:
    """Each connection of this process goes to a server that answers the next of these, or the last."""
    with ExitStack() as opened:
        ours: list[socket.socket] = []

        def connect(address: object, timeout: float) -> socket.socket:
            if len(ours) > 8:
                raise ConnectionRefusedError("no more")
            mine, theirs = socket.socketpair()
            ours.append(mine)
            opened.enter_context(mine)
            opened.enter_context(theirs)
            theirs.sendall(replies[min(len(ours), len(replies)) - 1])
            theirs.shutdown(socket.SHUT_WR)
            return mine

        opened.enter_context(mock.patch.object(connection, "_connect", connect))
        opened.enter_context(mock.patch.object(cluster, "_SETTLE_SECONDS", 0.0))
        yield


REPLIES = [b"+OK\r\n+OK\r\n$5\r\nabcde\r\n$-1\r\n", b"+OK\r\n+OK\r\n:1\r\n:0\r\n:1\r\n:1\r\n"]
REPLIES += [
    b"*2\r\n*3\r\n:0\r\n:8000\r\n*2\r\n$1\r\nh\r\n:7000\r\n*3\r\n:8001\r\n:16383\r\n*2\r\n$1\r\nh\r\n:7001\r\n"
]
REPLIES += [
    b"*1\r\n*3\r\n:0\r\n:16383\r\n*2\r\n$1\r\nh\r\n:7000\r\n-MOVED 3999 h:1\r\n",
    b"-ERR no\r\n-NOAUTH\r\n",
]
REPLIES += [b"+OK\r\n+OK\r\n-ASK 1 h:1\r\n" * 2, b"*-1\r\n", b"$9999999999\r\n", b":99999999999999999999\r\n"]


def _sent(found: Any) -> None:
    """A message: what is let through, Celery takes."""
    assert fault_of_any(found) is None or isinstance(fault_of_any(found), str)
    for mailbox in ("x.pidbox", "x"):
        fault_of_any(found, mailbox)
    text = json.dumps(found)
    fault_of_text(text)
    fault_of_taken(json.dumps([found, "", "torchord.gradients"]))
    if fault_of(found) is None:
        sent = virtual.Message(json.loads(text), channel=_channel())
        with suppress(InvalidTaskError, DecodeError):
            _strategies()[sent.headers["task"]](sent, None, mock.Mock(), mock.Mock(), ())


@functools.cache
def _channel() -> Any:
    made = mock.Mock()
    made.decode_body = virtual.Channel.decode_body.__get__(SimpleNamespace(codecs=virtual.Channel.codecs))
    return made


@functools.cache
def _strategies() -> dict[str, Any]:
    app.loader.import_default_modules()
    consumer = mock.Mock(hostname="n@h", event_dispatcher=None, disable_rate_limits=True)
    consumer.controller.state.revoked = {}
    consumer.task_buckets = {}
    consumer.on_task_request = lambda request: request.execute_using_pool(mock.Mock())
    found = {name: default(app.tasks[name], app, consumer) for name in OUR_TASKS}
    return found | {name.replace("torchord.", "tasks.", 1): each for name, each in found.items()}


def _url(text: str) -> None:
    masked(text)
    for read in (Address.parse, ClusterAddress.parse, celery_url, _allowed, _allowed_below):
        with suppress(TorchordError):
            read(text)


def _allowed(url: str) -> None:
    require_allowed(url, None)


def _allowed_below(url: str) -> None:
    require_allowed(url, ("https://host/a", "/srv"))


def _settings(found: dict[str, str]) -> None:
    with mock.patch.dict(os.environ, {**found, "TORCHORD_FAULTS": ""}):
        from_environment()
    parse_faults(found.get("TORCHORD_FAULTS", ""))


for _each in pkgutil.iter_modules(commands.__path__, "torchord.coordinator.commands."):
    importlib.import_module(_each.name)  # those that are imported when they are called, too


def _arguments(words: list[str]) -> None:
    with ExitStack() as quiet:
        for name, module in list(sys.modules.items()):  # nothing is done of what is understood
            if name.startswith("torchord.coordinator.") and hasattr(module, "guarded"):
                quiet.enter_context(mock.patch.object(module, "guarded", lambda perform: 0))
        quiet.enter_context(mock.patch.object(celery_aliases, "_become", lambda *given, **more: 0))
        quiet.enter_context(redirect_stdout(io.StringIO()))
        quiet.enter_context(redirect_stderr(io.StringIO()))
        assert type(cli.main(words)) is int


def _config(found: Any) -> None:
    TrainingConfig.from_json(found)


def _codec(text: str) -> None:
    check_codec(text)
    parse_codec(text)


_TOLD = entry_text("evaluated", 1.0, {"version": 3, "metrics": {"loss": math.nan}})
_TELLS = Settings(tell_tasks=("shop.*",), tell_urls=("https://shop.example/hook", "http://"))
ADDRESSEES = (
    "https://",
    "http://",
    "shop.",
    "shop.example",
    "/hook",
    "/..",
    "%2e",
    "?",
    "#",
    "@",
    ":",
    "[",
    "]",
)


def _addressee(text: str) -> None:
    addressees.check("done", text)
    addressees.shown(text)
    addressees.named(text, _TELLS)
    addressees.require_allowed(text, _TELLS)


def _words(*words: str) -> st.SearchStrategy[str]:
    """Texts of these words, mostly."""
    sign = st.sampled_from(words) | st.text(max_size=3)
    return st.lists(sign, max_size=8).map("".join)


def _environment() -> st.SearchStrategy[dict[str, str]]:
    names = st.sampled_from(
        [
            f"TORCHORD_{name}"
            for name in ("URL", "CACHE_URLS", "CACHE_REPLICAS", "CACHE_WEIGHTS", "OVERLAP", "KEYS")
        ]
        + [
            f"TORCHORD_{name}"
            for name in ("SERVER_MEMORY_BYTES", "DATASET_URLS", "HOST_CACHE", "TASK_LOG", "FAULTS")
        ]
    )
    signs = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=8)
    words = ["on", "off", "1", "-1", "9" * 30, "9" * 5000, "1e999", "nan", "a,b", "upload", "~", "~x/y", "²"]
    points = [
        "server.after_commit:2:kill",
        "server.after_commit:²:sleep=1",
        ":::",
        "client.before_part:1:sleep=x",
    ]
    return st.dictionaries(names, signs | st.sampled_from(words + points), max_size=4)


URLS = (
    "redis://",
    "rediss://",
    "unix://",
    "sentinel://",
    "redis+cluster://",
    "http://",
    "host",
    ":6379",
    "/0",
    "@",
    ":",
)
URLS += (
    "?db=",
    "?password=x",
    "&",
    "=",
    ";",
    ",",
    "#",
    "[::1]",
    "[",
    "]",
    "%",
    "%00",
    "..",
    "/",
    "?socket_timeout=",
    "9" * 30,
)
URLS += ("?ssl_cert_reqs=", "none", "file://", "s3://bucket", "~", "\n", "²", "ẞ")
COMMANDS = (
    "list",
    "status",
    "watch",
    "health",
    "verify",
    "--json",
    "--url",
    "--replay",
    "--statement",
    "--",
    "-",
    "x",
)
COMMANDS += (
    "--model",
    "5",
    "-5",
    "",
    "--help",
    "--checkpoint-dir",
    "--url=",
    "pause",
    "resume",
    "--admit-skew",
    "²",
)


def parsers() -> dict[str, Parser]:
    """All parsers of what others may have written, by name."""
    known, files = _documents(), _files()
    texts: dict[str, Callable[[str], object]] = {
        "slot": SlotRecord.from_json,
        "version": VersionRecord.from_json,
        "entry": LedgerEntry.from_json,
        "lease": Lease.from_json,
        "heartbeat": read_heartbeat,
        "notice": Notice.from_json,
    }
    objects: dict[str, Callable[[Any], object]] = {
        "blob": BlobRef.from_json,
        "manifest": _manifest,
        "state": _tree,
        "config": _config,
        "recipe": Recipe.from_spec,
        "head": Head.from_hash,
        "message": _sent,
    }
    shown = {name: mutated(known[name]) for name in objects}
    shown["head"] = mutated(known["head"]).map(_as_hash)
    files_of_checkpoint = st.tuples(
        mutated([json.loads(each) for each in files["marker"]]),
        *(torn([each]) | st.just(each) for each in files["tensors"]),
    )
    return {
        **{name: Parser(_texts(known[name]), read) for name, read in texts.items()},
        **{name: Parser(shown[name], read) for name, read in objects.items()},
        "record of a dataset": Parser(_texts(_json("record")), lambda text: Record.from_json(text, "x")),
        "manifest of a dataset": Parser(_texts(_json("dataset")).map(str.encode), _dataset),
        "checkpoint": Parser(files_of_checkpoint, _checkpoint),
        "ledger on disk": Parser(torn(files["ledger"]), _ledger),
        "keys": Parser(_texts(_json("keys")), _keys),
        "statement": Parser(torn([b'{"run": "r"}', b'[["k", "r"], {}]', b"{" * 70]), _statement),
        "IDX": Parser(torn(files["idx"]), _idx),
        "replies": Parser(torn(REPLIES), _server),
        "URL": Parser(_words(*URLS), _url),
        "settings": Parser(_environment(), _settings),
        "entry of the outbox": Parser(_texts([json.loads(_TOLD)]), lambda text: Telling.of("done-3.0", text)),
        "addressee": Parser(_words(*ADDRESSEES), _addressee),
        "arguments": Parser(
            st.lists(st.sampled_from(COMMANDS) | st.text(max_size=4), max_size=6), _arguments
        ),
        "codec": Parser(
            _words("topk", ":", "0.1", ",", "values", "=", "int8", "powersgd", "2", "9" * 30, "nan"), _codec
        ),
    }


def _as_hash(found: Any) -> dict[str, str]:
    """As Redis gives a hash."""
    if not isinstance(found, dict):
        return {}
    return {name: value if isinstance(value, str) else _dumped(value) for name, value in found.items()}


def _dumped(value: Any) -> str:
    try:
        return json.dumps(value)
    except ValueError:  # more digits than Python writes
        return "9" * 400
