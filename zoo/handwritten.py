"""LoRA as others write it: in the place of the forward of PEFT's layers, with the same parameters."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F


def forward_by(model: Any, forward: Callable[[Any, torch.Tensor], torch.Tensor]) -> Any:
    """The model with its LoRA layers computed by another function of (layer, x)."""
    from peft.tuners.lora import LoraLayer

    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer.forward = types.MethodType(forward, layer)
    return model


def _factors(layer: Any) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, float]:
    """W [N, K], bias, A [r, K], B [N, r] as PyTorch's linear layers store them, and s."""
    base = layer.get_base_layer()
    W = base.weight.T if layer.fan_in_fan_out else base.weight  # GPT-2's Conv1D stores [K, N]
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return W, base.bias, A, B, layer.scaling["default"]


def weight_form(layer: Any, x: torch.Tensor) -> torch.Tensor:
    W, bias, A, B, s = _factors(layer)
    return F.linear(x, W + (s * (B @ A)).to(W.dtype), bias)


def low_rank_form(layer: Any, x: torch.Tensor) -> torch.Tensor:
    W, bias, A, B, s = _factors(layer)
    autocast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else W.dtype
    with torch.autocast(x.device.type, enabled=False):
        y = LowRankLinear.apply(x.reshape(-1, x.shape[-1]).to(dtype), W, bias, A, B, s)
    return y.view(*x.shape[:-1], -1)


class LowRankLinear(torch.autograd.Function):
    """y = x·Wᵀ + bias + s·(x·Aᵀ)·Bᵀ, x [T,K], in x's dtype: adds by addmm, keeps x alone, computes x·Aᵀ again."""

    @staticmethod
    def forward(ctx: Any, x: Any, W: Any, bias: Any, A: Any, B: Any, s: float) -> Any:
        ctx.save_for_backward(x, W, A, B)
        ctx.s = s
        W, A, B = W.to(x.dtype), A.to(x.dtype), B.to(x.dtype)
        y = F.linear(x, W, None if bias is None else bias.to(x.dtype))
        return y.addmm_(x @ A.T, B.T, alpha=s)

    @staticmethod
    def backward(ctx: Any, dy: Any) -> Any:
        x, W, A, B = ctx.saved_tensors
        s, kept_dtype = ctx.s, A.dtype
        W, A, B = W.to(x.dtype), A.to(x.dtype), B.to(x.dtype)
        dy_B = dy @ B  # [T, r]
        dA = (s * (dy_B.T @ x)).to(kept_dtype)
        dB = (s * (dy.T @ (x @ A.T))).to(kept_dtype)
        dx = (dy @ W).addmm_(dy_B, A, alpha=s) if ctx.needs_input_grad[0] else None
        return dx, None, None, dA, dB, None
