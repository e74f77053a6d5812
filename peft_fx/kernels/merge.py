"""W' of several weights in one launch: each weight is read once, each W' written once.

    merge([W1, W2, …], [L, …], [R, …], [s, …], [n1, n2, …]) -> [ΣM, N]
    W'i = round(Wi + Σ s·L·R)          over the next ni of the factors

Wi [Mi, N] of any strides in bfloat16 or float16, L [Mi, r] and R [r, N] of any strides and float dtype; products and
sums are in fp32, and W' is rounded once, to nearest. The results stand below each other in one matrix, as one product
of what several layers read takes them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from peft_fx.kernels.library import define

DTYPES = (torch.bfloat16, torch.float16)
MOST = 8  # weights of one launch: each is a piece of the kernel's code
WIDEST = 256  # rank


def _decomposed(
    weights: Sequence[Tensor],
    left: Sequence[Tensor],
    right: Sequence[Tensor],
    scales: Sequence[float],
    terms: Sequence[int],
) -> Tensor:
    merged, at = [], 0
    for W, n in zip(weights, terms, strict=True):
        total = W.float()
        for L, R, s in zip(left[at : at + n], right[at : at + n], scales[at : at + n], strict=True):
            total = total + (L.float() @ R.float()) * s
        merged.append(_saturated(total, W.dtype).to(W.dtype))
        at += n
    return torch.cat(merged)


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
) -> Tensor:
    return weights[0].new_empty(sum(W.shape[0] for W in weights), weights[0].shape[1])


def _launch(
    weights: Sequence[Tensor],
    left: Sequence[Tensor],
    right: Sequence[Tensor],
    scales: Sequence[float],
    terms: Sequence[int],
) -> Tensor:
    from peft_fx.kernels.triton_merge import launch  # Triton is imported where there is a device for it

    out = _shape(weights, left, right, scales, terms)
    if out.numel():
        launch(out, weights, left, right, scales, terms)
    return out


merge = define(
    "merge(Tensor[] weights, Tensor[] left, Tensor[] right, float[] scales, int[] terms) -> Tensor",
    _decomposed,
    _launch,
    _shape,
)
