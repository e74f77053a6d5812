"""The Triton kernel of `merge`: one program a tile of some weight, whatever others there are.

A tile of W and of W' goes through memory once; the factors' rows and columns for it come from the cache. Tensor cores
multiply no fp32: three passes in TF32 stand for it, to 2⁻²¹ of the delta, far below W's own rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 64, 128  # of a tile
HALF = (torch.bfloat16, torch.float16)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """fp32 to nearest even in a half-precision dtype. In bits: Triton's interpreter cuts where a card rounds."""
    if dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(x == x, nearest.to(tl.float32, bitcast=True), x)
    elif dtype == tl.float16:
        infinite = tl.abs(x) == float("inf")
        x = tl.where(infinite, x, tl.minimum(tl.maximum(x, -65504.0), 65504.0))
    return x.to(dtype)


@triton.jit
def product(total, L, R, scale, m, n, M, N, strides, r: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr):
    """A tile of total + scale·L·R."""
    for start in tl.static_range(0, PADDED, 16 if PADDED < 32 else 32):
        k = start + tl.arange(0, 16 if PADDED < 32 else 32)
        a = tl.load(L + m[:, None] * strides[0] + k[None, :] * strides[1], (m < M)[:, None] & (k < r)[None, :], 0.0)
        b = tl.load(R + k[:, None] * strides[2] + n[None, :] * strides[3], (k < r)[:, None] & (n < N)[None, :], 0.0)
        total += scale * tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=PRECISION)
    return total


@triton.jit
def merge_kernel(
    outs,
    weights,
    left,
    right,
    scales,
    rows,
    columns,
    strides,
    factor_strides,
    TERMS: tl.constexpr,
    RANKS: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """The tiles of one weight come after those of another, each weight's in rows."""
    program = tl.program_id(0)
    first = 0
    for i in tl.static_range(len(TERMS)):
        M = rows[i]
        N = columns[i]
        across = tl.cdiv(N, BN)
        tiles = tl.cdiv(M, BM) * across
        if (program >= first) & (program < first + tiles):
            m = (program - first) // across * BM + tl.arange(0, BM)
            n = (program - first) % across * BN + tl.arange(0, BN)
            inside = (m < M)[:, None] & (n < N)[None, :]
            at = m[:, None].to(tl.int64) * strides[i][0] + n[None, :].to(tl.int64) * strides[i][1]
            w = tl.load(weights[i] + at, inside, 0.0)
            total = w.to(tl.float32)
            for j in tl.static_range(len(RANKS)):
                if TERMS[i][0] <= j and j < TERMS[i][1]:
                    padded: tl.constexpr = triton.next_power_of_2(RANKS[j])
                    total = product(
                        total, left[j], right[j], scales[j], m, n, M, N, factor_strides[j], RANKS[j], padded, PRECISION
                    )
            tl.store(outs[i] + m[:, None].to(tl.int64) * N + n[None, :], rounded(total, w.dtype), inside)
        first += tiles


def arguments(
    outs: Sequence[Tensor],
    weights: Sequence[Tensor],
    left: Sequence[Tensor],
    right: Sequence[Tensor],
    scales: Sequence[float],
    terms: Sequence[int],
) -> tuple[tuple[int], list[Any], dict[str, Any]]:
    """Grid, arguments and constants of a launch."""
    ends = [sum(terms[: i + 1]) for i in range(len(terms))]
    exact = all(f.dtype in HALF for f in (*left, *right))  # TF32 holds them
    constants = {
        "TERMS": tuple((end - n, end) for end, n in zip(ends, terms, strict=True)),
        "RANKS": tuple(L.shape[1] for L in left),
        "PRECISION": "tf32" if exact else "tf32x3",
        "BM": ROWS,
        "BN": COLUMNS,
    }
    grid = sum(triton.cdiv(W.shape[0], ROWS) * triton.cdiv(W.shape[1], COLUMNS) for W in weights)
    given = [
        tuple(outs),
        tuple(weights),
        tuple(left),
        tuple(right),
        tuple(float(s) for s in scales),
        tuple(W.shape[0] for W in weights),
        tuple(W.shape[1] for W in weights),
        tuple(W.stride() for W in weights),
        tuple((*L.stride(), *R.stride()) for L, R in zip(left, right, strict=True)),
    ]
    return (grid,), given, constants


def launch(
    outs: Sequence[Tensor],
    weights: Sequence[Tensor],
    left: Sequence[Tensor],
    right: Sequence[Tensor],
    scales: Sequence[float],
    terms: Sequence[int],
) -> None:
    grid, given, constants = arguments(outs, weights, left, right, scales, terms)
    merge_kernel[grid](*given, **constants)
