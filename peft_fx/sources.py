"""What Dynamo noted of where a node came from, by the names that the model has: parameters, modules, layers."""

from __future__ import annotations

import functools
import re
from typing import Any

from torch.fx import Graph, Node

from peft_fx.passes.analyse.flow import is_tangent, reachable
from peft_fx.step.kinds import INTO, name_of

STACKS = ("nn_module_stack", "fwd_nn_module_stack")  # of a node of forward, of one of backward


def name_in_model(source: str) -> str:
    """Dynamo's source of a parameter as the name a user knows.

    >>> name_in_model("L['self']._modules['layers']._modules['0']._parameters['weight']")
    'layers.0.weight'
    >>> name_in_model("L['self'].__dict__['_modules']['base'].w")
    'base.w'
    """
    kinds = ("_modules", "_parameters", "_buffers")
    if any(f"{kind}[" in source or f"'{kind}'" in source for kind in kinds):
        source = re.sub(r"^[LG]\['\w+'\]", "", source)  # the module itself, whatever it is called where it is called
    for inner in kinds:
        source = source.replace(f".__dict__['{inner}']", ".").replace(f"._{inner[1:]}", ".")
    source = source.replace("L['self']", "").replace("']", "").replace("['", ".")
    while ".." in source:
        source = source.replace("..", ".")
    return source.strip(".").removeprefix("L.")


def path_of(node: Node) -> str:
    """The path of the innermost module that a node came from, by Dynamo's notes; empty where there is none."""
    inner = classes_of(node)[:1]
    return inner[0][0] if inner else ""


def classes_of(node: Node) -> list[tuple[str, str]]:
    """The modules that a node came from, the innermost first: path and class name. Of a node of backward, those of the
    forward op that it is the gradient of."""
    return [(_path(path), _class(kind)) for path, kind in reversed(_stack(node).values())]


def _stack(node: Node) -> dict[str, tuple[str, Any]]:
    """The modules that a node came from as Dynamo noted them, the outermost first: path and class."""
    return next((node.meta[key] for key in STACKS if node.meta.get(key)), {})


def _class(kind: Any) -> str:
    """The name of a class, which is sometimes noted as text."""
    return str(getattr(kind, "__name__", kind)).rpartition(".")[2]


@functools.lru_cache(1 << 16)
def _path(source: str) -> str:
    """Dynamo's path of a module as the model has it.

    >>> _path("L['self']._modules['layers']._modules['0']"), _path("L['model'].layers.0"), _path("L['self']")
    ('layers.0', 'layers.0', '')
    """
    return name_in_model(re.sub(r"^[LG]\['\w+'\]", "", source))


def between_layers(graph: Graph) -> frozenset[Node]:
    """What one layer hands to another and products are in, as checkpoints keep it: made again, each of them would wait
    in backward for its own layer, and all those of a deep model together."""
    backward = reachable(graph, is_tangent)
    layers = {n: _layer(n) for n in graph.nodes if n not in backward}
    handed = {n for n, own in layers.items() if own and any(layers.get(u) not in ("", None, own) for u in n.users)}
    return frozenset(handed & reachable(graph, lambda n: name_of(n) in INTO))


def _layer(node: Node) -> str:
    """The path of the outermost module in a list that a node came from; empty where there is none."""
    paths = (_path(source) for source, _ in _stack(node).values())
    return next((path for path in paths if path.rpartition(".")[2].isdecimal()), "")
