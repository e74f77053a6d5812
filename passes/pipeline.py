"""The order of the passes: one table, and one function, `run`, for a compile, for `explain` and for tests alike."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph

from peft_fx.passes.analyse.algebra import Size
from peft_fx.passes.analyse.find import find
from peft_fx.passes.analyse.flow import Roles
from peft_fx.passes.decide.choosing import decide
from peft_fx.passes.decide.regimes import AtLeast
from peft_fx.passes.findings import Outcome, Settings
from peft_fx.passes.graph.joint import Joint, Sizes
from peft_fx.passes.keep.approximation import compress
from peft_fx.passes.keep.changed_inputs import changed_inputs
from peft_fx.passes.keep.dense_grads import dense_grads
from peft_fx.passes.keep.in_place_reads import in_place_reads
from peft_fx.passes.keep.recompute import recompute
from peft_fx.passes.loss.loop import chunk_loss
from peft_fx.passes.normalise.columns import columns_together
from peft_fx.passes.normalise.common_vector import common_vector
from peft_fx.passes.normalise.fused_layers import fused_layers
from peft_fx.passes.normalise.fused_weights import fused_weights
from peft_fx.passes.normalise.identities import identities
from peft_fx.passes.rewrite.merge_maps import merge_maps
from peft_fx.passes.rewrite.merge_sums import merge_sums
from peft_fx.passes.rewrite.merges_together import merges_together
from peft_fx.passes.verify import Contract, verify

log = logging.getLogger("peft_fx.passes")

TIERS = ("pure", "exact", "reassociates", "lossy")


def always(joint: Joint, settings: Settings) -> bool:
    return True


def is_trained(joint: Joint, settings: Settings) -> bool:
    """Whether there is a backward graph in which adapters, or layers named by the user, have gradients."""
    told = joint.found.sites or joint.found.refusals or settings.keep_layers
    return bool(joint.flow.backward) and settings.keep != "inductor" and bool(told)


@dataclass(frozen=True)
class Pass:
    """One row: what it does to a graph, what it may do to numbers (one of TIERS), which passes come before it, and what
    holds after it."""

    run: Callable[[Joint, Settings], None]
    tier: str
    after: tuple[str, ...]
    gives: str
    when: Callable[[Joint, Settings], bool] = always

    @property
    def name(self) -> str:
        return self.run.__name__


PASSES = (
    Pass(identities, "exact", (), "no product with an identity matrix"),
    Pass(columns_together, "exact", ("identities",), "nothing is taken apart and put together again"),
    Pass(common_vector, "reassociates", ("columns_together",), "a sum carries its vector once"),
    Pass(fused_layers, "reassociates", ("common_vector",), "q, k, v of one product are read as one sum, for now"),
    Pass(fused_weights, "exact", ("fused_layers",), "quantised products are read as plain ones, for now"),
    Pass(find, "pure", ("fused_weights",), "adapters and refusals are known, and what layers read"),
    Pass(decide, "pure", ("find",), "all adapters are decided at the same numbers of tokens"),
    Pass(merge_maps, "reassociates", ("decide",), "affine adapters that pay read W'"),
    Pass(merge_sums, "reassociates", ("merge_maps",), "sums that pay read W', and what was for now is settled"),
    Pass(dense_grads, "reassociates", ("merge_sums",), "gradients come from uᵀ·dy where that pays", is_trained),
    Pass(compress, "lossy", ("dense_grads",), "of activations parts are kept, where that is asked for", is_trained),
    Pass(in_place_reads, "reassociates", ("compress",), "no copies of activations in full size", is_trained),
    Pass(recompute, "exact", ("in_place_reads",), "backward keeps no more than without adapters", is_trained),
    Pass(
        chunk_loss,
        "reassociates",
        ("recompute",),
        "the loss is computed a few rows at a time, where that is worth it",
        lambda joint, settings: bool(settings.chunk_loss),
    ),
    Pass(changed_inputs, "exact", ("chunk_loss",), "backward reads an input that forward changes as it was before"),
    Pass(merges_together, "exact", ("changed_inputs",), "several W' are built by one launch of a kernel"),
)


def run(
    graph: Graph,
    roles: Roles,
    settings: Settings,
    fake_mode: AbstractContextManager[Any],
    hint: Callable[[Size], int],
    at_least: AtLeast | None = None,
) -> Outcome:
    """Rewrites a joint or inference graph in place. Raises on any failure of its own: the caller then uses the graph
    that it kept. `hint` gives a dynamic size as a number, `at_least` compares one and adds a guard."""
    start = time.perf_counter()
    joint = Joint(graph, roles, fake_mode, Sizes.of(hint, at_least), strict=settings.numerics == "strict")
    with without_collection():
        before = Contract.of(graph)
        for row in PASSES:
            if row.when(joint, settings):
                row.run(joint, settings)
        verify(graph, before, fake_mode)
    _log(joint.found)
    joint.found.seconds = time.perf_counter() - start
    return joint.found


@contextmanager
def without_collection() -> Iterator[None]:
    """Next to nothing is let go of meanwhile, and each look for it goes through all objects of the process: of eight
    layers a fifth of the passes' seconds."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def in_order(passes: tuple[Pass, ...]) -> bool:
    """Whether each comes after those that it names."""
    names = [row.name for row in passes]
    return all(name in names[:i] for i, row in enumerate(passes) for name in row.after)


assert in_order(PASSES), "a pass stands before one that it names"


def _log(outcome: Outcome) -> None:
    for s in outcome.sites:
        log.debug("%s: forward %s, input gradient %s (%s)", s.name, s.forward, s.input_grad, s.reason)
    for r in outcome.refusals:
        log.debug("%s: refused, %s (%s)", r.name, r.code, r.detail)
