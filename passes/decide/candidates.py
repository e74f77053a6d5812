"""Candidates: what may get a weight form, as adapters, in forward and in the input gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from peft_fx.passes.analyse.candidates import MapCandidate, SumCandidate
from peft_fx.passes.analyse.flow import Flow, Roles
from peft_fx.passes.findings import Refusal

Found = SumCandidate | MapCandidate


@dataclass
class Adapter:
    """What one site is in forward and in the input gradient: groups of terms, or regions."""

    forward: Found | None = None
    grad: Found | None = None

    @property
    def either(self) -> Found:
        found = self.forward or self.grad
        assert found is not None
        return found

    def has_grad(self, flow: Flow) -> bool:
        """Whether W multiplies anything in backward: an input gradient that was not found stays as it is."""
        if isinstance(self.either, SumCandidate) and self.either.product.gathered:
            return False  # numbers of rows have none, whatever else reads W
        seen: set[Node] = set()
        todo: list[Any] = [self.either.weight_node]
        while todo:
            node = todo.pop()
            if isinstance(node, Node) and node not in seen and node is not self.either.product_node:
                seen.add(node)
                todo += [u for u in node.users if flow.is_weight(u)]
                if any(u in flow.backward for u in node.users):
                    return True
        return False


def adapters_of(found: Sequence[Found], flow: Flow) -> list[Adapter]:
    """By adapter. A weight used twice has as many adapters: backward meets the uses in the reverse order."""
    adapters: dict[Any, list[Adapter]] = {}
    for one in found:
        if not one.backward:
            adapters.setdefault(one.key, []).append(Adapter(forward=one))
    for one in reversed([f for f in found if f.backward]):
        same = adapters.setdefault(one.key, [])
        free = next((a for a in same if a.grad is None), None)
        if free is None:
            same.append(Adapter(grad=one))
        else:
            free.grad = one
    return _paired([a for same in adapters.values() for a in same], flow)


def _paired(adapters: list[Adapter], flow: Flow) -> list[Adapter]:
    """Forward and backward may compute the same weight each for itself, from one parameter."""

    def alone(direction: str) -> dict[Any, list[Adapter]]:
        found: dict[Any, list[Adapter]] = {}
        for a in adapters:
            other = {"forward": "grad", "grad": "forward"}[direction]
            if getattr(a, direction) is not None and getattr(a, other) is None:
                found.setdefault(frozenset(flow.parameters(a.either.weight_node)), []).append(a)
        return found

    grads = alone("grad")
    for parameters, (first, *others) in alone("forward").items():
        matching = grads.get(parameters, [])
        if parameters and not others and len(matching) == 1:
            first.grad = matching[0].grad
            adapters.remove(matching[0])
    return adapters


def parameters_of(found: Sequence[Found], flow: Flow) -> dict[Node, str]:
    """The parameters of adapters, frozen ones too, and what is trained below their modules, with the adapter's name."""
    own = {p: one.site_name(flow) for one in found for node in one.adapter_nodes for p in flow.parameters(node)}
    trained = {p: role.name for p, role in flow.roles.items() if role.trainable and p not in own}
    last = {site: i for i, site in enumerate(own.values())}
    around = {p: [site for site in _modules_around(name) if site in last] for p, name in trained.items()}
    return {p: max(sites, key=last.__getitem__) for p, sites in around.items() if sites} | own


def _modules_around(name: str) -> list[str]:
    """The modules that a parameter lies in.

    >>> _modules_around("layers.0.weight")
    ['layers', 'layers.0']
    """
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def parameters_of_refused(refused: Sequence[Refusal], roles: Roles) -> dict[Node, str]:
    """Of adapters without a weight form: what is below their module, and what is trained beside their weight."""
    found = {}
    for r in sorted(refused, key=lambda r: len(r.name)):  # an inner module's after that of one around it
        for p, role in roles.items():
            module, beside = role.name.rpartition(".")[0], r.name.rpartition(".")[0]
            if role.name.startswith(f"{r.name}.") or (role.trainable and module == beside and p not in found):
                found[p] = r.name
    return found
