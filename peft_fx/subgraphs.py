"""Graphs that a graph calls: regions compiled once for all of their calls (torch.compiler.nested_compile_region).

AOTAutograd hands such a graph to the passes before its caller, and without a word about its inputs. Dynamo's graph has
the calls; which of its regions a graph comes from is told by the sizes of the inputs, and by the modules that the code
is of.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from peft_fx.passes.analyse.flow import Role, is_tangent
from peft_fx.passes.findings import LOSS, Outcome
from peft_fx.passes.graph.nodes import expr


@dataclass(frozen=True)
class Subgraph:
    """A region: what its inputs are like, the modules that its code is of, and for each call the roles of what the
    caller hands it, None for what the caller computed."""

    inputs: tuple[Any, ...]
    modules: frozenset[str]
    calls: tuple[tuple[Role | None, ...], ...]

    def roles_in(self, graph: Graph) -> dict[Node, Role]:
        """By the names of the first call. An input is a weight where every call is given one."""
        found = {}
        for node, *given in zip(_inputs(graph), *self.calls, strict=True):
            roles = [r for r in given if r is not None]
            if len(roles) == len(given):
                static, trainable = (all(getattr(r, kind) for r in roles) for kind in ("static", "trainable"))
                found[node] = Role(roles[0].name, static, trainable)
        return found

    @functools.cached_property
    def names(self) -> list[dict[str, str]]:
        """For each call, its own names of what the first call is given."""
        first, *_ = self.calls
        return [{a.name: b.name for a, b in zip(first, call, strict=True) if a and b} for call in self.calls]


def subgraphs_of(gm: GraphModule, roles: Mapping[int, Role]) -> list[Subgraph]:
    """The regions that a Dynamo graph calls, and those that they call; `roles` are those of its inputs, by position."""
    calls: dict[GraphModule, list[tuple[Role | None, ...]]] = {}
    todo: list[tuple[GraphModule, Mapping[int, Role | None]]] = [(gm, roles)]
    while todo:
        caller, given = todo.pop(0)
        own = {node: given.get(i) for i, node in enumerate(caller.graph.find_nodes(op="placeholder"))}
        for node in caller.graph.find_nodes(op="call_function", target=torch.ops.higher_order.invoke_subgraph):
            region, _, *operands = node.args
            body = caller.get_submodule(region.target)
            calls.setdefault(body, []).append(tuple(own.get(operand) for operand in operands))
            todo.append((body, dict(enumerate(calls[body][-1]))))
    return [Subgraph(_described(body.graph), _modules(body.graph), tuple(found)) for body, found in calls.items()]


def matching(graph: Graph, subgraphs: Sequence[Subgraph]) -> Subgraph | None:
    """The region that a graph comes from; None where it is none of them."""
    if not subgraphs or any("desc" in node.meta for node in _inputs(graph)):
        return None
    alike = [s for s in subgraphs if s.inputs == _described(graph)]
    return max(alike, key=lambda s: len(s.modules & _modules(graph)), default=None)


def _inputs(graph: Graph) -> list[Node]:
    return [node for node in graph.find_nodes(op="placeholder") if not is_tangent(node)]


def _described(graph: Graph) -> tuple[Any, ...]:
    """Sizes and dtypes of a graph's inputs."""
    vals = [node.meta.get("val", node.meta.get("example_value")) for node in _inputs(graph)]
    tensors = (isinstance(v, torch.Tensor) for v in vals)
    return tuple(
        (tuple(map(str, map(expr, v.shape))), v.dtype) if t else str(v) for v, t in zip(vals, tensors, strict=True)
    )


def _modules(graph: Graph) -> frozenset[str]:
    return frozenset(key for node in graph.nodes for key in node.meta.get("nn_module_stack", ()))


def renamed(outcome: Outcome, names: Mapping[str, str]) -> Outcome:
    """The same of another module, or by other names: `names` has a new one for each parameter's."""

    def all_of(found: list[Any]) -> list[Any]:
        return [replace(f, name=_renamed(f.name, names)) for f in found]

    o = outcome
    return replace(
        o,
        sites=all_of(o.sites),
        merged=all_of(o.merged),
        refusals=all_of(o.refusals),
        losses=all_of(o.losses),
        inputs=all_of(o.inputs),
    )


def _renamed(name: str, names: Mapping[str, str]) -> str:
    """A module's name, or a parameter's, where a parameter of that module has another name.

    >>> _renamed("up#2", {"up.weight": "layers.3.up.weight"})
    'layers.3.up#2'
    """
    head = LOSS if name.startswith(LOSS) else ""
    module, mark, number = name.removeprefix(head).partition("#")
    for old, new in names.items():
        if old != new and (old == module or old.startswith(f"{module}.")):
            before, after, parts = old.split("."), new.split("."), module.split(".")
            while before and after and before[-1] == after[-1]:
                del before[-1], after[-1]
            if len(before) <= len(parts):
                return head + ".".join(after + parts[len(before) :]) + mark + number
    return name
