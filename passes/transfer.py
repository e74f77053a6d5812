"""What each ATen op does to a linear form: one short rule per op, in one table, and the reader that applies them.

A rule says of which addends a node is the sum: other nodes, scaled, reshaped, permuted or cast, and products of two
nodes. An op without a rule, or a rule that answers None, makes its result a name of its own: never a guess. The
reader goes from a node to its addends and flattens; a sum that others use too is a name for them, so that no work is
done twice.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from peft_fx.passes.algebra import ONE, Matrix, Scale, Size, Term
from peft_fx.passes.nodes import (
    CASTS,
    COPIES,
    RESHAPES,
    SQUEEZES,
    aten,
    is_number,
    is_read_twice,
    is_tensor,
    numel,
    prims,
    shape,
    tensor_arg,
    value,
)


@dataclass(frozen=True)
class Window:
    """How a convolution reads its input."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def is_point(self) -> bool:
        """Each position is its own window."""
        point = {*self.kernel, *self.stride, *self.dilation} == {1}
        return point and set(self.padding) == {0} and self.groups == 1


GATHERED = "gathered"  # what a matrix is that is given by the columns of its ones


@dataclass(frozen=True)
class Product:
    """The matrix product of two nodes over their last two dimensions, computed in `dtype`.

    With a `window`, a convolution: `left` is its kernel [N,K·window], `right` its input, or, `folded`, the gradient of
    its output, and the product with the transposed kernel is folded back to the input's shape. `gathered`: `left` are
    the numbers of rows of `right`, the columns of the ones in a matrix of zeros.
    """

    left: Node
    right: Node
    dtype: torch.dtype
    window: Window | None = None
    folded: bool = False
    gathered: bool = False


@dataclass(frozen=True)
class Addend:
    """`scale · operand`; `dims` where the operand is permuted first; reshapes need no word, values are read row by
    row."""

    operand: Node | Product | None  # None: a constant
    scale: Scale = ONE
    dims: tuple[int, ...] | None = None


Rule = Callable[[Node], "list[Addend] | None"]

# ---------------------------------------------------------------------------------------------------------------- rules


def _unchanged(node: Node) -> list[Addend] | None:
    return [Addend(tensor_arg(node, 0))]


def _expand(node: Node) -> list[Addend] | None:
    """A value that repeats another has a name of its own."""
    return _unchanged(node) if numel(shape(tensor_arg(node, 0))) == numel(shape(node)) else None


def _cast(node: Node) -> list[Addend] | None:
    source = tensor_arg(node, 0)
    both_float = value(source).is_floating_point() and value(node).is_floating_point()
    return [Addend(source)] if both_float else None


def _permute(node: Node) -> list[Addend] | None:
    dims = node.args[1]
    assert isinstance(dims, (list, tuple))
    return [Addend(tensor_arg(node, 0), dims=tuple(d % len(dims) for d in dims))]  # type: ignore[operator]


def _transpose(node: Node) -> list[Addend] | None:
    dims: list[Any] = list(range(value(node).ndim))
    i, j = (int(d) for d in node.args[1:3])  # type: ignore[arg-type]
    dims[i], dims[j] = dims[j], dims[i]
    return [Addend(tensor_arg(node, 0), dims=tuple(dims))]


def scale_of(arg: Any) -> Scale | None:
    """A python number, or a tensor of no dimension, through its casts."""
    if is_number(arg):
        return Scale(float(arg))
    if is_tensor(arg) and value(arg).ndim == 0 and value(arg).is_floating_point():
        while arg.target is prims.convert_element_type.default and value(tensor_arg(arg, 0)).is_floating_point():
            arg = tensor_arg(arg, 0)
        return Scale(1.0, (arg,))
    return None


def _plus(sign: float) -> Rule:
    def rule(node: Node) -> list[Addend] | None:
        a, b = node.args[:2]
        first = Addend(a if is_tensor(a) else None)
        alpha = scale_of(node.kwargs.get("alpha", 1))
        if alpha is None or not is_tensor(b):
            return [first, Addend(None)]
        return [first, Addend(b, Scale(sign) * alpha)]

    return rule


def _times(node: Node) -> list[Addend] | None:
    a, b = node.args[:2]
    for x, s in ((a, b), (b, a)):
        scale = scale_of(s)
        if scale is not None and is_tensor(x) and value(x).ndim:
            return [Addend(x, scale)]
    return _outer(node)


def _outer(node: Node) -> list[Addend] | None:
    """`[T,1] * [1,N]`: what Inductor makes of a product over a rank of one."""
    a, b = node.args[:2]
    if not (is_tensor(a) and is_tensor(b)):
        return None
    for column, row in ((a, b), (b, a)):
        cs, rs = shape(column), shape(row)
        if len(cs) == len(rs) == 2 and cs[1] == 1 and rs[0] == 1 and 1 not in (cs[0], rs[1]):
            return [Addend(Product(column, row, value(node).dtype))]
    return None


def _over(node: Node) -> list[Addend] | None:
    b = node.args[1]
    if not is_number(b) or b == 0 or node.kwargs:
        return None
    return [Addend(tensor_arg(node, 0), Scale(1.0 / b))]


def _negative(node: Node) -> list[Addend] | None:
    return [Addend(tensor_arg(node, 0), Scale(-1.0))]


def _product(node: Node) -> list[Addend] | None:
    return [Addend(Product(tensor_arg(node, 0), tensor_arg(node, 1), value(node).dtype))]


def _plus_product(node: Node) -> list[Addend] | None:
    beta, alpha = scale_of(node.kwargs.get("beta", 1)), scale_of(node.kwargs.get("alpha", 1))
    if beta is None or alpha is None:
        return None
    product = Product(tensor_arg(node, 1), tensor_arg(node, 2), value(node).dtype)
    return [Addend(tensor_arg(node, 0), beta), Addend(product, alpha)]


def _embedding(node: Node) -> list[Addend] | None:
    rows, numbers = tensor_arg(node, 0), tensor_arg(node, 1)
    return [Addend(Product(numbers, rows, value(node).dtype, gathered=True))]


def _window(kernel: Node, args: Sequence[Any]) -> Window | None:
    """Of `stride, padding, dilation, transposed, output_padding, groups`; None for a transposed convolution."""
    stride, padding, dilation, transposed, _, groups = args
    sizes = shape(kernel)[2:]
    stride, padding, dilation = (tuple(v) * (len(sizes) if len(v) == 1 else 1) for v in (stride, padding, dilation))
    if transposed or not all(isinstance(n, int) for n in (*sizes, *stride, *padding, *dilation)):
        return None
    return Window(sizes, stride, padding, dilation, groups)


def _convolution(node: Node) -> list[Addend] | None:
    kernel = tensor_arg(node, 1)
    window = _window(kernel, node.args[3:9])
    if window is None or value(node).ndim != value(kernel).ndim:
        return None
    product = Addend(Product(kernel, tensor_arg(node, 0), value(node).dtype, window))
    return [product] if node.args[2] is None else [Addend(None), product]


def _result(node: Node) -> list[Addend] | None:
    """The input gradient among the results of a convolution's backward."""
    source, i = node.args[:2]
    if not isinstance(source, Node) or source.target is not aten.convolution_backward.default or i != 0:
        return None
    kernel = tensor_arg(source, 2)
    window = _window(kernel, source.args[4:10])
    if window is None or value(node).ndim != value(kernel).ndim:
        return None
    return [Addend(Product(kernel, tensor_arg(source, 0), value(node).dtype, window, folded=True))]


RULES: dict[Any, Rule] = {
    operator.getitem: _result,
    aten.convolution.default: _convolution,
    aten.embedding.default: _embedding,
    **dict.fromkeys(RESHAPES | SQUEEZES | COPIES, _unchanged),
    **dict.fromkeys(CASTS, _cast),
    aten.expand.default: _expand,
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.add.Tensor: _plus(1.0),
    aten.sub.Tensor: _plus(-1.0),
    aten.neg.default: _negative,
    aten.mul.Tensor: _times,
    aten.mul.Scalar: _times,
    aten.div.Tensor: _over,
    aten.mm.default: _product,
    aten.bmm.default: _product,
    aten.addmm.default: _plus_product,
    aten.baddbmm.default: _plus_product,
}


def products_in(node: Node) -> list[Product]:
    """The addends of a node that are products, rows picked of a table among them."""
    return [part.operand for part in addends(node) or [] if isinstance(part.operand, Product)]


def addends(node: Node) -> list[Addend] | None:
    rule = RULES.get(node.target) if node.op == "call_function" else None
    return rule(node) if rule and isinstance(value(node), torch.Tensor) else None


def through(node: Node) -> Node:
    """Where a value comes from before it was laid out, cast or scaled by a number."""
    while len(parts := addends(node) or []) == 1 and isinstance(parts[0].operand, Node):
        node = parts[0].operand
    return node


# --------------------------------------------------------------------------------------------------------------- reader


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
        rows = numel(shape(node)) / (layout.batch * layout.cols) if 0 not in shape(node) else 0
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
        if RULES.get(node.target) is _unchanged and shape(tensor_arg(node, 0))[-2:] == sizes[-2:]:
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
