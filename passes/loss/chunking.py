"""How many rows at a time a loss is computed of: the logits, their sizes, and the number of chunks that pays."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch.fx import Node

from peft_fx.passes.analyse.algebra import Size
from peft_fx.passes.analyse.flow import Flow
from peft_fx.passes.decide.machine import Machine
from peft_fx.passes.decide.price import rounds_twice
from peft_fx.passes.findings import ChunkedLoss
from peft_fx.passes.graph.joint import Joint
from peft_fx.passes.graph.nodes import MATRIX_PRODUCTS, factors_of, numel, shape, value

LEAST = 16 << 20  # bytes: of a chunk, and of what the loop must save
PART = 16  # of the logits' bytes, a chunk may have one part in so many
PASSES = 4  # over the logits: their statistics, the loss, the gradient, which is written
DEARER = 1 + 1 / PART  # the loop by the price, in units of what the whole costs
WIDE = {torch.float16: torch.float32, torch.bfloat16: torch.float32}  # the dtype of sums over chunks


def logits_of(joint: Joint) -> Node | None:
    """The largest of forward's last products by a weight that make a row longer."""
    graph, flow = joint.graph, joint.flow
    best, largest = None, (0, 0)
    multiplied: set[Node] = set()  # what goes into another such product is no logits
    for node in reversed(graph.nodes):
        if node not in flow.forward:
            continue
        product = node.target in MATRIX_PRODUCTS and flow.is_weight(factors_of(node)[1])
        if product and node not in multiplied:
            k, n = shape(factors_of(node)[1])
            size = joint.sizes.hint(numel(shape(node)))
            if isinstance(n, int) and isinstance(k, int) and n > k and (size, k) >= largest:
                best, largest = node, (size, k)
        if product or node in multiplied:
            multiplied.update(node.all_input_nodes)
    return best


@dataclass(frozen=True)
class Plan:
    """The sizes of the logits `[rows, vocabulary]`, and the number of chunks; `row_bytes` are those of one row's logits
    and its gradient. `twice` as in `price.rounds_twice`."""

    name: str
    rows: Size
    hinted: int
    vocabulary: int
    wide: float
    dtype: torch.dtype
    row_bytes: int
    chunks: int
    twice: bool

    @classmethod
    def of(cls, logits: Node, flow: Flow, machine: Machine, hint: Callable[[Size], int], worth: float) -> Plan:
        h, W = factors_of(logits)
        (rows, n), k, dtype = shape(logits), int(shape(h)[1]), value(logits).dtype
        T, V = hint(rows), int(n)
        row = V * dtype.itemsize * (2 if flow.backward else 1)
        single = V * 4 * (dtype.itemsize < 4)
        named = [flow.roles[p].name for p in flow.parameters(W)]
        name = named[0].removesuffix(".weight") if named else W.name
        count = chunks(T, k, V, dtype, row + single, machine, worth)
        if not isinstance(rows, int):
            count = chunks(max(T, 1 << 20), k, V, dtype, row + single, machine, worth)
        return cls(name, rows, T, V, max(k, V / 2), dtype, row, count, rounds_twice(machine, dtype))

    def described(self, sums: Iterable[Node]) -> ChunkedLoss:
        """What is told of it, where these sums over rows are added up from chunk to chunk."""
        before = self.hinted * self.row_bytes
        kept = sum(map(_bytes, sums))
        after = math.ceil(self.hinted / self.chunks) * self.row_bytes + kept
        dtype = str(self.dtype).removeprefix("torch.")
        return ChunkedLoss(
            self.name, self.hinted, self.vocabulary, dtype, self.chunks, {"before": before, "after": after}
        )


def chunks(T: int, K: int, V: int, dtype: torch.dtype, row_bytes: int, machine: Machine, worth: float = 0.0) -> int:
    """The number of chunks of `[T,K]·[K,V]`: as many as the bytes ask for, of `row_bytes` in each row, but no more than
    the price allows, since each chunk reads W anew; a GB less may cost `worth` seconds besides. Where so many do not
    divide T and fewer do, fewer."""
    budget = max(LEAST, T * V * dtype.itemsize // PART)
    most = max(1, min(T, math.ceil(T * row_bytes / budget)))
    whole = _price(machine, 1, T, K, V, dtype)

    def pays(n: int) -> bool:
        saved = T * row_bytes * (1 - 1 / n) / 1e9
        return _price(machine, n, T, K, V, dtype) <= DEARER * whole + worth * saved

    best = max(n for n in range(1, most + 1) if n == 1 or pays(n))
    return next((n for n in range(best, best // 2, -1) if T % n == 0), best)


def _price(machine: Machine, n: int, T: int, K: int, V: int, dtype: torch.dtype) -> float:
    """Seconds of the two products of a loss with a frozen W, and of the passes over its logits."""
    return 2 * n * machine.product(math.ceil(T / n), K, V, dtype) + machine.one_pass(PASSES * T * V * dtype.itemsize)


def _bytes(node: Node) -> int:
    val = value(node)
    dtype: torch.dtype = WIDE.get(val.dtype, val.dtype)
    elements: int = math.prod(val.shape)
    return int(elements * dtype.itemsize)
