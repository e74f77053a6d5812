"""What a wrong pass leaves behind, and that verify finds it before Inductor does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx import Graph, Node

from peft_fx.passes import pipeline
from peft_fx.passes.graph.nodes import CAST, aten, is_random, value
from tests.support.spellings import Stack
from tests.support.stepping import assert_falls_back

Break = Callable[[Graph, list[Node]], None]
BREAKS: dict[str, tuple[Break, str]] = {}


def breaks(what: str) -> Callable[[Break], Break]:
    def note(change: Break) -> Break:
        BREAKS[change.__name__] = change, what
        return change

    return note


def output_of(graph: Graph) -> Node:
    (output,) = (n for n in graph.nodes if n.op == "output")
    return output


@breaks("")
def wrong_dtype_inside(graph: Graph, added: list[Node]) -> None:
    cast = next(n for n in added if n.target is CAST)
    cast.args = (cast.args[0], torch.float16)


@breaks("")
def wrong_shape_inside(graph: Graph, added: list[Node]) -> None:
    merge = next(n for n in added if n.target is aten.mm.default)
    merge.meta["val"] = value(merge)[1:]


@breaks("outputs")
def wrong_dtype_of_an_output(graph: Graph, added: list[Node]) -> None:
    output = output_of(graph)
    with graph.inserting_before(output):
        cast = graph.call_function(CAST, (output.args[0][0], torch.float64))
    cast.meta["val"] = value(output.args[0][0]).double()
    output.args = ((cast, *output.args[0][1:]),)


@breaks("outputs")
def gradient_dropped(graph: Graph, added: list[Node]) -> None:
    output = output_of(graph)
    last = max(i for i, n in enumerate(output.args[0]) if n is not None)
    output.args = (tuple(None if i == last else n for i, n in enumerate(output.args[0])),)


@breaks("outputs")
def output_dropped(graph: Graph, added: list[Node]) -> None:
    output = output_of(graph)
    output.args = (tuple(output.args[0][:-1]),)


@breaks("outputs")
def outputs_exchanged(graph: Graph, added: list[Node]) -> None:
    output = output_of(graph)
    output.args = (tuple(output.args[0][::-1]),)


@breaks("the graph is not well-formed")
def used_before_it_is_made(graph: Graph, added: list[Node]) -> None:
    graph.output_node().prepend(next(n for n in added if n.users))


@breaks("effects")
def random_draw_dropped(graph: Graph, added: list[Node]) -> None:
    draw = next(n for n in graph.nodes if is_random(n))
    with graph.inserting_before(draw):
        same = graph.call_function(aten.full.default, (list(value(draw).shape), 0.5))
    same.meta["val"] = value(draw)
    draw.replace_all_uses_with(same)
    graph.erase_node(draw)


class WithNoise(Stack):
    """A random draw outside of the adapters."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x + torch.rand_like(x))


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_graph_is_not_used(name: str, monkeypatch) -> None:
    """What a wrong pass leaves behind is found before Inductor sees it."""
    change, what = BREAKS[name]
    verify = pipeline.verify

    def verify_broken(graph: Graph, before: Any, fake_mode: Any) -> None:
        change(graph, [n for n in graph.nodes if n.op == "call_function" and n not in before.reads])
        verify(graph, before, fake_mode)

    monkeypatch.setattr(pipeline, "verify", verify_broken)
    assert_falls_back(WithNoise, f"VerificationError: {what}")
