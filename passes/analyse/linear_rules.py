"""What each ATen op does to a linear form: one short rule per op, in one table.

A rule says of which addends a node is the sum: other nodes, scaled, reshaped, permuted or cast, and products of two
nodes. An op without a rule, or a rule that answers None, makes its result a name of its own: never a guess. The
reader goes from a node to its addends and flattens; a sum that others use too is a name for them, so that no work is
done twice.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from peft_fx.passes.analyse.algebra import ONE, Scale
from peft_fx.passes.graph.nodes import (
    CASTS,
    COPIES,
    RESHAPES,
    SQUEEZES,
    aten,
    is_number,
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


def unchanged(node: Node) -> list[Addend] | None:
    return [Addend(tensor_arg(node, 0))]


def _expand(node: Node) -> list[Addend] | None:
    """A value that repeats another has a name of its own."""
    return unchanged(node) if numel(shape(tensor_arg(node, 0))) == numel(shape(node)) else None


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


LINEAR: dict[Any, Rule] = {
    operator.getitem: _result,
    aten.convolution.default: _convolution,
    aten.embedding.default: _embedding,
    **dict.fromkeys(RESHAPES | SQUEEZES | COPIES, unchanged),
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
    rule = LINEAR.get(node.target) if node.op == "call_function" else None
    return rule(node) if rule and isinstance(value(node), torch.Tensor) else None


def through(node: Node) -> Node:
    """Where a value comes from before it was laid out, cast or scaled by a number."""
    while len(parts := addends(node) or []) == 1 and isinstance(parts[0].operand, Node):
        node = parts[0].operand
    return node
