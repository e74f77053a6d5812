"""What figures have in common."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLOURS = {
    "eager": "#9aa0a6",
    "inductor": "#e8710a",
    "peft_fx": "#1a73e8",
    "frozen": "#202124",
    "full": "#a142f4",
    "paper": "#f9ab00",
    "handwritten": "#12a4af",
}


def figure_of(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """A figure and its panels, row by row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for panel in axes.flat:
        panel.spines[["top", "right"]].set_visible(False)
    return figure, axes


def bars_of(groups: Sequence[str], width: float) -> tuple[Any, Any]:
    """A figure of one panel, with the names of groups of bars, each so many inches wide."""
    figure, ((axes,),) = figure_of(1, 1, (max(6.0, width * len(groups)), 4.0))
    axes.set_xticks(range(len(groups)), groups, fontsize=8)
    return figure, axes


def bars(axes: Any, i: int, n: int, heights: Sequence[float], **look: Any) -> None:
    """The i-th of n bars of each group."""
    axes.bar([j + 0.8 * (i + 0.5) / n - 0.4 for j in range(len(heights))], heights, 0.8 / n, **look)


def save(figure: Any, path: Path) -> None:
    """Without the date and version that would make equal figures differ."""
    figure.savefig(path, dpi=150, metadata={"Software": None})
