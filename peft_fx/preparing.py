"""`prepare`: PEFT's adapters without the graph breaks that have nothing to do with what they compute, in the models of
transformers that have them.

What is broken, and what cures it, is in `curing`. A cured layer is of a subclass of its own class; `restore` gives each
its class back. Hooks that need not be traced are wrapped.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from peft_fx.curing import TABLE, Break, Cured, subclass
from peft_fx.outputs import needs_module, with_all_outputs

log = logging.getLogger("peft_fx")
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Cure:
    """One module that `prepare` cures: its name, what breaks the graph there, and what is traced instead."""

    name: str
    broke: str
    done: str


def prepare(model: Model) -> Model:
    """Cures the graph breaks known in PEFT's adapters, and in models of transformers around them and their losses, in
    place, and returns the model; `cures` lists what was done.

    Parameters, buffers and the keys of the state dict stay as they are, copies of the model are prepared too, and a
    second call finds nothing left to do; call it again after adding an adapter. Eager mode runs PEFT's code as before.
    What torch.compile traces computes the same, with these differences:

    - LoHa and LoKr do not draw the random number that they would compare with a module_dropout of 0, so what is drawn
      after it is another draw. (In eager mode they skip the adapter where it is exactly 0, once in 2²⁴ draws.)
    - FRoD multiplies by its sparse factor as a dense matrix, as PEFT does in half precision: the sum is rounded in
      another order.
    - aLoRA's adapter is computed for all tokens and multiplied by a mask, so that its sums over tokens are rounded in
      another order, and its dropout draws for more tokens.
    - VB-LoRA's check of its logits and Poly's of its tasks are assertions in the graph; on a GPU they fail as those do,
      for the whole process.

    The hook by which gradient checkpointing has the embeddings' output require a gradient is left out too, where no
    checkpoint is reentrant: only those need it.

    VeLoRA's init_type "batch_average_once" compiles twice, for its first step and for the others.

    Writes one line of level INFO to the logger "peft_fx". Raises TypeError for what is not a torch.nn.Module, and for
    what torch.compile returned.
    """
    counts: Counter[str] = Counter()
    left = []
    for name, owner, row in list(_matches(model, "prepare")):
        if row.cured is None:
            left.append(f"left {name} as it is ({row.broke}: {row.done})")
        else:
            counts[f"{type(owner).__module__}.{type(owner).__qualname__}"] += 1
            owner.__class__ = subclass(row.cured, type(owner))
    for _, module, key in _requiring_hooks(model):
        module._forward_hooks[key] = EagerHook(module._forward_hooks[key])
        counts["hook of gradient checkpointing"] += 1
    said = [f"cured {n} × {kind}" for kind, n in counts.items()] + left
    log.info("prepare: %s", "; ".join(said) or "nothing to cure")
    return model


def restore(model: Model) -> Model:
    """Undoes `prepare` and `loss_only`, in place, and returns the model. Raises TypeError for what is not a
    torch.nn.Module, and for what torch.compile returned."""
    for _, _, owner in _owners(model, "restore"):
        if isinstance(owner, Cured):
            owner.__class__ = owner._original
    for _, module, key, hook in _eager_hooks(model):
        module._forward_hooks[key] = hook.hook
    with_all_outputs(model)
    return model


def cures(model: nn.Module) -> list[Cure]:
    """What `prepare` did to a model, module by module. Raises TypeError for what is not a torch.nn.Module, and for what
    torch.compile returned."""
    found: dict[Cure, None] = {}
    for name, _, owner in _owners(model, "cures"):
        if isinstance(owner, Cured):
            row = next(r for r in TABLE if r.cured in type(owner).__bases__ and r.matches(owner._original))
            found[Cure(name, row.broke, row.done)] = None  # once for a layer with several adapters
    return [*found, *(Cure(name, *EagerHook.broke_and_done) for name, *_ in _eager_hooks(model))]


def curable(model: nn.Module) -> list[str]:
    """The names of the modules that `prepare` would cure."""
    broken = [name for name, _, row in _matches(model, "prepare") if row.cured is not None]
    return list(dict.fromkeys([*broken, *(name for name, *_ in _requiring_hooks(model))]))


def _matches(model: nn.Module, caller: str) -> Iterator[tuple[str, Any, Break]]:
    """What in a model breaks graphs and is not cured yet, with the first row of the table that is about it."""
    for name, layer, owner in _owners(model, caller):
        row = next((row for row in TABLE if row.matches(type(owner)) and row.applies(layer)), None)
        if row is not None and not isinstance(owner, Cured):
            yield name, owner, row


def _owners(model: nn.Module, caller: str) -> Iterator[tuple[str, nn.Module, Any]]:
    """Whatever may hold code of PEFT's, after the name and the layer that it belongs to: each module, and the objects
    that vary a LoRA layer."""
    needs_module(model, caller)
    for name, module in model.named_modules():
        yield name, module, module
        for variant in getattr(module, "lora_variant", {}).values():
            yield name, module, variant


class EagerHook:
    """A forward hook that is not traced."""

    names = ("make_inputs_require_grads", "make_inputs_require_grad")  # transformers' and PEFT's
    broke_and_done = (
        "output.requires_grad_(), the hook of gradient checkpointing",
        "no hook: a checkpoint that is not reentrant needs none",
    )

    def __init__(self, hook: Callable[..., Any]):
        self.hook = hook

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return None if torch.compiler.is_compiling() else self.hook(module, args, output)


def _requiring_hooks(model: nn.Module) -> Iterator[tuple[str, nn.Module, int]]:
    """Hooks that make the embeddings' output require a gradient, where no checkpoint needs that. A reentrant one does:
    a graph break inside of it would leave its layers without gradients."""
    checkpoints = [f for m in model.modules() if (f := getattr(m, "_gradient_checkpointing_func", None)) is not None]
    if any(getattr(f, "keywords", {}).get("use_reentrant") is not False for f in checkpoints):
        return
    for name, module in model.named_modules():
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__name__", "") in EagerHook.names:
                yield name, module, key


def _eager_hooks(model: nn.Module) -> Iterator[tuple[str, nn.Module, int, EagerHook]]:
    for name, module in model.named_modules():
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, EagerHook):
                yield name, module, key, hook
