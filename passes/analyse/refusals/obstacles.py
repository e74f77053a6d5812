"""What stands between an adapter's first product and the sum that it is added to, or the input of its layer."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Node

from peft_fx.passes.analyse.linear_rules import addends, products_in
from peft_fx.passes.analyse.refusals.some_rows import DROPPED, SOME_ROWS, is_of_rows
from peft_fx.passes.analyse.refusals.ways import NEAR
from peft_fx.passes.analyse.sums import Sums
from peft_fx.passes.graph.nodes import LAYOUTS, SUMS, aten, is_random, is_tensor, numel, shape

ROW_WISE = {aten._softmax.default, aten._log_softmax.default, aten.native_layer_norm.default}
REDUCTIONS = {aten.mean.dim, aten.var_mean.correction, aten.amax.default, aten.sum.dim_IntList}
Step = tuple[Node, Node]  # a node, and the operand that the way goes on with


def obstacles_on(analysis: Sums, way: list[Step]) -> Iterator[tuple[str, str]]:
    """What stands between the sum and the adapter's first product."""
    for i, (node, operand) in enumerate(way[:-1]):
        verdict = _obstacle(analysis, node, operand, {n for n, _ in way[i + 1 :]})
        if verdict:
            yield verdict


def difference(analysis: Sums, step: Step, sources: set[object], windows: set[Any]) -> tuple[str, str]:
    """What stands between the adapter's first product and the base's input."""
    last, narrow = step
    met: list[Node] = []
    reached = False
    todo = [n for n in last.all_input_nodes if n is not narrow and is_tensor(n) and not analysis.flow.is_weight(n)]
    while todo and len(met) < NEAR:
        node = todo.pop(0)
        reached |= analysis.reader.number[node] in sources
        if node in met or analysis.reader.number[node] in sources or node.op != "call_function":
            continue
        met.append(node)
        if is_random(node):
            return "dropout", DROPPED
        if _is_in_place(node):
            return "mutation", f"the input is changed in place between its two uses ({_label(node)})"
        todo += node.all_input_nodes
    through = f", through {', '.join(_label(n) for n in met[:3])}" if met else ""
    own = {p.window for p in products_in(last) if p.window is not None} - {None}
    if reached and not met and own and not own & windows:
        groups = max(w.groups for w in windows) if windows else 1
        if groups > max(w.groups for w in own):
            detail = f"the convolution is in {groups} groups, the adapter reads all channels: their sum is in no groups"
            return "shape", detail
        return "shape", "the adapter reads other windows of the input than the convolution"
    if reached and all(n.target in LAYOUTS for n in met):
        return "shape", f"the adapter groups the input's features differently{through}"
    return "different_input", f"the adapter reads another tensor than the base product{through}"


def _obstacle(analysis: Sums, node: Node, operand: Node, beyond: set[Node]) -> tuple[str, str] | None:
    """The code for an op that is not linear in the operand that the way goes on with; None for a linear one."""
    flow, label = analysis.flow, _label(node)
    others = [n for n in node.all_input_nodes if n is not operand and is_tensor(n)]
    drawn = [n for n in others if flow.draws_besides(n, operand)]
    noise = [n for n in (operand, *drawn) if node.target in SUMS and any(flow.draws_besides(n, o) for o in others)]
    if any(not _is_drawn_alone(analysis, n) for n in (*drawn, *noise)):
        return "input_dependent", f"{label} of a random value that is computed from the input"
    if flow.draws_besides(node, operand):
        return "dropout", f"{label} with a random mask inside the adapter: no single W' exists"
    if node.target is operator.getitem:
        return None  # one of several results: the op itself comes next
    if addends(node) is not None:
        computed = any(not flow.is_weight(p.left) and not flow.is_weight(p.right) for p in products_in(node))
        return ("input_dependent", f"{label} by a matrix computed from the input") if computed else None
    if node.target in (aten.mul.Tensor, aten.div.Tensor) and others:
        if all(flow.is_weight(n) for n in others):
            masks = [n for n in others if _differs_along_tokens(n)]
            return ("input_dependent", f"{label} by a number of each token, which no W' can hold") if masks else None
        if any(_is_computed_from(n, beyond) for n in others):
            return "nonlinear", f"{label} of two values of the adapter"
        return "input_dependent", f"{label} by a value of each token, which no W' can hold"
    if is_of_rows(node) and not any(_is_computed_from(n, beyond) for n in others):
        return "shape", SOME_ROWS
    if torch.Tag.pointwise in getattr(node.target, "tags", ()) or node.target in ROW_WISE | REDUCTIONS:
        return "nonlinear", f"{label} between the adapter's products"
    return "unknown_op", f"{label} has no linear form"


def _is_drawn_alone(analysis: Sums, node: Node) -> bool:
    """Whether a value is drawn at random, of whatever else only its size being asked."""
    flow = analysis.flow
    inputs = [n for n in node.all_input_nodes if is_tensor(n) and not flow.is_weight(n)]
    return is_random(node) or (bool(inputs) and all(_is_drawn_alone(analysis, n) for n in inputs))


def _differs_along_tokens(weight: Node) -> bool:
    """Whether a factor has one number for each row."""
    return shape(weight)[-1:] == (1,) and numel(shape(weight)) > 1


def _is_computed_from(node: Node, sources: set[Node]) -> bool:
    seen: set[Node] = set()
    todo = [node]
    while todo and len(seen) < NEAR:
        n = todo.pop()
        if n in sources:
            return True
        if n not in seen:
            seen.add(n)
            todo += n.all_input_nodes
    return False


def _is_in_place(node: Node) -> bool:
    """Written in place by the user, and made a new value by functionalisation."""
    stack = node.meta.get("source_fn_stack") or [("", "")]
    target = stack[-1][1]
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    return name in {"iadd", "imul", "isub", "itruediv"} or (name.endswith("_") and not name.endswith("__"))


def _label(node: Node) -> str:
    return str(node.target).removesuffix(".default").removesuffix(".Tensor")
