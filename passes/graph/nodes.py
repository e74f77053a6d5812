"""What the passes ask of a node: its value, its sizes, its equals; and the families of ops that they name."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, TypeGuard

import torch
from torch.fx import Graph, Node

from peft_fx.passes.analyse.algebra import MANTISSA, Size, coarser

aten, prims = torch.ops.aten, torch.ops.prims

CAST = prims.convert_element_type.default
ORDERED = prims.inductor_force_stride_order.default  # Inductor computes what it is given in that order: no copy
SUMS = {aten.add.Tensor, aten.sub.Tensor}
SCALINGS = {aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar}
PRODUCTS = {aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default}
MATRIX_PRODUCTS = {aten.mm.default, aten.addmm.default}  # of two matrices, not of many
RESHAPES = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}
SQUEEZES = {aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default}
COPIES = {aten.clone.default, aten.alias.default, aten.detach.default}
CASTS = {CAST, aten._to_copy.default}
TRANSPOSES = {aten.permute.default, aten.transpose.int}
LAYOUTS = RESHAPES | SQUEEZES | COPIES | TRANSPOSES | {aten.expand.default}


def expr(size: Any) -> Size:
    """A size as something that compares and hashes without adding a guard: an int or a sympy expression."""
    if isinstance(size, int):
        return size
    value = size.node.expr
    return int(value) if value.is_number else value


def value(node: Node) -> Any:
    return node.meta.get("val")


def shape(node: Node) -> tuple[Size, ...]:
    return tuple(expr(n) for n in value(node).shape)


def is_tensor(arg: Any) -> TypeGuard[Node]:
    return isinstance(arg, Node) and isinstance(value(arg), torch.Tensor)


def tensor_arg(node: Node, i: int) -> Node:
    arg = node.args[i]
    assert is_tensor(arg), f"{node.format_node()} has no tensor as argument {i}"
    return arg


def call_of(node: Node) -> tuple[Any, Sequence[Any]]:
    """The op that a node calls, and its arguments in order. What saves a generator's state for a checkpoint, or
    restores it, calls another op with it: that one."""
    i = next((i for i, arg in enumerate(node.args[:2]) if hasattr(arg, "_schema")), -1)
    return (node.target, node.args) if i < 0 else (node.args[i], node.args[i + 1 :])


def argument(node: Node, name: str) -> Any:
    """What an op is called with under a name of its schema, or its default."""
    op, args = call_of(node)
    for i, known in enumerate(op._schema.arguments):
        if known.name == name:
            return args[i] if i < len(args) else node.kwargs.get(name, known.default_value)
    raise KeyError(f"{op} has no argument {name!r}")


def is_number(arg: Any) -> TypeGuard[int | float]:
    """Whether a python number is meant as one: True and False are not."""
    return isinstance(arg, (int, float)) and not isinstance(arg, bool)


def factors_of(product: Node) -> tuple[Node, Node]:
    """The two that one of PRODUCTS multiplies: an addend stands before them."""
    i = len(product.args) - 2
    return tensor_arg(product, i), tensor_arg(product, i + 1)


def is_read_twice(node: Node) -> bool:
    """Whether one user reads a value more than once, as `t + 2·t` does: it counts as one of the node's users."""
    return any(sum(arg is node for arg in user.args) > 1 for user in node.users)


def coarsest(nodes: Iterable[Node]) -> torch.dtype:
    """The dtype with the fewest bits in which one of these values is held."""
    return functools.reduce(coarser, (value(n).dtype for n in nodes))


def is_rounded(node: Node, dtype: torch.dtype, among: AbstractSet[Node]) -> bool:
    """Whether nobody among some nodes reads more of a value than what a dtype holds of it, be it scaled before."""
    if MANTISSA.get(value(node).dtype, 0) <= MANTISSA.get(dtype, 0):
        return True
    users = [u for u in node.users if u in among or u.op == "output"]
    passed = CASTS | LAYOUTS | SUMS | SCALINGS
    return bool(users) and all(u.target in passed and is_rounded(u, dtype, among) for u in users)


def numel(sizes: Sequence[Size]) -> Size:
    return math.prod(sizes)


def is_mutable(node: Node) -> bool:
    """Whether an op writes to what it is given."""
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and bool(schema.is_mutable)


def is_random(node: Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return node.op == "call_function" and torch.Tag.nondeterministic_seeded in tags


def value_numbers(graph: Graph) -> dict[Node, Node]:
    """Every node's first equal: the same op on the same values. No common sub-expressions are merged in a joint graph
    yet."""
    first: dict[Hashable, Node] = {}
    number: dict[Node, Node] = {}
    for node in graph.nodes:
        number[node] = node
        if node.op != "call_function" or is_random(node):
            continue
        try:
            number[node] = first.setdefault(key_of((node.target, node.args, node.kwargs), number.__getitem__), node)
        except TypeError:  # an argument that does not hash or sort: the node stays its own first
            continue
    return number


def key_of(arg: Any, number: Callable[[Node], Hashable]) -> Hashable:
    """Equal for equal arguments; `number` is the same for equal nodes. Raises TypeError for what does not hash or
    sort."""
    if isinstance(arg, Node):
        return number(arg)
    if isinstance(arg, (list, tuple)):
        return tuple([key_of(a, number) for a in arg])
    if isinstance(arg, dict):
        return tuple(sorted((k, key_of(v, number)) for k, v in arg.items()))
    return (type(arg), arg)


def signature(arg: Any) -> Any:
    """Equal for arguments of which an op makes equal fake values."""
    arg = value(arg) if isinstance(arg, Node) else tuple(arg.items()) if isinstance(arg, dict) else arg
    if isinstance(arg, (list, tuple)):
        return tuple(map(signature, arg))
    if isinstance(arg, torch.Tensor):
        return tuple(map(expr, arg.shape)), tuple(map(expr, arg.stride())), arg.dtype, arg.device
    return type(arg), expr(arg) if isinstance(arg, torch.SymInt) else arg
