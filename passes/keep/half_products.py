"""Products of half-precision matrices that lose nothing: where devices have them, and what stands for them."""

from __future__ import annotations

import torch
from torch.fx import Node

from peft_fx.passes.graph.editor import Editor
from peft_fx.passes.graph.nodes import (
    aten,
    value,
)

MIXED = {"cuda", "xpu"}  # devices with a product of half-precision matrices that is not rounded to their dtype


def exact_products(edit: Editor, a: Node, b: Node) -> list[Node]:
    """The product of two half-precision matrices, as the sum of these: one fp32 result, or what a first result lacks
    as a second."""
    if value(a).device.type in MIXED:
        return [edit.call(aten.mm.dtype, a, b, torch.float32)]
    first = edit.call(aten.mm.default, a, b)
    return [first, edit.call(aten.addmm.default, first, a, b, beta=-1)]
