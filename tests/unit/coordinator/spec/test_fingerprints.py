from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import pytest

from torchord.coordinator.spec.fingerprints import digests_of, fingerprint, skewed

BASE = """# A comment at the top.
\"\"\"A docstring.\"\"\"

X = "a # that is no comment"


def f(a, b=(1,
            2)):
    \"\"\"What it does.

    Over several lines.
    \"\"\"
    return a + X  # why


class C:
    \"\"\"Only a docstring.\"\"\"
"""


def spec_of(name: str) -> dict[str, Any]:
    entry = {"target": f"{name}:f"}
    torchs = {"target": "torch.nn.functional:cross_entropy"}
    return {"model": entry, "dataset": entry, "optimizer": {"target": "torch.optim:SGD"}, "loss": torchs}


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function (source) -> fingerprint of a module that holds it."""
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "mine_to_print.py"

    def made(source: str | bytes, **how: Any) -> str:
        file.write_bytes(source.encode() if isinstance(source, str) else source)
        found = fingerprint(spec_of(file.stem), **how)
        assert file.stem not in sys.modules
        return found

    return made


@pytest.mark.parametrize(
    "same",
    [
        BASE.replace("# A comment at the top.", "# Another one.\n# And more."),
        BASE.replace("# why", ""),
        BASE.replace("A docstring.", "Another."),
        BASE.replace("    Over several lines.\n", ""),
        BASE.replace("    return", "\n\n    return"),
        BASE.replace("return a + X", "return a + X   "),
        BASE.replace("\n", "\r\n"),
    ],
    ids=[
        "comment",
        "end of line",
        "docstring",
        "shorter docstring",
        "blank lines",
        "white space",
        "line ends",
    ],
)
def test_what_does_nothing_does_not_count(module: Any, same: str) -> None:
    assert same != BASE and module(same) == module(BASE)


@pytest.mark.parametrize(
    "other",
    [
        BASE.replace("a + X", "X + a"),
        BASE.replace("# that is no comment", "# that is none"),
        BASE.replace("2)", "3)"),
        BASE + "f(1)\n",
        BASE.replace("    return a + X  # why", "    return a"),
    ],
    ids=["code", "string", "default", "statement", "result"],
)
def test_what_does_something_counts(module: Any, other: str) -> None:
    assert other != BASE and skewed(module(other), module(BASE)) == ["mine_to_print"]


@pytest.mark.parametrize(
    "source",
    [
        "def f(): return 1  # x\n",
        "# -*- coding: latin-1 -*-\nx = 'caf\u00e9'  # c\n".encode("latin-1"),
        "x = f'{1 + 1}#{2}'  # c\n",
        "def broken(:\n",
        "",
        '"""Alone."""\n',
        "def f(): 'doc'; return 1\n",
    ],
)
def test_any_source_has_a_digest(module: Any, source: str | bytes) -> None:
    first = module(source)
    assert first.startswith("mine_to_print=code:") and module(source) == first


def test_a_run_of_before_is_compared_by_all_bytes(module: Any) -> None:
    old = f"mine_to_print={hashlib.blake2b(BASE.encode(), digest_size=8).hexdigest()}"
    assert module(BASE, like=old) == old
    assert skewed(old, module(BASE.replace("# why", ""), like=old)) == ["mine_to_print"]


def test_modules_that_only_one_side_has_are_not_compared(module: Any) -> None:
    found = module(BASE)
    assert digests_of(found).keys() == {"mine_to_print"}
    assert skewed(found, found) == [] and skewed(found, "") == []
    assert fingerprint({**spec_of("json"), "evaluation": {"target": "absent_module:f"}}) == ""
