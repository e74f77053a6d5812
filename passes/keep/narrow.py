"""An adapter's narrow products by kernels of our own, where the graph is on a GPU: what `transients.py` spells in
halves, `u·[hi | lo]`, is one launch there, which reads u as it lies and the narrow factors in fp32."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from peft_fx.kernels.narrow import DTYPE, MOST, WIDEST, narrow_in, narrow_out
from peft_fx.passes.graph.editor import Builder
from peft_fx.passes.graph.nodes import shape, value


@dataclass(frozen=True)
class Narrow:
    """One of the products that share u: `other`, as it multiplies u, a number, and the strides that the result is to
    have."""

    other: Node
    scale: float = 1.0
    strides: tuple[int, ...] = ()


Asked = Sequence[tuple[Node, Sequence[Narrow]]]  # of each u


def takes(given: Sequence[tuple[Node, Sequence[Node]]], first: bool) -> bool:
    """Whether one launch computes u·other, or other·u where u is not the `first`, of each u and all of its others, on a
    device that has the kernels."""
    us = [u for u, _ in given]
    ranks = [[shape(n)[1 if first else 0] for n in others] for _, others in given]
    sizes = [*(r for own in ranks for r in own), *(shape(u)[1] for u in us)]
    if not all(value(u).dtype == DTYPE for u in us) or not all(isinstance(n, int) and n > 0 for n in sizes):
        return False
    dtypes = {value(n).dtype for _, others in given for n in others}
    fits = len(us) <= MOST and all(sum(own) <= WIDEST and len(own) <= MOST for own in ranks)
    return fits and dtypes <= {torch.float32, torch.bfloat16} and len({shape(u)[0] for u in us}) == 1


def out_of(build: Builder, asked: Asked) -> list[Node]:
    """s·u·F [T,r] of each."""
    every = [one for _, ones in asked for one in ones]
    counts = [len(ones) for _, ones in asked]
    us, others = [u for u, _ in asked], [one.other for one in every]
    whole = build.call(narrow_out, us, others, counts, [one.scale for one in every])
    return [build.call(operator.getitem, whole, i) for i in range(len(every))]


def into(build: Builder, asked: Asked) -> list[Node]:
    """s·zᵀ·u [r,K] of each zᵀ [r,T], in memory as its transpose where the strides say so."""
    ones = [one for _, own in asked for one in own]
    counts = [len(own) for _, own in asked]
    zs = [build.flip(one.other) for one in ones]
    turned = [one.strides[-1] != 1 for one in ones]
    every = build.call(narrow_in, [u for u, _ in asked], zs, counts, [one.scale for one in ones], turned)
    found = [build.call(operator.getitem, every, i) for i in range(len(ones))]
    return [build.flip(n) if turn else n for n, turn in zip(found, turned, strict=True)]
