"""Adapters of which a graph has not all: no layer beside them, no second half, or a factor that changes from call to
call."""

from __future__ import annotations

from collections.abc import Iterator, Set

from torch.fx import Node

from peft_fx.passes.analyse.adapters import are_low_rank, are_small
from peft_fx.passes.analyse.algebra import Matrix
from peft_fx.passes.analyse.flow import common_path, shared_path
from peft_fx.passes.analyse.linear_rules import products_in, through
from peft_fx.passes.analyse.maps import AffineMaps
from peft_fx.passes.analyse.refusals.ways import is_matrix, narrow_operand, reached
from peft_fx.passes.analyse.sums import Sums
from peft_fx.passes.findings import Refusal
from peft_fx.passes.graph.nodes import numel, shape


def without_base(analysis: Sums, rows: AffineMaps, placed: Set[Node]) -> Iterator[Refusal]:
    """Products `u·A·B` of two narrow trained matrices of one module in a graph without any of its other weights: what
    they are added to is computed where this graph does not reach."""
    flow = analysis.flow
    for node in (n for n in analysis.position if n in flow.forward and n not in flow.backward):
        for last in products_in(node):
            B = narrow_operand(analysis, node)
            inner = None if B is None else through(last.right if last.left is B else last.left)
            A = None if inner is None else narrow_operand(analysis, inner)
            if A is None or B is None or inner is None or not are_low_rank(shape(A)[-2:], shape(B)[-2:]):
                continue
            pairs = [(flow.roles[p].name, flow.roles[q].name) for p in flow.parameters(A) for q in flow.parameters(B)]
            module = max((common_path(a, b) for a, b in pairs if a != b), key=len, default="")
            own = {p for p, role in flow.roles.items() if role.name.startswith(module)}
            bases = (W for u in analysis.sources(inner) for W in analysis.weights_of.get(u, ()) if W is not A)
            if any(shape(W)[-1] == shape(B)[-1] and not own.isdisjoint(flow.parameters(W)) for W in bases):
                continue  # a layer, trained as well, of which this is no adapter
            if all(flow.roles[p].trainable for p in own) and placed.isdisjoint(flow.parameters(A)):
                name = flow.site_name(Matrix(A, 0), [Matrix(B, 0)])
                yield Refusal(
                    name, "different_input", "no product is added to the adapter's: its base is in another graph"
                )


def without_end(analysis: Sums, rows: AffineMaps, placed: Set[Node]) -> Iterator[Refusal]:
    """Products `u·A` with a narrow trained matrix, beside a frozen layer that reads the same u, that do nothing but
    leave the graph: the other half of the adapter is where this graph does not reach."""
    flow = analysis.flow
    for node in _leaving(analysis):
        inner = through(node)
        A = narrow_operand(analysis, inner)
        if A is None or not placed.isdisjoint(flow.parameters(A)):
            continue
        name = flow.roles[flow.parameters(A)[0]].name
        layers = {W for u in analysis.sources(inner) for W in analysis.weights_of.get(u, ()) if not flow.is_trained(W)}
        frozen = [W for W in layers if are_small(flow.parameters(A), shape(W))]
        near = {W: shared_path(flow.roles[flow.parameters(W)[0]].name, name) for W in frozen}
        W = max(near, key=lambda W: (near[W], str(W)), default=None)
        if W is not None and near[W]:
            base = flow.site_name(Matrix(W, 0), [Matrix(A, 0)])
            yield Refusal(base, "different_input", "half of the adapter is in another graph than its base")


def _leaving(analysis: Sums) -> list[Node]:
    """The results of forward that it does not read itself."""
    flow = analysis.flow
    found = (n for n in analysis.position if any(u.op == "output" for u in n.users))
    return [n for n in found if n in flow.forward and flow.forward.isdisjoint(u for u in n.users if u.op != "output")]


def of_changing_factors(analysis: Sums, rows: AffineMaps, placed: Set[Node]) -> Iterator[Refusal]:
    """Products `u·A'·B`, where A' is made of a trained matrix and of what changes from call to call, perhaps in another
    graph, as the noise does that a sampler draws there."""
    flow = analysis.flow
    for node in (n for n in analysis.position if n in flow.forward and n not in flow.backward):
        B = narrow_operand(analysis, node)
        for last in products_in(node) if B is not None else []:
            for inner in products_in(through(last.right if last.left is B else last.left)):
                operands = (inner.left, inner.right)
                if any(flow.is_weight(n) for n in operands):
                    continue
                A = next((a for n in operands if (a := _trained_part(analysis, n)) is not None), None)
                if A is None or B is None or not are_low_rank(shape(A)[-2:], shape(B)[-2:]):
                    continue
                if placed.isdisjoint({*flow.parameters(A), *flow.parameters(B)}):
                    name = flow.site_name(Matrix(A, 0), [Matrix(B, 0)])
                    yield Refusal(name, "input_dependent", "a factor of the adapter changes from call to call")


def _trained_part(analysis: Sums, factor: Node) -> Node | None:
    """The trained matrix in a factor that is computed from changing values beside it."""
    flow = analysis.flow
    computed = (n for n in reached(factor, lambda n: () if flow.is_weight(n) else n.all_input_nodes))
    found = (n for n in computed if flow.is_weight(n) and flow.is_trained(n) and is_matrix(n))
    return next((n for n in found if shape(n)[0] != shape(n)[1] and numel(shape(n)) == numel(shape(factor))), None)
