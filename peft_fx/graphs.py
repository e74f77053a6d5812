"""Copies of graphs: Inductor may change the one that it is given."""

from __future__ import annotations

from torch.fx import Graph, GraphModule, Node


def copy_graph(graph: Graph) -> Graph:
    """The same nodes, as others."""
    return _copied(graph)[0]


def copy_module(gm: GraphModule) -> GraphModule:
    """A graph module of its own nodes, sharing its attributes."""
    graph, mapping = _copied(gm.graph)
    for old, new in mapping.items():
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    copied = GraphModule(gm, graph, type(gm).__name__)
    copied.meta.update(gm.meta)
    return copied


def _copied(graph: Graph) -> tuple[Graph, dict[Node, Node]]:
    copied = Graph()
    mapping: dict[Node, Node] = {}
    output = copied.graph_copy(graph, mapping)
    if output is not None:
        (old,) = (n for n in graph.nodes if n.op == "output")
        copied.output(output).meta.update(old.meta)
    return copied, mapping
