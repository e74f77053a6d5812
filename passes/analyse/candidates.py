"""What may get a weight form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch.fx import Node

from peft_fx.kernels.library import available
from peft_fx.kernels.merge import WIDER, WIDEST
from peft_fx.passes.analyse.algebra import MANTISSA, Matrix, Scale, Size, Term, without_left
from peft_fx.passes.analyse.dims import Token
from peft_fx.passes.analyse.flow import Flow
from peft_fx.passes.analyse.linear_rules import Product
from peft_fx.passes.analyse.maps import AffineMap, fresh
from peft_fx.passes.analyse.reader import Occurrence
from peft_fx.passes.decide.shapes import RegionProduct, Shape, shape_of
from peft_fx.passes.graph.nodes import factors_of, numel, shape, value


@dataclass(frozen=True)
class SumCandidate:
    """One base product `u·W` (`W·u` if `right`) of the sum `root`, and the other terms of the sum that share `u`.

    `outer` is the scale of the whole base product, `inner` the one that its weight operand carries, as in `x @ (2·W)`.
    """

    root: Node
    base: Occurrence
    others: tuple[Occurrence, ...]
    shared: tuple[Matrix, ...]
    right: bool
    backward: bool
    outer: Scale | None
    inner: Scale

    @property
    def product(self) -> Product:
        product = self.base.product
        assert product is not None, "the base of a group is a product"
        return product

    @property
    def product_node(self) -> Node:
        return self.base.path[-1][0]

    @property
    def at_left(self) -> bool:
        """Whether the base product, as it is written, reads W from its left."""
        return self.right != self.base.flipped

    @property
    def operand(self) -> Node:
        """The node that the base product reads W from: W, or Wᵀ where the product is transposed on the way to the
        sum."""
        return self.product.left if self.at_left else self.product.right

    @property
    def weight(self) -> Matrix:
        """W as it multiplies u, [K,N]; from the right, [N,K]."""
        return factors_in(self.base)[0 if self.right else -1]

    @property
    def remainders(self) -> tuple[Term, ...]:
        """What multiplies u besides W, in W's orientation."""
        return tuple(self._remainder(occ.term) for occ in self.others if occ.term is not None)

    def added_by(self, occ: Occurrence) -> tuple[Matrix, ...]:
        """The factors of one of the others, without what is shared."""
        return self._remainder(occ.term).factors if occ.term is not None else ()

    def _remainder(self, term: Term) -> Term:
        if not self.right:
            return without_left(term, self.shared)
        return without_left(term.T, tuple(f.T for f in reversed(self.shared))).T

    @property
    def adapter_factors(self) -> list[Matrix]:
        return [f for t in self.remainders for f in t.factors]

    @property
    def adapter_nodes(self) -> list[Any]:
        return [f.name for f in self.adapter_factors]

    @property
    def ratios(self) -> tuple[Scale | None, ...]:
        """`s` of `u·W + s·u·A·B` for each of the others, with the base product's own scale divided out."""
        return tuple(occ.term.scale.over(self.outer) if self.outer and occ.term else None for occ in self.others)

    @property
    def tokens(self) -> Size:
        u = self.shared[-1].T if self.right else self.shared[0]
        return u.shape[0] * (u.batch if self.weight.batch == 1 else 1)

    @property
    def key(self) -> Any:
        """Equal for the groups of one adapter, forward and input gradient."""
        return self.weight.name, frozenset(f.name for f in self.adapter_factors)

    @property
    def weight_node(self) -> Any:
        return self.weight.name

    @property
    def method(self) -> str:
        return "low-rank" if all(len(t.factors) > 1 for t in self.remainders) else "dense delta"

    def site_name(self, flow: Flow) -> str:
        return flow.site_name(self.weight, self.adapter_factors)

    @property
    def has_kernel(self) -> bool:
        """Whether a kernel of our own builds W' at once: of a matrix in a dtype that it takes, on a GPU with Triton."""
        known, dtype = value(self.weight.name), self.product.dtype  # type: ignore[arg-type]
        ranks = [t.narrowest for t in self.remainders]
        factors = [self.weight, *(f for t in self.remainders for f in t.factors)]
        return (
            available(known.device)
            and (known.ndim, known.dtype) == (2, dtype)
            and dtype in WIDER
            and self.inner == Scale()
            and all(isinstance(r, int) and 0 < r <= WIDEST for r in ranks)
            and all(len(t.factors) > 1 for t in self.remainders)
            and all(f.batch == 1 for f in factors)
        )

    def sizes(self, hint: Callable[[Size], int]) -> Shape:
        weight, dtype = self.weight, self.product.dtype
        sizes = shape_of(self.tokens, weight.shape, self.remainders, dtype, hint, weight.batch, self.right)
        return replace(sizes, gathered=self.product.gathered, fused=self.has_kernel)


def factors_in(occ: Occurrence) -> tuple[Matrix, ...]:
    assert occ.term is not None
    return occ.term.factors


@dataclass(frozen=True)
class MapCandidate:
    """What one source contributes to one sum: `ends` are its addends there, or the one value that it ends in.

    Of the `nodes` between, those in `diagonal` hold the source's own features, scaled.
    """

    ends: tuple[Node, ...]
    row: AffineMap
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

    def sizes(self, hint: Callable[[Size], int]) -> Shape:
        """The region's sizes, its products other than the base, and what of them is done for W'."""
        dtypes = [value(n).dtype for n in self.row.products]
        adapter = max((d for d in dtypes if d in MANTISSA), key=MANTISSA.__getitem__)
        K, N = self.features
        steps = tuple(self._step(n) for n in sorted(self.row.products))
        return Shape(hint(self.tokens), K, N, (), value(self.base).dtype, adapter, steps=steps)

    def _step(self, node: Node) -> RegionProduct:
        a, b = factors_of(node)
        weight = next(n for n in (a, b) if n not in self.nodes and n is not self.source)
        *batch, k, n = shape(weight)
        if weight is a:
            k, n = n, k
        x = b if weight is a else a
        return RegionProduct(int(numel(batch)), int(k), int(n), x in self.diagonal, node is self.base)
