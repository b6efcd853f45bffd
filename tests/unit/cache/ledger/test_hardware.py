"""Which environments may compute a run, by what its head says."""

from __future__ import annotations

import pytest

from torchord.cache.ledger.hardware import fits, is_portable, wanted

NATIVE, SHARED = "torch 2.13, cpu AVX512, x86_64 AuthenticAMD", "torch 2.13, portable x86-64"


@pytest.mark.parametrize(
    ("environment", "here", "may"),
    [
        ("", NATIVE, True),
        ("", SHARED, True),
        (NATIVE, NATIVE, True),
        (NATIVE, SHARED, False),
        ("portable", SHARED, True),
        ("portable", NATIVE, False),
        (SHARED, SHARED, True),
        (SHARED, "torch 2.12, portable x86-64", False),
    ],
)
def test_who_may_compute(environment: str, here: str, may: bool) -> None:
    assert fits(environment, here) is may


def test_what_is_portable() -> None:
    assert is_portable("portable") and is_portable(SHARED) and not is_portable(NATIVE)
    assert not is_portable("torch 2.13, cpu AVX2, x86_64 portable")


def test_runs_of_before_want_nothing() -> None:
    assert wanted({}) == wanted({"config": {}}) == wanted({"config": {"hardware": "native"}}) == ""
    assert wanted({"config": {"hardware": "portable"}}) == "portable"
