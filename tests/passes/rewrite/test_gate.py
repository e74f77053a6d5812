"""The gate of the numerics contract on shapes, dtypes and forms at random: no further from float64 than eager."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import peft_fx
from tests.support.oracle import EAGER, PAIR, gate, to_dtype
from tests.support.spellings import BF16, Lora, frozen, linear, peft_casts, trained
from tests.support.strategies import same_at_every_run

EXAMPLES = 3  # of each setting
FP32, FP16 = torch.float32, torch.float16
DTYPES = {  # of base and adapters
    "fp32": (FP32, FP32),
    "bf16": (BF16, BF16),
    "fp16": (FP16, FP16),
    "bf16 base": (BF16, FP32),
    "fp16 base": (FP16, FP32),
}
FORMS = [("weight", "nearest"), ("weight", "dithered"), ("activation", "nearest")]


class Scaled(nn.Module):
    """A layer with vectors before and behind, and LoRA beside it: no sum of products."""

    def __init__(self, K: int, N: int, r: int, ratio: float):
        super().__init__()
        self.W, self.A, self.B = frozen(K, N), trained(K, r), trained(r, N, gain=ratio)
        self.g, self.l = nn.Parameter(1 + torch.randn(K) / 4), nn.Parameter(1 + torch.randn(N) / 4)

    def forward(self, x: Tensor) -> Tensor:
        h = x * self.g
        return (h @ self.W + (h @ self.A) @ self.B) * self.l


class Two(nn.Module):
    """Two adapted layers, an activation between them and a residual: errors of one reach the other's gradients."""

    def __init__(self, K: int, N: int, r: int, ratio: float):
        super().__init__()
        self.up, self.down = layer(K, N, r, ratio), layer(N, K, r, ratio)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.up(x)))


def layer(K: int, N: int, r: int, ratio: float, spell: Callable[..., Tensor] = linear) -> nn.Module:
    """‖sAB‖ = ratio·‖W‖."""
    module = Lora(spell, K, N, r)
    with torch.no_grad():
        module.B *= 2 * ratio
    return module


def casting(K: int, N: int, r: int, ratio: float) -> nn.Module:
    return layer(K, N, r, ratio, peft_casts)


@dataclass(frozen=True)
class Example:
    """Sizes and a map."""

    T: int
    K: int
    N: int
    r: int
    ratio: float
    make: Callable[[int, int, int, float], nn.Module]

    def module(self, base: torch.dtype, adapter: torch.dtype) -> nn.Module:
        torch.manual_seed(0)
        module = self.make(self.K, self.N, self.r, self.ratio)
        for p in module.parameters():
            p.data = p.data.to(adapter if p.requires_grad else base)
        return module


def examples(mixed: bool) -> st.SearchStrategy[Example]:
    maps = st.just(casting) if mixed else st.sampled_from([layer, Scaled, Two])
    size, rank, ratio = st.integers(24, 160), st.integers(1, 24), st.sampled_from([0.5, 0.1, 0.01])
    return st.builds(Example, size, size, size, rank, ratio, maps)


@pytest.mark.parametrize(("form", "rounding"), FORMS)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_the_gate_holds_on_random_shapes(dtypes: str, form: str, rounding: str) -> None:
    """The same examples at every run: 1.25 times eager's error, 1.5 times where W' is dithered."""
    base, adapter = DTYPES[dtypes]
    mixed = base != adapter

    @same_at_every_run(EXAMPLES)
    @given(examples(mixed))
    def check(example: Example) -> None:
        torch._dynamo.reset()
        module = example.module(base, adapter)
        inputs = to_dtype((torch.randn(example.T, example.K, requires_grad=True),), base)
        f = torch.compile(
            module, backend=peft_fx.backend, options=EAGER | {"peft_fx.form": form, "peft_fx.rounding": rounding}
        )
        factor = 1.5 if rounding == "dithered" else 1.25
        gate(f, module, inputs, seeds=4, resolution=PAIR if mixed else 0.0, factor=factor)
        assert {s.forward for s in peft_fx.explain(f).sites} == {form}

    check()
