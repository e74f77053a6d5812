"""Which dimensions of an op's result count tokens and which hold features: one rule an op, in one table.

A rule holds for ops that treat all rows alike and are linear, or affine, in each. It is given the dimensions of the
operands and answers with those of the result; an op without a rule, or a rule that answers None, begins a new source.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node

from peft_fx.passes.analyse.algebra import Size
from peft_fx.passes.analyse.dims import Atom, Dims, Token, plain, regroup
from peft_fx.passes.analyse.linear_rules import scale_of
from peft_fx.passes.graph.columns import Columns, columns, is_constant, is_zero, part_of
from peft_fx.passes.graph.nodes import (
    CASTS,
    COPIES,
    PRODUCTS,
    RESHAPES,
    SCALINGS,
    SQUEEZES,
    SUMS,
    TRANSPOSES,
    aten,
    is_tensor,
    prims,
    shape,
    tensor_arg,
    value,
)


def _features(dims: Dims, i: int) -> bool:
    """Whether a dimension holds features alone."""
    return not any(isinstance(a, Token) for a in dims[i])


def _same(weight: Node, dims: Dims) -> bool:
    """Whether a weight, broadcast to a value, is the same for every token."""
    sizes = shape(weight)
    aligned = dims[len(dims) - len(sizes) :] if len(sizes) <= len(dims) else ()
    return len(sizes) <= len(dims) and all(
        n == 1 or not any(isinstance(a, Token) for a in dim) for n, dim in zip(sizes, aligned, strict=True)
    )


Known = Callable[[Any], "Dims | None"]  # the dimensions of an operand; None for a weight
Rule = Callable[[Node, Known], "Dims | None"]


def _first(node: Node, known: Known) -> Dims | None:
    return known(node.args[0])


def _reshaped(node: Node, known: Known) -> Dims | None:
    dims = known(node.args[0])
    found = dims and regroup(dims, shape(node))
    if not found or (len(found[-1]) > 1 and not _features(found, -1)):
        return None  # tokens among the features: what an attention's heads are to the layer behind it
    return found


def _permuted(node: Node, known: Known) -> Dims | None:
    dims = known(node.args[0])
    if dims is None:
        return None
    if node.target is aten.transpose.int:
        order = list(range(len(dims)))
        i, j = node.args[1:3]
        order[i], order[j] = order[j], order[i]  # type: ignore[index]
    else:
        order = [d % len(dims) for d in node.args[1]]  # type: ignore[union-attr, operator]
    return tuple(dims[d] for d in order)


def _expanded(node: Node, known: Known) -> Dims | None:
    dims, sizes = known(node.args[0]), shape(node)
    if dims is None or len(dims) > len(sizes):  # one number has a dimension for itself
        return None
    dims = ((),) * (len(sizes) - len(dims)) + dims
    repeated = [n for d, n in zip(dims, sizes, strict=True) if not d]
    return _broadcast(dims, node) if all(isinstance(n, int) for n in repeated) else None


def _added(node: Node, known: Known) -> Dims | None:
    a, b = node.args[:2]
    if scale_of(node.kwargs.get("alpha", 1)) is None:
        return None
    x, y = known(a), known(b)
    if x is not None and y is not None:
        return x if x == y else None
    dims, other = (x, b) if x is not None else (y, a)
    if dims is None or shape(a if x is not None else b) != shape(node):
        return None
    return dims if not isinstance(other, Node) or is_constant(other) or _same(other, dims) else None


def _scaled(node: Node, known: Known) -> Dims | None:
    a, b = node.args[:2]
    if node.target in (aten.div.Tensor, aten.div.Scalar) and (known(a) is None or node.kwargs):
        return None  # 1/u, or rounded
    own, other = (a, b) if known(a) is not None else (b, a)
    dims = known(own)
    if dims is None or known(other) is not None or len(dims) != len(shape(node)):
        return None
    same = not isinstance(other, Node) or (is_tensor(other) and _same(other, dims))
    return _broadcast(dims, node) if same else None


def _broadcast(dims: Dims, node: Node) -> Dims:
    """The dimensions of a value that a factor has repeated along those of size one."""
    return tuple(d or _sized(n) for d, n in zip(dims, shape(node), strict=True))


def _multiplied(node: Node, known: Known) -> Dims | None:
    """mm, bmm, addmm, baddbmm of a value and a weight; a bias may be a value of the same source too."""
    a, b = node.args[-2:]
    x, y = known(a), known(b)
    if (x is None) == (y is None) or "beta" in node.kwargs or "alpha" in node.kwargs:
        return None
    if x is not None:
        if not _features(x, -1) or (len(x) == 3 and not _features(x, 0)):
            return None
        dims = (*x[:-1], _sized(shape(node)[-1]))
    else:
        assert y is not None
        if not _features(y, -2) or (len(y) == 3 and not _features(y, 0)):
            return None
        dims = (*y[:-2], _sized(shape(node)[-2]), y[-1])
    if len(node.args) == 3:
        bias = node.args[0]
        same = known(bias) == dims if known(bias) is not None else _same(bias, dims)  # type: ignore[arg-type]
        return dims if same else None
    return dims


def _sized(n: Size) -> tuple[Atom, ...]:
    return () if n == 1 else (n,)


def _along(node: Node, known: Known) -> Dims | None:
    """An op along the dimensions that its second argument names, which must be features; the others stay."""
    dims = known(node.args[0])
    named = node.args[1] if len(node.args) > 1 else 0
    listed = named if isinstance(named, (list, tuple)) else [named]
    chosen = [d % len(dims) for d in listed if isinstance(d, int)] if dims else []
    if not dims or not chosen or not all(_features(dims, d) for d in chosen):
        return None
    return _resized(node, dims, chosen)


def _resized(node: Node, dims: Dims, chosen: list[int]) -> Dims | None:
    """The dimensions of the result, some of features having gone or changed their size."""
    sizes = shape(node)
    if len(sizes) == len(dims):
        return tuple(_sized(n) if i in chosen else dims[i] for i, n in enumerate(sizes))
    left = [d for i, d in enumerate(dims) if i not in chosen]
    return tuple(left) if len(left) == len(sizes) else None


def _unsqueezed(node: Node, known: Known) -> Dims | None:
    dims = known(node.args[0])
    if dims is None:
        return None
    i = node.args[1] % (len(dims) + 1)  # type: ignore[operator]
    return (*dims[:i], (), *dims[i:])


def _indexed(node: Node, known: Known) -> Dims | None:
    """Features taken in an order that a tensor of numbers gives."""
    dims, given = known(node.args[0]), node.args[1]
    chosen = [(i, n) for i, n in enumerate(given) if n is not None]  # type: ignore[union-attr, arg-type, var-annotated]
    if dims is None or len(chosen) != 1:
        return None
    i, order = chosen[0]
    numbers = value(order).ndim == 1 and value(order).dtype != torch.bool and known(order) is None
    return _resized(node, dims, [i]) if numbers and _features(dims, i) else None


def _joined(node: Node, known: Known) -> Dims | None:
    """Values side by side along a dimension of features, and zeros."""
    parts = [known(p) for p in node.args[0] if not is_zero(p)]  # type: ignore[union-attr]
    dim = node.args[1] if len(node.args) > 1 else 0
    if None in parts:
        return None
    first = parts[0]
    assert first is not None
    i = dim % len(first)  # type: ignore[operator]
    if not all(_features(p, i) for p in parts if p) or len({(*p[:i], *p[i + 1 :]) for p in parts if p}) > 1:
        return None
    return (*first[:i], _sized(shape(node)[i]), *first[i + 1 :])


def _placed(node: Node, known: Known) -> Dims | None:
    """A value put into a tensor of zeros, or into another one of the same source, along a dimension of features."""
    target, part = node.args[:2]
    dims, sizes = known(part), shape(node)
    if dims is None or not (is_zero(target) or known(target) is not None):
        return None
    i = node.args[2] % len(sizes)  # type: ignore[operator]
    if len(dims) < len(sizes):
        dims = (*dims[:i], (), *dims[i:])
    if not _features(dims, i):
        return None
    whole = (*dims[:i], _sized(sizes[i]), *dims[i + 1 :])
    return whole if known(target) in (None, whole) else None


def _scattered(node: Node, known: Known) -> Dims | None:
    """Features put into a tensor of zeros where a tensor of numbers says."""
    target, given, part = node.args[:3]
    dims, sizes = known(part), shape(node)
    chosen = [(i, n) for i, n in enumerate(given) if n is not None]  # type: ignore[union-attr, arg-type, var-annotated]
    if dims is None or len(chosen) != 1 or len(dims) != len(sizes) or not is_zero(target):
        return None
    i, order = chosen[0]
    numbers = value(order).ndim == 1 and value(order).dtype != torch.bool and known(order) is None
    return (*dims[:i], _sized(sizes[i]), *dims[i + 1 :]) if numbers and _features(dims, i) else None


def _summed_at(node: Node, known: Known) -> Dims | None:
    """The same, those put at one place being added up."""
    target, dim, order, part = node.args[:4]
    dims, sizes = known(part), shape(node)
    if dims is None or node.kwargs or not is_zero(target) or known(order) is not None:
        return None
    i = dim % len(sizes)  # type: ignore[operator]
    return (*dims[:i], _sized(sizes[i]), *dims[i + 1 :]) if _features(dims, i) else None


def _part(node: Node, known: Known) -> Dims | None:
    found = part_of(node)
    dims = known(found[1]) if found else None
    if not found or not dims or not _features(dims, found[2][0]):
        return None
    return _resized(node, dims, found[2][:1])


def _copied(node: Node, known: Known) -> Dims | None:
    return known(node.args[1]) if shape(node) == shape(tensor_arg(node, 1)) else None


def _complex(node: Node, known: Known) -> Dims | None:
    dims = known(node.args[0])
    return dims and (*dims, (2,))


AFFINE: dict[Any, Rule] = {
    **dict.fromkeys(RESHAPES, _reshaped),
    **dict.fromkeys(COPIES | CASTS, _first),
    **dict.fromkeys(TRANSPOSES, _permuted),
    **dict.fromkeys(PRODUCTS, _multiplied),
    **dict.fromkeys(SUMS, _added),
    **dict.fromkeys(SCALINGS, _scaled),
    aten.neg.default: _first,
    aten._conj.default: _first,
    aten.expand.default: _expanded,
    aten.unsqueeze.default: _unsqueezed,
    aten.squeeze.dim: _along,
    aten.squeeze.dims: _along,
    aten.sum.dim_IntList: _along,
    aten.mean.dim: _along,
    aten.select.int: _along,
    aten.slice.Tensor: _along,
    prims.rev.default: _along,
    aten.index.Tensor: _indexed,
    aten._fft_r2c.default: _along,
    aten._fft_c2c.default: _along,
    aten._fft_c2r.default: _along,
    aten.view_as_real.default: _complex,
    aten.cat.default: _joined,
    aten.select_scatter.default: _placed,
    aten.slice_scatter.default: _placed,
    aten.index_put.default: _scattered,
    aten.index_add.default: _summed_at,
    operator.getitem: _part,
    aten.copy.default: _copied,
}


# what leaves each feature by itself, as long as they stay in one piece
SCALES = COPIES | CASTS | RESHAPES | SQUEEZES | SCALINGS | SUMS


def held(node: Node, held: Sequence[Columns | None], dims: Dims) -> Columns | None:
    """Which of the source's features an op leaves in a row one by one, of those that its operands hold."""
    first = held[0]
    if first is None or not plain(dims):
        return None
    if node.target is aten.cat.default:  # as they were side by side before
        ends = [None if h is None else h[1] for h in held]
        starts = [None if h is None else h[0] for h in held]
        apart = len(held) != len(node.args[0]) or starts[1:] != ends[:-1]  # type: ignore[arg-type]
        return None if apart or ends[-1] is None else (first[0], ends[-1])
    if any(h != first for h in held):
        return None
    if node.target in SCALES:
        return first
    found = columns(node)
    return (first[0] + found[1][0], first[0] + found[1][1]) if found else None
