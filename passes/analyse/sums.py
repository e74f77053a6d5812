"""Which sums are a product and its adapters.

A *group* is what one sum offers: a product `u·W`, its base, and further terms that share `u` (at the left, or at the
right as in `W @ x`). A *site* is what a user calls an adapter: the groups of one base weight with the same adapter
factors, in forward and in the input gradient.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Graph, Node

from peft_fx.passes.analyse import adapters
from peft_fx.passes.analyse.algebra import MANTISSA, Matrix, Term, shares_left
from peft_fx.passes.analyse.candidates import SumCandidate, factors_in
from peft_fx.passes.analyse.flow import Flow, shared_path
from peft_fx.passes.analyse.linear_rules import Product, addends, products_in, through
from peft_fx.passes.analyse.reader import Occurrence, Reader
from peft_fx.passes.findings import Refusal
from peft_fx.passes.graph.nodes import coarsest, is_rounded, shape

BASE_READ_TOO = "what the layer gives without the adapter is read as well: x·W' would be another product beside x·W"


@dataclass(frozen=True)
class Sum:
    """A sum of the graph, with its terms; `taken` are the ways to those that found their group, or were refused one."""

    root: Node
    terms: tuple[Occurrence, ...]
    taken: frozenset[tuple[tuple[Node, int], ...]]

    @property
    def rest(self) -> list[Occurrence]:
        return [occ for occ in self.terms if occ.path not in self.taken]


class Sums:
    """What is in a graph: its groups, the sums they are in, and refusals of groups that the algebra alone would
    allow. Pure."""

    def __init__(self, graph: Graph, flow: Flow, reader: Reader, position: Mapping[Node, int], strict: bool = False):
        self.strict, self.reader, self.flow, self.position = strict, reader, flow, position
        self.groups: list[SumCandidate] = []
        self.refusals: list[Refusal] = []
        self.sums: list[Sum] = []
        self._weighted: dict[Node, list[tuple[Product, Node]]] = {}
        inside: set[Node] = set()
        for node in reversed(graph.nodes):
            if node in inside or len(addends(node) or []) < 2:
                continue
            terms = self.reader.read(node)
            inside |= {n for occ in terms for n, _ in occ.path}
            self._divide(node, terms)
        for found in (self.groups, self.refusals, self.sums):
            found.reverse()  # in graph order
        weights = {f.name for g in self.groups if not g.backward for f in (g.weight, *g.adapter_factors)}
        self.groups = [g for g in self.groups if not g.backward or self._multiplies_weights(g, weights)]

    def sources(self, node: Node) -> list[Node]:
        """The first equals of the values that a product multiplies weights by."""
        operands = (n for p in products_in(node) for n in (p.left, p.right))
        return [self.reader.number[through(n)] for n in operands if not self.flow.is_weight(n)]

    def weighted(self, node: Node) -> list[tuple[Product, Node]]:
        """The products that a node is made of, each with the weight that it multiplies a value by."""
        if node not in self._weighted:
            found = [(p, [n for n in (p.left, p.right) if self.flow.is_weight(n)]) for p in products_in(node)]
            self._weighted[node] = [(p, ns[0]) for p, ns in found if len(ns) == 1 and len(shape(ns[0])) > 1]
        return self._weighted[node]

    @functools.cached_property
    def group_of(self) -> Mapping[Node, SumCandidate]:
        """The first group with a base product."""
        return {g.product_node: g for g in reversed(self.groups)}

    @functools.cached_property
    def weights_of(self) -> Mapping[Node, list[Node]]:
        """By the first equal of a value, the weights that forward multiplies it by."""
        found: dict[Node, list[Node]] = defaultdict(list)
        for node in (n for n in self.position if n in self.flow.forward):
            weights = [w for p in products_in(node) for w in (p.left, p.right)]
            weights = [w for w in weights if self.flow.is_weight(w) and self.flow.parameters(w)]
            for u in dict.fromkeys(self.sources(node)) if weights else ():
                found[u] += weights
        return found

    def _multiplies_weights(self, group: SumCandidate, weights: set[Any]) -> bool:
        """In backward a sum of parameter gradients has the same form, `xᵀ·dy + xᵀ·dy`, with x in the place of W."""
        return all(self.flow.is_weight(f.name) or f.name in weights for f in (group.weight, *group.adapter_factors))

    def _divide(self, root: Node, terms: tuple[Occurrence, ...]) -> None:
        """The groups of one sum; every term goes to one group at most, those with the fewest factors in their base
        first."""
        taken: set[tuple[tuple[Node, int], ...]] = set()
        backward = root in self.flow.backward
        for group in sorted(self._candidates(root, terms, backward), key=self._preference):
            ways = {occ.path for occ in (group.base, *group.others)}
            if taken & ways or not (self.flow.of(group.shared) or self._is_from_elsewhere(group)):
                continue
            refusal = self._refusal(group)
            if refusal is None:
                self.groups.append(group)
            elif not backward:
                self.refusals.append(refusal)
            taken |= ways
        self.sums.append(Sum(root, terms, frozenset(taken)))

    def _is_from_elsewhere(self, group: SumCandidate) -> bool:
        """Where u is made of weights too, as a table of positions is: whether W and the adapter share a module that u
        is no part of. If not, the sum makes a weight, and there are no tokens."""
        own, adapter, u = (
            [self.flow.roles[p].name for f in factors for p in self.flow.parameters(f.name)[:1]]
            for factors in ((group.weight,), group.adapter_factors, group.shared)
        )
        return bool(own and adapter and u) and all(
            a != own[0] and shared_path(own[0], a) > max(shared_path(own[0], other) for other in u) for a in adapter
        )

    def _candidates(self, root: Node, terms: Iterable[Occurrence], backward: bool) -> Iterator[SumCandidate]:
        # of a product over no features at all, the sizes of the factors are not known
        products = [o for o in terms if o.term is not None and o.product and o.term.narrowest]
        for base in products:
            for right in (False, True):
                factors = _oriented(base, right).factors
                others = tuple(o for o in products if o is not base and shares_left(_oriented(o, right), factors[:-1]))
                product = base.product
                if not others or product is None or base.term is None:
                    continue
                others = tuple(o for o in others if _folds_like(o, factors[-1], right, len(factors) - 1))
                if not others:
                    continue
                read = self.reader.operand(product.left if right != base.flipped else product.right)
                if len(read.factors) == 1:  # W alone, not a product of W with part of what is shared
                    shared = tuple(f.T for f in reversed(factors[:-1])) if right else factors[:-1]
                    outer = base.term.scale.over(read.scale)
                    group = SumCandidate(root, base, others, shared, right, backward, outer, read.scale)
                    if adapting := tuple(
                        o for o in others if adapters.adds(self.flow, group.weight, group.added_by(o))
                    ):
                        yield replace(group, others=adapting)

    def _preference(self, group: SumCandidate) -> tuple[int, int, bool]:
        """Few factors in the base first, then much company, then a frozen weight."""
        return len(factors_in(group.base)), -len(group.others), self.flow.is_trained(group.weight.name)

    def _refusal(self, group: SumCandidate) -> Refusal | None:
        """The reason why a group that the algebra allows must stay as it is."""
        factors = group.adapter_factors
        name = group.site_name(self.flow)
        bits = self.flow.of(group.shared)
        scales = [n for occ in (group.base, *group.others) if occ.term for n in occ.term.scale.names]
        for node in (group.weight.name, *(f.name for f in factors), *scales):
            if self.flow.computed_from(node, bits):
                if self.flow.is_mask(node):
                    return Refusal(name, "dropout", f"{node}, a factor of the adapter, is drawn anew in every call")
                return Refusal(name, "input_dependent", f"{node}, a factor of the adapter, is computed from the input")
        several = [f for f in factors if f.batch != group.weight.batch == 1]
        if several:
            changes = self.flow.of(several)
            code = "input_dependent" if changes else "shape"
            return Refusal(name, code, f"{several[0].batch} adapters share one weight: a W' for each would be as many")
        if not group.backward and self._is_read_besides(group):
            return Refusal(name, "shared", BASE_READ_TOO)
        end = -1 if group.right else 0
        u = group.shared[end]
        for occ in group.others:
            v = factors_in(occ)[end]
            if MANTISSA.get(v.precision, 0) > MANTISSA.get(u.precision, 0):
                read = (
                    f"the adapter reads its input in {_plain(v.precision)}, the base product in {_plain(u.precision)}"
                )
                return Refusal(name, "dtype", read)
        base, adapter = (_held_in(occ) for occ in (group.base, max(group.others, key=_mantissa)))
        if MANTISSA.get(adapter, 0) > MANTISSA.get(base, 0) and not is_rounded(
            group.root, base, self.flow.side_of(group.root)
        ):
            held = f"the adapter's addend is {_plain(adapter)}, W·x is {_plain(base)}, and their sum is not rounded"
            return Refusal(name, "dtype", held)
        dtypes = frozenset(d for occ in (group.base, *group.others) if occ.term for d in occ.term.dtypes)
        written = " and ".join(sorted(map(_plain, dtypes)))
        if not dtypes <= MANTISSA.keys():
            return Refusal(name, "dtype", f"products in {written}")
        if self.strict and len(dtypes) > 1:
            return Refusal(name, "dtype", f"strict numerics, and the products are written in {written}")
        if None in group.ratios:
            return Refusal(name, "unknown_op", "the base product carries a scale that cannot be divided out")
        return None

    def _is_read_besides(self, group: SumCandidate) -> bool:
        """Whether forward reads the base product's result elsewhere than in the sum, or past it."""
        end, side = group.root, self.flow.forward
        seen, todo = {end}, [n for n in (group.product_node,) if n is not end]  # not where both are one addmm
        while todo:
            new = [u for u in todo.pop().users if u not in seen and (u in side or u.op == "output")]
            if any(u.op == "output" or self.position[u] > self.position[end] for u in new):
                return True
            seen.update(new)
            todo += new
        return False


def _folds_like(occ: Occurrence, weight: Matrix, right: bool, shared: int) -> bool:
    """Whether a term is folded back as the base's product is, in the gradient of a convolution's input, and no more."""
    *inner, last = _oriented(occ, right).factors[shared:]
    return last.window == weight.window and all(f.window is None for f in inner)


def _held_in(occ: Occurrence) -> torch.dtype:
    """The dtype that an addend is rounded to on its way to the sum."""
    return coarsest(node for node, _ in occ.path)


def _mantissa(occ: Occurrence) -> int:
    return MANTISSA.get(_held_in(occ), 0)


def _oriented(occ: Occurrence, right: bool) -> Term:
    """A term as its left or its right end is looked at."""
    assert occ.term is not None
    return occ.term.T if right else occ.term


def _plain(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
