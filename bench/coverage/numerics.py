"""The error of a compiled model against float64, as a multiple of the same model's error in eager mode."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from bench.coverage.adapters import NOISE, disturb
from peft_fx.copying import Casts

Run = dict[str, Tensor | None]
WIDER = {
    torch.float32: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float16: torch.float64,
    torch.complex64: torch.complex128,
}
ROUNDINGS = 4  # of its dtype that a small tensor may err on top: the ratio of two errors is noise there
SMALL = 1000
GATE = 1.25  # up to this, an error is held to be no worse


class Double(TorchFunctionMode):
    """Casts to narrower dtypes, which some adapters are written with, become casts to float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = {Tensor.float: Tensor.double, Tensor.half: Tensor.double, Tensor.bfloat16: Tensor.double}.get(func, func)
        args, kwargs = tree_map(lambda a: WIDER.get(a, a) if isinstance(a, torch.dtype) else a, (args, kwargs or {}))
        if getattr(func, "__name__", "") in ("_grouped_mm", "grouped_mm"):  # has no float64
            return _grouped(*args, **kwargs)
        return func(*args, **kwargs)


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
    squares: dict[str, Tensor] = defaultdict(lambda: torch.zeros(4, dtype=torch.float64))
    for seed in range(draws):
        draw(model, start, seed, noise)
        given = shuffled(inputs, seed)
        exact = reference(model, given, seed)
        for name, *found in _together(exact, step(model, model, given, seed), step(compiled, model, given, seed)):
            squares[name] += _squares(*found)
    eps = torch.finfo(next(iter(start.values())).dtype).eps
    ratios = {name: _ratio(found, eps) for name, found in squares.items()}
    worst = max(ratios, key=ratios.__getitem__)
    return {"ratio": round(ratios[worst], 3), "tensor": worst}


@torch.no_grad()
def draw(model: nn.Module, start: Mapping[str, Tensor], seed: int, noise: float = NOISE) -> None:
    """Other parameters of the same distribution: noise on the trained ones, the frozen ones' elements reordered."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name in start and not parameter.requires_grad:
            order = torch.randperm(parameter.numel(), generator=generator)
            parameter.copy_(start[name].flatten()[order].view_as(parameter))
        elif name in start:
            parameter.copy_(start[name])
    disturb(model, seed, noise)


def _squares(exact: Tensor, eager: Tensor, got: Tensor) -> Tensor:
    """Sums of squares of the values and of both errors, and the number of elements."""
    assert torch.equal(got.isfinite(), eager.isfinite()), "not finite where eager mode is, or the other way round"
    sums = [t.double().square().sum() for t in (exact, eager - exact, got - exact)]
    return torch.stack([*sums, torch.tensor(float(exact.numel()))])


def _ratio(squares: Tensor, eps: float) -> float:
    value, eager, got = (squares[:3] / squares[3].clamp(min=1)).sqrt().tolist()
    spare = ROUNDINGS * eps * value if squares[3] < SMALL else 0.0
    return float(max(0.0, got - spare) / max(eager, 1e-3 * eps * value, 1e-300))


def _together(exact: Run, eager: Run, got: Run) -> list[tuple[Any, ...]]:
    found = []
    for name, want in eager.items():
        other = got[name]
        assert (want is None) == (other is None), f"{name} is {'lost' if other is None else 'new'}"
        if want is not None and other is not None:
            assert (want.dtype, want.shape) == (other.dtype, other.shape), f"{name} is of another kind"
            found.append((name, exact[name], want, other))
    return found


def reference(model: nn.Module, inputs: Mapping[str, Any], seed: int) -> Run:
    """The same step in float64."""
    exact = Casts(torch.float64)(model).double()
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with Double():
            return step(exact, exact, _mapped(inputs, lambda t: t.double() if t.is_floating_point() else t), seed)
    finally:
        torch.set_default_dtype(default)


def step(f: Callable[..., Any], model: nn.Module, inputs: Mapping[str, Any], seed: int) -> Run:
    """Outputs and gradients of one forward and backward, of the inputs too; the cotangents are ±1."""
    given = _mapped(inputs, lambda t: t)
    torch.manual_seed(seed)
    y = floats(f(**given))
    torch.autograd.backward([t for t in y if t.requires_grad], [signs(t, seed) for t in y if t.requires_grad])
    outputs = {f"output {i}": t.detach() for i, t in enumerate(y)}
    of_inputs = {f"gradient of input {i}": t.grad for i, t in enumerate(floats(given))}
    of_parameters = {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return {**outputs, **of_inputs, **of_parameters}


def _mapped(inputs: Mapping[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """New leaves, which need a gradient where the given ones do."""

    def leaf(t: Tensor) -> Tensor:
        return change(t.detach().clone()).requires_grad_(t.requires_grad)

    return tree_map_only(Tensor, leaf, dict(inputs))  # type: ignore[no-any-return]


def floats(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor) and t.is_floating_point()]


def signs(y: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randint(0, 2, y.shape, generator=generator) - 1).to(y.dtype)


def shuffled(inputs: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The inputs with their elements in another order."""
    generator = torch.Generator().manual_seed(seed)

    def shuffle(t: Tensor) -> Tensor:
        order = torch.randperm(t.numel(), generator=generator)
        return t.flatten()[order].view_as(t)

    return _mapped(inputs, shuffle)


def draws_random_numbers(model: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Whether the seed matters to a forward."""
    found = []
    for seed in (0, 0, 1):  # the first call of some methods sets them up
        torch.manual_seed(seed)
        found.append(floats(model(**_mapped(inputs, lambda t: t))))
    return any(not torch.equal(a, b) for a, b in zip(*found[1:], strict=True))
