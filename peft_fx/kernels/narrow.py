"""Products of activations with what is narrow, each activation read once as it lies.

    narrow_out([u1, u2, …], [F, …], [n1, n2, …], [s, …])                s·u·F [T, r] of each F, the first n1 of u1
    narrow_in([u1, u2, …], [z, …], [n1, n2, …], [s, …], [turned, …])    s·zᵀ·u [r, K] of each z, or s·uᵀ·z [K, r]
    narrow_both([u1, u2, …], of narrow_out, of narrow_in)               the results of both, each u read once

u [T, K] in bfloat16 of any strides, F [K, r] and z [T, r] of any strides and float dtype, which the result has too. A u
of more dimensions stands for its rows. The narrow one is read as the sum of two bfloat16 numbers, 16 bits, as in
`in_place_reads.py`; products are exact and sums are in fp32. Sums are split between programs in a fixed order: the same
bits at each call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from peft_fx.kernels.library import define

DTYPE = torch.bfloat16
MOST = 8  # activations of one launch, and factors of one activation
WIDEST = 256  # columns that one activation is multiplied by
WIDEST_OF_BOTH = 32  # by a factor, and by what is summed over tokens, in one launch: see `triton_narrow.both_kernel`


def pairs(us: Sequence[Tensor], others: Sequence[Tensor], counts: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Each narrow one with its activation."""
    yield from zip((u for u, n in zip(us, counts, strict=True) for _ in range(n)), others, strict=True)


def _halves(narrow: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix as the sum of two that bfloat16 holds."""
    high = narrow.to(DTYPE).float()
    return high, (narrow.float() - high).to(DTYPE).float()


def _rows(us: Sequence[Tensor]) -> list[Tensor]:
    """Activations as matrices, without copies."""
    return [u.view(-1, u.shape[-1]) if u.ndim != 2 else u for u in us]


def _out(
    us: Sequence[Tensor], factors: Sequence[Tensor], counts: Sequence[int], scales: Sequence[float]
) -> list[Tensor]:
    found = []
    for (u, F), s in zip(pairs(_rows(us), factors, counts), scales, strict=True):
        high, low = _halves(F)
        found.append(((u.float() @ high + u.float() @ low) * s).to(F.dtype))
    return found


def _out_shape(
    us: Sequence[Tensor], factors: Sequence[Tensor], counts: Sequence[int], scales: Sequence[float]
) -> list[Tensor]:
    found = pairs(_rows(us), factors, counts)
    return [u.new_empty(u.shape[0], F.shape[1], dtype=F.dtype) for u, F in found]


def _launch_out(
    us: Sequence[Tensor], factors: Sequence[Tensor], counts: Sequence[int], scales: Sequence[float]
) -> list[Tensor]:
    from peft_fx.kernels.triton_narrow import launch_out

    out = _out_shape(us, factors, counts, scales)
    if us[0].numel():
        launch_out(out, _rows(us), factors, counts, scales)
    return out


def _in(
    us: Sequence[Tensor], zs: Sequence[Tensor], counts: Sequence[int], scales: Sequence[float], turned: Sequence[bool]
) -> list[Tensor]:
    found = []
    for (u, z), s, turn in zip(pairs(_rows(us), zs, counts), scales, turned, strict=True):
        high, low = _halves(z.t())
        total = ((high @ u.float() + low @ u.float()) * s).to(z.dtype)
        found.append((total.t() if turn else total).clone(memory_format=torch.contiguous_format))
    return found


def _in_shape(
    us: Sequence[Tensor], zs: Sequence[Tensor], counts: Sequence[int], scales: Sequence[float], turned: Sequence[bool]
) -> list[Tensor]:
    sizes = [(z.shape[1], u.shape[-1]) for u, z in pairs(us, zs, counts)]
    return [z.new_empty(size[::-1] if turn else size) for z, size, turn in zip(zs, sizes, turned, strict=True)]


def _launch_in(
    us: Sequence[Tensor], zs: Sequence[Tensor], counts: Sequence[int], scales: Sequence[float], turned: Sequence[bool]
) -> list[Tensor]:
    from peft_fx.kernels.triton_narrow import launch_in

    out = _in_shape(us, zs, counts, scales, turned)
    if not us[0].numel():
        return [t.zero_() for t in out]
    launch_in(out, _rows(us), zs, counts, scales, turned)
    return out


def _both(us: Sequence[Tensor], *given: Any) -> list[Tensor]:
    return [*_out(us, *given[:3]), *_in(us, *given[3:])]


def _both_shape(us: Sequence[Tensor], *given: Any) -> list[Tensor]:
    return [*_out_shape(us, *given[:3]), *_in_shape(us, *given[3:])]


def _launch_both(us: Sequence[Tensor], *given: Any) -> list[Tensor]:
    from peft_fx.kernels.triton_narrow import launch_both

    out, into = _out_shape(us, *given[:3]), _in_shape(us, *given[3:])
    if not us[0].numel():
        return [*out, *(t.zero_() for t in into)]
    launch_both(out, into, _rows(us), *given)
    return [*out, *into]


narrow_out = define(
    "narrow_out(Tensor[] us, Tensor[] factors, int[] counts, float[] scales) -> Tensor[]", _out, _launch_out, _out_shape
)
narrow_in = define(
    "narrow_in(Tensor[] us, Tensor[] zs, int[] counts, float[] scales, bool[] turned) -> Tensor[]",
    _in,
    _launch_in,
    _in_shape,
)
narrow_both = define(
    "narrow_both(Tensor[] us, Tensor[] factors, int[] counts, float[] scales, "
    "Tensor[] zs, int[] z_counts, float[] z_scales, bool[] turned) -> Tensor[]",
    _both,
    _launch_both,
    _both_shape,
)
