"""Maps in weight form: each region of an adapter is one product `u·W' + b'`, W' made of the rows of an identity."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

from torch.fx import Node

from peft_fx.passes.analyse.candidates import MapCandidate
from peft_fx.passes.analyse.maps import AffineMaps
from peft_fx.passes.decide import price
from peft_fx.passes.decide.choosing import consider
from peft_fx.passes.findings import Settings
from peft_fx.passes.graph.editor import Editor
from peft_fx.passes.graph.joint import Joint
from peft_fx.passes.graph.nodes import aten, expr, shape, value
from peft_fx.passes.rewrite.layout import as_read
from peft_fx.passes.rewrite.materialise import Materialise
from peft_fx.passes.rewrite.rounding import rounded


def merge_maps(joint: Joint, settings: Settings) -> None:
    """Puts one product in the place of each map that is to be in weight form; what is then a sum is read anew."""
    notes = joint.notes
    if not notes.maps:
        return
    before = set(joint.position)
    rewrite(joint, notes.chosen_maps, settings)
    # a region's own sums stay for its parameters' gradients: no sites, and no more are those that a W' is made of
    groups = [g for g in joint.sums.groups if (g.backward or g.root in joint.flow.forward) and g.root in before]
    consider(joint, settings, groups)


def rewrite(joint: Joint, chosen: Iterable[MapCandidate], settings: Settings) -> None:
    """Makes each region one product `u·W' + b'`."""
    edit, rows, position = joint.edit, joint.maps, joint.position
    for region in sorted(chosen, key=lambda r: position[r.ends[-1]], reverse=True):  # a source may be another's end
        last = max(region.ends, key=position.__getitem__)
        with edit.at(last, like=region.base):
            new = _product(edit, rows, region, last, settings)
        for end in region.ends:
            if end is not last:
                _drop(edit, end)
        edit.replace(last, new)


def _product(edit: Editor, rows: AffineMaps, region: MapCandidate, last: Node, settings: Settings) -> Node:
    K, N = region.features
    dtype = value(region.base).dtype
    with edit.provenance(region.base, rebuilt=True):
        replay = Materialise(
            edit, rows.from_source(region.ends, region.source), region.source, K, price.merge_dtype(dtype)
        )
        parts = [replay.matrix(end) for end in region.ends]
        merged = functools.reduce(edit.add, [m for m, _ in parts])
        constants = [c for _, c in parts if c is not None]
        merged = rounded(edit, merged, dtype, settings.rounding, transposed=region.backward)
        merged = as_read(edit, merged, settings.machine, at_left=False)
        bias = edit.reshape(edit.cast(functools.reduce(edit.add, constants), dtype), [N]) if constants else None
    u = edit.reshape(edit.cast(region.source, dtype), [-1, K])
    y = edit.call(aten.mm.default, u, merged) if bias is None else edit.call(aten.addmm.default, bias, u, merged)
    y = edit.reshape(y, _sizes(edit, last, region.source))
    return edit.laid_out(edit.cast(y, value(last).dtype), value(last).stride())


def _sizes(edit: Editor, node: Node, source: Node) -> list[Any]:
    """A node's sizes as arguments, the dynamic ones read from the source."""
    known = dict(zip(shape(source), edit.sizes_of(source), strict=True))
    return [n if isinstance(n, int) else known.get(expr(n), -1) for n in value(node).shape]


def _drop(edit: Editor, end: Node) -> None:
    """Takes an addend out of its sum."""
    (total,) = (u for u in end.users if u.target is aten.add.Tensor and end in u.args[:2])
    other = next(a for a in total.args[:2] if a is not end)
    assert isinstance(other, Node)
    with edit.at(total):
        edit.replace(total, edit.cast(other, value(total).dtype))
