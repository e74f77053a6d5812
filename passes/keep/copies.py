"""Products of adapters' gradients that read wider copies of activations, and which of them may be computed as one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from peft_fx.kernels.library import available
from peft_fx.kernels.narrow import DTYPE
from peft_fx.passes.analyse.algebra import MANTISSA, Matrix, Scale, Size, Term, coarser
from peft_fx.passes.analyse.flow import Flow
from peft_fx.passes.analyse.reader import Layout, Reader
from peft_fx.passes.decide.price import reads_in_place
from peft_fx.passes.findings import Settings
from peft_fx.passes.graph.joint import Joint
from peft_fx.passes.graph.nodes import (
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
)
from peft_fx.passes.keep import narrow


@dataclass(frozen=True)
class Copying:
    """A product with an operand that is a wider and much larger copy of `source`, whose `precision` it can be read in,
    or `source` itself, which a kernel reads for several at once; `left` where that is the left operand; `narrow`
    is what the other operand holds. `vector` are factors of the copy's features, as behind a magnitude: they go
    to the other operand where these are summed over, else (`outside`) to the result. `kernel` is whether one of
    our own may compute it."""

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
    def copies(self) -> bool:
        """Whether the operand is another tensor than the source."""
        return bool(self.source.precision != value(self.operands[0]).dtype)

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


def families(joint: Joint, settings: Settings) -> list[list[Copying]]:
    """The products of a graph that read copies, where the machine does not multiply these much sooner; in a list those
    that may be computed as one."""
    reader, flow = joint.reader, joint.flow
    groups: dict[Any, list[Copying]] = defaultdict(list)
    for node in joint.graph.nodes:
        if node.target is not aten.mm.default or node in flow.forward:
            continue
        asked = (_copying(joint, reader, settings, node, left) for left in (True, False))
        found = next((one for one in asked if one is not None), None)
        if found is not None:
            groups[found.key].append(found)
    return list(_families(groups))


def _families(groups: dict[Any, list[Copying]]) -> Iterator[list[Copying]]:
    """Groups as one where a kernel may read several sources at once: the dy of layers that read one x, for `dy·Bᵀ` of
    all of them and for their dB; and, wherever that can be, for both."""
    family = {key: key for key in groups}
    reading: dict[Hashable, list[Any]] = defaultdict(list)  # by what a kernel reads
    for key, members in groups.items():
        if members[0].kernel:
            reading[members[0].source.name].append(key)
    for members in groups.values():
        names = dict.fromkeys(f.name for m in members for f in m.narrow.factors)
        beside = dict.fromkeys(key for name in names for key in reading.get(name, ()))
        for first in (True, False):
            alike = [k for k in beside if groups[k][0].first is first and not members[0].first]
            for k in alike:
                family[k] = alike[0]
    joined: dict[Any, list[Copying]] = defaultdict(list)
    for key, members in groups.items():
        joined[family[key]] += members
    yield from (sorted(members, key=lambda m: m.node) for members in _read_once(list(joined.values())))


def _named(members: list[Copying], others: list[Copying]) -> bool:
    """Whether the narrow factors of members are computed from what others read, which a kernel may."""
    return others[0].kernel and others[0].source.name in {f.name for m in members for f in m.narrow.factors}


def _read_once(families: list[list[Copying]]) -> list[list[Copying]]:
    """Families as one where they are both kinds of products of the same sources. `xᵀ·(dy·Bᵀ)` needs dy before x, and
    `(x·A)ᵀ·dy` x before dy: of the two, what is wider is read once and the other one twice."""
    once: list[list[Copying]] = []
    twice: list[list[Copying]] = []
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


def _ranks(members: list[Copying]) -> Iterator[list[Size]]:
    """Of each source."""
    for source in {m.upright for m in members}:
        yield [shape(m.operands[1])[-1 if m.left else 0] for m in members if m.upright == source]


def operands_of(joint: Joint) -> dict[Any, Node]:
    """What the graph's own products read, by the matrix that it is: the first node that holds it."""
    reader, found = joint.reader, dict[Any, Node]()
    for node in joint.graph.find_nodes(op="call_function", target=aten.mm.default):
        for i in (0, 1):
            operand = tensor_arg(node, i)
            term = reader.term(operand, Layout(1, shape(operand)[-1]))
            if len(term.factors) == 1 and term.scale == Scale():
                found.setdefault((term.factors[0], value(operand).dtype), operand)
    return found


def _copying(joint: Joint, reader: Reader, settings: Settings, node: Node, left: bool) -> Copying | None:
    flow, hint = joint.flow, joint.sizes.hint
    a, b = tensor_arg(node, 0), tensor_arg(node, 1)
    copied, other = (a, b) if left else (b, a)
    read, vector, number, flipped = _without_vector(copied, flow)
    kernel = settings.kernels and available(value(node).device)
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
    own = joint.notes.layers.isdisjoint(flow.parameters(other))  # no layer's own product
    is_there = kernel and own and source.precision == dtype == DTYPE  # and several read it at once
    m, k, rank = (hint(n) for n in (*shape(copied), shape(other)[-1 if left else 0]))
    if not (is_copy or is_there) or not reads_in_place(settings.machine, m, k, rank, source.precision, dtype):
        return None
    factor = reader.term(other, Layout(1, shape(other)[-1]))
    return Copying(node, left, source, term.scale * Scale(number), factor, kernel, vector, flipped == left)


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


def batches(members: list[Copying]) -> Iterator[tuple[list[Copying], set[Node]]]:
    """Members none of which is computed from another, and what is computed from them."""
    batch: list[Copying] = []
    following: set[Node] = set()
    for member in members:
        if batch and not following.isdisjoint({member.node, *member.operands}):
            yield batch, following
            batch, following = [], set()
        batch.append(member)
        following |= _following(member.node, members[-1].node)
    yield batch, following


def _following(node: Node, last: Node) -> set[Node]:
    """What is computed from a node, up to another one."""
    found: set[Node] = set()
    todo = [node]
    while todo:
        new = [u for u in todo.pop().users if u not in found and (u < last or u is last)]
        found.update(new)
        todo += new
    return found
