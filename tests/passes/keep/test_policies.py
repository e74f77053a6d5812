"""LoRA-FA and the lossy keeps: what is kept, byte by byte, and what each does to which gradient."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, GraphModule
from torch.utils.checkpoint import checkpoint

import peft_fx
from peft_fx.inputs import roles_in
from peft_fx.passes.graph.nodes import aten
from peft_fx.passes.keep import approximation, policies
from peft_fx.passes.keep.policies import POLICIES
from tests.passes.keep import test_chains
from tests.support import joint, oracle
from tests.support.peft_models import adapt, mlp
from tests.support.spellings import frozen, trained

T, H, N, R = 96, 64, 80, 4
LOSSY = tuple(POLICIES)
FP64 = torch.float64


class Block(nn.Module):
    """An adapted layer whose input no pointwise chain rebuilds, and whose own backward keeps nothing of it; `act` may
    stand between."""

    def __init__(self, act: Callable[[Tensor], Tensor] = lambda x: x, rank: int = R):
        super().__init__()
        self.W, self.act = frozen(H, N), act
        self.A, self.B = trained(H, rank), trained(rank, N)

    def forward(self, z: Tensor) -> Tensor:
        x = self.x(z)
        return x @ self.W + 2 * (x @ self.A) @ self.B

    def x(self, z: Tensor) -> Tensor:
        return self.act(z.cumsum(0) / 8 + 0.5)  # a mean other than 0, so that VeLoRA's vector is not noise


@cache
def captured(dtype: torch.dtype = FP64) -> joint.Joint:
    torch.manual_seed(0)
    return joint.capture(Block().to(dtype), torch.randn(T, H, dtype=dtype, requires_grad=True))


def run(case: joint.Joint, graph: Graph) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What a graph is given, normal numbers, and what it gives: y, and gradients; both by the name of the input."""
    generator = torch.Generator().manual_seed(0)
    roles = roles_in(graph, case.roles)
    given = {}
    for node in graph.find_nodes(op="placeholder"):
        name = roles[node].name if node in roles else "dy"
        name = name if name in ("W", "A", "B", "dy") else "z"
        val = node.meta["val"]
        given[name] = torch.randn(val.shape, generator=generator, dtype=FP64).to(val.dtype)
    y, *gradients = GraphModule(case.module, graph)(*given.values())
    found = {k: g for k, g in zip(given, gradients, strict=False) if g is not None}
    return given, {"y": y, **found}


def exact(case: joint.Joint) -> dict[str, Tensor]:
    return run(case, case.rewritten(form="weight")[0])[1]


# --------------------------------------------------------------------------------------------- the formulas, in PyTorch


def velora(x: Tensor, m: int = 32) -> Tensor:
    """Algorithm 1 of Miles et al. 2024, the vector from the batch: the direction of the mean sub-token."""
    sub_tokens = x.reshape(-1, m)
    v = F.normalize(sub_tokens.mean(0), dim=0)
    projected = sub_tokens @ v
    return torch.outer(projected, v).reshape(x.shape)


def steps(x: Tensor, bits: int, m: int) -> tuple[Tensor, Tensor]:
    """The least number of each group, and its step, [.., 1]."""
    groups = x.reshape(-1, m)
    low, high = groups.aminmax(dim=-1, keepdim=True)
    return low, (high - low) / (2**bits - 1)


def affine(x: Tensor, bits: int, m: int = H) -> Tensor:
    low, step = steps(x, bits, m)
    return (torch.round((x.reshape(-1, m) - low) / step) * step + low).reshape(x.shape)


def e4m3(x: Tensor) -> Tensor:
    unit = x.abs().amax(-1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
    return (x / unit).to(torch.float8_e4m3fn).to(x.dtype) * unit


FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "velora": velora,
    "int8": lambda x: affine(x, 8),
    "int4": lambda x: affine(x, 4),
    "fp8": e4m3,
}


def gradient_of_A(given: dict[str, Tensor], likeness: Callable[[Tensor], Tensor]) -> Tensor:
    """dA = s·x̃ᵀ(dy·Bᵀ), in fp64 but for x."""
    x = given["z"].cumsum(0) / 8 + 0.5
    return 2 * likeness(x.double()).T @ (given["dy"].double() @ given["B"].double().T)


# ------------------------------------------------------------------------------------------------------- what it does


@pytest.mark.parametrize("keep", LOSSY)
def test_only_the_gradient_of_A_changes(keep: str) -> None:
    """Forward, input gradient and dB, which reads x·A, to the bit; dA is the formula's."""
    case = captured()
    given, got = run(case, case.rewritten(form="weight", keep=keep)[0])
    want = exact(case)
    assert got.keys() == want.keys() == {"y", "z", "A", "B"}
    assert {k for k in got if not torch.equal(got[k], want[k])} == {"A"}
    torch.testing.assert_close(got["A"], gradient_of_A(given, FORMULAS[keep]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("m", [16, 32, 64])
def test_velora_is_the_papers(m: int) -> None:
    """At each size of its groups; the gradient keeps part of its direction."""
    case = captured()
    given, got = run(case, case.rewritten(form="weight", keep="velora", velora_group=m)[0])
    torch.testing.assert_close(got["A"], gradient_of_A(given, lambda x: velora(x, m)), rtol=1e-9, atol=1e-9)
    assert 0.1 < cosine(got["A"], exact(case)["A"]) < 0.999


@pytest.mark.parametrize(("keep", "least"), [("int8", 0.9999), ("int4", 0.99), ("fp8", 0.999)])
def test_gradients_point_the_same_way(keep: str, least: float) -> None:
    case = captured()
    _, got = run(case, case.rewritten(form="weight", keep=keep)[0])
    assert least < cosine(got["A"], exact(case)["A"]) < 1 - 1e-9


def cosine(a: Tensor, b: Tensor) -> float:
    return F.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keep", LOSSY)
def test_other_dtypes(keep: str, dtype: torch.dtype) -> None:
    """The formula's dA but for the roundings of the dtype: of the likeness, of dy·Bᵀ, of dA, and VeLoRA's numbers."""
    case = captured(dtype)
    given, got = run(case, case.rewritten(form="weight", keep=keep)[0])
    want = gradient_of_A(given, FORMULAS[keep])
    assert got["A"].dtype == dtype
    assert (got["A"].double() - want).norm() < 4 * torch.finfo(dtype).eps * want.norm()


# ----------------------------------------------------------------------------------------------------- what it keeps


def kept(model: nn.Module, *args: Tensor, **options: Any) -> peft_fx.Report:
    given = {f"peft_fx.{k}": v for k, v in {"form": "weight", **options}.items()}
    report = peft_fx.explain(model, *args, options=given)
    assert report.failures == []
    return report


SIZES = {"velora": T * H // 32 * 4 + 32 * 4, "int8": T * (H + 8), "int4": T * (H // 2 + 8), "fp8": T * (H + 4)}


def test_every_policy_has_its_formula_and_its_bytes() -> None:
    assert set(FORMULAS) == set(SIZES) == set(POLICIES)


@pytest.mark.parametrize("keep", LOSSY)
def test_kept_bytes_are_those_of_the_formula(keep: str) -> None:
    """And x·A, for dB: not a byte more or less."""
    report = kept(Block(), torch.randn(T, H, requires_grad=True), keep=keep)
    assert report.kept_bytes["after"] == SIZES[keep] + 4 * T * R
    (found,) = report.inputs
    assert (found.keep, found.code, found.sizes["now"], found.sizes["exact"]) == (keep, "", SIZES[keep], 4 * T * H)
    assert {k: found.sizes[k] for k in SIZES} == SIZES


@pytest.mark.parametrize("m", [16, 64])
def test_velora_group_is_an_option(m: int) -> None:
    report = kept(Block(), torch.randn(T, H, requires_grad=True), keep="velora", velora_group=m)
    assert report.kept_bytes["after"] == T * H // m * 4 + m * 4 + 4 * T * R


@pytest.mark.parametrize("form", ["weight", "activation"])
def test_behind_a_relu_the_mask_stays(form: str) -> None:
    """The frozen model keeps it; x itself, which it could be made of, is not kept for it."""
    report = kept(Block(F.relu), torch.randn(T, H, requires_grad=True), keep="int4", form=form)
    assert report.kept_bytes["after"] == SIZES["int4"] + T * H + 4 * T * R


def test_half_precision_behind_a_relu_is_dearer_in_bytes() -> None:
    """A byte for each number, x·A and a mask are more than two bytes for each number."""
    model = Block(F.relu, rank=8).bfloat16()
    given = torch.randn(T, H, dtype=torch.bfloat16, requires_grad=True)
    report = kept(model, given, keep="int8")
    (found,) = report.inputs
    assert (found.keep, found.code) == ("exact", "dearer")
    assert report.kept_bytes["after"] == kept(model, given).kept_bytes["after"]


def test_one_likeness_for_all_that_read_it() -> None:
    """Three layers on one x keep its parts once."""

    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = Block(), Block(), Block()

        def forward(self, z: Tensor) -> Tensor:
            x = self.q.x(z)
            return tuple(x @ b.W + (x @ b.A) @ b.B for b in (self.q, self.k, self.v))

    report = kept(Three(), torch.randn(T, H, requires_grad=True), keep="int8")
    assert report.kept_bytes["after"] == SIZES["int8"] + 3 * 4 * T * R
    assert sorted(i.name for i in report.inputs) == ["k.W", "q.W", "v.W"]


def test_dropout_is_computed_again_behind_the_likeness() -> None:
    """What is kept is of x before the dropout: Inductor draws the mask again."""

    class Dropped(Block):
        def forward(self, z: Tensor) -> Tensor:
            x = self.x(z)
            return x @ self.W + F.dropout(x, 0.5) @ self.A @ self.B

    report = kept(Dropped(), torch.randn(T, H, requires_grad=True), keep="int8")
    assert [r.code for r in report.refusals] == ["dropout"]
    seed = 8
    assert report.kept_bytes["after"] == SIZES["int8"] + 4 * T * R + seed


class Behind(Block):
    """x is the result of a frozen layer, which the merge takes in."""

    def __init__(self, rank: int = R):
        super().__init__(rank=rank)
        self.first = frozen(H, H)

    def x(self, z: Tensor) -> Tensor:
        return z @ self.first


def test_no_product_is_redone_to_avoid_keeping() -> None:
    """Of a frozen layer's result parts are kept, where exact keeps make the gradient from what that layer reads."""
    given = torch.randn(T, H, requires_grad=True)
    assert kept(Behind(), given).kept_bytes["after"] == 4 * T * R
    assert kept(Behind(), given, keep="int8").kept_bytes["after"] == SIZES["int8"] + 4 * T * R


# ------------------------------------------------------------------------------------------------------------ LoRA-FA


class Frozen(Block):
    def __init__(self, rank: int):
        super().__init__(rank=rank)
        self.A.requires_grad_(False)


@pytest.mark.parametrize("form", ["weight", "activation", "auto"])
@pytest.mark.parametrize("rank", [4, 16, 48])
def test_a_frozen_A_keeps_xA_alone(rank: int, form: str) -> None:
    """At every rank below K: a gradient from xᵀ·dy would need x."""
    report = kept(Frozen(rank), torch.randn(T, H, requires_grad=True), form=form)
    assert report.kept_bytes["after"] == 4 * T * rank


class Convolved(Frozen):
    """Behind a convolution, whose output backward keeps no more than that of the cumulative sum."""

    def __init__(self, rank: int):
        super().__init__(rank)
        self.kernel = frozen(H, H, 3)

    def x(self, z: Tensor) -> Tensor:
        return torch.nn.functional.conv1d(z.mT, self.kernel, padding=1).mT

    def forward(self, z: Tensor) -> Tensor:
        return torch.nn.functional.gelu(super().forward(z))


@pytest.mark.parametrize("form", ["weight", "auto"])
def test_a_layer_behind_a_convolution_keeps_what_the_frozen_one_does(form: str) -> None:
    model, z = Convolved(1), torch.randn(T, H, requires_grad=True)
    report = kept(model, z, form=form)
    model.B.requires_grad_(False)
    floor = peft_fx.explain(model, z).kept_bytes["before"]
    assert floor == 4 * T * N
    assert report.kept_bytes["after"] <= 1.02 * floor


def test_lossy_keeps_leave_a_frozen_A_exact() -> None:
    """There is no x to keep, and x·A is what dB is made of."""
    for model in (Frozen(32), Behind(32)):
        model.A.requires_grad_(False)
        report = kept(model, torch.randn(T, H, requires_grad=True), keep="int4")
        assert report.kept_bytes["after"] == 4 * T * 32
        assert {i.code for i in report.inputs} == {"low_rank"}


def test_pefts_own_optimizer_for_it() -> None:
    """PEFT's `create_lorafa_optimizer` as it is: A stays, B learns, as in eager mode."""
    from peft.optimizers import create_lorafa_optimizer

    x, losses = torch.randn(T, 64), {}
    for compiled in (False, True):
        torch.manual_seed(0)
        model = adapt(mlp())
        A = {n: p.clone() for n, p in model.named_parameters() if "lora_A" in n}
        optimizer = create_lorafa_optimizer(model, r=8, lora_alpha=16, lr=1e-2)
        f = oracle.weight_form(model) if compiled else model
        losses[compiled] = []
        for _ in range(3):
            loss = f(x).square().mean()
            loss.backward()
            optimizer.step(), optimizer.zero_grad()
            losses[compiled].append(loss.item())
        assert all(torch.equal(p, A[n]) for n, p in model.named_parameters() if n in A)
    assert losses[True][2] < losses[True][0]
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)


@cache
def bytes_of_opt(layers: int, form: str | None) -> int:
    """What an OPT keeps with adapters whose A is frozen, by form; of None, without adapters."""
    base, inputs = test_chains.opt(layers)
    base.set_attn_implementation("eager")
    model = adapt(base, r=2).train() if form else base.requires_grad_(False)
    for name, p in model.named_parameters():
        p.requires_grad_("lora_B" in name)
    test_chains.train_embeddings(base)
    return peft_fx.explain(model, **inputs, options={"peft_fx.form": form or "auto"}).kept_bytes["after"]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["weight", "auto"])
def test_a_layer_keeps_what_the_frozen_one_does(form: str) -> None:
    """Also behind a ReLU and an attention that is written out, where exact LoRA keeps x: what a second layer adds is at
    most 1.02 times as much, the rest being x·A of r = H / 32."""

    assert bytes_of_opt(2, form) - bytes_of_opt(1, form) <= 1.02 * (bytes_of_opt(2, None) - bytes_of_opt(1, None))


# --------------------------------------------------------------------------------------------------------------- codes


def codes(model: nn.Module, **options: Any) -> dict[str, str]:
    report = kept(model, torch.randn(T, H, requires_grad=True), **options)
    return {i.name: i.code or i.keep for i in report.inputs}


def test_what_can_be_rebuilt_is_left_exact() -> None:
    """Behind a SiLU, whose input the frozen model keeps."""

    class Activated(Behind):
        def x(self, z: Tensor) -> Tensor:
            return F.silu(super().x(z))

    assert codes(Activated(), keep="int8") == {"W": "rebuilt"}


def test_features_that_are_no_groups() -> None:
    assert codes(Block(), keep="velora", velora_group=48) == {"W": "shape"}


def test_a_checkpoint_keeps_nothing() -> None:
    class Checkpointed(Block):
        def forward(self, z: Tensor) -> Tensor:
            return checkpoint(super().forward, z.cumsum(0), use_reentrant=False)

    plain = kept(Checkpointed(), torch.randn(T, H, requires_grad=True))
    lossy_ = kept(Checkpointed(), torch.randn(T, H, requires_grad=True), keep="int8")
    assert {i.code for i in lossy_.inputs} == {"checkpointed"}
    assert plain.kept_bytes == lossy_.kept_bytes


class Two(nn.Module):
    def __init__(self, share: bool):
        super().__init__()
        self.up, self.down, self.share = Block(), Block(), share

    def forward(self, z: Tensor) -> Tensor:
        x = self.up.x(z)
        other = x if self.share else self.down.x(x)
        return tuple(h @ b.W + (h @ b.A) @ b.B for b, h in ((self.up, x), (self.down, other)))


def test_layers_are_named_by_patterns() -> None:
    assert codes(Two(share=False), keep="int8", keep_layers=["down*"]) == {"up.W": "not_named", "down.W": "int8"}


def test_what_another_layer_keeps_is_kept() -> None:
    assert codes(Two(share=True), keep="int8", keep_layers=["down*"]) == {"up.W": "not_named", "down.W": "shared"}


def test_other_modules_by_name() -> None:
    """A layer that is trained itself, only where a pattern names it."""

    class Full(Block):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(N, H, bias=False)

        def forward(self, z: Tensor) -> Tensor:
            return self.head(F.relu(super().forward(z)))

    assert "head" not in codes(Full(), keep="int8")
    assert codes(Full(), keep="int8", keep_layers=["head"]) == {"W": "not_named", "head": "int8"}


def test_fp8_where_the_device_has_it() -> None:
    """e4m3 came with compute capability 8.9."""
    on_cuda = SimpleNamespace(device=torch.device("cuda", 0))
    with patch.object(torch.cuda, "get_device_capability", lambda device: (8, 0)):
        assert policies.Float8().refusal(on_cuda)[0] == "device"
    with patch.object(torch.cuda, "get_device_capability", lambda device: (9, 0)):
        assert policies.Float8().refusal(on_cuda) is None


@pytest.mark.parametrize(
    ("option", "value", "listed"),
    [
        ("keep", "int2", "'velora', 'int8'"),
        ("velora_group", 1, "from 2 on"),
        ("velora_group", "32", "from 2 on"),
        ("keep_layers", "down", "glob patterns"),
        ("keep_layers", [3], "glob patterns"),
        ("keep_rounding", "up", "'stochastic'"),
    ],
)
def test_bad_values_are_refused_at_once(option: str, value: Any, listed: str) -> None:
    with pytest.raises(ValueError, match=listed):
        peft_fx.backend(None, [], options={f"peft_fx.{option}": value})


# -------------------------------------------------------------------------------------------------- stochastic rounding


def rounded(keep_rounding: str, bits: int = 4) -> tuple[Tensor, Tensor]:
    """x, and its likeness: dA where what reaches A is one for each token of a unit vector, so that x̃ itself is seen."""

    class Seen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.W, self.A, self.B = frozen(H, T), trained(H, T), trained(T, T)

        def forward(self, z: Tensor) -> Tensor:
            x = z.cumsum(0)
            return x @ self.W + (x @ self.A) @ self.B

    case = joint.capture(Seen().double(), torch.randn(T, H, dtype=FP64, requires_grad=True))
    graph, _ = case.rewritten(form="activation", keep=f"int{bits}", keep_rounding=keep_rounding)
    numbers = torch.Generator().manual_seed(5)
    inputs = []
    for node in graph.find_nodes(op="placeholder"):
        sizes = tuple(node.meta["val"].shape)
        is_square = sizes == (T, T)  # B and dy: dy·Bᵀ = 1, so dA = x̃ᵀ
        inputs.append(torch.eye(T, dtype=FP64) if is_square else torch.randn(sizes, generator=numbers, dtype=FP64))
    outputs = GraphModule(case.module, graph)(*inputs)
    (dA,) = (o for o in outputs if o is not None and o.shape == (H, T))
    return inputs[0].cumsum(0), dA.T


@pytest.mark.parametrize("keep_rounding", policies.ROUNDINGS)
def test_rounding_is_to_a_neighbour(keep_rounding: str) -> None:
    """To nearest within half a step, stochastically within one; either way the least and the largest are exact."""
    x, likeness = rounded(keep_rounding)
    _, step = steps(x, 4, H)
    error = (likeness - x).abs() / step
    assert error.max() <= {"nearest": 0.5, "stochastic": 1.0}[keep_rounding] + 1e-9
    assert error.max() > {"nearest": 0.45, "stochastic": 0.9}[keep_rounding]


def test_stochastic_rounding_has_no_bias() -> None:
    """Up as often as the part of a step that is above: in each tenth of a step, within four standard errors."""
    x, likeness = rounded("stochastic")
    low, step = steps(x, 4, H)
    part = ((x - low) / step).frac().flatten()
    up = ((likeness - low) / step).round().flatten() > ((x - low) / step).flatten()
    for i in range(10):
        inside = (part > i / 10) & (part <= (i + 1) / 10) & (part > 1e-6)
        expected, seen, count = part[inside].mean(), up[inside].double().mean(), int(inside.sum())
        assert count > 300
        assert abs(seen - expected) < 4 * (0.25 / count) ** 0.5


def test_stochastic_rounding_is_of_the_number_not_of_its_place() -> None:
    """The same number elsewhere, or in another batch, goes another way; the same batch the same way."""
    case = captured()
    graph, _ = case.rewritten(form="weight", keep="int4", keep_rounding="stochastic")
    given, got = run(case, graph)
    _, again = run(case, graph)
    assert torch.equal(got["A"], again["A"])
    assert not [n for n in graph.nodes if "rand" in str(n.target)]
    assert 0.99 < cosine(got["A"], exact(case)["A"]) < 1
    assert not torch.equal(got["A"], run(case, case.rewritten(form="weight", keep="int4")[0])[1]["A"])
    assert given.keys() >= got.keys() - {"y"}


# ------------------------------------------------------------------------------------------------------------ measured


class WithBuffer(Block):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(H, affine=False)

    def x(self, z: Tensor) -> Tensor:
        return super().x(self.norm(z))


def test_explain_measures_the_error_of_each_gradient() -> None:
    """Of dA that of the formula, of dB none; and the model is as it was."""
    model, z = WithBuffer(), torch.randn(T, H, requires_grad=True)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    random = torch.get_rng_state()
    options = {"peft_fx.form": "weight", "peft_fx.keep": "int4"}
    report = peft_fx.explain(model, z, options=options, measure=True)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert z.grad is None
    assert model.A.grad is None
    found = {e.name: e for e in report.errors}
    assert found.keys() == {"A", "B"}
    assert (found["B"].relative, found["B"].cosine) == (0.0, 1.0)
    y = model(z)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    x = model.x(z).detach()
    inner = dy @ model.B.T
    want = ((affine(x, 4) - x).T @ inner).norm() / (x.T @ inner).norm()
    assert found["A"].relative == pytest.approx(want.item(), rel=0.05)
    assert "relative error" in str(report)


def test_exact_keeps_have_no_error() -> None:
    report = peft_fx.explain(Block(), torch.randn(T, H, requires_grad=True), measure=True)
    assert {(e.relative, e.cosine) for e in report.errors} == {(0.0, 1.0)}


def test_nothing_is_measured_without_numbers() -> None:
    with torch.device("meta"):
        model, z = Block(), torch.randn(T, H)
    with pytest.raises(TypeError, match="real numbers"):
        peft_fx.explain(model, z, measure=True)


# -------------------------------------------------------------------------------------------- with other things, whole


def adapted(**config: Any) -> nn.Module:
    """An MLP with a ReLU between adapted layers."""
    return adapt(mlp(nn.ReLU), **config).train()


def twice(model: nn.Module) -> nn.Module:
    model.add_adapter("other", peft.LoraConfig(target_modules=["0", "2"], r=4, init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    return model


WHOLE: dict[str, Callable[[], nn.Module]] = {
    "lora": adapted,
    "dropout": lambda: adapted(lora_dropout=0.3),
    "dora": lambda: peft_fx.prepare(adapted(use_dora=True)),
    "two adapters": lambda: twice(adapted()),
}


@pytest.mark.parametrize("make", WHOLE.values(), ids=WHOLE)
def test_only_adapters_gradients_change_in_a_model(make: Callable[[], nn.Module]) -> None:
    """Outputs, the input's gradient and all that reads no such x: to the bit; the rest points the same way."""
    model, x = make(), torch.randn(T, 64, requires_grad=True)

    def compiled(keep: str) -> oracle.Run:
        torch._dynamo.reset()
        torch.manual_seed(3)
        return oracle.run(oracle.weight_form(model, **{"peft_fx.keep": keep}), model, (x,))

    want, got = compiled("recompute"), compiled("int8")
    changed = {n for n, a, b in oracle.pairs(want, got) if not torch.equal(a, b)}
    assert changed
    assert all("lora_" in name for name in changed)
    for name, a, b in oracle.pairs(want, got):
        assert cosine(a, b) > 0.999, name


@pytest.mark.slow
@pytest.mark.parametrize("keep", LOSSY)
def test_compiled_by_inductor(keep: str) -> None:
    """The same through Inductor: to the bit but for dA, whose error is the formula's."""
    model, z = Block(F.relu), torch.randn(T, H, requires_grad=True)
    runs = {}
    for chosen in ("recompute", keep):
        torch._dynamo.reset()
        options = {"peft_fx.form": "weight", "peft_fx.keep": chosen, "peft_fx.keep_rounding": "nearest"}
        runs[chosen] = oracle.run(torch.compile(model, backend=peft_fx.backend, options=options), model, (z,))
    want, got = runs["recompute"], runs[keep]
    assert {n for n, a, b in oracle.pairs(want, got) if not torch.equal(a, b)} == {"gradient of A"}
    x = model.x(z).detach()
    dy = oracle.signs(want.y[0], 7)
    expected = 2 * FORMULAS[keep](x).T @ (dy @ model.B.T)
    torch.testing.assert_close(got.params["A"], expected, rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------------------------------------------------- mutants


def holds() -> bool:
    """What the tests above ask of every policy, as one answer."""
    case = captured()
    try:
        want = exact(case)
        for keep in LOSSY:
            given, got = run(case, case.rewritten(form="weight", keep=keep)[0])
            if any(not torch.equal(got[k], want[k]) for k in ("y", "z", "B")):
                return False
            if not torch.allclose(got["A"], gradient_of_A(given, FORMULAS[keep]), rtol=1e-9, atol=1e-9):
                return False
        return True
    except Exception:
        return False


def _calls(owner: Any, name: str, change: Callable[..., Any]) -> Any:
    real = getattr(owner, name)
    return patch.object(owner, name, lambda self, build, *args: change(self, real, build, *args))


def _without(op: Any) -> Callable[..., Any]:
    """A policy's nodes without one op: its first operand is handed on."""

    def change(self: Any, real: Any, build: Any, *args: Any) -> Any:
        call = build.call

        def skipping(target: Any, *given: Any, **kwargs: Any) -> Any:
            return given[0] if target is op else call(target, *given, **kwargs)

        with patch.object(build, "call", skipping):
            return real(self, build, *args)

    return change


MUTANTS: dict[str, Callable[[], Any]] = {
    "vector of another length": lambda: _calls(policies.Velora, "compress", _without(aten.sqrt.default)),
    "groups of another size": lambda: patch.object(
        policies, "_grouped", lambda build, x, m, real=policies._grouped: real(build, x, m // 2)
    ),
    "halves of a byte exchanged": lambda: _calls(policies.Affine, "restore", _without(aten.__rshift__.Scalar)),
    "rounded down": lambda: _calls(policies.Affine, "compress", _without(aten.add.Tensor)),
    "least number forgotten": lambda: _calls(policies.Affine, "restore", _without(aten.add.Tensor)),
    "unit forgotten": lambda: _calls(policies.Float8, "restore", _without(aten.mul.Tensor)),
    "x·A of the likeness": lambda: patch.object(approximation, "products", lambda node: []),
    "nobody reads the likeness": lambda: patch.object(approximation._Change, "reread", lambda self: None),
}


def test_the_rules_as_they_are_hold() -> None:
    assert holds()


@pytest.mark.parametrize("mutation", MUTANTS.values(), ids=MUTANTS)
def test_mutant_is_caught(mutation: Callable[[], Any]) -> None:
    with mutation():
        assert not holds()
