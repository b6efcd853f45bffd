"""Where the time of a test session went: a table of its slowest files, each with its slowest test."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Protocol

FILES = 25


class Phase(Protocol):
    """What pytest reports of one phase of a test: its setup, the test itself, or its teardown."""

    nodeid: str
    duration: float


def table_of_times(phases: Iterable[Phase], *, files: int = FILES) -> list[str]:
    """The lines of a Markdown table, slowest file first, and one for the rest.

    Args:
        phases: of every test; what a test needs (a cluster, say) counts as its own time.
        files: how many files have a line of their own.
    """
    seconds: Counter[str] = Counter()
    for phase in phases:
        seconds[phase.nodeid] += phase.duration
    tests: dict[str, list[str]] = {}
    for test in seconds:
        tests.setdefault(test.partition("::")[0], []).append(test)
    total = {file: sum(seconds[test] for test in its) for file, its in tests.items()}
    ordered = sorted(total, key=lambda file: (-total[file], file))
    lines = ["| file | tests | seconds | its slowest test | seconds |", "| --- | ---: | ---: | --- | ---: |"]
    for file in ordered[:files]:
        slowest = max(tests[file], key=lambda test: seconds[test])
        name = slowest.partition("::")[2].partition("[")[0]
        lines.append(f"| {file} | {len(tests[file])} | {total[file]:.1f} | {name} | {seconds[slowest]:.1f} |")
    rest = ordered[files:]
    if rest:
        count, took = sum(len(tests[file]) for file in rest), sum(total[file] for file in rest)
        lines.append(f"| {len(rest)} more | {count} | {took:.1f} | | |")
    lines.append(f"| all {len(total)} | {len(seconds)} | {sum(total.values()):.1f} | | |")
    return lines
