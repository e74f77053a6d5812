"""Adapter gradients without full-size copies in the adapter's dtype.

With a bf16 base and fp32 adapters, each product of an adapter's gradient, `dA = xᵀ(dy·Bᵀ)` and `dB = (x·A)ᵀdy`, reads
an fp32 copy of a bf16 tensor as long as the batch, and several are alive at once. The copy holds no more than the
tensor itself. So the product reads that, and its other factor, narrow and in fp32, as the sum of two bf16 matrices,
`hi = cast(F)` and `lo = cast(F - hi)`, side by side:

    x32·F  ->  y[:, :r] + y[:, r:]   with   y = x16·[hi | lo]

16 bits of the factor are kept that way. Layers that read the same x share one product,
`x16·[hi1 | lo1 | hi2 | ...]`: x is passed over once for the `x·A` of q, k and v, and once for their dA. A tensor is
read as it lies: `dyᵀ·z` is the transpose of `zᵀ·dy`, which a vector's gradient may need too, and then has. The result
is fp32 where a device multiplies half-precision matrices into fp32 (CUDA, XPU). A CPU rounds it, so there what the
rounded result lacks is computed as a second one, `y + (x16·F - y)`: 16 bits again. Products that the model's own
outputs need are left alone, and so is fp16: it lacks the range of what was written in fp32, small gradients and scaled
ones. And so are all of them on a machine that multiplies bf16 much slower than fp32, as most CPUs do: there the copy is
made, in backward and for the moment.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from peft_fx.kernels.library import available
from peft_fx.passes import narrow
from peft_fx.passes.algebra import MANTISSA, Matrix, Scale, Size, Term, coarser
from peft_fx.passes.flow import Flow
from peft_fx.passes.machine import Machine
from peft_fx.passes.nodes import (
    CAST,
    LAYOUTS,
    RESHAPES,
    SCALINGS,
    aten,
    is_number,
    is_tensor,
    numel,
    shape,
    tensor_arg,
    value,
    value_numbers,
)
from peft_fx.passes.price import reads_in_place
from peft_fx.passes.rewrite import Builder, erase_unused
from peft_fx.passes.transfer import Layout, Reader

MIXED = {"cuda", "xpu"}  # devices with a product of half-precision matrices that is not rounded to their dtype


def read_in_place(
    graph: Graph,
    flow: Flow,
    fake_mode: AbstractContextManager[Any],
    hint: Callable[[Size], int],
    machine: Machine,
    kernels: bool = True,
) -> list[Node]:
    """Rewrites every such product in place, those that read the same tensor in one product, where the machine does not
    multiply copies much sooner; by `kernels` of our own, where there are. Returns the nodes added."""
    copying = functools.partial(_copying, reader := Reader(value_numbers(graph)), flow, hint, machine, kernels)
    build = Builder(graph, fake_mode)
    operands = _operands(graph, reader)
    groups: dict[Any, list[_Copying]] = defaultdict(list)
    for node in graph.nodes:
        if node.target is not aten.mm.default or node in flow.forward:
            continue
        found = copying(node, True) or copying(node, False)
        if found is not None:
            groups[found.key].append(found)
    for members in _families(groups):
        for together, following in _batches(members):
            last = together[-1].node
            for node in sorted((n for n in following if n < last), reverse=True):
                last.append(node)
            _replace(graph, build, together, operands)
    return build.added


def _families(groups: dict[Any, list[_Copying]]) -> Iterator[list[_Copying]]:
    """Groups as one where a kernel may read several sources at once: the dy of layers that read one x, for `dy·Bᵀ` of
    all of them and for their dB; and, wherever that can be, for both."""
    family = {key: key for key in groups}
    for members in groups.values():
        beside = {k for k in groups if _named(members, groups[k])}
        for first in (True, False):
            alike = [k for k in beside if groups[k][0].first is first and not members[0].first]
            for k in alike:
                family[k] = alike[0]
    joined: dict[Any, list[_Copying]] = defaultdict(list)
    for key, members in groups.items():
        joined[family[key]] += members
    yield from (sorted(members, key=lambda m: m.node) for members in _read_once(list(joined.values())))


def _named(members: list[_Copying], others: list[_Copying]) -> bool:
    """Whether the narrow factors of members are computed from what others read, which a kernel may."""
    return others[0].kernel and others[0].source.name in {f.name for m in members for f in m.narrow.factors}


def _read_once(families: list[list[_Copying]]) -> list[list[_Copying]]:
    """Families as one where they are both kinds of products of the same sources. `xᵀ·(dy·Bᵀ)` needs dy before x, and
    `(x·A)ᵀ·dy` x before dy: of the two, what is wider is read once and the other one twice."""
    once: list[list[_Copying]] = []
    twice: list[list[_Copying]] = []
    inner = [f for f in families if not f[0].first and f[0].kernel]
    for into in sorted(inner, key=lambda f: -sum(m.features for m in {m.upright: m for m in f}.values())):
        sources = {m.upright for m in into}
        beside = [f for f in once if any(_named(into, [m]) for m in f) or any(_named(f, [m]) for m in into)]
        out = [f for f in families if f[0].first and {m.upright for m in f} == sources]
        if out and not beside and all(narrow.at_once(r) for f in (into, out[0]) for r in _ranks(f)):
            once.append(into)
            twice.append(out[0])
    apart = [f for f in families if not any(f is g for g in (*once, *twice))]
    return apart + [into + out for into, out in zip(once, twice, strict=True)]


def _ranks(members: list[_Copying]) -> Iterator[list[Size]]:
    """Of each source."""
    for source in {m.upright for m in members}:
        yield [shape(m.operands[1])[-1 if m.left else 0] for m in members if m.upright == source]


def _operands(graph: Graph, reader: Reader) -> dict[Any, Node]:
    """What the graph's own products read, by the matrix that it is: the first node that holds it."""
    found: dict[Any, Node] = {}
    for node in graph.find_nodes(op="call_function", target=aten.mm.default):
        for i in (0, 1):
            operand = tensor_arg(node, i)
            term = reader.term(operand, Layout(1, shape(operand)[-1]))
            if len(term.factors) == 1 and term.scale == Scale():
                found.setdefault((term.factors[0], value(operand).dtype), operand)
    return found


@dataclass(frozen=True)
class _Copying:
    """A product with an operand that is a wider and much larger copy of `source`, whose `precision` it can be read
    in; `left` where that is the left operand; `narrow` is what the other operand holds. `vector` are factors of the
    copy's features, as behind a magnitude: they go to the other operand where these are summed over, else (`outside`)
    to the result. `kernel` is whether one of our own may compute it."""

    node: Node
    left: bool
    source: Matrix
    scale: Scale
    narrow: Term
    kernel: bool
    vector: Node | None = None
    outside: bool = False

    @property
    def operands(self) -> tuple[Node, Node]:
        """The copy and the other one."""
        a, b = tensor_arg(self.node, 0), tensor_arg(self.node, 1)
        return (a, b) if self.left else (b, a)

    @property
    def turned(self) -> bool:
        """Whether the transpose is computed, so that the source is not transposed."""
        return self.source.flipped

    @property
    def first(self) -> bool:
        """Whether the source is the left operand of what is computed."""
        return self.left != self.turned

    @property
    def upright(self) -> Matrix:
        """The source as it lies."""
        return self.source.T if self.turned else self.source

    @property
    def features(self) -> int:
        """Of the source; a number, as all that a kernel takes."""
        n = shape(self.operands[0])[0 if self.turned else -1]
        return n if isinstance(n, int) else 0

    @property
    def key(self) -> Any:
        """Equal for products that are computed as one."""
        copied, other = self.operands
        sizes = shape(copied)[::-1] if self.turned else shape(copied)
        return self.upright, self.source.precision, self.first, sizes, value(other).dtype

    @property
    def part(self) -> Any:
        """Equal for those of them that are the same product."""
        narrow = self.narrow.T if self.turned else self.narrow
        return narrow.factors, narrow.scale, None if self.outside else self.vector


_Given = tuple[Node, list[_Copying], list[Node]]  # what some members read, these, and the other factor of each
_Result = tuple[_Copying, Node]


def _copying(
    reader: Reader,
    flow: Flow,
    hint: Callable[[Size], int],
    machine: Machine,
    kernels: bool,
    node: Node,
    left: bool,
) -> _Copying | None:
    a, b = tensor_arg(node, 0), tensor_arg(node, 1)
    copied, other = (a, b) if left else (b, a)
    read, vector, number, flipped = _without_vector(copied, flow)
    kernel = kernels and available(value(node).device)
    if vector is not None and kernel and _is_matrix(reader, copied):
        read, vector, number, flipped = copied, None, 1.0, False  # a kernel reads what the layer reads
    term = reader.term(read, Layout(1, shape(read)[-1]))
    source, dtype = term.factors[0], value(copied).dtype
    if flipped:
        source = source.T
    if len(term.factors) > 1 or not isinstance(source.name, Node) or term.scale.names:
        return None
    is_copy = source.precision in MANTISSA and source.precision != dtype and coarser(source.precision, dtype) != dtype
    is_copy = is_copy and torch.finfo(source.precision).tiny <= torch.finfo(dtype).tiny
    m, k, rank = (hint(n) for n in (*shape(copied), shape(other)[-1 if left else 0]))
    if not is_copy or not reads_in_place(machine, m, k, rank, source.precision, dtype):
        return None
    narrow = reader.term(other, Layout(1, shape(other)[-1]))
    return _Copying(node, left, source, term.scale * Scale(number), narrow, kernel, vector, flipped == left)


def _is_matrix(reader: Reader, copied: Node) -> bool:
    """Whether a copy is that of one coarser value."""
    term = reader.term(copied, Layout(1, shape(copied)[-1]))
    return len(term.factors) == 1 and not term.scale.names and term.factors[0].precision != value(copied).dtype


def _without_vector(node: Node, flow: Flow) -> tuple[Node, Node | None, float, bool]:
    """What a factor for each feature was multiplied to, the factors, a number beside them, and whether the result was
    transposed since."""
    start, number, flipped = node, 1.0, False
    while node.target in LAYOUTS | SCALINGS or node.target is CAST:
        source = tensor_arg(node, 0)
        if node.target in SCALINGS:
            if node.target is not aten.mul.Tensor or not is_number(node.args[1]):
                break
            number *= node.args[1]
        elif node.target is aten.permute.default and list(node.args[1]) == [1, 0]:  # type: ignore[arg-type]
            flipped = not flipped
        elif node.target is not CAST and (node.target not in RESHAPES or shape(source)[-1] != shape(node)[-1]):
            return start, None, 1.0, False
        node = source
    if node.target is aten.mul.Tensor and is_tensor(node.args[0]) and is_tensor(node.args[1]):
        for x, vector in (node.args[:2], node.args[1::-1]):
            if flow.is_weight(vector) and shape(vector)[-1:] == shape(x)[-1:] and numel(shape(vector)) == shape(x)[-1]:
                return x, vector, number, flipped  # type: ignore[return-value]
    return start, None, 1.0, False


def _batches(members: list[_Copying]) -> Iterator[tuple[list[_Copying], set[Node]]]:
    """Members none of which is computed from another, and what is computed from them."""
    batch: list[_Copying] = []
    following: set[Node] = set()
    for member in members:
        if batch and not following.isdisjoint({member.node, *member.operands}):
            yield batch, following
            batch, following = [], set()
        batch.append(member)
        following |= _following(member.node)
    yield batch, following


def _following(node: Node) -> set[Node]:
    found: set[Node] = set()
    todo = [node]
    while todo:
        new = [u for u in todo.pop().users if u.op != "output" and u not in found]
        found.update(new)
        todo += new
    return found


def _replace(
    graph: Graph,
    build: Builder,
    members: list[_Copying],
    operands: dict[Any, Node],
) -> None:
    """Each member by one product with the others that read the same, in the place of the last."""
    last = members[-1]
    sources: dict[Any, list[_Copying]] = defaultdict(list)
    for member in members:
        sources[member.key].append(member)
    with graph.inserting_before(last.node):
        build.like = last.node
        given = [
            (_source(build, last, own[-1], operands), own, [_other(build, m) for m in own]) for own in sources.values()
        ]
        results = _by_kernels(build, given) if last.kernel else None
        results = results or [pair for one in given for pair in _in_halves(build, *one)]
        for member, new in results:
            build.like = member.node
            new = build.cast(new, value(member.node).dtype)
            if member.vector is not None and member.outside:
                new = build.call(aten.mul.Tensor, new, _vector(build, member, new))
            new = build.flip(new) if member.turned else new
            member.node.replace_all_uses_with(build.laid_out(new, value(member.node).stride()))
    for member in members:
        erase_unused(graph, member.node)


def _source(
    build: Builder,
    last: _Copying,
    member: _Copying,
    operands: dict[Any, Node],
) -> Node:
    """What is read in place, not transposed: as a product of the model's reads it, where one does before the last."""
    wanted = shape(member.operands[0])[:: -1 if member.turned else 1]
    known = operands.get((member.upright, member.source.precision))
    is_there = last.kernel and known is not None and shape(known) == wanted
    if is_there and known is not None and _is_before(known, last.node):
        return known
    plain = build.like_2d(member.source, member.operands[0], member.source.precision)
    plain = build.flip(plain) if member.turned else plain
    operands.setdefault((member.upright, member.source.precision), plain)
    return plain


def _is_before(node: Node, place: Node) -> bool:
    """Whether a value is there before a place, or only was laid out later: then it is laid out before it."""
    later, todo = {node}, [node]
    while todo:
        new = [n for n in todo.pop().all_input_nodes if n not in later and place < n]
        later.update(new)
        todo += new
    if node < place:
        return True
    if any(n.target not in LAYOUTS or place in n.all_input_nodes for n in later):
        return False
    for n in sorted(later):
        place.prepend(n)
    return True


def _other(build: Builder, member: _Copying) -> Node:
    """The narrow factor, as it multiplies what is not transposed."""
    other = build.flip(member.operands[1]) if member.turned else member.operands[1]
    if member.vector is not None and not member.outside:
        other = build.call(aten.mul.Tensor, other, _vector(build, member, other))
    return other


def _by_kernels(build: Builder, given: list[_Given]) -> list[_Result] | None:
    """The members' results, scaled, in the layout that they are to have, where kernels compute them all."""
    out: dict[Node, list[tuple[_Copying, narrow.Narrow]]] = defaultdict(list)
    into: dict[Node, list[tuple[_Copying, narrow.Narrow]]] = defaultdict(list)
    for u, own, others in given:
        for m, other in zip(own, others, strict=True):
            strides = value(m.node).stride()[:: -1 if m.turned else 1]
            one = m, narrow.Narrow(other, float(m.scale.number), strides)
            (out if m.first else into)[u].append(one)
    us = dict.fromkeys(u for u, _, _ in given)
    asked = [narrow.Reads(u, *([n for _, n in kind[u]] for kind in (out, into))) for u in us]
    if not narrow.takes(asked):
        return None
    members = [m for kind in (out, into) for u in us for m, _ in kind[u]]
    return list(zip(members, narrow.computed(build, asked), strict=True))


def _in_halves(build: Builder, plain: Node, members: list[_Copying], others: list[Node]) -> list[_Result]:
    """`x·[hi1 | lo1 | hi2 | lo2 | ...]`, and each member the sum of its own two parts."""
    last = members[-1]
    dim = 1 if last.first else 0
    starts: dict[Any, int] = {}
    halves: list[Node] = []
    width = 0
    for member, other in zip(members, others, strict=True):
        if member.part in starts:
            continue
        hi = build.cast(other, last.source.precision)
        rest = build.call(aten.sub.Tensor, other, build.cast(hi, value(other).dtype))
        halves += [hi, build.cast(rest, last.source.precision)]
        starts[member.part] = width
        width += 2 * shape(other)[dim]
    both = build.call(aten.cat.default, halves, dim)
    found = exact_products(build, *((plain, both) if last.first else (both, plain)))
    whole = functools.reduce(build.add, [build.cast(r, torch.float32) for r in found])
    results = []
    for member in members:
        build.like = member.node
        start, r = starts[member.part], shape(member.node)[dim != member.turned]
        parts = [build.call(aten.slice.Tensor, whole, dim, at, at + r) for at in (start, start + r)]
        new = build.add(*parts)
        scaled = new if member.scale.number == 1 else build.call(aten.mul.Tensor, new, member.scale.number)
        results.append((member, scaled))
    return results


def _vector(build: Builder, member: _Copying, factor: Node) -> Node:
    """The factors of the copy's features, as they multiply the other operand, or the result."""
    assert member.vector is not None
    sizes = [-1, 1] if member.first else [1, -1]
    return build.cast(build.reshape(member.vector, sizes), value(factor).dtype)


def exact_products(build: Builder, a: Node, b: Node) -> list[Node]:
    """The product of two half-precision matrices, as the sum of these: one fp32 result, or what a first result lacks
    as a second."""
    if value(a).device.type in MIXED:
        return [build.call(aten.mm.dtype, a, b, torch.float32)]
    first = build.call(aten.mm.default, a, b)
    return [first, build.call(aten.addmm.default, first, a, b, beta=-1)]
