"""The error of a compiled model against float64, as a multiple of the same model's error in eager mode: by the oracle
of the tests, on models whose own casts would keep them from float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from peft_fx.checking import Widening
from peft_fx.copying import Casts
from tests.oracle import GATE, Run, errors, leaves, pooled, run, to_dtype
from zoo.noise import NOISE, disturb

__all__ = ["GATE", "draws_random_numbers", "gate", "step"]


class Double(Widening):
    """Casts to narrower dtypes, which some adapters are written with, become casts to float64."""

    def __init__(self) -> None:
        super().__init__(torch.float64)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(torch.dtype, _wider, (args, kwargs or {}))
        if getattr(func, "__name__", "") in ("_grouped_mm", "grouped_mm"):  # has no float64
            return _grouped(*args, **kwargs)
        return super().__torch_function__(func, types, args, kwargs)


def _wider(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype == torch.complex64 else dtype


def _grouped(x: Tensor, W: Tensor, offs: Tensor, **_: Any) -> Tensor:
    """x's rows times W [groups, K, N], each by the W of its group; `offs` are where the groups end."""
    ends = offs.tolist()
    return torch.cat([x[a:b] @ w for a, b, w in zip([0, *ends], ends, W, strict=False)])


def gate(
    model: nn.Module, compiled: Callable[..., Any], inputs: Mapping[str, Any], draws: int, noise: float = NOISE
) -> dict[str, Any]:
    """{"ratio": the worst over the output and every gradient, "tensor": its name}, errors pooled over several draws of
    the trained parameters and the inputs; {"ratio": None} where the model itself draws random numbers. The model comes
    with NOISE on its trained parameters, of which `noise` stays.

    Raises AssertionError where a gradient is lost, or where one is not finite that is in eager mode.
    """
    if draws_random_numbers(model, inputs):
        return {"ratio": None}
    disturb(model, 0, noise - NOISE)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.is_floating_point()}

    def once(seed: int) -> tuple[Run, ...]:
        draw(model, start, seed, noise)
        given = shuffled(inputs, seed)
        return reference(model, given, seed), step(model, model, given, seed), step(compiled, model, given, seed)

    worst = max(errors(*pooled(once, draws)), key=lambda e: e.ratio)
    return {"ratio": round(worst.ratio, 3), "tensor": worst.name}


@torch.no_grad()
def draw(model: nn.Module, start: Mapping[str, Tensor], seed: int, noise: float = NOISE) -> None:
    """Other parameters of the same distribution: noise on the trained ones, the frozen ones' elements reordered."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name in start:
            parameter.copy_(start[name] if parameter.requires_grad else _reordered(start[name], generator))
    disturb(model, seed, noise)


def _reordered(t: Tensor, generator: torch.Generator) -> Tensor:
    return t.flatten()[torch.randperm(t.numel(), generator=generator)].view_as(t)


def shuffled(inputs: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The inputs with their elements in another order, as leaves that need a gradient where the given ones do."""
    generator = torch.Generator().manual_seed(seed)

    def shuffle(t: Tensor) -> Tensor:
        return _reordered(t.detach(), generator).requires_grad_(t.requires_grad)

    return tree_map_only(Tensor, shuffle, dict(inputs))


def reference(model: nn.Module, inputs: Mapping[str, Any], seed: int) -> Run:
    """The same step in float64."""
    exact = Casts(torch.float64)(model).double()
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with Double():
            return step(exact, exact, to_dtype(inputs, torch.float64), seed)
    finally:
        torch.set_default_dtype(default)


def step(f: Callable[..., Any], model: nn.Module, inputs: Mapping[str, Any], seed: int) -> Run:
    """Outputs and gradients of one forward and backward, of the inputs too; the cotangents are ±1."""
    torch.manual_seed(seed)
    return run(f, model, inputs, seed)


def draws_random_numbers(model: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Whether the seed matters to a forward."""
    found = []
    for seed in (0, 0, 1):  # the first call of some methods sets them up
        torch.manual_seed(seed)
        found.append(leaves(model(**to_dtype(inputs, None))))
    return any(not torch.equal(a, b) for a, b in zip(*found[1:], strict=True))
