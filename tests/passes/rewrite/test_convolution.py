"""LoRA on convolutions, `conv(x, W) + s·conv1x1(conv(x, A), B)`, becomes one convolution with W + s·B·A."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph
from torch.nn import functional as F

import peft_fx
from peft_fx.passes.graph.nodes import aten
from tests.support import joint
from tests.support.oracle import assert_bit_equal, gate, integers, run, weight_form
from tests.support.spellings import frozen, trained

CHANNELS, OUT, R, S = 6, 10, 2, 2.0
SETTINGS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {  # image, kernel, the rest
    "1d": ((33,), (5,), {"padding": 2}),
    "1d_dilated": ((33,), (3,), {"dilation": 4}),
    "2d": ((9, 8), (3, 3), {"padding": 1}),
    "2d_strided": ((9, 8), (3, 2), {"stride": (2, 1), "padding": (1, 0)}),
    "2d_patches": ((8, 8), (4, 4), {"stride": 4}),
    "2d_point": ((9, 8), (1, 1), {}),
    "3d": ((5, 4, 3), (3, 1, 2), {}),
}
cases = pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)


class ConvLora(nn.Module):
    """As PEFT writes it; the adapter's first kernel reads the same windows as W, its second one position.

    ‖sAB‖ = ‖W‖/2, for the reason that `spellings.Lora` gives.
    """

    def __init__(self, kernel: tuple[int, ...], windows: dict[str, Any], **adapter: Any):
        super().__init__()
        self.W, self.A = frozen(OUT, CHANNELS, *kernel, gain=0.3), trained(R, CHANNELS, *kernel, gain=0.3)
        self.B = trained(OUT, R, *[1] * len(kernel))
        with torch.no_grad():
            delta = S * self.B.flatten(1) @ self.A.flatten(1)
            self.B *= self.W.norm() / delta.norm() / 2
        self.bias = nn.Parameter(torch.randn(OUT), requires_grad=False)
        self.convolve = {1: nn.functional.conv1d, 2: nn.functional.conv2d, 3: nn.functional.conv3d}[len(kernel)]
        self.windows, self.adapter = windows, windows | adapter

    def forward(self, x: Tensor) -> Tensor:
        base = self.convolve(x, self.W, self.bias, **self.windows)
        return base + self.convolve(self.convolve(x, self.A, **self.adapter), self.B) * S


def make(setting: tuple[Any, ...], dtype: torch.dtype = torch.float64, **adapter: Any) -> tuple[ConvLora, Any]:
    torch.manual_seed(0)
    image, kernel, windows = setting
    inputs = (torch.randn(2, CHANNELS, *image, dtype=dtype, requires_grad=True),)
    return ConvLora(kernel, windows, **adapter).to(dtype), inputs


@cases
def test_rewritten_is_bit_equal_on_integers(setting: tuple[Any, ...]) -> None:
    """y and every gradient, and the site in weight form both ways."""
    module, inputs = make(setting)
    integers(module, 1), integers(inputs, 2)
    f = weight_form(module)
    assert_bit_equal(run(f, module, inputs), run(module, module, inputs))
    (site,) = peft_fx.explain(f).sites
    assert (site.forward, site.input_grad, site.rank) == ("weight", "weight", R)
    assert (site.in_features, site.out_features) == (module.W[0].numel(), OUT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rewritten_is_no_worse_on_floats(dtype: torch.dtype) -> None:
    """In fp32 and bf16 at most 1.25 times eager's own error."""
    module, inputs = make(SETTINGS["2d"], dtype)
    gate(weight_form(module), module, inputs)


def convolutions(graph: Graph) -> list[tuple[int, ...]]:
    """The kernels of a graph's forward convolutions."""
    nodes = graph.find_nodes(op="call_function", target=aten.convolution.default)
    return sorted(tuple(n.args[1].meta["val"].shape[:2]) for n in nodes)


def test_one_convolution_is_left_of_the_sum() -> None:
    """Of forward only `W'` and the `A` that its own gradient needs; in backward A's is asked for its kernel alone."""
    module, inputs = make(SETTINGS["2d"])
    graph, _ = joint.capture(module, *inputs).rewritten(form="weight")
    assert convolutions(graph) == [(R, CHANNELS), (OUT, CHANNELS)]
    backward = graph.find_nodes(op="call_function", target=aten.convolution_backward.default)
    masks = {tuple(n.args[2].meta["val"].shape[:2]): n.args[-1] for n in backward}
    assert masks == {
        (OUT, CHANNELS): [True, False, False],  # dx, with W'
        (R, CHANNELS): [False, True, False],  # dA
        (OUT, R): [True, True, False],  # what dA reads, and dB
    }


@pytest.mark.parametrize("windows", [{"padding": 2, "dilation": 2}, {"padding": (1, 1), "stride": 1, "dilation": 1}])
def test_windows_must_be_the_same(windows: dict[str, Any]) -> None:
    """An adapter that reads other windows of x is refused; one that spells the same ones otherwise is not."""
    module, inputs = make(SETTINGS["2d"], **windows)
    same = windows["padding"] == (1, 1)
    integers(module, 1), integers(inputs, 2)
    f = weight_form(module)
    assert_bit_equal(run(f, module, inputs), run(module, module, inputs))
    report = peft_fx.explain(f)
    assert [s.forward for s in report.sites] == (["weight"] if same else [])
    assert [r.code for r in report.refusals] == ([] if same else ["shape"])


class Spelled(nn.Module):
    """A convolution in some groups, and an adapter of another kind than LoRA."""

    def __init__(self, spell: Callable[[Any, Tensor], Tensor], groups: int = 1, **trained_shapes: tuple[int, ...]):
        super().__init__()
        self.spell, self.groups = spell, groups
        self.W = frozen(OUT, CHANNELS // groups, 3, 3, gain=0.3)
        self.bias = nn.Parameter(torch.randn(OUT), requires_grad=False)
        for name, shape in trained_shapes.items():
            setattr(self, name, trained(*shape, gain=0.3))

    def base(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.W, self.bias, padding=1, groups=self.groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.spell(self, x)


def delta_in_groups(m: Any, x: Tensor) -> Tensor:
    """LoHa, LoKr and HiRA: a kernel like the base's, in its groups."""
    return m.base(x) + F.conv2d(x, m.W * m.D, padding=1, groups=m.groups) * 2.0


def lora_across_groups(m: Any, x: Tensor) -> Tensor:
    """As PEFT writes it: A reads all channels, B is in groups."""
    return m.base(x) + F.conv2d(F.conv2d(x, m.A, padding=1), m.B, groups=m.groups) * 2.0


def vector_after(m: Any, x: Tensor) -> Tensor:
    """IA3."""
    return m.base(x) * m.l


def dora(m: Any, x: Tensor) -> Tensor:
    low = F.conv2d(F.conv2d(x, m.A, padding=1), m.B)
    return m.base(x) + (m.l - 1) * (m.base(x) - m.bias.view(1, -1, 1, 1)) + m.l * low * 2.0


def rotated_windows(m: Any, x: Tensor) -> Tensor:
    """OFT."""
    windows = F.unfold(x, 3)
    return m.base(F.fold((windows.mT @ m.M).mT, x.shape[2:], 3))


A, B, VECTOR = (2, CHANNELS, 3, 3), (OUT, 1, 1, 1), (1, OUT, 1, 1)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_kernel_in_groups_joins_its_base(groups: int) -> None:
    """Both ways, to the bit."""
    module = Spelled(delta_in_groups, groups, D=(OUT, CHANNELS // groups, 3, 3))
    module, inputs = module.double(), make(SETTINGS["2d"])[1]
    integers(module, 1), integers(inputs, 2)
    f = weight_form(module)
    assert_bit_equal(run(f, module, inputs), run(module, module, inputs))
    report = peft_fx.explain(f)
    assert [(s.forward, s.input_grad) for s in report.sites] == [("weight", "weight")]
    assert report.refusals == []


def test_dora_is_a_lora_and_a_vector() -> None:
    """The vector is taken out of the sum, whose forward then is a LoRA's; to the bit."""
    module, inputs = Spelled(dora, A=A, B=(OUT, 2, 1, 1), l=VECTOR).double(), make(SETTINGS["2d"])[1]
    integers(module, 1), integers(inputs, 2)
    f = weight_form(module)
    assert_bit_equal(run(f, module, inputs), run(module, module, inputs))
    report = peft_fx.explain(f)
    assert [s.forward for s in report.sites] == ["weight"]
    assert report.refusals == []


REFUSED = {
    "across_groups": (lambda: Spelled(lora_across_groups, 2, A=A, B=B), "in 2 groups"),
    "vector_after": (lambda: Spelled(vector_after, l=VECTOR), "a vector scales"),
    "rotated_windows": (lambda: Spelled(rotated_windows, M=(CHANNELS * 9, CHANNELS * 9)), "overlapping windows"),
}


@pytest.mark.parametrize(("build", "said"), REFUSED.values(), ids=REFUSED)
def test_what_no_kernel_holds_is_refused(build: Callable[[], nn.Module], said: str) -> None:
    """Once, with what stands against it, and computed as written."""
    module, inputs = build().double(), make(SETTINGS["2d"])[1]
    integers(module, 1), integers(inputs, 2)
    f = weight_form(module)
    assert_bit_equal(run(f, module, inputs), run(module, module, inputs))
    report = peft_fx.explain(f)
    assert report.sites == []
    assert [(r.name, r.code) for r in report.refusals] == [("W", "shape")]
    assert said in report.refusals[0].detail
