"""Graphs traced on a CPU and told of as a GPU's: the same sites, a GPU's ops, exact on integers, and no driver."""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

import peft_fx
from peft_fx import compat, inductor_passes
from peft_fx.compat import pytree
from peft_fx.options import parse
from peft_fx.passes import pipeline
from peft_fx.passes.findings import Outcome
from peft_fx.passes.graph.editor import REBUILD
from peft_fx.passes.graph.nodes import aten, prims, value
from peft_fx.passes.keep.policies import Float8
from peft_fx.records import Record
from peft_fx.retargeting import GPU, Retarget, device_of
from peft_fx.tracing import CPU
from tests.passes.keep.test_in_place_reads import Siblings
from tests.support import affine_spellings, joint, spellings
from tests.support.oracle import integers
from tests.support.spellings import Case, K, N, frozen, trained, x

H100 = {"peft_fx.machine": "h100", "peft_fx.form": "weight"}
BF16, FP32 = torch.bfloat16, torch.float32


def ops(graph: Graph) -> Counter[Any]:
    return Counter(n.target for n in graph.nodes if n.op == "call_function")


# ------------------------------------------------------------------------------------------------------- the same sites


def told(outcome: Outcome) -> list[tuple[Any, ...]]:
    """What was found, without prices."""
    sites = [(s.name, s.tokens, s.in_features, s.out_features, s.rank, s.forward, s.input_grad) for s in outcome.sites]
    return sites + [(r.name, r.code, r.detail) for r in outcome.refusals]


SPELT = (
    *spellings.SPELLINGS,
    *spellings.NEAR_MISSES,
    *affine_spellings.SPELLINGS,
    *affine_spellings.NEAR_MISSES,
)


@pytest.mark.parametrize("case", SPELT, ids=lambda case: case.id)
def test_a_gpus_graph_has_the_sites_and_refusals_of_a_cpus(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """And all that is computed there is on the GPU."""
    module, inputs = case.make()
    traced = capture(module, *inputs)
    wanted = traced.rewritten(form="weight")[1]
    places: set[torch.device] = set()
    real = pipeline.run

    def run(graph: Graph, *args: Any) -> Outcome:
        outcome = real(graph, *args)
        values = pytree.tree_leaves([value(n) for n in graph.nodes])
        places.update(v.device for v in values if isinstance(v, Tensor))
        return outcome

    monkeypatch.setattr(pipeline, "run", run)
    assert told(traced.rewritten(GPU, form="weight")[1]) == told(wanted)
    assert places == {GPU}


def capture(module: nn.Module, *inputs: Any) -> joint.Joint:
    """By AOTAutograd alone where that can be: without Dynamo it takes a tenth of the time."""
    try:
        return joint.trace(module, *inputs)
    except AssertionError:  # a tensor of its own that is no parameter
        return joint.capture(module, *inputs)


class PlusOne(nn.Module):
    """An adapter with a number added to it: a sum that loses its only product becomes that number."""

    def __init__(self) -> None:
        super().__init__()
        self.W, self.A, self.B = frozen(K, N), trained(K, 4), trained(4, N)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.W + ((x @ self.A) @ self.B + 1.0)


def test_a_number_left_of_a_sum_is_on_the_graphs_device() -> None:
    traced = joint.trace(PlusOne(), *x(2, 17, K)())
    graph, outcome = traced.rewritten(GPU, form="weight")
    assert [s.forward for s in outcome.sites] == ["weight"]
    integers(traced.module, 1)
    assert joint.equal(traced.run(graph), traced.run(traced.graph))


# ------------------------------------------------------------------------------------------------ products of a GPU


def with_products_of_a_cpu(graph: Graph) -> Graph:
    """A GPU's products of half-precision matrices into fp32, by ops that a CPU has."""
    graph = GraphModule(graph.owning_module or nn.Module(), graph).graph
    for node in graph.find_nodes(op="call_function", target=aten.mm.dtype):
        node.target = lambda a, b, dtype: a.to(dtype) @ b.to(dtype)
    return graph


@pytest.mark.parametrize("vector", [False, True])
def test_gradients_come_from_products_into_fp32(vector: bool) -> None:
    """Of bf16 activations and fp32 adapters: no copy in fp32, no product of what rounding lost, exact on integers."""
    torch.manual_seed(0)
    module = Siblings(1 if vector else 2, vector=vector)
    traced = joint.trace(module, torch.randn(80, K, dtype=BF16, requires_grad=True))
    graph, outcome = traced.rewritten(GPU, form="weight")
    assert {s.input_grad for s in outcome.sites} == {"weight"}
    assert ops(graph)[aten.mm.dtype]
    assert not ops(graph)[aten.addmm.default]
    assert not ops(traced.rewritten(form="weight")[0])[aten.mm.dtype]
    assert joint.equal(traced.run(with_products_of_a_cpu(graph), bound=1), traced.run(traced.graph, bound=1))


class Scaled(nn.Module):
    """A bf16 layer, and a trained fp32 vector behind it: its gradient reads the layer's result."""

    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Parameter(frozen(K, N).to(BF16), requires_grad=False)
        self.l = nn.Parameter(torch.rand(N) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return ((x @ self.W) * self.l).to(BF16)


def test_a_vectors_gradient_comes_from_a_moment_in_fp32() -> None:
    """G = xᵀ·dy of bf16 x and dy, into fp32."""
    torch.manual_seed(0)
    traced = joint.trace(Scaled(), torch.randn(640, K, dtype=BF16, requires_grad=True))
    graph, _ = traced.rewritten(GPU, form="weight", adapter_grad="dense")
    (moment,) = graph.find_nodes(op="call_function", target=aten.mm.dtype)
    assert (value(moment).dtype, tuple(value(moment).shape)) == (FP32, (K, N))
    assert joint.equal(traced.run(with_products_of_a_cpu(graph), bound=1), traced.run(traced.graph, bound=1))


@pytest.mark.parametrize(("machine", "code"), [("a100", "device"), ("h100", None), ("rtx4090", None), ("t4", "device")])
def test_fp8_where_the_machine_has_it(machine: str, code: str | None) -> None:
    on_gpu = torch.empty(4, 8, device="meta")
    refused = Float8(machine).refusal(type("OnGpu", (), {"device": GPU, "shape": on_gpu.shape}))
    assert (refused and refused[0]) == code


def test_a_seed_is_kept_and_not_drawn_again() -> None:
    """Whatever tags Inductor copies to the draw of seeds."""
    graph = Graph()
    seeds = graph.call_function(prims.inductor_seeds.default, (2, CPU))
    seeds.meta["recompute"] = REBUILD
    mask = graph.call_function(prims.inductor_lookup_seed.default, (seeds, 0))
    mask.meta["recompute"] = REBUILD
    graph.output((mask,))
    record = Record(GraphModule({}, Graph()), [], {}, parse({}), True)
    inductor_passes.Finish(inductor_passes.AdapterPass(record))(graph)
    assert "recompute" not in seeds.meta
    assert mask.meta["recompute"] == REBUILD


# ------------------------------------------------------------------------------------------------------------ attention


class Attention(nn.Module):
    """Heads of 16 features, with adapters on q; both read one head of keys where these are shared."""

    def __init__(self, dtype: torch.dtype, masked: bool, shared: bool):
        super().__init__()
        self.W = nn.Parameter(frozen(32, 32).to(dtype), requires_grad=False)
        self.A, self.B = nn.Parameter(trained(32, 4).to(dtype)), nn.Parameter(trained(4, 32).to(dtype))
        self.masked, self.shared = masked, shared

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q = x @ self.W + (x @ self.A) @ self.B
        q, k = (t.view(2, 24, 2, 16).transpose(1, 2) for t in (q, x))
        mask = mask if self.masked else None
        k = k[:, :1] if self.shared else k
        options = {"attn_mask": mask, "is_causal": not self.masked, "enable_gqa": self.shared}
        y = nn.functional.scaled_dot_product_attention(q, k, k, **options)
        return y.transpose(1, 2).reshape(2, 24, 32)


FLASH = {aten._scaled_dot_product_flash_attention.default, aten._scaled_dot_product_flash_attention_backward.default}
EFFICIENT = {
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_efficient_attention_backward.default,
}
OF_A_CPU = {
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
}
KERNELS = [
    (BF16, False, False, FLASH),
    (torch.float16, False, False, FLASH),
    (FP32, False, False, EFFICIENT),
    (BF16, True, False, EFFICIENT),
    (torch.float64, False, False, OF_A_CPU),
    (BF16, False, True, FLASH),
    (FP32, False, True, OF_A_CPU),
]


@cache
def attention(dtype: torch.dtype, masked: bool, shared: bool = False) -> joint.Joint:
    inputs = torch.randn(2, 24, 32, dtype=dtype, requires_grad=True), torch.zeros(24, 24, dtype=dtype)
    return joint.trace(Attention(dtype, masked, shared), *inputs)


@pytest.mark.parametrize(("dtype", "masked", "shared", "kernels"), KERNELS)
def test_attention_is_the_devices(dtype: torch.dtype, masked: bool, shared: bool, kernels: set[Any]) -> None:
    """Forward and backward; each node says of its value what its op makes of what it reads."""
    traced = attention(dtype, masked, shared)
    graph = GraphModule(traced.module, joint.copy_graph(traced.graph)).graph
    retarget = Retarget(CPU, GPU)
    retarget.exchange(graph, traced.fake_mode)
    assert {t for t in ops(graph) if "scaled_dot_product" in str(t)} == kernels
    graph.lint()
    with retarget.there(graph), traced.fake_mode:
        for node in graph.find_nodes(op="call_function", target=aten.mm.default):
            a, b = (value(n) for n in node.args)
            assert node.target(a, b).device == value(node).device == GPU
        for node in (n for n in graph.nodes if n.op == "call_function"):
            args, kwargs = pytree.tree_map(
                lambda a: value(a) if isinstance(a, torch.fx.Node) else a, (node.args, dict(node.kwargs))
            )
            made, said = (pytree.tree_leaves(v) for v in (node.target(*args, **kwargs), value(node)))
            assert [described(v) for v in made] == [described(v) for v in said]
    values = pytree.tree_leaves([value(n) for n in graph.nodes])
    assert {v.device for v in values if isinstance(v, Tensor)} == {CPU}


def described(v: Any) -> Any:
    return (v.shape, v.stride(), v.dtype, v.device) if isinstance(v, Tensor) else v


def test_a_cpus_graph_keeps_its_attention() -> None:
    graph = joint.copy_graph(attention(BF16, False).graph)
    Retarget(CPU, CPU).exchange(graph, attention(BF16, False).fake_mode)
    assert ops(graph) == ops(attention(BF16, False).graph)


# ------------------------------------------------------------------------------------------------- explain and estimate


def test_the_device_is_the_machines_or_the_one_asked_for() -> None:
    auto, h100, cpu = (parse({"peft_fx.machine": m}) for m in ("auto", "h100", "cpu"))
    assert [device_of(o, None, CPU) for o in (auto, h100, cpu)] == [CPU, GPU, CPU]
    assert [device_of(o, "cuda", CPU) for o in (auto, h100, cpu)] == [GPU] * 3
    assert [device_of(o, torch.device("cpu"), CPU) for o in (auto, h100, cpu)] == [CPU] * 3
    assert [device_of(o, None, GPU) for o in (auto, h100, cpu)] == [GPU] * 3
    with pytest.raises(ValueError, match="'cpu', 'cuda'"):
        device_of(auto, "tpu", CPU)
    with pytest.raises(ValueError, match="move it there first"):
        device_of(auto, "cpu", GPU)


def test_a_machines_constants_decide_whether_it_is_a_gpu(tmp_path: Any) -> None:
    """Those of a calibration's file too."""
    from peft_fx import machines
    from peft_fx.passes.decide.machine import MACHINES

    for name, device in (("a100", GPU), ("cpu", CPU)):
        path = tmp_path / f"{name}.json"
        machines.store(MACHINES[name], CPU, path)
        assert device_of(parse({"peft_fx.machine": str(path)}), None, CPU) == device


def listing(report: peft_fx.Report) -> str:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        for site in report.sites:
            report.diff(site.name)
    return shown.getvalue()


def explained(device: str | None = None, meta: bool = False, **options: str) -> str:
    """The nodes of two bf16 layers with fp32 adapters, as explain shows them."""
    where = "meta" if meta else "cpu"
    module, given = Siblings(2).to(where), torch.randn(80, K, dtype=BF16, device=where, requires_grad=True)
    asked = {f"peft_fx.{k}": v for k, v in options.items()} | {"peft_fx.form": "weight"}
    report = peft_fx.explain(module, given, device=device, options=asked)
    assert report.failures == report.graph_breaks == []
    assert len(report.sites) == 2
    assert {p.device.type for p in module.parameters()} == {where}
    return listing(report)


def test_explain_shows_the_graph_of_the_machine() -> None:
    """Of a model without weights and of one on the CPU alike; on a CPU what a product is rounded by has one of its
    own."""
    on_a_gpu = explained(machine="h100")
    assert "addmm" not in on_a_gpu
    assert "= mm(" in on_a_gpu
    assert explained(machine="h100", meta=True) == on_a_gpu
    assert explained("cuda") == on_a_gpu
    on_a_cpu = explained()
    assert "addmm" in on_a_cpu
    assert explained("cpu", machine="h100", meta=True) == on_a_cpu


def test_estimate_reckons_with_the_graph_of_the_machine() -> None:
    """Of one step: less is read on a GPU, whose products give fp32; bytes kept are those that explain tells of it."""
    module, given = Siblings(2), torch.randn(80, K, dtype=BF16, requires_grad=True)
    steps: list[str] = []
    asked = {"machine": "h100", "variants": ["inductor", "peft_fx"], "options": {"peft_fx.form": "weight"}}
    found = {
        device: peft_fx.estimate(Sum(module), given, device=device, progress=steps.append, **asked).rows
        for device in (None, "cuda", "cpu")
    }
    assert found[None] == found["cuda"]
    assert found["cpu"][1].seconds > found["cuda"][1].seconds
    report = peft_fx.explain(Sum(module), given, options=H100)
    assert [r.kept_bytes for r in found[None]] == list(report.kept_bytes.values())
    assert len(steps) == 3
    assert all("inductor, peft_fx" in step for step in steps)


class Sum(nn.Module):
    """A loss."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return sum(y.float().sum() for y in self.inner(x))


def test_nothing_is_timed_on_a_device() -> None:
    """Inductor times products with padded sides, if it may."""
    seen = []

    class Look(compat.CustomGraphPass):  # type: ignore[misc]
        def __call__(self, graph: Graph) -> None:
            seen.append(compat.inductor_config.shape_padding)

        def uuid(self) -> None:
            return None

    options = {"joint_custom_pre_pass": Look(), "shape_padding": True}
    peft_fx.explain(PlusOne(), *x(2, 17, K)(), options=options)
    assert seen == [False]


def test_what_forward_hands_backward_is_on_the_gpu_in_both() -> None:
    """A tied weight's gradient is a sum with a product of what was kept: Inductor makes one call of the two."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(16, K)

        def forward(self, ids: Tensor) -> Tensor:
            return (self.embedding(ids).sin() @ self.embedding.weight.t()).square().sum()

    ids = torch.zeros(1, 8, dtype=torch.long)
    (row,) = peft_fx.estimate(Tied(), ids, machine="h100", variants=["full"]).rows
    assert row.kept_bytes > 0
