"""The pass that tells the partitioner what backward makes again."""

from __future__ import annotations

from peft_fx.passes.findings import Settings
from peft_fx.passes.graph.joint import Joint
from peft_fx.passes.keep.approximation import kept_inputs
from peft_fx.passes.keep.policies import POLICIES


def recompute(joint: Joint, settings: Settings) -> None:
    """Tags what backward makes again; tells what is kept of the inputs of layers."""
    keep = joint.recompute(settings.rebuild_random)
    if settings.keep not in POLICIES:
        joint.found.inputs = kept_inputs(joint, settings, keep)
    if not joint.notes.as_it_was:
        joint.found.rebuilt = keep.mark(joint.edit)
