"""A run's history as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torchord.coordinator.drawing.picture import Picture, picture
from torchord.coordinator.drawing.sampling import sampled
from torchord.coordinator.master.reports import StepReport

_POINTS = 800


def pictured(
    name: str, history: Sequence[StepReport], evaluations: Mapping[int, Mapping[str, float]]
) -> Picture:
    """The curves of a run, of at most some hundred points each.

    Args:
        name: of the run.
        history: one report a step.
        evaluations: metrics of each evaluated version.
    """
    values = {
        "loss": [report.loss for report in history],
        "grad_norm": [report.grad_norm for report in history],
        "lr": [report.lr[0] if report.lr else math.nan for report in history],
        "rate": [report.examples / report.seconds if report.seconds > 0 else math.nan for report in history],
    }
    versions = [report.version for report in history]
    series = {}
    for quantity, found in values.items():
        rows = sampled(found, _POINTS)
        series[quantity] = {"step": [versions[row] for row in rows], "value": [found[row] for row in rows]}
    measured = {}
    for metric in sorted({metric for report in history for metric in report.metrics}):
        found = [report.metrics.get(metric, math.nan) for report in history]
        rows = sampled(found, _POINTS)
        measured[metric] = {"step": [versions[row] for row in rows], "value": [found[row] for row in rows]}
    metrics = {}
    for metric in sorted({metric for measured in evaluations.values() for metric in measured}):
        points = [
            (at, measured[metric]) for at, measured in sorted(evaluations.items()) if metric in measured
        ]
        metrics[metric] = {"step": [at for at, _ in points], "value": [value for _, value in points]}
    return picture(name, {"series": series, "measured": measured, "metrics": metrics})
