"""Whose a token is, by digests alone."""

from __future__ import annotations

import json

import pytest

from torchord.cache.errors import InvalidInput
from torchord.coordinator.cli import main
from torchord.coordinator.pages.tokens import SCOPES, Holder, Tokens, made


def test_an_entry_does_not_give_its_token_away() -> None:
    token, entry = made("shop", "write")
    tokens = Tokens(entry)
    assert tokens.holder(token) == Holder("shop", "write") and token not in entry and len(token) >= 43
    assert tokens.holder(entry) is tokens.holder(entry.rpartition(":")[2]) is tokens.holder("") is None
    assert made("shop", "write")[0] != token


def test_entries_stand_in_lines_or_between_commas() -> None:
    entries = {scope: made(scope, scope) for scope in SCOPES}
    text = (
        "# whose\n"
        + ", ".join(entry for _, entry in entries.values())
        + "\n\n  # more\n"
        + made("x", "read")[1]
    )
    tokens = Tokens(text)
    assert [tokens.holder(token) for token, _ in entries.values()] == [
        Holder(scope, scope) for scope in SCOPES
    ]
    assert not Tokens("") and not Tokens("# none\n")


def test_each_scope_permits_what_comes_before_it() -> None:
    assert [[Holder("x", mine).may(asked) for asked in SCOPES] for mine in SCOPES] == [
        [True, False, False],
        [True, True, False],
        [True, True, True],
    ]


@pytest.mark.parametrize("text", ["secret", "a:write:abc", "a:all:" + "0" * 64, "a b:read:" + "0" * 64])
def test_an_entry_that_is_none_is_refused_and_not_shown(text: str) -> None:
    with pytest.raises(InvalidInput, match="entry 1 is not NAME:SCOPE:DIGEST") as refused:
        Tokens(text)
    assert text not in str(refused.value)


def test_the_command_makes_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["token", "shop", "--scope", "predict", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert Tokens(found["entry"]).holder(found["token"]) == Holder("shop", "predict")
    assert main(["token", "a b"]) == 2
    assert "'a b' cannot name a token" in capsys.readouterr().err
