"""What is known of a graph is found once for each state of it."""

import torch
from torch import nn

from peft_fx.passes.graph.nodes import aten
from tests.support import joint


def test_an_analysis_is_made_once_for_each_state() -> None:
    opened = joint.capture(nn.Linear(4, 4), torch.randn(3, 4)).opened()
    for name in ("flow", "numbers", "position", "reader", "sums", "maps"):
        assert getattr(opened, name) is getattr(opened, name)
    before = opened.flow
    assert opened.sums.flow is before
    node = next(n for n in opened.graph.nodes if n.op == "call_function")
    with opened.edit.at(node, after=True):
        copy = opened.edit.call(aten.clone.default, node)
    assert opened.flow is not before
    assert copy in opened.flow.bits
    now = opened.flow
    opened.edit.keep(copy)  # a tag is read by what is to be made again
    assert opened.flow is not now
