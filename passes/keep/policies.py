"""Lossy ways to keep an activation: each makes small parts of a value in forward, and a likeness of it from them.

A value's features are its last dimension; K of them are cut into groups of m. All statistics are fp32 (of fp64: fp64).

    velora   one unit vector v [m], the direction of the mean group of the batch at hand; of each group its
             coefficient u·v in the value's dtype; the likeness of a group is (u·v)·v
    int8     of each group its least number and a step; numbers in 0..255 above that, in steps
    int4     the same in 0..15, two of them in a byte
    fp8      numbers of e4m3 in units of each row's largest

The vector of VeLoRA (Miles et al. 2024) is fixed after the first batch in the paper; a graph has no state, so here it
is that of each batch, kept with its coefficients. Groups of int8 and int4 (as in ActNN and GACT) have 128 features at
most.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.fx import Node

from peft_fx.passes.graph.editor import Editor
from peft_fx.passes.graph.nodes import aten, prims, shape, value
from peft_fx.passes.rewrite.rounding import hash_of

ROUNDINGS = ("nearest", "stochastic")
LARGEST_GROUP, SMALLEST_GROUP = 128, 16


class Policy(Protocol):
    """One way. `refusal` is the code and the reason why it cannot keep such a value, `size` the bytes that it keeps of
    one of so many rows; `compress` and `restore` add nodes."""

    def refusal(self, val: torch.Tensor) -> tuple[str, str] | None: ...
    def size(self, rows: int, features: int, dtype: torch.dtype) -> int: ...
    def compress(self, edit: Editor, x: Node) -> list[Node]: ...
    def restore(self, edit: Editor, parts: list[Node]) -> Node: ...


def _features(val: torch.Tensor) -> int:
    return int(val.shape[-1])


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _bytes_of_statistics(dtype: torch.dtype) -> int:
    return int(_wide(dtype).itemsize)


def _grouped(edit: Editor, x: Node, m: int) -> Node:
    """[rows, K/m, m], wide."""
    features = _features(value(x))
    groups = edit.reshape(x, [-1, features // m, m])
    return edit.cast(groups, _wide(value(x).dtype))


@dataclass(frozen=True)
class Velora:
    """Rank-1 sub-token projections, of groups of m."""

    m: int = 32

    def refusal(self, val: torch.Tensor) -> tuple[str, str] | None:
        if _features(val) % self.m == 0:
            return None
        return "shape", f"{_features(val)} features are no multiple of groups of {self.m}"

    def size(self, rows: int, features: int, dtype: torch.dtype) -> int:
        return rows * (features // self.m) * int(dtype.itemsize) + self.m * _bytes_of_statistics(dtype)

    def compress(self, edit: Editor, x: Node) -> list[Node]:
        groups = _grouped(edit, x, self.m)
        total = edit.call(aten.sum.dim_IntList, groups, [0, 1])
        square = edit.call(aten.sum.dim_IntList, edit.times(total, total), [0], True)
        length = edit.call(aten.clamp_min.default, edit.call(aten.sqrt.default, square), 1e-12)
        v = edit.call(aten.div.Tensor, total, length)
        coefficients = edit.call(aten.sum.dim_IntList, edit.times(groups, v), [-1])
        return [edit.cast(coefficients, value(x).dtype), v]

    def restore(self, edit: Editor, parts: list[Node]) -> Node:
        coefficients, v = parts
        coefficients = edit.call(aten.unsqueeze.default, edit.cast(coefficients, value(v).dtype), -1)
        return edit.times(coefficients, v)


@dataclass(frozen=True)
class Affine:
    """Whole numbers of so many bits in steps from each group's least number. Stochastic rounding adds a hash of the
    number itself, its step and its feature before it drops the rest, so nothing is drawn and nothing else is kept."""

    bits: int
    rounding: str = "nearest"

    def refusal(self, val: torch.Tensor) -> tuple[str, str] | None:
        m = self._group(_features(val))
        if m >= SMALLEST_GROUP and m * self.bits % 8 == 0:
            return None
        return "shape", f"{_features(val)} features have no groups of {SMALLEST_GROUP} to {LARGEST_GROUP}"

    def size(self, rows: int, features: int, dtype: torch.dtype) -> int:
        groups = features // self._group(features)
        return rows * (features * self.bits // 8 + groups * 2 * _bytes_of_statistics(dtype))

    def compress(self, edit: Editor, x: Node) -> list[Node]:
        groups, most = _grouped(edit, x, self._group(_features(value(x)))), (1 << self.bits) - 1
        low, high = edit.call(aten.amin.default, groups, [-1], True), edit.call(aten.amax.default, groups, [-1], True)
        step = edit.call(aten.div.Tensor, edit.call(aten.sub.Tensor, high, low), most)
        step = edit.call(aten.clamp_min.default, step, torch.finfo(value(step).dtype).tiny)
        q = edit.call(aten.div.Tensor, edit.call(aten.sub.Tensor, groups, low), step)
        up = 0.5 if self.rounding == "nearest" else self._dither(edit, groups, step)
        q = edit.call(aten.clamp_max.default, edit.add(q, up), most)
        q = edit.cast(q, torch.uint8)  # drops what is behind the point
        if self.bits == 4:
            half = int(shape(q)[-1]) // 2  # type: ignore[arg-type]
            first, second = (edit.call(aten.slice.Tensor, q, -1, i, i + half) for i in (0, half))
            q = edit.call(aten.bitwise_or.Tensor, first, edit.call(aten.__lshift__.Scalar, second, 4))
        return [q, step, low]

    def restore(self, edit: Editor, parts: list[Node]) -> Node:
        q, step, low = parts
        if self.bits == 4:
            halves = [edit.call(aten.bitwise_and.Scalar, q, 15), edit.call(aten.__rshift__.Scalar, q, 4)]
            q = edit.call(aten.cat.default, halves, -1)
        q = edit.times(edit.cast(q, value(step).dtype), step)
        return edit.add(q, low)

    def _group(self, features: int) -> int:
        return max((m for m in range(1, LARGEST_GROUP + 1) if features % m == 0), default=1)

    def _dither(self, edit: Editor, groups: Node, step: Node) -> Node:
        """In [0, 1)."""
        bits, steps = (edit.call(aten.view.dtype, edit.cast(n, torch.float32), torch.int32) for n in (groups, step))
        sizes = [int(n) for n in shape(groups)[1:]]
        device = value(groups).device
        place = edit.call(
            prims.iota.default,
            math.prod(sizes),
            start=0,
            step=1,
            dtype=torch.int32,
            device=device,
            requires_grad=False,
        )
        mixed = edit.call(aten.bitwise_xor.Tensor, bits, hash_of(edit, steps))
        mixed = edit.call(aten.bitwise_xor.Tensor, mixed, edit.reshape(place, sizes))
        return edit.times(edit.cast(hash_of(edit, mixed), value(groups).dtype), 2.0**-16)


OLDER = ("a100", "rtx3090", "t4")  # machines of the table whose kernels cannot have 8-bit floats
CAPABILITY = 8, 9  # of CUDA devices from which on they can


@dataclass(frozen=True)
class Float8:
    """e4m3 in units of each row's largest number; `machine` is the name of the one that is reckoned with."""

    machine: str = ""
    dtype: torch.dtype = torch.float8_e4m3fn

    def refusal(self, val: torch.Tensor) -> tuple[str, str] | None:
        if val.device.type == "cpu":
            return None
        if val.device.type == "cuda" and self.machine not in OLDER and _is_capable(val.device):
            return None
        where = f"{val.device} ({self.machine})" if self.machine in OLDER else str(val.device)
        return "device", f"{where} has no {str(self.dtype).removeprefix('torch.')}"

    def size(self, rows: int, features: int, dtype: torch.dtype) -> int:
        return rows * (features + _bytes_of_statistics(dtype))

    def compress(self, edit: Editor, x: Node) -> list[Node]:
        row = _grouped(edit, x, _features(value(x)))
        largest = edit.call(aten.amax.default, edit.call(aten.abs.default, row), [-1], True)
        unit = edit.call(aten.div.Tensor, largest, torch.finfo(self.dtype).max)
        unit = edit.call(aten.clamp_min.default, unit, torch.finfo(value(unit).dtype).tiny)
        return [edit.cast(edit.call(aten.div.Tensor, row, unit), self.dtype), unit]

    def restore(self, edit: Editor, parts: list[Node]) -> Node:
        q, unit = parts
        return edit.times(edit.cast(q, value(unit).dtype), unit)


def _is_capable(device: torch.device) -> bool:
    """Whether a device has what the newer ones have; one that is not there is as new as its machine."""
    try:
        return bool(torch.cuda.get_device_capability(device) >= CAPABILITY)
    except (AssertionError, RuntimeError):  # no driver, or a edit without CUDA
        return True


POLICIES: Mapping[str, Callable[[int, str, str], Policy]] = {
    "velora": lambda group, rounding, machine: Velora(group),
    "int8": lambda group, rounding, machine: Affine(8, rounding),
    "int4": lambda group, rounding, machine: Affine(4, rounding),
    "fp8": lambda group, rounding, machine: Float8(machine),
}
