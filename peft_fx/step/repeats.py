"""What may be made again in backward, what must not be, and what a value is a view of."""

from __future__ import annotations

from torch.fx import Node
from torch.utils.checkpoint import CheckpointPolicy

from peft_fx.passes.graph.editor import SAVE
from peft_fx.passes.graph.nodes import argument, is_mutable, is_random
from peft_fx.step.kinds import ATTENTION, SCATTERS, VIEW, kind_of, name_of

PURE = {"aten", "prims"}  # of other libraries' ops it is not known what else they do
REPEATED = {CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_RECOMPUTE}


def is_repeated(node: Node) -> bool:
    """Whether a pass or a checkpoint has said to make a value again."""
    return node.meta.get("recompute") in REPEATED


def base_of(node: Node) -> Node:
    """What a view is of: that is what is kept."""
    while kind_of(node) == VIEW and not is_saved(node):
        (node, *_) = node.all_input_nodes
    return node


def is_saved(node: Node) -> bool:
    """Whether a pass or the partitioner has said to keep a value, where backward reads it: a copy of what forward then
    writes looks like nothing but another view of it."""
    return node.meta.get("recompute") is SAVE


def is_repeatable(node: Node) -> bool:
    """Whether an op gives the same once more, and does nothing else."""
    target = node.target
    if getattr(target, "_schema", None) is None or is_mutable(node) or is_saved(node):
        return False
    if name_of(node) == "convolution" and node.all_input_nodes[0].op == "placeholder":
        return False  # Inductor would keep the image and the weight as it lays them out for it, more than it makes
    if is_random(node):
        return ATTENTION in name_of(node) and argument(node, "dropout_p") == 0
    return getattr(target, "namespace", "") in PURE and name_of(node) not in SCATTERS
