"""What is known without computing it: products with an identity matrix, sums over rows of which one number is not
0.

An adapter that needs its own weight may apply itself to `torch.eye(K)`, as DoRA's norm of W + sAB does:
`(I·A)·B` costs K·K·r, and hides that A·B is the product which W' needs as well.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from peft_fx.passes.findings import Settings
from peft_fx.passes.graph.joint import Joint
from peft_fx.passes.graph.nodes import CASTS, COPIES, aten, is_number, is_tensor, prims, shape, tensor_arg, value


def identities(joint: Joint, settings: Settings) -> None:
    """Replaces `I·M` and `M·I` by M."""
    for node in list(joint.graph.find_nodes(op="call_function", target=aten.mm.default)):
        a, b = tensor_arg(node, 0), tensor_arg(node, 1)
        other = b if is_identity(a) else a if is_identity(b) else None
        if other is not None:
            with joint.edit.at(node):
                joint.edit.replace(node, joint.edit.cast(other, value(node).dtype))


def one_hot_sums(joint: Joint) -> None:
    """Replaces `Σ_v c·[v = label]·g`, a number g for each row, by `c·g`.

    The gradient of a log-softmax sums up that of its result, which has one number in each row of the vocabulary.
    """
    for node in list(joint.graph.find_nodes(op="call_function", target=aten.sum.dim_IntList)):
        product = tensor_arg(node, 0)
        if product.target is not aten.mul.Tensor or not all(map(is_tensor, product.args)):
            continue
        for one_hot, g in (product.args, product.args[::-1]):
            c = _of_one_hot(one_hot, node.args[1])
            if c is not None and shape(g) == shape(node) and value(g).dtype == value(node).dtype:
                with joint.edit.at(node):
                    joint.edit.replace(node, joint.edit.times(g, c))
                break


def _of_one_hot(node: Node, dims: Any) -> float | None:
    """The number that each row along the only one of `dims` has once, beside zeros; None of any other value."""
    if node.target is not aten.scatter.value or node.kwargs:
        return None
    zeros, dim, index, number = node.args
    if zeros.target is not aten.full.default or zeros.args[1] != 0 or list(dims) != [dim]:
        return None
    ndim = value(node).ndim
    sizes = [n for i, n in enumerate(shape(index)) if i != dim % ndim]
    others = [n for i, n in enumerate(shape(node)) if i != dim % ndim]
    return number if shape(index)[dim] == 1 and sizes == others and is_number(number) else None


def is_identity(node: Node) -> bool:
    """Whether a matrix is `torch.eye(n)`, as AOTAutograd writes it: `iota[:, None] == iota`."""
    while node.target in CASTS | COPIES and is_tensor(node.args[0]):
        node = node.args[0]
    if node.target is not aten.eq.Tensor or len(set(shape(node))) != 1:
        return False
    counted = [_counts_along(operand) for operand in node.args]
    return sorted(filter(None, counted)) == [-2, -1]


def _counts_along(operand: Any) -> int | None:
    """The dimension of a matrix that numbers from 0 upwards are broadcast along, counted from the last."""
    layouts: list[Node] = []
    while is_tensor(operand) and operand.target is not prims.iota.default:
        if operand.target is not aten.unsqueeze.default:
            return None
        layouts.append(operand)
        operand = operand.args[0]
    if not is_tensor(operand) or (operand.kwargs["start"], operand.kwargs["step"]) != (0, 1):
        return None
    sizes = shape(layouts[0] if layouts else operand)
    along = [i for i in range(-len(sizes), 0) if sizes[i] != 1]
    return along[0] if len(along) == 1 else None
