"""What lossy keeps do to gradients, measured: the same call with and without them, its graphs run by eager ops."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from peft_fx import compat, compiling
from peft_fx.compat import pytree
from peft_fx.options import Options
from peft_fx.reports import GradientError
from peft_fx.tracing import call_compiled


def gradient_errors(
    model: Any, args: Sequence[Any], kwargs: Mapping[str, Any], options: Options
) -> list[GradientError]:
    """Of every trained parameter that the call's loss depends on: its output's `loss`, or all its floating-point
    tensors against the same random numbers. Raises TypeError where there is nothing real to compute with."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError("explain(measure=True) needs a module: the gradients are those of its parameters")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    given = [*trained.values(), *(t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor))]
    if not trained or any(t.is_meta or isinstance(t, compat.FakeTensor) for t in given):
        raise TypeError("explain(measure=True) computes gradients: it needs trained parameters, and real numbers")
    exact, lossy = (
        _gradients(model, args, kwargs, trained, replace(options, keep=keep, lowering="aot_eager"))
        for keep in ("recompute", options.keep)
    )
    return [_error(name, exact[name], lossy[name]) for name in trained if exact[name] is not None]


def _gradients(
    model: torch.nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    trained: Mapping[str, torch.Tensor],
    options: Options,
) -> dict[str, Any]:
    def lowered(gm: Any, example_inputs: Sequence[Any]) -> Any:
        return compiling.lower(gm, example_inputs, options)

    with compat.forgetting(), left_as_it_was(model), torch.enable_grad():
        torch.manual_seed(0)
        output = call_compiled(model, tuple(args), kwargs, lowered, "explain")
        found = torch.autograd.grad(_loss(output), list(trained.values()), allow_unused=True)
    return dict(zip(trained, found, strict=True))


@contextmanager
def left_as_it_was(model: torch.nn.Module) -> Iterator[None]:
    """The gradients, the modes of all modules, the buffers and the random state."""
    gradients = {p: p.grad for p in model.parameters()}
    modes = {m: m.training for m in model.modules()}
    buffers = {b: b.clone() for b in model.buffers()}
    devices = {p.device.index for p in gradients if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices)):
        try:
            yield
        finally:
            for p, grad in gradients.items():
                p.grad = grad
            for m, mode in modes.items():
                m.training = mode
            with torch.no_grad():
                for b, was in buffers.items():
                    b.copy_(was)


def named_loss(output: Any) -> torch.Tensor | None:
    """A model's output's own loss, as transformers' models have one."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return loss if isinstance(loss, torch.Tensor) else None


def _loss(output: Any) -> torch.Tensor:
    loss = named_loss(output)
    if loss is not None:
        return loss.sum()
    tensors = [t for t in pytree.tree_leaves(output) if isinstance(t, torch.Tensor) and t.requires_grad]
    generator = torch.Generator().manual_seed(0)
    return torch.stack(
        [(t.float() * torch.randn(t.shape, generator=generator).to(t.device)).sum() for t in tensors]
    ).sum()


def _error(name: str, exact: torch.Tensor, lossy: torch.Tensor) -> GradientError:
    a, b = exact.double().flatten(), lossy.double().flatten()
    size = a.norm().clamp_min(1e-300)
    cosine = torch.dot(a, b) / (size * b.norm().clamp_min(1e-300))
    return GradientError(name, float((b - a).norm() / size), float(cosine) if torch.any(a != b) else 1.0)
