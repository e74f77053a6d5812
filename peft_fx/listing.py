"""The ATen nodes of a module as text: what explain's report shows of a site, before the passes and after."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Graph, Node

from peft_fx.passes.analyse.flow import Roles, is_tangent, reachable
from peft_fx.passes.findings import layer_of
from peft_fx.passes.graph.editor import REBUILD
from peft_fx.passes.graph.nodes import expr
from peft_fx.sources import path_of

SHORT = {"bfloat16": "bf16", "float16": "f16", "float32": "f32", "float64": "f64", "int64": "i64", "bool": "b8"}
REBUILT = "  # rebuilt in backward"
Lines = dict[str, list[str]]  # of "forward" and "backward"


def listings(graph: Graph, roles: Roles, sites: Iterable[str]) -> dict[str, Lines]:
    """The nodes that came from the module of each site, one line each, in graph order.

    Modules are known by what Dynamo noted at each node. A site that is no module's, such as a weight with a name of its
    own, has the nodes of the module around it; in a plain function, all nodes.
    """
    paths = {n: path_of(n) for n in graph.nodes if n.op == "call_function"}
    known = {"", *(p[:end] for p in set(paths.values()) for end in _ends(p))}
    modules: dict[str, list[str]] = defaultdict(list)
    for site in sites:
        name = layer_of(site)
        while name not in known:
            name = name.rpartition(".")[0]
        modules[name].append(site)
    backward = reachable(graph, is_tangent)
    found: dict[str, Lines] = {site: {"forward": [], "backward": []} for own in modules.values() for site in own}
    inside = {p: next((modules[p[:end]] for end in _ends(p) if p[:end] in modules), []) for p in set(paths.values())}
    names = {node: role.name for node, role in roles.items()}
    for node, path in paths.items():
        if inside[path]:
            text = line(node, names)
            for site in inside[path]:
                own = text.replace(f"{layer_of(site)}.", "")  # parameters by their names inside the module
                found[site]["backward" if node in backward else "forward"].append(own)
    return found


def _ends(path: str) -> list[int]:
    """Where the path of a module, and of each one around it, ends, the longest first."""
    return [len(path), *(i for i in range(len(path) - 1, -1, -1) if path[i] == "."), 0]


def line(node: Node, names: dict[Node, str]) -> str:
    """`mm: f32[512, 16] = mm(view, permute)`, with the names of parameters in the place of graph inputs."""

    def told(arg: Any) -> str:
        if isinstance(arg, Node):
            return names.get(arg) or str(arg)
        if isinstance(arg, (list, tuple)):
            return f"[{', '.join(map(told, arg))}]"
        return SHORT.get(text := str(arg).removeprefix("torch."), text)

    args = [*map(told, node.args), *(f"{k}={told(v)}" for k, v in node.kwargs.items())]
    op = getattr(node.target, "__name__", str(node.target)).partition(".")[0]
    rebuilt = REBUILT if node.meta.get("recompute") == REBUILD else ""
    return f"{node.name}: {_type(node.meta.get('val'))} = {op}({', '.join(args)}){rebuilt}"


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{SHORT.get(dtype, dtype)}[{', '.join(str(expr(n)) for n in value.shape)}]"
    return f"({', '.join(map(_type, value))})" if isinstance(value, (list, tuple)) else type(value).__name__
