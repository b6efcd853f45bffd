"""`submit(..., on=...)`, and what of a run has not been told: for programs, and in a shell."""

from __future__ import annotations

import json

import pytest

from tests.support import models
from torchord import Master, TrainingConfig
from torchord.cache.errors import ConfigMismatch, InvalidInput
from torchord.cache.ledger.ledger import Ledger
from torchord.cache.servers.redis_client import connect
from torchord.coordinator import cli

CONFIG = TrainingConfig(epochs=1, batch_size=8, shards=2)
ON = {"done": "shop.deploy", "cancelled": ["shop.look", "https://shop.example/hook/SECRET"]}


@pytest.fixture
def master(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Master:
    monkeypatch.setenv("TORCHORD_TELL_TASKS", "shop.*")
    monkeypatch.setenv("TORCHORD_TELL_URLS", "https://shop.example")
    return Master(redis_url)


def test_a_submission_keeps_whom_it_tells(master: Master, redis_url: str) -> None:
    run = master.submit(models.mlp(), CONFIG, name="digits", on=ON)
    client = connect(redis_url)
    spec = Ledger(client, redis_url, "digits").spec()
    client.close()
    assert spec["on"] == {"done": ["shop.deploy"], "cancelled": ON["cancelled"]}
    assert master.submit(models.mlp(), CONFIG, name="digits").name == run.name, "it keeps what it has"
    assert master.submit(models.mlp(), CONFIG, name="digits", on=ON).name == run.name
    for other in ({"done": "shop.deploy"}, {}):
        with pytest.raises(ConfigMismatch, match="another on"):
            master.submit(models.mlp(), CONFIG, name="digits", on=other)


def test_whom_nobody_may_call_is_refused_before_anything_is_stored(master: Master) -> None:
    for on in ({"done": "mail.send"}, {"done": "https://elsewhere.example/"}, {"step": "shop.deploy"}):
        with pytest.raises(InvalidInput):
            master.submit(models.mlp(), CONFIG, name="digits", on=on)
    assert master.runs() == []


def test_what_is_untold_is_shown(master: Master, redis_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = master.submit(models.mlp(), CONFIG, name="digits", on=ON)
    assert run.untold() == []
    run.cancel()
    first, second = run.untold()
    assert (first.event, first.place, second.place) == ("cancelled", 0, 1)
    assert run.status().untold == (), "nothing has gone wrong yet"
    client = connect(redis_url)
    ledger = Ledger(client, redis_url, "digits")
    taken = ledger.claim_telling("w0", seconds=60)
    assert taken is not None
    ledger.settle_telling(taken, "w0", "dead", error="answered 404", to="https://shop.example/…")
    (said,) = run.status().untold
    assert said.endswith("given up after 1 try, until `torchord told NAME --again`: answered 404")
    assert cli.main(["told", "digits", "--url", redis_url]) == 1
    assert "answered 404" in capsys.readouterr().out
    assert cli.main(["status", "digits", "--url", redis_url]) == 0
    assert "not told     cancelled" in capsys.readouterr().out
    assert cli.main(["told", "digits", "--again", "--json", "--url", redis_url]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["revived"] == 1 and [each["tries"] for each in found["untold"]] == [0, 0]
    assert run.tell_again() == 0
    assert cli.main(["told", "nobody", "--url", redis_url]) == 3
    client.close()
