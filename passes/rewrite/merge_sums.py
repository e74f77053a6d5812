"""Sums in weight form: `u·W + s·(u·A)·B` becomes `u·W'` with `W' = cast(W + s·A·B)`.

W' stands where W stood: the base product keeps its spelling, its bias, its views and casts, and the adapter's addends
leave the sum. W' is built in fp32, for an fp32 W in fp64, in W's own orientation, cast once, shared by forward and
backward, and marked to be rebuilt in backward. W itself is never written.
"""

from __future__ import annotations

import operator
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch.fx import Node

from peft_fx.kernels.merge import WIDER, merge
from peft_fx.passes.analyse.algebra import Matrix, Scale, Size, Term, cheapest_order
from peft_fx.passes.analyse.candidates import SumCandidate
from peft_fx.passes.analyse.linear_rules import Product, addends
from peft_fx.passes.analyse.merged import merged_already
from peft_fx.passes.decide import price
from peft_fx.passes.decide.candidates import parameters_of
from peft_fx.passes.decide.choosing import decided, joined, numbered
from peft_fx.passes.findings import Settings
from peft_fx.passes.graph.editor import Editor
from peft_fx.passes.graph.joint import Joint
from peft_fx.passes.graph.nodes import aten, shape, value
from peft_fx.passes.rewrite.layout import as_read
from peft_fx.passes.rewrite.rounding import rounded

PLAIN = {aten.addmm.default: aten.mm.default, aten.baddbmm.default: aten.bmm.default}
WEIGHT_ARGUMENT = {aten.convolution.default: 1, aten.embedding.default: 0}
Path = tuple[tuple[Node, int], ...]


def merge_sums(joint: Joint, settings: Settings) -> None:
    """Puts W' in the place of W where a sum is to be in weight form, then has settled what was rewritten for now."""
    notes, position = joint.notes, joint.position
    chosen = decided(joint, notes.sums)
    joint.found.sites = numbered(joined(joint.found.sites))
    # of the same parameters, a region is the site
    notes.adapter_of = parameters_of(notes.groups, joint.flow) | notes.adapter_of
    if notes.as_written is not None:
        joint.found.merged = merged_already(notes.as_written, notes.adapter_of.keys(), joint.sizes.hint)
    rewriter = Rewriter(joint.edit, settings)
    rewriter.rewrite(sorted(chosen, key=lambda g: position[g.root]))
    for tentative in reversed(notes.tentative):
        tentative.settle()


class Rewriter:
    """Rewrites chosen groups. Sums are rebuilt once, whatever the number of groups in them."""

    def __init__(self, edit: Editor, settings: Settings):
        self.edit, self.rounding, self.kernels = edit, settings.rounding, settings.kernels
        self.machine = settings.machine
        self._merged: dict[Any, Node] = {}

    def rewrite(self, groups: Iterable[SumCandidate]) -> None:
        by_root: dict[Node, list[SumCandidate]] = defaultdict(list)
        for group in groups:
            by_root[group.root].append(group)
        for root, members in by_root.items():
            self._rewrite_sum(root, members)
        for node in self.edit.graph.find_nodes(op="call_function", target=aten.convolution_backward.default):
            wanted = {u.args[1] for u in node.users}
            mask = [asked and i in wanted for i, asked in enumerate(node.args[-1])]  # type: ignore[arg-type]
            if mask != node.args[-1]:  # an adapter's input gradient that is part of the base's by now
                self.edit.give(node, *node.args[:-1], mask)

    def _rewrite_sum(self, root: Node, groups: list[SumCandidate]) -> None:
        edits: dict[Path, tuple[Node, bool] | None] = {}
        with self.edit.at(root):
            for group in groups:
                edits |= {occ.path: None for occ in group.others}
                edits[group.base.path] = self._merged_operand(group), group.at_left
            new = self._sum(root, (), edits)
            assert new is not None, "the base product keeps every sum alive"
            new = self.edit.laid_out(new, value(root).stride())
        self.edit.replace(root, new)

    # ------------------------------------------------------------------------------------------------------- sums

    def _sum(self, node: Node, way: Path, edits: dict[Path, tuple[Node, bool] | None]) -> Node | None:
        """A copy of a sum with W' in the base products and without the dropped terms; None where nothing is left of
        it."""
        parts = addends(node) or []
        here = [(*way, (node, i)) for i in range(len(parts))]
        if not any(path[: len(way) + 1] == step for path in edits for step in here):
            return node
        copies: dict[Node, Node] = {}
        gone: list[int] = []
        product: tuple[Node, bool] | None = None
        for i, (path, part) in enumerate(zip(here, parts, strict=True)):
            if path in edits:
                product = product or edits[path]
                gone += [i] if edits[path] is None else []
            elif isinstance(part.operand, Node):
                copy = self._sum(part.operand, path, edits)
                if copy is None:
                    gone.append(i)
                else:
                    copies[part.operand] = copy
        if len(gone) == len(parts):
            return None
        with self.edit.provenance(node):
            if product is not None:
                return self._base(node, *product, bias_gone=bool(gone), copies=copies)
            if gone:
                return self._without(node, gone[0], copies)
            args = [copies.get(a, a) if isinstance(a, Node) else a for a in node.args]
            return self.edit.call(node.target, *args, **node.kwargs)

    def _base(self, node: Node, merged: Node, left: bool, bias_gone: bool, copies: dict[Node, Node]) -> Node:
        """The base product with W' for W; its alpha stays, and its bias where that was no adapter's product."""
        if node.target is operator.getitem:
            return self._input_gradient(node, merged)
        args = [copies.get(a, a) if isinstance(a, Node) else a for a in node.args]
        args[WEIGHT_ARGUMENT.get(node.target, -2 if left else -1)] = merged
        if not bias_gone:
            return self.edit.call(node.target, *args, **node.kwargs)
        scale = next(part.scale for part in addends(node) or [] if isinstance(part.operand, Product))
        return self._scaled(self.edit.call(PLAIN[node.target], *args[-2:]), scale)

    def _input_gradient(self, node: Node, merged: Node) -> Node:
        """A convolution's backward with another kernel, for the input's gradient alone."""
        source = node.args[0]
        assert isinstance(source, Node)
        dy, x, _, _, *rest, _ = source.args
        results = self.edit.call(source.target, dy, x, merged, None, *rest, [True, False, False])
        return self.edit.item(results, 0)

    def _without(self, node: Node, i: int, copies: dict[Node, Node]) -> Node:
        """A sum of two that lost addend `i`: the other, in the sum's dtype and shape."""
        (kept,) = (p for j, p in enumerate(addends(node) or []) if j != i)
        if kept.operand is None:
            like = {"dtype": value(node).dtype, "device": value(node).device}
            return self.edit.call(aten.full.default, self._sized(node), node.args[1 - i], **like)
        assert isinstance(kept.operand, Node)
        rest = copies.get(kept.operand, kept.operand)
        rest = self.edit.cast(rest, value(node).dtype)
        rest = self._scaled(rest, kept.scale)
        if shape(rest) != shape(node):
            rest = self.edit.call(aten.expand.default, rest, self._sized(node))
        return rest

    def _scaled(self, node: Node, scale: Scale) -> Node:
        for name in scale.names:
            assert isinstance(name, Node)
            node = self.edit.times(node, self.edit.cast(name, value(node).dtype))
        return node if scale.number == 1 else self.edit.times(node, scale.number)

    def _sized(self, node: Node) -> list[Any]:
        """A node's sizes as arguments: numbers, or the graph's own size nodes."""
        sizes: list[Any] = []
        for n in value(node).shape:
            if isinstance(n, int):
                sizes.append(n)
                continue
            source = next(a for a in node.all_input_nodes if _has_size(a, n))
            j = next(
                j for j, m in enumerate(value(source).shape) if not isinstance(m, int) and m.node.expr == n.node.expr
            )
            sizes.append(self.edit.call(aten.sym_size.int, source, j))
        return sizes

    # ----------------------------------------------------------------------------------------------------- merging

    def _merged_operand(self, group: SumCandidate) -> Node:
        """W' as the base product reads it. Groups with the same W and the same adapters share it, forward and
        backward too."""
        weight, dtype = _unfolded(group.weight), value(group.operand).dtype
        terms = [(s, t.T if weight.flipped else t) for s, t in zip(group.ratios, group.remainders, strict=True) if s]
        terms = [(s, replace(t, factors=tuple(map(_unfolded, t.factors)))) for s, t in terms]
        summands = frozenset(Counter((s.key(), t.factors) for s, t in terms).items())  # one may be there twice
        key = (weight.T if weight.flipped else weight, group.inner.key(), summands, dtype)
        with self.edit.provenance(group.product_node, rebuilt=True):
            if key not in self._merged:
                transposed = weight.flipped ^ group.right ^ group.backward
                self._merged[key] = self._in_one_kernel(group, terms) or rounded(
                    self.edit,
                    self._merge(weight, group.inner, terms, price.merge_dtype(dtype)),
                    dtype,
                    self.rounding,
                    transposed,
                )
            if group.product.window is not None:
                return self.edit.reshape(self._merged[key], list(shape(group.operand)))
            read = weight.T if group.base.flipped else weight
            operand = self._as_operand(self._merged[key], read, group.operand)
            return as_read(self.edit, operand, self.machine, group.at_left)

    def _merge(self, weight: Matrix, inner: Scale, terms: list[tuple[Scale, Term]], dtype: torch.dtype) -> Node:
        """W + Σ s·Π factors, in the weight's own orientation."""
        plain = weight.T if weight.flipped else weight
        total = self._scaled(self._matrix(plain, dtype), inner)
        for scale, term in terms:
            delta = self._scaled(self._multiply([self._matrix(f, dtype) for f in term.factors]), scale)
            total = self.edit.add(total, delta)
        return total

    def _in_one_kernel(self, group: SumCandidate, terms: list[tuple[Scale, Term]]) -> Node | None:
        """The same by a kernel of our own, where there is one."""
        node = group.weight.name
        assert isinstance(node, Node)
        alike = value(node).dtype == value(group.operand).dtype
        if not (self.kernels and group.has_kernel and alike) or self.rounding != "nearest":
            return None
        left, right, scales = [], [], []
        for scale, term in terms:
            first, *others = self._narrow(term, WIDER[value(node).dtype])
            left.append(first)
            right.append(self._scaled(self._multiply(others), replace(scale, number=1.0)))
            scales.append(float(scale.number))
        return self.edit.item(self.edit.call(merge, [node], left, right, scales, [len(terms)]), 0)

    def _narrow(self, term: Term, wide: torch.dtype) -> list[Node]:
        """A term's factors up to its narrowest place as one, and those behind it; a single one in its own dtype."""
        i = min(range(1, len(term.factors)), key=lambda i: term.factors[i].shape[0])
        sides = term.factors[:i], term.factors[i:]
        dtypes = [value(s[0].name).dtype if len(s) == 1 and not term.scale.names else wide for s in sides]  # type: ignore[arg-type]
        dtypes = [d if d in WIDER else wide for d in dtypes]
        first, second = ([self._matrix(f, d) for f in side] for side, d in zip(sides, dtypes, strict=True))
        return [self._multiply(first), *second]

    def _matrix(self, f: Matrix, dtype: torch.dtype) -> Node:
        """A factor as a node `[rows, cols]`, or `[batch, rows, cols]`."""
        assert isinstance(f.name, Node)
        sizes = [f.rows, f.cols] if f.batch == 1 else [f.batch, f.rows, f.cols]
        node = f.name
        if list(shape(node)) != sizes:
            node = self.edit.reshape(node, _static(sizes))
        node = self.edit.cast(node, dtype)
        return self.edit.flip(node) if f.flipped else node

    def _multiply(self, factors: list[Node]) -> Node:
        for i in cheapest_order([shape(f)[-2:] for f in factors]):  # type: ignore[misc]
            a, b = factors[i : i + 2]
            factors[i : i + 2] = [self._product(a, b)]
        return factors[0]

    def _product(self, a: Node, b: Node) -> Node:
        if value(a).ndim == value(b).ndim == 2:
            return self.edit.call(aten.mm.default, a, b)
        batch = next(shape(n)[0] for n in (a, b) if value(n).ndim == 3)
        a, b = (n if value(n).ndim == 3 else self.edit.call(aten.expand.default, n, [batch, *shape(n)]) for n in (a, b))
        return self.edit.call(aten.bmm.default, a, b)

    def _as_operand(self, merged: Node, weight: Matrix, operand: Node) -> Node:
        node = self.edit.flip(merged) if weight.flipped else merged
        if shape(node) == shape(operand):
            return node
        if value(operand).ndim == 3 and value(node).ndim == 2:
            batched = self.edit.call(aten.unsqueeze.default, node, 0)
            first = shape(operand)[0]
            return batched if first == 1 else self.edit.call(aten.expand.default, batched, [first, *shape(node)])
        return self.edit.reshape(node, _static(shape(operand)))


def _unfolded(f: Matrix) -> Matrix:
    """A kernel by itself, whatever becomes of its product."""
    return replace(f, window=None)


def _static(sizes: Iterable[Size]) -> list[int]:
    """Weights have sizes that are numbers; anything else is a group that should not have been chosen."""
    found = list(sizes)
    assert not any(isinstance(n, sympy.Expr) and not n.is_number for n in found), "a weight of dynamic size"
    return [int(n) for n in found]


def _has_size(node: Node, size: Any) -> bool:
    val = value(node)
    return isinstance(val, torch.Tensor) and any(
        not isinstance(m, int) and m.node.expr == size.node.expr for m in val.shape
    )
