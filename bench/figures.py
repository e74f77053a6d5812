"""What figures have in common."""

from __future__ import annotations

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


def places(groups: int, i: int, n: int) -> list[float]:
    """Where the i-th of n bars of each group stands."""
    return [j + 0.8 * (i + 0.5) / n - 0.4 for j in range(groups)]


def save(figure: Any, path: Path) -> None:
    """Without the date and version that would make equal figures differ."""
    figure.savefig(path, dpi=150, metadata={"Software": None})
