"""`celery -A torchord worker` simply works: one worker for everything, in any pool, and split by queue.

Also what such a worker refuses (pickle), and what it leaves behind: nothing without an end.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
import signal
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import redis

from tests.support import models, recipes_more, reference
from tests.support.fleet import Fleet, finished, fleet
from tests.support.processes import describe, marked
from tests.support.waiting import PATIENCE_SECONDS, wait_until
from torchord import Master, TrainingConfig
from torchord.cache.errors import CacheUnreachable
from torchord.cache.keys import RunKeys
from torchord.coordinator.local_cluster.embedded_server import free_port
from torchord.coordinator.messages.task_names import GRADIENTS, QUEUES, UPDATES

CONFIG = TrainingConfig(epochs=2, batch_size=8, shards=4, seed=2, evaluate_every=5)
SINGLE = {"layout": "single", "workers": 1}
LAYOUTS: dict[str, dict[str, object]] = {
    "single, as typed": SINGLE,
    "single, solo": {**SINGLE, "pool": "solo"},
    "single, threads -c 4": {**SINGLE, "pool": "threads", "concurrency": 4},
    "single, prefork -c 2": {**SINGLE, "pool": "prefork", "concurrency": 2},
    "single, prefork -c 2, spawned": {
        **SINGLE,
        "pool": "prefork",
        "concurrency": 2,
        "app": "tests.support.spawn_app",
    },
    "split": {"workers": 1},
    "split, prefork -c 2": {"workers": 1, "pool": "prefork", "concurrency": 2},
}


def processes_of(one: Fleet) -> list[psutil.Process]:
    """The workers and all their children."""
    parents = [psutil.Process(worker.pid) for worker in one.cluster.processes.values()]
    return [process for parent in parents for process in (parent, *parent.children(recursive=True))]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_trains_to_the_end(tmp_path: Path, layout: str) -> None:
    recipe, pictures = models.mlp(), models.cnn(32)
    with fleet(tmp_path, **LAYOUTS[layout]) as one:  # type: ignore[arg-type]
        run, trained = one.train(recipe, CONFIG, "all")
        assert reference.bits(trained.module) == reference.accumulate(recipe, CONFIG).bits
        assert set(trained.evaluations) == {5, 10} and trained.metrics == trained.evaluations[10]
        assert run.predict(models.points(9).tensors[0], batch_size=4).shape == (9, models.CLASSES)
        again, second = one.train(pictures, CONFIG, "pictures")
        assert reference.bits(second.module) == reference.accumulate(pictures, CONFIG).bits
        taken = {**run.verify().workers, **again.verify().workers}
        living = processes_of(one)
        if "prefork" in layout:
            # Children computed, not their parent.
            children = 2 if layout.startswith("single") else 1 + 2  # a server has one
            children += "spawned" in layout  # what keeps track of their semaphores
            assert len(living) == len(one.cluster.processes) + children
            pids = {int(worker.rpartition("/")[2].partition("-")[0]) for worker in taken}
            assert pids and not pids & {worker.pid for worker in one.cluster.processes.values()}
        else:
            assert len(living) == len(one.cluster.processes), "threads and solo start no process"
        check_leftovers(one.cluster.url, ("all", "pictures"))
        for worker in one.cluster.processes.values():
            worker.terminate()
        for worker in one.cluster.processes.values():
            assert worker.wait(PATIENCE_SECONDS) == 0, worker.tail()
        over = lambda: not any(process.is_running() for process in living)  # noqa: E731
        wait_until(over, message=lambda: f"the end of\n{describe(living)}")
        if layout.startswith("single"):
            assert "-Q" not in one.cluster.processes["worker"].command
        else:
            assert "-Q torchord.updates" in one.cluster.processes["server"].command
            assert "-Q torchord.gradients" in one.cluster.processes["client1"].command


def check_leftovers(url: str, runs: tuple[str, ...]) -> None:
    """Everything that is in Redis after runs: what each key is for, and that all of ours has a TTL.

    Without a TTL stay kombu's bindings of its own control exchange, a fixed number of keys.
    """
    names = "|".join(runs)
    lasting = [
        rf"torchord:\{{({names})\}}:(spec|head|manifest|versions|ledger|claims|events|evaluations|pins)",
        rf"torchord:blob:({names}):(parameters|state):\d+:\w+:\d+",
        r"torchord:(runs|workers|placement|supervisor|active|turns)",
        r"torchord:worker:.+",
        r"celery-taskset-meta-[\w-]+\.c",  # the mark of a chord that has called back: 60 s
    ]
    known = re.compile("|".join(lasting))
    fixed = re.compile(r"_kombu\.binding(\.celery\.pidbox|_deadlines|_permanent\.celery\.pidbox)")
    client = redis.Redis.from_url(url, decode_responses=True)
    try:

        def unknown() -> list[str]:
            found = client.scan_iter(count=1000)
            return sorted(key for key in found if not known.fullmatch(key) and not fixed.fullmatch(key))

        # A shard that was late, and was computed elsewhere too, may still be under way; its chord counts it.
        wait_until(lambda: not unknown(), message=lambda: f"the end of what is left in Redis: {unknown()}")
        ttls = {key: client.ttl(key) for key in client.scan_iter(count=1000)}
        stored = {run: client.hvals(RunKeys(run).versions) for run in runs}
    finally:
        client.close()
    assert not sorted(key for key, ttl in ttls.items() if known.fullmatch(key) and ttl == -1)
    # Of each run one version is kept, and no gradient, slot or lease.
    assert all(len(versions) == 1 for versions in stored.values()), stored
    blobs = [json.loads(version)["blob"] for (version,) in stored.values()]
    kept = [key for key in ttls if ":parameters:" in key]
    assert sorted(kept) == sorted(f"{blob['key']}:0" for blob in blobs if "data" not in blob), kept


# --- JSON only ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """`celery -A torchord worker`, nothing else."""
    with fleet(tmp_path_factory.mktemp("single"), workers=1, layout="single") as one:
        yield one


def refusals(one: Fleet) -> int:
    """How often the worker has said that it set a message of another content type aside."""
    return one.log("worker").count("it is no plain JSON")


@pytest.mark.parametrize(
    ("content_type", "encoding"),
    [
        ("application/x-python-serialize", "binary"),
        ("application/x-yaml", "utf-8"),
        ("application/x-msgpack", "binary"),
    ],
)
@pytest.mark.parametrize("queue", QUEUES)
def test_only_json_is_read(
    single: Fleet, tmp_path: Path, queue: str, content_type: str, encoding: str
) -> None:
    """A message that would run a command if it were unpickled is refused; the worker goes on."""
    proof = tmp_path / "executed"
    # Protocol 0, by hand: call os.system with one argument.
    bytecode = f"cos\nsystem\n(S'touch {proof}'\ntR.".encode()
    before = refusals(single)
    name = f"refused-{uuid.uuid4().hex[:6]}"
    message = {
        "body": base64.b64encode(bytecode).decode(),
        "content-type": content_type,
        "content-encoding": encoding,
        "headers": {"lang": "py", "task": "torchord.advance", "id": name, "argsrepr": "", "kwargsrepr": ""},
        "properties": {
            "delivery_info": {"exchange": "", "routing_key": queue},
            "delivery_tag": name,
            "delivery_mode": 2,
            "body_encoding": "base64",
            "priority": 0,
        },
    }
    client = redis.Redis.from_url(single.cluster.url)
    client.lpush(queue, json.dumps(message))
    wait_until(lambda: refusals(single) > before, message="the refusal in the log")
    wait_until(lambda: not client.llen(queue) and not client.hlen("unacked"), message="its end")
    client.close()
    recipe = models.mlp(16, evaluation=None, metrics=None)
    _, trained = single.train(recipe, CONFIG, name)
    assert reference.bits(trained.module) == reference.accumulate(recipe, CONFIG).bits
    assert not proof.exists()
    assert psutil.Process(single.cluster.processes["worker"].pid).is_running()


def test_a_message_that_is_no_task_of_ours(single: Fleet) -> None:
    """Unknown task, wrong arguments, unknown run: each is reported, none ends the worker."""
    from celery import Celery

    with Celery("stranger", broker=single.cluster.url, set_as_current=False) as app:
        app.send_task("os.system", args=["true"], queue=GRADIENTS)
        app.send_task("torchord.compute_gradient", kwargs={"command": "true"}, queue=GRADIENTS)
        missing = app.send_task("torchord.advance", kwargs={"run": "nobody-submitted"}, queue=UPDATES).id
    aside = ("its task 'os.system' is none of torchord's", "its arguments name no run")
    for said in (f"[{missing}] raised", *aside):
        wait_until(lambda said=said: said in single.log("worker"), message=said)  # type: ignore[misc]
    assert "no run 'nobody-submitted' is known" in single.log("worker")
    single.train(models.mlp(16), CONFIG, "after-strangers")


# --- other ways in --------------------------------------------------------------------------


@pytest.mark.skipif(
    not (shutil.which("redis-server") and shutil.which("openssl")), reason="needs redis-server and openssl"
)
def test_over_tls(tmp_path: Path) -> None:
    """One outbound TLS connection is all that a worker needs; the certificate is checked."""
    key, certificate, port = tmp_path / "key.pem", tmp_path / "certificate.pem", free_port()
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
         "-addext", "keyUsage=critical,digitalSignature,keyCertSign", "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    server = subprocess.Popen(
        ["redis-server", "--port", "0", "--tls-port", str(port), "--tls-cert-file", certificate,
         "--tls-key-file", key, "--tls-ca-cert-file", certificate, "--tls-auth-clients", "no",
         "--bind", "127.0.0.1", "--save", "", "--dir", tmp_path, "--unixsocket", tmp_path / "redis.sock"],
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_until((tmp_path / "redis.sock").exists, message="the TLS server")
        recipe = models.mlp(16, evaluation=None, metrics=None)
        url = f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={certificate}"
        with pytest.raises(CacheUnreachable, match="certificate verify failed"):
            Master(f"rediss://127.0.0.1:{port}/0")
        for name, place in (("tls", url), ("socket", f"unix://{tmp_path}/redis.sock?db=1")):
            with fleet(tmp_path / f"by-{name}", workers=1, layout="single", url=place) as one:
                _, trained = one.train(recipe, CONFIG, name)
                assert reference.bits(trained.module) == reference.accumulate(recipe, CONFIG).bits
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(PATIENCE_SECONDS)


def test_a_worker_that_joins_and_one_that_leaves(tmp_path: Path) -> None:
    """Warm shutdown in the middle of a run hands over what is left; a new worker takes it."""
    gate = tmp_path / "gate"
    recipe = recipes_more.gated(str(gate), at=0, size=32)
    config = TrainingConfig(epochs=3, batch_size=8, shards=4, seed=2)
    with fleet(tmp_path, workers=2) as one:
        run = one.master.submit(recipe, config, name="moving")
        wait_until(Path(f"{gate}.waiting").exists, message="the held shard")
        one.cluster.add_worker("client3")
        wait_until(one.cluster.processes["client3"].ready, message="the third Client")
        one.cluster.processes["client1"].terminate()
        gate.touch()
        assert one.cluster.processes["client1"].wait(PATIENCE_SECONDS) == 0
        trained = finished(run)
        assert reference.bits(trained.module) == reference.accumulate(recipe, config).bits
    wait_until(lambda: not marked(str(tmp_path)), message=lambda: describe(marked(str(tmp_path))))
