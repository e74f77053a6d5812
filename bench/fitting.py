"""The largest T whose training step fits in a given memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from bench.models import Setup
from bench.results import Results, request
from bench.running import measure_all

STEP = 64  # T is a multiple of it


def largest(
    setup: Setup,
    variants: Iterable[str],
    memory: float,
    samples: Sequence[int],
    results: Results,
    measured: bool,
    again: bool,
) -> list[list[str]]:
    """For each variant its name, the largest T, that as a multiple of Inductor's, bytes per token, and GB at T = 0."""

    def need(name: str, T: int, anew: bool) -> float:
        """Bytes of a step of T tokens; infinite where it failed, for want of memory as a rule."""
        asked = request("memory", replace(setup, tokens=T), [name], depths=[setup.layers])
        (row,) = measure_all([asked], results, again=anew)
        return float("inf") if "error" in row else _total(row)

    fitting, lines = {}, {}
    for name in variants:
        line = lines[name] = line_through([(T, need(name, T, again)) for T in samples[-2:]])
        guess = bisect(lambda T, line=line: line(T) <= memory, STEP)
        fitting[name] = guess
        if measured:  # to within a sixteenth
            coarse = max(STEP, guess // 16 // STEP * STEP)
            fitting[name] = bisect(lambda T, name=name: need(name, T, False) <= memory, coarse)
    theirs = fitting.get("inductor", 0)
    return [
        [
            name,
            str(T),
            f"{T / theirs:.2f}×" if theirs else "",
            f"{lines[name](1) - lines[name](0):.0f}",
            f"{lines[name](0) / 1e9:.3f}",
        ]
        for name, T in fitting.items()
    ]


def _total(row: dict) -> float:
    (sample,) = row["samples"]
    return sample["weights"] + sample["optimizer"] + sample["peak"]


def line_through(points: Sequence[tuple[int, float]]) -> Callable[[int], float]:
    """The straight line through the first and the last point; of a single one, through the origin.

    >>> line_through([(1, 3.0), (2, 5.0)])(10)
    21.0
    """
    (x0, y0), (x1, y1) = points[0] if len(points) > 1 else (0, 0.0), points[-1]
    slope = (y1 - y0) / (x1 - x0)
    return lambda x: y0 + slope * (x - x0)


def bisect(fits: Callable[[int], bool], step: int, most: int = 2**24) -> int:
    """The largest multiple of `step`, up to about `most`, that fits; 0 where not even `step` does.

    >>> bisect(lambda T: T <= 1000, 64)
    960
    """
    high = 1
    while high * step < most and fits(high * step):
        high *= 2
    low, high = high // 2, high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * step) else (low, middle)
    return low * step
