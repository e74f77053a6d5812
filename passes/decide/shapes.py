"""What is priced: a candidate's sizes as numbers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from peft_fx.passes.analyse.algebra import Size, Term, finer


@dataclass(frozen=True)
class RegionProduct:
    """A product of a region that is no sum of terms, by `batch` weights [K,N]; `first` where it reads the input as it
    is, or scaled, so that for W' it is the weight itself."""

    batch: int
    K: int
    N: int
    first: bool
    base: bool


@dataclass(frozen=True)
class Shape:
    """One group's sizes as numbers: `K`, `N` as W multiplies u, the inner sizes of each adapter term, or the steps of
    a region, and the dtypes; `gathered` where u picks rows, so that u·W and u·A are no products; `fused` where a
    kernel of our own builds W'."""

    T: int
    K: int
    N: int
    terms: tuple[tuple[tuple[int, int], ...], ...]
    base_dtype: torch.dtype
    adapter_dtype: torch.dtype
    batch: int = 1
    steps: tuple[RegionProduct, ...] = ()
    gathered: bool = False
    fused: bool = False

    @property
    def rank(self) -> int:
        if self.steps:
            return min((s.batch * s.N for s in self.steps if not s.base), default=min(self.K, self.N))
        return min((n for term in self.terms for _, n in term[:-1]), default=min(self.K, self.N))


def shape_of(
    tokens: Size,
    weight: tuple[Size, Size],
    remainders: tuple[Term, ...],
    base_dtype: torch.dtype,
    hint: Callable[[Size], int],
    batch: Size = 1,
    right: bool = False,
) -> Shape:
    """A group's sizes with hints for symbols. From the right, everything is transposed: `W @ x` is `(xᵀ @ Wᵀ)ᵀ`."""
    terms = [t.T if right else t for t in remainders]
    k, n = reversed(weight) if right else weight
    dtypes = [d for t in terms for d in t.dtypes] or [base_dtype]
    adapter = functools.reduce(finer, dtypes)
    return Shape(
        hint(tokens),
        hint(k),
        hint(n),
        tuple(tuple((hint(f.shape[0]), hint(f.shape[1])) for f in t.factors) for t in terms),
        base_dtype,
        adapter,
        hint(batch),
    )
