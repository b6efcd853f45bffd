"""Whatever a parser is given, it refuses in order: see tests/support/fuzzing.py."""

from __future__ import annotations

import resource
from collections.abc import Callable

import pytest

from tests.support.fuzzing import Parser, parsers

SHORT = 25
PARSERS = parsers()
MOST_MORE_NBYTES = 512 << 20


@pytest.mark.parametrize("name", PARSERS)
def test_only_torchords_errors_leave_a_parser(
    name: str, request: pytest.FixtureRequest, record_property: Callable[[str, object], None]
) -> None:
    """Of `--fuzz` inputs, others each time; of 25, always the same, without it."""
    wanted = request.config.getoption("--fuzz")
    refused: list[str] = []
    parser = PARSERS[name]

    def read(found: object) -> None:
        try:
            parser.read(found)
        except BaseException:
            refused.append("")
            raise

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    Parser(parser.inputs, read).harness(wanted or SHORT, same=wanted is None)()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < MOST_MORE_NBYTES
    if wanted:
        record_property("summary", f"{name}: {wanted} inputs, {len(refused)} refused in order")
