"""The figures of all benchmarks in one table, each beside its anchor, from `results/*.json`.

    python -m benchmarks --table

Measures nothing. A row says what was measured, on what, the figure (median), the worst of the rounds where
there are several, the anchor of the same run, and the target where there is one. A benchmark that has left
no file is named as missing.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import RESULTS


@dataclass(frozen=True)
class Row:
    """One line of the table; every cell is text."""

    benchmark: str
    what: str
    figure: str
    worst: str = ""
    anchor: str = ""
    target: str = ""


def _step(found: dict[str, Any]) -> Iterator[Row]:
    medians: dict[int, float] = {}
    for shards, methods in found["milliseconds"].items():
        ours = [turn["median"] for turn in methods["torchord"]]
        medians[int(shards)] = statistics.median(ours)
        yield Row(
            "step",
            f"no-op step, K={shards}",
            f"{medians[int(shards)]:.2f} ms",
            f"{max(ours):.2f} ms",
            f"by hand in redis-py {statistics.median(methods['floor']):.2f} ms",
            {"2": "3 ms", "8": "6 ms"}.get(shards, ""),
        )
    least, most = min(medians), max(medians)
    if least < most:
        each = (medians[most] - medians[least]) / (most - least)
        yield Row("step", "each further task", f"{each:.2f} ms", target="0.6 ms")


def _flat(found: dict[str, Any]) -> Iterator[Row]:
    slopes = found["slope_bytes_a_step_second_half"]
    for name in sorted(set(slopes) - {"keys"}):
        yield Row("flat", f"growth of {name}, {found['steps']:,} steps", f"{slopes[name]:.1f} bytes a step")


def _cache(found: dict[str, Any]) -> Iterator[Row]:
    for row in sorted(found["rows"], key=lambda row: (row["server"], row["megabytes"], row["way"])):
        yield Row(
            "cache",
            f"{row['way']} {row['megabytes']:,} MB, {row['server']}",
            f"{row['gigabytes_per_second']['chunk store']:.2f} GB/s",
            "",
            f"{row['ratio_to_bare_socket']:.2f} of a bare socket (worst round "
            f"{row['ratio_in_the_worst_round']:.2f}); "
            f"{row['ratio_to_checked_socket']:.2f} of one with checksums",
            "0.80",
        )


def _ddp(found: dict[str, Any]) -> Iterator[Row]:
    wanted = {"mlp": "0.60", "cnn": "0.90", "gpt": "0.90"}
    for workload, rows in found["milliseconds"].items():
        middle = {name: statistics.median(values) for name, values in rows.items()}
        for name in ("torchord", "local16", "torchft", "hivemind"):
            if name in middle:
                target = {"torchord": f"1.00; {wanted[workload]}", "local16": "; 0.97"}.get(name, "")
                yield Row(
                    "ddp",
                    f"{workload}: {'torchord, H=16' if name == 'local16' else name}",
                    f"{middle[name]:.1f} ms",
                    f"{max(rows[name]):.1f} ms",
                    f"{middle['ddp'] / middle[name]:.2f} x DDP; "
                    f"{middle['limit'] / middle[name]:.2f} of no communication",
                    target,
                )


def _tree(found: dict[str, Any]) -> Iterator[Row]:
    rows = {(row["shards"], row["tree"]): row for row in found["rows"]}
    for shards in sorted({shards for shards, _ in rows}):
        with_tree, without = rows[shards, True], rows[shards, False]
        yield Row(
            "tree",
            f"server's reads and CPU a step, K={shards}",
            f"{with_tree['server_bytes'] / 1e6:.1f} MB, {with_tree['server_cpu_seconds'] * 1e3:.1f} ms",
            "",
            f"no tree {without['server_bytes'] / 1e6:.1f} MB, {without['server_cpu_seconds'] * 1e3:.1f} ms",
            "flat",
        )


def _rest(found: dict[str, Any]) -> Iterator[Row]:
    for host_cache in ("off", "on"):
        ours, whole = (
            found["bytes_a_step"][f"same-host tier {host_cache}, {stored}"]
            for stored in ("what moves", "stored whole")
        )
        yield Row(
            "rest",
            f"adapters of 0.06 MB on 12.7 MB, in and out a step, same-host tier {host_cache}",
            f"{ours['input'] / 1e6:.2f} MB, {ours['output'] / 1e6:.2f} MB",
            "",
            f"stored whole {whole['input'] / 1e6:.2f} MB, {whole['output'] / 1e6:.2f} MB",
        )


def _security(found: dict[str, Any]) -> Iterator[Row]:
    for case, modes in found["milliseconds"].items():
        anchor = statistics.median(modes["no keys"])
        for mode, times in modes.items():
            if mode != "no keys":
                median = statistics.median(times)
                yield Row(
                    "security",
                    f"{case}: {mode}",
                    f"{median:.2f} ms, {median / anchor:.2f} times",
                    f"{max(times):.2f} ms",
                    f"no keys {anchor:.2f} ms",
                )


def _scale(found: dict[str, Any]) -> Iterator[Row]:
    for row in found["rows"]:
        step = row["step"]
        yield Row(
            "scale",
            f"CPU of a step with {row['workers']} Clients",
            f"server {step['server_cpu'] * 1e3:.1f} ms, Redis {step['redis_cpu'] * 1e3:.1f} ms",
        )


def _straggler(found: dict[str, Any]) -> Iterator[Row]:
    for shards, fleets in found["steps"].items():
        slow, three = fleets["3 and a slow"], fleets["3 equal"]
        yield Row(
            "straggler",
            f"a Client ten times slower beside three, K={shards}",
            f"{slow['median'] * 1e3:.0f} ms",
            f"{slow['worst'] * 1e3:.0f} ms",
            f"three alone {three['median'] * 1e3:.0f} ms: x {slow['median'] / three['median']:.2f}",
            "x 1",
        )


def _codecs(found: dict[str, Any]) -> Iterator[Row]:
    for row in found["rows"]:
        if row["variant"] != "none" and row["points_lost"] is not None:
            seeds = len(row["points_lost_each_seed"])
            yield Row(
                "codecs",
                row["variant"],
                f"{row['times_fewer_bytes']:.1f} x fewer bytes, {row['points_lost']:+.2f} points lost",
                f"{max(row['points_lost_each_seed']):+.2f} points",
                f"none, the same {seeds} seed{'s' if seeds > 1 else ''}",
                "100 x, 0.3 points",
            )


def _accuracy(found: dict[str, Any]) -> Iterator[Row]:
    rows = found.get("to_target", {})
    for name, row in rows.items():
        kind, _, batch = name.partition(" ")
        anchors = dict.fromkeys((f"ddp {batch}", found["best"].get("ddp")))
        shown = [
            f"{row['seconds'] / rows[each]['seconds']:.2f} of {each}" for each in anchors if each in rows
        ]
        yield Row(
            "accuracy",
            f"90 % on Fashion-MNIST, {name}",
            f"{row['seconds']:.1f} s, {row['megabytes']:,.0f} MB",
            f"{row['worst_seconds']:.1f} s",
            "" if kind == "ddp" else "; ".join(shown),
            "0.70" if kind in ("local", "diloco") else "",
        )
    yield from _whole_runs(found.get("whole", {}))
    for seed, row in found.get("diloco", {}).items():
        if len(row) == 2:
            yield Row(
                "accuracy",
                f"DiLoCo at H=50, seed {seed}",
                f"{row['diloco']:.2%}",
                "",
                f"sync {row['sync']:.2%}: {100 * (row['diloco'] - row['sync']):+.2f} points",
                "-0.5 points",
            )


def _whole_runs(found: dict[str, Any]) -> Iterator[Row]:
    took = {name: [row["seconds"] for row in rows.values()] for name, rows in found.items()}
    anchor = min(
        (statistics.median(each) for name, each in took.items() if name.startswith("ddp")), default=0
    )
    for name, each in took.items():
        ours = not name.startswith("ddp")
        yield Row(
            "accuracy",
            f"90 % on Fashion-MNIST in whole runs, {name}",
            f"{statistics.median(each):.1f} s",
            f"{max(each):.1f} s",
            f"{statistics.median(each) / anchor:.2f} of DDP's best" if ours and anchor else "",
            "0.70" if ours else "",
        )


def _gpu(found: dict[str, Any]) -> Iterator[Row]:
    for workload, rows in found["milliseconds"].items():
        loop = statistics.median(rows["loop"])
        for what, values in rows.items():
            busy = [share for share in found["busy_percent"][workload][what] if share is not None]
            shown = f", GPU {statistics.median(busy):.0f} % busy" if busy else ""
            yield Row(
                "gpu",
                f"{workload} {found['precision']} on {found['device']['name']}: {what}",
                f"{statistics.median(values):.2f} ms{shown}",
                f"{max(values):.2f} ms",
                ""
                if what == "loop"
                else f"{loop / statistics.median(values):.2f} x the loop without a queue",
                "95 % busy" if "H=" in what else "",
            )


def _chaos(found: dict[str, Any]) -> Iterator[Row]:
    kills = sum(found["kills"].values())
    ended = "the same bits" if found["bits_equal"] and found["audit_clean"] else "NOT the same bits or audit"
    for kind in ("all", "spare ready", "no spare"):
        seconds = found["seconds"][kind]["recovery"]
        yield Row(
            "chaos",
            f"recovery, {kills} kills: {kind} ({seconds['n']})",
            f"{seconds['median']:.2f} s",
            f"{seconds['max']:.2f} s",
            f"{found['steps']} steps ended with {ended}",
            "3 s",
        )


def _overlap(found: dict[str, Any]) -> Iterator[Row]:
    for place, modes in found["rounds"].items():
        workload, _, megabits = place.partition(" ")
        rounds = {
            name: [statistics.median(turn["seconds"]) for turn in turns] for name, turns in modes.items()
        }
        middle = {name: statistics.median(values) for name, values in rounds.items()}
        for name in sorted(set(rounds) - {"unlimited"}, key=lambda name: middle[name], reverse=True):
            against = (
                [f"{middle[name] / middle['off']:.2f} of off"] if "off" in middle and name != "off" else []
            )
            if "unlimited" in middle:
                against.append(f"no limit {middle['unlimited'] * 1e3:,.0f} ms")
            yield Row(
                "overlap",
                f"{workload}, links of {int(megabits):,} Mbit/s: {name}",
                f"{middle[name] * 1e3:,.0f} ms",
                f"{max(rounds[name]) * 1e3:,.0f} ms",
                "; ".join(against),
            )


TABLES: dict[str, Callable[[dict[str, Any]], Iterator[Row]]] = {
    "step": _step,
    "ddp": _ddp,
    "overlap": _overlap,
    "cache": _cache,
    "codecs": _codecs,
    "accuracy": _accuracy,
    "tree": _tree,
    "rest": _rest,
    "security": _security,
    "scale": _scale,
    "straggler": _straggler,
    "flat": _flat,
    "gpu": _gpu,
    "chaos": _chaos,
}


def table(folder: Path = RESULTS) -> str:
    """The table in Markdown, with the machine of each file below it."""
    lines = ["| benchmark | what | figure | worst | anchor in the same run | target |", "|" + " --- |" * 6]
    notes: list[str] = []
    for name, rows in TABLES.items():
        path = folder / f"{name}.json"
        if not path.exists():
            notes.append(f"{name}: not measured yet")
            continue
        found = json.loads(path.read_text())
        for row in rows(found):
            cells = (row.benchmark, row.what, row.figure, row.worst, row.anchor, row.target)
            lines.append(f"| {' | '.join(cells)} |")
        where = found["machine"]
        notes.append(
            f"{name}: {where['processor']}, {where['cores']} cores, {where['capability']}, "
            f"torch {where['torch']}, Python {where['python']}"
        )
    return "\n".join([*lines, "", *notes])
