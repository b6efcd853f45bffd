"""Pictures of a training run, written as PNG without a display."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from torchord import TrainedModel

BLUE, ORANGE, RED, GREY = "#1f6fb4", "#d9720f", "#c62828", "#6b7280"
_WINDOWS = 40  # smoothing averages over about 1/40 of the run


def save_curve(path: Path, trained: TrainedModel, *, title: str, metric: str = "accuracy") -> Path:
    """Draw loss and held-out metric over the steps, and return the path."""
    figure = _figure(8.0, 4.2)
    _curve(figure.subplots(), trained, title=title, metric=metric)
    figure.savefig(path)
    return path


def save_curve_and_images(
    path: Path,
    trained: TrainedModel,
    *,
    title: str,
    images: torch.Tensor,
    targets: torch.Tensor,
    predicted: torch.Tensor,
    names: Sequence[str],
    metric: str = "accuracy",
    columns: int = 12,
) -> Path:
    """As `save_curve`, and below it held-out images with their predicted labels, mistakes first.

    Args:
        images: float, (examples, height, width).
        targets: int64, (examples,).
        predicted: int64, (examples,).
        names: label of each class.
    """
    figure = _figure(9.0, 6.0)
    above, below = figure.subfigures(2, 1, height_ratios=(2.6, 1.0))
    _curve(above.subplots(), trained, title=title, metric=metric)
    wrong = predicted != targets
    order = [*wrong.nonzero().flatten().tolist(), *(~wrong).nonzero().flatten().tolist()]
    chosen = sorted(order[: int(wrong.sum())][: columns // 2]) + order[int(wrong.sum()) :]
    below.suptitle(
        f"held-out examples and what the model says: {int(wrong.sum())} of {len(targets)} are wrong, "
        "the first of them in red",
        fontsize=9,
        color=GREY,
    )
    for axes, index in zip(below.subplots(1, columns), chosen, strict=False):
        axes.imshow(images[index].numpy(), cmap="gray_r", interpolation="nearest")
        axes.set_xticks([])
        axes.set_yticks([])
        mistaken = bool(wrong[index])
        label = names[int(predicted[index])]
        axes.set_xlabel(
            f"{label}\nnot {names[int(targets[index])]}" if mistaken else label,
            color=RED if mistaken else "black",
            fontsize=9,
        )
        for spine in axes.spines.values():
            spine.set_color(RED if mistaken else "#d1d5db")
    figure.savefig(path)
    return path


def _figure(width: float, height: float) -> Any:
    """A figure that draws into a file; no window system is touched."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")


def _curve(axes: Any, trained: TrainedModel, *, title: str, metric: str) -> None:
    versions = [report.version for report in trained.history]
    losses = [report.loss for report in trained.history]
    axes.plot(versions, losses, color=BLUE, alpha=0.3, linewidth=1)
    axes.plot(versions, _smooth(losses), color=BLUE, linewidth=2, label="training loss (smoothed)")
    measured = sorted(trained.evaluations.items())
    if measured:
        axes.plot(
            [version for version, _ in measured],
            [values["loss"] for _, values in measured],
            color=BLUE,
            linestyle="--",
            marker="o",
            markersize=3.5,
            linewidth=1,
            label="held-out loss",
        )
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel("version (one per global step)")
    axes.set_ylabel("loss", color=BLUE)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    if measured and metric in measured[0][1]:
        right = axes.twinx()
        right.plot(
            [version for version, _ in measured],
            [100 * values[metric] for _, values in measured],
            color=ORANGE,
            marker="o",
            markersize=4,
            label=f"held-out {metric}",
        )
        right.set_ylabel(f"{metric} (%)", color=ORANGE)
        right.set_ylim(0, 104)
        right.spines["top"].set_visible(False)
        more, names = right.get_legend_handles_labels()
        handles, labels = handles + more, labels + names
    axes.legend(handles, labels, loc="center right", frameon=False, fontsize=9)


def _smooth(values: Sequence[float]) -> list[float]:
    """Exponential moving average, corrected for its start."""
    keep = 1 - 1 / max(1.0, len(values) / _WINDOWS)
    smoothed, mean, weight = [], 0.0, 0.0
    for value in values:
        mean = keep * mean + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        smoothed.append(mean / weight)
    return smoothed
