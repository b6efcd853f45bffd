"""What a report says: one HTML page that loads nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from torchord.cache.ledger.figures import for_others
from torchord.coordinator.drawing.picture import picture
from torchord.coordinator.drawing.svg import COLOURS
from torchord.coordinator.messages.waits import duration

_STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1 small { font-weight: 400; opacity: .7; font-size: 60% } h2 { margin-top: 2rem; font-size: 1.1rem }
table { border-collapse: collapse; width: 100%; font-size: 13px }
td, th { text-align: left; vertical-align: top; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #8884 }
pre, code { font: 12px/1.5 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere }
.bad { color: #c62828 } .note { opacity: .7; font-size: 13px }
"""
_LANE, _LABEL, _WIDTH = 16, 190, 900
_ORANGE = COLOURS[1]


def page(
    run: Mapping[str, Any],
    curves: Mapping[str, Any],
    timeline: Mapping[str, Any],
    audit: Mapping[str, Any] | None,
) -> str:
    """The page.

    Args:
        run: as `torchord.coordinator.pages.overview` has it.
        curves: as `torchord.coordinator.pages.curves` has them.
        timeline: as `torchord.coordinator.pages.timeline` has it.
        audit: as `Pages.audit` has it; None of a run that Redis does not know.
    """
    name = str(run["name"])
    parts = [
        f"<h1>{escape(name)} <small>{escape(str(run['state']))}</small></h1>",
        f'<p class="note">written {_moment(run["now"])} by torchord</p>',
        _failure(run["failure"]),
        "<h2>Where it stands</h2>",
        _table((), _facts(run)),
        "<h2>Curves</h2>",
        picture(name, curves).svg(),
        "<h2>Evaluations</h2>",
        _table(("version", "metrics"), [(version, _figures(found)) for version, found in run["evaluations"]]),
        "<h2>Who computed which shard</h2>",
        _lanes(timeline),
        _table(
            ("worker", "shards", "seconds", "again"),
            [(one["worker"], one["shards"], f"{one['seconds']:.3g}", one["again"]) for one in run["crew"]],
        ),
        "<h2>Audit</h2>",
        _audit(audit),
        "<h2>Events</h2>",
        _table(
            ("when", "what", ""),
            [(_moment(event["at"]), event["type"], _words(event["data"])) for event in run["events"]],
        ),
        "<h2>Recipe</h2>",
        _table((), [(key, _code(value)) for key, value in run["recipe"].items()]),
        "<h2>Config</h2>",
        _table((), [(key, _code(value)) for key, value in run["config"].items()]),
    ]
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(name)}</title><style>{_STYLE}</style></head><body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


class _Html(str):
    """Text that is HTML already."""


def _table(titles: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [
        "<tr>"
        + "".join(f"<td>{cell if isinstance(cell, _Html) else escape(str(cell))}</td>" for cell in row)
        + "</tr>"
        for row in rows
    ]
    if not lines:
        return '<p class="note">none</p>'
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    return f"<table>{f'<tr>{head}</tr>' if head else ''}{''.join(lines)}</table>"


def _facts(run: Mapping[str, Any]) -> list[tuple[str, object]]:
    total = run["total"] if run["total"] is not None else "?"
    facts: list[tuple[str, object]] = [("steps", f"{run['version']} of {total}")]
    if run["reason"]:
        facts.append(("ended", run["reason"]))
    if run["loss"] is not None:
        facts.append(("loss of the last step", f"{run['loss']:.6g}"))
    if run["metrics"]:
        facts.append((f"evaluation of version {run['evaluated']}", _figures(run["metrics"])))
    if run["submitted_at"]:
        facts.append(("submitted", _moment(run["submitted_at"])))
    if run["committed_at"]:
        facts.append(("last commit", _moment(run["committed_at"])))
        if run["submitted_at"]:
            facts.append(
                ("from submission to it", duration(max(0.0, run["committed_at"] - run["submitted_at"])))
            )
    facts.append(("computed with", run["environment"] or "unknown"))
    facts += [(what, count) for what, count in run["counted"].items() if count]
    facts.append(("checkpoints", ", ".join(map(str, run["checkpoints"])) or "none seen from here"))
    return facts


def _failure(failure: Mapping[str, Any]) -> str:
    if not failure["message"]:
        return ""
    log = "\n".join(failure.get("log") or ())
    return (
        f'<h2 class="bad">Failed</h2><p>{escape(failure["message"])}</p>'
        + (f"<pre>{escape(failure['traceback'])}</pre>" if failure["traceback"] else "")
        + (f'<p class="note">last lines of the worker\'s log</p><pre>{escape(log)}</pre>' if log else "")
    )


def _audit(audit: Mapping[str, Any] | None) -> str:
    if audit is None:
        return '<p class="note">Redis does not know the run any more, so there is nothing to audit</p>'
    problems = "".join(f"<li>{escape(problem)}</li>" for problem in audit["problems"])
    kind = "" if audit["ok"] else ' class="bad"'
    return f"<p{kind}>{escape(audit['said'])}</p>" + (f"<ul>{problems}</ul>" if problems else "")


def _lanes(timeline: Mapping[str, Any]) -> str:
    """The timeline as SVG."""
    lanes, first, last = timeline["lanes"], timeline["first"], timeline["last"]
    if not lanes:
        return '<p class="note">no shard is computed yet</p>'
    scale = (_WIDTH - _LABEL) / max(1, last - first + 1)
    height = _LANE * (len(lanes) + 1)

    def across(step: float) -> float:
        return float(_LABEL + (step - first + 1) * scale)

    parts = []
    for place, lane in enumerate(lanes):
        top = place * _LANE
        parts.append(f'<text x="0" y="{top + 12}">{escape(str(lane["worker"])[:30])}</text>')
        for begin, end, share, _, attempt, _ in lane["bars"]:
            colour = _ORANGE if attempt > 1 else COLOURS[0]
            width = max(0.5, (end - begin) * scale)
            parts.append(
                f'<rect x="{across(begin):.1f}" y="{top + 3}" width="{width:.1f}" height="{_LANE - 5}" '
                f'fill="{colour}" opacity="{0.3 + 0.7 * share:.2f}"/>'
            )
    for mark in timeline["marks"]:
        x = across(mark["step"])
        said = escape(f"version {mark['step']}: {mark['text']}")
        parts.append(
            f'<path d="M{x:.1f} 0V{height - _LANE}" stroke="currentColor" opacity="0.35">'
            f"<title>{said}</title></path>"
        )
    parts.append(
        f'<text x="{_LABEL}" y="{height - 3}">version {first}</text>'
        f'<text x="{_WIDTH}" y="{height - 3}" text-anchor="end">{last}</text>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img" '
        f'aria-label="who computed which shard" font-size="11" fill="currentColor">{"".join(parts)}</svg>'
    )


def _code(value: object) -> _Html:
    return _Html(f"<code>{escape(json.dumps(json.loads(for_others(value)), ensure_ascii=False))}</code>")


def _figures(found: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key} {value:.6g}" for key, value in sorted(found.items()) if isinstance(value, int | float)
    )


def _words(data: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in data.items())


def _moment(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
