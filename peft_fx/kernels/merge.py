"""W' of several weights in one launch: each weight is read once, each W' written once.

    merge([W1, W2, …], [L, …], [R, …], [s, …], [n1, n2, …]) -> [W'1, W'2, …]
    W'i = round(Wi + Σ s·L·R)          over the next ni of the factors

Wi [Mi, Ni] of any strides, all in bfloat16, all in float16 or all in float32, L [Mi, r] and R [r, Ni] of any strides
and float dtype; products and sums are in the wider dtype of `WIDER`, and W' [Mi, Ni] is rounded once, to nearest. What
is built beside a W' does not touch its bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from peft_fx.kernels.library import define

WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}  # by dtype of W
MOST = 8  # weights of one launch: each is a piece of the kernel's code
WIDEST = 256  # rank


def _decomposed(
    weights: Sequence[Tensor],
    left: Sequence[Tensor],
    right: Sequence[Tensor],
    scales: Sequence[float],
    terms: Sequence[int],
) -> list[Tensor]:
    merged, at = [], 0
    for W, n in zip(weights, terms, strict=True):
        wide = WIDER[W.dtype]
        total = W.to(wide)
        for L, R, s in zip(left[at : at + n], right[at : at + n], scales[at : at + n], strict=True):
            total = total + (L.to(wide) @ R.to(wide)) * s
        merged.append(_saturated(total, W.dtype).to(W.dtype).contiguous())
        at += n
    return merged


def _saturated(total: Tensor, dtype: torch.dtype) -> Tensor:
    """What is finite stays finite in fp16, as in `rounding.py`."""
    if dtype != torch.float16:
        return total
    most = torch.finfo(dtype).max
    return torch.where(total.abs() == math.inf, total, total.clamp(-most, most))


def _shape(
    weights: Sequence[Tensor],
    left: Sequence[Tensor],
    right: Sequence[Tensor],
    scales: Sequence[float],
    terms: Sequence[int],
) -> list[Tensor]:
    return [W.new_empty(W.shape) for W in weights]


def _launch(
    weights: Sequence[Tensor],
    left: Sequence[Tensor],
    right: Sequence[Tensor],
    scales: Sequence[float],
    terms: Sequence[int],
) -> list[Tensor]:
    from peft_fx.kernels.triton_merge import launch  # Triton is imported where there is a device for it

    outs = _shape(weights, left, right, scales, terms)
    if any(out.numel() for out in outs):
        launch(outs, weights, left, right, scales, terms)
    return outs


merge = define(
    "merge(Tensor[] weights, Tensor[] left, Tensor[] right, float[] scales, int[] terms) -> Tensor[]",
    _decomposed,
    _launch,
    _shape,
)
