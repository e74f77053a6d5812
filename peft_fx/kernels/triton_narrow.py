"""The Triton kernels of `narrow_out`, `narrow_in` and `narrow_both`.

Of `narrow_out` a program has some tokens of one activation and goes along its features; of `narrow_in` some features,
and goes along a part of the tokens. What is narrow is split into two halves in registers. Where the features alone do
not occupy a card, the tokens are split too, and a second kernel adds the parts up in their order.

Of `narrow_both` a program goes as that of `narrow_in`, with many more features, and has for each token a part of u·F as
well, which the second kernel adds up with the other features' parts. Those parts are 8·r bytes a token, written and
read, beside BLOCK / r features of 2 bytes: an eighth of u at rank 16, and a half at rank 32.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_fx.kernels.triton_merge import rounded

PROGRAMS = 128  # that occupy a card
INNER = 64  # of what a program goes along, at a time
BLOCK = 512 * 16  # features of a program that computes both, times columns: what its registers hold
WARPS = 8  # of it


@triton.jit
def dot(total, a, b, UPCAST: tl.constexpr):
    """total + a·b of half-precision tiles, exact products; Triton's interpreter has them in fp32 alone."""
    if UPCAST:
        return total + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, total)


@triton.jit
def side_by_side(parts, strides, RANKS: tl.constexpr, rows, inside, columns):
    """Rows of several narrow matrices, one after the other in the columns."""
    first = 0
    tile = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    for i in tl.static_range(len(RANKS)):
        own = (columns >= first) & (columns < first + RANKS[i])
        at = rows[:, None].to(tl.int64) * strides[i][0] + (columns - first)[None, :].to(tl.int64) * strides[i][1]
        tile += tl.load(parts[i] + at, inside[:, None] & own[None, :], 0.0).to(tl.float32)
        first += RANKS[i]
    return tile


@triton.jit
def cut(x, dtype: tl.constexpr):
    """fp32 as the sum of two in bfloat16: the second is what the first lacks."""
    high = rounded(x, dtype)
    return high, rounded(x - high.to(tl.float32), dtype)


@triton.jit
def out_kernel(
    outs,
    us,
    factors,
    scales,
    widths,
    strides,
    factor_strides,
    T,
    RANKS: tl.constexpr,
    PADDED: tl.constexpr,
    UPCAST: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
):
    """Tokens by the first dimension of the grid, activations by the second."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    for i in tl.static_range(len(RANKS)):
        if tl.program_id(1) == i:
            K = widths[i]
            width: tl.constexpr = PADDED[i]
            ranks: tl.constexpr = RANKS[i]
            columns = tl.arange(0, width)
            total = tl.zeros((BT, width), tl.float32)
            for start in range(0, K, BK):
                k = start + tl.arange(0, BK)
                at = t[:, None].to(tl.int64) * strides[i][0] + k[None, :].to(tl.int64) * strides[i][1]
                u = tl.load(us[i] + at, (t < T)[:, None] & (k < K)[None, :], 0.0)
                high, low = cut(side_by_side(factors[i], factor_strides[i], ranks, k, k < K, columns), u.dtype)
                total = dot(dot(total, u, high, UPCAST), u, low, UPCAST)
            first = 0
            for j in tl.static_range(len(ranks)):
                own = (columns >= first) & (columns < first + ranks[j])
                to = t[:, None].to(tl.int64) * ranks[j] + (columns - first)[None, :]
                found = rounded(total * scales[i][j], outs[i][j].dtype.element_ty)
                tl.store(outs[i][j] + to, found, (t < T)[:, None] & own[None, :])
                first += ranks[j]


@triton.jit
def put(outs, strides, scales, RANKS: tl.constexpr, total, k, K, columns):
    """A tile [columns, k] of all results of one activation, each scaled, into its own."""
    first = 0
    for j in tl.static_range(len(RANKS)):
        own = (columns >= first) & (columns < first + RANKS[j])
        to = (columns - first)[:, None] * strides[j][0] + k[None, :].to(tl.int64) * strides[j][1]
        tl.store(outs[j] + to, rounded(total * scales[j], outs[j].dtype.element_ty), own[:, None] & (k < K)[None, :])
        first += RANKS[j]


@triton.jit
def in_kernel(
    outs,
    parts,
    us,
    zs,
    scales,
    widths,
    strides,
    z_strides,
    out_strides,
    T,
    length,
    RANKS: tl.constexpr,
    PADDED: tl.constexpr,
    SPLIT: tl.constexpr,
    UPCAST: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
):
    """Features by the first dimension of the grid, activations by the second, parts of the tokens by the third; the
    results, or the parts [activation][part, columns, K] where there are several."""
    k = tl.program_id(0) * BK + tl.arange(0, BK)
    part = tl.program_id(2)
    for i in tl.static_range(len(RANKS)):
        K = widths[i]
        if (tl.program_id(1) == i) & (tl.program_id(0) * BK < K):
            width: tl.constexpr = PADDED[i]
            ranks: tl.constexpr = RANKS[i]
            columns = tl.arange(0, width)
            total = tl.zeros((width, BK), tl.float32)
            for start in range(part * length, tl.minimum(part * length + length, T), BT):
                t = start + tl.arange(0, BT)
                inside = t < tl.minimum(part * length + length, T)
                at = t[:, None].to(tl.int64) * strides[i][0] + k[None, :].to(tl.int64) * strides[i][1]
                u = tl.load(us[i] + at, inside[:, None] & (k < K)[None, :], 0.0)
                high, low = cut(side_by_side(zs[i], z_strides[i], ranks, t, inside, columns), u.dtype)
                total = dot(dot(total, tl.trans(high), u, UPCAST), tl.trans(low), u, UPCAST)
            if SPLIT:
                to = (part * width + columns)[:, None].to(tl.int64) * K + k[None, :]
                tl.store(parts[i] + to, total, (k < K)[None, :] & (columns >= 0)[:, None])
            else:
                put(outs[i], out_strides[i], scales[i], ranks, total, k, K, columns)


@triton.jit
def both_kernel(
    out_parts,
    in_parts,
    us,
    factors,
    zs,
    widths,
    strides,
    factor_strides,
    z_strides,
    T,
    length,
    RANKS: tl.constexpr,
    PADDED: tl.constexpr,
    Z_RANKS: tl.constexpr,
    Z_PADDED: tl.constexpr,
    UPCAST: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
):
    """The grid of `in_kernel`; parts of the one result [activation][features' part, columns, T], of the other
    [activation][tokens' part, columns, K]."""
    k = tl.program_id(0) * BK + tl.arange(0, BK)
    part = tl.program_id(2)
    for i in tl.static_range(len(RANKS)):
        K = widths[i]
        if (tl.program_id(1) == i) & (tl.program_id(0) * BK < K):
            width: tl.constexpr = PADDED[i]
            z_width: tl.constexpr = Z_PADDED[i]
            columns = tl.arange(0, width)
            z_columns = tl.arange(0, z_width)
            ranks: tl.constexpr = RANKS[i]
            z_ranks: tl.constexpr = Z_RANKS[i]
            high, low = cut(
                side_by_side(factors[i], factor_strides[i], ranks, k, k < K, columns), us[i].dtype.element_ty
            )
            total = tl.zeros((z_width, BK), tl.float32)
            for start in range(part * length, tl.minimum(part * length + length, T), BT):
                t = start + tl.arange(0, BT)
                inside = t < tl.minimum(part * length + length, T)
                at = t[:, None].to(tl.int64) * strides[i][0] + k[None, :].to(tl.int64) * strides[i][1]
                u = tl.load(us[i] + at, inside[:, None] & (k < K)[None, :], 0.0)
                here = dot(dot(tl.zeros((BT, width), tl.float32), u, high, UPCAST), u, low, UPCAST)
                to = (tl.program_id(0) * width + columns)[None, :].to(tl.int64) * T + t[:, None]
                tl.store(out_parts[i] + to, here, inside[:, None] & (columns >= 0)[None, :])
                z_high, z_low = cut(side_by_side(zs[i], z_strides[i], z_ranks, t, inside, z_columns), u.dtype)
                total = dot(dot(total, tl.trans(z_high), u, UPCAST), tl.trans(z_low), u, UPCAST)
            to = (part * z_width + z_columns)[:, None].to(tl.int64) * K + k[None, :]
            tl.store(in_parts[i] + to, total, (k < K)[None, :] & (z_columns >= 0)[:, None])


@triton.jit
def sum_kernel(
    outs,
    parts,
    scales,
    widths,
    out_strides,
    counts,
    RANKS: tl.constexpr,
    PADDED: tl.constexpr,
    BK: tl.constexpr,
):
    """The sum of so many parts [part, columns, K], the first one first."""
    k = tl.program_id(0) * BK + tl.arange(0, BK)
    for i in tl.static_range(len(RANKS)):
        K = widths[i]
        if (tl.program_id(1) == i) & (tl.program_id(0) * BK < K):
            width: tl.constexpr = PADDED[i]
            ranks: tl.constexpr = RANKS[i]
            columns = tl.arange(0, width)
            total = tl.zeros((width, BK), tl.float32)
            for part in range(counts[i]):
                at = (part * width + columns)[:, None].to(tl.int64) * K + k[None, :]
                total += tl.load(parts[i] + at, (k < K)[None, :] & (columns >= 0)[:, None], 0.0)
            put(outs[i], out_strides[i], scales[i], ranks, total, k, K, columns)


def by_activation(found: Sequence[Any], counts: Sequence[int]) -> tuple[tuple[Any, ...], ...]:
    """A list as tuples of so many."""
    ends = [sum(counts[: i + 1]) for i in range(len(counts))]
    return tuple(tuple(found[end - n : end]) for end, n in zip(ends, counts, strict=True))


def padded(ranks: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Columns as tensor cores take them."""
    return tuple(max(16, triton.next_power_of_2(sum(own))) for own in ranks)


def out_arguments(
    outs: Sequence[Tensor],
    us: Sequence[Tensor],
    factors: Sequence[Tensor],
    counts: Sequence[int],
    scales: Sequence[float],
) -> tuple[tuple[int, ...], list[Any], dict[str, Any]]:
    """Grid, arguments and constants of a launch."""
    T = us[0].shape[0]
    ranks = by_activation([F.shape[1] for F in factors], counts)
    tokens = next((n for n in (64, 32) if n * PROGRAMS <= T * len(us)), 16)
    constants = {
        "RANKS": ranks,
        "PADDED": padded(ranks),
        "UPCAST": bool(triton.knobs.runtime.interpret),
        "BT": tokens,
        "BK": INNER,
    }
    given = [
        by_activation(outs, counts),
        tuple(us),
        by_activation(factors, counts),
        by_activation([float(s) for s in scales], counts),
        tuple(u.shape[1] for u in us),
        tuple(u.stride() for u in us),
        by_activation([F.stride() for F in factors], counts),
        T,
    ]
    return (triton.cdiv(T, tokens), len(us)), given, constants


def launch_out(
    outs: Sequence[Tensor],
    us: Sequence[Tensor],
    factors: Sequence[Tensor],
    counts: Sequence[int],
    scales: Sequence[float],
) -> None:
    grid, given, constants = out_arguments(outs, us, factors, counts, scales)
    out_kernel[grid](*given, **constants)


def launch_in(
    outs: Sequence[Tensor],
    us: Sequence[Tensor],
    zs: Sequence[Tensor],
    counts: Sequence[int],
    scales: Sequence[float],
    turned: Sequence[bool],
) -> None:
    grid, given, constants = in_arguments(outs, us, zs, counts, scales, turned)
    in_kernel[grid](*given, **constants)
    if constants["SPLIT"]:
        outs_, parts, _, _, scales_, widths, _, _, out_strides, *_ = given
        kept = {k: constants[k] for k in ("RANKS", "PADDED", "BK")}
        sum_kernel[grid[:2]](outs_, parts, scales_, widths, out_strides, (grid[2],) * len(us), **kept)


def in_arguments(
    outs: Sequence[Tensor],
    us: Sequence[Tensor],
    zs: Sequence[Tensor],
    counts: Sequence[int],
    scales: Sequence[float],
    turned: Sequence[bool],
) -> tuple[tuple[int, ...], list[Any], dict[str, Any]]:
    """Grid, arguments and constants of a launch; with memory for the parts where the tokens are split."""
    T = us[0].shape[0]
    widths = tuple(u.shape[1] for u in us)
    features = next((n for n in (64, 32) if sum(widths) >= n * PROGRAMS), 16)
    ranks = by_activation([z.shape[1] for z in zs], counts)
    columns = padded(ranks)
    programs = sum(triton.cdiv(K, features) for K in widths)
    split = max(1, min(PROGRAMS // programs, T // (4 * INNER)))
    length = triton.cdiv(triton.cdiv(T, split), INNER) * INNER
    split = triton.cdiv(T, length)
    if split > 1:
        parts = tuple(us[0].new_empty(split, R, K, dtype=torch.float32) for R, K in zip(columns, widths, strict=True))
    else:
        parts = tuple(outs[0] for _ in us)  # nothing is written there
    constants = {
        "RANKS": ranks,
        "PADDED": columns,
        "SPLIT": split > 1,
        "UPCAST": bool(triton.knobs.runtime.interpret),
        "BT": INNER,
        "BK": features,
    }
    strides = [t.stride()[::-1] if turn else t.stride() for t, turn in zip(outs, turned, strict=True)]
    given = [
        by_activation(outs, counts),
        parts,
        tuple(us),
        by_activation(zs, counts),
        by_activation([float(s) for s in scales], counts),
        widths,
        tuple(u.stride() for u in us),
        by_activation([z.stride() for z in zs], counts),
        by_activation(strides, counts),
        T,
        length,
    ]
    return (triton.cdiv(max(widths), features), len(us), split), given, constants


def launch_both(
    outs: Sequence[Tensor],
    into: Sequence[Tensor],
    us: Sequence[Tensor],
    factors: Sequence[Tensor],
    counts: Sequence[int],
    scales: Sequence[float],
    zs: Sequence[Tensor],
    z_counts: Sequence[int],
    z_scales: Sequence[float],
    turned: Sequence[bool],
) -> None:
    grid, given, constants = both_arguments(us, factors, counts, zs, z_counts)
    both_kernel[grid](*given, **constants, num_warps=WARPS)
    grid, given, constants = both_sums(outs, into, us, counts, scales, z_counts, z_scales, turned, given, constants)
    sum_kernel[grid](*given, **constants)


def both_arguments(
    us: Sequence[Tensor],
    factors: Sequence[Tensor],
    counts: Sequence[int],
    zs: Sequence[Tensor],
    z_counts: Sequence[int],
) -> tuple[tuple[int, ...], list[Any], dict[str, Any]]:
    """Grid, arguments with memory for the parts, and constants of a launch."""
    T, widths = us[0].shape[0], tuple(u.shape[1] for u in us)
    ranks = by_activation([F.shape[1] for F in factors], counts)
    z_ranks = by_activation([z.shape[1] for z in zs], z_counts)
    columns, z_columns = padded(ranks), padded(z_ranks)
    features = BLOCK // max(*columns, *z_columns)
    blocks = [triton.cdiv(K, features) for K in widths]
    split = max(1, min(PROGRAMS // sum(blocks), T // (4 * INNER)))
    length = triton.cdiv(triton.cdiv(T, split), INNER) * INNER
    split = triton.cdiv(T, length)
    new = functools.partial(us[0].new_empty, dtype=torch.float32)
    constants = {
        "RANKS": ranks,
        "PADDED": columns,
        "Z_RANKS": z_ranks,
        "Z_PADDED": z_columns,
        "UPCAST": bool(triton.knobs.runtime.interpret),
        "BT": 16,
        "BK": features,
    }
    given = [
        tuple(new(n, R, T) for n, R in zip(blocks, columns, strict=True)),
        tuple(new(split, R, K) for R, K in zip(z_columns, widths, strict=True)),
        tuple(us),
        by_activation(factors, counts),
        by_activation(zs, z_counts),
        widths,
        tuple(u.stride() for u in us),
        by_activation([F.stride() for F in factors], counts),
        by_activation([z.stride() for z in zs], z_counts),
        T,
        length,
    ]
    return (max(blocks), len(us), split), given, constants


def both_sums(
    outs: Sequence[Tensor],
    into: Sequence[Tensor],
    us: Sequence[Tensor],
    counts: Sequence[int],
    scales: Sequence[float],
    z_counts: Sequence[int],
    z_scales: Sequence[float],
    turned: Sequence[bool],
    given: list[Any],
    constants: dict[str, Any],
) -> tuple[tuple[int, ...], list[Any], dict[str, Any]]:
    """The same of the launch that adds up the parts of both results: u·F is [T, r] as the other's transposes are."""
    parts, z_parts = given[:2]
    widths = (*(us[0].shape[0] for _ in us), *(u.shape[1] for u in us))
    turned = [True] * len(outs) + list(turned)
    strides = [t.stride()[::-1] if turn else t.stride() for t, turn in zip([*outs, *into], turned, strict=True)]
    counts = [*counts, *z_counts]
    asked = [
        by_activation([*outs, *into], counts),
        (*parts, *z_parts),
        by_activation([float(s) for s in (*scales, *z_scales)], counts),
        widths,
        by_activation(strides, counts),
        tuple(part.shape[0] for part in (*parts, *z_parts)),
    ]
    of_sums = {
        "RANKS": constants["RANKS"] + constants["Z_RANKS"],
        "PADDED": constants["PADDED"] + constants["Z_PADDED"],
        "BK": INNER,
    }
    return (triton.cdiv(max(widths), INNER), len(widths)), asked, of_sums
