"""Two oracles for a rewrite: bit-equality on integers that nothing rounds, and a gate against fp64 for floats."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

import peft_fx
from peft_fx.checking import Widening
from peft_fx.copying import Casts

EAGER = {"peft_fx.lowering": "aot_eager"}
WEIGHT = EAGER | {"peft_fx.form": "weight"}
# Adapter gradients in fp32 of inputs in bf16 are made of pairs of bf16 numbers, 16 bits. Where x and dy have been
# through no rounding of their own, as in a single layer, eager's fp32 products are nearer still.
PAIR = 2.0**-16

GATE = 1.25  # an error over that of eager mode
FLOOR = 4.0  # roundings of its dtype that a tensor of few elements may err on top

Inputs = tuple | Mapping  # positional or keyword arguments of a module


@dataclass(frozen=True)
class Run:
    """What one forward and one backward gave; a gradient that does not exist is None."""

    y: list[Tensor]
    inputs: list[Tensor | None]
    params: dict[str, Tensor | None]

    def items(self) -> Iterable[tuple[str, Tensor | None]]:
        yield from ((f"output {i}", y) for i, y in enumerate(self.y))
        yield from ((f"gradient of input {i}", g) for i, g in enumerate(self.inputs))
        yield from ((f"gradient of {name}", g) for name, g in self.params.items())


def leaves(tree) -> list[Tensor]:
    """The floating-point tensors of an output or an argument list, in order."""
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor) and t.is_floating_point()]


def integers(target: nn.Module | Inputs, seed: int = 0, bound: int = 2):
    """Fills all parameters of a module, or all tensors of an argument list, with integers in -bound..bound."""
    g = torch.Generator().manual_seed(seed)
    tensors = target.parameters() if isinstance(target, nn.Module) else leaves(target)
    with torch.no_grad():
        for t in tensors:
            t.copy_(torch.randint(-bound, bound + 1, t.shape, generator=g))
    return target


def to_dtype(inputs: Inputs, dtype: torch.dtype | None) -> Inputs:
    """The floating-point arguments as new leaves of that dtype (None: their own), strides kept."""

    def leaf(t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return t
        return t.detach().to(dtype or t.dtype, copy=True).requires_grad_(t.requires_grad)

    return tree_map_only(Tensor, leaf, inputs)


def apply(f: Callable, inputs: Inputs):
    return f(**inputs) if isinstance(inputs, Mapping) else f(*inputs)


def weight_form(module: nn.Module, **options) -> Callable:
    """The module compiled with every adapter in weight form, its graphs run by eager ops."""
    return torch.compile(module, backend=peft_fx.backend, options=WEIGHT | options)


def signs(y: Tensor, seed: int) -> Tensor:
    """A cotangent of ±1: exact in every dtype, so fp64 and bf16 see the same one."""
    g = torch.Generator().manual_seed(seed)
    return (2 * torch.randint(0, 2, y.shape, generator=g) - 1).to(y.dtype)


def numbers(y: Tensor, seed: int) -> Tensor:
    """A cotangent of normal numbers that bf16 holds: a product with one rounds, where a product with ±1 does not."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(y.shape, generator=g).bfloat16().to(y.dtype)


Draw = Callable[[Tensor, int], Tensor]


def run(f: Callable, module: nn.Module, inputs: Inputs, cotangent: int | list[Tensor] = 7, draw: Draw = signs) -> Run:
    """One forward and backward of `f` (`module` itself or its compiled form); a number seeds the cotangents drawn."""
    inputs = to_dtype(inputs, None)
    module.zero_grad(set_to_none=True)
    y = leaves(apply(f, inputs))
    if isinstance(cotangent, int):
        cotangent = [draw(t, cotangent + i) for i, t in enumerate(y)]
    pairs = [(t, c) for t, c in zip(y, cotangent, strict=True) if t.requires_grad]
    if pairs:
        torch.autograd.backward(*zip(*pairs, strict=True))
    grads = {name: p.grad for name, p in module.named_parameters()}
    module.zero_grad(set_to_none=True)
    return Run([t.detach() for t in y], [t.grad for t in leaves(inputs)], grads)


def pairs(want: Run, *others: Run):
    """(name, tensors) of runs of one module, whose names and None-ness must agree: a lost gradient is a failure."""
    for (name, w), *rest in zip(want.items(), *(o.items() for o in others), strict=True):
        for other, o in rest:
            assert other == name
            assert (o is None) == (w is None), f"{name}: expected {kind(w)}, got {kind(o)}"
        if w is not None:
            yield name, w, *(o for _, o in rest)


def kind(t: Tensor | None) -> str:
    return "None" if t is None else f"{t.dtype} {list(t.shape)}"


def assert_bit_equal(got: Run, want: Run) -> None:
    """The same None-ness, dtypes, shapes and values."""
    for name, w, g in pairs(want, got):
        assert kind(g) == kind(w), f"{name}: expected {kind(w)}, got {kind(g)}"
        assert torch.equal(g, w), (
            f"{name}: {int((g != w).sum())} of {g.numel()} differ, by up to {(g - w).abs().max():.3g}"
        )


def rms(t: Tensor) -> float:
    return t.double().square().mean().sqrt().item() if t.numel() else 0.0


@dataclass(frozen=True)
class Errors:
    """Of one tensor the root mean squares of its true values and of the errors of eager mode and of what is judged."""

    name: str
    size: float
    eager: float
    got: float
    eps: float  # one rounding of the dtype, relative
    few: bool  # under 1000 elements: the ratio of two errors is noise there

    def allowed(self, factor: float, floor: float = FLOOR, resolution: float = 0.0) -> float:
        return factor * self.eager + (floor * self.eps * self.few + resolution) * self.size

    @property
    def ratio(self) -> float:
        """The error over eager's, without the roundings that few elements are allowed on top."""
        spare = FLOOR * self.eps * self.size * self.few
        return max(0.0, self.got - spare) / max(self.eager, 1e-3 * self.eps * self.size, 1e-300)


def errors(ref64: Run, eager: Run, got: Run) -> Iterable[Errors]:
    """Of y and every gradient, which must be of the same kind as in eager mode, and finite where it is there."""
    for name, r, e, g in pairs(ref64, eager, got):
        assert kind(g) == kind(e), f"{name}: expected {kind(e)}, got {kind(g)}"
        assert torch.equal(g.isfinite(), e.isfinite()), f"{name}: finiteness differs"
        yield Errors(name, rms(r), rms(e - r), rms(g - r), torch.finfo(g.dtype).eps, g.numel() < 1000)


def assert_no_worse(
    ref64: Run, eager: Run, got: Run, factor: float = GATE, floor: float = FLOOR, resolution: float = 0.0
) -> float:
    """Against fp64, y and every gradient err at most `factor` times as much as in eager; returns the worst ratio.

    Under 1000 elements the ratio is noise, so there `floor` roundings of the dtype are allowed on top. `resolution`
    is a relative error allowed in any case.
    """
    worst = 0.0
    for e in errors(ref64, eager, got):
        allowed = e.allowed(factor, floor, resolution)
        assert e.got <= allowed, f"{e.name}: error {e.got:.3g} is over {allowed:.3g} ({e.eager:.3g} in eager)"
        worst = max(worst, 0.0 if e.few else e.ratio)
    return worst


def exact(module: nn.Module) -> nn.Module:
    """A copy of the module in fp64, casts of PEFT included."""
    ref = copy.deepcopy(module).double()
    for m in ref.modules():
        if hasattr(m, "cast_input_dtype_enabled"):
            m.cast_input_dtype_enabled = True
    return ref


class Double(Widening):
    """Casts that a module is written with become casts to fp64."""

    def __init__(self) -> None:
        super().__init__(torch.float64)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        widened = {torch.complex64: torch.complex128}
        args, kwargs = tree_map_only(torch.dtype, lambda d: widened.get(d, d), (args, kwargs or {}))
        if getattr(func, "__name__", "") in ("_grouped_mm", "grouped_mm"):  # has no fp64
            return grouped(*args, **kwargs)
        return super().__torch_function__(func, types, args, kwargs)


def grouped(x: Tensor, W: Tensor, offs: Tensor, **_: object) -> Tensor:
    """x's rows times W [groups, K, N], each by the W of its group; `offs` are where the groups end."""
    ends = offs.tolist()
    return torch.cat([x[a:b] @ w for a, b, w in zip([0, *ends], ends, W, strict=False)])


def run_exactly(module: nn.Module, inputs: Inputs, cotangent: int = 7, draw: Draw = signs) -> Run:
    """The same step in fp64, whatever the module casts to."""
    ref = Casts(torch.float64)(module).double()
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with Double():
            return run(ref, ref, to_dtype(inputs, torch.float64), cotangent, draw)
    finally:
        torch.set_default_dtype(default)


@torch.no_grad()
def shuffle(module: nn.Module, seed: int) -> None:
    """New parameters of the same distribution: each one's elements in another order."""
    g = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.copy_(p.flatten()[torch.randperm(p.numel(), generator=g)].view_as(p))


def stack(runs: list[Run]) -> Run:
    """Runs of one module as one run, tensors stacked."""

    def over(tensors):
        return None if tensors[0] is None else torch.stack(tensors)

    lists = ([over(t) for t in zip(*column, strict=True)] for column in ([r.y for r in runs], [r.inputs for r in runs]))
    return Run(*lists, {name: over([r.params[name] for r in runs]) for name in runs[0].params})


def pooled(draw: Callable[[int], tuple[Run, ...]], seeds: int = 8) -> list[Run]:
    """The runs that `draw` makes of one seed, each over all seeds: for what one draw would decide by chance."""
    return [stack(list(runs)) for runs in zip(*map(draw, range(seeds)), strict=True)]


def gate(
    f: Callable,
    module: nn.Module,
    inputs: Inputs,
    eager: Callable | None = None,
    seeds: int = 8,
    resolution: float = 0.0,
    draw: Draw = signs,
    factor: float = GATE,
) -> float:
    """`f`, a compiled form of `module`, is no further from fp64 than `eager` (the module); returns the worst ratio.

    The errors in one gradient are few and correlated: the ideal weight form, written by hand, reaches ratios of
    2 and more in single draws of a two-layer transformer. Pooled over `seeds` draws of the parameters: under 1.25.
    """

    def once(seed: int) -> tuple[Run, ...]:
        shuffle(module, seed)
        return run_exactly(module, inputs, seed, draw), *(
            run(g, module, inputs, seed, draw) for g in (eager or module, f)
        )

    return assert_no_worse(*pooled(once, seeds), factor, resolution=resolution)
