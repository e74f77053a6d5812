"""What each input of a graph is: a parameter, a buffer, or what a call was given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from peft_fx import compat
from peft_fx.passes.analyse.flow import Role
from peft_fx.sources import name_in_model


def roles_of(
    gm: GraphModule, example_inputs: Sequence[Any], names: Mapping[torch.Tensor, str] | None = None
) -> dict[int, Role]:
    """What each input of a Dynamo graph is, by position; `names` are those of the parameters, where the model is known:
    Dynamo's own say little behind a graph break."""
    roles = {}
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    for i, (node, given) in enumerate(zip(placeholders, example_inputs, strict=False)):
        if not isinstance(given, torch.Tensor):
            continue
        source = compat.source_name(node) or node.name
        is_parameter = isinstance(given, torch.nn.Parameter) or "_parameters[" in source
        marked = "_dynamo_static_input_type" in node.meta.get("tensor_dict", {})
        in_a_hook = "_hooks[" in source  # what a call was given, handed on by a hook, comes from a module too
        static = is_parameter or "_buffers[" in source or (marked and not in_a_hook)
        roles[i] = Role((names or {}).get(given) or name_in_model(source), static, is_parameter and given.requires_grad)
    return roles


def roles_in(graph: Graph, by_position: dict[int, Role]) -> dict[Node, Role]:
    """The same for the inputs of the joint graph, by AOTAutograd's own description of them."""
    roles = {}
    for node in graph.nodes:
        if node.op != "placeholder":
            break
        described = node.meta.get("desc")
        attribute = ""
        while described is not None and not hasattr(described, "idx") and hasattr(described, "base"):
            attribute = f".{getattr(described, 'attr', '')}{attribute}"
            described = described.base
        role = by_position.get(getattr(described, "idx", -1)) if "tangents" not in node.name else None
        if role is not None:
            roles[node] = Role(role.name + attribute, role.static, role.trainable)
    return roles


def fake_inputs(gm: GraphModule, example_inputs: Sequence[Any]) -> list[Any]:
    """What Dynamo traced a graph with, in the place of what it is called with."""
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    return [n.meta.get("example_value", given) for n, given in zip(placeholders, example_inputs, strict=False)]
