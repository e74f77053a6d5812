"""`strict`: every matrix product of tokens is one that was written, or has its dtype; what has two dtypes is left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph

from peft_fx.passes.findings import Outcome
from peft_fx.passes.graph.nodes import PRODUCTS, aten, shape, value
from tests.support import joint
from tests.support.affine_spellings import Layer
from tests.support.spellings import BF16, Lora, TwoAdapters, linear, peft_casts, scale_right

T, K, N, R = 53, 24, 40, 4  # T is no size of a parameter
FP16, FP32 = torch.float16, torch.float32


class Kernels(nn.Module):
    """LoRA on a convolution; the adapter in its own dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(N, K, 3), requires_grad=False)
        self.A, self.B = nn.Parameter(torch.randn(R, K, 3)), nn.Parameter(torch.randn(N, R, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x.mT
        low = torch.conv1d(torch.conv1d(x.to(self.A.dtype), self.A), self.B)
        return torch.conv1d(x, self.W) + low.to(x.dtype)


def scaled(m: Layer, x: Tensor) -> Tensor:
    low = ((x.to(m.A.dtype) @ m.A) * m.d) @ m.B
    return (x @ m.W + low.to(x.dtype)) * m.l.to(x.dtype)


def affine() -> nn.Module:
    return Layer(scaled, {"A": (K, R), "d": (R,), "B": (R, N), "l": (N,)}, {}, K, N)


MAPS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: Lora(linear, K, N),
    "product": lambda: Lora(scale_right, K, N),
    "two adapters": TwoAdapters,
    "affine": affine,
    "convolution": Kernels,
}
CASTING: dict[str, Callable[[], nn.Module]] = {
    "product": lambda: Lora(peft_casts, K, N),
    "affine": affine,
}


def captured(module: nn.Module, base: torch.dtype, adapters: torch.dtype) -> joint.Joint:
    for p in module.parameters():
        p.data = p.data.to(adapters if p.requires_grad else base)
    width = next(p for name, p in module.named_parameters() if name == "A").shape[
        1 if isinstance(module, Kernels) else 0
    ]
    return joint.capture(module, torch.randn(2, T, width, dtype=base, requires_grad=True))


def products(graph: Graph) -> Counter[tuple[object, ...]]:
    """The matrix products that read tokens: op, sizes and dtypes."""
    found: Counter[tuple[object, ...]] = Counter()
    for node in graph.nodes:
        if node.target in {*PRODUCTS, aten.mm.dtype, aten.convolution.default, aten.convolution_backward.default}:
            read = [n for n in node.all_input_nodes if n.op != "get_attr"]
            sizes = [tuple(shape(n)) for n in read]
            if any(not {T, 2 * T, T - 2}.isdisjoint(size) for size in sizes):
                found[(node.target, *sizes, *(value(n).dtype for n in read))] += 1
    return found


def dtypes(found: Counter[tuple[object, ...]]) -> set[object]:
    return {part for product in found for part in product if isinstance(part, torch.dtype)}


def rewritten(case: joint.Joint, numerics: str) -> tuple[Counter[tuple[object, ...]], Outcome]:
    graph, outcome = case.rewritten(form="weight", numerics=numerics)
    return products(graph), outcome


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("make", MAPS.values(), ids=MAPS)
def test_one_dtype_is_rewritten_and_kept(make: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    """In weight form; no product of tokens has another dtype, or is one that was not written with W' for W."""
    case = captured(make(), dtype, dtype)
    found, outcome = rewritten(case, "strict")
    assert [(s.forward, s.input_grad) for s in outcome.sites] == [("weight", "weight")]
    assert outcome.refusals == []
    assert dtypes(found) == {dtype}
    assert found != products(case.graph)


@pytest.mark.parametrize("base", [BF16, FP16], ids=str)
@pytest.mark.parametrize("make", CASTING.values(), ids=CASTING)
def test_two_dtypes_are_left_as_written(make: Callable[[], nn.Module], base: torch.dtype) -> None:
    """Adapters in fp32 on a half-precision base: refused with `dtype`, every product as it was; not so by default."""
    case = captured(make(), base, FP32)
    found, outcome = rewritten(case, "strict")
    assert [r.code for r in outcome.refusals] == ["dtype"]
    assert outcome.sites == []
    assert found == products(case.graph)
    changed, outcome = rewritten(case, "default")
    assert [s.forward for s in outcome.sites] == ["weight"]
    assert changed != found


def test_autocast_writes_one_dtype() -> None:
    """Every product under autocast is a bf16 one, whatever the parameters are."""

    def spell(x: Tensor, W: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
        with torch.autocast("cpu", BF16):
            return scale_right(x, W, A, B, s)

    found, outcome = rewritten(captured(Lora(spell, K, N), FP32, FP32), "strict")
    assert [s.forward for s in outcome.sites] == ["weight"]
    assert dtypes(found) == {BF16}
