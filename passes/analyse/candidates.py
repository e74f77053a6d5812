"""What may get a weight form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from peft_fx.passes import price
from peft_fx.passes.affine import Row, Token, fresh
from peft_fx.passes.algebra import MANTISSA, Matrix, Size
from peft_fx.passes.flow import Flow
from peft_fx.passes.nodes import (
    factors_of,
    numel,
    shape,
    value,
)


@dataclass(frozen=True)
class Region:
    """What one source contributes to one sum: `ends` are its addends there, or the one value that it ends in.

    Of the `nodes` between, those in `diagonal` hold the source's own features, scaled.
    """

    ends: tuple[Node, ...]
    row: Row
    nodes: frozenset[Node]
    diagonal: frozenset[Node]
    base: Node
    backward: bool

    @property
    def source(self) -> Node:
        return self.row.source

    @property
    def weight_node(self) -> Node:
        """The base product's operand."""
        return next(n for n in factors_of(self.base) if n not in self.nodes and n is not self.source)

    @property
    def adapter_nodes(self) -> list[Any]:
        return list(self.row.trained)

    @property
    def product_node(self) -> Node:
        return self.base

    @property
    def tokens(self) -> Size:
        return numel([a.size for dim in fresh(self.source).dims for a in dim if isinstance(a, Token)])

    @property
    def features(self) -> tuple[int, int]:
        """K and N."""
        return int(shape(self.source)[-1]), self.row.width

    @property
    def key(self) -> Any:
        """Equal for the regions of one adapter, forward and input gradient."""
        return self.row.frozen

    @property
    def method(self) -> str:
        return "affine"

    def site_name(self, flow: Flow) -> str:
        return flow.site_name(Matrix(self.weight_node, 0), [Matrix(t, 0) for t in self.row.trained])

    def sizes(self, hint: Callable[[Size], int]) -> price.Shape:
        """The region's sizes, its products other than the base, and what of them is done for W'."""
        dtypes = [value(n).dtype for n in self.row.products]
        adapter = max((d for d in dtypes if d in MANTISSA), key=MANTISSA.__getitem__)
        K, N = self.features
        steps = tuple(self._step(n) for n in sorted(self.row.products))
        return price.Shape(hint(self.tokens), K, N, (), value(self.base).dtype, adapter, steps=steps)

    def _step(self, node: Node) -> price.Step:
        a, b = factors_of(node)
        weight = next(n for n in (a, b) if n not in self.nodes and n is not self.source)
        *batch, k, n = shape(weight)
        if weight is a:
            k, n = n, k
        x = b if weight is a else a
        return price.Step(int(numel(batch)), int(k), int(n), x in self.diagonal, node is self.base)
