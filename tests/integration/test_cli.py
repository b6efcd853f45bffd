"""`torchord`: what a person at a shell sees, and what a script can rely on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis
import torch
from safetensors.torch import load_file

from tests.support import models
from torchord import LocalCluster, Master, Run, TrainingConfig
from torchord.cache.keys import RUNS, RunKeys
from torchord.cache.ledger.records import LedgerEntry
from torchord.cache.ledger.workers import Registry, new_info
from torchord.cache.servers.redis_client import connect
from torchord.coordinator.cli import main
from torchord.coordinator.commands.common import BAD, NOT_FOUND, OK, UNREACHABLE, USAGE

CONFIG = TrainingConfig(epochs=2, batch_size=8, shards=2, checkpoint_every=4)  # 10 steps


class Shell:
    """Runs commands against one server, in this process.

    Attributes:
        url: of the server.
        checkpoints: the cluster's checkpoint directory.
    """

    def __init__(self, url: str, checkpoints: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.url = url
        self.checkpoints = checkpoints
        self._capsys = capsys

    def __call__(self, *words: str) -> tuple[int, str, str]:
        """(exit code, stdout, stderr)."""
        self._capsys.readouterr()
        where = [] if words[0] == "health" else ["--checkpoint-dir", str(self.checkpoints)]
        code = main([*words, "--url", self.url, *where])
        out, err = self._capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    def json(self, *words: str) -> Any:
        """The value printed by a command that succeeds."""
        code, out, err = self(*words, "--json")
        assert code == OK, err
        return json.loads(out)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LocalCluster, Path, Run]]:
    """A cluster, its checkpoint directory, and a run on it that is done."""
    folder = tmp_path_factory.mktemp("cli")
    with LocalCluster(1, checkpoint_dir=folder / "checkpoints", log_dir=folder / "logs") as cluster:
        master = Master(cluster.url, checkpoint_dir=str(folder / "checkpoints"))
        run = master.submit(models.mlp(size=40), CONFIG, name="digits")
        run.wait(timeout=90)
        yield cluster, folder / "checkpoints", run


@pytest.fixture
def shell(done: tuple[LocalCluster, Path, Run], capsys: pytest.CaptureFixture[str]) -> Shell:
    """A shell on the cluster of `done`."""
    return Shell(done[0].url, done[1], capsys)


@pytest.fixture
def idle(redis_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Shell:
    """A shell on a server without workers."""
    return Shell(redis_url, tmp_path, capsys)


@pytest.fixture
def ledger(done: tuple[LocalCluster, Path, Run]) -> Iterator[redis.Redis]:
    """The server of `done`; whatever a test does to the run's ledger is undone."""
    client = redis.Redis.from_url(done[0].url, decode_responses=True)
    key = RunKeys("digits").ledger
    kept, ttl = client.hgetall(key), client.ttl(key)
    yield client
    client.hset(key, mapping=kept)
    client.expire(key, ttl)
    client.close()


# --- looking ------------------------------------------------------------------------------


def test_list(shell: Shell, idle: Shell) -> None:
    assert shell("list")[1].split()[:2] == ["digits", "done"]
    assert [row["name"] for row in shell.json("list")] == ["digits"]
    assert idle("list")[1].startswith("No runs at redis://")
    assert idle.json("list") == []


def test_status(shell: Shell) -> None:
    code, out, _ = shell("status", "digits")
    assert code == OK and out.startswith("digits: done, step 10 of 10")
    assert shell.json("status", "digits")["version"] == 10


def test_status_says_what_is_missing(idle: Shell) -> None:
    Master(idle.url).submit(models.mlp(), CONFIG, name="waits")
    code, out, _ = idle("status", "waits")
    assert code == OK
    assert "celery -A torchord worker -Q updates -c 1" in out and "-Q gradients" in out


def test_watch(shell: Shell) -> None:
    code, out, _ = shell("watch", "digits")
    assert code == OK
    assert "step 9: loss" in out and out.strip().endswith("done: version 10")
    lines = [json.loads(line) for line in shell("watch", "digits", "--json")[1].splitlines()]
    assert [line["step"] for line in lines if line["type"] == "step"] == list(range(10))


# --- acting -------------------------------------------------------------------------------


def test_pause_resume_cancel(idle: Shell) -> None:
    Master(idle.url).submit(models.mlp(), CONFIG, name="one")
    assert idle.json("pause", "one")["state"] == "paused"
    assert idle.json("pause", "one")["state"] == "paused"
    assert idle.json("resume", "one")["state"] == "pending"
    assert idle("cancel", "one")[:2] == (OK, "one: cancelled, step 0 of ?\n")
    code, _, err = idle("resume", "one")
    assert code == BAD and "is cancelled" in err
    code, _, err = idle("pause", "one")
    assert code == BAD and "only a running run can be paused" in err
    code, _, err = idle("watch", "one")
    assert code == BAD and "one is cancelled" in err


# --- what goes wrong ------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["status", "watch", "pause", "resume", "cancel", "verify"])
def test_no_such_run(idle: Shell, command: str) -> None:
    code, out, err = idle(command, "nobody")
    assert (code, out) == (NOT_FOUND, "")
    assert "'nobody'" in err


def test_no_redis(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--url", "redis://127.0.0.1:1/0"]) == UNREACHABLE
    assert "no Redis answers at redis://127.0.0.1:1/0" in capsys.readouterr().err


def test_wrong_arguments(idle: Shell, capsys: pytest.CaptureFixture[str]) -> None:
    assert idle("status", "no such name")[0] == USAGE
    for words in ([], ["dance"], ["status"], ["verify", "x", "--replay", "soon"]):
        assert main(words) == USAGE
        out, err = capsys.readouterr()
        assert out == "" and "torchord" in err


def fresh(code: str, **environment: str) -> str:
    """What a program prints in a fresh interpreter that may not load torch."""
    refuse = "import sys; sys.modules['torch'] = None; from torchord.coordinator.cli import main; "
    done = subprocess.run(
        [sys.executable, "-c", refuse + code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr == ""
    return done.stdout


def completed(words: str, url: str) -> list[str]:
    """What bash is told to offer for the last of `words`."""
    count = str(len(words.split(" ")) - 1)
    shell = {"_TORCHORD_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": count}
    lines = fresh("main([])", TORCHORD_URL=url, **shell).splitlines()
    return [line.partition(",")[2] for line in lines if line]


def test_help_and_completion_do_without_torch(idle: Shell) -> None:
    assert "verify" in fresh("sys.exit(main(['--help']))")
    assert "--replay" in fresh("sys.exit(main(['verify', '--help']))")
    assert completed("torchord re", idle.url) == ["readmit", "report", "resume"]
    assert completed("torchord verify --re", idle.url) == ["--replay"]
    with redis.Redis.from_url(idle.url) as client:
        client.zadd(RUNS, {"digits-01": 1, "digits-02": 2, "other": 3})
        client.expire(RUNS, 60)
    assert completed("torchord status di", idle.url) == ["digits-01", "digits-02"]
    assert completed("torchord status ", idle.url) == ["digits-01", "digits-02", "other"]
    assert completed("torchord status di", "redis://127.0.0.1:1/0") == []


@pytest.mark.parametrize(
    "words", [["list"], ["list", "--json"], ["status", "one"], ["status", "one", "--json"]]
)
def test_looking_at_runs_does_without_torch(idle: Shell, words: list[str]) -> None:
    Master(idle.url).submit(models.mlp(), CONFIG, name="one")
    assert "pending" in fresh(f"sys.exit(main({words!r}))", TORCHORD_URL=idle.url)


def test_export(shell: Shell, done: tuple[LocalCluster, Path, Run], tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    assert shell("export", "digits", str(path))[1] == f"digits: the weights of version 10 are in {path}\n"
    meant, found = done[2].model().state_dict(), load_file(path)
    assert found.keys() == meant.keys() and all(torch.equal(found[name], meant[name]) for name in meant)
    assert shell.json("export", "digits", str(path))["version"] == 10
    code, _, err = shell("export", "digits", str(tmp_path / "nowhere" / "m.safetensors"))
    assert code == BAD and "choose a directory that exists" in err
    assert shell("export", "nobody", str(path))[0] == NOT_FOUND


# --- verify -------------------------------------------------------------------------------


def test_verify_a_clean_run(shell: Shell) -> None:
    code, out, _ = shell("verify", "digits")
    assert code == OK and "audit clean: 10 steps, 20 gradient slots" in out
    assert shell.json("verify", "digits")["ok"] is True


def test_verify_finds_an_altered_entry(shell: Shell, ledger: redis.Redis) -> None:
    key = RunKeys("digits").ledger
    entry = json.loads(ledger.hget(key, "4"))
    ledger.hset(key, "4", json.dumps({**entry, "loss": entry["loss"] / 2}))
    code, out, _ = shell("verify", "digits")
    assert code == BAD and "the entry of version 4 was altered" in out


def test_verify_finds_an_entry_that_was_altered_with_care(shell: Shell, ledger: redis.Redis) -> None:
    """Its seal and chain fit again, but not the entry that follows."""
    key = RunKeys("digits").ledger
    entry = LedgerEntry.from_json(ledger.hget(key, "4"))
    fields = {name: getattr(entry, name) for name in entry.__slots__}
    ledger.hset(key, "4", LedgerEntry(**{**fields, "parameters": "0" * 32}).sealed().to_json())
    code, out, _ = shell("verify", "digits")
    assert code == BAD and "version 5 does not follow from the entry before" in out


def test_verify_finds_a_missing_entry(
    shell: Shell, ledger: redis.Redis, done: tuple[LocalCluster, Path, Run], tmp_path: Path
) -> None:
    ledger.hdel(RunKeys("digits").ledger, "7")
    assert shell("verify", "digits")[0] == OK  # its copy lies beside the checkpoints
    shell.checkpoints = tmp_path
    code, out, _ = shell("verify", "digits", "--json")
    assert code == BAD
    assert json.loads(out)["problems"][0].startswith("the entry of version 7 is missing")


def test_verify_computes_steps_again(shell: Shell) -> None:
    code, out, err = shell("verify", "digits", "--replay", "2", "--replay", "9")
    assert code == OK, out
    assert "computing step 2 again" in err
    # 0, 1 and 2 from the start; 8 and 9 from the checkpoint of 8
    assert "5 steps computed again" in " ".join(out.split())
    code, _, err = shell("verify", "digits", "--replay", "10")
    assert code == USAGE and "step 10 cannot be computed again" in err


def test_verify_finds_bytes_that_nobody_computed(shell: Shell, ledger: redis.Redis) -> None:
    """The ledger fits itself from end to end, and is not what the recipe gives."""
    key, chain = RunKeys("digits").ledger, ""
    for version in range(3, 11):
        entry = LedgerEntry.from_json(ledger.hget(key, str(version)))
        fields = {name: getattr(entry, name) for name in entry.__slots__}
        if version == 3:
            slots = [{**vars_of(slot), "digest": "f" * 32} for slot in entry.slots]
            fields["slots"] = tuple(type(entry.slots[0])(**slot) for slot in slots)
        else:
            fields["previous"] = chain
        forged = LedgerEntry(**fields).sealed()
        chain = forged.chain
        ledger.hset(key, str(version), forged.to_json())
    kept = ledger.hget(RunKeys("digits").head, "chain")
    ledger.hset(RunKeys("digits").head, "chain", chain)
    try:
        assert shell("verify", "digits")[0] == OK
        code, out, _ = shell("verify", "digits", "--replay", "2")
        assert code == BAD and "step 2, shard 0: computing it again gives other bytes" in out
    finally:
        ledger.hset(RunKeys("digits").head, "chain", kept)


def vars_of(slot: Any) -> dict[str, Any]:
    return {name: getattr(slot, name) for name in slot.__slots__}


# --- as a program ---------------------------------------------------------------------------


# --- health ---------------------------------------------------------------------------------


def test_health_of_a_cluster(shell: Shell) -> None:
    code, out, err = shell("health")
    assert code == 0 and "client1@" in out and "server@" in out and ": idle" in out and err == ""
    node = next(line.partition("/")[0] for line in out.splitlines() if line.startswith("client1@"))
    code, out, _ = shell("health", node)
    assert code == 0 and len(out.splitlines()) == 1
    code, out, err = shell("health", "nobody@nowhere")
    assert code == 1 and out == "" and "no worker of node nobody@nowhere lives" in err


def test_a_worker_that_takes_no_messages_is_not_healthy(idle: Shell, redis_url: str) -> None:
    with connect(redis_url) as client:
        registry = Registry(client, redis_url)
        registry.beat(replace(new_info("solo@here", ("q",)), silent=20.0, task="a long shard"))
        assert idle("health")[0] == 0, "its loop rests while it computes"
        registry.beat(replace(new_info("deaf@here", ("q",)), silent=20.0))
        code, out, _ = idle("health")
        assert code == 1 and "idle, has taken no messages for 20 s" in out
        assert idle("health", "solo@here")[0] == 0


def test_a_redis_that_is_away_makes_a_worker_unready_and_not_dead(idle: Shell, capsys: Any) -> None:
    gone = ["--url", "redis://127.0.0.1:1/0"]
    assert main(["health", *gone]) == 4
    capsys.readouterr()
    assert main(["health", "--live", *gone]) == 0
    assert "nothing is known of the worker" in capsys.readouterr().err
    assert idle("health", "--live", "nobody@nowhere")[0] == 1


def test_health_does_without_torch(idle: Shell, redis_url: str) -> None:
    with connect(redis_url) as client:
        Registry(client, redis_url).beat(new_info("client1@here", ("q",)))
    assert fresh("print(main(['health']))", TORCHORD_URL=redis_url).splitlines()[-1] == "0"


def test_as_a_program(shell: Shell) -> None:
    base = [sys.executable, "-m", "torchord"]
    end = ["--url", shell.url, "--checkpoint-dir", str(shell.checkpoints)]
    verified = subprocess.run([*base, "verify", "digits", *end], capture_output=True, text=True)
    assert (verified.returncode, verified.stderr) == (OK, "")
    missing = subprocess.run([*base, "verify", "nobody", *end], capture_output=True, text=True)
    assert missing.returncode == NOT_FOUND and "Traceback" not in missing.stderr
    with subprocess.Popen(
        [*base, "watch", "digits", *end], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as watch:
        assert watch.stdout is not None and watch.stderr is not None
        watch.stdout.readline()
        watch.stdout.close()  # as `| head -1` does
        assert watch.stderr.read() == b""
