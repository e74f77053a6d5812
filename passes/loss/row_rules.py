"""How each op treats the rows of a tensor: which dimensions count them in its result, and which of its operands' do.

A row is all that belongs to one token. An op is *independent by rows* where each row of its result is computed from the
same row of its operands, and from operands that have no rows; a *sum over rows* adds one number, or matrix, of every
row. Done to a part of the rows, an op of the first kind gives that part of its result, and one of the second kind
an addend of it. `ROWS` has one short rule for each op; an op without a rule, or a rule that does not hold, raises
`Unfit`, which names the op: never a guess.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from peft_fx.passes.analyse.algebra import Size
from peft_fx.passes.graph.nodes import CAST, COPIES, RESHAPES, aten, is_random, is_tensor, numel, shape


class Unfit(Exception):
    """Why rows cannot be taken apart: a refusal's code and its text."""

    def __init__(self, code: str, detail: str):
        super().__init__(detail)
        self.code, self.detail = code, detail


@dataclass(frozen=True)
class RowDims:
    """Dimensions `start` to `stop` of a tensor count its rows, together."""

    start: int
    stop: int

    def sizes(self, sizes: Sequence[Any], rows: Sequence[Any]) -> list[Any]:
        """A tensor's sizes with others for its rows."""
        return [*sizes[: self.start], *rows, *sizes[self.stop :]]

    def part(self, sizes: Sequence[Any], count: Any) -> list[Any]:
        """A tensor's sizes with `count` rows, in as many dimensions: so an op's dimensions keep their numbers."""
        return self.sizes(sizes, [1] * (self.stop - self.start - 1) + [count])


@dataclass(frozen=True)
class RowEffect:
    """What an op makes of rows. `rows` is None for a sum over rows; `operands` are the rows of each operand that has
    any, by position: those of the others are none."""

    rows: RowDims | None
    operands: Mapping[int, RowDims] = field(default_factory=dict)


@dataclass(frozen=True)
class RowContext:
    """What a rule is told: the number of rows, and the rows of those values that are known to have any."""

    count: Size
    known: Mapping[Node, RowDims]

    def of(self, arg: Any) -> RowDims | None:
        return self.known.get(arg) if isinstance(arg, Node) else None

    def by_size(self, sizes: Sequence[Size]) -> RowDims | None:
        """The first dimensions that count all rows, none of size 1 at either end."""
        for start in range(len(sizes)):
            if sizes[start] == 1:
                continue
            for stop in range(start + 1, len(sizes) + 1):
                if numel(sizes[start:stop]) == self.count:
                    return RowDims(start, stop)
        return None


Rule = Callable[[Node, RowContext], RowEffect]
ROWS: dict[Any, Rule] = {}


def treatment(node: Node, row: RowContext) -> RowEffect:
    """By the rule of the node's op; `Unfit` where there is none."""
    rule = None if is_random(node) else ROWS.get(node.target)
    if rule is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
        rule = _pointwise
    if rule is None:
        raise Unfit("unknown_op", f"nothing is known of rows in {node.target}")
    return rule(node, row)


def treatments(nodes: Iterable[Node], count: Size) -> dict[Node, RowEffect]:
    """What nodes make of `count` rows, in order. `Unfit` where one reads a sum over rows of another, or rows that its
    rule knows nothing of."""
    known: dict[Node, RowDims] = {}
    treated: dict[Node, RowEffect] = {}
    row, inside = RowContext(count, known), dict.fromkeys(nodes)
    for node in inside:
        treated[node] = how = treatment(node, row)
        if how.rows is not None:
            known[node] = how.rows
        elif any(user in inside for user in node.users):
            raise _meeting(node)
        for i, there in how.operands.items():
            if node.args[i] in treated and treated[node.args[i]].rows != there:  # type: ignore[index]
                raise Unfit("shape", f"rows are not told apart in {node.target}")
        if any(n in known for n in node.all_input_nodes if n not in [node.args[i] for i in how.operands]):
            raise Unfit("shape", f"rows are lost in {node.target}")
    return treated


def _rule(*targets: Any) -> Callable[[Rule], Rule]:
    def add(rule: Rule) -> Rule:
        ROWS.update(dict.fromkeys(targets, rule))
        return rule

    return add


def _meeting(node: Node) -> Unfit:
    return Unfit("nonlinear", f"rows meet in {node.target}")


def _misshapen(node: Node) -> Unfit:
    return Unfit("shape", f"rows are not told apart in {node.target} of {list(shape(node))}")


def tensors(node: Node) -> list[tuple[int, Node]]:
    return [(i, a) for i, a in enumerate(node.args) if is_tensor(a)]


@_rule(*COPIES, CAST)
def _pointwise(node: Node, row: RowContext) -> RowEffect:
    """Operands are aligned at their last dimensions, and broadcast."""
    rank = len(shape(node))
    found = {RowDims(r.start - len(shape(a)), r.stop - len(shape(a))) for _, a in tensors(node) if (r := row.of(a))}
    if len(found) > 1 or any(isinstance(a, (list, tuple)) for a in node.args):
        raise _misshapen(node)
    rows = next((RowDims(r.start + rank, r.stop + rank) for r in found), None) or row.by_size(shape(node))
    if rows is None:
        raise _misshapen(node)
    operands = {i: there for i, a in tensors(node) if (there := _aligned(a, rows, rank))}
    return _whole(node, row, RowEffect(rows, operands))


def _whole(node: Node, row: RowContext, found: RowEffect) -> RowEffect:
    """The same, where the result and every operand that has rows has all of them."""
    having = [(node, found.rows)] + [(node.args[i], there) for i, there in found.operands.items()]
    if any(r and numel(shape(n)[r.start : r.stop]) != row.count for n, r in having):  # type: ignore[arg-type]
        raise _misshapen(node)
    return found


def _aligned(operand: Node, rows: RowDims, rank: int) -> RowDims | None:
    """The rows of an operand that is broadcast to `rank` dimensions, None where it has none."""
    sizes = shape(operand)
    missing = rank - len(sizes)
    start, stop = max(0, rows.start - missing), max(0, rows.stop - missing)
    return RowDims(start, stop) if any(n != 1 for n in sizes[start:stop]) else None


@_rule(*RESHAPES)
def _reshape(node: Node, row: RowContext) -> RowEffect:
    """What comes before the rows and what comes after them stays apart."""
    source = node.args[0]
    assert isinstance(source, Node)
    old, new = shape(source), shape(node)
    rows = row.of(source) or row.by_size(old)
    before = numel(old[: rows.start]) if rows else 1
    for start in range(len(new)):
        if rows and new[start] != 1 and numel(new[:start]) == before:
            for stop in range(start + 1, len(new) + 1):
                if numel(new[start:stop]) == row.count:
                    return RowEffect(RowDims(start, stop), {0: rows})
    raise _misshapen(node)


@_rule(aten.expand.default)
def _expand(node: Node, row: RowContext) -> RowEffect:
    source = node.args[0]
    assert isinstance(source, Node)
    rank, known = len(shape(node)), row.of(source)
    added = rank - len(shape(source))
    rows = RowDims(known.start + added, known.stop + added) if known else row.by_size(shape(node))
    if rows is None:
        raise _misshapen(node)
    there = _aligned(source, rows, rank)
    return _whole(node, row, RowEffect(rows, {0: there} if there else {}))


@_rule(aten.permute.default)
def _permute(node: Node, row: RowContext) -> RowEffect:
    source, order = node.args[0], node.args[1]
    assert isinstance(source, Node)
    assert isinstance(order, (list, tuple))
    rows = row.of(source)
    if rows is None:
        raise _misshapen(node)
    order = [int(d) % len(order) for d in order]  # type: ignore[arg-type]
    start = order.index(rows.start)
    width = rows.stop - rows.start
    if order[start : start + width] != list(range(rows.start, rows.stop)):
        raise _meeting(node)
    return RowEffect(RowDims(start, start + width), {0: rows})


@_rule(aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims)
def _squeeze(node: Node, row: RowContext) -> RowEffect:
    """Dimensions of size 1 come and go beside the rows."""
    source = node.args[0]
    assert isinstance(source, Node)
    rows, old, new = row.of(source), shape(source), shape(node)
    if rows is None:
        raise _misshapen(node)
    before, kept = numel(old[: rows.start]), old[rows.start : rows.stop]
    for start in range(len(new)):
        stop = start + len(kept)
        if numel(new[:start]) == before and new[start:stop] == kept and numel(new[stop:]) == numel(old[rows.stop :]):
            return RowEffect(RowDims(start, stop), {0: rows})
    raise _meeting(node)


def _dims(node: Node, i: int) -> list[int]:
    """Argument `i` as dimensions from 0 upwards; all of them where it is absent."""
    rank = len(shape(node.args[0]))  # type: ignore[arg-type]
    given = node.args[i] if len(node.args) > i else None
    found = [given] if isinstance(given, int) else list(given) if given else range(rank)  # type: ignore[call-overload]
    return [int(d) % rank for d in found]


def _over(rows: RowDims, dims: Iterable[int]) -> bool:
    return any(rows.start <= d < rows.stop for d in dims)


@_rule(
    aten.sum.dim_IntList,
    aten.sum.default,
    aten.mean.dim,
    aten.amax.default,
    aten.amin.default,
    aten.any.dim,
    aten.all.dim,
    aten.argmax.default,
    aten.argmin.default,
    aten.prod.dim_int,
    aten.logsumexp.default,
    aten.var.correction,
)
def _reduction(node: Node, row: RowContext) -> RowEffect:
    """Of some dimensions; sums may be over all rows."""
    source = node.args[0]
    assert isinstance(source, Node)
    rows, dims = row.of(source), _dims(node, 1)
    if rows is None:
        raise _misshapen(node)
    if _over(rows, dims):
        if "aten::sum" in node.target.name() and all(d in dims for d in range(rows.start, rows.stop)):  # type: ignore[union-attr]
            return RowEffect(None, {0: rows})
        raise _meeting(node)
    gone = sum(d < rows.start for d in set(dims)) if len(shape(node)) < len(shape(source)) else 0
    return RowEffect(RowDims(rows.start - gone, rows.stop - gone), {0: rows})


@_rule(
    aten.gather.default,
    aten.scatter.value,
    aten.scatter.src,
    aten.scatter_add.default,
    aten.slice.Tensor,
    aten.slice_scatter.default,
    aten.cumsum.default,
    aten.constant_pad_nd.default,
    aten.flip.default,
)
def _along(node: Node, row: RowContext) -> RowEffect:
    """Along a dimension that counts no rows. All tensors have the same dimensions."""
    found = {r for _, a in tensors(node) if (r := row.of(a))}
    rows = next(iter(found), None) or row.by_size(shape(node))
    if rows is None or len(found) > 1 or any(len(shape(a)) != len(shape(node)) for _, a in tensors(node)):
        raise _misshapen(node)
    if node.target is aten.constant_pad_nd.default:
        pads, rank = list(node.args[1]), len(shape(node))  # type: ignore[arg-type]
        dims = [rank - 1 - i // 2 for i, n in enumerate(pads) if n]
    elif node.target is aten.flip.default:
        dims = _dims(node, 1)
    else:
        at = 2 if node.target is aten.slice_scatter.default else 1
        dim = node.args[at] if len(node.args) > at else 0
        dims = [int(dim) % len(shape(node))]  # type: ignore[call-overload]
    if _over(rows, dims):
        raise _meeting(node)
    return _whole(node, row, RowEffect(rows, {i: rows for i, _ in tensors(node)}))


@_rule(aten.mm.default, aten.bmm.default, aten.addmm.default)
def _product(node: Node, row: RowContext) -> RowEffect:
    """RowDims of the left factor are rows of the product, and columns of the right one its columns; rows that are
    multiplied together are summed."""
    *bias, (i, left), (j, right) = tensors(node)
    n = len(shape(left))
    a, b = row.of(left), row.of(right)
    if a is None and b is None and shape(left)[-2] == row.count:
        a = RowDims(n - 2, n - 1)
    outer, inner = RowDims(n - 2, n - 1), RowDims(n - 1, n)
    if a == inner or b == outer:  # one of them is known, the other must be as long
        if bias or numel(shape(left)[-1:]) != row.count or (a or inner) != inner or (b or outer) != outer:
            raise _misshapen(node)
        return RowEffect(None, {i: inner, j: outer})
    if a == outer and b is None:
        return RowEffect(outer, {i: outer} | _of_bias(bias, outer, n))
    if b == inner and a is None:
        return RowEffect(inner, {j: inner} | _of_bias(bias, inner, n))
    raise _meeting(node)


def _of_bias(bias: list[tuple[int, Node]], rows: RowDims, rank: int) -> dict[int, RowDims]:
    return {i: there for i, a in bias if (there := _aligned(a, rows, rank))}


SIZED = RESHAPES | {aten.expand.default}  # ops whose second argument is the result's sizes
FILLS = {aten.full.default, aten.zeros.default, aten.ones.default, aten.empty.memory_format}
