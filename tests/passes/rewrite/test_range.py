"""fp16: nothing becomes infinite, or nothing, that is a number in the activation form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.support.affine_spellings import Layer
from tests.support.oracle import gate, run, signs, to_dtype, weight_form
from tests.support.spellings import Lora, linear, peft_casts, scale_right

FP16, FP32 = torch.float16, torch.float32
K, T = 64, 96

rounding = pytest.mark.parametrize("rounding", ["nearest", "dithered"])


def half(module: nn.Module, adapters: torch.dtype = FP16) -> nn.Module:
    for p in module.parameters():
        p.data = p.data.to(adapters if p.requires_grad else FP16)
    return module


@rounding
@pytest.mark.parametrize("spell", [scale_right, linear, peft_casts])
def test_a_large_delta_is_no_infinity(spell, rounding: str) -> None:
    """Elements of W' beyond fp16 meet an x so small that y is a number: they become the largest that there is."""
    module = half(Lora(spell, K, K, s=1.0), FP32 if spell is peft_casts else FP16)
    with torch.no_grad():
        module.A.fill_(200.0), module.B.fill_(100.0)  # sAB = 80 000
        module.B[:, 1:] = 1.0
    x = torch.full((T, K), 2.0**-12, dtype=FP16, requires_grad=True)
    eager = run(module, module, (x,))
    got = run(weight_form(module, **{"peft_fx.rounding": rounding}), module, (x,))
    for (name, e), (_, g) in zip(eager.items(), got.items(), strict=True):
        assert e is g is None or (e.isfinite() <= g.isfinite()).all(), name
    assert eager.y[0].isfinite().all()


@rounding
def test_an_infinite_parameter_is_seen(rounding: str) -> None:
    """A diverged adapter stays one: whoever scales a loss looks for infinities."""
    module = half(Lora(scale_right, K, K))
    module.B.data[0, 0] = torch.inf
    x = torch.randn(T, K, dtype=FP16)
    assert not weight_form(module, **{"peft_fx.rounding": rounding})(x).isfinite().all()


@pytest.mark.parametrize("power", [-18, 0, 12])
def test_scaled_losses_have_the_gradients_of_eager(power: int) -> None:
    """Adapters in fp32 on an fp16 base: what is written in fp32 has its range, be the loss scaled up or forgotten."""

    def scaled(y: Tensor, seed: int) -> Tensor:
        return signs(y, seed) * 2.0**power

    module = half(Lora(peft_casts, K, K), FP32)
    (x,) = to_dtype((torch.randn(T, K, requires_grad=True),), FP16)
    gate(weight_form(module), module, (x,), seeds=4, draw=scaled)


def test_a_sum_over_tokens_of_large_numbers_is_one() -> None:
    """The gradient of a vector behind the layer is made of xᵀ·dy, whose own numbers leave the range of fp16."""
    module = half(Layer(lambda m, x: ((x @ m.W) * m.l).to(x.dtype), {"l": (K,)}, {}, K, K), FP32)
    with torch.no_grad():
        module.W *= 2.0**-6
        x = (100 + torch.randn(T, K)).to(FP16).requires_grad_()
    c = [torch.full((T, K), 64.0)]
    assert (x.T.float() @ c[0]).min() > 65504
    eager, got = (run(f, module, (x,), c).params["l"] for f in (module, weight_form(module)))
    assert eager is not None
    torch.testing.assert_close(got, eager, rtol=1e-2, atol=0.0)
