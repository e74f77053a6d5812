"""Sums whose addends carry a number and a vector each, `Σ (number + slope·vector)·value`. No graph is changed here."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

MOST = 16  # addends of a sum that is looked into


@dataclass(frozen=True)
class Coefficient:
    """`number + slope·vector`, what an addend is multiplied by."""

    number: float = 1.0
    slope: float = 0.0
    vector: Node | None = None

    def __mul__(self, other: Coefficient) -> Coefficient | None:
        """None where it is of the second degree."""
        if self.slope and other.slope:
            return None
        slope = self.number * other.slope + self.slope * other.number
        return Coefficient(self.number * other.number, slope, self.vector or other.vector)

    def __add__(self, other: Coefficient) -> Coefficient | None:
        """None where the vectors differ."""
        if self.vector and other.vector and self.vector is not other.vector:
            return None
        return Coefficient(self.number + other.number, self.slope + other.slope, self.vector or other.vector)


@dataclass(frozen=True)
class VectorSum:
    """A value as a sum of others, each with its coefficient, in the order in which they were met."""

    addends: tuple[tuple[Node, Coefficient], ...]

    def __mul__(self, by: Coefficient) -> VectorSum | None:
        found = [(node, c * by) for node, c in self.addends]
        return None if any(c is None for _, c in found) else VectorSum(tuple(found))  # type: ignore[arg-type]

    def __add__(self, other: VectorSum) -> VectorSum | None:
        both = self.addends + other.addends
        return VectorSum(both) if len(both) <= MOST else None

    def collected(self) -> dict[Node, Coefficient] | None:
        """Each addend once; those that cancel are gone."""
        found: dict[Node, Coefficient] = {}
        for node, c in self.addends:
            total = found[node] + c if node in found else c
            if total is None:
                return None
            found[node] = total
        return {node: c for node, c in found.items() if c.number or c.slope}


@dataclass(frozen=True)
class CommonVector:
    """`vector · Σ number·part + Σ coefficient·constant`: a sum with one vector taken out; a constant is the same for
    each token."""

    vector: Node
    parts: dict[Node, float]
    constants: dict[Node, Coefficient]
