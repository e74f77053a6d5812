"""The only place that changes a graph.

Nodes are added `at` a place, each with a fresh fake value and the provenance of the node that it stands in for; users
are sent to other nodes; what nobody uses any more goes. `changes` counts all of that: what is known of a graph is known
of one such number (`joint.py`).
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.utils.checkpoint import CheckpointPolicy

from peft_fx.passes.analyse.algebra import Matrix
from peft_fx.passes.graph.fakes import Fakes
from peft_fx.passes.graph.nodes import CAST, RESHAPES, aten, is_tensor, shape, value

REBUILD, SAVE = CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.MUST_SAVE
COPIED = (
    "stack_trace",
    "nn_module_stack",
    "fwd_nn_module_stack",
    "partitioner_tag",
    "autograd_backward",
    "seq_nr",
    "custom",
    "original_aten",
    "recompute",
    "ac_graph_id",
)


class Editor:
    """Edits one graph, under the fake mode that its values are of."""

    def __init__(self, graph: Graph, fake_mode: AbstractContextManager[Any]):
        self.graph, self.fake_mode, self.fakes = graph, fake_mode, Fakes(fake_mode)
        self.changes = 0
        self._like: Node | None = None
        self._rebuilt = False

    # --------------------------------------------------------------------------------------------- where, and as what

    @contextlib.contextmanager
    def at(
        self, place: Node, *, after: bool = False, like: Node | None = None, rebuilt: bool = False
    ) -> Iterator[None]:
        """Has new nodes put before a place, or right after it, the last one first; as `provenance`, of the place unless
        it is said of what."""
        inserting = self.graph.inserting_after if after else self.graph.inserting_before
        with inserting(place), self.provenance(like or place, rebuilt=rebuilt):
            yield

    @contextlib.contextmanager
    def provenance(self, like: Node | None, *, rebuilt: bool = False) -> Iterator[None]:
        """Has new nodes say that they come from where another does, and, `rebuilt`, that backward makes them again."""
        before = self._like, self._rebuilt
        self._like, self._rebuilt = like, rebuilt
        try:
            yield
        finally:
            self._like, self._rebuilt = before

    # ----------------------------------------------------------------------------------------------------- new nodes

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        node = self.graph.call_function(target, args, kwargs)
        node.meta["val"] = self.fakes.of(target, args, kwargs)
        return self._noted(node)

    def _noted(self, node: Node) -> Node:
        if self._like is not None:
            node.meta.update({k: self._like.meta[k] for k in COPIED if k in self._like.meta})
        if self._rebuilt:
            self.rebuilt(node)
            node.meta.pop("ac_graph_id", None)
        self.changes += 1
        return node

    def copy(self, node: Node, inputs: Callable[[Node], Node]) -> Node:
        """A node once more, of other inputs, with all that is said of it."""
        self.changes += 1
        return self.graph.node_copy(node, inputs)

    def attach(self, body: GraphModule, name: str) -> Node:
        """Another graph, as an attribute of this one's module."""
        module = self.graph.owning_module
        assert module is not None, "a graph without a module has nowhere to keep another"
        setattr(module, name, body)
        node = self.graph.get_attr(name)
        node.meta["body"] = body
        self.changes += 1
        return node

    def call_graph(self, body: Node, operands: list[Node]) -> Node:
        """A call of an attached graph."""
        results = body.meta["body"].graph.output_node().args[0]
        node = self.graph.call_function(torch.ops.higher_order.invoke_subgraph, (body, body.target, *operands))
        with self.fake_mode:
            node.meta["val"] = tuple(
                torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=v.device) for v in map(value, results)
            )
        self.changes += 1
        return node

    def cast(self, node: Node, dtype: torch.dtype) -> Node:
        return node if value(node).dtype == dtype else self.call(CAST, node, dtype)

    def add(self, a: Node, b: Node) -> Node:
        return self.call(aten.add.Tensor, a, b)

    def times(self, a: Node, b: Any) -> Node:
        return self.call(aten.mul.Tensor, a, b)

    def item(self, node: Node, i: int) -> Node:
        """One of several results."""
        return self.call(operator.getitem, node, i)

    def reshape(self, node: Node, sizes: Iterable[Any]) -> Node:
        """A value with other sizes, straight from what was reshaped before: equal values are then seen to be equal."""
        sizes = list(sizes)
        while node.target in RESHAPES and is_tensor(node.args[0]):
            node = node.args[0]
        known = shape(node)
        same = len(sizes) == len(known) and all(a == -1 or a == n for a, n in zip(sizes, known, strict=True))
        return node if same else self.call(aten.reshape.default, node, sizes)

    def like_2d(self, f: Matrix, operand: Node, dtype: torch.dtype) -> Node:
        """A matrix of any origin, in `dtype`, in the place of a two-dimensional operand that holds the same numbers."""
        assert isinstance(f.name, Node)
        node = self.cast(f.name, dtype)
        if len(shape(node)) != 2 or shape(node)[-1] != f.cols:
            rows, cols = self.sizes_of(operand)
            node = self.reshape(node, [cols, rows] if f.flipped else [rows, cols])
        return self.flip(node) if f.flipped else node

    def sizes_of(self, node: Node) -> list[Any]:
        """A node's sizes as arguments: numbers, or size nodes for those that are dynamic."""
        return [
            n if isinstance(n, int) else self.call(aten.sym_size.int, node, i) for i, n in enumerate(value(node).shape)
        ]

    def laid_out(self, node: Node, strides: tuple[Any, ...]) -> Node:
        """A value with these strides: a product with x from its right, say, leaves the transpose of a matrix."""
        own = value(node).stride()
        matters = [(m, n) for size, m, n in zip(shape(node), own, strides, strict=True) if size != 1]
        if not all(isinstance(n, int) for n in (*strides, *own)) or all(m == n for m, n in matters):
            return node
        order = sorted(range(len(strides)), key=lambda i: -strides[i])
        node = self.call(aten.permute.default, node, order) if order != sorted(order) else node
        node = self.call(aten.clone.default, node, memory_format=torch.contiguous_format)
        inverse = [order.index(i) for i in range(len(order))]
        return self.call(aten.permute.default, node, inverse) if order != sorted(order) else node

    def flip(self, node: Node) -> Node:
        """The last two dimensions exchanged."""
        rank = value(node).ndim
        return self.call(aten.permute.default, node, [*range(rank - 2), rank - 1, rank - 2])

    # ------------------------------------------------------------------------------------------------- who reads what

    def replace(self, old: Node, new: Node) -> Node:
        """Has all users read another node, and drops what only the old one used; returns the new one."""
        self.reroute(old, new)
        self.drop(old)
        return new

    def reroute(self, old: Node, new: Node, only: Callable[[Node], bool] = lambda user: True) -> None:
        """Has users read another node; the old one stays where it is."""
        self.changes += 1
        old.replace_all_uses_with(new, delete_user_cb=only)

    def reread(self, user: Node, old: Node, new: Node) -> None:
        """Has one user read another node."""
        self.changes += 1
        user.replace_input_with(old, new)

    def give(self, node: Node, *args: Any) -> None:
        """Other arguments for a node, with a fresh fake value unless it is the output."""
        self.changes += 1
        node.args = args
        if node.op != "output":
            node.meta["val"] = self.fakes.of(node.target, args, node.kwargs)

    def drop(self, node: Node) -> None:
        """Removes a node that has lost its users, and what only it used."""
        todo = [node]
        while todo:
            n = todo.pop()
            if n.users or n.op != "call_function" or n._erased:
                continue
            inputs = n.all_input_nodes
            self.erase(n)
            todo += inputs

    def erase(self, node: Node) -> None:
        self.changes += 1
        self.graph.erase_node(node)

    def move(self, node: Node, *, before: Node | None = None, after: Node | None = None) -> None:
        """Puts a node at another place."""
        self.changes += 1
        if before is not None:
            before.prepend(node)
        if after is not None:
            after.append(node)

    # ------------------------------------------------------------------------------------------------ what is kept

    def keep(self, node: Node) -> None:
        """Says to keep a value for backward."""
        self._tag(node, SAVE)

    def rebuilt(self, node: Node) -> None:
        """Says that backward makes a value again."""
        self._tag(node, REBUILD)

    def untag(self, node: Node) -> None:
        """Leaves it to the partitioner."""
        if node.meta.pop("recompute", None) is not None:
            self.changes += 1

    def _tag(self, node: Node, tag: CheckpointPolicy) -> None:
        self.changes += 1
        node.meta["recompute"] = tag
