"""Linear forms: a value as a sum of scaled products of matrices, `Σ s · F1·F2·…·Fk`. No graph in here.

The product `x·W + s·(x·A)·B` is two terms, `[x, W]` and `s·[x, A, B]`; the algebra needs no word for "weight" or
"input", a matrix is known by its name alone. What terms share at their left (`x` in a forward pass, `dy` in an input
gradient) or at their right (`x` of `W @ x`) can be factored out: `x·(W + s·A·B)`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

Size = Any  # int, or a sympy expression where the number of tokens is dynamic

MANTISSA = {torch.float64: 52, torch.float32: 23, torch.float16: 10, torch.bfloat16: 7}


def is_held_by(dtype: torch.dtype, wider: torch.dtype) -> bool:
    """Whether a wider dtype holds all that another does: float16 has more bits than bfloat16, and not its range."""
    if not {dtype, wider} <= MANTISSA.keys() or MANTISSA[dtype] >= MANTISSA[wider]:
        return False
    return bool(torch.finfo(dtype).max <= torch.finfo(wider).max)


def coarser(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    """The dtype with fewer mantissa bits; one that is no float counts as the coarsest."""
    return a if MANTISSA.get(a, 0) <= MANTISSA.get(b, 0) else b


def finer(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    """The dtype with more mantissa bits."""
    return b if coarser(a, b) is a else a


@dataclass(frozen=True)
class Scale:
    """A number times zero-dimensional values, which are known by name."""

    number: float = 1.0
    names: tuple[Hashable, ...] = ()

    def __mul__(self, other: Scale) -> Scale:
        return Scale(self.number * other.number, self.names + other.names)

    def over(self, other: Scale) -> Scale | None:
        """`self / other` where that needs no division by a value known only at run time, else None."""
        left = Counter(self.names)
        left.subtract(other.names)
        if other.number == 0 or any(count < 0 for count in left.values()):
            return None
        return Scale(self.number / other.number, tuple(left.elements()))

    def key(self) -> Hashable:
        return self.number, frozenset(Counter(self.names).items())


ONE = Scale()


@dataclass(frozen=True)
class Matrix:
    """A matrix known by name, or a batch of them: `name` read row by row as `[batch, rows, cols]`, transposed if
    `flipped`.

    Two are equal if they hold the same numbers, whatever casts lie between name and use; `precision` is the coarsest
    dtype on that way. Sizes in the name's own orientation; a `batch` of 1 stands for every matrix of a larger batch.

    A convolution is the product of its kernel and the windows of its input, its input gradient that of the transposed
    kernel and dy, folded back: `window` says how the matrix is made of windows, or folded into a value.
    """

    name: Hashable
    cols: Size
    batch: Size = 1
    flipped: bool = False
    window: Hashable = None
    rows: Size = field(default=0, compare=False)
    precision: torch.dtype = field(default=torch.float32, compare=False)

    @property
    def T(self) -> Matrix:
        return replace(self, flipped=not self.flipped)

    @property
    def shape(self) -> tuple[Size, Size]:
        return (self.cols, self.rows) if self.flipped else (self.rows, self.cols)


@dataclass(frozen=True)
class Term:
    """`scale · F1·F2·…·Fk`; `dtypes` are those in which its products were computed."""

    factors: tuple[Matrix, ...]
    scale: Scale = ONE
    dtypes: frozenset[torch.dtype] = frozenset()

    def __matmul__(self, other: Term) -> Term:
        return Term(self.factors + other.factors, self.scale * other.scale, self.dtypes | other.dtypes)

    def __mul__(self, scale: Scale) -> Term:
        return replace(self, scale=self.scale * scale)

    @property
    def T(self) -> Term:
        return replace(self, factors=tuple(f.T for f in reversed(self.factors)))

    def computed_in(self, dtype: torch.dtype) -> Term:
        return replace(self, dtypes=self.dtypes | {dtype})

    def rounded(self, dtype: torch.dtype) -> Term:
        """Through a cast: only a name by itself is known to hold the same numbers afterwards, up to the coarser
        precision."""
        if len(self.factors) == 1:
            (factor,) = self.factors
            return replace(self, factors=(replace(factor, precision=coarser(factor.precision, dtype)),))
        return self

    @property
    def narrowest(self) -> Size | None:
        """The rank of the product: the smallest size between its factors, or None for a single matrix."""
        inner = [f.shape[1] for f in self.factors[:-1]]
        fixed = [n for n in inner if isinstance(n, int)]
        return min(fixed) if fixed else None


def shares_left(term: Term, prefix: tuple[Matrix, ...]) -> bool:
    return len(term.factors) > len(prefix) and term.factors[: len(prefix)] == prefix


def without_left(term: Term, prefix: tuple[Matrix, ...]) -> Term:
    """What multiplies the shared prefix from the right."""
    return replace(term, factors=term.factors[len(prefix) :])


def cheapest_order(shapes: list[tuple[Size, Size]]) -> list[int]:
    """An order in which to multiply neighbours, greedily the smallest product first: positions in the shrinking list.

    >>> cheapest_order([(512, 8), (8, 8), (8, 512)])
    [0, 0]
    >>> cheapest_order([(8, 512), (512, 512), (512, 2)])
    [1, 0]
    """
    todo, order = list(shapes), []
    while len(todo) > 1:
        costs = [todo[i][0] * todo[i][1] * todo[i + 1][1] for i in range(len(todo) - 1)]
        i = costs.index(min(costs))
        todo[i : i + 2] = [(todo[i][0], todo[i + 1][1])]
        order.append(i)
    return order
