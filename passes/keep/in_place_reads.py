"""Adapter gradients without full-size copies in the adapter's dtype.

With a bf16 base and fp32 adapters, each product of an adapter's gradient, `dA = xᵀ(dy·Bᵀ)` and `dB = (x·A)ᵀdy`, reads
an fp32 copy of a bf16 tensor as long as the batch, and several are alive at once. The copy holds no more than the
tensor itself. So the product reads that, and its other factor, narrow and in fp32, as the sum of two bf16 matrices,
`hi = cast(F)` and `lo = cast(F - hi)`, side by side:

    x32·F  ->  y[:, :r] + y[:, r:]   with   y = x16·[hi | lo]

16 bits of the factor are kept that way. Layers that read the same x share one product,
`x16·[hi1 | lo1 | hi2 | ...]`: x is passed over once for the `x·A` of q, k and v, and once for their dA. A tensor is
read as it lies: `dyᵀ·z` is the transpose of `zᵀ·dy`, which a vector's gradient may need too, and then has. The result
is fp32 where a device multiplies half-precision matrices into fp32 (CUDA, XPU). A CPU rounds it, so there what the
rounded result lacks is computed as a second one, `y + (x16·F - y)`: 16 bits again. Products that the model's own
outputs need are left alone, and so is fp16: it lacks the range of what was written in fp32, small gradients and scaled
ones. And so are all of them on a machine that multiplies bf16 much slower than fp32, as most CPUs do: there the copy is
made, in backward and for the moment.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from typing import Any

import torch
from torch.fx import Node

from peft_fx.passes.findings import Settings
from peft_fx.passes.graph.editor import Editor
from peft_fx.passes.graph.joint import Joint
from peft_fx.passes.graph.nodes import (
    LAYOUTS,
    aten,
    shape,
    value,
)
from peft_fx.passes.keep import narrow
from peft_fx.passes.keep.by_chunks import by_chunks
from peft_fx.passes.keep.copies import Copying, batches, families, operands_of
from peft_fx.passes.keep.dense_grads import all_cheaper_as_written
from peft_fx.passes.keep.half_products import exact_products
from peft_fx.passes.keep.scaled_reads import scale_results

_Given = tuple[Node, list[Copying], list[Node]]  # what some members read, these, and the other factor of each
_Result = tuple[Copying, Node]


def in_place_reads(joint: Joint, settings: Settings) -> None:
    """Has the adapters' gradients read activations as they lie, or a few tokens at a time."""
    if settings.numerics != "default":
        return
    if joint.notes.as_it_was:
        return
    if not all_cheaper_as_written(joint, settings):
        read_in_place(joint, settings)
    by_chunks(joint, settings)
    scale_results(joint, settings)


def read_in_place(joint: Joint, settings: Settings) -> None:
    """Rewrites every such product, those that read the same tensor in one product; by kernels of our own, where there
    are."""
    operands = operands_of(joint)
    for members in families(joint, settings):
        for together, following in batches(members):
            last = together[-1].node
            for node in sorted((n for n in following if n < last), reverse=True):
                joint.edit.move(node, after=last)
            _replace(joint.edit, together, operands)


def _replace(edit: Editor, members: list[Copying], operands: dict[Any, Node]) -> None:
    """Each member by one product with the others that read the same, in the place of the last."""
    last = members[-1]
    sources: dict[Any, list[Copying]] = defaultdict(list)
    for member in members:
        sources[member.key].append(member)
    with edit.at(last.node):
        given = [
            (_source(edit, last, own[-1], operands), own, [_other(edit, m) for m in own]) for own in sources.values()
        ]
        results = _by_kernels(edit, given) if last.kernel else None
        if results is None and not all(m.copies for m in members):
            return
        results = results or [pair for one in given for pair in _in_halves(edit, *one)]
        for member, new in results:
            with edit.provenance(member.node):
                new = edit.cast(new, value(member.node).dtype)
                if member.vector is not None and member.outside:
                    new = edit.times(new, _vector(edit, member, new))
                new = edit.flip(new) if member.turned else new
                new = edit.laid_out(new, value(member.node).stride())
            edit.reroute(member.node, new)
    for member in members:
        edit.drop(member.node)


def _source(
    edit: Editor,
    last: Copying,
    member: Copying,
    operands: dict[Any, Node],
) -> Node:
    """What is read in place, not transposed: as a product of the model's reads it, where one does before the last."""
    wanted = shape(member.operands[0])[:: -1 if member.turned else 1]
    known = operands.get((member.upright, member.source.precision))
    is_there = last.kernel and known is not None and shape(known) == wanted
    if is_there and known is not None and _is_before(edit, known, last.node):
        return known
    plain = edit.like_2d(member.source, member.operands[0], member.source.precision)
    plain = edit.flip(plain) if member.turned else plain
    operands.setdefault((member.upright, member.source.precision), plain)
    return plain


def _is_before(edit: Editor, node: Node, place: Node) -> bool:
    """Whether a value is there before a place, or only was laid out later: then it is laid out before it."""
    later, todo = {node}, [node]
    while todo:
        new = [n for n in todo.pop().all_input_nodes if n not in later and place < n]
        later.update(new)
        todo += new
    if node < place:
        return True
    if any(n.target not in LAYOUTS or place in n.all_input_nodes for n in later):
        return False
    for n in sorted(later):
        edit.move(n, before=place)
    return True


def _other(edit: Editor, member: Copying) -> Node:
    """The narrow factor, as it multiplies what is not transposed."""
    other = edit.flip(member.operands[1]) if member.turned else member.operands[1]
    if member.vector is not None and not member.outside:
        other = edit.times(other, _vector(edit, member, other))
    return other


def _by_kernels(edit: Editor, given: list[_Given]) -> list[_Result] | None:
    """The members' results, scaled, in the layout that they are to have, where kernels compute them all."""
    out: dict[Node, list[tuple[Copying, narrow.Narrow]]] = defaultdict(list)
    into: dict[Node, list[tuple[Copying, narrow.Narrow]]] = defaultdict(list)
    for u, own, others in given:
        for m, other in zip(own, others, strict=True):
            strides = value(m.node).stride()[:: -1 if m.turned else 1]
            one = m, narrow.Narrow(other, float(m.scale.number), strides)
            (out if m.first else into)[u].append(one)
    us = dict.fromkeys(u for u, _, _ in given)
    asked = [narrow.Reads(u, *([n for _, n in kind[u]] for kind in (out, into))) for u in us]
    if not narrow.takes(asked):
        return None
    members = [m for kind in (out, into) for u in us for m, _ in kind[u]]
    return list(zip(members, narrow.computed(edit, asked), strict=True))


def _in_halves(edit: Editor, plain: Node, members: list[Copying], others: list[Node]) -> list[_Result]:
    """`x·[hi1 | lo1 | hi2 | lo2 | ...]`, and each member the sum of its own two parts."""
    last = members[-1]
    dim = 1 if last.first else 0
    starts: dict[Any, int] = {}
    halves: list[Node] = []
    width = 0
    for member, other in zip(members, others, strict=True):
        if member.part in starts:
            continue
        hi = edit.cast(other, last.source.precision)
        rest = edit.call(aten.sub.Tensor, other, edit.cast(hi, value(other).dtype))
        halves += [hi, edit.cast(rest, last.source.precision)]
        starts[member.part] = width
        width += 2 * shape(other)[dim]
    both = edit.call(aten.cat.default, halves, dim)
    found = exact_products(edit, *((plain, both) if last.first else (both, plain)))
    whole = functools.reduce(edit.add, [edit.cast(r, torch.float32) for r in found])
    results = []
    for member in members:
        start, r = starts[member.part], shape(member.node)[dim != member.turned]
        with edit.provenance(member.node):
            parts = [edit.call(aten.slice.Tensor, whole, dim, at, at + r) for at in (start, start + r)]
            new = edit.add(*parts)
            scaled = new if member.scale.number == 1 else edit.times(new, member.scale.number)
        results.append((member, scaled))
    return results


def _vector(edit: Editor, member: Copying, factor: Node) -> Node:
    """The factors of the copy's features, as they multiply the other operand, or the result."""
    assert member.vector is not None
    sizes = [-1, 1] if member.first else [1, -1]
    return edit.cast(edit.reshape(member.vector, sizes), value(factor).dtype)
