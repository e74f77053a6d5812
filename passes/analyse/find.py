"""The pass that finds adapters, and what has no weight form."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch.fx import Node

from peft_fx.passes.analyse.flow import Flow
from peft_fx.passes.analyse.refusals import refusals
from peft_fx.passes.analyse.regions import regions
from peft_fx.passes.decide.candidates import parameters_of, parameters_of_refused
from peft_fx.passes.findings import Settings
from peft_fx.passes.graph.joint import Joint
from peft_fx.passes.graph.nodes import CAST, LAYOUTS, is_tensor
from peft_fx.passes.keep.chains import products

ALIKE = LAYOUTS | {CAST}


def find(joint: Joint, settings: Settings) -> None:
    """Notes what is an adapter and what layers read; tells what has no weight form, and why."""
    notes, sums, flow = joint.notes, joint.sums, joint.flow
    notes.layer_inputs = layer_inputs(flow)
    notes.maps, refused = regions(joint)
    known = {r.name for r in refused}  # more is known of a region than of what is left over
    placed = {p for one in notes.maps if not one.backward for p in one.row.trained}
    left = refusals(sums, joint.maps, placed)
    joint.found.refusals = [r for r in left if r.name not in known] + refused
    notes.adapter_of = parameters_of_refused(joint.found.refusals, joint.roles) | parameters_of(notes.maps, flow)
    notes.as_written = sums


def layer_inputs(flow: Flow) -> frozenset[Node]:
    """What forward multiplies to a weight that is not, or not only, trained."""
    found: list[Node] = []
    for node in flow.forward:
        for product in products(node):
            for weight, x in ((product.left, product.right), (product.right, product.left)):
                if flow.is_weight(weight) and not all(flow.roles[p].trainable for p in flow.parameters(weight)):
                    found += made_alike(x, ALIKE)
    return frozenset(found)


def made_alike(node: Node, ops: Collection[Any]) -> list[Node]:
    """A value and those that it is made of by such ops alone."""
    found = [node]
    for n in found:
        found += [i for i in n.all_input_nodes if n.target in ops and is_tensor(i) and i not in found]
    return found
