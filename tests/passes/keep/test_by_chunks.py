"""Adapter gradients a few tokens at a time: copies of activations are no larger than a chunk, and nothing else
changes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Graph, Node

import peft_fx
from peft_fx.passes.analyse.flow import is_tangent, reachable
from peft_fx.passes.decide import price
from peft_fx.passes.decide.machine import MACHINES
from peft_fx.passes.graph.nodes import CASTS, aten, is_tensor, value
from peft_fx.passes.keep import by_chunks
from peft_fx.retargeting import GPU
from tests.support import joint
from tests.support.oracle import gate, weight_form

BF16, FP32 = torch.bfloat16, torch.float32
SLOW = {"form": "weight", "machine": "avx2"}  # a machine that multiplies copies sooner than it reads in place


class Layers(nn.Module):
    """Siblings with one input, then one layer on what they give: a block in small. Bases in bf16, adapters in
    fp32; `magnitude` is a trained vector behind each adapter, `dropout` a rate before it."""

    def __init__(self, K: int, N: int, siblings: int = 2, magnitude: bool = False, dropout: float = 0.0, smooth=False):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.dropout, self.smooth = dropout, smooth
        for i in range(siblings + 1):
            k, n = (K, N) if i < siblings else (N, K)
            layer = nn.Module()
            layer.W = nn.Parameter((torch.randn(k, n, generator=generator) / k**0.5).to(BF16), requires_grad=False)
            layer.A = nn.Parameter(torch.randn(k, 4, generator=generator) / k**0.5)
            layer.B = nn.Parameter(torch.randn(4, n, generator=generator) / 2)
            layer.m = nn.Parameter(torch.rand(n, generator=generator) + 0.5) if magnitude else None
            self.add_module(str(i), layer)

    def forward(self, x: Tensor) -> Tensor:
        *siblings, last = self.children()
        h = sum((i + 1) * self._adapted(x, layer) for i, layer in enumerate(siblings))
        return self._adapted(torch.tanh(h) if self.smooth else torch.relu(h), last)

    def _adapted(self, x: Tensor, layer: Any) -> Tensor:
        u = nn.functional.dropout(x.to(layer.A.dtype), self.dropout)
        delta = u @ layer.A @ layer.B
        delta = delta if layer.m is None else delta * layer.m
        return (x @ layer.W + delta).to(x.dtype)


class Turned(nn.Module):
    """The weight from the left: tokens are columns."""

    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(32, 48).to(BF16), requires_grad=False)
        self.A = nn.Parameter(torch.randn(4, 48))
        self.B = nn.Parameter(torch.randn(32, 4))

    def forward(self, x: Tensor) -> Tensor:
        return (self.W @ x.t() + self.B @ (self.A @ x.t().float())).to(x.dtype).t()


def tokens(*sizes: int, dtype: torch.dtype = BF16) -> tuple[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(*sizes, generator=generator).to(dtype).requires_grad_(True),)


def in_chunks(size: float = 0) -> Any:
    """However small they are, or not at all."""
    return patch.object(by_chunks, "LEAST", size)


def copies(graph: Graph) -> Iterator[Node]:
    """What backward's fp32 products read of copies of half-precision tensors."""
    for product in reachable(graph, is_tangent):
        if product.target in (aten.mm.default, aten.addmm.default):
            for node in product.args[-2:]:
                read = node
                while node.op == "call_function" and node.target not in CASTS and len(node.all_input_nodes) == 1:
                    node = node.all_input_nodes[0]
                if node.target in CASTS and value(node.args[0]).dtype != FP32 == value(node).dtype:
                    yield read


@pytest.mark.parametrize("form", ["weight", "as written"])
def test_no_copy_is_larger_than_a_chunk(form: str) -> None:
    """At sizes that are worth it without any being asked for; and where the price leaves every adapter alone."""
    chosen = nullcontext() if form == "weight" else patch.object(price, "merge", lambda m, s: price.Price(1.0))
    with chosen:
        captured = joint.capture(Layers(256, 512), *tokens(2, 512, 256))
        graph, outcome = captured.rewritten(**SLOW | ({} if form == "weight" else {"form": "auto"}))
    assert {s.forward for s in outcome.sites} == {"weight" if form == "weight" else "activation"}
    read = list(copies(graph))
    assert read
    assert {max(value(n).shape) for n in read} <= {256, 512}
    assert max(value(n).numel() for n in read) <= 1024 * 512 // 4


def test_a_small_copy_is_made_whole() -> None:
    captured = joint.capture(Layers(32, 48), *tokens(64, 32))
    with in_chunks(10**9):
        whole = captured.rewritten(**SLOW)[0]
    assert [n.target for n in captured.rewritten(**SLOW)[0].nodes] == [n.target for n in whole.nodes]


def test_a_gpu_makes_fewer_chunks() -> None:
    """Four of a copy of which a CPU with the same rates makes eight."""
    captured = joint.capture(Layers(32, 48, dropout=0.5), *tokens(64, 32))
    machine, copy = MACHINES["h100"], 4 * 64 * 48
    with in_chunks(copy / 8 / (machine.bandwidth * machine.launch)):
        chunked, _ = captured.rewritten(GPU, machine="h100", form="weight")
    assert {value(n).shape[0] for n in copies(chunked) if value(n).shape[1] == 48} == {64 // 4}


def test_the_copies_of_a_chunk_are_read_before_the_next_are_made() -> None:
    with in_chunks():
        graph, _ = joint.capture(Layers(32, 48), *tokens(64, 32)).rewritten(**SLOW)
    position = {n: i for i, n in enumerate(graph.nodes)}
    parts = [n for n in graph.nodes if n.target is aten.slice.Tensor]
    groups: dict[int, list[tuple[int, int]]] = {}
    for part in parts:
        cast = next(u for u in part.users if u.op == "call_function")
        last = max(position[u] for n in (part, cast) for u in n.users)
        groups.setdefault(part.args[2], []).append((position[part], last))
    assert len(groups) == by_chunks.MOST
    for at, following in zip(sorted(groups), sorted(groups)[1:], strict=False):
        early, late = sorted(groups[at]), sorted(groups[following])
        half = len(early) // 2  # two places in the graph, the last layer's and the siblings'
        assert max(end for _, end in early[:half]) < late[0][0]


def test_what_is_rounded_back_is_read_itself() -> None:
    """PEFT's casts send a bf16 gradient through fp32 to its base product: no copy is made whole for that."""
    with in_chunks():
        graph, _ = joint.capture(Layers(32, 48), *tokens(64, 32)).rewritten(**SLOW)
    backward = reachable(graph, is_tangent)
    whole = [n for n in backward if n.target in CASTS and value(n).dtype == FP32 and value(n).shape[0] == 64]
    back = [u for n in whole for u in n.users if u.target in CASTS and value(n.args[0]).dtype == value(u).dtype]
    assert not back


@pytest.mark.parametrize("magnitude", [False, True])
@pytest.mark.parametrize("siblings", [1, 3])
@pytest.mark.parametrize("sizes", [(64, 32), (2, 31, 32), (83, 32), (3, 32)])
def test_integers_are_equal(sizes: tuple[int, ...], siblings: int, magnitude: bool) -> None:
    """Bit for bit, at lengths that chunks do not divide as well."""
    captured = joint.capture(Layers(32, 48, siblings, magnitude), *tokens(*sizes))
    with in_chunks(10**9):
        whole = captured.rewritten(**SLOW)[0]
    with in_chunks():
        chunked = captured.rewritten(**SLOW)[0]
    assert len(list(copies(chunked))) > 2 * len(list(copies(whole)))
    assert joint.equal(captured.run(whole, bound=1), captured.run(chunked, bound=1))


def test_no_tokens_at_all() -> None:
    captured = joint.trace(Layers(32, 48), *tokens(0, 32))
    with in_chunks():
        chunked = captured.rewritten(**SLOW)[0]
    assert joint.equal(captured.run(captured.graph), captured.run(chunked))


def test_tokens_as_columns() -> None:
    captured = joint.capture(Turned(), *tokens(64, 48))
    with in_chunks():
        chunked = captured.rewritten(**SLOW)[0]
    assert max(min(value(n).shape) for n in copies(chunked)) <= 64 // by_chunks.MOST
    assert joint.equal(captured.run(captured.graph, bound=1), captured.run(chunked, bound=1))


def options() -> dict[str, str]:
    return {f"peft_fx.{k}": v for k, v in SLOW.items()}


def test_gradients_are_no_worse() -> None:
    module = Layers(64, 96, smooth=True)
    with in_chunks():
        gate(weight_form(module, **options()), module, tokens(83, 64))


def test_dropout_in_activation_form() -> None:
    """The adapter reads a masked copy in forward. Its own gradients are made by chunks all the same, of the same mask;
    nothing of forward is, nor of what lies between the layers."""
    captured = joint.capture(Layers(32, 48, dropout=0.5), *tokens(64, 32))
    with in_chunks(10**9):
        whole = captured.rewritten(**SLOW)[0]
    with in_chunks():
        chunked = captured.rewritten(**SLOW)[0]
    assert len(list(copies(chunked))) > 20
    assert joint.equal(captured.run(whole, bound=1), captured.run(chunked, bound=1))
    for once in (aten.tanh.default, aten.relu.default, aten.rand.default, torch.ops.prims.inductor_random.default):
        assert len(chunked.find_nodes(op="call_function", target=once)) == len(
            whole.find_nodes(op="call_function", target=once)
        )
    large = [
        [n for n in g.nodes if n.target is aten.mm.default and value(n).dtype == BF16 and 64 in value(n).shape]
        for g in (whole, chunked)
    ]
    assert len(large[0]) == len(large[1]) == 6
    kept = [sum(value(n).numel() for n in captured.split(g)[0].graph.output_node().args[0]) for g in (whole, chunked)]
    assert kept[0] == kept[1]


def test_layers_that_read_one_value_far_apart() -> None:
    """What a later layer's gradient is computed from is no part of an earlier one's: nothing between them is done by
    chunks."""

    class Cross(Layers):
        def forward(self, x: Tensor) -> Tensor:
            first, _ = self.children()
            return self._adapted(x, first) + self._adapted(torch.tanh(self._adapted(x, first)).detach() * x, first)

    captured = joint.capture(Cross(32, 32, 1), *tokens(64, 32))
    with in_chunks(10**9):
        whole = captured.rewritten(**SLOW)[0]
    with in_chunks():
        chunked = captured.rewritten(**SLOW)[0]
    assert joint.equal(captured.run(whole, bound=1), captured.run(chunked, bound=1))
    assert len(chunked.find_nodes(op="call_function", target=aten.tanh.default)) == len(
        whole.find_nodes(op="call_function", target=aten.tanh.default)
    )


def test_what_is_no_copy_is_left() -> None:
    """bfloat16 has numbers that float16 has not: what was cast there and back is another tensor."""

    class Narrow(Turned):
        def forward(self, x: Tensor) -> Tensor:
            B, A = self.B.half(), self.A.half()
            return (x @ self.W.t() + (x.half() @ A.t() @ B.t()).to(x.dtype)).to(x.dtype)

    captured = joint.trace(Narrow(), *tokens(64, 48))
    with in_chunks(10**9):
        whole = captured.rewritten(**SLOW)[0]
    with in_chunks():
        chunked = captured.rewritten(**SLOW)[0]
    assert [n.target for n in chunked.nodes] == [n.target for n in whole.nodes]


def test_a_dynamic_number_of_tokens_is_left_whole() -> None:
    torch._dynamo.reset()
    x = torch.randn(64, 32).to(BF16).requires_grad_(True)
    torch._dynamo.mark_dynamic(x, 0)
    with in_chunks():
        graph, _ = joint.capture(Layers(32, 48), x).rewritten(**SLOW)
    assert not graph.find_nodes(op="call_function", target=aten.slice.Tensor)


@settings(max_examples=15, deadline=None)
@given(
    st.integers(2, 70),
    st.integers(5, 24),
    st.integers(5, 24),
    st.integers(1, 3),
    st.booleans(),
    st.sampled_from([1, 4]),
)
def test_any_sizes(T: int, K: int, N: int, siblings: int, magnitude: bool, most: int) -> None:
    captured = joint.trace(Layers(K, N, siblings, magnitude), *tokens(1, T, K))
    with in_chunks(), patch.object(by_chunks, "MOST", most * 2):
        chunked = captured.rewritten(**SLOW)[0]
    with in_chunks(10**9):
        whole = captured.rewritten(**SLOW)[0]
    assert joint.equal(captured.run(whole, bound=1), captured.run(chunked, bound=1))


def test_through_inductor() -> None:
    module = Layers(64, 96, smooth=True)
    with in_chunks():
        gate(torch.compile(module, backend=peft_fx.backend, options=options()), module, tokens(83, 64))


# ------------------------------------------------------------------------------------------------------------ mutants

real_chunk = by_chunks._chunk


def _without_the_rest(build: Any, region: Any, flat: Any, bounds: tuple[int, int], results: Any) -> None:
    start, stop = bounds
    real_chunk(build, region, flat, (start, min(stop, region.tokens // math.ceil(region.tokens / 8) * 8)), results)


def _first_chunk_again(build: Any, region: Any, flat: Any, bounds: tuple[int, int], results: Any) -> None:
    start, stop = bounds
    real_chunk(build, region, flat, (0, stop - start), results)


def _sums_forgotten(build: Any, region: Any, flat: Any, bounds: tuple[int, int], results: Any) -> None:
    fresh: dict[Node, list[Node]] = {n: [] for n in results}
    real_chunk(build, region, flat, bounds, fresh)
    for n, parts in fresh.items():
        results[n] += parts


def _rows_of_another(build: Any, region: Any) -> Any:
    found = real_flat(build, region)
    some = [n for n in found.values() if is_tensor(n)]
    swapped = {n: next((m for m in some if m is not n and value(m).shape == value(n).shape), n) for n in some}
    return {key: swapped[n] for key, n in found.items()}


real_flat = by_chunks._flat
MUTANTS = {
    "the_rest_of_the_tokens_left_out": ("_chunk", _without_the_rest),
    "the_first_chunk_again": ("_chunk", _first_chunk_again),
    "sums_forgotten": ("_chunk", _sums_forgotten),
    "another_gradient_read": ("_flat", _rows_of_another),
}


@pytest.mark.parametrize("name", [None, *MUTANTS])
def test_mutants(name: str | None) -> None:
    """A rule that is broken on purpose is found, and none is where nothing is broken."""
    captured = joint.capture(Layers(32, 48, 3), *tokens(83, 32))
    with in_chunks(10**9):
        whole = captured.run(captured.rewritten(**SLOW)[0], bound=1)
    with in_chunks(), patch.object(by_chunks, *MUTANTS[name]) if name else nullcontext():
        try:
            same = joint.equal(whole, captured.run(captured.rewritten(**SLOW)[0], bound=1))
        except Exception:  # sizes that do not fit are found by the first that computes with them
            same = False
    assert same == (name is None)
