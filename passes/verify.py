"""What must hold of a graph after the passes: its inputs and outputs, every node's fake value, the order of what has
effects; and that backward reads nothing that forward has written over."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from peft_fx.passes.graph.fakes import made_by
from peft_fx.passes.graph.nodes import expr, is_mutable, is_random, signature, value
from peft_fx.passes.keep.changed_inputs import stale_reads


class VerificationError(AssertionError):
    """A pass broke the graph. The caller takes the untouched one instead."""


@dataclass(frozen=True)
class Contract:
    """What a graph promises to its callers, taken before the passes; and what each of its nodes reads. Outputs are fake
    values, compared in the end: a guard of the passes may have made a number of a symbol meanwhile."""

    inputs: tuple[str, ...]
    outputs: tuple[Any, ...]
    effects: tuple[str, ...]
    reads: dict[Node, tuple[Any, Any]]

    @staticmethod
    def of(graph: Graph) -> Contract:
        return Contract(
            tuple(n.name for n in graph.nodes if n.op == "placeholder"),
            tuple(value(n) if isinstance(n, Node) else n for n in _outputs(graph)),
            tuple(str(n.target) for n in graph.nodes if _has_effect(n)),
            {n: (n.args, n.kwargs) for n in graph.nodes if n.op == "call_function"},
        )


def verify(graph: Graph, before: Contract, fake_mode: AbstractContextManager[Any]) -> None:
    """Raises VerificationError unless the graph is well-formed, keeps its contract, and says the truth about its new
    nodes and about those that read something else than before."""
    try:
        graph.lint()
    except Exception as error:
        raise VerificationError(f"the graph is not well-formed: {error}") from error
    after = Contract.of(graph)
    for what in ("inputs", "outputs", "effects"):
        was, now = (tuple(map(_described, getattr(c, what))) for c in (before, after))
        if was != now:
            raise VerificationError(f"{what} changed from {was} to {now}")
    no_stale_reads(graph)
    answers: dict[Any, Any] = {}
    for node, read in after.reads.items():
        new = node not in before.reads
        if not new and _is_same(read, before.reads[node]):
            continue
        if any(isinstance(a, Node) and a.op == "get_attr" for a in node.args):
            continue  # a call of another graph, whose nodes say the truth for themselves
        asked = node.target, signature(node.args), signature(node.kwargs)
        if asked not in answers:  # layers are alike, and a fake call takes longer than to look it up
            answers[asked] = _described(made_by(node.target, node.args, node.kwargs, fake_mode))
        made, said = answers[asked], _described(value(node))
        if not new:  # its strides may follow those of what it reads
            made, said = [d[:1] + d[2:] if isinstance(d, tuple) else d for d in (made, said)]
        if made != said:
            raise VerificationError(f"{node.format_node()} is {made}, and says {said}")


def no_stale_reads(graph: Graph) -> None:
    """Raises VerificationError where backward may find another value in a graph input than forward did."""
    stale = [node.format_node() or str(node) for node in stale_reads(graph)]
    if stale:
        raise VerificationError(f"forward writes over what backward reads: {', '.join(stale)}")


def _is_same(read: tuple[Any, Any], before: tuple[Any, Any]) -> bool:
    return all(a is b for a, b in zip(read, before, strict=True))


def _outputs(graph: Graph) -> list[Any]:
    (output,) = (n for n in graph.nodes if n.op == "output")
    found = output.args[0]
    return list(found) if isinstance(found, (list, tuple)) else [found]


def _described(val: Any) -> Any:
    """What must not change: of a dimension of size one the stride may, which nothing ever multiplies by."""
    if not isinstance(val, torch.Tensor):
        return str(val)
    sizes = tuple(expr(n) for n in val.shape)
    return (
        sizes,
        tuple(None if n == 1 or 0 in sizes else expr(m) for n, m in zip(sizes, val.stride(), strict=True)),
        val.dtype,
        val.device,
    )


def _has_effect(node: Node) -> bool:
    return is_random(node) or is_mutable(node)
