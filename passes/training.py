"""What the adapters' gradients are computed from, and what is kept for it."""

from __future__ import annotations

from dataclasses import replace

from peft_fx.passes.findings import WEIGHT, Settings, Site
from peft_fx.passes.joint import Joint
from peft_fx.passes.lossy import kept_inputs
from peft_fx.passes.moments import Budget, from_moments
from peft_fx.passes.nodes import is_tensor, value
from peft_fx.passes.policies import POLICIES
from peft_fx.passes.scaled_reads import scale_results
from peft_fx.passes.tokenwise import by_chunks
from peft_fx.passes.transients import read_in_place


def dense_grads(joint: Joint, settings: Settings) -> None:
    """Has gradients made of `G = uᵀ·dy` where that pays."""
    found, notes = joint.found, joint.notes
    if settings.numerics == "default" and settings.adapter_grad != "low_rank":
        priced = settings.form == "auto" and (found.sites or found.refusals)
        budget = Budget(found.spare, settings.memory_weight) if priced else None
        moments = from_moments(
            joint.graph,
            joint.flow,
            joint.fake_mode,
            joint.sizes.hint,
            lambda: joint.recompute(settings.rebuild_random),
            settings.machine,
            budget,
            settings.keep in POLICIES,
            settings.adapter_grad == "dense",
        )
        joint.edit.changes += len(moments.added)
        notes.reads_tokens = moments.reading
        weights = {notes.adapter_of.get(p, joint.roles[p].name) for p in moments.weights}
        found.sites = [_with_dense_gradient(site, weights) for site in found.sites]
        dense = bool(moments.added)
    else:
        dense = False
    # then it is Inductor's graph, and no other
    untouched = _all_cheaper_as_written(joint, settings) and not dense
    notes.as_it_was = untouched and _on_a_gpu(joint) and _asks_for_time(settings)


def in_place_reads(joint: Joint, settings: Settings) -> None:
    """Has the adapters' gradients read activations as they lie, or a few tokens at a time."""
    if settings.numerics != "default":
        return
    if not _all_cheaper_as_written(joint, settings):
        added = read_in_place(
            joint.graph, joint.flow, joint.fake_mode, joint.sizes.hint, settings.machine, settings.kernels
        )
        joint.edit.changes += len(added)
        by_chunks(joint, settings)
    if not joint.notes.as_it_was:
        scale_results(joint, settings)


def recompute(joint: Joint, settings: Settings) -> None:
    """Tags what backward makes again; tells what is kept of the inputs of layers."""
    keep = joint.recompute(settings.rebuild_random)
    if settings.keep not in POLICIES:
        joint.found.inputs = kept_inputs(joint, settings, keep)
    if not joint.notes.as_it_was:
        joint.found.rebuilt = keep.mark()


def _with_dense_gradient(site: Site, weights: set[str]) -> Site:
    """The site, whose adapter's gradients come from xᵀ·dy where that is said of its weight."""
    name = site.layer
    dense = any(w == name or w.startswith(f"{name}.") for w in weights)
    return replace(site, adapter_grad="dense") if dense else site


def _on_a_gpu(joint: Joint) -> bool:
    return any(is_tensor(n) and value(n).device.type == "cuda" for n in joint.graph.find_nodes(op="placeholder"))


def _asks_for_time(settings: Settings) -> bool:
    """Whether what a kernel takes to start, which is most of it for few tokens on a GPU, is worth more than memory."""
    return settings.keep == "recompute" and not settings.memory_weight


def _all_cheaper_as_written(joint: Joint, settings: Settings) -> bool:
    """Whether the price left every adapter alone: then so are the products of their gradients.

    Few tokens make it so, of which copies are small, and reading in place costs more than the adapters do.
    """
    weight = any(WEIGHT in (s.forward, s.input_grad) for s in joint.found.sites)
    priced = settings.form == "auto" or not joint.found.sites
    return priced and not weight and not joint.found.refusals
