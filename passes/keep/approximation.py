"""Lossy keeps of what an adapter's gradient reads: small parts, and an approximation of it for that gradient alone.

    x ── forward, input gradient                    x ── forward, input gradient
    └─── adapter's gradient            ->           └─── parts, kept ─── x̃, rebuilt ─── adapter's gradient

It acts where keeping costs something: on values that the frozen model's backward does not keep, and that no pointwise
chain rebuilds from what it keeps. These are the beginnings of the chains that `chains.py` found; casts, activations and
dropout on the way to the gradient are computed again from x̃. What is read through a product stays exact, as x·A is,
which dB reads: it is narrow, and kept instead. A value that is kept in any case, because something else reads it as
well, is left alone, and so is one inside a checkpoint, which is not kept. Neither forward nor the input gradient reads
any node of this.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Set
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch.fx import Node
from torch.fx.node import map_arg

from peft_fx.passes.analyse.algebra import Size
from peft_fx.passes.analyse.find import ALIKE, made_alike
from peft_fx.passes.analyse.flow import returned
from peft_fx.passes.findings import EXACT, REBUILT, KeptInput, Settings
from peft_fx.passes.graph.editor import REBUILD
from peft_fx.passes.graph.joint import Joint
from peft_fx.passes.graph.nodes import LAYOUTS, PRODUCTS, SCALINGS, SUMS, aten, factors_of, shape, value
from peft_fx.passes.keep.chains import PARTS, SMALL, Recompute, products
from peft_fx.passes.keep.policies import POLICIES, Policy

FREE = "rebuilt from what backward keeps in any case"


@dataclass(frozen=True)
class Read:
    """A value that a product of backward reads for the gradients of adapters, all `known`, and those beginnings of its
    chain that only this costs."""

    gradient: Node
    operand: Node
    names: frozenset[str]
    known: bool
    costs: tuple[Node, ...]
    through_product: bool

    @property
    def features(self) -> Size:
        """K of x in xᵀ·g or gᵀ·x."""
        is_left = self.gradient.target in PRODUCTS and factors_of(self.gradient)[0] is self.operand
        return (1, 1, *shape(self.operand))[-2 if is_left else -1]


def compress(joint: Joint, settings: Settings) -> None:
    """Has the graph keep parts of what it can, by the policy asked for, where one is."""
    if settings.keep in POLICIES:
        joint.found.inputs = kept_inputs(joint, settings, joint.recompute(settings.rebuild_random))


def kept_inputs(joint: Joint, settings: Settings, keep: Recompute) -> list[KeptInput]:
    """What is kept of every value that adapters' gradients read. The policy of the name `settings.keep` has the graph
    keep parts of what it can; a name without a policy changes nothing.

    `keep_layers` are glob patterns of names: it acts on these alone, and then on those of other modules too.
    """
    chosen, asked = settings.keep, (settings.velora_group, settings.keep_rounding, settings.machine.name)
    policies = {k: make(*asked) for k, make in POLICIES.items()}
    change, before = _Change(joint, keep, settings.keep_layers), joint.position
    found: list[KeptInput] = []
    for node, readers in change.values.items():
        if not _names(readers):
            continue
        point = change.point(node, readers)
        verdicts = {name: change.verdict(point, readers, name) for name in _names(readers)}
        able = {} if any(verdicts.values()) else {k: p for k, p in policies.items() if not p.refusal(value(point))}
        sizes = {EXACT: keep.bytes(node)} | {k: _size(p, point, sizes_of=keep.bytes) for k, p in able.items()}
        beside = change.kept_beside(node)
        needed = sum(map(keep.bytes, [*beside, *change.read_through_products(readers)]))
        able = {k: p for k, p in able.items() if sizes[k] + needed < sizes[EXACT]}
        if chosen in able:
            change.make_likeness(point, able[chosen], beside)
        elif chosen in policies and not any(verdicts.values()):
            more = "dearer", f"what could no longer be made of it takes {needed} bytes more"
            verdicts = dict.fromkeys(verdicts, policies[chosen].refusal(value(point)) or more)
        now = chosen if chosen in able else EXACT
        for name, verdict in verdicts.items():
            code, detail = verdict or ("", "")
            if code == "checkpointed":
                found.append(KeptInput(name, REBUILT, code, detail))
            else:
                found.append(KeptInput(name, now, code, detail, {**sizes, "now": sizes[now]}))
    change.reread()
    costly = _names(r for r in change.reads if r.costs)
    free = [KeptInput(n, REBUILT, "rebuilt", FREE) for n in _names(change.reads) if n not in costly]
    made = (n for n in joint.graph.nodes if n not in before)
    joint.notes.rebuilt = frozenset(n for n in made if n.meta.get("recompute") == REBUILD)
    return found + free


def _names(reads: Iterable[Read]) -> list[str]:
    return list(dict.fromkeys(name for r in reads for name in sorted(r.names)))


def _size(policy: Policy, point: Node, sizes_of: Callable[[Node], int]) -> int:
    features, dtype = int(shape(point)[-1]), value(point).dtype  # type: ignore[arg-type]
    return policy.size(sizes_of(point) // (features * dtype.itemsize), features, dtype)


class _Change:
    """The values that only adapters' gradients cost, by their first equal, and the likenesses that those are to
    read."""

    def __init__(self, joint: Joint, keep: Recompute, layers: Collection[str]):
        self.edit, self.keep, self.layers = joint.edit, keep, layers
        self.members, self.layer_inputs = joint.notes.adapter_of, joint.notes.layer_inputs
        self.number, self.flow = joint.numbers, joint.flow
        self.equals: dict[Node, list[Node]] = defaultdict(list)
        for node, first in self.number.items():
            self.equals[first].append(node)
        self.reads = list(self._reads())
        self.values: dict[Node, list[Read]] = {}
        for read in self.reads:
            for node in read.costs:
                self.values.setdefault(self.number[node], []).append(read)
        self.likeness: dict[Node, Node] = {}
        self._copies: dict[Node, Node] = {}

    # ------------------------------------------------------------------------------------------------------ finding

    def _reads(self) -> Iterator[Read]:
        keep = self.keep
        frozen = {self.number[n] for n in keep.frozen}
        serves = _parameters_of(keep)
        for gradient in (n for n in keep.graph.nodes if n in serves):
            names = {p: self._name(p) for p in serves[gradient]}
            for operand in gradient.all_input_nodes:
                if operand not in keep.origins:
                    continue
                origin = keep.origins[operand]
                costs = (n for n in sorted(origin.leaves) if self.number[n] not in frozen)
                costs = (n for n in costs if SMALL * keep.bytes(n) > keep.bytes(operand))
                through = any(products(n) for n in origin.chain)
                known = frozenset(name for name in names.values() if name)
                yield Read(gradient, operand, known, all(names.values()), tuple(costs), through)

    def _name(self, parameter: Node) -> str:
        """Of the adapter; of the module where `layers` ask for it."""
        if parameter in self.members:
            return self.members[parameter]
        module = self.keep.flow.roles[parameter].name.rpartition(".")[0] or self.keep.flow.roles[parameter].name
        return module if self._is_named(module) and self.layers else ""

    def _is_named(self, name: str) -> bool:
        return not self.layers or any(fnmatchcase(name, pattern) for pattern in self.layers)

    def point(self, node: Node, readers: list[Read]) -> Node:
        """Where the value lies as the layer reads it: behind views and the like, with the layer's features last."""
        for read in readers:
            on_the_way = {*self.keep.origins[read.operand].chain, read.operand}
            todo = [n for n in read.costs if self.number[n] is node]
            for n in todo:
                if shape(n)[-1:] == (read.features,):
                    return n
                todo += [u for u in n.users if u.target in LAYOUTS and u in on_the_way and u not in todo]
        return node

    def verdict(self, point: Node, readers: list[Read], name: str) -> tuple[str, str] | None:
        """Why nothing lossy can be kept of a value for this adapter."""
        direct = [r for r in readers if not r.through_product]
        if "recompute" in point.meta:
            return "checkpointed", "inside a checkpoint, where it is computed again and not kept"
        if not direct or (name in self.members.values() and self._is_low_rank(point)):
            return "low_rank", "x·A is kept, not x"
        if not all(isinstance(n, int) for n in (shape(point) or ("",))[-1:]):
            return "shape", "the number of features is not fixed"
        if not self._is_named(name):
            return "not_named", "no pattern of peft_fx.keep_layers names it"
        others = [n for n in _names(direct) if not self._is_named(n)]
        if others or not all(r.known for r in direct):
            return "shared", f"kept in any case, for the gradients of {', '.join(others) or 'what is no adapter'}"
        return None

    def _is_low_rank(self, node: Node) -> bool:
        """x·A and the like: a product by weights that no layer reads."""
        made_of = made_alike(node, ALIKE | PARTS | SUMS | SCALINGS)
        multiplied = any(self.keep.flow.is_weight(m) for n in made_of for p in products(n) for m in (p.left, p.right))
        return multiplied and self.layer_inputs.isdisjoint(made_alike(node, ALIKE))

    def kept_beside(self, node: Node) -> list[Node]:
        """What the frozen model keeps and could be made of the value, as a bool mask of a relu's result is."""
        flow, found = self.keep.flow, []
        todo = list(self.equals[node])
        for n in todo:
            for user in (u for u in n.users if u not in flow.forward and u not in flow.backward):
                if user in self.keep.frozen:
                    found += [user] if user not in found else []
                elif user not in todo:
                    todo.append(user)
        return found

    def read_through_products(self, readers: list[Read]) -> list[Node]:
        """x·A and the like, that are kept where x is not."""
        return list({self.number[r.operand]: r.operand for r in readers if r.through_product}.values())

    # ----------------------------------------------------------------------------------------------------- changing

    def make_likeness(self, point: Node, policy: Policy, beside: list[Node]) -> None:
        edit = self.edit
        for node in beside:
            self._save(node)
        following = point.next
        with edit.at(following, like=point):
            sizes = edit.sizes_of(point)
            parts = policy.compress(edit, point)
        for part in parts:
            self._save(part)
        with edit.at(following, like=point, rebuilt=True):
            new = edit.cast(policy.restore(edit, parts), value(point).dtype)
            new = edit.laid_out(edit.reshape(new, sizes), value(point).stride())
        self.likeness[self.number[point]] = new

    def _save(self, node: Node) -> None:
        """Makes the partitioner keep a node that only backward needs: it heeds the tag on what forward needs alone, so
        forward asks for it, with an assertion that holds and of which no code is made."""
        self.edit.keep(node)
        with self.edit.at(node.next, like=node):
            needs = self.edit.call(aten._assert_tensor_metadata.default, node)
        needs.meta["partitioner_tag"] = "must_be_in_forward"

    def reread(self) -> None:
        """The adapters' gradients read the likenesses."""
        for read in self.reads:
            if not self.likeness or read.through_product:
                continue
            with self.edit.at(read.gradient):
                new = self._copy(read.operand, self.keep.origins[read.operand].chain)
            if new is not read.operand:
                self.edit.reread(read.gradient, read.operand, new)
                self.edit.drop(read.operand)

    def _copy(self, node: Node, chain: Set[Node]) -> Node:
        """A value as it is computed from likenesses."""
        first = self.number[node]
        if first in self.likeness:
            return self.likeness[first]
        if node not in chain:
            return node
        if first not in self._copies:
            inputs = {n: self._copy(n, chain) for n in node.all_input_nodes}
            if all(new is old for old, new in inputs.items()):
                return node
            args, kwargs = map_arg((node.args, node.kwargs), lambda n: inputs[n])
            with self.edit.provenance(node):
                self._copies[first] = self.edit.call(node.target, *args, **kwargs)
        return self._copies[first]


def _parameters_of(keep: Recompute) -> dict[Node, set[Node]]:
    """By product of backward: the parameters that it gives the gradients of."""
    found: dict[Node, set[Node]] = defaultdict(set)
    for parameter, result in returned(keep.graph)[1].items():
        role = keep.flow.roles.get(parameter)
        todo = [result] if isinstance(result, Node) and role is not None and role.trainable else []
        seen: set[Node] = set()
        while todo:
            node = todo.pop()
            if node in seen or node not in keep.flow.backward:
                continue
            seen.add(node)
            if node in keep.gradients:
                found[node].add(parameter)
            todo += [n for n in node.all_input_nodes if node not in keep.gradients or n in keep.gradients]
    return found
