"""What must hold of dithered rounding, each as a function that raises: for its tests, and for the mutants of these."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule

from peft_fx.passes.graph.editor import Editor
from peft_fx.passes.rewrite import rounding

HALVES = {torch.bfloat16: 16, torch.float16: 13}  # and the bits of fp32 that they lack


def rounded(wide: Tensor, dtype: torch.dtype, how: str = "dithered", transposed: bool = False) -> Tensor:
    """What the pass makes of a W' in fp32, through the graph that it builds."""
    graph = Graph()
    node, mode = graph.placeholder("wide"), FakeTensorMode()
    node.meta["val"] = mode.from_tensor(wide)
    graph.output(rounding.rounded(Editor(graph, mode), node, dtype, how, transposed))
    return GraphModule(torch.nn.Module(), graph)(wide)


def every_number(dtype: torch.dtype) -> Tensor:
    """All numbers of two bytes, [256, 256]: infinities, NaN, subnormals and both zeros among them."""
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).reshape(256, 256)


def random_numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def narrow_numbers_stay(dtype: torch.dtype) -> None:
    """W' is W where the delta is 0, bit for bit."""
    given = every_number(dtype)
    got = rounded(given.float(), dtype)
    number = ~given.isnan()
    assert torch.equal(got.view(torch.int16)[number], given.view(torch.int16)[number])
    assert got[~number].isnan().all()


def not_a_number_stays(dtype: torch.dtype) -> None:
    """Whatever its bits: those of a GPU's NaN are all ones, and one more would make them a zero."""
    bits = torch.tensor([0x7FFFFFFF, 0x7FC00000, 0x7F800001, -1, -0x400000], dtype=torch.int32)
    assert rounded(bits.view(torch.float32).repeat(512, 100), dtype).isnan().all()


def one_of_two_neighbours(dtype: torch.dtype) -> None:
    """Of a number between two that the dtype holds, one of these: an error below one ulp."""
    wide = random_numbers(512, 512).exp() * random_numbers(512, 512, seed=1)
    wide = wide[(wide.abs() > torch.finfo(dtype).tiny)].repeat(1, 1)
    error = (rounded(wide, dtype).float() - wide).abs()
    assert (error < torch.finfo(dtype).eps * torch.exp2(wide.abs().log2().floor())).all()


def no_bias(dtype: torch.dtype) -> None:
    """Of a number a part f of the way from one to the next, a part f of the elements goes on: within five standard
    deviations of as many coins; for either sign, and in parts of the matrix as in all of it."""
    for f in (0.002, 0.1, 0.3, 0.5, 0.9, 0.998):
        for one in (1.0, -1.0):
            wide = torch.full((512, 300), one * (1 + f * torch.finfo(dtype).eps))
            up = rounded(wide, dtype) != one
            for part in (up, up[:64], up[:, :64], up[::2], up[:, ::2]):
                expected, coins = f * part.numel(), part.numel() * f * (1 - f)
                assert abs(part.sum() - expected) < 5 * coins**0.5, (f, one)


def no_pattern(dtype: torch.dtype) -> None:
    """The noise of W' is white: no wave of it is stronger than the strongest of random noise ever is."""
    for shape in ((256, 256), (300, 200), (64, 1024)):
        noise = (rounded(torch.full(shape, 1 + 0.5 * torch.finfo(dtype).eps), dtype) != 1).double()
        power = torch.fft.fft2(noise - noise.mean()).abs().square() / noise.var() / noise.numel()
        strongest = torch.tensor(
            float(noise.numel())
        ).log()  # of as many exponential variables; e⁻⁷ that one is 7 above
        assert power.max() < strongest + 7


def of_the_element(dtype: torch.dtype) -> None:
    """The transpose of W' is W' of the transpose; strides do not matter."""
    for shape in ((96, 64), (3, 40, 56)):
        wide = random_numbers(*shape)
        want = rounded(wide, dtype)
        assert torch.equal(rounded(wide.mT.contiguous(), dtype, transposed=True), want.mT)
        assert torch.equal(rounded(wide.mT, dtype, transposed=True), want.mT)
        assert torch.equal(rounded(wide.mT.contiguous().mT, dtype), want)


def the_largest_stay_finite(dtype: torch.dtype) -> None:
    """Beyond the largest number as to nearest; of fp16, whose range fp32 exceeds by far, the largest itself."""
    most = torch.finfo(dtype).max
    lower = most * (1 - 0.3 * torch.finfo(dtype).eps)
    assert rounded(torch.full((256, 256), lower), dtype).isfinite().all()
    wide = torch.tensor([most * (1 + torch.finfo(dtype).eps / 8), -most, torch.inf, -torch.inf])
    assert torch.equal(rounded(wide.repeat(512, 64), dtype), wide.to(dtype).repeat(512, 64))
    for how in rounding.ROUNDINGS:
        far = rounded(torch.tensor([[7e4, -1e30, torch.inf, -torch.inf]]), torch.float16, how)
        assert far.tolist() == [[65504, -65504, torch.inf, -torch.inf]]


PROPERTIES: list[Callable[[torch.dtype], None]] = [
    *(narrow_numbers_stay, not_a_number_stays, one_of_two_neighbours, no_bias, no_pattern, of_the_element),
    the_largest_stay_finite,
]


def holds() -> bool:
    """All of it, in both dtypes."""
    try:
        for check in PROPERTIES:
            for dtype in HALVES:
                check(dtype)
    except AssertionError:
        return False
    return True
