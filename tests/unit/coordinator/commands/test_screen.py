"""`torchord watch` on a terminal."""

from __future__ import annotations

import io

from rich.console import Console

from torchord.cache.ledger.answers import Event
from torchord.coordinator.commands.screen import Screen


def step(version: int, loss: float) -> tuple[Event, str]:
    data = {"step": version - 1, "version": version, "loss": loss, "examples": 8, "seconds": 1.0}
    return Event(f"{version}-0", "step", data), f"step {version - 1}: loss {loss}"


def screen() -> tuple[Screen, io.StringIO]:
    out = io.StringIO()
    return Screen(Console(file=out, force_terminal=True, width=80, height=40, no_color=True), "digits"), out


def test_the_curve_and_what_happened_last_fit_the_terminal() -> None:
    shown, out = screen()
    with shown:
        for version in range(1, 3000):
            shown.event(*step(version, 1 / version))
        shown.event(
            Event("1-0", "evaluation", {"version": 50, "metrics": {"loss": 0.4}}), "evaluation: " + "x" * 99
        )
        for number in range(9):
            shown.say(f"waits for {number}")
        shown.quiet("waits for a worker")
    lines = shown.lines(80)
    assert max(map(len, lines)) <= 80 and len(lines) < 24
    assert lines[0] == "digits: loss (training, evaluation)" and "step 2998: loss" in "\n".join(lines)
    assert "waits for a worker" in lines and lines[-1] == "waits for 8" and "waits for 2" not in lines
    assert "digits: loss" in out.getvalue() and "\x1b[3" not in out.getvalue(), "no colour"


def test_what_was_rolled_back_leaves_the_curve() -> None:
    shown, _ = screen()
    for version in range(1, 11):
        shown.event(*step(version, float(version)))
    shown.event(Event("11-0", "rollback", {"version": 4}), "rollback: version 4")
    assert shown.lines(80)[1].split()[0] == "4" and shown.lines(80)[-1] == "rollback: version 4"


def test_before_the_first_step_it_says_so() -> None:
    assert "nothing to draw yet" in "\n".join(screen()[0].lines(80))
