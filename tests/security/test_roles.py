"""deploy/users.acl: with it everybody can do his work, over TLS, and nobody much else."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import psutil
import pytest
import redis
from redis.exceptions import NoPermissionError

from tests.support import models
from tests.support.roles import ROLES, Guarded, guarded, rules
from tests.support.tls import certificates, options, tls_front
from tests.support.waiting import PATIENCE_SECONDS, wait_until
from torchord import LocalCluster, Master, Run, TrainingConfig, stored_dataset
from torchord.cache import keys
from torchord.cache.errors import CacheUnreachable, RunFailed
from torchord.coordinator import cli
from torchord.coordinator.local_cluster.embedded_server import free_port
from torchord.coordinator.runtime import key_files

NO_RIGHT = re.compile("permission|NOPERM|ACL")
ROOT = Path(__file__).resolve().parents[2]
RUN = keys.RunKeys("digits")


@pytest.fixture(scope="module")
def store() -> Iterator[Guarded]:
    with guarded() as made:
        yield made


SELDOM = {
    "asking": "a Redis Cluster's server sends its reader on",
    "cluster|slots": "nodes of tensors that are a Redis Cluster",
    "select": "nodes of tensors in a database other than 0",
    "unlink": "a blob that nobody wants",
    "linsert": "a shard whose run's turn is before another's that waits",
    "llen": "a queue is looked at that has stood still",
    "punsubscribe": "a process ends in order",
}
SELDOM_OF = {
    "submit": {
        "hexists": "a run that failed is taken up again",
        "hincrby": "it is rolled back before",
        "hlen": "a ledger of more entries than one look takes",
        "hmget": "likewise",
    },
    "worker": {
        "ltrim": "what is no message goes into quarantine",
        "incr": "likewise, and behind Sentinel: Celery counts a chord's parts by itself",
        "hincrby": "a shard arrives twice",
        "hmget": "a worker that adds parts up looks which are there",
        "lpush": "a message is put back",
        "zadd": "likewise",
    },
    # A worker on both queues has this role, and does what a Client does.
    "server": dict.fromkeys(
        ("hincrby", "incr", "ltrim", "rpush", "setex", "sismember", "zcard", "zcount"), "as a Client"
    ),
    "monitor": {
        "hkeys": "evaluations of a run that has some",
        "hlen": "a ledger of more entries than one look takes",
        "info": "how full a store is for which a run waits",
        "zrem": "kombu forgets a reply's queue that nobody has read",
    },
}
"""What is given and is not always used in one life of some runs -> when it is."""

PAGES = (
    "workers",
    "tasks",
    "broker",
    "runs",
    "runs/lines",
    "run/tree",
    "run/tree/overview",
    "metrics",
    "api/workers?refresh=1",
    "api/queues/length",
)

# --- sufficient -----------------------------------------------------------------------


def celery(url: str, *words: str) -> str:
    command = [sys.executable, "-P", "-m", "celery", "-A", "torchord", *words]
    done = subprocess.run(
        command,
        env={**os.environ, "TORCHORD_URL": url},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def watched(url_file: Path, log: Path, look: Callable[[str, psutil.Process], None]) -> None:
    """Run Flower with the URL of a file, and look at it once it is up."""
    page = f"http://127.0.0.1:{free_port()}"
    command = [
        sys.executable,
        "-P",
        "-m",
        "celery",
        "-A",
        "torchord",
        "flower",
        f"--port={page.rpartition(':')[2]}",
    ]
    with log.open("wb") as out:
        flower = subprocess.Popen(
            command,
            env={**os.environ, "TORCHORD_URL_FILE": str(url_file), "FLOWER_UNAUTHENTICATED_API": "true"},
            cwd=ROOT,
            stdout=out,
            stderr=out,
        )

    def up() -> bool:
        assert flower.poll() is None, log.read_text()
        try:
            with urlopen(f"{page}/healthcheck", timeout=5):
                return True
        except URLError:
            return False

    try:
        wait_until(up, message="Flower", interval=0.1)
        look(page, psutil.Process(flower.pid))
    finally:
        flower.terminate()
        flower.wait(PATIENCE_SECONDS)


@pytest.mark.slow
def test_everybody_does_his_work_over_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The life of several runs, each process under its role, with a client certificate: nothing is denied.

    Each has its URLs from files, and nothing that a process shows has a password in it.
    """
    monkeypatch.delenv("TORCHORD_URL", raising=False)
    folder = certificates(tmp_path)
    key_files.new(tmp_path / "keys", "ed25519")
    monkeypatch.setenv("TORCHORD_KEYS", str(tmp_path / "keys/submit.json"))
    monkeypatch.setenv("TORCHORD_TELL_TASKS", "shop.note")
    with (
        guarded() as store,
        guarded() as tensors,
        store.heard() as used,
        tensors.heard() as used_of_tensors,
        tls_front(store.server.port, folder) as port,
        tls_front(tensors.server.port, folder) as node,
    ):
        urls = {role: store.url(role, port=port, tls=options(folder)) for role in ROLES}
        nodes = {role: tensors.url(role, port=node, tls=options(folder)) for role in ROLES}
        made = LocalCluster(
            0, url=urls["server"], log_dir=tmp_path / "logs", checkpoint_dir=tmp_path / "checkpoints"
        )
        with made:
            for name, role in (("server", "server"), ("client1", "worker"), ("client2", "worker")):
                made.add_worker(
                    name,
                    role="server" if role == "server" else "client",
                    env={
                        "TORCHORD_URL": None,
                        "TORCHORD_URL_FILE": written(tmp_path / f"{role}.url", urls[role]),
                        "TORCHORD_CACHE_URLS_FILE": written(tmp_path / f"{role}.urls", nodes[role]),
                        "TORCHORD_KEYS": f"{tmp_path}/keys/{role}.json",
                        "TORCHORD_HOST_CACHE": "off",
                        "TORCHORD_ALLOWED_MODULES": "tests,torch",
                        "TORCHORD_TELL_TASKS": "shop.note",
                    },
                )
            made.wait_ready()
            master = Master(urls["submit"], cache_urls=[nodes["submit"]], checkpoint_dir=made.checkpoint_dir)
            work(master, made)
            made.wait_ready()
            monkeypatch.setenv("TORCHORD_KEYS", str(tmp_path / "keys/monitor.json"))
            written(tmp_path / "monitor.url", urls["monitor"])
            shown = look(urls["monitor"], tmp_path)
            shown += [of(psutil.Process(worker.pid)) for worker in made.processes.values()]
            for worker in made.processes.values():
                worker.terminate()
            for worker in made.processes.values():
                worker.wait(PATIENCE_SECONDS)
        shown += [log.read_text(errors="replace") for log in (tmp_path / "logs").rglob("*.log")]
        assert len(shown) > 15 and not any(
            password in text
            for text in shown
            for guarded_one in (store, tensors)
            for password in guarded_one.passwords.values()
        )
        assert store.denied() == [] and tensors.denied() == []
        assert store.owner.llen("celery") >= 5, "three roles had something to tell, and one has told it"
        stranger = store.url("worker", port=port, tls=options(folder, "stranger"))
        with pytest.raises(CacheUnreachable):
            Master(stranger).runs()
    for role in ROLES:
        given = {word.removeprefix("+") for word in rules()[role] if word.startswith("+")}
        found = used[role] | used_of_tensors[role] | used[""] | used_of_tensors[""]
        assert given - found <= set(SELDOM) | set(SELDOM_OF.get(role, ())), role


def written(file: Path, url: str) -> str:
    file.write_text(f"{url}\n")
    return str(file)


def of(process: psutil.Process) -> str:
    """What is seen of a process: on its command line by all, in its environment by its user."""
    return f"{process.cmdline()} {process.environ()}"


def work(master: Master, made: LocalCluster) -> None:
    """What a person does with runs."""
    config = TrainingConfig(epochs=2, batch_size=8, shards=8, fan_in=2, checkpoint_every=5, evaluate_every=3)
    run = master.submit(models.mlp(size=40), config, name="tree", on={"evaluated": "shop.note"})
    run.wait(timeout=PATIENCE_SECONDS)
    assert run.verify().ok and len(run.history()) == 10
    assert run.predict(models.points(20)).shape == (20, 3)
    run.model(version=5)
    points = models.points(40)
    master.datasets.put("points", points.tensors)
    wide = partial(models.Mlp, hidden=600)  # too large to travel inside a record
    stored = models.mlp(size=40, model=wide, dataset=partial(stored_dataset, "points"))
    config = TrainingConfig(epochs=40, batch_size=8, shards=2, compression="topk:0.2", checkpoint_every=5)
    run = master.submit(stored, config, name="stored", on={"paused": "shop.note"})
    wait_until(lambda: run.status().version >= 4, message="the fourth step")
    run.pause()
    wait_until(lambda: run.status().state == "paused", message="the pause")
    run.resume()
    wait_until(lambda: run.status().version >= 8, message="the eighth step")
    made.processes["client2"].kill()
    made.restart("client2")
    at = run.switch(shards=4)
    wait_until(lambda: run.status().version >= at + 2, message="the switch")
    run.cancel()
    master.datasets.delete("points")
    raising = models.mlp(size=40, loss=models.raising_loss)
    broken = master.submit(raising, config, name="broken", on={"failed": "shop.note"})
    with pytest.raises(RunFailed):
        broken.wait(timeout=PATIENCE_SECONDS)
    for name in master.runs():
        wait_until(partial(all_told, master.run(name)), message="all to be told")


def all_told(run: Run) -> bool:
    return not run.untold()


def look(url: str, folder: Path) -> list[str]:
    """What somebody sees who may see."""
    shown = []
    master = Master(url)
    assert set(master.runs()) == {"tree", "stored", "broken"}
    assert master.run("tree").status().state == "done" and len(master.run("tree").history()) == 10
    events = [event for name in master.runs() for event in master.run(name).events()]
    assert "started" in {event.type for event in events}
    shown += [repr(events), repr(master), repr(master.run("tree").status())]
    assert master.run("tree").verify().ok
    assert cli.main(["health", "--url", url, "--json"]) == 0
    for words in (("status",), ("inspect", "conf")):
        shown.append(celery(url, *words))
        assert shown[-1].count("@") >= 3, words

    def pages(page: str, flower: psutil.Process) -> None:
        shown.append(of(flower))
        for name in PAGES:
            with urlopen(f"{page}/{name}", timeout=PATIENCE_SECONDS) as reply:
                assert reply.status == 200
                shown.append(reply.read().decode())

    watched(folder / "monitor.url", folder / "flower.log", pages)
    return [*shown, (folder / "flower.log").read_text()]


# --- necessary ------------------------------------------------------------------------

COMMANDS: dict[str, tuple[str, ...]] = {
    "set a version": ("HSET", RUN.versions, "3", "{}"),
    "move the head": ("HSET", RUN.head, "version", "3"),
    "write the ledger": ("HSET", RUN.ledger, "3", "{}"),
    "expect a chain": ("HSET", RUN.expected, "3", "x"),
    "write a layout": ("SET", RUN.manifest, "{}"),
    "write a slot": ("HSET", RUN.slots(3), "0", "{}"),
    "take a shard": ("HSET", RUN.leases(3), "0", "{}"),
    "write a spec": ("SET", RUN.spec, "{}"),
    "tell an event": ("XADD", RUN.events, "*", "type", "x"),
    "replace weights": ("SET", f"{RUN.parameters_blob(3, 'x')}:0", "x"),
    "replace optimizer states": ("SET", f"{RUN.state_blob(3, 'x')}:0", "x"),
    "replace a gradient": ("SET", f"{RUN.gradient_blob(3, 0, 'x')}:0", "x"),
    "replace what rests": ("SET", f"{RUN.rest_blob('x')}:0", "x"),
    "replace a chunk of a dataset": ("SET", f"{keys.chunk('x')}:0", "x"),
    "name a dataset": ("HSET", keys.dataset("d"), "digest", "x"),
    "read weights": ("GET", f"{RUN.parameters_blob(3, 'x')}:0"),
    "be the supervisor": ("SET", keys.SUPERVISOR, "me"),
    "have others told": ("HSET", RUN.outbox, "done-3.0", "{}"),
    "say that somebody was told": ("HDEL", RUN.telling, "done-3.0"),
    "send others' tasks": ("LPUSH", "celery", "x"),
    "send a shard": ("LPUSH", "torchord.gradients", "x"),
    "call the server": ("LPUSH", "torchord.updates", "x"),
    "take a shard's message": ("RPOP", "torchord.gradients"),
    "take the server's messages": ("BRPOP", "torchord.updates", "0.01"),
    "empty a queue": ("DEL", "torchord.gradients"),
    "forget a run": ("DEL", RUN.head),
    "control workers": ("PUBLISH", "/0.celery.pidbox", "x"),
    "use another application's keys": ("SET", "session:1", "x"),
    "read another application's keys": ("GET", "session:1"),
}
ALWAYS: dict[str, tuple[str, ...]] = {
    "list keys": ("KEYS", "*"),
    "scan keys": ("SCAN", "0"),
    "empty the store": ("FLUSHALL",),
    "empty the database": ("FLUSHDB",),
    "read its settings": ("CONFIG", "GET", "*"),
    "change its settings": ("CONFIG", "SET", "dir", "/tmp"),
    "make a user": ("ACL", "SETUSER", "me", "on", "nopass", "+@all"),
    "read users": ("ACL", "LIST"),
    "end the store": ("SHUTDOWN", "NOSAVE"),
    "save": ("BGSAVE",),
    "hear all": ("MONITOR",),
    "copy all": ("REPLICAOF", "NO", "ONE"),
    "load a module": ("MODULE", "LIST"),
    "end others": ("CLIENT", "KILL", "TYPE", "normal"),
    "run any script": ("EVAL", "return 1", "0"),
    "move keys": ("RENAME", RUN.spec, RUN.manifest),
}
MAY = {
    "submit": {
        "move the head",
        "take a shard",
        "write a spec",
        "tell an event",
        "replace a chunk of a dataset",
        "name a dataset",
        "have others told",
        "say that somebody was told",
        "read weights",
        "send a shard",
        "call the server",
        "empty a queue",
        "forget a run",
    },
    "worker": {
        "move the head",
        "write a slot",
        "take a shard",
        "tell an event",
        "replace a gradient",
        "have others told",
        "read weights",
        "send a shard",
        "call the server",
        "empty a queue",
        "forget a run",
        "control workers",
    },
    "server": set(COMMANDS)
    - {"take a shard's message", "use another application's keys", "read another application's keys"},
    "monitor": {"control workers"},
}


def refused(client: redis.Redis, command: tuple[str, ...]) -> bool:
    try:
        client.execute_command(*command)
        return False
    except NoPermissionError:
        return True
    except redis.ResponseError as error:
        assert "NOPERM" not in str(error)
        return False


@pytest.mark.parametrize("role", ROLES)
def test_a_role_may_do_its_part_and_no_more(store: Guarded, role: str) -> None:
    """Much of `MAY` nobody does by hand: scripts do it, and they have the rights of who calls them."""
    with store.client(role) as client:
        found = {what for what, command in COMMANDS.items() if not refused(client, command)}
        assert found == MAY[role]
        assert [what for what, command in ALWAYS.items() if not refused(client, command)] == []
    store.owner.flushdb()
    store.owner.acl_log_reset()


@pytest.mark.parametrize("role", ["submit", "worker", "monitor"])
def test_a_script_has_no_more_rights_than_its_caller(store: Guarded, role: str) -> None:
    with store.client(role) as client:
        body = "return redis.call('HSET', KEYS[1], '3', '{}')"
        digest = client.script_load(body)
        with pytest.raises((NoPermissionError, redis.ResponseError), match=NO_RIGHT):
            client.evalsha(digest, 1, RUN.versions)
        with pytest.raises((NoPermissionError, redis.ResponseError), match=NO_RIGHT):
            client.evalsha(client.script_load("return redis.call('FLUSHALL')"), 0)
    assert not store.owner.exists(RUN.versions)
    store.owner.acl_log_reset()


def test_nobody_comes_in_without_a_password(store: Guarded) -> None:
    assert rules()["default"] == ["off", "resetpass", "-@all"]
    assert all(
        "nopass" not in words and not any(w.startswith((">", "#")) for w in words)
        for words in rules().values()
    )
    with pytest.raises(CacheUnreachable, match="refuses the user or password"):
        Master(store.url("worker").replace(store.passwords["worker"], store.passwords["server"]))


def test_nothing_is_given_twice_or_wholesale() -> None:
    for name, words in rules().items():
        assert len(words) == len(set(words)), name
        assert not {"+@all", "~*", "&*", "allkeys", "allcommands", "allchannels"} & set(words)
