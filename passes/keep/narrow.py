"""An adapter's narrow products by kernels of our own, where the graph is on a GPU: what `in_place_reads.py` spells in
halves, `u·[hi | lo]`, is one launch there, which reads u as it lies and the narrow factors in fp32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from peft_fx.kernels.narrow import DTYPE, MOST, WIDEST, WIDEST_OF_BOTH, narrow_both, narrow_in, narrow_out
from peft_fx.passes.graph.editor import Editor
from peft_fx.passes.graph.nodes import RESHAPES, shape, value


@dataclass(frozen=True)
class Narrow:
    """One of the products that share u: `other`, as it multiplies u, a number, and the strides that the result is to
    have."""

    other: Node
    scale: float = 1.0
    strides: tuple[int, ...] = ()


@dataclass(frozen=True)
class Reads:
    """The products that read one u [T,K]: u·other of each in `out`, and other·u of each in `into`."""

    u: Node
    out: Sequence[Narrow]
    into: Sequence[Narrow]

    @property
    def ranks(self) -> tuple[list[Any], list[Any]]:
        return [shape(n.other)[1] for n in self.out], [shape(n.other)[0] for n in self.into]


def takes(asked: Sequence[Reads]) -> bool:
    """Whether kernels compute all of these products, on a device that has them."""
    us = [one.u for one in asked]
    ranks = [own for one in asked for own in one.ranks]
    sizes = [*(r for own in ranks for r in own), *(shape(u)[1] for u in us)]
    if not all(value(u).dtype == DTYPE for u in us) or not all(isinstance(n, int) and n > 0 for n in sizes):
        return False
    dtypes = {value(n.other).dtype for one in asked for n in (*one.out, *one.into)}
    fits = len(us) <= MOST and all(sum(own) <= WIDEST and len(own) <= MOST for own in ranks)
    return fits and dtypes <= {torch.float32, torch.bfloat16} and len({shape(u)[0] for u in us}) == 1


def at_once(ranks: Sequence[Any]) -> bool:
    """Whether products of these ranks, of one kind, are had from the read of u that the other kind's are had from."""
    return all(isinstance(r, int) for r in ranks) and 0 < sum(ranks) <= WIDEST_OF_BOTH


def computed(edit: Editor, asked: Sequence[Reads]) -> list[Node]:
    """Of each u all s·u·F [T,r]; then of each u all s·zᵀ·u [r,K], in memory as its transpose where the strides say so.
    In one launch where each u has both, else in one of each kind."""
    views = {one.u: _view(edit, one.u) for one in asked}
    out = [(views[one.u], one.out) for one in asked if one.out]
    into = [(views[one.u], one.into) for one in asked if one.into]
    if len(out) == len(into) == len(asked) and all(at_once(own) for one in asked for own in one.ranks):
        us, *rest = _out(out)
        return _results(edit, narrow_both, us, *rest, *_into(edit, into)[1:])
    found = _results(edit, narrow_out, *_out(out)) if out else []
    return found + (_results(edit, narrow_in, *_into(edit, into)) if into else [])


Given = Sequence[tuple[Node, Sequence[Narrow]]]


def _out(given: Given) -> list[Any]:
    every = [one for _, own in given for one in own]
    return [[u for u, _ in given], [n.other for n in every], [len(own) for _, own in given], [n.scale for n in every]]


def _into(edit: Editor, given: Given) -> list[Any]:
    us, others, counts, scales = _out(given)
    turned = [n.strides[-1] != 1 for _, own in given for n in own]
    return [us, [edit.flip(n) for n in others], counts, scales, turned]


def _results(edit: Editor, op: Any, *arguments: Any) -> list[Node]:
    """The op's results, one for each narrow factor; those that lie turned, as what they are the transpose of."""
    whole, turned = edit.call(op, *arguments), [] if op is narrow_out else arguments[-1]
    found = [edit.item(whole, i) for i in range(len(value(whole)))]
    first = len(found) - len(turned)
    return found[:first] + [edit.flip(n) if turn else n for n, turn in zip(found[first:], turned, strict=True)]


def _view(edit: Editor, u: Node) -> Node:
    """u as rows, by a view of its own: what several read through one view, Inductor lays out anew for a product."""
    return edit.reshape(u, [1, -1, shape(u)[1]]) if u.target in RESHAPES else u
