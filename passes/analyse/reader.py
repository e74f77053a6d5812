"""The linear forms of a graph: the rules of `linear_rules.py`, applied from a node up to its terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch.fx import Node

from peft_fx.passes.analyse.algebra import Matrix, Size, Term
from peft_fx.passes.analyse.linear_rules import GATHERED, LINEAR, Addend, Product, Window, addends, unchanged
from peft_fx.passes.graph.nodes import (
    aten,
    is_read_twice,
    numel,
    shape,
    tensor_arg,
    value,
)


@dataclass(frozen=True)
class Layout:
    """How a value of any shape is read: row by row as `[batch, rows, cols]`."""

    batch: Size
    cols: Size


@dataclass(frozen=True)
class Occurrence:
    """A term of a sum, and the way to it: pairs of node and number of the addend, from the sum inwards.

    `term` is None for what is no matrix of the sum's shape (a bias); `flipped` where the way transposes the product
    itself.
    """

    term: Term | None
    path: tuple[tuple[Node, int], ...]
    flipped: bool = False

    @property
    def product(self) -> Product | None:
        if not self.path:
            return None
        node, i = self.path[-1]
        operand = (addends(node) or [])[i].operand
        return operand if isinstance(operand, Product) else None


Read = Callable[[Node, Layout], "tuple[Occurrence, ...]"]


class Reader:
    """Reads the linear forms of one graph, of which it is given every node's first equal. Pure: it never changes the
    graph, and keeps what it learns in a table of its own."""

    def __init__(self, number: Mapping[Node, Node]):
        self.number = number
        self._memo: dict[tuple[Node, Layout, bool], tuple[Occurrence, ...]] = {}

    def read(self, root: Node) -> tuple[Occurrence, ...]:
        """The terms of a sum, in the layout in which most of them are products."""
        sizes = shape(root)
        layouts = [Layout(1, sizes[-1] if sizes else 1)]
        if len(sizes) > 2:  # a batch of matrices, the channels of an image being rows
            layouts.append(Layout(sizes[0], numel(sizes[2:])))
        found = [self._sum(root, layout, top=True) for layout in layouts]
        return max(found, key=lambda occs: sum(o.term is not None and len(o.term.factors) > 1 for o in occs))

    def term(self, node: Node, layout: Layout) -> Term:
        """A factor of a product: a single term, or the node's own name."""
        found = self._sum(node, layout)
        only = found[0].term if len(found) == 1 else self._single(node, layout)[0].term
        return only if only is not None else self._name(node, layout)

    def operand(self, node: Node) -> Term:
        """What a product reads as one of its operands, with the scale that it carries itself, as W in `x @ (2·W)`."""
        sizes = shape(node)
        batch = sizes[0] if len(sizes) == 3 else 1
        return self._shared(node) or self.term(node, Layout(batch, sizes[-1]))

    def _name(self, node: Node, layout: Layout) -> Term:
        rows = numel(shape(node)) / (layout.batch * layout.cols) if 0 not in shape(node) else numel(shape(node)[-2:-1])
        rows = int(rows) if isinstance(rows, float) else rows
        return Term((Matrix(self.number[node], layout.cols, layout.batch, rows=rows, precision=value(node).dtype),))

    def _sum(self, node: Node, layout: Layout, top: bool = False) -> tuple[Occurrence, ...]:
        """The terms of a node; its name alone where it is a sum that others use too."""
        key = (node, layout, top)
        if key not in self._memo:
            found = self._flatten(node, layout, self._sum)
            several = len(node.users) > 1 and found is not None and len(found) > 1
            if found is None or (not top and (several or is_read_twice(node))):
                found = self._single(node, layout)
            self._memo[key] = found
        return self._memo[key]

    def _single(self, node: Node, layout: Layout) -> tuple[Occurrence, ...]:
        """A node as one term: a sum's name, but still through what is only cast, scaled or laid out anew."""
        unary = len(addends(node) or []) == 1
        found = self._flatten(node, layout, self._single) if unary else None
        return found or (Occurrence(self._name(node, layout), ()),)

    def _flatten(self, node: Node, layout: Layout, read: Read) -> tuple[Occurrence, ...] | None:
        parts = addends(node)
        if parts is None:
            return None
        found: list[Occurrence] = []
        for i, part in enumerate(parts):
            inner = self._addend(node, part, layout, read)
            if inner is None:
                return None
            step, dtype = (node, i), value(node).dtype
            for occ in inner:
                term = occ.term and (occ.term * part.scale).rounded(dtype)
                found.append(replace(occ, path=(step, *occ.path), term=term))
        return tuple(found)

    def _addend(self, node: Node, part: Addend, layout: Layout, read: Read) -> tuple[Occurrence, ...] | None:
        """None where the whole node must stay a name."""
        if isinstance(part.operand, Product):
            term = self._product(part.operand, layout)
            return None if term is None else (Occurrence(term, ()),)
        if part.operand is None or numel(shape(part.operand)) != numel(shape(node)):
            return (Occurrence(None, ()),)
        if layout.cols == 0 and shape(part.operand) != shape(node):
            return None  # nothing tells how many rows there are of no columns
        if part.dims is None:
            return read(part.operand, layout)
        return self._permuted(node, part.operand, part.dims, layout, read)

    def _permuted(
        self, node: Node, source: Node, dims: tuple[int, ...], layout: Layout, read: Read
    ) -> tuple[Occurrence, ...] | None:
        """A permutation that only moves dimensions of size 1 is a reshape; one that swaps rows and columns, a
        transpose."""
        sizes = shape(node)
        order = [d for d, n in zip(dims, sizes, strict=True) if n != 1]
        if order == sorted(order):
            return read(source, layout)
        start = split(sizes, layout)
        if start is None:
            return None
        b, c = start
        swapped = [*dims[:b], *dims[c:], *dims[b:c]]
        if [d for d in swapped if shape(source)[d] != 1] != sorted(order):
            return None
        found = read(source, Layout(layout.batch, numel(sizes[b:c])))
        return tuple(replace(occ, term=occ.term and occ.term.T, flipped=not occ.flipped) for occ in found)

    def _product(self, product: Product, layout: Layout) -> Term | None:
        """A product in the layout asked for: of plain matrices, with one right factor for a whole batch, or batch by
        batch."""
        left, right = product.left, product.right
        ls, rs = shape(left), shape(right)
        if product.window is not None:
            return self._convolved(product, product.window, layout)
        if layout.cols != rs[-1]:
            return None
        if product.gathered:
            ones = Matrix(self.number[left], rs[0], window=GATHERED, rows=numel(ls))
            return (Term((ones,)) @ self.term(right, Layout(1, rs[-1]))).computed_in(product.dtype)
        if len(rs) == 2:
            a, b = self.term(left, Layout(layout.batch, ls[-1])), self.term(right, Layout(1, rs[-1]))
        elif ls[0] == 1 and layout.batch == 1:
            a, b = self.term(left, Layout(1, ls[-1])), self.term(right, Layout(1, rs[-1]))
        elif layout.batch == 1:
            shared = self._shared(right)
            if shared is None:
                return None
            a, b = self.term(left, Layout(1, ls[-1])), shared
        elif layout.batch == ls[0]:
            a = self._shared(left) or self.term(left, Layout(ls[0], ls[-1]))
            b = self._shared(right) or self.term(right, Layout(rs[0], rs[-1]))
        else:
            return None
        return (a @ b).computed_in(product.dtype)

    def _convolved(self, product: Product, window: Window, layout: Layout) -> Term | None:
        """The kernel as a matrix times the windows of the input; or transposed times dy, folded."""
        kernel, source = product.left, product.right
        batch, positions = shape(source)[0], numel(shape(source)[2:])
        if layout.batch != batch or (window.is_point and layout.cols != positions):
            return None
        K = numel(shape(kernel)[1:])
        W = self._name(kernel, Layout(1, K))
        values = self.term(source, Layout(batch, positions))
        if product.folded:
            tag = None if window.is_point else window
            (matrix,) = W.factors
            return (replace(W, factors=(replace(matrix.T, window=tag),)) @ values).computed_in(product.dtype)
        if not window.is_point:
            only = self._name(source, Layout(batch, positions)).factors[0]
            values = Term((replace(only, cols=layout.cols, rows=K, window=window),))
        return (W @ values).computed_in(product.dtype)

    def _shared(self, node: Node) -> Term | None:
        """The one matrix that an expanded batch `[E, m, n]` repeats."""
        sizes = shape(node)
        if len(sizes) < 3 or node.op != "call_function":
            return None
        if node.target is aten.expand.default:
            source = tensor_arg(node, 0)
            one = numel(shape(source)) == numel(sizes[-2:])
            return self.term(source, Layout(1, sizes[-1])) if one else None
        if LINEAR.get(node.target) is unchanged and shape(tensor_arg(node, 0))[-2:] == sizes[-2:]:
            return self._shared(tensor_arg(node, 0))  # a batch that is laid out anew repeats what it did
        if node.target is aten.permute.default and list(node.args[1]) == [0, 2, 1]:  # type: ignore[arg-type]
            found = self._shared(tensor_arg(node, 0))
            return found and found.T
        return None


def split(sizes: Sequence[Size], layout: Layout) -> tuple[int, int] | None:
    """Where the batch ends and where the columns begin, among the dimensions of a value in that layout."""
    begin = next((i for i in range(len(sizes) + 1) if numel(sizes[:i]) == layout.batch), None)
    end = next((i for i in range(len(sizes), -1, -1) if numel(sizes[i:]) == layout.cols), None)
    return None if begin is None or end is None or begin > end else (begin, end)
