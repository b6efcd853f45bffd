"""Runs differ in the entries in which their specs differ, and in no other."""

from __future__ import annotations

from torchord.coordinator.pages.comparing import ABSENT, differences

BASE = {
    "recipe": {"model": {"target": "m:Net", "kwargs": {"hidden": 64}}, "collate": None},
    "config": {"seed": 0, "clip_norm": None},
    "fingerprint": "m=1",
}


def test_nested_entries_are_named_by_their_path() -> None:
    other = {
        "recipe": {"model": {"target": "m:Net", "kwargs": {"hidden": 128, "depth": [1, 2]}}, "collate": None},
        "config": {"seed": 0, "clip_norm": 1.0},
        "fingerprint": "m=2",
    }
    assert differences([BASE, other]) == [
        {"name": "config.clip_norm", "values": ["null", "1.0"]},
        {"name": "recipe.model.kwargs.depth", "values": [ABSENT, "[1, 2]"]},
        {"name": "recipe.model.kwargs.hidden", "values": ["64", "128"]},
    ]


def test_equal_specs_and_a_single_one_differ_in_nothing() -> None:
    assert differences([BASE, BASE]) == differences([BASE]) == differences([]) == []
    assert differences([{}, {}, {"config": {}}]) == []
