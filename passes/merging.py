"""Finding adapters, and putting their weight form in their place."""

from __future__ import annotations

from peft_fx.passes.decide.candidates import parameters_of, parameters_of_refused
from peft_fx.passes.decide.choosing import candidates, decided, joined, numbered, settled
from peft_fx.passes.decide.regimes import Regimes
from peft_fx.passes.findings import Settings
from peft_fx.passes.joint import Joint
from peft_fx.passes.lossy import layer_inputs
from peft_fx.passes.merged import merged_already
from peft_fx.passes.refusals import refusals
from peft_fx.passes.regions import regions, rewrite
from peft_fx.passes.rewrite import Rewriter


def find(joint: Joint, settings: Settings) -> None:
    """Notes what is an adapter and what layers read; tells what has no weight form, and why."""
    notes, sums, flow = joint.notes, joint.sums, joint.flow
    notes.layer_inputs = layer_inputs(flow)
    notes.maps, refused = regions(joint)
    known = {r.name for r in refused}  # more is known of a region than of what is left over
    placed = {p for one in notes.maps if not one.backward for p in one.row.trained}
    left = refusals(sums, joint.maps, placed)
    joint.found.refusals = [r for r in left if r.name not in known] + refused
    notes.adapter_of = parameters_of_refused(joint.found.refusals, joint.roles) | parameters_of(notes.maps, flow)
    notes.as_written = sums


def merge_maps(joint: Joint, settings: Settings) -> None:
    """Decides what is in weight form, of all adapters in one regime; affine ones are then one product `u·W' + b'`."""
    notes = joint.notes
    groups = [g for g in joint.sums.groups if not any(g.product_node in one.nodes for one in notes.maps)]
    notes.regimes = Regimes(joint.sizes.hint, joint.sizes.at_least)
    maps, sums = (candidates(joint, settings, found) for found in (notes.maps, groups))
    known = settled([*maps, *sums], settings, notes.regimes)
    chosen = decided(joint, maps, notes.regimes)
    if not notes.maps:
        notes.groups, notes.sums = groups, sums
        return
    before = set(joint.position)
    rewrite(joint, chosen, settings.rounding)
    # a region's own sums stay for its parameters' gradients: no sites, and no more are those that a W' is made of
    notes.groups = [g for g in joint.sums.groups if (g.backward or g.root in joint.flow.forward) and g.root in before]
    notes.sums = candidates(joint, settings, notes.groups)
    settled([c for c in notes.sums if c[0].either.product_node not in known], settings, notes.regimes)


def merge_sums(joint: Joint, settings: Settings) -> None:
    """Puts W' in the place of W where a sum is to be in weight form, then has settled what was rewritten for now."""
    notes, position = joint.notes, joint.position
    chosen = decided(joint, notes.sums, notes.regimes)
    joint.found.sites = numbered(joined(joint.found.sites))
    # of the same parameters, a region is the site
    notes.adapter_of = parameters_of(notes.groups, joint.flow) | notes.adapter_of
    joint.found.merged = merged_already(notes.as_written, notes.adapter_of.keys(), joint.sizes.hint)
    rewriter = Rewriter(joint.edit, settings.rounding, settings.kernels)
    rewriter.rewrite(sorted(chosen, key=lambda g: position[g.root]))
    for tentative in reversed(notes.tentative):
        tentative.settle()
