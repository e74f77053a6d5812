"""What the adapters' gradients are computed from, and what is kept for it."""

from __future__ import annotations

from peft_fx.passes.findings import Settings
from peft_fx.passes.graph.joint import Joint
from peft_fx.passes.keep.approximation import kept_inputs
from peft_fx.passes.keep.by_chunks import by_chunks
from peft_fx.passes.keep.dense_grads import all_cheaper_as_written
from peft_fx.passes.keep.in_place_reads import read_in_place
from peft_fx.passes.keep.policies import POLICIES
from peft_fx.passes.keep.scaled_reads import scale_results


def in_place_reads(joint: Joint, settings: Settings) -> None:
    """Has the adapters' gradients read activations as they lie, or a few tokens at a time."""
    if settings.numerics != "default":
        return
    if not all_cheaper_as_written(joint, settings):
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
