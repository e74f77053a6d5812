"""The Triton kernel of `merge`: one program a tile of some weight, whatever others there are.

A tile of W and of W' goes through memory once; the factors' rows and columns for it come from the cache. Tensor cores
multiply no fp32: three passes in TF32 stand for it, to 2⁻²¹ of the delta, far below W's own rounding. An fp32 W has
its products in fp64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_fx.kernels.merge import WIDER

TILES = {torch.float32: (64, 128), torch.float64: (32, 64)}  # what registers hold; fp64 of 64 rows fails on sm_100
HALF = (torch.bfloat16, torch.float16)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """Rounded to nearest even: fp64 to fp32; fp32 to half precision, in bits, as Triton's interpreter cuts where a card
    rounds."""
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
    """A tile of total + scale·L·R, the scale being a sum of two in fp32."""
    wide: tl.constexpr = total.dtype
    s = tl.full([], scale[0], wide) + tl.full([], scale[1], wide)
    for start in tl.static_range(0, PADDED, 16 if PADDED < 32 else 32):
        k = start + tl.arange(0, 16 if PADDED < 32 else 32)
        a = tl.load(L + m[:, None] * strides[0] + k[None, :] * strides[1], (m < M)[:, None] & (k < r)[None, :], 0.0)
        b = tl.load(R + k[:, None] * strides[2] + n[None, :] * strides[3], (k < r)[:, None] & (n < N)[None, :], 0.0)
        total += s * tl.dot(a.to(wide), b.to(wide), input_precision=PRECISION)
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
    WIDE: tl.constexpr,
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
            total = w.to(WIDE)
            for j in tl.static_range(len(RANKS)):
                if TERMS[i][0] <= j and j < TERMS[i][1]:
                    padded: tl.constexpr = triton.next_power_of_2(RANKS[j])
                    total = product(
                        total, left[j], right[j], scales[j], m, n, M, N, factor_strides[j], RANKS[j], padded, PRECISION
                    )
            tl.store(outs[i] + m[:, None].to(tl.int64) * N + n[None, :], rounded(total, w.dtype), inside)
        first += tiles


def halves(scale: float) -> tuple[float, float]:
    """A number as the sum of two that fp32 holds, which is what a kernel takes."""
    high = torch.tensor(scale, dtype=torch.float32, device="cpu").item()
    return high, scale - high


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
    wide = WIDER[weights[0].dtype]
    tile_rows, tile_columns = TILES[wide]
    constants = {
        "TERMS": tuple((end - n, end) for end, n in zip(ends, terms, strict=True)),
        "RANKS": tuple(L.shape[1] for L in left),
        "PRECISION": "tf32" if exact else "tf32x3",
        "WIDE": getattr(tl, str(wide).removeprefix("torch.")),
        "BM": tile_rows,
        "BN": tile_columns,
    }
    grid = sum(triton.cdiv(W.shape[0], tile_rows) * triton.cdiv(W.shape[1], tile_columns) for W in weights)
    given = [
        tuple(outs),
        tuple(weights),
        tuple(left),
        tuple(right),
        tuple(map(halves, scales)),
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
