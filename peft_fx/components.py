"""What keeps a value for backward: attention, the MLP, norms, the loss, or adapters alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from peft_fx import compat
from peft_fx.inputs import roles_in
from peft_fx.passes.analyse.flow import Flow, Role, is_tangent, reachable
from peft_fx.passes.graph.nodes import expr, numel
from peft_fx.passes.keep.chains import parameter_gradients
from peft_fx.sources import classes_of

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


def partitioned(
    joint: GraphModule,
    joint_inputs: Sequence[object],
    roles: dict[int, Role],
    kwargs: Mapping[str, Any],
    handed_on: Set[str] = frozenset(),
    partition: Callable[..., Any] | None = None,
) -> tuple[GraphModule, GraphModule, dict[str, tuple[str, int]]]:
    """Forward, backward, and the values that the one keeps for the other, by name: the component of each, and its
    bytes. `kwargs` are the partitioner's, `roles` those of the graph's inputs. Those `handed_on` by an earlier graph
    are nothing that is there anyway."""
    gradients = {n.name for n in parameter_gradients(joint.graph, Flow(joint.graph, roles_in(joint.graph, roles)))}
    partition = partition or compat.min_cut_rematerialization_partition
    forward, backward = partition(joint, joint_inputs, **kwargs)
    components = _components(joint.graph, backward, gradients)
    saved = saved_bytes(forward, kwargs["num_fwd_outputs"], handed_on)
    return forward, backward, {name: (components.get(name, OTHER), size) for name, size in saved.items()}


def by_component(kept: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Bytes by component of values that forward hands to backward, given as the component and the bytes of each."""
    found = dict.fromkeys(ORDER, 0)
    for component, size in kept:
        found[component] += size
    return {k: n for k, n in found.items() if n}


def _components(joint: Graph, backward: GraphModule, gradients: Set[str]) -> dict[str, str]:
    """What each input of backward belongs to, by name: what reads it there.

    A value that only parameters' gradients read, as it is or through what backward computes of it again, is the
    adapters'; any other is its nearest reader's, by the module that this is the gradient of.
    """
    behind = {n.name for n in reachable(joint, is_tangent)}
    readers = {n.name: _reader(n, behind, gradients) for n in backward.graph.find_nodes(op="placeholder")}
    return {name: ADAPTERS if reader is None else _component(reader) for name, reader in readers.items()}


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


def saved_bytes(forward: GraphModule, outputs: int, handed_on: Set[str] = frozenset()) -> dict[str, int]:
    """Bytes of the storages that a forward graph hands to backward and that it, or an earlier graph, made, by the
    value's name."""
    nodes = {n.op: n for n in forward.graph.nodes}
    given = {_storage(n) for n in forward.graph.nodes if n.op == "placeholder" and n.name not in handed_on}
    saved: dict[Any, tuple[str, int]] = {}
    for node in nodes["output"].args[0][outputs:]:
        val = node.meta.get("val") if isinstance(node, Node) else None
        if isinstance(val, torch.Tensor) and _storage(node) not in given:
            hint = compat.hint_for(val.fake_mode) if isinstance(val, compat.FakeTensor) else int
            saved[_storage(node)] = node.name, hint(numel([expr(n) for n in val.shape])) * val.dtype.itemsize
    return dict(saved.values())


def returned(forward: GraphModule, outputs: int) -> set[str]:
    """The names of the values that a forward graph hands to its caller too, or a view of them."""
    (output,) = forward.graph.find_nodes(op="output")
    theirs = {_storage(n) for n in output.args[0][:outputs] if isinstance(n, Node)}
    return {n.name for n in output.args[0][outputs:] if isinstance(n, Node) and _storage(n) in theirs}


def _storage(node: Node) -> Any:
    val = node.meta.get("val")
    return val.untyped_storage()._cdata if isinstance(val, torch.Tensor) else node
