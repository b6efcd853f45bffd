"""A fuzzer that looks for inputs which reach code of torchord that no other has reached.

    python -m tests.fuzzing --list                                     names of the parsers
    python -m tests.fuzzing "a parser" -max_total_time=60              and options of libFuzzer

It needs atheris (`pip install atheris`), which has wheels for CPython on Linux and is no dependency of the
tests: they try inputs of the same strategies without it. What it finds is shown as the test would show it,
and goes into a test of its own. The exit status is libFuzzer's: 0 when the time is over.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str]) -> int:
    """Fuzz one parser; returns only if that could not be begun."""
    try:
        import atheris
    except ImportError:
        print("no atheris: pip install atheris (CPython on Linux)", file=sys.stderr)
        return 2
    with atheris.instrument_imports(include=["torchord"]):
        from tests.support.fuzzing import parsers
    known = parsers()
    if not arguments or arguments[0] not in known:
        print("\n".join(known))
        return 0 if list(arguments) == ["--list"] else 2
    harness = known[arguments[0]].harness(1, same=False)
    atheris.Setup([sys.argv[0], *arguments[1:]], harness.hypothesis.fuzz_one_input)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
