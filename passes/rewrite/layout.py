"""How W' lies in memory: as the product that reads it is quickest, where that matters."""

from __future__ import annotations

from torch.fx import Node

from peft_fx.passes.decide.machine import Machine
from peft_fx.passes.graph.editor import Editor
from peft_fx.passes.graph.nodes import ORDERED, shape, value


def as_read(edit: Editor, merged: Node, machine: Machine, at_left: bool) -> Node:
    """W' with the side that a product sums over contiguous, where the CPU has no units for its dtype; else as it is.

    There a product is a loop: over rows of both operands it is quick, over a column it gathers. Of bfloat16
    [1024,512]·[512,1408] on an EPYC held to AVX2, 37 GFLOP/s and 2.6. Inductor lays out what it computes by what most
    of its operands are like, which is the slow way for every input gradient.
    """
    w = value(merged)
    if not machine.is_cpu or w.dtype.itemsize != 2 or w.ndim != 2 or machine.has_units_of(w.dtype):
        return merged
    rows, cols = shape(merged)
    return edit.call(ORDERED, merged, [cols, 1] if at_left else [1, rows])
