"""What kind of work an op is to Inductor: a library's, pointwise, a reduction, a view; and the bytes that it gives."""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch.fx import Node

from peft_fx.passes.graph.nodes import CAST, ORDERED, aten, call_of, expr, numel, prims, value

LIBRARY, POINTWISE, REDUCTION, VIEW, ITEM, GIVEN, NONE = (
    "library",
    "pointwise",
    "reduction",
    "view",
    "item",
    "given",
    "",
)
POINTWISES = {
    CAST,
    aten._to_copy.default,
    aten.clone.default,
    aten.copy.default,
    aten.where.self,
    aten.cat.default,
    aten.constant_pad_nd.default,
    aten.embedding.default,
    aten.flip.default,
    aten.full.default,
    aten.full_like.default,
    aten.gather.default,
    aten.index.Tensor,
    aten.lift_fresh_copy.default,
    aten.scalar_tensor.default,
    aten.select_scatter.default,
    aten.slice_scatter.default,
    prims.iota.default,
    prims.inductor_lookup_seed.default,
    prims.inductor_random.default,
}
REDUCTIONS = {"sum", "mean", "amax", "amin", "max", "min", "any", "all", "prod", "var", "var_mean", "argmax", "argmin"}
HEAVY = {"exp", "expm1", "log", "log1p", "log2", "sigmoid", "tanh"}  # never computed twice
SCATTERS = {"index_put", "_unsafe_index_put", "scatter", "scatter_add", "scatter_reduce", "index_add"}
INTO = {"mm", "bmm", "addmm", "baddbmm"}  # write into memory that they are given; other libraries' allocate their own
ATTENTION = "scaled_dot_product"  # in the name of every fused kernel of it


DEVICE = "peft_fx_device"  # in a node's meta: where its value is, if that is told of by tensors that are nowhere


def device_of(node: Node) -> str:
    """The type of the device that a node's value is on."""
    return str(node.meta.get(DEVICE) or next((v.device.type for v in tensors_of(node)), ""))


def tensors_of(node: Node) -> list[torch.Tensor]:
    val = node.meta.get("val")
    return [v for v in (val if isinstance(val, (tuple, list)) else [val]) if isinstance(v, torch.Tensor)]


def name_of(node: Node) -> str:
    return _name(call_of(node)[0])


@functools.cache
def _name(target: Any) -> str:
    schema = getattr(target, "_schema", None)
    return schema.name.rpartition("::")[2] if schema is not None else ""


def kind_of(node: Node) -> str:
    target: Any = node.target
    if node.op in ("placeholder", "get_attr"):
        return GIVEN
    if node.op != "call_function" or not tensors_of(node):
        return NONE
    if target is operator.getitem:
        source = node.args[0]
        return VIEW if isinstance(source, Node) and is_view(source.target) else ITEM
    if is_view(target) or target is ORDERED or _is_the_same(node):
        return VIEW
    if name_of(node) in REDUCTIONS:
        return REDUCTION
    if target in POINTWISES or torch.Tag.pointwise in getattr(target, "tags", ()):
        return POINTWISE
    return LIBRARY


def _is_the_same(node: Node) -> bool:
    """Whether a cast or a copy has its operand's dtype and layout: Inductor drops it."""
    if node.target not in (CAST, aten.clone.default) or not isinstance(node.args[0], Node):
        return False
    new, old = value(node), value(node.args[0])
    return bool(new.dtype == old.dtype and new.stride() == old.stride())


def is_view(target: Any) -> bool:
    schema = getattr(target, "_schema", None)
    infos = [a.alias_info for a in schema.arguments] if schema is not None else []
    return any(info is not None and not info.is_write for info in infos)


def bytes_of(node: Node, hint: Any) -> int:
    """Of all tensors that a node gives."""
    return sum(int(hint(numel([expr(n) for n in v.shape])) * v.dtype.itemsize) for v in tensors_of(node))
