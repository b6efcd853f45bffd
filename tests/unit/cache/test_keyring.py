"""Keys by role, seals bound to their place, and key files that are their owner's alone."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from torchord.cache.errors import InvalidInput, NoKey, NotAuthentic
from torchord.cache.keyring import (
    ALGORITHMS,
    NO_KEYS,
    Keyring,
    Places,
    bare,
    generate,
    keyring,
    local_path,
    write,
    write_local,
)
from torchord.coordinator.runtime import key_files

pytest.importorskip("cryptography")

PLACES = Places("run-1")
TEXT = json.dumps({"shard": 1, "loss": 0.5})


@pytest.fixture(params=ALGORITHMS)
def fleet(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A directory with the key files of a fleet."""
    key_files.new(tmp_path, request.param)
    return tmp_path


def test_a_seal_holds_for_its_role_and_place_alone(fleet: Path) -> None:
    worker, server = Keyring(fleet / "worker.json"), Keyring(fleet / "server.json")
    place = PLACES.slot(3, 1, "life")
    sealed = worker.sealed("worker", place, TEXT)
    assert server.opened("worker", place, sealed) == TEXT
    assert json.loads(sealed)["shard"] == 1, "scripts read it as before"
    for other in (
        PLACES.slot(4, 1, "life"),
        PLACES.slot(3, 2, "life"),
        PLACES.slot(3, 1, "life.1"),
        Places("run-2").slot(3, 1, "life"),
        PLACES.version(3, "life"),
    ):
        with pytest.raises(NotAuthentic, match="not for it"):
            server.opened("worker", other, sealed)
    with pytest.raises(NotAuthentic):
        server.opened("server", place, sealed)
    for changed in (sealed.replace("0.5", "0.4"), sealed.replace(" ", "  ", 2), sealed[:-1] + ',"x":1}'):
        with pytest.raises(NotAuthentic):
            server.opened("worker", place, changed)


@pytest.mark.parametrize(
    "text",
    ["{}", TEXT, '{"sealed":"', '{"sealed":""', '{"sealed":"a b"', '{"sealed":"a b"}', '{"sealed":"é !!",}'],
)
def test_what_has_no_seal_or_half_of_one_is_refused(fleet: Path, text: str) -> None:
    with pytest.raises(NotAuthentic):
        Keyring(fleet / "server.json").opened("worker", "here", text)


def test_an_empty_record_can_be_sealed(fleet: Path) -> None:
    keys = Keyring(fleet / "worker.json")
    sealed = keys.sealed("worker", "here", "{}")
    assert json.loads(sealed).keys() == {"sealed"}
    assert keys.opened("worker", "here", sealed) == bare(sealed) == "{}"


def test_who_has_no_key_of_a_role_is_told_which_file_has_one(fleet: Path) -> None:
    with pytest.raises(NoKey, match=r"role 'server'.*server\.json"):
        Keyring(fleet / "worker.json").sealed("server", "here", TEXT)


def test_a_process_without_keys_takes_every_seal_off_unread(fleet: Path) -> None:
    sealed = Keyring(fleet / "worker.json").sealed("worker", "here", TEXT)
    assert NO_KEYS.opened("server", "anywhere", sealed) == TEXT
    assert NO_KEYS.opened("server", "anywhere", TEXT) == TEXT
    assert NO_KEYS.sealed("worker", "here", TEXT) is TEXT
    assert not NO_KEYS
    assert not NO_KEYS.signs("worker")


def test_a_worker_of_ed25519_cannot_seal_what_a_server_does(tmp_path: Path) -> None:
    key_files.new(tmp_path, "ed25519")
    told = json.loads((tmp_path / "worker.json").read_text())
    secrets = [half["secret"] for half in json.loads((tmp_path / "server.json").read_text())["own"].values()]
    assert not any(secret in json.dumps(told) for secret in secrets)
    assert told["own"].keys() == {"worker"}
    assert json.loads((tmp_path / "monitor.json").read_text())["own"] == {}


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602])
def test_a_key_file_that_others_can_open_is_refused(fleet: Path, mode: int) -> None:
    (fleet / "worker.json").chmod(mode)
    with pytest.raises(InvalidInput, match="chmod 600"):
        Keyring(fleet / "worker.json")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"torchord_keys": 2}',
        '{"torchord_keys": 1}',
        '{"torchord_keys": 1, "own": {}, "trusted": {"worker": [{}]}}',
        '{"torchord_keys": 1, "own": {"king": {"algorithm": "blake2b", "secret": "AA=="}}, "trusted": {}}',
        '{"torchord_keys": 1, "own": {"worker": {"algorithm": "rot13", "secret": "AA=="}}, "trusted": {}}',
        '{"torchord_keys": 1, "own": {"worker": {"algorithm": "ed25519", "secret": "AA=="}}, "trusted": {}}',
        '{"torchord_keys": 1, "own": {"worker": {"algorithm": "blake2b", "secret": "AA=="}}, "trusted": {}}',
    ],
)
def test_what_is_no_key_file_is_one_clear_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "keys.json"
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(InvalidInput, match=r"keys\.json"):
        Keyring(path)
    with pytest.raises(InvalidInput, match="cannot be read"):
        Keyring(tmp_path / "none.json")


def test_key_files_are_their_owners_alone_and_are_not_written_over(fleet: Path) -> None:
    before = {path.name: path.read_text() for path in fleet.iterdir()}
    assert before.keys() == key_files.FILES.keys(), "and nothing half-written beside them"
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in fleet.iterdir())
    with pytest.raises(InvalidInput, match="has keys already"):
        key_files.new(fleet, "blake2b")
    assert {path.name: path.read_text() for path in fleet.iterdir()} == before


def test_a_key_is_renewed_in_three_steps_while_everybody_goes_on(fleet: Path) -> None:
    worker, server = Keyring(fleet / "worker.json"), Keyring(fleet / "server.json")
    by_old = worker.sealed("worker", "here", TEXT)
    with pytest.raises(InvalidInput, match="no new key"):
        key_files.switch(fleet, "worker")
    with pytest.raises(InvalidInput, match="no older one"):
        key_files.forget(fleet, "worker")
    key_files.renew(fleet, "worker")
    with pytest.raises(InvalidInput, match="--switch"):
        key_files.renew(fleet, "worker")
    with pytest.raises(InvalidInput, match="--switch"):
        key_files.forget(fleet, "worker")
    assert server.opened("worker", "here", Keyring(fleet / "worker.json").sealed("worker", "here", TEXT))
    key_files.switch(fleet, "worker")
    by_new = Keyring(fleet / "worker.json").sealed("worker", "here", TEXT)
    assert by_new.split()[0] != by_old.split()[0], "another key's id"
    assert server.opened("worker", "here", by_new) == TEXT, "read anew, for the key is unknown"
    assert server.opened("worker", "here", by_old) == TEXT
    key_files.forget(fleet, "worker")
    late = Keyring(fleet / "server.json")
    assert late.opened("worker", "here", by_new) == TEXT
    with pytest.raises(NotAuthentic, match="does not trust"):
        late.opened("worker", "here", by_old)


def test_what_is_shown_of_a_key_file_has_no_secret(fleet: Path) -> None:
    path = fleet / "fleet.json"
    shown = json.dumps(key_files.shown(path))
    told = json.loads(path.read_text())
    assert not any(half["secret"] in shown for half in told["own"].values())
    assert json.loads(shown)["signs"].keys() == {"worker", "server"}


def test_a_local_clusters_keys_are_found_by_its_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    url = "redis://127.0.0.1:12345/0"
    path = local_path(url)
    assert path is not None
    assert not keyring("", url)
    write_local(path)
    found = keyring("", url)
    assert found
    assert found.local
    assert found.opened("server", "here", found.sealed("server", "here", TEXT)) == TEXT
    assert not keyring("", "redis://127.0.0.1:12346/0")
    path.parent.chmod(0o755)
    assert local_path(url) is None, "somebody else may have written there"


def test_a_local_clusters_keys_can_outlive_it(tmp_path: Path) -> None:
    kept, first, second = tmp_path / "kept.json", tmp_path / "first.json", tmp_path / "second.json"
    write_local(first, kept)
    write_local(second, kept)
    sealed = Keyring(first).sealed("worker", "here", TEXT)
    assert Keyring(second).opened("worker", "here", sealed) == TEXT
    assert kept.stat().st_mode & 0o777 == 0o600


def test_somebody_elses_folder_for_keys_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / f"torchord-keys-{os.geteuid()}").symlink_to(tmp_path / "elsewhere")
    assert local_path("redis://127.0.0.1:1/0") is None


def test_an_unknown_algorithm_is_named() -> None:
    with pytest.raises(InvalidInput, match="rot13"):
        generate("rot13")


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    write(path, {}, {})
    write(path, {}, {"worker": [generate("blake2b")[1]]})
    assert [entry.name for entry in tmp_path.iterdir()] == ["keys.json"]
    assert not Keyring(path).signs("worker")
