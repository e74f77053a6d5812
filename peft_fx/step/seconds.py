"""Seconds of kernels, by the machine's model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from peft_fx.passes.decide.machine import Machine
from peft_fx.passes.graph.nodes import argument, expr, value
from peft_fx.step.fusion import Fused, Kernel
from peft_fx.step.kinds import (
    ATTENTION,
    INTO,
    bytes_of,
    name_of,
)


def kernel_seconds(fused: Fused, kernel: Kernel, machine: Machine) -> float:
    """Of a product or attention by what it computes, of all else by the bytes read and written."""
    if _is_computing(kernel.op):
        return seconds_of(kernel.op, fused.hint, machine)
    reads = {r for n in kernel.nodes for r in fused.reads[n]}
    return machine.one_pass(sum(map(fused.size, reads)) + sum(fused.size(n) for n in kernel.nodes))


def _is_computing(node: Node) -> bool:
    return name_of(node) in INTO or ATTENTION in name_of(node)


def seconds_of(node: Node, hint: Any, machine: Machine) -> float:
    """Of a product by the machine's model, of attention by its FLOPs, of any other op by itself by the bytes that it
    reads and writes."""
    if name_of(node) in INTO:
        a, b = [value(i) for i in node.args if isinstance(i, Node)][-2:]
        m, k, n = (hint(expr(s)) for s in (a.shape[-2], a.shape[-1], b.shape[-1]))
        batch = hint(expr(a.shape[0])) if a.ndim > 2 else 1
        return machine.product(m, k, n, a.dtype, batch)
    if ATTENTION in name_of(node):
        return _attention(Attention.of(hint, node), node, machine)
    return machine.one_pass(sum(bytes_of(n, hint) for n in (node, *node.all_input_nodes)))


def _attention(sizes: Attention, node: Node, machine: Machine) -> float:
    """Two products of T×T×d a head in forward, five in backward, half of each where it is causal."""
    flops = 2 * sizes.batch * sizes.heads * sizes.tokens * sizes.others * sizes.width * (5 if sizes.backward else 2)
    causal = 2 if argument(node, "is_causal") else 1
    return float(flops / causal / machine.speed(sizes.dtype).peak + machine.launch)


@dataclass(frozen=True)
class Attention:
    """A fused kernel of attention: q [batch, heads, tokens, width], k and v [batch, …, others, width]."""

    backward: bool
    batch: int
    heads: int
    tokens: int
    width: int
    others: int
    dtype: torch.dtype

    @classmethod
    def of(cls, hint: Any, node: Node) -> Attention:
        backward = "backward" in name_of(node)
        q, k = (value(argument(node, name)) for name in ("query", "key"))
        batch, heads, tokens, width = (hint(expr(n)) for n in q.shape)
        return cls(backward, batch, heads, tokens, width, hint(expr(k.shape[-2])), q.dtype)
