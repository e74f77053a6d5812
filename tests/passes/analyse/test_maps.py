"""Row-wise affine adapters become one product, exactly on integers and no worse than eager on floats."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from torch.fx import Graph, Node

import peft_fx
from peft_fx import machines
from peft_fx.inputs import roles_in
from peft_fx.passes import pipeline
from peft_fx.passes.analyse.flow import Flow, Roles
from peft_fx.passes.decide.machine import MACHINES
from peft_fx.passes.findings import Outcome
from peft_fx.passes.graph.nodes import PRODUCTS
from peft_fx.passes.keep import by_chunks
from tests.support import joint
from tests.support.affine_spellings import NEAR_MISSES, SPELLINGS, Spelling
from tests.support.oracle import WEIGHT, Run, assert_bit_equal, gate, integers, numbers, run, weight_form
from tests.support.spellings import Case, K, N, frozen, trained

cases = pytest.mark.parametrize("case", SPELLINGS, ids=lambda case: case.id)
near_misses = pytest.mark.parametrize("case", NEAR_MISSES, ids=lambda case: case.id)


def assert_rewritten(sites, refusals, case: Spelling, inputs) -> None:
    grad = case.grad if inputs[0].requires_grad else "none"
    assert refusals == []
    assert [s.name for s in sites] == list(case.names)
    assert {(s.forward, s.input_grad) for s in sites} == {("weight", grad)}


def forward_ops(graph: Graph, roles: Roles) -> list[Node]:
    """The ops over all tokens that the outputs of the model need."""
    flow = Flow(graph, roles)
    return [n for n in graph.nodes if n.op == "call_function" and n in flow.forward and not flow.is_weight(n)]


@pytest.fixture
def forward_products(monkeypatch) -> list[int]:
    """For each graph rewritten, how many products over all tokens its forward is left with."""
    found: list[int] = []
    real = pipeline.run

    def spy(graph: Graph, roles: Roles, *args) -> Outcome:
        outcome = real(graph, roles, *args)
        found.append(sum(n.target in PRODUCTS for n in forward_ops(graph, roles)))
        return outcome

    monkeypatch.setattr(pipeline, "run", spy)
    return found


@pytest.mark.parametrize("case", [case for case in SPELLINGS if case.exact], ids=lambda case: case.id)
def test_rewritten_is_bit_equal_on_integers(case: Spelling):
    """y and every gradient in fp64, None-ness included."""
    module, inputs = case.make(torch.float64)
    integers(module, 1), integers(inputs, 2)
    f = weight_form(module)
    assert_bit_equal(run(f, module, inputs), run(module, module, inputs))
    report = peft_fx.explain(f)
    assert report.graph_breaks == []
    assert_rewritten(report.sites, report.refusals, case, inputs)


@cases
def test_rewritten_is_no_worse_on_floats(case: Spelling, forward_products: list[int]):
    """y and every gradient in fp32 and bf16 err at most 1.25 times as much as in eager, and the forward is one product
    for each layer: whatever else an adapter did to all tokens is done to W."""
    for dtype in case.dtypes:
        torch._dynamo.reset()
        module, inputs = case.make(dtype)
        f = weight_form(module)
        gate(f, module, inputs, draw=numbers)
        report = peft_fx.explain(f)
        assert_rewritten(report.sites, report.refusals, case, inputs)
    assert forward_products == [case.products] * len(case.dtypes)


def compiled_run(case: Case) -> tuple[Run, torch.nn.Module]:
    """One step with a fixed seed, so that dropout draws the same."""
    torch._dynamo.reset()
    module, inputs = case.make(torch.float64)
    integers(module, 1), integers(inputs, 2)
    f = weight_form(module)
    torch.manual_seed(3)
    return run(f, module, inputs), f


@near_misses
def test_near_miss_is_left_as_it_is(case: Case, monkeypatch):
    """No forward in weight form, the code where one is due, and the bits of the same lowering without peft_fx."""
    got, f = compiled_run(case)
    report = peft_fx.explain(f)
    assert {r.code for r in report.refusals} >= ({case.code} if case.code else set()), str(report)
    assert not any(s.forward == "weight" for s in report.sites), str(report)
    monkeypatch.setenv("PEFT_FX_DISABLE", "1")
    assert_bit_equal(got, compiled_run(case)[0])


@near_misses
def test_near_miss_keeps_its_forward(case: Case):
    """The ops that the outputs need are those that were written."""
    module, inputs = case.make(torch.float64)
    captured = joint.capture(module, *inputs)
    graph, _ = captured.rewritten(form="weight")
    before, after = (forward_ops(g, roles_in(g, captured.roles)) for g in (captured.graph, graph))
    assert Counter(str(n.target) for n in after) == Counter(str(n.target) for n in before)


@pytest.mark.parametrize("id", ["adapters_of_a_split", "parts_in_place", "merged_parts"])
def test_parts_of_any_number_of_tokens(id: str) -> None:
    """One graph, with a dynamic size."""
    (case,) = (c for c in SPELLINGS if c.id == id)
    module, _ = case.make(torch.float64)
    integers(module, 1)
    f = torch.compile(module, backend=peft_fx.backend, dynamic=True, options=WEIGHT)
    for T in (17, 30):
        inputs = integers((torch.zeros(2, T, K, dtype=torch.float64, requires_grad=True),), T)
        assert_bit_equal(run(f, module, inputs), run(module, module, inputs))
    report = peft_fx.explain(f)
    assert_rewritten(report.sites, report.refusals, case, inputs)


def test_gradient_of_a_vector_needs_no_other_product():
    """dl reads xᵀ·dy: with y and dx three products over all tokens, and the report says so of each call."""
    for id, products in (("scale_after", 3), ("tied", 6)):
        torch._dynamo.reset()
        module, inputs = next(case for case in SPELLINGS if case.id == id).make(torch.float64)
        captured = joint.capture(module, *inputs)
        graph, outcome = captured.rewritten(form="weight")
        flow = Flow(graph, roles_in(graph, captured.roles))
        assert sum(n.target in PRODUCTS and not flow.is_weight(n) for n in graph.nodes) == products
        assert {s.adapter_grad for s in outcome.sites} == {"dense"}


class BehindNorm(torch.nn.Module):
    """RMSNorm in fp32 with a bf16 scale, then a bf16 layer with fp32 low-rank factors and a trained vector behind both,
    as DoRA is in a Llama."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = torch.nn.Parameter(torch.rand(K).bfloat16() + 0.5, requires_grad=False)
        self.W = torch.nn.Parameter(frozen(K, N).bfloat16(), requires_grad=False)
        self.A, self.B = trained(K, 4), trained(4, N)
        self.g = torch.nn.Parameter(torch.rand(N) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True))
        u = self.gamma * h.bfloat16()
        return ((u @ self.W) * self.g + ((u.float() @ self.A) @ self.B) * self.g).bfloat16()


def test_a_region_starts_where_the_layer_does():
    """Behind the norm's scale: every product over all tokens reads bf16, the gradient of the vector too."""
    x = torch.randn(4096, K, dtype=torch.bfloat16, requires_grad=True)
    captured = joint.capture(BehindNorm(), x)
    graph, outcome = captured.rewritten(form="weight")
    (site,) = outcome.sites
    assert (site.forward, site.input_grad, site.adapter_grad) == ("weight", "weight", "dense")
    flow = Flow(graph, roles_in(graph, captured.roles))
    products = [n for n in graph.nodes if n.target in PRODUCTS and not flow.is_weight(n)]
    over_tokens = [n for n in products if any(4096 in a.meta["val"].shape for a in n.all_input_nodes)]
    assert over_tokens
    assert {a.meta["val"].dtype for n in over_tokens for a in n.all_input_nodes} == {torch.bfloat16}


def test_scaled_features_are_cheap_to_merge():
    """A vector before or behind a weight costs W' no product, in forward and in the input gradient."""
    x = torch.randn(4096, K, dtype=torch.bfloat16, requires_grad=True)
    _, outcome = joint.capture(BehindNorm(), x).rewritten(form="auto")
    assert [(s.forward, s.input_grad) for s in outcome.sites] == [("weight", "weight")]


class Adapted(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.W, self.A, self.B = frozen(K, N), trained(K, 2), trained(2, N)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.W + 2 * (x @ self.A) @ self.B


class Scaled(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.W, self.l = frozen(K, N), torch.nn.Parameter(torch.ones(N))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.W) * self.l


class ScaledInGroups(torch.nn.Module):
    """Two features have one scale: its gradient is a sum of what was summed over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.W, self.l = frozen(K, N), torch.nn.Parameter(torch.ones(N // 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.l.unsqueeze(1).expand(-1, 2).reshape(-1)
        return (x @ self.W) * (scale * scale)


@pytest.mark.parametrize(
    ("module", "chosen", "reported"),
    [
        (Adapted, "auto", "low_rank"),
        (Adapted, "low_rank", "low_rank"),
        (Adapted, "dense", "dense"),
        (Scaled, "auto", "dense"),
        (Scaled, "low_rank", "low_rank"),
        (Scaled, "dense", "dense"),
        (ScaledInGroups, "auto", "dense"),
    ],
)
def test_adapter_grad_is_as_asked_for(module: type[torch.nn.Module], chosen: str, reported: str) -> None:
    """Where it is said to be dense there is an xᵀ·dy, and nowhere else; the gradients are the same numbers."""
    T = 640  # no side of a weight
    captured = joint.capture(module().double(), torch.randn(T, K, dtype=torch.float64, requires_grad=True))
    graph, outcome = captured.rewritten(form="weight", adapter_grad=chosen)
    products = [n for n in graph.nodes if n.target in PRODUCTS and n.meta["val"].shape in [(K, N), (N, K)]]
    moments = [n for n in products if any(T in a.meta["val"].shape for a in n.all_input_nodes)]
    assert [s.adapter_grad for s in outcome.sites] == [reported]
    assert len(moments) == (reported == "dense")
    assert joint.equal(captured.run(graph), captured.run(captured.graph))


class MagnitudeBehind(torch.nn.Module):
    """A layer with low-rank factors, and a vector behind their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.W, self.A, self.B = frozen(K, N), trained(K, 2), trained(2, N)
        self.g = torch.nn.Parameter(torch.ones(N))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.W + 2 * (x @ self.A) @ self.B) * self.g


def over_tokens(graph: Graph, T: int) -> list[Node]:
    """The products that read a value as long as the batch."""
    products = [n for n in graph.nodes if n.target in PRODUCTS]
    return [n for n in products if any(T in a.meta["val"].shape for a in n.all_input_nodes)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_one_product_over_tokens_serves_all_gradients_of_a_layer(dtype: torch.dtype) -> None:
    """The vector's gradient makes xᵀ·dy, and those of A and B read it: with y and dx three products over all tokens."""
    captured = joint.capture(MagnitudeBehind().to(dtype), torch.ones(640, K, dtype=dtype, requires_grad=True))
    graph, _ = captured.rewritten(form="weight")
    assert len(over_tokens(graph, 640)) == 3
    assert joint.equal(captured.run(graph), captured.run(captured.graph))


def test_gradients_of_few_tokens_are_low_rank() -> None:
    """Where tokens are fewer than K·N/(K + N), what reads all of them is cheaper than what reads xᵀ·dy."""
    for T, products in ((37, 7), (40, 3)):
        torch._dynamo.reset()
        captured = joint.capture(MagnitudeBehind().double(), torch.ones(T, K, dtype=torch.float64, requires_grad=True))
        graph, _ = captured.rewritten(form="weight")
        assert len(over_tokens(graph, T)) == products
        assert joint.equal(captured.run(graph), captured.run(captured.graph))


def test_a_rounded_moment_is_not_shared() -> None:
    """On a CPU xᵀ·dy of bf16 is bf16: the float32 gradients of A and B are no function of that."""
    captured = joint.capture(BehindNorm(), torch.randn(640, K, dtype=torch.bfloat16, requires_grad=True))
    graph, outcome = captured.rewritten(form="weight")
    assert {s.adapter_grad for s in outcome.sites} == {"dense"}
    assert len(over_tokens(graph, 640)) > 3


class Vector(torch.nn.Module):
    """IA3 on a layer."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.W = torch.nn.Parameter(frozen(64, 64).to(dtype), requires_grad=False)
        self.l = torch.nn.Parameter(torch.ones(64, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ((x @ self.W) * self.l).relu()


BF16, FP32 = torch.bfloat16, torch.float32
BOUGHT = [
    (FP32, "cpu", {}, False),
    (BF16, "cpu", {}, False),
    (BF16, "h100", {}, False),
    (FP32, "cpu", {"memory_weight": 1e3}, True),
    (FP32, "cpu", {"adapter_grad": "dense"}, True),
    (FP32, "cpu", {"form": "weight"}, True),
    (BF16, "avx2", {}, True),
    (FP32, "avx2", {}, False),
]


@pytest.mark.parametrize(("dtype", "machine", "options", "bought"), BOUGHT)
def test_memory_is_not_bought_with_time(dtype, machine, options, bought):
    """A vector's gradient from xᵀ·dy costs a product as large as the layer's two, and the forms save none of IA3's: so
    the layer's result is kept, as it is by Inductor, but where that is asked for, or where a product in float32 costs
    next to nothing beside the layer's own in bfloat16."""
    captured = joint.capture(Vector(dtype), torch.ones(4096, 64, dtype=dtype, requires_grad=True))
    with patch.object(by_chunks, "LEAST", 10**9):  # copies made whole: products are easier to count
        graph, _ = captured.rewritten(machine=machine, **options)
    products = over_tokens(graph, 4096)
    assert len(products) == (3 if bought else 2)
    assert joint.equal(captured.run(graph), captured.run(captured.graph))
    if machine == "avx2" and bought:
        (moment,) = (n for n in products if 4096 not in n.meta["val"].shape)
        assert {a.meta["val"].dtype for a in moment.all_input_nodes} == {FP32}


@pytest.mark.parametrize(("bandwidth", "products"), [(1e8, 3), (1e13, 6)])
def test_what_the_forms_save_buys_memory(tmp_path, bandwidth, products):
    """A vector behind a layer with a low-rank adapter: where passes over [T,N] are dear, the weight form saves more
    than xᵀ·dy costs, from which then come all gradients; where they are not, they read what is kept."""
    path = tmp_path / "machine.json"
    machines.store(replace(MACHINES["cpu"], bandwidth=bandwidth, stores=bandwidth), torch.device("cpu"), path)
    captured = joint.capture(MagnitudeBehind(), torch.ones(4096, K, requires_grad=True))
    graph, outcome = captured.rewritten(machine=path)
    assert {(s.forward, s.input_grad) for s in outcome.sites} == {("weight", "weight")}
    assert len(over_tokens(graph, 4096)) == products
    assert joint.equal(captured.run(graph), captured.run(captured.graph))
