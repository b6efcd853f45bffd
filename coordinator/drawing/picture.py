"""Charts as one thing that a notebook shows, a terminal prints and a file holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from torchord.cache.errors import CheckpointError, InvalidInput
from torchord.cache.settings import located
from torchord.coordinator.drawing.characters import characters
from torchord.coordinator.drawing.chart import Chart, Line
from torchord.coordinator.drawing.svg import COLOURS, svg

TITLES: Mapping[str, str] = {
    "loss": "Loss",
    "grad_norm": "Gradient norm",
    "lr": "Learning rate",
    "rate": "Examples/s",
    "nbytes": "Gradient bytes",
}
"""What is measured at each step, in the order in which it is drawn."""


@dataclass(frozen=True)
class Picture:
    """Some charts.

    Attributes:
        name: of what they show.
        charts: from the top down.
    """

    name: str
    charts: tuple[Chart, ...]

    def __repr__(self) -> str:
        return f"<Picture of {self.name!r}: {', '.join(chart.title for chart in self.charts)}>"

    def __str__(self) -> str:
        return "\n\n".join("\n".join(characters(chart)) for chart in self.charts)

    def _repr_html_(self) -> str:
        return f"<figure><figcaption>{escape(self.name)}</figcaption>{self.svg()}</figure>"

    def svg(self) -> str:
        """As SVG, which needs nothing beside itself."""
        return svg(self.charts)

    def save(self, path: str | Path) -> Path:
        """Write it as `.svg`, or as `.png` where matplotlib is installed; the path.

        Raises:
            InvalidInput: another ending, or no matplotlib.
            CheckpointError: the file cannot be written.
        """
        target = Path(located(path))
        kind = target.suffix.lower()
        if kind not in (".svg", ".png"):
            raise InvalidInput(f"a picture is a file .svg or .png, not {target.name!r}")
        try:
            if kind == ".svg":
                target.write_text(self.svg().replace("<svg ", '<svg color="#374151" ', 1), encoding="utf-8")
            else:
                self._save_png(target)
        except OSError as error:
            raise CheckpointError(
                f"cannot write {target}: {error}; choose a directory that exists"
            ) from error
        return target

    def _save_png(self, target: Path) -> None:
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise InvalidInput(
                f"{target.name!r} needs matplotlib, which is not installed here; install it, or write an .svg"
            ) from None
        drawn = Figure(figsize=(8, 2.4 * len(self.charts)), dpi=120, layout="constrained", facecolor="white")
        for axes, chart in zip(
            drawn.subplots(len(self.charts), squeeze=False)[:, 0], self.charts, strict=True
        ):
            axes.set_title(chart.title, loc="left", fontsize=11)
            axes.grid(alpha=0.2)
            for place, line in enumerate(chart.lines):
                marker = "o" if line.marks else None
                colour = COLOURS[place % len(COLOURS)]
                axes.plot(line.x, line.y, label=line.label, color=colour, marker=marker, markersize=3)
            if len(chart.lines) > 1:
                axes.legend(frameon=False, fontsize=9)
        drawn.savefig(target)


def picture(name: str, curves: Mapping[str, Any], wanted: tuple[str, ...] = ()) -> Picture:
    """The charts of a run's curves.

    Args:
        name: of the run.
        curves: {"series": {name: curve}, "measured": {name: curve}, "metrics": {name: curve}}, a curve being
            {"step": [...], "value": [...]}: "measured" by steps, "metrics" by evaluations.
        wanted: names of the curves that are drawn; () for loss, gradient norm, learning rate, speed and all
            metrics.

    Raises:
        InvalidInput: a name is none of theirs.
    """
    series, metrics = {**curves["series"], **curves["measured"]}, curves["metrics"]
    known = [*TITLES, *sorted({*metrics, *curves["measured"]} - TITLES.keys())]
    if unknown := [each for each in wanted if each not in known]:
        raise InvalidInput(f"run {name!r} has no curve {unknown[0]!r}; it has {', '.join(known)}")
    charts = []
    for each in wanted or [each for each in known if each != "nbytes"]:
        lines = []
        if each in series:
            lines.append(
                _line(TITLES[each] if each in TITLES and each != "loss" else "training", series[each])
            )
        if each in metrics:
            lines.append(_line("evaluation", metrics[each], marks=True))
        charts.append(Chart(TITLES.get(each, each), tuple(lines)))
    return Picture(name, tuple(charts))


def _line(label: str, curve: Mapping[str, Any], *, marks: bool = False) -> Line:
    return Line(label, curve["step"], [float("nan") if y is None else y for y in curve["value"]], marks)
