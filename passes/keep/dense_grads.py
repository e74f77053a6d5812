"""Parameter gradients that read a product's result, from `G = uᵀ·dy` instead.

The gradient of a vector behind a layer, `dl = Σ_t dy·(u·W)`, and of a matrix behind it, `(u·W)ᵀ·dz`, read u·W: a tensor
that the frozen model does not keep, and that takes the layer's own product to compute again. Both are sums over tokens
of something linear in u times something linear in dy, so they depend on `G = uᵀ·dy` alone (see `affine.py`):
`dl = Σ_k W·G`, `Wᵀ·(uᵀ·dz)`. G costs what u·W costs, is no larger than W, and several gradients of a layer share it:
where a vector has made it, and it is not rounded to less than they are, `dA = G·Bᵀ` and `dB = Aᵀ·G` read no token any
more. u is the narrowest value on the way: where the product is `z·B` with z = x·A of rank r, G = zᵀ·dy has r rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from peft_fx.passes.analyse.algebra import MANTISSA, Size, finer
from peft_fx.passes.analyse.dims import Token, in_order, plain
from peft_fx.passes.analyse.flow import Flow
from peft_fx.passes.analyse.maps import AffineMap, AffineMaps
from peft_fx.passes.decide import price
from peft_fx.passes.decide.machine import Machine
from peft_fx.passes.graph.editor import Builder, erase_unused
from peft_fx.passes.graph.nodes import (
    CAST,
    CASTS,
    COPIES,
    RESHAPES,
    SUMS,
    aten,
    is_tensor,
    numel,
    shape,
    tensor_arg,
    value,
)
from peft_fx.passes.keep.chains import Recompute
from peft_fx.passes.keep.in_place_reads import MIXED
from peft_fx.passes.rewrite.materialise import Diagonal, Materialise, Value

FEW = 8  # with an eighth as many tokens as G has rows, a result is kept for a vector's gradient
NARROW = 4  # a product with a quarter of its input's columns is computed again


Met = tuple[Node, Node, Node]  # a sum over tokens, and what of forward and of backward it multiplies


@dataclass(frozen=True)
class Contraction:
    """A sum over tokens: `Σ_t read·other`, elementwise, or `readᵀ·other`, and what G is made of, `u` and `dy`; `source`
    and `origin` hold these in the layout and the dtype that read and other are computed from."""

    node: Node
    read: Node
    other: Node
    u: Node
    dy: Node
    source: Node
    origin: Node

    @property
    def is_matrix(self) -> bool:
        return self.node.target is aten.mm.default


@dataclass(frozen=True)
class Budget:
    """Seconds that making G may cost in all, and what a GB less that is kept is worth besides."""

    seconds: float
    worth: float = 0.0


@dataclass
class Moments:
    """What was done: the nodes added, those among them that read activations, and the weights whose products are not
    computed again, trained ones where no frozen one is met."""

    added: list[Node]
    reading: frozenset[Node] = frozenset()
    weights: frozenset[Node] = frozenset()


def from_moments(
    graph: Graph,
    flow: Flow,
    fake_mode: AbstractContextManager[Any],
    hint: Callable[[Size], int],
    without: Callable[[], Recompute],
    machine: Machine,
    budget: Budget | None = None,
    lossy: bool = False,
    dense: bool = False,
) -> Moments:
    """Replaces such gradients in place, where that pays beside what is kept `without`, and within a `budget`.

    A `lossy` policy keeps less than that: what it keeps of a matrix's input is read, not made again by a product; and a
    layer's result is not kept for a vector. `dense` does so wherever it can be done.
    """
    rows, build = AffineMaps(graph.nodes, flow), Builder(graph, fake_mode)
    met = list(_contractions(graph, rows, flow))
    found = [c for c in (_by_itself(m, rows, None if dense else NARROW) for m in met) if c is not None]
    if not found:
        return Moments([])
    keep = without()
    chosen: dict[Node, Contraction] = {}
    for one in found:
        at_hand = not lossy and keep.costs_nothing(one.read)
        pays = dense or (not at_hand and _pays(one, rows.of[one.source].width, hint, keep))
        if pays and not (one.is_matrix and lossy):
            chosen[one.node] = one
    if budget is not None and not (dense or lossy):
        chosen = _afforded(chosen, budget, machine, hint, keep)
    alone = list(chosen.values())
    more = [_shared(m, alone, rows, hint, machine) for m in met if m[0] not in chosen and not lossy]
    chosen |= {one.node: one for one in more if one is not None}
    made: dict[Any, Node] = {}
    weights: set[Node] = set()
    for node in [n for n in graph.nodes if n in chosen]:  # the first one makes what others share
        one = chosen[node]
        with graph.inserting_before(node):
            new = build.laid_out(_Gradient(build, rows, one, made, machine).gradient(), value(node).stride())
        node.replace_all_uses_with(new)
        erase_unused(graph, node)
        row = rows.of[one.read]
        is_input = one.source is row.source or not rows.of[one.source].products
        weights |= (row.frozen or row.trained) if is_input else set()
    return Moments(build.added, frozenset(made.values()), frozenset(weights))


def _afforded(
    chosen: dict[Node, Contraction], budget: Budget, machine: Machine, hint: Callable[[Size], int], keep: Recompute
) -> dict[Node, Contraction]:
    """Those that may be made: by turns the one that saves most bytes in a second, while the budget lasts."""
    by_product: dict[Any, list[Contraction]] = {}
    for one in chosen.values():
        by_product.setdefault((one.u, one.dy), []).append(one)
    priced = []
    for (u, dy), ones in by_product.items():
        K, M = (hint(shape(n)[-1]) for n in (u, dy))
        seconds = _seconds(machine, hint(numel(shape(u))) // max(1, K), K, M, u, dy)
        seconds -= sum(_instead(machine, one, hint, keep) for one in ones)
        priced.append((seconds, sum(map(keep.bytes, {one.read for one in ones})), ones))
    left = budget.seconds
    made: set[Node] = set()
    for seconds, saved, ones in sorted(priced, key=lambda p: p[0] / max(1, p[1])):
        cost = seconds - budget.worth * saved / 1e9
        if cost <= left:
            left -= max(0.0, cost)
            made.update(one.node for one in ones)
    return {node: one for node, one in chosen.items() if node in made}


def _seconds(machine: Machine, T: int, K: int, M: int, u: Node, dy: Node) -> float:
    """Of G = uᵀ·dy, and of a pass over it beside as large a weight."""
    held = _held_in(u, dy, machine)
    seconds = machine.product(K, T, M, _multiplied_in(u, dy, machine)) + machine.one_pass(2 * K * M * held.itemsize)
    own = finer(value(_uncast(u)).dtype, value(dy).dtype)
    copied = T * (K + M) * (own.itemsize + held.itemsize) if held != own and not machine.mixed else 0
    return seconds + (machine.one_pass(copied) if copied else 0.0)


def _instead(machine: Machine, one: Contraction, hint: Callable[[Size], int], keep: Recompute) -> float:
    """Seconds of what reads all tokens otherwise."""
    if not one.is_matrix:
        return machine.one_pass(keep.bytes(one.read))
    (m, k), n = map(hint, shape(tensor_arg(one.node, 0))), hint(shape(one.node)[1])
    return machine.product(m, k, n, value(one.node).dtype)


def _by_itself(met: Met, rows: AffineMaps, narrow: int | None) -> Contraction | None:
    """A contraction that reads a product's result, as one with the gradient of that."""
    node, read, other = met
    source = _narrowest(read, rows, narrow) if rows.of[read].products else None
    origin = _untransposed(other) if node.target is aten.mm.default else _uncast(other)
    if source is None or (node.target is aten.mm.default and not _is_linear(node, origin, other, rows)):
        return None
    return Contraction(node, read, other, source, origin, source, origin)


def _shared(
    met: Met, made: Iterable[Contraction], rows: AffineMaps, hint: Callable[[Size], int], machine: Machine
) -> Contraction | None:
    """A matrix's gradient both of whose operands are computed from what a vector's G is made of, where that costs
    less than what it reads of all tokens."""
    node, read, other = met
    for one in made:
        source, origin = _start(one.u, rows.of[read].source), _start(one.dy, rows.of[other].source)
        if node.target is not aten.mm.default or one.is_matrix or shape(one.dy)[-1] != rows.of[one.read].width:
            continue
        if (rows.of[read].source, rows.of[other].source) != (rows.of[source].source, rows.of[origin].source):
            continue
        held = _held_in(one.u, one.dy, machine)
        if finer(held, value(node).dtype) != held:
            continue  # G rounds what the gradient does not: where u and dy are bf16, and a product of theirs is
        if _leads_to(source, read, rows) and _is_linear(node, origin, other, rows):
            K, N = (int(shape(n)[-1]) for n in (source, origin))
            cheaper = hint(numel(shape(source))) // K * (K + N) >= K * N
            return Contraction(node, read, other, one.u, one.dy, source, origin) if cheaper else None
    return None


def _held_in(u: Node, dy: Node, machine: Machine) -> torch.dtype:
    """The dtype of G: that of the finer one; fp32 where a device has products of half-precision matrices in fp32, or
    multiplies fp32 sooner than these, and of fp16, as the sum may leave its range where the gradient that is made of it
    does not."""
    dtype = finer(value(_uncast(u)).dtype, value(dy).dtype)
    mixed = dtype == torch.bfloat16 and (value(u).device.type in MIXED or not machine.has_units_of(dtype))
    return torch.float32 if mixed or dtype == torch.float16 else dtype


def _multiplied_in(u: Node, dy: Node, machine: Machine) -> torch.dtype:
    """The dtype of what is multiplied for G: that of u and dy where the device's products give a wider one."""
    dtype = finer(value(_uncast(u)).dtype, value(dy).dtype)
    return dtype if value(u).device.type in MIXED else _held_in(u, dy, machine)


def _is_linear(node: Node, origin: Node, other: Node, rows: AffineMaps) -> bool:
    """Whether what is summed over tokens is linear in a value of theirs, nothing constant being added."""
    if not _leads_to(origin, other, rows):
        return False
    biased = SUMS | {aten.addmm.default, aten.baddbmm.default}
    row = rows.from_source([other], origin).of[other]
    return not any(n.target in biased for n in rows.between([other], origin)) and _sums_over_tokens(node, other, row)


def _untransposed(node: Node) -> Node:
    """A value before it was cast to a finer dtype and transposed."""
    while True:
        start, node = node, _uncast(node)
        if node.target is aten.permute.default and list(node.args[1]) == [1, 0]:  # type: ignore[arg-type]
            node = tensor_arg(node, 0)
        if node is start:
            return node


def _start(node: Node, source: Node) -> Node:
    """A value before it was cast to any dtype, and its tokens laid out anew; `source` where that is the same value."""

    def before(node: Node, width: Any) -> Node:
        while node.target in CASTS | COPIES | RESHAPES and width in (None, shape(tensor_arg(node, 0))[-1]):
            node = tensor_arg(node, 0)
        return node

    width = shape(node)[-1]
    is_source = shape(source)[-1] == width and before(node, None) is before(source, None)
    return source if is_source else before(node, width)


def _pays(found: Contraction, width: int, hint: Callable[[Size], int], keep: Recompute) -> bool:
    """Not for few tokens, nor where x would be kept in the place of less, of x·A where A is frozen."""
    tokens = hint(numel(shape(found.source))) // width if width else 0
    if not tokens or tokens < (width if found.is_matrix else width / FEW):
        return False
    read, source = (hint(numel(shape(n))) for n in (found.read, found.source))
    return read >= source or keep.cost(found.source) <= keep.bytes(found.read)


def _contractions(graph: Graph, rows: AffineMaps, flow: Flow) -> Iterator[Met]:
    """The sums over tokens in backward of a value of forward times one of backward."""
    for node in graph.nodes:
        if node not in flow.backward:
            continue
        a, b = _factors(node)
        for read, other in ((a, b), (b, a)):
            if read is None or other is None or other not in flow.backward or read in flow.backward:
                continue
            if read in rows.of and _sums_over_tokens(node, read, rows.of[read]):
                yield node, read, other


def _factors(node: Node) -> tuple[Node | None, Node | None]:
    """What is multiplied and then summed over tokens."""
    if node.target is aten.mm.default:
        return tensor_arg(node, 0), tensor_arg(node, 1)
    if node.target is aten.sum.dim_IntList:
        product = _uncast(tensor_arg(node, 0))
        operands = [n for n in product.args[:2] if is_tensor(n)] if product.target is aten.mul.Tensor else []
        if len(operands) == 2 and shape(operands[0]) == shape(operands[1]):
            return operands[0], operands[1]
    return None, None


def _uncast(node: Node) -> Node:
    """A value before it was cast to a finer dtype: the same numbers."""
    while node.target is CAST and MANTISSA.get(value(tensor_arg(node, 0)).dtype, 99) <= MANTISSA[value(node).dtype]:
        node = tensor_arg(node, 0)
    return node


def _sums_over_tokens(node: Node, read: Node, row: AffineMap) -> bool:
    tokens = [i for i, dim in enumerate(row.dims) if any(isinstance(a, Token) for a in dim)]
    if not tokens or any(isinstance(a, int) for i in tokens for a in row.dims[i]):
        return False
    if node.target is aten.mm.default:
        return tokens == [1 if node.args[0] is read else 0]
    dims = {d % len(row.dims) for d in node.args[1]}  # type: ignore[union-attr, operator]
    return in_order(row.dims) and set(tokens) <= dims and all(shape(read)[d] == 1 for d in dims - set(tokens))


def _narrowest(read: Node, rows: AffineMaps, narrow: int | None) -> Node | None:
    """The value of fewest features that a product's wide result is computed from, and nothing else is; none where the
    result has one part in `narrow` of its features."""
    row, node = rows.of[read], read
    found: list[Node] = []
    while node is not row.source:
        operands = {n for n in rows.operands(node) if n in rows.of}
        if len(operands) != 1:
            node = row.source  # several ways lead here: they meet at the source
        else:
            (node,) = operands
        one_piece = plain(rows.of[node].dims) and shape(node)[-1] == rows.of[node].width
        if rows.of[node].products < row.products and one_piece:
            found.append(node)
    leading = (n for n in sorted(found, key=lambda n: rows.of[n].width) if _leads_to(n, read, rows))
    best = next(leading, None)
    if best is None or (narrow is not None and narrow * rows.of[read].width <= rows.of[best].width):
        return None
    return best


def _leads_to(source: Node, read: Node, rows: AffineMaps) -> bool:
    """Whether a value tells the tokens apart that a later one has: flattened, it does not say where they part."""
    row = rows.from_source([read], source).of.get(read)
    return row is not None and row.source is source


class _Gradient:
    """One gradient from G."""

    def __init__(self, build: Builder, rows: AffineMaps, found: Contraction, made: dict[Any, Node], machine: Machine):
        self.build, self.rows, self.found, self.made, self.machine = build, rows, found, made, machine
        self.dtype = price.merge_dtype(value(found.source).dtype)
        if found.is_matrix:  # a product in fp64 takes longer than what it is instead of
            self.dtype = finer(torch.float32, value(found.node).dtype)
        build.like = found.node

    def gradient(self) -> Node:
        node = self.found.node
        result = self._matrix() if self.found.is_matrix else self._vector()
        result = self.build.reshape(result, list(shape(node)))
        return self.build.cast(result, value(node).dtype)

    def _read(self) -> tuple[Node | Diagonal, Node | None]:
        """What is read of forward, on the rows of an identity in the place of the tokens, and its constant: weights, to
        be made in backward."""
        source, read = self.found.source, self.found.read
        self.build.rebuild = True
        replay = Materialise(self.build, self.rows.from_source([read], source), source, self._width, self.dtype)
        found = replay.value(read)
        result = (found.rows, found.constant) if self.found.is_matrix else replay.matrix(read)
        self.build.rebuild = False
        return result

    @property
    def _width(self) -> int:
        return self.rows.of[self.found.source].width

    def _vector(self) -> Node:
        """`Σ_t read·other`."""
        rows, constant = self._read()
        assert isinstance(rows, Node)
        result = self.build.call(aten.mul.Tensor, rows, self._second())
        result = self.build.call(aten.sum.dim_IntList, result, [0])
        if constant is not None:
            total = self.build.call(aten.mul.Tensor, constant, self._first())
            result = self.build.call(aten.add.Tensor, result, self.build.call(aten.squeeze.dim, total, 0))
        return result

    def _matrix(self) -> Node:
        """`readᵀ·other` or `otherᵀ·read`, K rows in the place of the tokens; and one row more for the constant."""
        rows, constant = self._read()
        result = self._times(rows, self._on(self._second(), self._width))
        if constant is not None:
            outer = self.build.call(aten.mul.Tensor, constant, self._on(self._first(), 1))
            result = self.build.call(aten.add.Tensor, result, outer)
        return result

    def _times(self, rows: Node | Diagonal, others: Node) -> Node:
        left = self.found.node.args[0] is self.found.read
        if isinstance(rows, Node):
            return self.build.call(aten.mm.default, *((rows, others) if left else (others, rows)))
        if rows.of is None:
            return others
        return self.build.call(aten.mul.Tensor, others, self.build.reshape(rows.of, [-1, 1] if left else [1, -1]))

    def _on(self, rows: Node, count: int) -> Node:
        """`other` on the rows of G, or of their sum, in the place of the tokens."""
        origin, other = self.found.origin, self.found.other
        replay = Materialise(self.build, self.rows.from_source([other], origin), origin, count, self.dtype)
        replay.values[origin] = Value(self.build.reshape(rows, replay.sizes(origin)))
        return replay.written(other)

    def _tokens(self) -> tuple[Node, Node]:
        """u as [T,K] and what it meets as [T,M], in one dtype, that of the coarser unless they hold more."""
        u, other = _uncast(self.found.u), self.found.dy
        M = shape(other)[-1] if self.found.is_matrix else self.rows.of[self.found.read].width
        dtype = finer(value(u).dtype, value(other).dtype)
        u = self.build.reshape(u, [-1, self._width])
        other = self.build.reshape(other, [-1, M])
        return self.build.cast(u, dtype), self.build.cast(other, dtype)

    def _second(self) -> Node:
        """G = uᵀ·dy [K,M]."""
        key = "G", self.found.u, self.found.dy
        if key not in self.made:
            u, dy = self._tokens()
            self.made[key] = self._over_tokens(self.build.flip(u), dy)
        return self.build.cast(self.made[key], self.dtype)

    def _over_tokens(self, u: Node, dy: Node) -> Node:
        held = _held_in(self.found.u, self.found.dy, self.machine)
        if value(u).dtype == held:
            return self.build.call(aten.mm.default, u, dy)
        if value(u).device.type in MIXED:
            return self.build.call(aten.mm.dtype, u, dy, held)
        return self.build.call(aten.mm.default, *(self.build.cast(n, held) for n in (u, dy)))

    def _first(self) -> Node:
        """Σ_t dy [1,M]: what a constant beside u·W meets."""
        key = "sum", self.found.dy
        if key not in self.made:
            _, dy = self._tokens()
            self.made[key] = self.build.call(aten.sum.dim_IntList, self.build.cast(dy, self.dtype), [0], True)
        return self.build.cast(self.made[key], self.dtype)
