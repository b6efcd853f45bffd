"""Somebody who can write to Redis and to the checkpoints, and has no key: nothing that they forge counts."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import redis
import torch

from tests.support import models
from tests.support.fleet import Fleet, finished
from tests.support.waiting import wait_until
from torchord import LocalCluster, Master, Run, TrainingConfig
from torchord.cache.blobs.chunk_store import ChunkStore
from torchord.cache.errors import CheckpointError, ChunkCorrupt, InvalidInput, NotAuthentic, RunFailed
from torchord.cache.keyring import NO_KEYS, Keyring, bare
from torchord.cache.ledger.records import SlotRecord, VersionRecord
from torchord.cache.servers.redis_client import connect
from torchord.cache.tensors.codec import layout, pack
from torchord.coordinator import cli
from torchord.coordinator.runtime import key_files

pytest.importorskip("cryptography")

CONFIG = TrainingConfig(epochs=2, batch_size=8, shards=2, seed=3, checkpoint_every=5)
RECIPE = models.mlp(evaluation=models.points, metrics={"accuracy": models.accuracy})


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The key files of a fleet, by role, that cannot sign for each other."""
    folder = tmp_path_factory.mktemp("keys")
    key_files.new(folder, "ed25519")
    return folder


@contextmanager
def holding(path: Path | None) -> Iterator[None]:
    """This process's keys."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TORCHORD_KEYS", raising=False)
        if path is not None:
            patch.setenv("TORCHORD_KEYS", str(path))
        yield


@pytest.fixture(scope="module")
def fleet(keys: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Workers that believe these keys; this process may submit."""
    folder = tmp_path_factory.mktemp("fleet")
    with (
        holding(keys / "submit.json"),
        LocalCluster(
            0, env={"TORCHORD_KEYS": str(keys / "fleet.json")}, checkpoint_dir=str(folder / "checkpoints")
        ) as cluster,
    ):
        cluster.add_worker("server", role="server", env={"TORCHORD_KEYS": str(keys / "server.json")})
        for name in ("client1", "client2"):
            cluster.add_worker(name, role="client", env={"TORCHORD_KEYS": str(keys / "worker.json")})
        cluster.wait_ready()
        yield Fleet(cluster, folder)


@pytest.fixture(scope="module")
def attacker(fleet: Fleet) -> Iterator[redis.Redis]:
    """A connection that may write anything."""
    client = connect(fleet.cluster.url)
    yield client
    client.close()


@pytest.fixture(scope="module")
def honest(fleet: Fleet) -> Run:
    """A run that nobody disturbed."""
    run, _ = fleet.train(RECIPE, CONFIG, "honest")
    return run


def chain_of(run: Run) -> str:
    """The chain of a run's last version: equal chains are equal bits."""
    return str(run._ledger.head().chain)


@contextmanager
def meanwhile(act: Callable[[], None]) -> Iterator[None]:
    """Do something over and over."""
    over = threading.Event()

    def work() -> None:
        while not over.is_set():
            act()
            time.sleep(0.002)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(10)


def forged_slot(fleet: Fleet, run: str, step: int) -> str:
    """A slot with a gradient of the attacker's, whose record and bytes fit each other."""
    tensors = {"0.weight": torch.full((16, 6), 1e6)}
    manifest = layout(tensors)
    store = ChunkStore([fleet.cluster.url])
    key = f"torchord:blob:{run}:gradient:{step}:1:evil"
    blob = store.put(key, pack(tensors, manifest), ttl_seconds=600)
    store.close()
    return SlotRecord(
        shard=1, digest=blob.digest, nonce="evil", blob=blob, manifest=manifest.to_json(), buffers=(),
        examples=4, loss=0.1, grad_norm=1.0, worker="client1@here", attempt=1, seconds=0.1,
    ).to_json()  # fmt: skip


def test_a_forged_slot_changes_nothing(fleet: Fleet, attacker: redis.Redis, honest: Run) -> None:
    taken: set[int] = set()

    def forge() -> None:
        step = int(attacker.hget("torchord:{forged}:head", "version") or 0)
        if step not in taken:
            text = forged_slot(fleet, "forged", step)
            if attacker.hsetnx(f"torchord:{{forged}}:slots:{step}", "1", text):
                taken.add(step)

    run = fleet.master.submit(RECIPE, CONFIG, name="forged")
    with meanwhile(forge):
        finished(run)
    assert taken, "the attacker was first, at least once"
    assert chain_of(run) == chain_of(honest)
    assert run.verify().ok


def test_slots_of_another_step_or_run_are_no_slots(fleet: Fleet, attacker: redis.Redis, honest: Run) -> None:
    seen: dict[int, str] = {}
    replayed: set[int] = set()

    def replay() -> None:
        step = int(attacker.hget("torchord:{replayed}:head", "version") or 0)
        for number, text in attacker.hgetall(f"torchord:{{replayed}}:slots:{step}").items():
            if number == "0":
                seen.setdefault(step, text)
        earlier = [text for at, text in seen.items() if at < step]
        if (
            earlier
            and step not in replayed
            and attacker.hsetnx(f"torchord:{{replayed}}:slots:{step}", "0", earlier[-1])
        ):
            replayed.add(step)

    run = fleet.master.submit(RECIPE, CONFIG, name="replayed")
    with meanwhile(replay):
        finished(run)
    assert replayed
    assert chain_of(run) == chain_of(honest)


def test_a_version_that_the_server_has_not_sealed_is_nobodys(
    fleet: Fleet, attacker: redis.Redis, honest: Run
) -> None:
    run, trained = fleet.train(RECIPE, CONFIG, "versions")
    last, ours = str(run.status().version), trained.module.state_dict()
    theirs = attacker.hget("torchord:{versions}:versions", last)
    record = VersionRecord.from_json(bare(theirs))
    for forged in (
        replace(record, chain="0" * 32).to_json(),
        theirs.replace(record.digest, "0" * 32),
        attacker.hget("torchord:{honest}:versions", last),
    ):
        attacker.hset("torchord:{versions}:versions", last, forged)
        with pytest.raises(NotAuthentic, match=f"record of version {last} of run versions"):
            run._ledger.version(int(last))
        loaded = run.state_dict(version=int(last))  # from the checkpoint, which has a seal
        assert all(torch.equal(loaded[name], tensor) for name, tensor in ours.items())
        audit = run.verify()
        assert not audit.ok
        assert "seal" in audit.problems[0]
    attacker.hset("torchord:{versions}:versions", last, theirs)
    assert run.verify().ok
    for name, tensor in run.state_dict().items():
        assert torch.equal(tensor, ours[name])


def test_an_altered_entry_of_the_ledger_is_found(fleet: Fleet, attacker: redis.Redis) -> None:
    run, _ = fleet.train(RECIPE, CONFIG, "entries")
    from torchord.cache.ledger.records import LedgerEntry

    theirs = attacker.hget("torchord:{entries}:ledger", "3")
    entry = LedgerEntry.from_json(bare(theirs))
    attacker.hset("torchord:{entries}:ledger", "3", replace(entry, loss=0.0, seal="").sealed().to_json())
    audit = run.verify()
    assert not audit.ok
    assert "entry 3" in audit.problems[0]
    attacker.hset("torchord:{entries}:ledger", "3", theirs)
    assert run.verify().ok


def test_a_spec_that_no_submitter_has_sealed_runs_nowhere(fleet: Fleet, keys: Path) -> None:
    with holding(None):
        stranger = Master(fleet.cluster.url, checkpoint_dir=str(fleet.folder / "checkpoints"))
    stranger._services.keyring = stranger._services.file_keyring = NO_KEYS
    run = stranger.submit(RECIPE, CONFIG, name="unsigned")
    with pytest.raises(RunFailed, match=r"the spec of run unsigned.*has no seal"):
        run.wait(timeout=60)
    with holding(keys / "worker.json"):
        worker = Master(fleet.cluster.url)
        with pytest.raises(InvalidInput, match=r"role 'submit'"):
            worker.submit(RECIPE, CONFIG, name="by-a-worker")


def test_a_recipe_of_somebody_elses_is_not_even_imported(fleet: Fleet, attacker: redis.Redis) -> None:
    """A spec that is replaced between submit and the first step, under the same incarnation."""
    run = fleet.master.submit(RECIPE, replace(CONFIG, epochs=40), name="swapped")
    wait_until(lambda: run.status().version > 0, message="the first step")
    run.pause()
    theirs = attacker.get("torchord:{swapped}:spec")
    spec = json.loads(bare(theirs))
    spec["recipe"]["model"]["target"] = "nowhere_at_all:Model"
    attacker.set("torchord:{swapped}:spec", json.dumps(spec), keepttl=True)
    with pytest.raises(NotAuthentic, match="the spec of run swapped"):
        run.resume()
    attacker.set("torchord:{swapped}:spec", theirs, keepttl=True)
    run.resume()
    finished(run)


def test_forged_metrics_and_predictions_are_left_out(
    fleet: Fleet, attacker: redis.Redis, honest: Run
) -> None:
    last = str(honest.status().version)
    theirs = attacker.hget("torchord:{honest}:evaluations", last)
    accuracy = honest.evaluations()[int(last)]["accuracy"]
    attacker.hset("torchord:{honest}:evaluations", last, json.dumps({"accuracy": 1.0, "loss": 0.0}))
    assert int(last) not in honest.evaluations()
    attacker.hset("torchord:{honest}:evaluations", last, theirs)
    assert honest.evaluations()[int(last)]["accuracy"] == accuracy

    inputs = torch.arange(60.0).reshape(10, 6)
    answered: set[str] = set()

    def forge() -> None:
        for key in attacker.scan_iter("torchord:{honest}:predict:*"):
            if key not in answered:
                answered.add(key)
                attacker.hset(key, "0", json.dumps({"error": "all is well"}))

    clean = honest.predict(inputs, batch_size=5)
    with meanwhile(forge):
        assert torch.equal(honest.predict(inputs, batch_size=5), clean)


def test_a_checkpoint_is_believed_for_its_seal_alone(fleet: Fleet, keys: Path, honest: Run) -> None:
    """Whoever can write the files makes the checksums right as well."""
    from torchord.cache.files.checkpoint import CheckpointStore

    incarnation = honest._ledger.head().incarnation
    root = str(fleet.folder / "checkpoints")
    ours = CheckpointStore(root, "honest", incarnation, keyring=Keyring(keys / "monitor.json"))
    version = ours.versions()[-1]
    whole = ours.load(version)
    theirs = CheckpointStore(root, "honest", incarnation)
    poisoned = {name: torch.zeros_like(tensor) for name, tensor in whole.tensors.items()}
    folder, kept = Path(ours.path()), fleet.folder / "kept"
    shutil.copytree(folder, kept)
    try:
        theirs.save(version, poisoned, whole.state, whole.meta)
        assert theirs.load(version).version == version, "for who has no keys it is whole"
        with pytest.raises(CheckpointError, match="no seal"):
            ours.load(version)
        marker = (kept / f"version-{version:09d}.json").read_text()
        (folder / f"version-{version:09d}.json").write_text(marker)
        with pytest.raises(CheckpointError, match="damaged"):
            ours.load(version)
        earlier = ours.versions()[0]
        shutil.copy(kept / f"version-{earlier:09d}.json", folder / f"version-{version:09d}.json")
        with pytest.raises(CheckpointError, match="not for it"):
            ours.load(version)
    finally:
        shutil.rmtree(folder)
        shutil.copytree(kept, folder)


def test_a_statement_is_checked_without_the_run(
    fleet: Fleet, keys: Path, honest: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = honest.statement()
    assert text is not None
    path, model = tmp_path / "statement.json", tmp_path / "model.safetensors"
    path.write_text(text)
    honest.wait().save(model)
    with holding(keys / "monitor.json"):
        assert cli.main(["verify", "--statement", str(path), "--model", str(model)]) == cli.OK
        out = capsys.readouterr().out
        assert "the seal holds: run honest, 10 steps" in out
        assert chain_of(honest) in out
        path.write_text(text.replace('"version": 10', '"version": 11'))
        assert cli.main(["verify", "--statement", str(path)]) == cli.BAD
        assert "seal that is not for it" in capsys.readouterr().err
        path.write_text(text)
        from safetensors.torch import load_file, save_file

        save_file({name: tensor + 1 for name, tensor in load_file(model).items()}, model)
        assert cli.main(["verify", "--statement", str(path), "--model", str(model)]) == cli.BAD
        assert "not those of the statement" in capsys.readouterr().err


def test_a_key_that_is_renewed_under_way_stops_nothing(
    fleet: Fleet, keys: Path, honest: Run, tmp_path: Path
) -> None:
    run = fleet.master.submit(RECIPE, replace(CONFIG, epochs=60), name="renewed")
    for role in ("worker", "server"):
        for step in (key_files.renew, key_files.switch):
            before = run.status().version
            step(keys, role)
            wait_until(lambda: run.status().version > before + 5, message="further steps")  # noqa: B023
    finished(run)


def test_bytes_with_right_checksums_and_other_content_are_found(fleet: Fleet, honest: Run) -> None:
    """What a second preimage of the checksums comes to: a record's digest names the content itself."""
    record = honest._ledger.version(honest.status().version)
    assert record is not None
    assert record.blob.content.startswith("blake3:")
    store = ChunkStore([fleet.cluster.url])
    other = store.put(
        "torchord:blob:honest:other", memoryview(os.urandom(record.blob.nbytes)), ttl_seconds=60
    )
    store.close()
    colliding = replace(other, content=record.blob.content)
    with pytest.raises(ChunkCorrupt, match="on purpose"):
        honest._services.chunks.get(colliding)
