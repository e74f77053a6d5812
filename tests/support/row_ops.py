"""Row-wise linear ops to compose around a frozen product: what each does to features of size n, and with which
parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Shape = tuple[int, ...]
WIDEST = 24


def rows(x, *sizes):
    """The features of x in these sizes."""
    return x.reshape(*x.shape[:-1], *sizes)


def scale(x, d):
    return x * d


def shift(x, c):
    return x + c


def shift_less(x, c):
    return c - x


def number(x):
    return 3 - 2 * x


def matrix(x, M):
    return x @ M


def narrower(x, M):
    return x @ M


def low_rank(x, A, B):
    return x @ A @ B


def residual(x, A, d, B):
    return x + ((x @ A) * d) @ B


def reflection(x, v):
    return x - (x @ v) * v[:, 0]


def flip(x):
    return x.flip(-1)


def roll(x):
    return x.roll(1, -1)


def regrouped(x):
    return rows(x, 2, -1).transpose(-1, -2).flatten(-2)


def blocks(x, M):
    return torch.einsum("...gi,gij->...gj", rows(x, 2, -1), M).flatten(-2)


def one_block(x, M):
    return (rows(x, 2, -1) @ M).flatten(-2)


def per_group(x, d):
    return (rows(x, 2, -1) * d).flatten(-2)


def turned(x, c, s):
    pairs = rows(x, -1, 2)
    return x * c + torch.stack([-pairs[..., 1], pairs[..., 0]], -1).flatten(-2) * s


def pooled(x):
    return rows(x, -1, 2).sum(-1)


def part(x):
    return x[..., : x.shape[-1] // 2]


def part_scaled(x, d):
    return torch.cat([x[..., : d.shape[0]], x[..., d.shape[0] :] * d], -1)


def twice(x, d):
    return torch.cat([x, x * d], -1)


def repeated(x):
    return x[..., None].expand(*x.shape, 2).flatten(-2)


@dataclass(frozen=True)
class Op:
    """`f(x, *parameters)` on features of size n; the shapes of the parameters; what it asks of n, and makes of it."""

    f: Callable[..., Tensor]
    params: Callable[[int], tuple[Shape, ...]] = lambda n: ()
    divides: int = 1
    result: Callable[[int], int] = lambda n: n


def _vector(n: int) -> tuple[Shape, ...]:
    return ((n,),)


OPS = {
    op.f.__name__: op
    for op in [
        *(Op(f, _vector) for f in (scale, shift, shift_less)),
        *(Op(f) for f in (number, flip, roll)),
        Op(matrix, lambda n: ((n, n),)),
        Op(narrower, lambda n: ((n, 4),), result=lambda n: 4),
        Op(low_rank, lambda n: ((n, 2), (2, n))),
        Op(residual, lambda n: ((n, 2), (2,), (2, n))),
        Op(reflection, lambda n: ((n, 1),)),
        Op(regrouped, divides=2),
        Op(blocks, lambda n: ((2, n // 2, n // 2),), 2),
        Op(one_block, lambda n: ((n // 2, n // 2),), 2),
        Op(per_group, lambda n: ((2, 1),), 2),
        Op(turned, lambda n: ((n,), (n,)), 2),
        Op(pooled, divides=4, result=lambda n: n // 2),
        Op(part, divides=4, result=lambda n: n // 2),
        Op(part_scaled, lambda n: ((n // 2,),), 2),
        Op(twice, _vector, result=lambda n: 2 * n),
        Op(repeated, result=lambda n: 2 * n),
    ]
}


def fitting(n: int) -> list[str]:
    """The ops that can follow n features."""
    return [name for name, op in OPS.items() if n % op.divides == 0 and op.result(n) <= WIDEST]
