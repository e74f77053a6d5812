"""Faults put into every stage of the passes: the untouched graph runs, after one warning, and the results are right."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

import peft_fx
from peft_fx.passes import pipeline
from peft_fx.passes.findings import Settings
from peft_fx.passes.graph.joint import Joint
from peft_fx.passes.graph.nodes import aten, prims, value
from peft_fx.passes.keep import chains
from peft_fx.passes.verify import VerificationError
from tests.support import joint
from tests.support.oracle import WEIGHT, assert_bit_equal, integers, run
from tests.support.spellings import frozen, trained

K, R = 16, 3


class Everything(nn.Module):
    """A graph that gives every stage something to do: a product with an identity, a LoRA in bf16 with PEFT's casts, a
    layer scaled by a vector, an adapter behind dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.U, self.V, self.l = frozen(K, K), frozen(K, K), nn.Parameter(torch.ones(K))
        self.W = nn.Parameter(frozen(K, K).to(torch.bfloat16), requires_grad=False)
        self.A, self.B, self.C, self.D = (trained(*shape) for shape in ((K, R), (R, K), (K, R), (R, K)))

    def forward(self, x: Tensor) -> Tensor:
        shift = (torch.eye(K) @ self.A @ self.B).sum(0).detach()
        h = x.to(torch.bfloat16)
        h = (h @ self.W + (h.float() @ self.A) @ self.B).to(torch.bfloat16)
        h = torch.relu(h.float()) @ self.V * self.l + shift
        return torch.relu(h) + (x @ self.U + (nn.functional.dropout(x, 0.5) @ self.C) @ self.D)


def inputs() -> tuple[Tensor]:
    return integers((torch.empty(64, K, requires_grad=True),), 2, bound=1)


STAGES = [row.name for row in pipeline.PASSES]


def with_pass(stage: str, run: Callable[[Callable[..., None], Joint, Settings], None]) -> Any:
    """The table with another one in the place of a pass, always run; it is given the real one."""

    def row(of: pipeline.Pass) -> pipeline.Pass:
        return replace(of, run=functools.partial(run, of.run), when=pipeline.always) if of.name == stage else of

    return patch.object(pipeline, "PASSES", tuple(map(row, pipeline.PASSES)))


def after(stage: str, fault: Callable[[Graph], None]) -> Any:
    """The stage, and then the fault."""

    def faulty(real: Callable[..., None], graph: Joint, settings: Settings) -> None:
        real(graph, settings)
        fault(graph.graph)
        graph.edit.changes += 1

    return with_pass(stage, faulty)


def failing(stage: str) -> Any:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"injected into {stage}")

    return patch.object(pipeline, stage, fail) if stage == "verify" else with_pass(stage, fail)


def _outputs(graph: Graph) -> tuple[Node, list[Any]]:
    (output,) = graph.find_nodes(op="output")
    return output, list(output.args[0])


def _added(graph: Graph, before: Node, target: Any, *args: Any, like: Node | None = None) -> Node:
    """A new node; it says that it is what `like` is, or the truth."""
    with graph.inserting_before(before):
        node = graph.call_function(target, args)
    vals = [value(a) if isinstance(a, Node) else a for a in args]
    node.meta["val"] = target(*vals) if like is None else value(like)
    return node


def an_output_of_another_shape(graph: Graph) -> None:
    output, found = _outputs(graph)
    output.args = ([_added(graph, output, aten.slice.Tensor, found[0], 0, 1), *found[1:]],)


def an_output_of_another_dtype(graph: Graph) -> None:
    output, found = _outputs(graph)
    output.args = ([_added(graph, output, prims.convert_element_type.default, found[0], torch.float16), *found[1:]],)


def a_gradient_dropped(graph: Graph) -> None:
    output, found = _outputs(graph)
    last = max(i for i, n in enumerate(found) if isinstance(n, Node))
    output.args = ([*found[:last], None, *found[last + 1 :]],)


def _product(graph: Graph) -> Node:
    return next(n for n in graph.nodes if n.target is aten.mm.default and n.users)


def a_value_of_another_shape(graph: Graph) -> None:
    """One that broadcasts: nothing fails, and nothing says so."""
    node = _product(graph)
    narrow = _added(graph, next(iter(node.users)), aten.slice.Tensor, node, 0, 0, 1, like=node)
    node.replace_all_uses_with(narrow, delete_user_cb=lambda user: user is not narrow)


def a_value_of_another_dtype(graph: Graph) -> None:
    node = _product(graph)
    wide = _added(graph, next(iter(node.users)), prims.convert_element_type.default, node, torch.float64, like=node)
    node.replace_all_uses_with(wide, delete_user_cb=lambda user: user is not wide)


def a_value_in_the_place_of_a_wider_one(graph: Graph) -> None:
    """No new node at all: the users of one value read another."""
    sizes = {n: tuple(value(n).shape) for n in graph.nodes if n.op == "call_function" and value(n) is not None}
    matrices = [n for n, size in sizes.items() if len(size) == 2]
    pairs = ((node, other) for i, node in enumerate(matrices) for other in matrices[:i] if node.users)
    node, other = next((a, b) for a, b in pairs if sizes[a] != sizes[b])
    node.replace_all_uses_with(other)


def a_draw_dropped(graph: Graph) -> None:
    (node,) = (n for n in graph.nodes if n.target in (aten.rand.default, aten.native_dropout.default))
    node.replace_all_uses_with(_added(graph, node, aten.full.default, list(value(node).shape), 0.75))
    graph.erase_node(node)


def a_node_used_before_it_is_made(graph: Graph) -> None:
    node = _product(graph)
    next(iter(node.users)).append(node)


FAULTS = [
    *(an_output_of_another_shape, an_output_of_another_dtype, a_gradient_dropped, a_value_of_another_shape),
    *(a_value_of_another_dtype, a_value_in_the_place_of_a_wider_one, a_draw_dropped, a_node_used_before_it_is_made),
]


@cache
def captured() -> joint.Joint:
    torch.manual_seed(0)
    return joint.trace(integers(Everything(), 1, bound=1), *inputs())


def test_every_stage_has_something_to_do() -> None:
    """Else a fault in it would not show."""
    with patch.object(chains.Recompute, "mark", autospec=True, side_effect=chains.Recompute.mark) as marked:
        _, outcome = captured().rewritten(form="weight")
    assert marked.called
    assert {s.method for s in outcome.sites} == {"low-rank", "affine"}
    assert [r.code for r in outcome.refusals] == ["dropout"]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("fault", FAULTS)
def test_verify_catches_what_a_stage_breaks(stage: str, fault: Callable[[Graph], None]) -> None:
    """Or a later stage fails over it: the caller takes the untouched graph in either case."""
    with after(stage, fault), pytest.raises(Exception) as raised:  # noqa: PT011
        captured().rewritten(form="weight", chunk_loss=False)
    if stage == STAGES[-1]:  # nothing runs behind it but verify
        assert isinstance(raised.value, VerificationError)


def trains(options: dict[str, Any]) -> None:
    """Two steps through the backend, equal to eager's."""
    module = integers(Everything(), 1, bound=1)
    f = torch.compile(module, backend=peft_fx.backend, options=options)
    for seed in range(2):

        def seeded(g: Callable[..., Any], seed: int = seed) -> Callable[..., Any]:
            def call(*args: Any) -> Any:
                torch.manual_seed(seed)
                return g(*args)

            return call

        assert_bit_equal(run(seeded(f), module, inputs()), run(seeded(module), module, inputs()))


@pytest.mark.parametrize("stage", ["identities", "merge_sums", "verify"])
def test_training_goes_on_where_a_stage_fails(stage: str) -> None:
    with failing(stage), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trains(WEIGHT)
    ours = [str(w.message) for w in caught if "peft_fx" in str(w.message)]
    assert len(ours) == 1
    assert f"injected into {stage}" in ours[0]


@pytest.mark.parametrize("fault", FAULTS)
def test_training_goes_on_where_the_graph_is_broken(fault: Callable[[Graph], None]) -> None:
    with after("dense_grads", fault), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trains(WEIGHT)
    assert len([w for w in caught if "left a graph to Inductor untouched" in str(w.message)]) == 1
