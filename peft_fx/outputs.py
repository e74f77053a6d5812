"""What a model returns: the loss alone, so that its logits need not exist."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def loss_only(model: nn.Module) -> nn.Module:
    """The same model, which from now on returns no logits beside a loss that it is trained on.

    An output with a `loss` becomes one of the same class with that alone; of a tuple from a call with labels the first
    item stays. Where there is no loss, as in generation, and where gradients are off, as in evaluation, outputs are
    what they were. Nothing else changes: parameters, signature and class are the model's own, so Trainer, PEFT and
    checkpoints see no difference. A second call does nothing; `restore(model)` undoes it.
    """
    if _hook_of(model) is None:
        model.register_forward_hook(_only_the_loss, with_kwargs=True)
    return model


def with_all_outputs(model: nn.Module) -> bool:
    """Undoes `loss_only`; whether there was anything to undo."""
    key = _hook_of(model)
    if key is None:
        return False
    del model._forward_hooks[key]
    model._forward_hooks_with_kwargs.pop(key, None)
    return True


def _hook_of(model: nn.Module) -> int | None:
    return next((key for key, hook in model._forward_hooks.items() if hook is _only_the_loss), None)


def _only_the_loss(model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    if not torch.is_grad_enabled():
        return output
    if isinstance(output, Mapping):
        return type(output)(loss=output["loss"]) if output.get("loss") is not None else output
    if isinstance(output, tuple) and kwargs.get("labels") is not None:
        return output[:1]
    return output
