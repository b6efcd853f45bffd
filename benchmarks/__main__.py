"""Every benchmark, one after the other: `python -m benchmarks [NAME ...]` (`make bench`)."""

from __future__ import annotations

import argparse
import subprocess
import sys

from benchmarks.summary import table

BENCHMARKS = {
    "step": "what a step costs when there is nothing to compute",
    "ddp": "exact steps and local steps beside DDP-gloo, torchft, hivemind and no communication",
    "overlap": "steps between hosts, with transfers that run while something is computed and without",
    "flat": "whether anything accumulates over 10,000 steps",
    "cache": "the chunk store against a bare socket",
    "straggler": "what a worker that is ten times slower costs a run",
    "share": "workers by weight for two runs; a prediction's wait beside a large one",
    "tree": "what the training server reads a step, with partial sums and without",
    "rest": "what a step moves of a model that is mostly frozen",
    "security": "what keys and digests cost a step",
    "scale": "2 to 256 simulated Clients: what a step costs, and what gives out first",
    "gpu": "one GPU, one and two workers beside the plain loop; skipped where there is none",
    "portable": "whether portable kernels give the same bits on emulated processors, and their price",
    "codecs": "bytes, accuracy and seconds of each gradient codec",
    "accuracy": "seconds and bytes to 90 % test accuracy beside DDP; DiLoCo beside exact sync",
}


def main() -> int:
    """Run the named benchmarks, or all; returns 1 if one failed."""
    listed = "\n".join(f"  {name:<10}{claim}" for name, claim in BENCHMARKS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", epilog=listed, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="which; all if none is given")
    parser.add_argument("--table", action="store_true", help="measure nothing; print the figures there are")
    options = parser.parse_args()
    if options.table:
        print(table())
        return 0
    unknown = [name for name in options.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"no benchmark {unknown[0]!r}; there are {', '.join(BENCHMARKS)}")
    failed = []
    for name in options.names or BENCHMARKS:
        print(f"== {name}: {BENCHMARKS[name]}", flush=True)
        if subprocess.run([sys.executable, "-m", f"benchmarks.bench_{name}"], check=False).returncode:
            failed.append(name)
    print(table())
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
