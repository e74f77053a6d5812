"""Fake values are made without asking an op again, and are what the op would have made."""

import pytest
import torch
from torch.fx import Graph

from peft_fx.compat import FakeTensorMode, ShapeEnv, is_in_memory_of
from peft_fx.passes.graph.editor import Editor
from peft_fx.passes.graph.nodes import CAST, aten, prims, value

CALLS = {
    "product": (aten.mm.default, lambda x: (x, x)),
    "slice": (aten.slice.Tensor, lambda x: (x, 0, 2, 4)),
    "transpose": (aten.permute.default, lambda x: (x, [1, 0])),
    "view": (aten.reshape.default, lambda x: (x, [2, 32])),
    "cast": (CAST, lambda x: (x, torch.bfloat16)),
    "copy": (aten.cat.default, lambda x: ([x, x],)),
}


class Asked(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the ops that are asked."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.ops.append(op)
        return op(*args, **(kwargs or {}))


@pytest.fixture
def editor():
    return Editor(Graph(), FakeTensorMode(shape_env=ShapeEnv()))


def _input(editor, *sizes, offset=0, dtype=torch.float32):
    node = editor.graph.placeholder("x")
    with editor.fake_mode:
        node.meta["val"] = torch.empty(offset + 64, dtype=dtype)[offset:].view(*sizes)
    return node


def _described(x):
    return x.shape, x.stride(), x.storage_offset(), x.dtype, x.device


@pytest.mark.parametrize("name", CALLS)
def test_a_second_value_is_what_the_op_would_make(editor, name):
    op, arguments = CALLS[name]
    first, second = _input(editor, 8, 8), _input(editor, 8, 8)
    once = value(editor.call(op, *arguments(first)))
    with Asked() as asked:
        again = value(editor.call(op, *arguments(second)))
    assert not any(asked_op.overloadpacket == op.overloadpacket for asked_op in asked.ops)
    assert _described(once) == _described(again)
    assert is_in_memory_of(once, value(first)) == is_in_memory_of(again, value(second)) == (name in NAMED_VIEWS)
    assert not is_in_memory_of(again, once)  # no two nodes share memory that they do not share


NAMED_VIEWS = {"slice", "transpose", "view"}


def test_another_layout_is_asked_for_anew(editor):
    x = _input(editor, 8, 8)
    turned = editor.flip(x)
    assert value(editor.call(aten.reshape.default, x, [64])).is_contiguous()
    copied = editor.call(aten.reshape.default, turned, [64])
    assert not is_in_memory_of(value(copied), value(x))  # this one is a copy
    part = editor.call(aten.slice.Tensor, x, 0, 4, 8)
    assert value(editor.call(aten.slice.Tensor, part, 0, 2, 4)).storage_offset() == 48
    other = editor.call(aten.slice.Tensor, x, 0, 0, 4)
    assert value(editor.call(aten.slice.Tensor, other, 0, 2, 4)).storage_offset() == 16
    assert value(editor.call(CAST, x, torch.float16)).dtype == torch.float16
    assert value(editor.times(x, 2)).dtype == value(editor.times(x, 2.0)).dtype == torch.float32
    whole = _input(editor, 8, 8, dtype=torch.int64)
    assert value(editor.times(whole, 2)).dtype == torch.int64
    assert value(editor.times(whole, 2.0)).dtype == torch.float32  # 2 == 2.0, and yet another op


def test_what_has_more_to_tell_is_asked_for_each_time(editor):
    z = _input(editor, 8, 8, dtype=torch.complex64)
    for _ in range(2):
        conjugate = editor.call(aten._conj.default, z)
        assert value(conjugate).is_conj()
        assert not value(editor.call(aten.resolve_conj.default, conjugate)).is_conj()


def test_random_numbers_and_effects_are_no_obstacle(editor):
    x = _input(editor, 8, 8)
    assert value(editor.call(aten.rand.default, [2], device="cpu")).shape == (2,)
    assert value(editor.call(aten.copy_.default, x, x)) is value(x)  # an op that writes is asked each time
    assert value(editor.call(aten.copy_.default, x, x)) is value(x)
    assert value(
        editor.call(prims.iota.default, 4, start=0, step=1, dtype=torch.int64, device="cpu", requires_grad=False)
    ).shape == (4,)
