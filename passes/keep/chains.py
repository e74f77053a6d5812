"""What backward rebuilds instead of keeping.

An adapter's gradient reads its layer's input x, in the adapter's dtype, and the frozen model's backward reads
neither. Both can be rebuilt from what that backward keeps anyway, wherever a chain of pointwise ops leads there:
through a cast, a norm's scale, an activation function, a gate, a dropout mask drawn from its seed. The partitioner
would keep the end of the chain, because a product reads it; a recompute tag makes it keep the beginning. A tag
forces, so a node is tagged only where that means keeping less:

* the bytes at the beginning of the chain that are not kept anyway are fewer than those of the node itself;
* a sum of two values of different origin is never rebuilt unless both are kept: the residual stream is such a sum, and
  rebuilding one link would pull in all of them.

A chain also begins at what is computed of an input that the graph changes in place: backward has its old value only
where that is kept (see `changed_inputs.py`).
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from peft_fx.kernels.narrow import narrow_both, narrow_in, narrow_out
from peft_fx.passes.analyse.algebra import Size
from peft_fx.passes.analyse.flow import Flow, returned
from peft_fx.passes.analyse.linear_rules import Product, products_in
from peft_fx.passes.graph.editor import REBUILD, Editor
from peft_fx.passes.graph.nodes import (
    LAYOUTS,
    SUMS,
    aten,
    is_random,
    is_tensor,
    numel,
    prims,
    shape,
    value,
    value_numbers,
)

PARTS = {aten.slice.Tensor, aten.select.int, aten.cat.default}
SMALL = 8  # a value of this fraction of another's size is no second tensor to keep


@dataclass(frozen=True)
class Origin:
    """Where a value's chain begins, and the nodes on the way that would be rebuilt."""

    leaves: frozenset[Node] = frozenset()
    chain: frozenset[Node] = frozenset()


class Recompute:
    """Finds the nodes to rebuild, `chosen`. Pure but for `mark`, which writes the tags.

    `random` is whether a random draw may be repeated from its seed; `reading` are products of backward known to serve
    parameter gradients alone; `rebuilt` are nodes that are rebuilt in any case; `layers` are the weights W that
    adapters are beside. `frozen` is what the frozen model keeps, `origins` where each value that a parameter's gradient
    reads begins.
    """

    def __init__(
        self,
        graph: Graph,
        flow: Flow,
        hint: Callable[[Size], int],
        random: bool = True,
        reading: Set[Node] = frozenset(),
        rebuilt: Set[Node] = frozenset(),
        layers: Set[Node] = frozenset(),
    ):
        self.flow, self.hint, self.random, self.graph, self.rebuilt = flow, hint, random, graph, rebuilt
        self.layers = layers
        self.kept: set[Node] = set()
        self.chosen: set[Node] = set()
        self._origins: dict[Node, Origin] = {}
        self.once = of_inputs_changed(graph)
        self.gradients = parameter_gradients(graph, flow) | reading
        frozen = {n for g in flow.backward - self.gradients if g.op != "output" for n in g.all_input_nodes}
        self.kept_known = False  # until then of two that are as large the earlier one is taken for kept
        read = [n for n in graph.nodes if n in frozen]  # in graph order: each chain ends at one known before
        ways = self._note_kept(read)
        self.kept_known = True
        self.frozen, self.origins = frozenset(self.kept), {}
        reads = {n for g in self.gradients for n in g.all_input_nodes if self._is_activation(n)}
        in_order = [n for n in graph.nodes if n in reads]  # of equal sizes too, in each run and on each rank
        for node in sorted(in_order, key=self.bytes, reverse=True):
            origin = self.origins[node] = self._origin(node)
            self.chosen |= origin.chain
            self.kept |= origin.leaves
            self._origins.clear()
            for way in ways:  # a layer's result is kept for both, not also what the frozen model makes of it
                if len(way.leaves) == 1 and way.leaves <= origin.leaves and any(map(products, way.leaves)):
                    self.chosen |= way.chain
        if random:
            self.chosen |= self._masks_behind(self.chosen)

    def costs_nothing(self, node: Node) -> bool:
        """Whether a value is what the frozen model keeps, or rebuilt pointwise from that."""
        return self._origin(node).leaves <= self.frozen

    def _is_activation(self, node: Node) -> bool:
        """A value of forward that is no weight."""
        return is_tensor(node) and node not in self.flow.backward and not self.flow.is_weight(node)

    def bytes(self, node: Node) -> int:
        val = value(node)
        return self.hint(numel(shape(node))) * val.dtype.itemsize if isinstance(val, torch.Tensor) else 0

    def _note_kept(self, nodes: Iterable[Node]) -> list[Origin]:
        """What the frozen backward reads is kept, or what it is cheaper rebuilt from; returns the ways there."""
        ways = []
        for node in nodes:
            if self._is_activation(node):
                ways.append(self._origin(node, frozen=True))
                self.kept |= {node, *ways[-1].leaves}
                self._origins.clear()
        return ways

    def _origin(self, node: Node, frozen: bool = False) -> Origin:
        """The cheapest beginning of a value's chain: the node itself, or what its inputs begin with."""
        todo = [node]
        while todo:
            n = todo[-1]
            inputs = [] if self._is_beginning(n, frozen and n is node) else self._inputs(n)
            missing = [i for i in inputs if i not in self._origins]
            if missing:
                todo += missing
                continue
            todo.pop()
            self._origins[n] = self._choose(n, [self._origins[i] for i in inputs])
        return self._origins[node]

    def _inputs(self, node: Node) -> list[Node]:
        return [n for n in node.all_input_nodes if is_tensor(n)]

    def _is_beginning(self, node: Node, even_if_kept: bool = False) -> bool:
        if node in self.rebuilt:
            return False
        if node.op != "call_function" or self.flow.is_weight(node) or "recompute" in node.meta:
            return True
        if node in self.kept and not even_if_kept:
            return True
        if node.target is aten.clone.default and node.all_input_nodes[0].op == "placeholder":
            return True  # AOTAutograd's copy of an input that is changed in place: later it is another value
        return node in self.once or not (self._is_pointwise(node) or self._is_narrow_product(node))

    def _is_pointwise(self, node: Node) -> bool:
        if is_random(node):
            return self.random
        tags = getattr(node.target, "tags", ())
        return (
            torch.Tag.pointwise in tags
            or node.target in LAYOUTS | PARTS
            or node.target is prims.convert_element_type.default
        )

    def _is_narrow_product(self, node: Node) -> bool:
        """`u·A` with few columns: redoing it costs little next to the layer's own product, which is never redone."""
        if node.target is narrow_out:
            return True
        for product in products(node):
            if product.window is None:
                k, n = shape(product.right)[-2:]
                narrow = isinstance(k, int) and isinstance(n, int) and 4 * n <= k
                own = not self.layers.isdisjoint(self.flow.parameters(product.right))
                return narrow and self.flow.is_weight(product.right) and not own
        return False

    def _choose(self, node: Node, inputs: list[Origin]) -> Origin:
        if node.op == "placeholder" or self.flow.is_weight(node):
            return Origin()
        alone = Origin(frozenset({node}))
        if self._is_beginning(node) or (is_random(node) and not self.random):
            return alone
        leaves = frozenset().union(*(o.leaves for o in inputs))
        chain = frozenset({node}).union(*(o.chain for o in inputs))
        if node in self.rebuilt:
            return Origin(leaves, chain)
        extra = sum(self.bytes(n) for n in leaves - self.kept)
        if node.target in SUMS and extra and self._joins(node, leaves, inputs):
            return alone
        saved = self.bytes(node) - extra
        as_good = saved == 0 and (node.target in LAYOUTS or self._is_result(leaves) or self._is_masked(chain))
        return Origin(leaves, chain) if saved > 0 or as_good else alone

    def _is_result(self, leaves: frozenset[Node]) -> bool:
        """While it is not yet known what is kept: a layer's result is, rather than what is computed from it alone."""
        return not self.kept_known and len(leaves) == 1 and any(products(leaf) for leaf in leaves)

    def _is_masked(self, chain: frozenset[Node]) -> bool:
        """Whether a dropout mask is drawn on the way: what is kept before it need not be kept for each mask."""
        return self.random and any(self.flow.is_mask(n) for n in chain)

    def _joins(self, node: Node, leaves: frozenset[Node], inputs: list[Origin]) -> bool:
        """Whether a sum's addends begin in different places. A norm's `x - mean` has one beginning: statistics are
        small."""
        small = {n for n in leaves if SMALL * self.bytes(n) <= self.bytes(node)}
        return not any(leaves - small == o.leaves - small for o in inputs)

    def _masks_behind(self, nodes: set[Node]) -> set[Node]:
        """A dropout mask that is rebuilt for the adapter's gradient is rebuilt for the input's, too."""
        found: set[Node] = set()
        todo = list(nodes)
        while todo:
            for n in todo.pop().all_input_nodes:
                if n.op == "call_function" and n not in found and self.flow.is_mask(n):
                    found.add(n)
                    todo.append(n)
        return found

    def cost(self, node: Node) -> int:
        """Bytes to be kept more for a value of forward to be there in backward."""
        leaves = self._origin(node).leaves
        self._origins.clear()
        return sum(self.bytes(n) for n in leaves - self.kept)

    def mark(self, edit: Editor) -> int:
        """Tags what is chosen, and the equals of all that is to be rebuilt: the partitioner merges them first, and the
        first one's tag stays."""
        number = value_numbers(self.graph)
        tagged = {node for node in self.graph.nodes if node.meta.get("recompute") is REBUILD}
        equals = {number[node] for node in self.chosen | tagged}
        marked = [node for node in self.graph.nodes if number[node] in equals and "recompute" not in node.meta]
        for node in marked:
            edit.rebuilt(node)
        return len(marked)


def of_inputs_changed(graph: Graph) -> set[Node]:
    """What is computed of an input that the graph changes in place, and is to be kept for backward."""
    changed = {n.args[0] for n in graph.find_nodes(op="call_function", target=aten.copy_.default)}
    found: set[Node] = set()
    todo = [n for n in changed if isinstance(n, Node) and n.op == "placeholder"]
    while todo:
        for user in todo.pop().users:
            if user.target in LAYOUTS:
                todo.append(user)
            elif user.op == "call_function" and user.target is not aten.copy_.default:
                found.add(user)
    return found


def products(node: Node) -> list[Product]:
    """The products in a node; rows that are picked of a table are not multiplied."""
    return [product for product in products_in(node) if not product.gathered]


def parameter_gradients(graph: Graph, flow: Flow) -> set[Node]:
    """The products in which backward sums over tokens for the gradient of a trained parameter alone."""
    results, gradients = returned(graph)
    output, times = graph.output_node(), Counter([*results, *gradients.values()])
    others = set(times)
    for node, gradient in gradients.items():
        if node in flow.roles and flow.roles[node].trainable and times[gradient] == 1:
            others.discard(gradient)
    after = _after_sums(graph, flow)
    found: set[Node] = set()
    ends: set[Node] = set()  # on the way from such a product to the output
    for node in reversed(graph.nodes):
        if node not in flow.backward or node in others:
            continue
        if node not in after and _sums_over_tokens(
            node, flow
        ):  # one may be the start of another, as the two halves of a product are
            found |= {node} if all(u is output or u in ends or u in found for u in node.users) else set()
        elif all(u is output or u in ends or (u in found and node.target is operator.getitem) for u in node.users):
            ends.add(node)  # of one kernel's results, that may be one that another such product reads
    return found


def _after_sums(graph: Graph, flow: Flow) -> set[Node]:
    """What is computed of sums over tokens and weights alone: no token is left that it could sum over again."""
    sums: set[Node] = set()
    found: set[Node] = set()
    for node in graph.nodes:
        if node not in flow.backward or node.op != "call_function":
            continue
        inputs = [n for n in node.all_input_nodes if is_tensor(n)]
        if any(n in sums for n in inputs) and all(n in sums or flow.is_weight(n) for n in inputs):
            found.add(node)
            sums.add(node)
        elif _sums_over_tokens(node, flow):
            multiplied = node.target is aten.mul.Tensor
            sums |= {u for u in node.users if u.target is aten.sum.dim_IntList} if multiplied else {node}
    return found


def _sums_over_tokens(node: Node, flow: Flow) -> bool:
    """Whether two values meet that are no weights; an elementwise product counts where it is summed."""
    if node.target in (narrow_in, narrow_both):
        return True
    if node.target is aten.sum.dim_IntList:
        (source,) = (n for n in node.all_input_nodes if is_tensor(n))
        return source.target is not aten.mul.Tensor
    operands = [n for n in node.all_input_nodes if is_tensor(n)]
    if node.target is aten.mul.Tensor:
        return len(operands) == 2 and any(n not in flow.backward and not flow.is_weight(n) for n in operands)
    found = products(node)
    return bool(found) and not any(flow.is_weight(p.left) or flow.is_weight(p.right) for p in found)
