"""A vector that every addend of a sum carries, taken out of it: `y + (g - 1)·y + g·s·z` is `g·(y + s·z)`.

Magnitudes are coded as corrections, so that one vector meets each addend by itself, in forward and in backward. In
place of these stand one sum without the vector, which then is an adapter like any other, and one product with it:

    y + (g - 1)·y + s·g·z            ->  g·v          v = y + s·z
    dy + (g - 1)·dy                  ->  g·dy
    Σ_t dy·y + Σ_t s·dy·z            ->  Σ_t dy·v     the vector's gradient

v takes the room that y takes where the frozen model keeps y, so the vector's gradient then reads what is kept.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from peft_fx.passes.analyse.algebra import MANTISSA, coarser, finer
from peft_fx.passes.findings import Settings
from peft_fx.passes.graph.joint import Joint
from peft_fx.passes.graph.nodes import (
    CASTS,
    COPIES,
    RESHAPES,
    SCALINGS,
    SQUEEZES,
    SUMS,
    aten,
    is_number,
    is_read_twice,
    is_tensor,
    numel,
    shape,
    value,
)
from peft_fx.passes.normalise.vector_sums import Coefficient, CommonVector, VectorSum


@dataclass
class Factoring:
    """One graph's forms, and what has been written of them."""

    joint: Joint
    forms: dict[Node, VectorSum] = field(default_factory=dict)
    replaced: dict[Node, Node] = field(default_factory=dict)
    sums: dict[Any, Node] = field(default_factory=dict)
    scaled: dict[Any, Node] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.edit, self.number, self.flow = self.joint.edit, self.joint.numbers, self.joint.flow

    # ------------------------------------------------------------------------------------------------------- reading

    def form(self, node: Node) -> VectorSum:
        """A value's form; its own name where it is anything but a sum or a scaled value."""
        if node not in self.forms:
            self.forms[node] = self._read(node) or self._name(node)
        return self.forms[node]

    def _name(self, node: Node) -> VectorSum:
        return VectorSum(((self.number.get(node, node), Coefficient()),))

    def operand(self, node: Node) -> VectorSum:
        """A value as another reads it: a sum that others read too is a name for them, but for what is the same for
        each token, as a bias."""
        found = self.form(node)
        shared = len(node.users) > 1 or is_read_twice(node)
        several = sum(not self.flow.is_weight(n) for n, _ in found.addends) > 1
        return self._name(node) if shared and several else found

    def _read(self, node: Node) -> VectorSum | None:
        if node.target in CASTS | COPIES and is_tensor(node.args[0]):
            return self._cast(node, node.args[0])
        if node.target is aten.neg.default:
            return self.operand(node.args[0]) * Coefficient(-1.0)  # type: ignore[arg-type]
        if node.target in SUMS and len(node.args) == 2:
            return self._sum(node)
        if node.target in SCALINGS and len(node.args) == 2:
            a, b = node.args
            if node.target in (aten.div.Tensor, aten.div.Scalar):
                return self.operand(a) * Coefficient(1 / b) if is_number(b) and b and is_tensor(a) else None  # type: ignore[operator]
            for x, by in ((a, b), (b, a)):
                coefficient = self.coefficient(by, x)
                if is_tensor(x) and coefficient is not None:
                    return self.operand(x) * coefficient
        return None

    def _cast(self, node: Node, source: Node) -> VectorSum | None:
        """A value that is rounded is another; a sum that is rounded is summed up before."""
        if not {value(n).dtype for n in (node, source)} <= MANTISSA.keys():
            return None
        form = self.operand(source)
        names = [n for n, c in form.addends if c == Coefficient()] if len(form.addends) == 1 else []
        rounds = any(coarser(value(n).dtype, value(node).dtype) != value(n).dtype for n in names)
        return None if rounds else form

    def _sum(self, node: Node) -> VectorSum | None:
        a, b = node.args
        alpha = node.kwargs.get("alpha", 1)
        if not (is_tensor(a) and is_tensor(b) and is_number(alpha)):
            return None
        sign = -1.0 if node.target is aten.sub.Tensor else 1.0
        other = self.operand(b) * Coefficient(sign * alpha)  # type: ignore[operator]
        return self.operand(a) + other if other is not None else None

    def coefficient(self, by: Any, x: Any) -> Coefficient | None:
        """What a value is multiplied by: a number; or a vector that is repeated for each token, or a sum of that and a
        number."""
        if is_number(by):
            return Coefficient(float(by))
        if not (is_tensor(by) and is_tensor(x) and self.flow.is_weight(by)):
            return None
        if self.flow.is_weight(x) or numel(shape(by)) == numel(shape(x)) or len(shape(by)) > len(shape(x)):
            return None
        if by.target in SUMS and is_number(by.args[1]) and is_tensor(by.args[0]) and not by.kwargs:
            sign = -1.0 if by.target is aten.sub.Tensor else 1.0
            return Coefficient(sign * float(by.args[1]), 1.0, self.number.get(by.args[0], by.args[0]))  # type: ignore[arg-type]
        return Coefficient(0.0, 1.0, self.number.get(by, by))

    # ------------------------------------------------------------------------------------------------------- writing

    def factor(self) -> None:
        nodes = [n for n in self.joint.graph.nodes if n.op == "call_function" and is_tensor(n)]
        roots = self._roots(nodes)
        vectors = {common.vector for common in roots.values()}
        for node in nodes:
            if node._erased:
                continue
            if node in roots:
                self._write(node, roots[node])
            elif vectors and node.target in SCALINGS:
                self._scale(node, vectors)
            elif vectors and node.target is aten.add.Tensor:
                self._contract(node)

    def _roots(self, nodes: list[Node]) -> dict[Node, CommonVector]:
        """The largest sums in which a value is met twice and one vector can be taken out."""
        found: dict[Node, CommonVector] = {}
        covered: set[Node] = set()
        for node in reversed(nodes):
            if node.target not in SUMS or node in covered:
                continue
            form = self.form(node)
            met = Counter(n for n, _ in form.addends if not self.flow.is_weight(n))
            if max(met.values(), default=0) > 1 and (common := self._common(form)):
                found[node] = common
                covered |= self._inside(node)
        of_adapters = {common.vector for common in found.values() if self._is_adapter(common.parts)}
        return {node: common for node, common in found.items() if common.vector in of_adapters}

    def _is_adapter(self, parts: Iterable[Node]) -> bool:
        """Whether a frozen weight's product and a trained one's are among the parts."""
        trained = [[self.flow.is_trained(w) for w in self._weights(n)] for n in parts]
        return any(t and not any(t) for t in trained) and any(map(any, trained))

    def _weights(self, node: Node) -> list[Node]:
        """The matrices that a product reads, through what only lays it out."""
        while node.target in RESHAPES | SQUEEZES | CASTS | COPIES and is_tensor(node.args[0]):
            node = node.args[0]
        return [n for n in node.all_input_nodes if self.flow.is_weight(n) and len(shape(n)) > 1]

    def _inside(self, node: Node) -> set[Node]:
        """The sums that serve this one alone."""
        found: set[Node] = set()
        todo = [node]
        while todo:
            inner = [n for n in todo.pop().all_input_nodes if len(n.users) == 1 and n.op == "call_function"]
            found |= set(inner)
            todo += [n for n in inner if n.target in SUMS | SCALINGS | CASTS | COPIES]
        return found

    def _common(self, form: VectorSum) -> CommonVector | None:
        collected = form.collected()
        if collected is None:
            return None
        constants = {n: c for n, c in collected.items() if self.flow.is_weight(n)}
        rest = {n: c for n, c in collected.items() if n not in constants}
        vectors = {c.vector for c in collected.values() if c.slope}
        if len(vectors) != 1 or not rest or any(c.number or not c.slope for c in rest.values()):
            return None
        (vector,) = vectors
        assert vector is not None
        return CommonVector(vector, {n: c.slope for n, c in rest.items()}, constants)

    def _write(self, node: Node, common: CommonVector) -> None:
        with self.edit.at(node):
            new = self._times(common.parts, common.vector, node)
            for constant, c in common.constants.items():
                factors = []
                if c.number:
                    factors.append(self._by(constant, c.number))
                if c.slope:
                    factors.append(self._by(self.edit.times(constant, common.vector), c.slope))
                new = functools.reduce(self.edit.add, factors, new)
            self._replace(node, new)

    def _scale(self, node: Node, vectors: set[Node]) -> None:
        """`(s·x)·g` as `s·(x·g)`, so that it is seen to be x·g, scaled."""
        addends = self.form(node).addends
        if len(addends) == 1:
            ((x, c),) = addends
            if c.vector in vectors and not c.number and c.slope != 1 and x is not node:
                assert c.vector is not None
                with self.edit.at(node):
                    self._replace(node, self._times({x: c.slope}, c.vector, node))

    def _contract(self, node: Node) -> None:
        """The sum of a vector's gradients, each of them a sum over tokens, where together they read what was summed
        up."""
        a, b = (_unshaped(operand) for operand in node.args[:2])
        found = [self._contraction(a), self._contraction(b)]
        if None in found or node.kwargs or a.args[1:] != b.args[1:] or shape(a) != shape(b):
            return
        for (dy, first), (other, second) in ((p, q) for p in found[0] for q in found[1]):  # type: ignore[union-attr]
            together = first + second
            collected = together.collected() if dy is other and together is not None else None
            if not collected or any(c.slope for c in collected.values()):
                continue
            constants = {n: c.number for n, c in collected.items() if self.flow.is_weight(n)}
            total = self.sums.get(_key({self._now(n): c.number for n, c in collected.items() if n not in constants}))
            if total is None:
                continue
            with self.edit.at(node):
                added = [self._by(n, number) for n, number in constants.items()]
                read = functools.reduce(self.edit.add, added, total)
                product = self.edit.times(self.edit.cast(self._now(dy), value(read).dtype), read)
                summed = self.edit.call(aten.sum.dim_IntList, product, *a.args[1:])
                self._replace(node, self.edit.reshape(summed, shape(node)))
            return

    def _contraction(self, node: Any) -> list[tuple[Node, VectorSum]] | None:
        """The two ways to read a sum over tokens of a product: the one factor, and the form of the other."""
        if not is_tensor(node) or node.target is not aten.sum.dim_IntList or node.kwargs or len(node.users) != 1:
            return None
        product = node.args[0]
        if not is_tensor(product) or product.target is not aten.mul.Tensor or not all(map(is_tensor, product.args)):
            return None
        found = []
        for x, y in (product.args, product.args[::-1]):
            addends = self.operand(x).addends  # type: ignore[arg-type]
            scaled = self.operand(y) * addends[0][1]  # type: ignore[arg-type]
            if len(addends) == 1 and addends[0][0] in self.flow.backward and scaled is not None:
                found.append((addends[0][0], scaled))
        return found

    def _times(self, parts: dict[Node, float], vector: Node, like: Node) -> Node:
        """`vector · Σ number·part`, a number of a single part outside."""
        parts = {self._now(n): number for n, number in parts.items()}
        outside = next(iter(parts.values())) if len(parts) == 1 else 1.0
        parts = {n: number / outside for n, number in parts.items()}
        dtype = functools.reduce(finer, [value(n).dtype for n in (*parts, vector, like)])
        key = _key(parts)
        if (key, vector) not in self.scaled:
            if key not in self.sums:
                terms = [self._by(self.edit.cast(n, dtype), number) for n, number in parts.items()]
                self.sums[key] = functools.reduce(self.edit.add, terms)
            self.scaled[key, vector] = self.edit.times(self.sums[key], vector)
        return self._by(self.scaled[key, vector], outside)

    def _by(self, node: Node, number: float) -> Node:
        return node if number == 1 else self.edit.times(node, number)

    def _now(self, node: Node) -> Node:
        return self.replaced.get(node, node)

    def _replace(self, node: Node, new: Node) -> None:
        self.replaced[node] = self.edit.cast(new, value(node).dtype)
        self.edit.replace(node, self.replaced[node])


def _unshaped(arg: Any) -> Any:
    """What only its one reader sees in another shape."""
    while is_tensor(arg) and arg.target in RESHAPES | SQUEEZES and len(arg.users) == 1:
        arg = arg.args[0]
    return arg


def _key(parts: dict[Node, float]) -> Any:
    return frozenset(parts.items())


def common_vector(joint: Joint, settings: Settings) -> None:
    """Takes common vectors out of sums."""
    before = joint.edit.changes
    Factoring(joint).factor()
    joint.found.factored = joint.edit.changes != before
