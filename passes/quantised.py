"""Products of a quantised weight in one op, `y = x·dequantise(q)ᵀ`, written as a product of the dequantised weight.

An adapter's delta can join a weight only where that exists. A fused product hides it, but the input gradient of the
same layer dequantises the same numbers, so the graph says how. The fused op stays where nothing came of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, Node

from peft_fx.passes.flow import Flow
from peft_fx.passes.nodes import aten, shape, value, value_numbers
from peft_fx.passes.rewrite import REBUILD, Builder, erase_unused


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

    def __init__(self, graph: Graph, flow: Flow, fake_mode: AbstractContextManager[Any]):
        self.graph, self.flow = graph, flow
        self.build = Builder(graph, fake_mode)
        self.pairs = [(node, self._plain(node, weight)) for node, weight in list(self._found())]

    def _found(self) -> Iterator[tuple[Node, Node]]:
        """Fused products, each with a node that dequantises its weight."""
        fused = [n for n in self.graph.nodes if _name(n) in FUSED]
        weights = [n for n in self.graph.nodes if fused and self.flow.is_weight(n)]
        number = value_numbers(self.graph) if fused else {}
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
        self.build.like = node
        with self.graph.inserting_before(node):
            W = self._copy(weight, {})
            flat = self.build.reshape(x, [-1, shape(x)[-1]])
            product = self.build.call(aten.mm.default, flat, self.build.flip(W))
            if isinstance(bias, Node):
                product = self.build.call(aten.add.Tensor, product, self.build.cast(bias, value(product).dtype))
            sizes = [*self.build.sizes_of(x)[:-1], shape(node)[-1]]
            plain = self.build.cast(self.build.reshape(product, sizes), value(node).dtype)
        node.replace_all_uses_with(plain)
        return plain

    def _copy(self, node: Node, copies: dict[Node, Node]) -> Node:
        """What a weight is computed from, up to the graph's inputs, once more at this place."""
        if node.op != "call_function":
            return node
        if node not in copies:
            inputs = {n: self._copy(n, copies) for n in node.all_input_nodes}
            copies[node] = self.graph.node_copy(node, lambda n: inputs[n])
            copies[node].meta["recompute"] = REBUILD
        return copies[node]

    def settle(self) -> list[Node]:
        """Fused again where no adapter has joined the weight; returns the nodes that were added and stay."""
        for fused, plain in self.pairs:
            if plain.users:
                plain.replace_all_uses_with(fused)
                erase_unused(self.graph, plain)
            else:
                erase_unused(self.graph, fused)
        return [n for n in self.build.added if not n._erased]
