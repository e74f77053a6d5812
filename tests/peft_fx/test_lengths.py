"""Lengths between two traced ones: what is read off is what a trace gives."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import peft_fx
from peft_fx.cli.estimate import variants
from peft_fx.lengths import Sized, filled, on

K, N = 8, 6
HALF = Fraction(1, 2)


def traced(f: Callable[..., Any], T: int) -> Any:
    return make_fx(f, tracing_mode="fake")(torch.randn(T, K))


def sized(f: Callable[..., Any], T: int) -> Sized:
    return Sized.of([traced(f, T)])


def scores(x: Tensor) -> Tensor:
    return (x @ x.t()).softmax(-1).sum(0)[: len(x) // 2]


def test_sizes_between_are_those_of_a_trace() -> None:
    """Scores of T×T and their strides too."""
    low, middle, high = (sized(scores, T) for T in (8, 12, 16))
    assert low.between(high, HALF) == middle.layouts


def test_a_graph_takes_the_sizes() -> None:
    low = traced(scores, 8)
    layouts = sized(scores, 8).between(sized(scores, 16), HALF)
    assert layouts is not None
    on([low], layouts)
    assert Sized.of([low]).layouts == sized(scores, 12).layouts


@pytest.mark.parametrize(
    "f",
    [
        lambda x: (x @ x.t()).flatten().sin(),  # T² is on no line
        lambda x: x[: len(x) // 4].sin(),  # 2 to 5 rows
        lambda x: x.sin() if len(x) < 10 else x.cos(),
        lambda x: x.sin() if len(x) < 10 else x.sin().sin(),
        lambda x: x.sum(0, keepdim=len(x) < 10),
        lambda x: x.double() if len(x) < 10 else x.float(),
    ],
    ids=["square", "fraction", "op", "ops", "flag", "dtype"],
)
def test_what_differs_in_more_is_not_read_off(f: Callable[..., Any]) -> None:
    assert sized(f, 8).between(sized(f, 20), HALF) is None


def test_the_middle_is_traced_where_the_ends_differ() -> None:
    """A change between the second and the third of seven lengths."""
    asked: list[tuple[int, list[str]]] = []

    def trace(T: int, names: list[str]) -> dict[str, tuple[bool, Fraction]]:
        asked.append((T, names))
        return {name: (name == "changes" and T > 4, Fraction(T)) for name in names}

    def between(low: tuple[bool, Fraction], high: tuple[bool, Fraction], share: Fraction) -> Any:
        return (low[0], low[1] + share * (high[1] - low[1])) if low[0] == high[0] else None

    lengths = [2, 4, 8, 16, 32, 64, 128]
    found = filled(lengths, ["changes", "stays"], trace, between)
    assert found == {(n, T): (n == "changes" and T > 4, T) for n in ("changes", "stays") for T in lengths}
    both = ["changes", "stays"]
    assert asked == [(2, both), (128, both), (16, ["changes"]), (4, ["changes"]), (8, ["changes"])]


class Adapted(nn.Module):
    """Two layers with LoRA, attention between them."""

    def __init__(self) -> None:
        super().__init__()
        self.W, self.V = (nn.Parameter(torch.randn(K, K), requires_grad=False) for _ in range(2))
        self.A, self.B = nn.Parameter(torch.randn(K, 2)), nn.Parameter(torch.randn(2, K))

    def forward(self, x: Tensor, wanted: Tensor) -> Tensor:
        h = x @ self.W + x @ self.A @ self.B
        h = nn.functional.scaled_dot_product_attention(h, h, h, is_causal=True)
        return (h.sigmoid() @ self.V + h @ self.A @ self.B - wanted).square().sum()


def test_estimates_between_are_those_of_a_trace() -> None:
    """To the last byte; the seconds too, though attention's grow with the square. What is given twice is one input."""
    told: list[str] = []
    asked = {"machine": "h100", "variants": ["inductor", "peft_fx"]}
    x = torch.randn(1, 4096, K)
    lengths = [4096, 6000, 8192]
    found = peft_fx.estimate(Adapted(), x, x, seq_lens=lengths, progress=told.append, **asked)
    assert len(told) == 2
    assert [r for r in found.rows if r.tokens == 6000] == peft_fx.estimate(
        Adapted(), x, x, seq_lens=[6000], **asked
    ).rows


def test_variants_have_commas_between() -> None:
    assert variants("inductor,peft_fx-int8") == ["inductor", "peft_fx-int8"]
