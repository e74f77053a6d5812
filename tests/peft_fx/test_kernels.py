"""Kernels of our own: what they compute, where graphs use them, and that cards are able to run them."""

from __future__ import annotations

import functools
import importlib.util
import os
import pathlib
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, GraphModule, Node

from peft_fx import machines
from peft_fx.inductor_passes import AdapterPass
from peft_fx.kernels import library, trial
from peft_fx.kernels.merge import MOST, WIDER, merge
from peft_fx.kernels.narrow import WIDEST_OF_BOTH, narrow_both, narrow_in, narrow_out
from peft_fx.options import parse
from peft_fx.passes.decide import price
from peft_fx.passes.decide.machine import MACHINES, table_entry
from peft_fx.passes.graph.nodes import aten, value
from peft_fx.passes.keep import narrow
from peft_fx.passes.rewrite import merge_sums, merges_together
from peft_fx.records import Record
from peft_fx.retargeting import GPU
from tests.passes.analyse.test_maps import Vector
from tests.passes.keep.test_in_place_reads import Siblings
from tests.peft_fx.test_retargeting import with_products_of_a_cpu
from tests.support import joint
from tests.support.oracle import PAIR
from tests.support.spellings import K, N, frozen, trained

BF16 = torch.bfloat16
R = 4
FOLDER = pathlib.Path(__file__).parents[1] / "support"
with_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPUs have Triton, whether it is installed here or not."""
    monkeypatch.setattr(library, "has_triton", lambda: True)


def ops(graph: Graph) -> Counter[Any]:
    return Counter(n.target for n in graph.nodes if n.op == "call_function")


# ------------------------------------------------------------------------------------------------- without a driver


@with_triton
def test_in_the_interpreter() -> None:
    """Each kernel computes what its decomposition does."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER / "interpreted_kernels.py")]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


NAMES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
SHARED = {
    75: 65536,
    80: 166912,
    86: 101376,
    90: 232448,
    100: 232448,
}  # bytes that a program may take of a card's shared memory


def signature(arg: Any) -> Any:
    if isinstance(arg, tuple):
        return tuple(map(signature, arg))
    return NAMES[arg.dtype] if isinstance(arg, Tensor) else "fp32" if isinstance(arg, float) else "i32"


def compiled(kernel: Any, given: list[Any], constants: dict[str, Any], capability: int) -> Any:
    """A kernel as Triton compiles it for a card that is not there."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = dict(zip(kernel.arg_names, map(signature, given), strict=False)) | dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=kernel, signature=names, constexprs=constants)
    return compile(source, target=GPUTarget("cuda", capability, 32))


@with_triton
@pytest.mark.parametrize(("capability", "count"), [*((card, 1) for card in SHARED), (90, MOST)])
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_cards_can_run_the_merge(
    capability: int, count: int, dtype: torch.dtype, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft_fx.kernels import triton_merge

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    W, L, B = torch.empty(64, 64, dtype=dtype), torch.empty(64, 16), torch.empty(16, 64)
    several = [[t] * count for t in (W, W, L, B, 2.0, 1)]
    _, given, constants = triton_merge.arguments(*several)
    built = compiled(triton_merge.merge_kernel, given, constants, capability)
    assert built.asm["cubin"]
    assert built.metadata.shared <= SHARED[capability]


@with_triton
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_cards_can_run_the_narrow_products(
    capability: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft_fx.kernels import triton_narrow as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    T, wide = 1024, 256
    u, F, z, dA = torch.empty(T, wide, dtype=BF16), torch.empty(wide, 16), torch.empty(T, 16), torch.empty(16, wide)
    asked = [1], [2.0]
    _, given, constants = kernels.out_arguments([z], [u], [F], *asked)
    built = [compiled(kernels.out_kernel, given, constants, capability)]
    _, given, constants = kernels.in_arguments([dA], [u], [z], *asked, [False])
    built += [compiled(kernels.in_kernel, given, constants | {"SPLIT": split}, capability) for split in (True, False)]
    _, given, constants = kernels.both_arguments([u], [F], [1], [z], [1])
    built += [compiled(kernels.both_kernel, given, constants, capability)]
    _, given, constants = kernels.both_sums([z], [dA], [u], *asked, *asked, [False], given, constants)
    built += [compiled(kernels.sum_kernel, given, constants, capability)]
    assert all(one.asm["cubin"] and one.metadata.shared <= SHARED[capability] for one in built)


# ---------------------------------------------------------------------------------------------------------- the trial

KERNELS = {op: decomposition for op, (decomposition, _) in library.KERNELS.items()}
CPU = torch.device("cpu")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> dict[Any, Any]:
    """A CPU is a device that has kernels: those of this dictionary, each what the op's decomposition is."""
    found: dict[Any, Any] = {}
    monkeypatch.setattr(trial, "exists", lambda device: True)
    monkeypatch.setattr(trial, "_answers", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for op, decomposition in KERNELS.items():
        found[op] = decomposition
        monkeypatch.setitem(library.KERNELS, op, (decomposition, lambda *given, op=op: found[op](*given)))
    return found


def test_the_trial_of_sound_kernels(launches: dict[Any, Any], recwarn: pytest.WarningsRecorder) -> None:
    """In the middle of a compile: modes, grad state and the generator are the caller's own, before and after."""
    state = torch.get_rng_state()
    with FakeTensorMode(), torch.device("meta"), torch.inference_mode():
        assert trial.works(CPU)
        assert torch.is_inference_mode_enabled()
        assert isinstance(torch.ones(1), FakeTensor)
    assert torch.equal(state, torch.get_rng_state())
    assert not recwarn.list


def only_halves(*given: Any) -> list[Tensor]:
    """narrow_out of factors that lost their lower half."""
    us, factors, *rest = given
    return KERNELS[narrow_out](us, [F.to(BF16) for F in factors], *rest)


def coarse(weights: Any, left: Any, right: Any, *rest: Any) -> Tensor:
    """A merge whose products are in TF32."""
    kept = [(L.float().view(torch.int32) & ~0x1FFF).view(torch.float32) for L in (t.contiguous() for t in left)]
    return KERNELS[merge](weights, kept, right, *rest)


def unscaled(us: Any, zs: Any, counts: Any, scales: Any, turned: Any) -> list[Tensor]:
    return KERNELS[narrow_in](us, zs, counts, [1.0] * len(zs), turned)


def nothing(*given: Any) -> Tensor:
    return [W.fill_(float("nan")) for W in KERNELS[merge](*given)]


def one_element(*given: Any) -> list[Tensor]:
    found = KERNELS[narrow_in](*given)
    found[-1][-1, -1] += 1
    return found


def swapped(us: Any, *given: Any) -> list[Tensor]:
    found = KERNELS[narrow_both](us, *given)
    return [-t if i == 1 else t for i, t in enumerate(found)]


def fails(*given: Any) -> Any:
    raise RuntimeError("PTX JIT compilation failed")


BROKEN = [(merge, coarse), (merge, nothing), (narrow_out, only_halves), (narrow_in, unscaled), (narrow_in, one_element)]
BROKEN += [(narrow_both, swapped)]


@pytest.mark.parametrize(("op", "broken"), [*BROKEN, *((op, fails) for op in KERNELS)])
def test_the_trial_of_broken_kernels(op: Any, broken: Any, launches: dict[Any, Any]) -> None:
    """False from then on, with one warning that says why."""
    launches[op] = broken
    with pytest.warns(RuntimeWarning, match="JIT" if broken is fails else f"{op} gives wrong numbers") as told:
        answers = [trial.works(CPU), trial.works(CPU)]
    assert answers == [False, False]
    assert len(told) == 1


def test_no_trial_while_a_graph_is_captured(launches: dict[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert not trial.works(CPU)
    assert trial.works(CPU)


def test_without_the_kernels_where_the_trial_failed(triton: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """And none is tried where they are switched off, or where there is no device to run them."""
    assert parse(None).settings(GPU).kernels
    monkeypatch.setattr(trial, "exists", lambda device: True)
    monkeypatch.setattr(trial, "_answers", {GPU: False})
    monkeypatch.setattr(machines, "found", table_entry)
    assert not parse(None).settings(GPU).kernels
    graph = weight_form(Siblings(2), x())[1]
    assert not ops(graph).keys() & KERNELS.keys()
    monkeypatch.setattr(trial, "works", fails)
    assert not parse({"peft_fx.kernels": "off"}).settings(GPU).kernels


def test_the_option_is_part_of_the_key() -> None:
    keys = set()
    for chosen in ("auto", "off"):
        record = Record(GraphModule(nn.Module(), Graph()), [], {}, parse({"peft_fx.kernels": chosen}), False)
        keys.add(AdapterPass(record).uuid())
    assert len(keys) == 2


# --------------------------------------------------------------------------------------------------------- in graphs


def weight_form(module: nn.Module, *inputs: Tensor, **options: Any) -> tuple[joint.Joint, Graph]:
    traced = joint.trace(module, *inputs)
    graph, outcome = traced.rewritten(GPU, form="weight", **options)
    assert {s.forward for s in outcome.sites} == {"weight"}
    return traced, graph


def x() -> Tensor:
    return rows(80, K)


def rows(T: int, features: int) -> Tensor:
    return torch.randn(T, features, dtype=BF16, requires_grad=True)


def exact(traced: joint.Joint, graph: Graph) -> bool:
    return joint.equal(traced.run(with_products_of_a_cpu(graph), bound=1), traced.run(traced.graph, bound=1))


def test_a_merge_is_one_op(triton: None) -> None:
    """Of W and both factors as they are: no product of factors, no copy of W; exact on integers."""
    traced, graph = weight_form(Siblings(1), x())
    (node,) = graph.find_nodes(op="call_function", target=merge)
    assert all(n.op == "placeholder" or n.target is aten.permute.default for n in node.all_input_nodes)
    assert exact(traced, graph)


def launches_of(graph: Graph) -> list[list[tuple[int, ...]]]:
    """The shapes of the W' that each launch builds."""
    return [[tuple(W.shape) for W in value(n)] for n in graph.find_nodes(op="call_function", target=merge)]


class Layer(nn.Module):
    """Two layers that read x, and one that reads z."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [(K, N), (K, N), (N, K)]
        for i, (k, n) in enumerate(sizes):
            self.register_parameter(f"W{i}", nn.Parameter(frozen(k, n).to(BF16), requires_grad=False))
            self.register_parameter(f"A{i}", trained(k, R))
            self.register_parameter(f"B{i}", trained(R, n))

    def layer(self, i: int, x: Tensor) -> Tensor:
        W, A, B = (getattr(self, f"{name}{i}") for name in "WAB")
        return x @ W + ((x.to(A.dtype) @ A) @ B).to(x.dtype)

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        return self.layer(0, x), self.layer(1, x), self.layer(2, z)


@pytest.mark.parametrize(("most", "launches"), [(8, [2, 1]), (1, [1, 1, 1])])
def test_merges_are_launched_together(
    most: int, launches: list[int], triton: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two W' take as much as is allowed, twice what the largest takes; exact on integers, built again in backward by as
    many launches, and not kept."""
    monkeypatch.setattr(merges_together, "MOST", most)
    traced, graph = weight_form(Layer(), x(), rows(80, N))
    assert list(map(len, launches_of(graph))) == launches
    assert exact(traced, graph)
    forward, backward = traced.split(graph)
    assert launches_of(forward.graph) == launches_of(graph)
    assert sorted(launches_of(backward.graph)) == sorted(launches_of(graph))
    kept = forward.graph.output_node().args[0][traced.outputs :]
    assert not {(K, N), (N, K)} & {tuple(value(n).shape) for n in kept if n.op == "call_function"}


def test_what_only_forward_reads_is_built_apart(triton: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first two layers' input has no gradient: W' of the third alone is built again, whatever there is room for."""
    monkeypatch.setattr(merges_together, "AT_ONCE", 8)
    traced, graph = weight_form(Layer(), x().detach(), rows(80, N))
    assert launches_of(graph) == [[(K, N)] * 2, [(N, K)]]
    assert launches_of(traced.split(graph)[1].graph) == [[(N, K)]]


def test_only_on_a_gpu_with_triton() -> None:
    assert not ops(weight_form(Siblings(1), x())[1])[merge]


def test_only_on_a_gpu(triton: None) -> None:
    assert not ops(joint.trace(Siblings(1), x()).rewritten(form="weight")[0])[merge]


class Chain(nn.Module):
    """Two adapters of one layer, one of three factors and a scale that is a tensor."""

    def __init__(self, dtype: torch.dtype = BF16):
        super().__init__()
        self.W = nn.Parameter(frozen(K, N).to(dtype), requires_grad=False)
        self.A, self.M, self.B = trained(K, R), trained(R, R), trained(R, N)
        self.C, self.D, self.s = trained(K, R), trained(R, N), nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(self.A.dtype)
        delta = ((wide @ self.A) @ self.M) @ self.B * self.s + 3.0 * ((wide @ self.C) @ self.D)
        return (x @ self.W + delta).to(x.dtype)


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_several_adapters_and_factors(dtype: torch.dtype, triton: None) -> None:
    """In one launch; what is a product of several is made in the dtype of the sum."""
    traced, graph = weight_form(Chain(dtype), x().detach().to(dtype).requires_grad_())
    (node,) = graph.find_nodes(op="call_function", target=merge)
    assert node.args[4] == [2]
    assert sorted(node.args[3]) == [1.0, 3.0]
    made = [n for n in (*node.args[1], *node.args[2]) if n.op != "placeholder"]  # type: ignore[misc]
    assert {value(n).dtype for n in made if n.target is not aten.permute.default} == {WIDER[dtype]}
    assert exact(traced, graph)


LEFT = {"fp64": (torch.float64, {}), "dithered": (BF16, {"rounding": "dithered"})}


@pytest.mark.parametrize(("dtype", "options"), LEFT.values(), ids=LEFT)
def test_what_is_left_to_inductor(dtype: torch.dtype, options: dict[str, str], triton: None) -> None:
    """W in fp64, and dithered rounding."""
    traced, graph = weight_form(Chain(dtype), x().detach().to(dtype).requires_grad_(), **options)
    assert not ops(graph)[merge]
    assert exact(traced, graph)


NARROW = (narrow_out, narrow_in, narrow_both)


def features(node: Node) -> list[int]:
    """Of what a kernel of narrow products reads."""
    return [value(u).shape[-1] for u in node.args[0]]  # type: ignore[union-attr]


@pytest.mark.parametrize(("layers", "vector", "once"), [(1, False, [K]), (3, False, [N] * 3), (1, True, [K])])
def test_narrow_products_are_one_op_for_siblings(layers: int, vector: bool, once: list[int], triton: None) -> None:
    """x·A and dA of layers that read one x, and dy·Bᵀ and dB of all of them: of x and of dy, what is wider is read
    once, and the other one twice; no halves."""
    assert N < K < 3 * N
    traced, graph = weight_form(Siblings(layers, vector), x())
    found = ops(graph)
    assert [*(found[op] for op in NARROW), found[aten.mm.dtype]] == [1, 1, 1, 0]
    (both,) = graph.find_nodes(op="call_function", target=narrow_both)
    assert features(both) == once
    assert exact(traced, graph)


def test_narrow_products_of_adapters_in_bfloat16(triton: None) -> None:
    """The same, rounded once: no copy is spared, but reads are."""
    traced, graph = weight_form(Siblings(3).to(BF16), x())
    assert [ops(graph)[op] for op in NARROW] == [1, 1, 1]
    assert {value(n).dtype for op in NARROW for n in results_of(graph, op)} == {BF16}
    assert ops(graph)[aten.mm.default] == 6  # y, and the gradients of x
    assert exact(traced, graph)


def results_of(graph: Graph, op: Any) -> list[Node]:
    return [item for node in graph.find_nodes(op="call_function", target=op) for item in node.users]


def test_of_high_rank_each_product_reads_by_itself(triton: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the parts of a sum over features take would be as much as another read."""
    monkeypatch.setattr(narrow, "WIDEST_OF_BOTH", R - 1)
    traced, graph = weight_form(Siblings(3), x())
    found = ops(graph)
    assert [found[op] for op in NARROW] == [2, 2, 0]
    assert exact(traced, graph)


class Heads(Siblings):
    """Results in heads: their gradients come laid out otherwise."""

    def _layer(self, x: Tensor, W: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return x @ W + ((x.to(A.dtype) @ A) @ B).to(x.dtype)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(y.view(len(x), 4, -1).transpose(0, 1) for y in super().forward(x))


def test_no_product_and_kernel_share_a_view(triton: None) -> None:
    """Else Inductor lays the value out anew for the product."""
    traced, graph = weight_form(Heads(2), x())
    backward = traced.split(graph)[1].graph
    (both,) = backward.find_nodes(op="call_function", target=narrow_both)
    users = [u.target for read in both.args[0] for u in read.users]  # type: ignore[union-attr]
    assert set(users) == {narrow_both}
    assert exact(traced, graph)


@pytest.mark.parametrize("vector", [False, True])
def test_with_kernels_nothing_errs_more(vector: bool, triton: None) -> None:
    """y and dx to the last bit, gradients to 16 bits, of what Inductor's own kernels compute on a GPU."""
    traced, graph = weight_form(Siblings(2, vector), x())
    plain = functools.partial(traced.call, inputs=traced.inputs(normal=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "has_triton", lambda: False)
        without, _ = traced.rewritten(GPU, form="weight")
    results = plain(with_products_of_a_cpu(graph)), plain(with_products_of_a_cpu(without))
    for got, want in zip(*results, strict=True):
        if got is None or want is None or want.dtype == BF16:
            assert (got is None) == (want is None)
            assert want is None or torch.equal(got, want)
        else:
            assert (got - want).norm() <= PAIR * want.norm()


def test_what_backward_keeps_is_the_same(triton: None) -> None:
    """x and no x·A."""
    traced, graph = weight_form(Siblings(3), x())
    (kept,) = traced.split(graph)[0].graph.find_nodes(op="output")
    sizes = [tuple(value(n).shape) for n in kept.args[0][traced.outputs :] if isinstance(n, Node)]
    assert (80, K) in sizes
    assert not [size for size in sizes if size[0] == 80 and size != (80, K)]


class Behind(Siblings):
    """Siblings behind an activation function: their input can be made again."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return super().forward(nn.functional.silu(x))


def test_for_few_tokens_a_gpus_graph_stays_as_it_is(triton: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the price leaves all adapters as they are written, backward rebuilds nothing: each kernel takes time to
    start. It does where that is asked for, or memory has a worth."""
    monkeypatch.setitem(MACHINES, "h100", replace(MACHINES["h100"], launch=0.0))  # which layers so small consist of
    traced = joint.trace(Behind(2), x()[:20])
    graph, outcome = traced.rewritten(GPU, machine="h100")
    assert {s.forward for s in outcome.sites} == {"activation"}
    assert (outcome.rebuilt, ops(graph)) == (0, ops(traced.graph))
    assert not [n for n in graph.nodes if "recompute" in n.meta]
    for options in ({"form": "activation"}, {"memory_weight": 1.0}):
        assert traced.rewritten(GPU, machine="h100", **options)[1].rebuilt


def test_vectors_alone_leave_a_gpus_graph_as_it_is(triton: None) -> None:
    """IA3 has no form that saves time, so none is spent on its gradients, however many layers share what would not be
    noticed; it is where it is asked for."""
    traced = joint.trace(nn.Sequential(*(Vector(BF16) for _ in range(40))), rows(4096, 64))
    graph, outcome = traced.rewritten(GPU, machine="h100")
    assert {s.forward for s in outcome.sites} == {"activation"}
    assert (outcome.rebuilt, ops(graph)) == (0, ops(traced.graph))
    for options in ({"adapter_grad": "dense"}, {"memory_weight": 1.0}):
        assert traced.rewritten(GPU, machine="h100", **options)[1].rebuilt


def test_a_failure_leaves_the_graph_as_it_was(triton: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pass raises, and the backend then takes the untouched graph (test_faults.py)."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("injected")

    traced = joint.trace(Siblings(1), x())
    before = ops(traced.graph)
    monkeypatch.setattr(merge_sums, "merge", fail)
    with pytest.raises(RuntimeError, match="injected"):
        traced.rewritten(GPU, form="weight")
    assert ops(traced.graph) == before


# --------------------------------------------------------------------------------------------------------- the price


def test_the_price_of_a_merge_in_one_kernel() -> None:
    """W is read and W' written, and no more: the products take no longer, but of high ranks."""
    machine, n = MACHINES["h100"], 4096
    shape = functools.partial(price.Shape, 2048, n, n, base_dtype=BF16, adapter_dtype=torch.float32)
    low, high = (shape(terms=(((n, r), (r, n)),), fused=True) for r in (16, 256))
    assert price.merge(machine, low).seconds == machine.one_pass(4 * n * n)
    assert price.merge(machine, low).seconds < price.merge(machine, high).seconds
    assert price.decide(machine, low, low, True).forward == "weight"
    alone = replace(low, fused=False)
    assert price.decide(machine, alone, alone, True).forward == "activation"
    whole = replace(low, base_dtype=torch.float32)
    assert price.merge(machine, whole).seconds == machine.one_pass(8 * n * n)
    flops = 2 * 16 * n * n  # a consumer's card has few units of fp64
    assert price.merge(MACHINES["rtx4090"], whole).seconds >= flops / MACHINES["rtx4090"].speed(torch.float64).peak


def test_the_price_of_narrow_products_in_kernels() -> None:
    """The wider one of x and dy is read once, the other one twice; of a high rank both are read twice."""
    machine, T, n = replace(MACHINES["h100"], launch=0.0), 2048, 1 << 20  # so wide that nothing else counts

    def passes(r: int, **given: Any) -> float:
        shape = price.Shape(T, n, n, ((((n, r), (r, n))),), BF16, torch.float32, fused=True)
        return price.reads(machine, shape, True, **given).seconds / machine.one_pass(T * n * 2)

    assert [round(passes(4, wider=wider), 1) for wider in (True, False)] == [1.0, 2.0]
    assert passes(WIDEST_OF_BOTH + 1, wider=True) == passes(WIDEST_OF_BOTH + 1)


def moved(**options: Any) -> int:
    """Bytes of a site in weight form, by the price."""
    (site,) = joint.trace(Siblings(1), x()).rewritten(GPU, form="weight", **options)[1].sites
    return site.bytes["after"]


def test_the_price_knows_where_there_is_a_kernel(triton: None) -> None:
    """Twice W and twice W' in a step, each of two bytes; not where W' is left to Inductor."""
    without = moved(kernels="off")
    saved = 2 * ((K * R + R * N) * 4 + K * N * 8)  # the product's operands and result, and the pass that reads that
    assert without - moved() == saved
    assert moved(rounding="dithered") == without
