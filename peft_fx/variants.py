"""The ways to train a model that are told apart: what each makes of the model, and what options it is compiled with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from peft_fx import preparing
from peft_fx.components import ADAPTERS
from peft_fx.options import PREFIX, Options, parse
from peft_fx.outputs import loss_only
from peft_fx.passes.keep.policies import POLICIES


class LeftOut(ValueError):
    """Why a variant cannot be had of a model."""


def _as_it_is(model: nn.Module) -> nn.Module:
    return model


def _without_adapters(model: nn.Module) -> nn.Module:
    """The base, nothing trained: by PEFT's `unload`, which other libraries have too."""
    if hasattr(model, "unload"):
        base: nn.Module = model.unload()
        return base.requires_grad_(False)
    trained = [p.requires_grad for p in model.parameters()]
    if any(trained) and not all(trained):
        raise LeftOut("the model has no unload() that takes its adapters off")
    return model.requires_grad_(False)


def _frozen(model: nn.Module) -> nn.Module:
    """No adapters, and a gradient down to the embeddings: what the base costs an adapter in the first layer."""
    model = _without_adapters(model)
    if not hasattr(model, "get_input_embeddings"):
        raise LeftOut("the model has no get_input_embeddings(), down to which a gradient would go")
    first = model.get_input_embeddings()
    weight = next(first.parameters())
    shift = nn.Parameter(torch.zeros((), dtype=weight.dtype, device=weight.device))
    for embeddings in {m for m in model.modules() if next(m.parameters(recurse=False), None) is weight} | {first}:
        embeddings.shift = shift
        embeddings.register_forward_hook(_shifted)
    return model


def _shifted(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
    return output + module.shift


def _full(model: nn.Module) -> nn.Module:
    return _without_adapters(model).requires_grad_(True)


def _checkpointed(model: nn.Module) -> nn.Module:
    """Each layer keeps its input alone, and is computed again in backward; without checkpointing's graph break."""
    if not hasattr(model, "gradient_checkpointing_enable"):
        raise LeftOut("the model has no gradient_checkpointing_enable()")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return preparing.prepare(model)


@dataclass(frozen=True)
class Variant:
    """One way to train: `prepare` makes its model of a copy of the one given; `options` are ours beside those given,
    None for Inductor alone; `trains` is the component of what only gradients of parameters read; `prices` are those of
    a byte kept, in passes over it, at each of which the step is reckoned. What is not compiled keeps all that backward
    reads, and is reckoned with Inductor's kernels: its time is below eager mode's."""

    prepare: Callable[[nn.Module], nn.Module] = _as_it_is
    options: Mapping[str, Any] | None = None
    trains: str = ADAPTERS
    prices: tuple[float, ...] = (0.0,)
    compiles: bool = True


PRICES = (0.0, *(2.0**i for i in (*range(3, 9), 10, 12)))  # to sum K numbers takes as long as 0.005 to 0.02 K passes
VARIANTS: Mapping[str, Variant] = {
    "eager": Variant(compiles=False),
    "inductor": Variant(),
    "peft_fx": Variant(options={}),
    **{f"peft_fx-{keep}": Variant(options={f"{PREFIX}keep": keep}) for keep in POLICIES},
    "peft_fx-loss": Variant(loss_only, {}),
    "inductor-ckpt": Variant(_checkpointed),
    "peft_fx-ckpt": Variant(_checkpointed, {}),
    "peft_fx-ckpt-loss": Variant(lambda model: loss_only(_checkpointed(model)), {}),
    "peft_fx-budget": Variant(options={}, prices=PRICES),
    "peft_fx-loss-budget": Variant(loss_only, {}, prices=PRICES),
    "full": Variant(_full, trains="trained weights"),
    "frozen": Variant(_frozen),
}
WITHIN = tuple(name for name, variant in VARIANTS.items() if len(variant.prices) > 1)  # a budget
EXACT = tuple(  # compiled, no lossy keep, no budget
    name
    for name, variant in VARIANTS.items()
    if variant.compiles and name.removeprefix("peft_fx-") not in POLICIES and name not in WITHIN
)


class Way(NamedTuple):
    """A variant, where a byte kept costs as much as so many passes over it."""

    name: str
    price: float


def options_of(variant: Variant, given: Mapping[str, Any]) -> Options | None:
    """Ours, if any, without a budget: by its price a choice is the same at both depths of a deep model."""
    return None if variant.options is None else replace(parse({**given, **variant.options}), memory_budget=None)


def by_preparation(names: Iterable[str]) -> dict[Any, list[str]]:
    """The names of variants by what makes their model: those of one are traced together."""
    found: dict[Any, list[str]] = {}
    for name in names:
        found.setdefault(VARIANTS[name].prepare, []).append(name)
    return found
