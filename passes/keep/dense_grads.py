"""Parameter gradients that read a product's result, from `G = uᵀ·dy` instead.

The gradient of a vector behind a layer, `dl = Σ_t dy·(u·W)`, and of a matrix behind it, `(u·W)ᵀ·dz`, read u·W: a tensor
that the frozen model does not keep, and that takes the layer's own product to compute again. Both are sums over tokens
of something linear in u times something linear in dy, so they depend on `G = uᵀ·dy` alone (see `maps.py`):
`dl = Σ_k W·G`, `Wᵀ·(uᵀ·dz)`. G costs what u·W costs, is no larger than W, and several gradients of a layer share it:
where a vector has made it, and it is not rounded to less than they are, `dA = G·Bᵀ` and `dB = Aᵀ·G` read no token any
more. u is the narrowest value on the way: where the product is `z·B` with z = x·A of rank r, G = zᵀ·dy has r rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from peft_fx.passes.analyse.algebra import Size, finer
from peft_fx.passes.analyse.maps import AffineMaps
from peft_fx.passes.decide import price
from peft_fx.passes.decide.machine import Machine
from peft_fx.passes.findings import WEIGHT, Settings, Site
from peft_fx.passes.graph.editor import Editor
from peft_fx.passes.graph.joint import Joint
from peft_fx.passes.graph.nodes import (
    aten,
    is_tensor,
    numel,
    shape,
    tensor_arg,
    value,
)
from peft_fx.passes.keep.chains import Recompute
from peft_fx.passes.keep.contractions import (
    Contraction,
    by_itself,
    contractions,
    held_in,
    multiplied_in,
    shared,
    uncast,
)
from peft_fx.passes.keep.half_products import MIXED
from peft_fx.passes.keep.policies import POLICIES
from peft_fx.passes.rewrite.materialise import Diagonal, Materialise, Value

FEW = 8  # with an eighth as many tokens as G has rows, a result is kept for a vector's gradient
NARROW = 4  # a product with a quarter of its input's columns is computed again


def dense_grads(joint: Joint, settings: Settings) -> None:
    """Has gradients made of `G = uᵀ·dy` where that pays: by itself, and beside what the forms have saved."""
    found, notes = joint.found, joint.notes
    notes.as_it_was = is_as_it_was(joint, settings)
    if settings.numerics == "default" and settings.adapter_grad != "low_rank" and not notes.as_it_was:
        rows = joint.maps
        chosen = _chosen(joint, settings)
        weights = {p for one in chosen.values() for p in _weights(one, rows)}
        notes.reads_tokens = _made(joint, settings.machine, chosen)
        names = {notes.adapter_of.get(p, joint.roles[p].name) for p in weights}
        found.sites = [_with_dense_gradient(site, names) for site in found.sites]


def _chosen(joint: Joint, settings: Settings) -> dict[Node, Contraction]:
    """The gradients to be made of G, by their nodes.

    A lossy policy keeps less than what is kept without them: what it keeps of a matrix's input is read, not made again
    by a product; and a layer's result is not kept for a vector. Where dense gradients are asked for by name, wherever
    it can be done.
    """
    rows, hint, machine = joint.maps, joint.sizes.hint, settings.machine
    lossy, dense = settings.keep in POLICIES, settings.adapter_grad == "dense"
    met = list(contractions(joint.graph, rows))
    found = [c for c in (by_itself(m, rows, None if dense else NARROW) for m in met) if c is not None]
    if not found:
        return {}
    keep = joint.recompute(settings.rebuild_random)
    chosen: dict[Node, Contraction] = {}
    for one in found:
        at_hand = not lossy and keep.costs_nothing(one.read)
        pays = dense or (not at_hand and _pays(one, rows.of[one.source].width, hint, keep))
        if pays and not (one.is_matrix and lossy):
            chosen[one.node] = one
    priced = settings.form == "auto" and (joint.found.sites or joint.found.refusals)
    if priced and not (dense or lossy):
        chosen = _afforded(chosen, joint, settings, keep)
    alone = list(chosen.values())
    more = [shared(m, alone, rows, hint, machine) for m in met if m[0] not in chosen and not lossy]
    return chosen | {one.node: one for one in more if one is not None}


def _weights(one: Contraction, rows: AffineMaps) -> frozenset[Node]:
    """The weights whose products are not computed again, trained ones where no frozen one is met."""
    row = rows.of[one.read]
    is_input = one.source is row.source or not rows.of[one.source].products
    return (row.frozen or row.trained) if is_input else frozenset()


def _made(joint: Joint, machine: Machine, chosen: dict[Node, Contraction]) -> frozenset[Node]:
    """Has them made of G; the products that read activations for it."""
    rows, edit = joint.maps, joint.edit
    made: dict[Any, Node] = {}
    for node in [n for n in joint.graph.nodes if n in chosen]:  # the first one makes what others share
        with edit.at(node):
            new = _Gradient(edit, rows, chosen[node], made, machine).gradient()
            edit.replace(node, edit.laid_out(new, value(node).stride()))
    return frozenset(made.values())


def _afforded(
    chosen: dict[Node, Contraction], joint: Joint, settings: Settings, keep: Recompute
) -> dict[Node, Contraction]:
    """Those that may be made: by turns the one that saves most bytes in a second, while the seconds last that the forms
    have saved; a GB less that is kept is worth some besides."""
    hint, machine = joint.sizes.hint, settings.machine
    by_product: dict[Any, list[Contraction]] = {}
    for one in chosen.values():
        by_product.setdefault((one.u, one.dy), []).append(one)
    priced = []
    for (u, dy), ones in by_product.items():
        K, M = (hint(shape(n)[-1]) for n in (u, dy))
        seconds = _seconds(machine, hint(numel(shape(u))) // max(1, K), K, M, u, dy)
        seconds -= sum(_instead(machine, one, hint, keep) for one in ones)
        priced.append((seconds, sum(map(keep.bytes, {one.read for one in ones})), ones))
    left = joint.found.spare
    made: set[Node] = set()
    for seconds, saved, ones in sorted(priced, key=lambda p: p[0] / max(1, p[1])):
        cost = seconds - settings.memory_weight * saved / 1e9
        if cost <= left:
            left -= max(0.0, cost)
            made.update(one.node for one in ones)
    return {node: one for node, one in chosen.items() if node in made}


def _seconds(machine: Machine, T: int, K: int, M: int, u: Node, dy: Node) -> float:
    """Of G = uᵀ·dy, and of a pass over it beside as large a weight."""
    held = held_in(u, dy, machine)
    seconds = machine.product(K, T, M, multiplied_in(u, dy, machine)) + machine.one_pass(2 * K * M * held.itemsize)
    own = finer(value(uncast(u)).dtype, value(dy).dtype)
    copied = T * (K + M) * (own.itemsize + held.itemsize) if held != own and not machine.mixed else 0
    return seconds + (machine.one_pass(copied) if copied else 0.0)


def _instead(machine: Machine, one: Contraction, hint: Callable[[Size], int], keep: Recompute) -> float:
    """Seconds of what reads all tokens otherwise."""
    if not one.is_matrix:
        return machine.one_pass(keep.bytes(one.read))
    (m, k), n = map(hint, shape(tensor_arg(one.node, 0))), hint(shape(one.node)[1])
    return machine.product(m, k, n, value(one.node).dtype)


def _pays(found: Contraction, width: int, hint: Callable[[Size], int], keep: Recompute) -> bool:
    """Not for few tokens, nor where x would be kept in the place of less, of x·A where A is frozen."""
    tokens = hint(numel(shape(found.source))) // width if width else 0
    if not tokens or tokens < (width if found.is_matrix else width / FEW):
        return False
    read, source = (hint(numel(shape(n))) for n in (found.read, found.source))
    return read >= source or keep.cost(found.source) <= keep.bytes(found.read)


class _Gradient:
    """One gradient from G."""

    def __init__(self, edit: Editor, rows: AffineMaps, found: Contraction, made: dict[Any, Node], machine: Machine):
        self.edit, self.rows, self.found, self.made, self.machine = edit, rows, found, made, machine
        self.dtype = price.merge_dtype(value(found.source).dtype)
        if found.is_matrix:  # a product in fp64 takes longer than what it is instead of
            self.dtype = finer(torch.float32, value(found.node).dtype)

    def gradient(self) -> Node:
        node = self.found.node
        result = self._matrix() if self.found.is_matrix else self._vector()
        result = self.edit.reshape(result, list(shape(node)))
        return self.edit.cast(result, value(node).dtype)

    def _read(self) -> tuple[Node | Diagonal, Node | None]:
        """What is read of forward, on the rows of an identity in the place of the tokens, and its constant: weights, to
        be made in backward."""
        source, read = self.found.source, self.found.read
        with self.edit.provenance(self.found.node, rebuilt=True):
            again = Materialise(self.edit, self.rows.from_source([read], source), source, self._width, self.dtype)
            found = again.value(read)
            return (found.rows, found.constant) if self.found.is_matrix else again.matrix(read)

    @property
    def _width(self) -> int:
        return self.rows.of[self.found.source].width

    def _vector(self) -> Node:
        """`Σ_t read·other`."""
        rows, constant = self._read()
        assert isinstance(rows, Node)
        result = self.edit.times(rows, self._second())
        result = self.edit.call(aten.sum.dim_IntList, result, [0])
        if constant is not None:
            total = self.edit.times(constant, self._first())
            result = self.edit.add(result, self.edit.call(aten.squeeze.dim, total, 0))
        return result

    def _matrix(self) -> Node:
        """`readᵀ·other` or `otherᵀ·read`, K rows in the place of the tokens; and one row more for the constant."""
        rows, constant = self._read()
        result = self._times(rows, self._on(self._second(), self._width))
        if constant is not None:
            outer = self.edit.times(constant, self._on(self._first(), 1))
            result = self.edit.add(result, outer)
        return result

    def _times(self, rows: Node | Diagonal, others: Node) -> Node:
        left = self.found.node.args[0] is self.found.read
        if isinstance(rows, Node):
            return self.edit.call(aten.mm.default, *((rows, others) if left else (others, rows)))
        if rows.of is None:
            return others
        return self.edit.times(others, self.edit.reshape(rows.of, [-1, 1] if left else [1, -1]))

    def _on(self, rows: Node, count: int) -> Node:
        """`other` on the rows of G, or of their sum, in the place of the tokens."""
        origin, other = self.found.origin, self.found.other
        replay = Materialise(self.edit, self.rows.from_source([other], origin), origin, count, self.dtype)
        replay.values[origin] = Value(self.edit.reshape(rows, replay.sizes(origin)))
        return replay.written(other)

    def _tokens(self) -> tuple[Node, Node]:
        """u as [T,K] and what it meets as [T,M], in one dtype, that of the coarser unless they hold more."""
        u, other = uncast(self.found.u), self.found.dy
        M = shape(other)[-1] if self.found.is_matrix else self.rows.of[self.found.read].width
        dtype = finer(value(u).dtype, value(other).dtype)
        u = self.edit.reshape(u, [-1, self._width])
        other = self.edit.reshape(other, [-1, M])
        return self.edit.cast(u, dtype), self.edit.cast(other, dtype)

    def _second(self) -> Node:
        """G = uᵀ·dy [K,M]."""
        key = "G", self.found.u, self.found.dy
        if key not in self.made:
            u, dy = self._tokens()
            self.made[key] = self._over_tokens(self.edit.flip(u), dy)
        return self.edit.cast(self.made[key], self.dtype)

    def _over_tokens(self, u: Node, dy: Node) -> Node:
        held = held_in(self.found.u, self.found.dy, self.machine)
        if value(u).dtype == held:
            return self.edit.call(aten.mm.default, u, dy)
        if value(u).device.type in MIXED:
            return self.edit.call(aten.mm.dtype, u, dy, held)
        return self.edit.call(aten.mm.default, *(self.edit.cast(n, held) for n in (u, dy)))

    def _first(self) -> Node:
        """Σ_t dy [1,M]: what a constant beside u·W meets."""
        key = "sum", self.found.dy
        if key not in self.made:
            _, dy = self._tokens()
            self.made[key] = self.edit.call(aten.sum.dim_IntList, self.edit.cast(dy, self.dtype), [0], True)
        return self.edit.cast(self.made[key], self.dtype)


def _with_dense_gradient(site: Site, weights: set[str]) -> Site:
    """The site, whose adapter's gradients come from xᵀ·dy where that is said of its weight."""
    name = site.layer
    dense = any(w == name or w.startswith(f"{name}.") for w in weights)
    return replace(site, adapter_grad="dense") if dense else site


def _on_a_gpu(joint: Joint) -> bool:
    return any(is_tensor(n) and value(n).device.type == "cuda" for n in joint.graph.find_nodes(op="placeholder"))


def _asks_for_time(settings: Settings) -> bool:
    """Whether what a kernel takes to start, which is most of it for few tokens on a GPU, is worth more than memory."""
    return settings.keep == "recompute" and not settings.memory_weight and settings.adapter_grad != "dense"


def all_cheaper_as_written(joint: Joint, settings: Settings) -> bool:
    """Whether the price left every adapter alone: then so are the products of their gradients.

    Few tokens make it so, of which copies are small, and reading in place costs more than the adapters do.
    """
    weight = any(WEIGHT in (s.forward, s.input_grad) for s in joint.found.sites)
    priced = settings.form == "auto" or not joint.found.sites
    return priced and not weight and not joint.found.refusals


def is_as_it_was(joint: Joint, settings: Settings) -> bool:
    """Whether the graph is Inductor's, and no other, as far as the forms say."""
    return all_cheaper_as_written(joint, settings) and _on_a_gpu(joint) and _asks_for_time(settings)
