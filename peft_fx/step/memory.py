"""Bytes alive at each kernel of a forward or backward graph.

Kernels run in the graph's order, each after what it reads, or in another that has a lower peak. A kernel writes over an
input that it alone reads, for the last time. Memory of the same size and dtype that is free later on is kept for the
next to need it, as long as what Inductor reckons as its peak is not exceeded: so a step's peak is above what its values
need.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.fx import Node

from peft_fx.passes.decide.machine import Machine
from peft_fx.passes.graph.nodes import value
from peft_fx.step.fusion import Fused, Kernel, outputs
from peft_fx.step.kinds import (
    ATTENTION,
    INTO,
    name_of,
)
from peft_fx.step.schedule import reordered
from peft_fx.step.seconds import Attention

PACKED = 128 << 10  # bytes, as measured: from 64 to 190 KB, whatever the size of large matrices


@dataclass
class Walk:
    """Bytes at the highest point of a graph and at the highest of its second half, from what it was given to what it
    leaves; the same two as Inductor reckons them, where no memory waits to be used again; the buffers whose memory is
    taken at the highest point, whether or not they are read again."""

    peak: int = 0
    late: int = 0
    planned: int = 0
    planned_late: int = 0
    alive: frozenset[Node] = frozenset()


def walk(
    fused: Fused,
    given: Iterable[Node],
    kept: Iterable[Node],
    machine: Machine | None = None,
    lent: Iterable[Node] = (),
    held: Iterable[Node] = (),
) -> Walk:
    """What is alive from kernel to kernel: `given` inputs are let go of after their last use, `kept` values stay.

    No kernel writes over those inputs that are `lent`: what the caller has too. Those `held` the caller does not let go
    of either, and Inductor does not know that.
    """
    given, held, size = list(given), set(held), fused.size
    stays = frozenset().union(*(fused.leaves[n] for n in kept))
    plan = reordered(fused, given, stays)
    kernels, start, end, reckoned = plan.kernels, plan.start, plan.end, plan.alive
    mortal = [b for b in (*given, *start) if b in end and b not in stays]
    passing = {b for b in mortal if b in start and end[b] == start[b] and b in kernels[end[b]].reads}  # within a kernel
    taken = plan.reuse(set(given), stays, passing | set(lent))
    reused = {before: b for b, before in taken.items()}
    change = [0] * (len(kernels) + 1)
    for b in start:
        change[start[b]] += 0 if b in taken or b in passing else size(b)
    now = sum(map(size, given))
    walked = Walk(peak=now, planned=now)
    freed: dict[int, int] = defaultdict(int)
    for b in mortal:
        freed[end[b]] += 0 if b in reused or b in passing or b in held else size(b)
    now -= sum(size(b) for b in given if b not in end and b not in stays and b not in held)
    highest = 0
    for i, kernel in enumerate(kernels):
        now += change[i]
        top = now + (_beside(fused, kernel, machine) if kernel.library else 0)
        if top > walked.peak:
            walked.peak, highest = top, i
        walked.planned = max(walked.planned, reckoned[i] + top - now)
        if 2 * i >= len(kernels):
            walked.late = max(walked.late, top)
            walked.planned_late = max(walked.planned_late, reckoned[i] + top - now)
        now -= freed[i]
    until = {b: start[reused[b]] - 1 if b in reused else end[b] for b in start}
    walked.alive = frozenset(b for b, made in start.items() if made <= highest and (b in stays or highest <= until[b]))
    return walked


def _beside(fused: Fused, kernel: Kernel, machine: Machine | None) -> int:
    """Bytes that a library's kernel, or another graph that it calls, has for itself while it runs."""
    return _inside(fused, kernel.op) + (_scratch(fused, kernel, machine) if machine else 0)


def _inside(fused: Fused, node: Node) -> int:
    """Bytes that a call of another graph has alive at its highest, beyond what it returns."""
    body = node.args[0] if getattr(node.target, "namespace", "") == "higher_order" and node.args else None
    if not isinstance(body, Node) or body.op != "get_attr" or fused.part.owner is None:
        return 0
    inner = Fused(getattr(fused.part.owner, str(body.target)).graph, fused.hint)
    return max(0, walk(inner, [], outputs(inner.graph)).peak - sum(fused.size(b) for b in fused.buffers(node)))


def _scratch(fused: Fused, kernel: Kernel, machine: Machine) -> int:
    """Bytes that a library's kernel allocates while it runs, and lets go of: of attention, as PyTorch has it; of a
    product of half-precision matrices on a CPU, the blocks of both that oneDNN packs for each thread."""
    node = kernel.op
    if name_of(node) in INTO and machine.is_cpu and value(node).dtype.itemsize == 2:
        return int(PACKED * torch.get_num_threads())
    if ATTENTION not in name_of(node):
        return 0
    scratch = _scratch_of_threads if machine.is_cpu else _scratch_of_gradients
    return scratch(Attention.of(fused.hint, node))


def _scratch_of_threads(a: Attention) -> int:
    """On a CPU each thread holds blocks of the scores: one in forward with a result's beside it, two in backward; in
    float32, and once more in the values' own dtype where that is narrower."""
    rows = min(a.tokens, next(block for least, block in ((768, 256), (192, 64), (0, 32)) if a.tokens >= least))
    block = rows * min(a.others, 512)
    inside, narrow = 4 * block, a.dtype.itemsize * block if a.dtype.itemsize < 4 else 0
    each = 2 * (inside + narrow) if a.backward else inside + narrow + 4 * rows * (a.width + 2)
    return int(each * torch.get_num_threads())


def _scratch_of_gradients(a: Attention) -> int:
    """On a GPU backward sums the gradient of q in float32, and keeps a number for each of its rows."""
    return 4 * a.batch * a.heads * a.tokens * (a.width + 1) if a.backward else 0
