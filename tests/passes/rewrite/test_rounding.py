"""W' rounded to nearest and dithered: what arrives of a delta, the same bits forward and backward, the error of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from peft_fx.passes.graph.nodes import aten, prims
from tests.support import affine_spellings, dither, joint, spellings
from tests.support.affine_spellings import Layer
from tests.support.dither import HALVES, PROPERTIES
from tests.support.oracle import gate, run, weight_form
from tests.support.spellings import BF16, Lora, frozen, peft_casts

DITHERED = {"peft_fx.rounding": "dithered"}
K = 64

halves = pytest.mark.parametrize("dtype", HALVES, ids=str)


@halves
@pytest.mark.parametrize("holds", PROPERTIES, ids=lambda f: f.__name__)
def test_of_dithered_rounding(holds: Callable[[torch.dtype], None], dtype: torch.dtype) -> None:
    holds(dtype)


@pytest.mark.parametrize("how", ["nearest", "dithered"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_wider_numbers_are_rounded_to_nearest(dtype: torch.dtype, how: str) -> None:
    wide = dither.random_numbers(64, 64).double() * torch.pi
    assert torch.equal(dither.rounded(wide, dtype, how), wide.to(dtype))


# ------------------------------------------------------------------------------------------------- forward, backward


@torch.no_grad()
def dyadic(module: nn.Module) -> nn.Module:
    """The module in bf16 with multiples of 1/64 up to 2: fp32 holds every W' and bf16 does not."""
    g = torch.Generator().manual_seed(1)
    for p in module.parameters():
        p.copy_(torch.randint(-128, 129, p.shape, generator=g) / 64)
    return module.bfloat16()


def lora(spell: Callable[..., Tensor]) -> nn.Module:
    return Lora(spell, K=K, N=K)


def affine(spell: Callable[..., Tensor], *trained: str) -> nn.Module:
    shapes = {"l": (K,), "d": (4,), "A": (K, 4), "B": (4, K), "M": (8, K // 8, K // 8)}
    return Layer(spell, {name: shapes[name] for name in trained}, {}, K, K)


def with_low_rank_scaled(m: Layer, x: Tensor) -> Tensor:
    return (x @ m.W + ((x @ m.A) * m.d) @ m.B) * m.l


def scaled_behind(m: Layer, x: Tensor) -> Tensor:
    return (x @ m.W) * m.l


def transposed_storage(x: Tensor, W: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    return spellings.linear(x, W.mT, A, B, s)  # F.linear of a weight stored as it multiplies from the other side


MERGED = {
    "product": lambda: lora(spellings.scale_right),
    "linear": lambda: lora(spellings.linear),
    "transposed": lambda: lora(transposed_storage),
    "from the left": lambda: lora(spellings.weight_on_the_left),
    "scaled": lambda: affine(scaled_behind, "l"),
    "low rank, scaled": lambda: affine(with_low_rank_scaled, "A", "B", "d", "l"),
    "rotated": lambda: affine(affine_spellings.oft_after, "M"),
}


def merged(module: nn.Module, **options: str) -> tuple[Tensor, Tensor]:
    """W' as forward has it and the transpose of what backward has: the images of unit vectors."""
    torch._dynamo.reset()
    f = weight_form(module, **options)
    eye = torch.eye(K, dtype=BF16, requires_grad=True)
    result = run(f, module, (eye,), [torch.eye(K, dtype=BF16)])
    assert result.inputs[0] is not None
    return result.y[0], result.inputs[0].mT


@pytest.mark.parametrize("make", MERGED.values(), ids=MERGED)
def test_forward_and_backward_have_the_same_bits(make: Callable[[], nn.Module]) -> None:
    """In a sum of terms and in a region, whose two W' are computed each by itself. (Where a parameter's gradient reads
    a value inside the map, the input gradient is two maps: there is no transpose of W'.)"""
    module = dyadic(make())
    if hasattr(module, "b"):
        nn.init.zeros_(module.b)
    forward, backward = merged(module, **DITHERED)
    assert torch.equal(forward, backward)
    nearest, _ = merged(module)
    assert (forward != nearest).float().mean() > 0.1  # dithered: a quarter, less what bf16 holds


def test_the_noise_is_of_the_element_whatever_the_spelling() -> None:
    """One map stored, multiplied and merged in different ways has one W'."""
    W = [merged(dyadic(lora(spell)), **DITHERED)[0] for spell in (spellings.scale_right, spellings.linear)]
    assert torch.equal(*W)
    from_left = lora(spellings.weight_on_the_left)
    assert torch.equal(merged(dyadic(from_left), **DITHERED)[0].mT, W[0])


def test_a_step_has_one_noise() -> None:
    """Forward and backward read one W', which is computed again and not kept."""
    module = dyadic(lora(spellings.scale_right))
    captured = joint.capture(module, torch.randn(48, K, dtype=BF16, requires_grad=True))
    graph, _ = captured.rewritten(form="weight", rounding="dithered")
    (noise,) = graph.find_nodes(op="call_function", target=prims.iota.default)
    assert "recompute" in noise.meta
    plain, _ = captured.rewritten(form="weight")
    assert not plain.find_nodes(op="call_function", target=prims.iota.default)
    assert not plain.find_nodes(op="call_function", target=aten.view.dtype)


def test_two_steps_have_the_same_bits() -> None:
    module = dyadic(lora(spellings.scale_right))
    assert torch.equal(merged(module, **DITHERED)[0], merged(module, **DITHERED)[0])


@pytest.mark.parametrize("make", [m for name, m in MERGED.items() if name not in ("scaled", "rotated")])
def test_without_a_delta_the_model_is_the_base(make: Callable[[], nn.Module]) -> None:
    """B = 0, as PEFT starts: y has the bits of x·W."""
    module = dyadic(make()).requires_grad_(False)
    module.B.zero_()
    if hasattr(module, "l"):
        module.l.fill_(1)
    x = torch.randn(40, K).bfloat16()
    f = weight_form(module, **DITHERED)
    if isinstance(module, Lora) and module.spell is spellings.weight_on_the_left:
        x = x.mT
    assert torch.equal(f(x), module(x))


@pytest.mark.slow
def test_inductor_has_the_bits_of_eager_ops() -> None:
    """Its fused loop hashes as the ops do one by one."""
    module = dyadic(lora(peft_casts))
    assert torch.equal(merged(module, **DITHERED)[0], merged(module, **DITHERED, **{"peft_fx.lowering": "inductor"})[0])


# ------------------------------------------------------------------------------------------------- the delta's signal


class Small(Lora):
    """PEFT's casts, with ‖sAB‖ a given part of ‖W‖.

    W' has four million elements, which the noise of the smallest delta takes to average out, and few rows: reading it
    by unit vectors is a product of K² · N, and CPUs without bf16 units multiply bf16 a hundred times slower than fp32.
    """

    K, N = 16, 2**18

    def __init__(self, ratio: float):
        super().__init__(peft_casts, K=self.K, N=self.N, r=12)
        with torch.no_grad():
            self.W = nn.Parameter(frozen(self.K, self.N).bfloat16(), requires_grad=False)
            delta = self.s * self.A @ self.B
            self.B *= ratio * self.W.float().norm() / delta.norm()


def gain(f: Callable[[Tensor], Tensor], module: Small, x: Tensor) -> float:
    """Of what the adapter really adds to y the projection on what it should: a multiple of that."""
    with torch.no_grad():
        seen = f(x).double() - (x @ module.W).double()
        true = x.double() @ (module.s * module.A.double() @ module.B.double())
        return ((seen * true).sum() / true.square().sum()).item()


@pytest.mark.parametrize("ratio", [1e-1, 1e-2, 1e-3, 1e-4])
def test_the_delta_arrives(ratio: float) -> None:
    """Dithered, all of it at any size; to nearest, no less than in PEFT's own form, which loses most of a small one."""
    module, eye = Small(ratio), torch.eye(Small.K, dtype=BF16)
    nearest = gain(weight_form(module), module, eye)
    torch._dynamo.reset()
    dithered = gain(weight_form(module, **DITHERED), module, eye)
    assert dithered == pytest.approx(1, abs=0.03)
    eager = gain(module, module, eye)
    assert nearest >= eager * (1 - 1e-4)  # products of fp32, each in its own order
    assert (nearest < 0.6) == (ratio < 3e-3)  # else there was nothing to lose


# ------------------------------------------------------------------------------------------------- the gate


# None with a ReLU, whose input at 0 is now at one side, now at the other: a few of these decide about a gradient.
GATED = [case for case in spellings.SPELLINGS if case.id in ("linear", "experts", "qkv", "two_adapters", "rank_full")]


@pytest.mark.parametrize("case", GATED, ids=lambda case: case.id)
def test_dithered_errs_a_half_more_at_most(case: spellings.Case) -> None:
    """Against float64, y and every gradient: 1.5 times eager's own error, where nearest is held to 1.25."""
    module, inputs = case.make(BF16)
    worst = gate(weight_form(module, **DITHERED), module, inputs, factor=1.5)
    assert worst > 1  # there is noise
