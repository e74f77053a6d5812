"""Adapters that are added to part of a layer's result, or to one that is read without them, too."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Set

from torch.fx import Node

from peft_fx.passes.analyse.adapters import are_small
from peft_fx.passes.analyse.algebra import Matrix
from peft_fx.passes.analyse.maps import AffineMaps
from peft_fx.passes.analyse.sums import BASE_READ_TOO, Sums
from peft_fx.passes.findings import Refusal
from peft_fx.passes.graph.nodes import SUMS, is_tensor, numel, shape

PART = "the adapter is added to part of what the layer gives, and all of it is read, or is laid out in another order"


def of_results(analysis: Sums, rows: AffineMaps, placed: Set[Node]) -> Iterator[Refusal]:
    """Adapters that are added to part of a layer's result, or to one that is read without them, too."""
    for node in (n for n in analysis.position if n.target in SUMS and n in analysis.flow.forward):
        operands = [n for n in node.args[:2] if is_tensor(n) and n in rows.of]
        for base, added in itertools.permutations(operands, 2):
            own, adapter = rows.of[base], rows.of[added]
            if own.source is not adapter.source or own.trained or not own.products or len(own.frozen) != 1:
                continue
            if (
                not adapter.trained
                or not placed.isdisjoint(adapter.trained)
                or not rows.is_adapted(own.joined(adapter))
            ):
                continue
            (weight,) = own.frozen
            if not are_small(adapter.trained, shape(weight)):
                continue
            whole = max(own.products, key=lambda p: numel(shape(p)))
            part = numel(shape(base)) != numel(shape(whole))
            name = analysis.flow.site_name(Matrix(weight, 0), [Matrix(t, 0) for t in adapter.trained])
            yield Refusal(name, "shape", PART) if part else Refusal(name, "shared", BASE_READ_TOO)
