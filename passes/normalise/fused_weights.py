"""Products of a quantised weight in one op, `y = x·dequantise(q)ᵀ`, written as a product of the dequantised weight.

An adapter's delta can join a weight only where that exists. A fused product hides it, but the input gradient of the
same layer dequantises the same numbers, so the graph says how. The fused op stays where nothing came of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch.fx import Node

from peft_fx.passes.findings import Settings
from peft_fx.passes.graph.joint import Joint
from peft_fx.passes.graph.nodes import aten, shape, value


@dataclass(frozen=True)
class Fused:
    """An op `op(x, q, ..., bias)` whose weight `dequantise(q, ...)` gives as `[N, K]`; the numbers are positions of
    arguments."""

    dequantise: str
    x: int
    q: int
    bias: int


FUSED = {"bitsandbytes::gemm_4bit": Fused("bitsandbytes::dequantize_4bit", x=0, q=1, bias=6)}


def _name(node: Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return str(schema.name) if node.op == "call_function" and schema is not None else ""


class Unfused:
    """The fused products of a graph beside their plain forms, which the graph uses until `settle`."""

    def __init__(self, joint: Joint):
        self.joint, self.edit = joint, joint.edit
        self.pairs = [(node, self._plain(node, weight)) for node, weight in list(self._found())]

    def _found(self) -> Iterator[tuple[Node, Node]]:
        """Fused products, each with a node that dequantises its weight."""
        nodes = self.joint.graph.nodes
        fused = [n for n in nodes if _name(n) in FUSED]
        weights = [n for n in nodes if fused and self.joint.flow.is_weight(n)]
        number = self.joint.numbers if fused else {}
        for node in fused:
            kind = FUSED[_name(node)]
            same = (
                n for n in weights if _name(n) == kind.dequantise and number[n.args[0]] is number[node.args[kind.q]]
            )
            weight = next(same, None)
            if weight is not None:
                yield node, weight

    def _plain(self, node: Node, weight: Node) -> Node:
        kind = FUSED[_name(node)]
        x, bias = node.args[kind.x], node.args[kind.bias] if len(node.args) > kind.bias else None
        assert isinstance(x, Node)
        with self.edit.at(node):
            W = self._copy(weight, {})
            flat = self.edit.reshape(x, [-1, shape(x)[-1]])
            product = self.edit.call(aten.mm.default, flat, self.edit.flip(W))
            if isinstance(bias, Node):
                product = self.edit.add(product, self.edit.cast(bias, value(product).dtype))
            sizes = [*self.edit.sizes_of(x)[:-1], shape(node)[-1]]
            plain = self.edit.cast(self.edit.reshape(product, sizes), value(node).dtype)
        self.edit.reroute(node, plain)
        return plain

    def _copy(self, node: Node, copies: dict[Node, Node]) -> Node:
        """What a weight is computed from, up to the graph's inputs, once more at this place."""
        if node.op != "call_function":
            return node
        if node not in copies:
            inputs = {n: self._copy(n, copies) for n in node.all_input_nodes}
            copies[node] = self.edit.copy(node, lambda n: inputs[n])
            self.edit.rebuilt(copies[node])
        return copies[node]

    def settle(self) -> None:
        """Fused again where no adapter has joined the weight."""
        for fused, plain in self.pairs:
            if plain.users:
                self.edit.replace(plain, fused)
            else:
                self.edit.drop(fused)


def fused_weights(joint: Joint, settings: Settings) -> None:
    """Has the graph use plain products in the place of fused ones, until no adapter has made use of that."""
    joint.notes.tentative.append(Unfused(joint))
