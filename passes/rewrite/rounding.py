"""How W' gets from the wide dtype that it is built in to the base's: to nearest, or dithered. Nothing else rounds W'.

With W in bf16, what is below half an ulp of W is lost of `W + s·A·B` to nearest, as it is of `xW + s(xA)B`: of a delta
a thousandth of W's size half arrives, of a ten thousandth a sixteenth. Dithered, an element is rounded away from 0 with
the probability that the bits it loses stand for, `(bits + d) & ~(2ⁿ - 1)` with d in 0..2ⁿ-1, n the bits that the narrow
dtype lacks: an error √2 times as large, but 0 on average, and every delta arrives. d is a hash of the element's place
in W as it multiplies x, so W' has the same bits at each step, in forward and in the rebuild, and in its transpose; and
a W that is narrow already stays as it is where the delta is 0.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from peft_fx.passes.graph.nodes import aten, prims, value

if TYPE_CHECKING:
    from peft_fx.passes.graph.editor import Editor

ROUNDINGS = ("nearest", "dithered")
LACKS = {torch.bfloat16: 16, torch.float16: 13}  # bits of an fp32 mantissa
ROUNDS = (0x7A69, 0x5A3D, 0x6F4B, 0x7E55)


def rounded(edit: Editor, node: Node, dtype: torch.dtype, rounding: str, transposed: bool = False) -> Node:
    """W' in the base's dtype; `transposed` where the node is [.., N, K], as W multiplies dy.

    In fp16 what is finite stays finite: no sum of W and a delta becomes infinite where the activation form has two
    finite numbers. Dithered are bf16 and fp16, of fp16 the normal numbers; fp32 is rounded to nearest always.
    """
    if dtype == torch.float16:
        node = _saturated(edit, node, dtype)
    if rounding == "dithered" and dtype in LACKS and value(node).dtype == torch.float32:
        node = _dithered(edit, node, dtype, transposed)
    return edit.cast(node, dtype)


def _saturated(edit: Editor, node: Node, dtype: torch.dtype) -> Node:
    """Finite numbers beyond the dtype's range at its ends."""
    most = torch.finfo(dtype).max
    infinite = edit.call(aten.eq.Scalar, edit.call(aten.abs.default, node), math.inf)
    clamped = edit.call(aten.clamp_max.default, edit.call(aten.clamp_min.default, node, -most), most)
    return edit.call(aten.where.self, infinite, node, clamped)


def _dithered(edit: Editor, node: Node, dtype: torch.dtype, transposed: bool) -> Node:
    """fp32 numbers that the dtype holds. Those that it holds already stay; so do zeros, infinities and NaN, and what is
    subnormal or beyond the largest in it: the cast rounds these to nearest."""
    bits = edit.call(aten.view.dtype, node, torch.int32)
    low = (1 << LACKS[dtype]) - 1
    noise = edit.call(aten.bitwise_and.Scalar, hash_of(edit, _index(edit, node, transposed)), low)
    bits = edit.call(aten.bitwise_and.Scalar, edit.add(bits, noise), ~low)
    size, limits = edit.call(aten.abs.default, node), torch.finfo(dtype)
    above, below = edit.call(aten.ge.Scalar, size, limits.tiny), edit.call(aten.le.Scalar, size, limits.max)
    normal = edit.call(aten.bitwise_and.Tensor, above, below)
    return edit.call(aten.where.self, normal, edit.call(aten.view.dtype, bits, torch.float32), node)


def _index(edit: Editor, node: Node, transposed: bool) -> Node:
    """Each element's position in W as it multiplies x, `[.., K, N]`, whatever its strides."""
    *batch, rows, cols = (int(n) for n in value(node).shape)
    sizes = [*batch, cols, rows] if transposed else [*batch, rows, cols]
    count = math.prod(sizes)
    dtype = torch.int32 if count < 2**31 else torch.int64
    index = edit.call(
        prims.iota.default, count, start=0, step=1, dtype=dtype, device=value(node).device, requires_grad=False
    )
    index = edit.reshape(index, sizes)
    return edit.flip(index) if transposed else index


def hash_of(edit: Editor, index: Node) -> Node:
    """16 bits of each index: four rounds of a Feistel network over its halves, of products that no int32 overflows.

    Two rounds leave patterns. After four, the spectrum and the differences of neighbours are those of random numbers,
    at all widths tried.
    """
    a, b = edit.call(aten.__rshift__.Scalar, index, 16), edit.call(aten.bitwise_and.Scalar, index, 0xFFFF)
    for factor in ROUNDS:
        product = edit.call(aten.__rshift__.Scalar, edit.times(b, factor), 8)
        mixed = edit.call(aten.bitwise_xor.Tensor, a, product)
        a, b = b, edit.call(aten.bitwise_and.Scalar, mixed, 0xFFFF)
    return edit.cast(b, torch.int32)
