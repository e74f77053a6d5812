"""AffineMap-wise affine maps run again on other rows than the tokens'.

`W' = f(I) - f(0)` and `b' = f(0)` for a map of `maps.py`: its own ops on the rows of an identity and on a row of
zeros. The identity is not multiplied: `I·W` is W, `(I*d)·W` is `d[:, None]*W`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from peft_fx.passes.analyse.dims import Atom, Dims, Token
from peft_fx.passes.analyse.maps import AffineMaps, fresh
from peft_fx.passes.graph.columns import PLACINGS, Columns, is_constant, is_zero, part_of
from peft_fx.passes.graph.editor import Editor
from peft_fx.passes.graph.nodes import (
    CASTS,
    COPIES,
    PRODUCTS,
    RESHAPES,
    SCALINGS,
    SUMS,
    aten,
    numel,
    prims,
    shape,
    tensor_arg,
    value,
)


@dataclass(frozen=True)
class Diagonal:
    """Columns [start, end) of a diagonal matrix, not written out; of the identity where `of` is None."""

    columns: Columns
    of: Node | None = None

    @property
    def width(self) -> int:
        return self.columns[1] - self.columns[0]


@dataclass(frozen=True)
class Value:
    """A value replayed: `rows` in place of the tokens, and the constant that is added to each of them."""

    rows: Node | Diagonal
    constant: Node | None = None


@dataclass
class Materialise:
    """Runs the ops between `source` and a value again, on `count` rows in the place of its tokens, in `dtype`."""

    edit: Editor
    rows: AffineMaps
    source: Node
    count: int
    dtype: torch.dtype
    values: dict[Node, Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.values.setdefault(self.source, Value(Diagonal((0, self.count))))
        tokens = [a for dim in fresh(self.source).dims for a in dim if isinstance(a, Token)]
        self.lead = tokens[0].index if tokens else -1

    def sizes(self, node: Node) -> list[int]:
        """Those of a value, with so many rows in the place of the tokens."""
        return self._sizes(self.rows.of[node].dims, self.count)

    def matrix(self, node: Node) -> tuple[Node, Node | None]:
        """A value's rows as a matrix, and its constant as `[1, N]`."""
        found = self.value(node)
        n = self.rows.of[node].width
        flat = self.edit.reshape(self.written(node), [self.count, n])
        return flat, found.constant and self.edit.reshape(found.constant, [1, n])

    def value(self, node: Node) -> Value:
        todo = [node]
        while todo:
            n = todo[-1]
            missing = [] if n in self.values else [i for i in self.rows.operands(n) if i not in self.values]
            todo += missing
            if not missing:
                todo.pop()
                if n not in self.values:
                    self.values[n] = self._again(n)
        return self.values[node]

    def _again(self, node: Node) -> Value:
        if node.target in PRODUCTS:
            return self._product(node)
        if node.target in SUMS:
            return self._sum(node)
        operands = self.rows.operands(node)
        whole = [self.values[n] for n in operands]
        diagonal = self._diagonal(node, whole[0]) if len(whole) == 1 else self._side_by_side(node, whole)
        rows = diagonal or self._call(node, {n: self.written(n) for n in operands}, self.count)
        constants = {n: v.constant for n, v in zip(operands, whole, strict=True)}
        return Value(rows, self._constant(node, constants))

    def _constant(self, node: Node, constants: dict[Node, Node | None]) -> Node | None:
        """An op on the constants of its operands: zero where one of them has none and another has."""
        if all(c is None for c in constants.values()):
            return None
        filled = {n: c if c is not None else self._zeros(n) for n, c in constants.items()}
        return self._call(node, filled, 1)

    def _zeros(self, node: Node) -> Node:
        return self._filled(node, self._sizes(self.rows.of[node].dims, 1))

    def _diagonal(self, node: Node, found: Value) -> Diagonal | None:
        """What leaves a diagonal matrix one: another layout of the same rows, a scale of each feature, some columns."""
        held = self.rows.of[node].diagonal
        if not isinstance(found.rows, Diagonal) or held is None:
            return None
        of = found.rows.of
        if held != found.rows.columns:
            start = found.rows.columns[0]
            some = of and self.edit.call(aten.slice.Tensor, of, 0, held[0] - start, held[1] - start)
            return Diagonal(held, some)
        if node.target not in SCALINGS:
            return found.rows
        other = next(a for a in node.args[:2] if not (isinstance(a, Node) and a in self.values))
        scaled = self.edit.call(node.target, of or self._ones(node, found.rows.width), self._vector(other))
        return Diagonal(held, scaled)

    def _side_by_side(self, node: Node, found: list[Value]) -> Diagonal | None:
        """Columns of a diagonal matrix in their order again."""
        held, parts = self.rows.of[node].diagonal, [v.rows for v in found if isinstance(v.rows, Diagonal)]
        if held is None or node.target is not aten.cat.default or len(parts) < len(found):
            return None
        if all(part.of is None for part in parts):
            return Diagonal(held)
        return Diagonal(held, self.edit.call(aten.cat.default, [p.of or self._ones(node, p.width) for p in parts]))

    def _ones(self, node: Node, count: int) -> Node:
        return self.edit.call(aten.full.default, [count], 1, dtype=self._wide(node), device=value(node).device)

    def _vector(self, other: Any) -> Any:
        """A factor of each feature, or one of all."""
        if not isinstance(other, Node):
            return other
        weight = self._weight(other)
        size = int(numel(shape(weight)))
        return self.edit.reshape(weight, [size]) if shape(weight) else weight

    def _sum(self, node: Node) -> Value:
        a, b = node.args[:2]
        kwargs = node.kwargs
        inside = [n for n in (a, b) if isinstance(n, Node) and n in self.values]
        if len(inside) == 2 or (len(inside) == 1 and a is b):
            ends = [self.values[n].rows for n in (a, b)]  # type: ignore[index]
            rows: Node | Diagonal
            held = self.rows.of[node].diagonal
            if held is not None:
                of = [end.of or self._ones(node, end.width) for end in ends]  # type: ignore[union-attr]
                rows = Diagonal(held, self.edit.call(node.target, *of, **kwargs))
            else:
                rows = self._call(node, {n: self.written(n) for n in inside}, self.count)
            return Value(rows, self._constant(node, {n: self.values[n].constant for n in inside}))
        (x,) = inside
        constant = self.values[x].constant or self._zeros(x)
        found = self.values[x].rows
        if x is b:  # weight + s·x, of which the rows are s·x
            scale = (1 if node.target is aten.add.Tensor else -1) * node.kwargs.get("alpha", 1)  # type: ignore[operator]
            if scale != 1 and isinstance(found, Diagonal):
                scaled = self.edit.times(found.of or self._ones(node, found.width), scale)
                found = Diagonal(found.columns, scaled)
            elif scale != 1:
                found = self.edit.times(self.written(x), scale)
        other = a if x is b else b
        if isinstance(other, Node):
            other = other.args[1] if is_constant(other) else self._weight(other)
        pair = (other, constant) if x is b else (constant, other)
        if not isinstance(pair[0], Node):
            like = {"dtype": self._wide(node), "device": value(node).device}
            pair = (self.edit.call(aten.full.default, [1], pair[0], **like), pair[1])
        return Value(found, self.edit.call(node.target, *pair, **kwargs))

    def _product(self, node: Node) -> Value:
        *bias, a, b = node.args
        x, on_left = (a, True) if isinstance(a, Node) and a in self.values else (b, False)
        assert isinstance(x, Node)
        weight = self._weight(b if on_left else a)  # type: ignore[arg-type]
        product = aten.mm.default if value(weight).ndim == 2 else aten.bmm.default
        found = self.values[x]
        rows: Node
        if (
            isinstance(found.rows, Diagonal)
            and on_left
            and product is aten.mm.default
            and shape(weight)[0] == found.rows.width  # it reads all features of a row
        ):
            d, (start, end) = found.rows.of, found.rows.columns
            rows = weight
            if d is not None:
                rows = self.edit.times(weight, self.edit.call(aten.unsqueeze.default, d, 1))
            if (start, end) != (0, self.count):
                rows = self.edit.call(aten.constant_pad_nd.default, rows, [0, 0, start, self.count - end])
        else:
            written = self.written(x)
            rows = self.edit.call(product, *((written, weight) if on_left else (weight, written)))
        constant = found.constant
        if constant is not None:
            constant = self.edit.call(product, *((constant, weight) if on_left else (weight, constant)))
        if bias:
            (c,) = bias
            assert isinstance(c, Node)
            if c in self.values:
                rows = self.edit.add(rows, self.written(c))
                added = self.values[c].constant
            else:
                added = self._weight(c)
            if added is not None:
                start = constant if constant is not None else self._zeros(node)
                constant = self.edit.add(start, added)
        return Value(rows, constant)

    def _call(self, node: Node, operands: dict[Node, Node], count: int) -> Node:
        """The node's op on other operands, with sizes for so many rows."""
        sizes = self._sizes(self.rows.of[node].dims, count)
        if node.target in RESHAPES:
            return self.edit.reshape(operands[tensor_arg(node, 0)], sizes)
        if node.target is aten.expand.default:
            return self.edit.call(aten.expand.default, operands[tensor_arg(node, 0)], sizes)
        if node.target is aten.copy.default or node.target in COPIES | CASTS:
            return operands[tensor_arg(node, 1 if node.target is aten.copy.default else 0)]
        part = part_of(node)
        if part is not None:
            return self.edit.call(part[0], operands[part[1]], *part[2])
        if node.target is aten.cat.default:
            return self._joined(node, operands, count)
        args = [self._argument(a, operands) for a in node.args]
        if node.target in PLACINGS and is_zero(node.args[0]):
            args[0] = self._filled(node, sizes)
        kwargs = {k: v for k, v in node.kwargs.items() if k != "dtype"}
        return self.edit.call(node.target, *args, **kwargs)

    def _joined(self, node: Node, operands: dict[Node, Node], count: int) -> Node:
        """A cat, with as many rows of zeros where a part is constant."""
        parts, i = node.args[0], node.args[1] if len(node.args) > 1 else 0
        dims = list(self.rows.of[node].dims)
        found = []
        for part in parts:  # type: ignore[union-attr]
            dims[i] = (int(shape(part)[i]),)  # type: ignore[call-overload, arg-type, index]
            found.append(operands.get(part) or self._filled(node, self._sizes(tuple(dims), count)))  # type: ignore[arg-type]
        return self.edit.call(aten.cat.default, found, i)

    def _filled(self, node: Node, sizes: list[int]) -> Node:
        return self.edit.call(aten.full.default, sizes, 0, dtype=self._wide(node), device=value(node).device)

    def _argument(self, arg: Any, operands: dict[Node, Node]) -> Any:
        if isinstance(arg, (list, tuple)):
            return [self._argument(a, operands) for a in arg]
        if isinstance(arg, Node):
            return operands[arg] if arg in operands else self._weight(arg)
        return arg

    def _sizes(self, dims: Dims, count: int) -> list[int]:
        def size(atom: Atom) -> int:
            return atom if isinstance(atom, int) else count if (atom.index, atom.part) == (self.lead, 0) else 1

        return [int(numel([size(a) for a in dim])) for dim in dims]

    def _wide(self, node: Node) -> torch.dtype:
        return self.dtype.to_complex() if value(node).dtype.is_complex else self.dtype

    def _weight(self, node: Node) -> Node:
        dtype = value(node).dtype
        return self.edit.cast(node, self._wide(node)) if dtype.is_floating_point or dtype.is_complex else node

    def written(self, node: Node) -> Node:
        """A value's rows in its own layout."""
        self.value(node)
        return self._written(self.values[node].rows, self.rows.of[node].dims)

    def _written(self, rows: Node | Diagonal, dims: Dims) -> Node:
        if isinstance(rows, Node):
            return rows
        n = self.count
        device = value(self.source).device
        iota = self.edit.call(
            prims.iota.default, n, start=0, step=1, dtype=torch.int64, device=device, requires_grad=False
        )
        column = self.edit.call(aten.unsqueeze.default, iota, 1)
        eye = self.edit.cast(self.edit.call(aten.eq.Tensor, column, iota), self.dtype)
        if rows.columns != (0, n):
            eye = self.edit.call(aten.slice.Tensor, eye, 1, *rows.columns)
        if rows.of is not None:
            eye = self.edit.times(eye, rows.of)
        return self.edit.reshape(eye, self._sizes(dims, n))
