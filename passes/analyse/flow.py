"""What depends on what: which nodes belong to backward, and from which inputs and random draws each value is
computed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, Node

from peft_fx.passes.analyse.algebra import Matrix
from peft_fx.passes.graph.nodes import is_random, is_tensor


@dataclass(frozen=True)
class Role:
    """What a graph input is: its name in the user's module, whether it stays from call to call, whether it is
    trained."""

    name: str
    static: bool = False
    trainable: bool = False


Roles = Mapping[Node, Role]


def reachable(graph: Graph, start: Callable[[Node], bool], without: Node | None = None) -> set[Node]:
    """The nodes that satisfy `start`, and all that is computed from them, other than through the node `without`."""
    found: set[Node] = set()
    for node in graph.nodes:
        if node is not without and (start(node) or any(n in found for n in node.all_input_nodes)):
            found.add(node)
    return found


def is_tangent(node: Node) -> bool:
    return node.op == "placeholder" and "tangents" in node.name


def leading_to(nodes: Iterable[Node]) -> set[Node]:
    """The nodes, and all that they are computed from."""
    found: set[Node] = set()
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += node.all_input_nodes
    return found


def returned(graph: Graph) -> tuple[list[Any], dict[Node, Any]]:
    """What a joint graph returns: forward's results, and by its inputs their gradients, which stand at the end."""
    inputs = [n for n in graph.find_nodes(op="placeholder") if not is_tangent(n)]
    every = list(graph.output_node().args[0])  # type: ignore[arg-type]
    of_forward = len(every) - len(inputs)
    return every[: max(0, of_forward)], dict(zip(reversed(inputs), reversed(every), strict=False))


class Flow:
    """For every node, as bits, the changing graph inputs and the random draws that it is computed from; and which are
    backward.

    A value without bits is a *weight*: a parameter, a buffer, or computed from those alone. `forward` are the nodes
    that the model's own outputs need.
    """

    def __init__(self, graph: Graph, roles: Roles):
        self.roles, self.graph = roles, graph
        self.backward = reachable(graph, is_tangent)
        self.forward = leading_to(n for n in graph.output_node().all_input_nodes if n not in self.backward)
        self.bits: dict[Node, int] = {}
        self._parameters: dict[Node, list[Node]] = {}
        self.draws, following = 0, 1
        for node in graph.nodes:
            self.bits[node] = union(self.bits[n] for n in node.all_input_nodes)
            role = roles.get(node)
            changes = node.op == "placeholder" and is_tensor(node) and not (role is not None and role.static)
            if changes or is_random(node):
                self.bits[node] |= following
                self.draws |= following if is_random(node) else 0
                following <<= 1

    def is_weight(self, node: object) -> bool:
        return isinstance(node, Node) and not self.bits.get(node, 1)

    def is_random(self, node: Node) -> bool:
        return bool(self.bits.get(node, 0) & self.draws)

    def draws_besides(self, node: Node, other: Node) -> int:
        """The random draws, as bits, that a value depends on and another does not."""
        return self.bits[node] & self.draws & ~self.bits[other]

    def is_mask(self, node: Node) -> bool:
        """Computed from random draws alone."""
        return self.is_random(node) and not self.bits[node] & ~self.draws

    def of(self, factors: Iterable[Matrix]) -> int:
        return union(self.bits[f.name] for f in factors if isinstance(f.name, Node))

    def computed_from(self, node: object, bits: int) -> bool:
        """A graph input is what it is, whoever else reads it; a computed factor must not depend on `bits`, nor on
        chance."""
        if not isinstance(node, Node) or node.op == "placeholder":
            return False
        return bool(self.bits[node] & (bits | self.draws))

    # -------------------------------------------------------------------------------------------------------------
    # names

    def parameters(self, node: object) -> list[Node]:
        """The graph inputs with a role that a value is computed from, nearest first; not looked for beyond 64 nodes."""
        if not isinstance(node, Node):
            return []
        if node not in self._parameters:
            seen: list[Node] = []
            todo = [node]
            while todo and len(seen) < 64:
                n = todo.pop(0)
                if n not in seen:
                    seen.append(n)
                    todo += n.all_input_nodes
            self._parameters[node] = [n for n in seen if n in self.roles]
        return self._parameters[node]

    def is_trained(self, node: object) -> bool:
        return any(self.roles[n].trainable for n in self.parameters(node))

    def side_of(self, node: Node) -> AbstractSet[Node]:
        """Forward's nodes, or backward's, of which that is one."""
        return self.backward if node in self.backward else self.forward

    @functools.cached_property
    def differentiated(self) -> frozenset[Node]:
        """The graph inputs whose gradients a joint graph returns."""
        return frozenset(node for node, gradient in returned(self.graph)[1].items() if gradient is not None)

    @functools.cached_property
    def adapted_modules(self) -> frozenset[str]:
        """The modules, each with a dot behind its name, that hold a trained parameter beside their own bias."""
        found = set()
        for name in (role.name for role in self.roles.values() if role.trainable):
            ends = [0, *(i + 1 for i, letter in enumerate(name) if letter == ".")]
            found |= {name[:end] for end in ends if name[end:] != "bias"}
        return frozenset(found)

    def site_name(self, weight: Matrix, adapters: Iterable[Matrix]) -> str:
        """The module that holds the weight and its adapter: what their names share; or the weight's own name."""
        own = [self.roles[n].name for n in self.parameters(weight.name)]
        base = own[0] if own else str(weight.name)
        others = [
            self.roles[n].name for f in adapters for n in self.parameters(f.name) if self.roles[n].name not in own
        ]
        best = max((common_path(base, other) for other in others), key=len, default="")
        module, _, name = base.rpartition(".")
        if name != "weight" and module == best:
            return base  # several weights in one module are told apart by their own names
        return best or base.removesuffix(".weight")


def shared_path(a: str, b: str) -> int:
    """The number of modules that two parameters share."""
    common = common_path(a, b)
    return common.count(".") + 1 if common else 0


def union(bits: Iterable[int]) -> int:
    total = 0
    for b in bits:
        total |= b
    return total


def common_path(a: str, b: str) -> str:
    """The module that two parameters share."""
    shared = []
    for x, y in zip(a.split("."), b.split("."), strict=False):
        if x != y:
            break
        shared.append(x)
    return ".".join(shared)
