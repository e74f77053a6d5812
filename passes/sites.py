"""Which sums are a product and its adapters, where they are, and why others that look alike are left alone.

A *group* is what one sum offers: a product `u·W` of two factors, its base, and further terms that share `u` (at the left, or at
the right as in `W @ x`). A *site* is what a user calls an adapter: the groups of one base weight with the same adapter factors,
in forward and in the input gradient. What looks like an adapter and has no weight form is a `Refusal`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node

from peft_fx.passes.algebra import MANTISSA, Matrix, Scale, Size, Term, shares_left, without_left
from peft_fx.passes.transfer import (
    RULES,
    Occurrence,
    Reader,
    addends,
    aten,
    is_random,
    is_tensor,
    numel,
    shape,
    value,
)

WEIGHT, ACTIVATION, NONE = "weight", "activation", "none"


@dataclass(frozen=True)
class Role:
    """What a graph input is: its name in the user's module, whether it stays the same from call to call, whether it is trained."""

    name: str
    static: bool = False
    trainable: bool = False


Roles = Mapping[Node, Role]


@dataclass(frozen=True)
class Refusal:
    """An adapter without a weight form. `code` is stable: dropout, different_input, nonlinear, input_dependent, mutation, dtype,
    quantized, subclass, shape, unknown_op, logits_returned; `detail` says what was met."""

    name: str
    code: str
    detail: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Site:
    """An adapter with a weight form, and the forms that were chosen for it.

    `tokens`, `in_features`, `out_features`, `rank` are sizes (for a dynamic number of tokens, its hint); `forward` and `input_grad` are
    "weight", "activation" or "none", `adapter_grad` "low_rank", "dense" or "none"; `flops` and `bytes` are {"before", "after"} of all of its
    products in one step; `reason` is the price's.
    """

    name: str
    method: str
    tokens: int
    in_features: int
    out_features: int
    rank: int
    dtype: str
    forward: str
    input_grad: str
    adapter_grad: str
    reason: str
    flops: dict[str, int] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Group:
    """One base product `u·W` (or `W·u`) of a sum, and the other terms of the sum that share `u`."""

    root: Node
    base: Occurrence
    others: tuple[Occurrence, ...]
    shared: tuple[Matrix, ...]
    right: bool  # u is the right factor
    backward: bool

    @property
    def weight(self) -> Matrix:
        """W as it multiplies u, [K,N]; from the right, [N,K]."""
        assert self.base.term is not None
        return self.base.term.factors[0 if self.right else -1]

    @property
    def remainders(self) -> tuple[Term, ...]:
        """What multiplies u besides W, in W's orientation."""
        terms = []
        for occ in self.others:
            assert occ.term is not None
            terms.append(
                _without(occ.term, self.shared, self.right) if self.right else without_left(occ.term, self.shared)
            )
        return tuple(terms)

    @property
    def tokens(self) -> Size:
        u = self.shared[-1].T if self.right else self.shared[0]
        return u.shape[0] * (u.batch if self.weight.batch == 1 else 1)

    @property
    def key(self) -> Any:
        """Equal for the groups of one adapter, forward and input gradient."""
        return self.weight.name, frozenset(f.name for t in self.remainders for f in t.factors)


def _without(term: Term, suffix: tuple[Matrix, ...], right: bool) -> Term:
    return without_left(term.T, tuple(f.T for f in reversed(suffix))).T


class Analysis:
    """What is in a graph: groups and refusals, in graph order. Pure."""

    def __init__(self, graph: Graph, roles: Roles, strict: bool = False):
        self.roles, self.strict = roles, strict
        self.reader = Reader(graph)
        self.position = {n: i for i, n in enumerate(graph.nodes)}
        self.tangent = _reachable(graph, lambda n: n.op == "placeholder" and "tangents" in n.name)
        self.depends = _dependences(graph, roles)
        self.groups: list[Group] = []
        self.refusals: list[Refusal] = []
        absorbed: set[Node] = set()
        for node in reversed(graph.nodes):
            parts = addends(node)
            if parts is None or node in absorbed or len(parts) < 2:
                continue
            occurrences = self.reader.read(node)
            absorbed |= {n for occ in occurrences for n, _ in occ.path}
            self._look_at(node, occurrences)
        self.groups.sort(key=lambda g: self.position[g.root])
        self.refusals = _once(reversed(self.refusals))

    def _look_at(self, root: Node, occurrences: tuple[Occurrence, ...]) -> None:
        taken: set[tuple[tuple[Node, int], ...]] = set()
        backward = root in self.tangent
        refused: list[Refusal] = []
        for group in sorted(self._candidates(root, occurrences, backward), key=_preference(self.roles)):
            paths = {occ.path for occ in (group.base, *group.others)}
            if taken & paths:
                continue
            refusal = self._forbids(group)
            taken |= paths
            if refusal is None:
                self.groups.append(group)
            elif not backward:
                refused.append(refusal)
        if not backward:
            rest = [occ for occ in occurrences if occ.path not in taken]
            refused += self._suspects(occurrences, rest)
        self.refusals += reversed(refused)

    def _candidates(self, root: Node, occurrences: Iterable[Occurrence], backward: bool) -> list[Group]:
        found = []
        products = [o for o in occurrences if o.term is not None and o.product and len(o.term.factors) > 1]
        for base in products:
            assert base.term is not None
            for right in (False, True):
                factors = base.term.T.factors if right else base.term.factors
                others = tuple(
                    o
                    for o in products
                    if o is not base
                    and o.term is not None
                    and shares_left(o.term.T if right else o.term, factors[:-1])
                )
                if others:
                    shared = tuple(f.T for f in reversed(factors[:-1])) if right else factors[:-1]
                    found.append(Group(root, base, others, shared, right, backward))
        return found

    def _forbids(self, group: Group) -> Refusal | None:
        """The reason why a group that the algebra allows must stay as it is."""
        assert group.base.term is not None
        terms = [group.base.term, *(o.term for o in group.others if o.term)]
        name = self.name_of(group.weight, [f for t in group.remainders for f in t.factors])
        shared = self.depends.of(group.shared)
        for f in (group.weight, *(f for t in group.remainders for f in t.factors)):
            if self.depends.computed_from(f, shared):
                return Refusal(name, "input_dependent", f"a factor of the adapter, {f.name}, is computed from the input")
        u = group.shared[-1 if group.right else 0]
        for term in terms[1:]:
            v = term.factors[-1 if group.right else 0]
            if MANTISSA.get(v.precision, 0) > MANTISSA.get(u.precision, 0):
                return Refusal(
                    name, "dtype", f"the adapter reads its input in {v.precision}, the base product in {u.precision}"
                )
        dtypes = frozenset(d for t in terms for d in t.dtypes)
        if not all(d.is_floating_point for d in dtypes):
            return Refusal(name, "dtype", f"products in {', '.join(map(str, dtypes))}")
        if self.strict and len(dtypes) > 1:
            written = " and ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))
            return Refusal(name, "dtype", f"strict numerics, and the products are written in {written}")
        if any(self.scale_ratio(group, o) is None for o in group.others):
            return Refusal(name, "unknown_op", "the base product carries a scale that cannot be divided out")
        return None

    def scale_ratio(self, group: Group, occ: Occurrence) -> Scale | None:
        """`s` of `u·W + s·u·A·B`, with what multiplies the whole base product divided out (not what multiplies W itself)."""
        product = group.base.product
        assert product is not None and occ.term is not None
        return occ.term.scale.over(self.outer_scale(group))

    def outer_scale(self, group: Group) -> Scale:
        assert group.base.term is not None
        inner = self.inner_scale(group)
        outer = group.base.term.scale.over(inner)
        return outer if outer is not None else Scale(0.0)

    def inner_scale(self, group: Group) -> Scale:
        """The scale that the base's weight operand itself carries: `x @ (2·W)`."""
        product = group.base.product
        assert product is not None
        operand = product.left if group.right else product.right
        return self.reader.scale_within(operand)

    # ------------------------------------------------------------------------------------------------------------- names

    def name_of(self, weight: Matrix, adapters: Iterable[Matrix]) -> str:
        """The module that holds the weight and its adapter: what their names share, or the weight's own name."""
        own = self.parameter_names(weight.name)
        base = own[0] if own else str(weight.name)
        best: list[str] = []
        for f in adapters:
            for other in self.parameter_names(f.name):
                common = _common(base.split("."), other.split("."))
                best = max(best, common, key=len)
        if base.rpartition(".")[0].split(".") == best and not base.endswith("weight"):
            return base  # several weights in one module, told apart by their own names
        return ".".join(best) or base.removesuffix(".weight")

    def parameter_names(self, node: Any) -> list[str]:
        """The names of the static graph inputs that a weight is computed from, itself first."""
        seen, todo, names = set(), [node], []
        while todo and len(seen) < 64:
            n = todo.pop(0)
            if not isinstance(n, Node) or n in seen:
                continue
            seen.add(n)
            if n in self.roles:
                names.append(self.roles[n].name)
            todo += n.all_input_nodes
        return names

    # --------------------------------------------------------------------------------------------------------- refusals

    def _suspects(self, all_: Iterable[Occurrence], rest: Iterable[Occurrence]) -> list[Refusal]:
        """Adapters without a weight form: addends beside a base product that end in a narrow trained product."""
        bases = [
            o.term for o in all_ if o.term is not None and o.product and len(o.term.factors) == 2 and not self._narrow(o.term)
        ]
        if not bases:
            return []
        sources = {f.name for t in bases for f in t.factors}
        found = []
        for occ in rest:
            node = _operand(occ)
            if node is None or (occ.term in bases):
                continue
            way = self._way_to_adapter(node)
            if way:
                code, detail = self._diagnose(way, sources)
                weight = max((f for t in bases for f in t.factors), key=lambda f: self._static(f.name))
                adapter = Matrix(way[-1][1], 0)
                name = self.name_of(self._nearest(bases, adapter) or weight, [adapter])
                found.append(Refusal(name, code, detail))
        return found

    def _nearest(self, bases: list[Term], adapter: Matrix) -> Matrix | None:
        """Among several base weights, the one whose name shares most with the adapter's."""
        names = self.parameter_names(adapter.name)
        best, most = None, -1
        for f in (f for t in bases for f in t.factors):
            for own in self.parameter_names(f.name)[:1]:
                shared = max((len(_common(own.split("."), n.split("."))) for n in names), default=0)
                if self._static(f.name) and shared > most:
                    best, most = f, shared
        return best

    def _static(self, node: Any) -> bool:
        return isinstance(node, Node) and not self.depends.bits.get(node, 1)

    def _narrow(self, term: Term) -> bool:
        return any(_is_narrow(f) and self._trained(f.name) for f in term.factors)

    def _trained(self, node: Any) -> bool:
        seen, todo = set(), [node]
        while todo and len(seen) < 16:
            n = todo.pop()
            if isinstance(n, Node) and n not in seen:
                seen.add(n)
                if n in self.roles and self.roles[n].trainable:
                    return True
                todo += n.all_input_nodes
        return False

    def _way_to_adapter(self, start: Node) -> list[tuple[Node, Node]]:
        """From an addend upwards to the product with the adapter's first factor: pairs of a node and the operand taken."""
        best: list[tuple[Node, Node]] = []
        todo: list[tuple[Node, list[tuple[Node, Node]]]] = [(start, [])]
        seen: set[Node] = set()
        while todo and len(seen) < 80:
            node, way = todo.pop(0)
            if node in seen or node.op != "call_function" or node in self.tangent:
                continue
            seen.add(node)
            narrow = self._narrow_weight(node)
            if narrow is not None:
                best = [*way, (node, narrow)]  # the deepest one found so far: the adapter's first factor
            forward_users = [u for u in node.users if u not in self.tangent]
            if way and len(forward_users) > 1 and narrow is None:
                continue
            for operand in node.all_input_nodes:
                if is_tensor(operand) and not self._static(operand):
                    todo.append((operand, [*way, (node, operand)]))
        return best

    def _narrow_weight(self, node: Node) -> Node | None:
        for part in addends(node) or []:
            product = part.operand
            if isinstance(getattr(product, "left", None), Node):
                for operand in (product.left, product.right):  # type: ignore[union-attr]
                    sizes = shape(operand)[-2:]
                    if len(sizes) == 2 and sizes[0] != sizes[1] and self._static(operand) and self._trained(operand):
                        return operand  # type: ignore[no-any-return]
        return None

    def _diagnose(self, way: list[tuple[Node, Node]], sources: set[Any]) -> tuple[str, str]:
        """Why the way from the sum to the adapter's first product, and from there to its input, is no linear form of the base's."""
        for node, operand in way[:-1]:
            verdict = self._obstacle(node, operand)
            if verdict:
                return verdict
        first = way[-1][0]
        product = next(p.operand for p in addends(first) or [] if hasattr(p.operand, "left"))
        source = product.right if product.left is way[-1][1] else product.left  # type: ignore[union-attr]
        seen, todo = set(), [source]
        ops: list[str] = []
        while todo and len(seen) < 40:
            node = todo.pop(0)
            if node in seen or self.reader.number[node] in sources or node.op != "call_function":
                continue
            seen.add(node)
            if is_random(node):
                return "dropout", "the adapter reads a dropped-out copy of the base's input: no single W' exists"
            if _in_place(node):
                return "mutation", f"the input is changed in place between the two uses ({_label(node)})"
            ops.append(_label(node))
            todo += [n for n in node.all_input_nodes if is_tensor(n)]
        return "different_input", f"the adapter reads another tensor than the base product ({', '.join(ops[:3]) or source})"

    def _obstacle(self, node: Node, operand: Node) -> tuple[str, str] | None:
        """The code for an op on the adapter's way that is not linear in the operand taken, or None."""
        others = [n for n in node.all_input_nodes if n is not operand and is_tensor(n)]
        if any(self.depends.random(n) for n in (node, *others)) and not self.depends.random(operand):
            return "dropout", f"{_label(node)} draws a mask per token inside the adapter: no single W' exists"
        parts = addends(node)
        if parts is not None:
            # an operand that is a product's weight side: the factor itself is computed from the input
            for part in parts:
                product = part.operand
                if hasattr(product, "left") and all(not self._static(n) for n in (product.left, product.right)):  # type: ignore[union-attr]
                    return "input_dependent", f"{_label(node)} multiplies by a matrix computed from the input"
            return None
        if node.target in (aten.mul.Tensor, aten.div.Tensor) and others:
            if all(self._static(n) for n in others):
                return "unknown_op", f"{_label(node)} by a vector between the adapter's products"
            return "input_dependent", f"{_label(node)} by a value of each token, which no W' can hold"
        if torch.Tag.pointwise in getattr(node.target, "tags", ()) or node.target in NORMALISING:
            return "nonlinear", f"{_label(node)} between the adapter's products"
        return "unknown_op", f"{_label(node)} has no linear form"


NORMALISING = {
    aten._softmax.default,
    aten._log_softmax.default,
    aten.native_layer_norm.default,
    aten.mean.dim,
    aten.var_mean.correction,
    aten.amax.default,
    aten.sum.dim_IntList,
}


@dataclass(frozen=True)
class Dependences:
    """For every node, as bits, the graph inputs that are not static and the random draws it is computed from."""

    bits: dict[Node, int]
    draws: int

    def of(self, factors: Iterable[Matrix]) -> int:
        return _union(self.bits[f.name] for f in factors if isinstance(f.name, Node))

    def random(self, node: Node) -> bool:
        return bool(self.bits.get(node, 0) & self.draws)

    def computed_from(self, factor: Matrix, shared: int) -> bool:
        """A graph input is what it is, whoever else reads it; a computed factor must not depend on `u`, nor on chance."""
        node = factor.name
        if not isinstance(node, Node) or node.op == "placeholder":
            return False
        return bool(self.bits[node] & (shared | self.draws))


def _union(bits: Iterable[int]) -> int:
    total = 0
    for b in bits:
        total |= b
    return total


def _dependences(graph: Graph, roles: Roles) -> Dependences:
    bits: dict[Node, int] = {}
    draws, following = 0, 1
    for node in graph.nodes:
        bits[node] = _union(bits[n] for n in node.all_input_nodes)
        role = roles.get(node)
        fresh = is_random(node) or (
            node.op == "placeholder" and is_tensor(node) and not (role is not None and role.static)
        )
        if fresh:
            bits[node] |= following
            draws |= following if is_random(node) else 0
            following <<= 1
    return Dependences(bits, draws)


def _reachable(graph: Graph, start: Any) -> set[Node]:
    found: set[Node] = set()
    for node in graph.nodes:
        if start(node) or any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def _preference(roles: Roles) -> Any:
    """Bases with few factors first, then those with most company, then frozen ones, then weights before anything narrow."""

    def key(group: Group) -> tuple[Any, ...]:
        assert group.base.term is not None
        trained = isinstance(group.weight.name, Node) and group.weight.name in roles and roles[group.weight.name].trainable
        return len(group.base.term.factors), -len(group.others), trained

    return key


def _is_narrow(f: Matrix) -> bool:
    rows, cols = f.shape
    return isinstance(f.name, Node) and isinstance(rows, int) and isinstance(cols, int) and rows != cols


def _operand(occ: Occurrence) -> Node | None:
    if not occ.path:
        return None
    node, i = occ.path[-1]
    operand = (addends(node) or [])[i].operand
    return operand if isinstance(operand, Node) else node


def _in_place(node: Node) -> bool:
    stack = node.meta.get("source_fn_stack") or node.meta.get("fwd_source_fn_stack") or [("", "")]
    target = stack[-1][1]
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or name in {"iadd", "imul", "isub", "itruediv"}


def _label(node: Node) -> str:
    return str(node.target).removesuffix(".default").removesuffix(".Tensor")


def _common(a: list[str], b: list[str]) -> list[str]:
    shared = []
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        shared.append(x)
    return shared


def _once(refusals: Iterable[Refusal]) -> list[Refusal]:
    """One refusal for each name: the first met in the forward pass."""
    return list({r.name: r for r in reversed(list(refusals))}.values())[::-1]


__all__ = ["ACTIVATION", "NONE", "RULES", "WEIGHT", "Analysis", "Group", "Refusal", "Role", "Roles", "Site", "numel", "value"]
