"""What a model returns: the loss alone, so that its logits need not exist."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from peft_fx import compat


class LossOnly:
    """What a class that returns a loss alone can be known by; `_all_outputs` is the class that it was made of."""

    _all_outputs: type[nn.Module]


def loss_only(model: nn.Module) -> nn.Module:
    """The same model, which from now on returns nothing beside a loss that it is trained on: no logits, no caches.

    An output with a `loss` becomes one of the same class with that alone; of a tuple, from a call with labels, the
    first item stays. Where there is no loss, as in generation, and where gradients are off, as in evaluation, outputs
    are what they were. Parameters, the class's name and the signature of `forward` are the model's own, so Trainer,
    PEFT and checkpoints see no difference; call it before torch.compile. `restore(model)` undoes it. Raises TypeError
    for what is not a torch.nn.Module, and for what torch.compile returned.
    """
    needs_module(model, "loss_only")
    if not isinstance(model, LossOnly):
        cls: Any = type(model)
        model.__class__ = _losing(cls)
        _settle_losses(model)
    return model


def needs_module(model: Any, caller: str) -> None:
    """Raises TypeError for what is no module, and for what torch.compile returned, whose class is not the model's."""
    if isinstance(model, compat.OptimizedModule):
        raise TypeError(f"{caller}() takes a torch.nn.Module that is not yet compiled: torch.compile({caller}(model))")
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{caller}() takes a torch.nn.Module, such as get_peft_model() gives; got {type(model).__name__}"
        )


def with_all_outputs(model: nn.Module) -> None:
    """Undoes `loss_only`."""
    if isinstance(model, LossOnly):
        model.__class__ = model._all_outputs


def _settle_losses(model: nn.Module) -> None:
    """transformers looks some losses up at each call, GPT-2's for one, with a warning that breaks the graph."""
    for module in model.modules():
        unsettled = hasattr(type(module), "loss_function") and getattr(module, "loss_type", None) is None
        if unsettled and "labels" in inspect.signature(module.forward).parameters:  # others never look one up
            module.loss_function = module.loss_function


@functools.cache
def _losing(cls: Any) -> type[nn.Module]:
    whole: Callable[..., Any] = cls.forward

    @functools.wraps(whole)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = whole(self, *args, **kwargs)
        if not torch.is_grad_enabled():
            return output
        if isinstance(output, Mapping):
            made: Callable[..., Any] = type(output)
            return made(loss=output["loss"]) if output.get("loss") is not None else output
        if isinstance(output, tuple) and kwargs.get("labels") is not None:
            return output[:1]
        return output

    same = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (LossOnly, cls), {**same, "forward": forward, "_all_outputs": cls})
