"""Figures of records that JSON has no numbers for."""

import json
import math
from typing import Any

import pytest

from tests.support.control import entry
from torchord.cache.ledger.figures import for_others, from_text, tagged, to_text, untagged
from torchord.cache.ledger.records import LedgerEntry

NAN, INF = math.nan, math.inf


def strict(text: str) -> Any:
    """What a reader makes of it who knows no NaN."""

    def refuse(word: str) -> Any:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize(
    "value",
    [
        {"loss": NAN, "all": [1.5, INF, {"least": -INF}], "figure": 0.25},
        {"loss": 1.0},
        {"figure": "nan of it", "deep": [{"figure": None}]},
        INF,
    ],
)
def test_figures_come_back_from_strict_json(value: Any) -> None:
    text = to_text(value)
    strict(text)
    assert repr(from_text(text)) == repr(from_text(text.encode())) == repr(value)
    assert repr(untagged(strict(json.dumps(tagged(value))))) == repr(value)


def test_other_programs_read_null() -> None:
    assert strict(for_others({"loss": NAN, "lr": (INF, 0.5)})) == {"loss": None, "lr": [None, 0.5]}


def test_records_of_before_are_read() -> None:
    assert repr(from_text('{"loss": NaN, "norm": -Infinity}')) == repr({"loss": NAN, "norm": -INF})


def test_an_entry_of_a_skipped_step_keeps_its_seal() -> None:
    text = entry(1, [], loss=NAN, grad_norm=INF, skipped=True).to_json()
    strict(text)
    found = LedgerEntry.from_json(text)
    assert math.isnan(found.loss) and found.grad_norm == INF
    assert found.seal == found.computed_seal()
