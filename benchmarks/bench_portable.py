"""Are the bits of portable kernels the same on unlike processors, and what do they cost?

    python -m benchmarks.bench_portable                    every operator, model and processor; minutes
    python -m benchmarks.bench_portable --small            a dozen operators, one model, two other processors

Claim: with `hardware="portable"` all operators and models of the list (`portable_digests`) have the same
bits on this machine and on others, and without it they have not. Other processors are emulated by qemu-user
(Debian's package of that name) where it is installed: Intel and AMD models with AVX2, without AVX-512, with
caches of their own. Beside them this machine's libraries are limited by what they read from the environment.
The price is a step's seconds with portable kernels over those without, both on one thread, in turn.

Bias: an emulator executes the instructions of a processor, not its mistakes; approximations that the
instruction set does not define are exact there (which is how operators that depend on them are found). Each
machine that a run really meets is looked at by the self-test.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from benchmarks import RESULTS, machine, processor
from torchord.cache.settings import PORTABLE_KERNELS

MODELS = ("Haswell", "Skylake-Client", "EPYC", "EPYC-Milan")
SMALL_MODELS = ("Haswell", "EPYC")
QEMU = "qemu-x86_64"
_TOGETHER = 2
_ROUNDS = 3

Digests = dict[str, dict[str, str]]


@dataclass(frozen=True)
class Machine:
    """One column of the matrix: a processor, or this one limited.

    Attributes:
        name: of the column.
        portable: whether it has portable kernels.
        env: what its process has in its environment.
        model: qemu's name of an emulated processor; "" for this one.
    """

    name: str
    portable: bool = True
    env: Mapping[str, str] = field(default_factory=dict)
    model: str = ""

    def run(self, *arguments: str) -> str:
        """What `portable_digests` prints on it.

        Raises:
            subprocess.CalledProcessError: it has failed; what it wrote to stderr is in the error.
        """
        env = {name: value for name, value in os.environ.items() if name not in PORTABLE_KERNELS}
        env |= {"TORCHORD_HARDWARE": "portable" if self.portable else "native"}
        env |= {**(PORTABLE_KERNELS if self.portable else {}), **self.env}
        emulated = [QEMU, "-cpu", self.model] if self.model else []
        command = [*emulated, sys.executable, "-m", "benchmarks.portable_digests", *arguments]
        return subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout

    def digests(self, *, small: bool) -> Digests:
        """The digests of operators and models."""
        found: Digests = json.loads(self.run(*["--small"] * small))
        return found


_NO_AVX512 = "glibc.cpu.hwcaps=-AVX512F,-AVX512VL,-AVX512BW,-AVX512DQ,-AVX512CD"
HERE = Machine("this one")
LIMITED = (
    Machine("libm without AVX-512", env={"GLIBC_TUNABLES": _NO_AVX512}),
    Machine("MKL told AVX2", env={"MKL_ENABLE_INSTRUCTIONS": "AVX2"}),
)
NATIVE = (
    Machine("as it comes", portable=False),
    Machine("ATen avx2", portable=False, env={"ATEN_CPU_CAPABILITY": "avx2"}),
    Machine("ATen default", portable=False, env={"ATEN_CPU_CAPABILITY": "default"}),
    Machine("oneDNN AVX2", portable=False, env={"ONEDNN_MAX_CPU_ISA": "AVX2"}),
    Machine("MKL AVX2", portable=False, env={"MKL_CBWR": "AVX2"}),
    Machine(
        "all pinned, none replaced",
        portable=False,
        env={name: value for name, value in PORTABLE_KERNELS.items() if name != "NPY_DISABLE_CPU_FEATURES"},
    ),
)


def machines(*, small: bool) -> list[Machine]:
    """The columns: this machine first, then others with portable kernels, then some without."""
    emulated: list[Machine] = []
    if shutil.which(QEMU):
        models = SMALL_MODELS if small else MODELS
        emulated = [Machine(f"emulated {model}", model=model) for model in models]
    limited = () if small and emulated else LIMITED
    return [HERE, *limited, *emulated, *(NATIVE[:1] if small else NATIVE)]


def matrix(*, small: bool) -> dict[str, Digests]:
    """The digests of each column by its name; as many at a time as there are cores."""
    columns = machines(small=small)
    with ThreadPoolExecutor(_TOGETHER) as pool:
        found = pool.map(lambda column: column.digests(small=small), columns)
        return {column.name: digests for column, digests in zip(columns, found, strict=True)}


def differing(found: Mapping[str, Digests], names: Iterable[str]) -> dict[str, list[str]]:
    """Operators and models of some columns that are not as in the first one, by column."""
    first = found[HERE.name]
    return {
        name: [
            row
            for kind, rows in first.items()
            for row, digest in rows.items()
            if found[name][kind][row] != digest
        ]
        for name in names
    }


def table(found: Mapping[str, Digests]) -> str:
    """A row for each operator and model; "=" where a column has the digest of this machine's portable one."""
    first, *others = found
    lines = [f"| | {' | '.join([f'{first}, portable', *others])} |", "| --- " * (len(found) + 1) + "|"]
    for kind, rows in found[first].items():
        for row, digest in rows.items():
            cells = [other if (other := found[name][kind][row]) != digest else "=" for name in others]
            lines.append(f"| {row} | `{digest}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def price() -> dict[str, tuple[float, float]]:
    """Seconds of a step of each workload, (native, portable): medians of rounds that take turns."""
    rounds: list[tuple[dict[str, float], dict[str, float]]] = []
    for number in range(_ROUNDS):
        native, portable = (json.loads(each.run("--speed")) for each in (NATIVE[0], HERE))
        rounds.append((native, portable))
        print(f"speed, round {number + 1} of {_ROUNDS}", file=sys.stderr)
    return {
        name: (
            statistics.median(native[name] for native, _ in rounds),
            statistics.median(portable[name] for _, portable in rounds),
        )
        for name in rounds[0][0]
    }


def main() -> int:
    """Print the matrix and the price; 1 if a column with portable kernels differs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_portable")
    parser.add_argument("--small", action="store_true", help="a dozen operators, one model, no price")
    options = parser.parse_args()
    if not shutil.which(QEMU):
        print(f"no {QEMU} (Debian's qemu-user): this processor alone, limited by its libraries' variables")
    found = matrix(small=options.small)
    shared = [each.name for each in machines(small=options.small) if each.portable]
    print(f"on {processor()}; = has the digest of this machine with portable kernels\n\n{table(found)}\n")
    for name, rows in differing(found, found).items():
        kind = "portable" if name in shared else "native"
        print(f"{kind:<9} {name:<28} {len(rows)} differ" + (f": {', '.join(rows)}" if rows else ""))
    record: dict[str, object] = {"machine": machine(), "digests": found}
    if not options.small:
        seconds = price()
        print("\n| ms a step, one thread | native | portable | price |\n| --- | --- | --- | --- |")
        for name, (native, portable) in seconds.items():
            print(f"| {name} | {1e3 * native:.1f} | {1e3 * portable:.1f} | {portable / native:.2f} |")
        record["seconds"] = seconds
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "portable.json").write_text(json.dumps(record, indent=1) + "\n")
    return 1 if any(differing(found, shared).values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
