"""What keeps a value for backward: attention, the MLP, norms, the loss, or adapters alone."""

from __future__ import annotations

from collections.abc import Mapping, Set

from torch.fx import Graph, GraphModule, Node

from peft_fx.listing import classes_of
from peft_fx.passes.flow import Flow, Roles, is_tangent, reachable
from peft_fx.passes.keep import parameter_gradients

ADAPTERS, OTHER = "adapters", "other"
# what a class name has in it, of the innermost module that has any of these
COMPONENTS = {
    "norms": ("Norm",),
    "attention": ("Attention", "Rotary"),
    "MLP": (
        "MLP",
        "Mlp",
        "FeedForward",
        "DenseReluDense",
        "DenseGatedActDense",
        "Intermediate",
        "Output",
        "Expert",
        "MoE",
    ),
    "logits and loss": ("Head", "ForCausalLM", "ForMaskedLM", "ForConditionalGeneration", "Classification"),
}
ORDER = (*COMPONENTS, ADAPTERS, OTHER)


def gradients_of(joint: Graph, roles: Roles) -> frozenset[str]:
    """The names of the nodes of a joint graph that serve the gradients of trained parameters alone."""
    return frozenset(n.name for n in parameter_gradients(joint, Flow(joint, roles)))


def by_component(saved: Mapping[str, int], joint: Graph, backward: GraphModule, gradients: Set[str]) -> dict[str, int]:
    """Bytes of the values that forward hands to backward, by what reads them there; `saved` has the bytes by name.

    A value that only parameters' gradients read, as it is or through what backward computes of it again, is the
    adapters'; any other is its nearest reader's, by the module that this is the gradient of.
    """
    behind = {n.name for n in reachable(joint, is_tangent)}
    found = dict.fromkeys(ORDER, 0)
    for node in backward.graph.find_nodes(op="placeholder"):
        if node.name in saved:
            reader = _reader(node, behind, gradients)
            found[_component(reader) if reader is not None else ADAPTERS] += saved[node.name]
    found[OTHER] += sum(saved.values()) - sum(found.values())
    return {k: n for k, n in found.items() if n}


def _reader(kept: Node, backward: Set[str], gradients: Set[str]) -> Node | None:
    """The nearest node of backward proper that a kept value goes into, other than for parameters' gradients."""
    todo, seen = [kept], {kept}
    for node in todo:
        for user in node.users:
            if user in seen or user.op == "output" or user.name in gradients:
                continue
            if user.name in backward:
                return user
            seen.add(user)
            todo.append(user)
    return None


def _component(reader: Node) -> str:
    for _, kind in classes_of(reader):
        for component, words in COMPONENTS.items():
            if any(word in kind for word in words):
                return component
    return OTHER
