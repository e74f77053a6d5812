"""Row-wise affine maps: values each of whose rows is `u·M + c` of the same row of one source `u`.

A LoRA is a sum of products and is read as such (`transfer.py`). Other adapters scale, rotate, pool, permute or
transform features on the way: `((u·A)*d)·B`, `(u·W)*l`, `rotate(u)·W`. They need no words of their own. Where every op
between u and y treats all rows alike and is linear in u, y = u·W' + b', and running the same ops on the rows of an
identity matrix in place of the tokens gives W', on a row of zeros b': `W' = f(I) - f(0)`, `b' = f(0)`. The identity is
not multiplied: `I·W` is W, `(I*d)·W` is `d[:, None]*W`.

The same holds for a gradient that is a sum over tokens of something linear in u times something linear in dy: it
depends on `G = uᵀ·dy` alone, so running its ops on the rows of I and of G in place of the tokens gives the same sum.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from peft_fx.passes.algebra import Size, coarser
from peft_fx.passes.flow import Flow
from peft_fx.passes.nodes import (
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
    numel,
    prims,
    shape,
    tensor_arg,
    value,
)
from peft_fx.passes.transfer import scale_of


@dataclass(frozen=True)
class Token:
    """One of the source's dimensions that count tokens, or a part of one, the slowest first."""

    index: int
    size: Size
    part: int = 0


Columns = tuple[int, int]  # the first one, and the one behind the last
Atom = Token | int  # a token dimension, or the size of a part of the features
Dims = tuple[tuple[Atom, ...], ...]  # for each dimension of a value, what it is made of, row by row


@dataclass(frozen=True)
class Row:
    """What is known of a value: its source, its dimensions, the parameters met on the way.

    `products` are the matrix products by a weight, `frozen` the untrained weights among their operands; `precision`
    is the coarsest dtype on the way from the source to here, and `read` those in which a product read the source.
    `diagonal` are the source's features, [start, end), that a row holds one by one, scaled; None where it does not.
    """

    source: Node
    dims: Dims
    trained: frozenset[Node] = frozenset()
    frozen: frozenset[Node] = frozenset()
    products: frozenset[Node] = frozenset()
    precision: torch.dtype = torch.float32
    read: frozenset[torch.dtype] = frozenset()
    diagonal: Columns | None = None

    @property
    def width(self) -> int:
        """The features of a row."""
        return int(numel([a for dim in self.dims for a in dim if isinstance(a, int)]))

    def joined(self, other: Row) -> Row:
        """What is known of a sum of two values with the same dimensions."""
        return replace(
            self,
            trained=self.trained | other.trained,
            frozen=self.frozen | other.frozen,
            products=self.products | other.products,
            precision=coarser(self.precision, other.precision),
            read=self.read | other.read,
            diagonal=self.diagonal if self.diagonal == other.diagonal else None,
        )


def fresh(node: Node) -> Row:
    """A value as a source of its own: its last dimension are features, the others count tokens."""
    *tokens, features = shape(node) or (1,)
    dims = tuple((Token(i, n),) if n != 1 else () for i, n in enumerate(tokens))
    diagonal = (0, features) if isinstance(features, int) else None
    return Row(node, (*dims, (features,) if features != 1 else ()), precision=value(node).dtype, diagonal=diagonal)


def _size(atom: Atom) -> Size:
    return atom.size if isinstance(atom, Token) else atom


def regroup(dims: Dims, sizes: Iterable[Size]) -> Dims | None:
    """The dimensions of a reshaped value; None where that would tear apart tokens of unknown number."""
    atoms = [a for dim in dims for a in dim]
    found: list[tuple[Atom, ...]] = []
    for n in sizes:
        group: list[Atom] = []
        while (done := numel([_size(a) for a in group])) != n:
            if not atoms:
                return None
            atom = atoms.pop(0)
            if all(isinstance(v, int) for v in (n, done, _size(atom))):
                if 0 in (n, done):
                    return None
                wanted, rest = divmod(n, done)
                if rest:
                    return None
                if _size(atom) > wanted:
                    parts, rest = divmod(_size(atom), wanted)
                    if rest:
                        return None
                    if isinstance(atom, Token):
                        atoms.insert(0, replace(atom, size=parts, part=atom.part + 1))
                        atom = replace(atom, size=wanted)
                    else:
                        atoms.insert(0, parts)
                        atom = wanted
            if group and isinstance(atom, int) and isinstance(group[-1], int):
                group[-1] *= atom
            else:
                group.append(atom)
        found.append(tuple(group))
    return tuple(found) if not atoms else None


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


def is_constant(node: object) -> bool:
    """A tensor of one number, whatever its shape."""
    return isinstance(node, Node) and node.target is aten.full.default


def is_zero(node: object) -> bool:
    """A tensor of zeros, whatever its layout."""
    while isinstance(node, Node) and node.target in RESHAPES | COPIES:
        node = node.args[0]
    return is_constant(node) and node.args[1] == 0  # type: ignore[attr-defined]


PLACINGS = {aten.select_scatter.default, aten.slice_scatter.default, aten.index_put.default, aten.index_add.default}
SPLITS = {aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int}
ROOTS = {aten.sqrt.default, aten.rsqrt.default}
PASSED = RESHAPES | SQUEEZES | COPIES | CASTS | SCALINGS | SUMS | {aten.reciprocal.default}
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


def part_of(node: Node) -> tuple[Any, Node, list[int]] | None:
    """One of the results of a split, as a slice or a selection of a value: the op, the value, the other arguments."""
    source, i = node.args[:2] if node.target is operator.getitem else (None, None)
    if not isinstance(source, Node) or source.target not in SPLITS:
        return None
    whole = tensor_arg(source, 0)
    j = 1 if source.target is aten.unbind.int else 2
    dim = source.args[j] if len(source.args) > j else source.kwargs.get("dim", 0)
    dim = dim % value(whole).ndim  # type: ignore[operator]
    if source.target is aten.unbind.int:
        return aten.select.int, whole, [dim, i]  # type: ignore[list-item]
    sizes = [part.shape[dim] for part in value(source)]
    if not all(isinstance(n, int) for n in sizes):
        return None
    start = sum(sizes[:i])  # type: ignore[misc]
    return aten.slice.Tensor, whole, [dim, start, start + sizes[i]]  # type: ignore[index]


def columns(node: Node) -> tuple[Node, Columns] | None:
    """The value of whose last dimension a node is a slice, and which columns it is."""
    op, whole, args = part_of(node) or (node.target, node.args[0] if node.args else None, list(node.args[1:]))
    found = _columns(whole, args) if op is aten.slice.Tensor and is_tensor(whole) else None
    return None if found is None else (whole, found)  # type: ignore[return-value]


def put_at(node: Node) -> Columns | None:
    """The columns of the first operand that a slice_scatter puts the second one at."""
    return _columns(tensor_arg(node, 0), list(node.args[2:]))


def _columns(whole: Node, args: Sequence[Any]) -> Columns | None:
    """Of the arguments `dim, start, end, step` of a slice."""
    dim, start, end, step = tuple(args) + (0, None, None, 1)[len(args) :]
    width = shape(whole)[-1]
    if dim not in (value(whole).ndim - 1, -1) or step != 1 or not isinstance(width, int):
        return None
    if not all(n is None or isinstance(n, int) for n in (start, end)):
        return None
    return slice(start, end).indices(width)[:2]


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


RULES: dict[Any, Rule] = {
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


def _held(node: Node, held: Sequence[Columns | None], dims: Dims) -> Columns | None:
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


class Rows:
    """The rows of the activations of a graph, or of what follows one node of it. Pure."""

    def __init__(self, nodes: Iterable[Node], flow: Flow, source: Node | None = None):
        self.flow = flow
        self._frozen: dict[Node, frozenset[Node]] = {}
        self.of: dict[Node, Row] = {} if source is None else {source: fresh(source)}
        for node in nodes:
            if is_tensor(node) and not flow.is_weight(node) and node.op in ("placeholder", "call_function"):
                self.of.setdefault(node, self._row(node) or fresh(node))
        self._position = {node: i for i, node in enumerate(self.of)}

    def from_source(self, ends: Iterable[Node], source: Node) -> Rows:
        """The same of the nodes between a source and the ends alone."""
        between = self.between(ends, source) & self.of.keys()
        return Rows(sorted(between, key=self._position.__getitem__), self.flow, source)

    def _row(self, node: Node) -> Row | None:
        rule = RULES.get(node.target)
        if rule is None:
            return None
        operands = self.operands(node)
        rows = [self.of[n] for n in operands if n in self.of]
        if len(rows) != len(operands) or not rows:
            return None
        trained, frozen = self.brought(node)
        if trained and node.target in SCALINGS and self._is_normalised(operands[0]):
            return None  # a norm's own scale: no adapter's
        rows = [self._cut(n, r, trained, frozen) for n, r in zip(operands, rows, strict=True)]
        if len({r.source for r in rows}) != 1:
            return None
        known = dict(zip(operands, rows, strict=True))
        dims = rule(node, lambda n: known[n].dims if isinstance(n, Node) and n in known else None)
        if dims is None:
            return None
        row = functools.reduce(Row.joined, rows)
        dtype = value(node).dtype
        read = frozenset({row.precision}) if node.target in PRODUCTS and not row.products else frozenset()
        return replace(
            row,
            dims=dims,
            trained=row.trained | trained,
            frozen=row.frozen | frozen,
            products=row.products | ({node} if node.target in PRODUCTS else set()),
            precision=coarser(row.precision, dtype) if dtype.is_floating_point else row.precision,
            read=row.read | read,
            diagonal=_held(node, [known[n].diagonal for n in operands], dims),
        )

    def brought(self, node: Node) -> tuple[frozenset[Node], frozenset[Node]]:
        """Of the weights that an op multiplies a value by: the trained parameters behind them, or a frozen one."""
        if node.target in SUMS:
            return frozenset(), frozenset()
        read = node.args[-2:] if node.target in PRODUCTS else node.all_input_nodes
        weights = [n for n in read if isinstance(n, Node) and self.flow.is_weight(n)]
        parameters = [p for w in weights for p in self.flow.parameters(w)]
        trained = frozenset(p for p in parameters if self.flow.roles[p].trainable)
        frozen = frozenset() if trained or node.target not in PRODUCTS else frozenset(parameters[:1])
        return trained, frozen

    def _is_normalised(self, node: Node) -> bool:
        """Whether a value is another one scaled, row by row, by a number that is computed from it alone; or feature by
        feature, by what a running variance is the root of."""
        while node.target in CASTS | COPIES:
            node = tensor_arg(node, 0)
        if is_scaled_by_a_root(node):
            return True
        if node.target not in SCALINGS or len(operands := self.operands(node)) != 2:
            return False
        scale, scaled = sorted(operands, key=lambda n: numel(shape(n)[-1:]) != 1)
        if numel(shape(scale)[-1:]) != 1 or numel(shape(scaled)[-1:]) == 1:
            return False
        return not self._inputs(scale).isdisjoint({scaled} | self._inputs(scaled))

    def _inputs(self, node: Node) -> set[Node]:
        """What a value is computed from without any weight, a few steps back."""
        found: set[Node] = set()
        todo = [node]
        while todo and len(found) < 16:
            n = todo.pop(0)
            new = [i for i in n.all_input_nodes if i not in found]
            if not any(self.flow.is_weight(i) and value(i).ndim for i in new if is_tensor(i)):
                found.update(new)
                todo += new
        return found

    def _cut(self, node: Node, row: Row, trained: frozenset[Node], frozen: frozenset[Node]) -> Row:
        """A layer ends where the next begins: the result of an adapted layer is a source to a weight of another."""
        new, met = trained | frozen, self._frozen_met(row) if row.trained else frozenset()

        def has_part_of_it(parameters: frozenset[Node]) -> bool:
            return any(self.in_one_module(p, f) for p in parameters for f in met)

        if not new or not has_part_of_it(row.trained) or has_part_of_it(new):
            return row
        layouts = [node]
        while layouts[-1].target in COPIES | CASTS | RESHAPES:
            before = tensor_arg(layouts[-1], 0)
            if shape(before)[-1:] != shape(node)[-1:]:
                break
            layouts.append(before)
        start = max(reversed(layouts), key=lambda n: len(shape(n)))  # the one that tells most tokens apart
        dims = regroup(fresh(start).dims, shape(node))
        return replace(fresh(start), dims=dims, precision=row.precision) if dims is not None else row

    def _frozen_met(self, row: Row) -> frozenset[Node]:
        """The frozen parameters behind a value's products, those that a weight shares with trained ones as well; the
        tables of indices that spread a trained parameter over a matrix (OFT's) are no layer's."""
        return row.frozen.union(*map(self._frozen_behind, row.products))

    def _frozen_behind(self, product: Node) -> frozenset[Node]:
        if product not in self._frozen:
            weights = (n for n in product.args[-2:] if isinstance(n, Node) and self.flow.is_weight(n))
            behind = {p for w in weights for p in self.flow.parameters(w) if value(p).is_floating_point()}
            self._frozen[product] = frozenset(p for p in behind if not self.flow.roles[p].trainable)
        return self._frozen[product]

    def is_adapted(self, row: Row) -> bool:
        """Whether a trained parameter of the same module acts beside a frozen weight."""
        return any(self.in_one_module(t, f) for t in row.trained for f in row.frozen)

    def in_one_module(self, parameter: Node, frozen: Node) -> bool:
        """Whether a parameter belongs to the module that holds a weight, itself (`W`) or in a layer (`base.weight`)."""
        return self.flow.roles[parameter].name.startswith(self._module(self.flow.roles[frozen].name))

    def _module(self, name: str) -> str:
        """The adapted module of a weight: the weight's own, where that holds trained parameters beside a bias, or the
        one around it."""
        own = name[: name.rfind(".") + 1]
        if own in self.flow.adapted_modules:
            return own
        return own[: own.rstrip(".").rfind(".") + 1]

    @functools.cached_property
    def products_of(self) -> dict[Node, list[Node]]:
        """The products by a weight, by the source of what they multiply."""
        found: dict[Node, list[Node]] = {}
        for node, row in self.of.items():
            if node in row.products:
                found.setdefault(row.source, []).append(node)
        return found

    def operands(self, node: Node) -> list[Node]:
        """The activations that a node's value is computed from; a copy's target lends its shape alone, and a constant
        of a dynamic size is none."""
        found = part_of(node)
        if found is not None:
            read: Iterable[Any] = [found[1]]
        else:
            read = node.args[1:2] if node.target is aten.copy.default else node.all_input_nodes
        return [n for n in read if is_tensor(n) and not (self.flow.is_weight(n) or is_constant(n) or is_zero(n))]

    def users(self, node: Node) -> Iterator[Node]:
        """The nodes that read a value: of a split, its results; not where a copy asks for the shape alone."""
        for user in node.users:
            read = [u for u in user.users if u.target is not aten.copy.default or u.args[1] is user]
            if user.target in SPLITS:
                yield from user.users
            elif read or not user.users:
                yield user

    def between(self, ends: Iterable[Node], source: Node) -> set[Node]:
        """The nodes on the way from a source to the ends; none that comes before it."""
        found: set[Node] = set()
        todo = list(ends)
        start = self._position.get(source, -1)
        while todo:
            node = todo.pop()
            if node is not source and node not in found and self._position.get(node, start) >= start:
                found.add(node)
                todo += self.operands(node)
        return found


def is_scaled_by_a_root(node: Node) -> bool:
    """Whether a value is scaled by one over the root of a variance and a number, as by batch norm: of a graph input in
    evaluation, of what the batch gives in training."""
    for operand in node.all_input_nodes if node.target in SCALINGS else ():
        rooted = False
        while operand.target in ROOTS | PASSED and len(operand.all_input_nodes) == 1:
            rooted |= operand.target in ROOTS
            (operand,) = operand.all_input_nodes
        if rooted and (operand.op == "placeholder" or operand.target is operator.getitem):
            return True
    return False


def plain(dims: Dims) -> bool:
    """All tokens first, then the features in one piece."""
    atoms = [a for dim in dims for a in dim]
    return len(atoms) > 0 and isinstance(atoms[-1], int) and all(isinstance(a, Token) for a in atoms[:-1])


def in_order(dims: Dims) -> bool:
    """All tokens first, in the source's order, then the features."""
    atoms = [a for dim in dims for a in dim]
    tokens = [a for a in atoms if isinstance(a, Token)]
    return atoms[: len(tokens)] == sorted(tokens, key=lambda t: (t.index, t.part))
