"""Strike a run with every fault of the matrix, and print what was seen.

    python -m tests.faults                     all of them: some minutes
    python -m tests.faults --only store        those of a kind, or whose name has these words
    python -m tests.faults --phases            SIGTERM and SIGHUP at each named point of the protocol as well

In a network and with mounts of its own where the machine allows that (`unshare`, Linux): then the link itself
goes down, and a disk is full. Exit code 1 if something was seen that should not be.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.faults.matrix import FAULTS, HEAD, PHASES, Fault, Seen, Site, observe

APART = "TORCHORD_TEST_APART"


def chosen(only: list[str], *, phases: bool) -> list[Fault]:
    """The faults of these kinds, or with these words in their names."""
    all_of_them = (*FAULTS, *(PHASES if phases else ()))
    return [
        fault
        for fault in all_of_them
        if not only or any(word == fault.kind or word in fault.name for word in only)
    ]


def can_be_apart() -> bool:
    """Whether this machine lets us have a network and mounts of our own."""
    if not shutil.which("unshare") or not shutil.which("ip"):
        return False
    tried = ["unshare", "--map-root-user", "--net", "--mount", "ip", "link", "set", "lo", "up"]
    return subprocess.run(tried, capture_output=True).returncode == 0


def run(faults: list[Fault], folder: Path, *, apart: bool) -> list[Seen]:
    """Strike with one after another, and print a line of each."""
    print(HEAD, flush=True)
    found: list[Seen] = []
    site = Site(folder / "0", apart=apart)
    try:
        for number, fault in enumerate(faults, 1):
            if fault.apart and not apart:
                print(f"| {fault.kind} | {fault.name} | | skipped: no network and mounts of its own | | | |")
                continue
            try:
                seen = observe(site, fault)
            except Exception as error:  # noqa: BLE001 - the others are tried as well
                seen = Seen(fault, wrong=f"{type(error).__name__}: {error}")
                site.close()
                site = Site(folder / str(number), apart=apart)
            found.append(seen)
            print(seen.row(), flush=True)
    finally:
        site.close()
    return found


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD", help="kinds, or words of names")
    parser.add_argument("--phases", action="store_true", help="signals at each named point, too")
    parser.add_argument("--logs", type=Path, help="keep the logs in this directory")
    options = parser.parse_args()
    apart = os.environ.get(APART) == "1"
    if not apart and can_be_apart():
        command = [sys.executable, "-m", "tests.faults", *sys.argv[1:]]
        inside = ["unshare", "--map-root-user", "--net", "--mount", "sh", "-c"]
        order = 'ip link set lo up && exec "$@"'
        os.execvpe("unshare", [*inside, order, "sh", *command], {**os.environ, APART: "1"})
    with TemporaryDirectory(prefix="torchord-faults-") as scratch:
        found = run(chosen(options.only, phases=options.phases), options.logs or Path(scratch), apart=apart)
    wrong = [seen for seen in found if seen.wrong]
    print(f"\n{len(found)} faults, {len(wrong)} with something that should not be")
    return 1 if wrong or not found else 0


if __name__ == "__main__":
    sys.exit(main())
