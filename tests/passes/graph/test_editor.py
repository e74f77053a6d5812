"""The editor: places and provenance, users and what nobody uses, and fake values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from peft_fx.passes.graph.editor import REBUILD, Editor
from peft_fx.passes.graph.nodes import CAST, aten, value


def opened(dynamic: bool = False) -> tuple[Editor, Node, Node]:
    """An editor of a graph with inputs [4,6] and [6,2], and an output."""
    graph, mode = Graph(), FakeTensorMode(shape_env=ShapeEnv() if dynamic else None)
    inputs = []
    for name, sizes in (("a", (4, 6)), ("b", (6, 2))):
        inputs.append(graph.placeholder(name))
        inputs[-1].meta["val"] = mode.from_tensor(torch.empty(sizes))
    graph.output(tuple(inputs))
    return Editor(graph, mode), *inputs


def made(edit: Editor, *asked: Any) -> Node:
    with edit.at(edit.graph.output_node(), like=None):
        return edit.call(*asked)


def test_numbers_and_dtypes_tell_kinds_apart() -> None:
    edit, a, _ = opened()
    wide = made(edit, CAST, a, torch.float64)
    assert value(made(edit, aten.mul.Tensor, wide, 2)).dtype == torch.float64
    assert value(made(edit, aten.mul.Tensor, a, 2)).dtype == torch.float32
    assert value(made(edit, aten.sum.dim_IntList, a, [0])).shape == (6,)
    assert value(made(edit, aten.sum.dim_IntList, a, [1])).shape == (4,)


def test_views_share_memory() -> None:
    edit, a, _ = opened()
    for _ in range(2):
        part = value(made(edit, aten.slice.Tensor, a, 0, 1, 3))
        assert part.untyped_storage()._cdata == value(a).untyped_storage()._cdata


def test_new_nodes_say_what_they_stand_for() -> None:
    """Also inside of one another, and behind an exception."""
    edit, a, b = opened()
    a.meta["stack_trace"], b.meta["stack_trace"] = "of a", "of b"
    output = edit.graph.output_node()
    with edit.at(output, like=a):
        with edit.provenance(b, rebuilt=True):
            inner = edit.add(a, a)
        outer = edit.add(a, a)
    assert (inner.meta["stack_trace"], outer.meta["stack_trace"]) == ("of b", "of a")
    assert inner.meta["recompute"] is REBUILD
    assert "recompute" not in outer.meta
    with pytest.raises(RuntimeError), edit.at(output, like=a, rebuilt=True):
        raise RuntimeError
    with edit.at(output, like=b):
        assert "recompute" not in edit.add(a, a).meta


def test_what_nobody_uses_goes() -> None:
    """With what only it used; a node with other users stays."""
    edit, a, _ = opened()
    shared = made(edit, aten.neg.default, a)
    inner = made(edit, aten.neg.default, shared)
    old, new = made(edit, aten.neg.default, inner), made(edit, aten.exp.default, shared)
    edit.give(edit.graph.output_node(), (old,))
    before = edit.changes
    edit.replace(old, new)
    assert edit.changes > before
    assert old._erased
    assert inner._erased
    assert not shared._erased
    assert edit.graph.output_node().args == ((new,),)
