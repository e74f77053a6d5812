"""The passes as Inductor calls them, and what its caches' key has of them.

They run inside AOTAutograd, so they are skipped where a cache answers first; the key covers all that decides: every
byte of the project's source, the options, the machine's constants, the role of each graph input.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import pathlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Graph, Node

import peft_fx
from peft_fx import budgeting, compat
from peft_fx.inputs import roles_in
from peft_fx.kernels import library
from peft_fx.passes import pipeline
from peft_fx.passes.analyse.flow import Role, is_tangent
from peft_fx.passes.findings import Outcome
from peft_fx.passes.graph.editor import Editor
from peft_fx.passes.graph.nodes import prims
from peft_fx.passes.keep.changed_inputs import snapshots
from peft_fx.passes.loss.body import is_body
from peft_fx.passes.verify import no_stale_reads
from peft_fx.records import Record
from peft_fx.subgraphs import matching, renamed

log = logging.getLogger("peft_fx")

SEEDS = {prims.inductor_seed.default, prims.inductor_seeds.default}
DONE = "peft_fx_done"  # a mark on the inputs of a graph that the passes have seen


class PassError(Exception):
    """Our own pass failed; the text and `__cause__` say how."""


def is_done(graph: Graph) -> bool:
    """Whether the passes made a graph themselves, as a loop's body, or have seen it: Inductor runs its own once more on
    the two halves of a graph that another calls."""
    return is_body(graph) or any(DONE in node.meta for node in graph.find_nodes(op="placeholder"))


class AdapterPass(compat.CustomGraphPass):  # type: ignore[misc]
    """The passes as Inductor calls them: once for each joint or inference graph, before its own."""

    def __init__(self, record: Record, others: Sequence[Any] = ()):
        self.record, self.others = record, others
        self.untagged: set[Node] = set()

    def __call__(self, graph: Graph) -> None:
        for other in self.others:
            other(graph)
        if is_done(graph):
            return
        try:
            self.record.outcomes += self.apply(graph)
            compat.has_inputs_in_memory({n.target for n in graph.nodes} & library.KERNELS.keys())
        except Exception as error:
            raise PassError(f"{type(error).__name__}: {error}") from error
        self.untagged = {node for node in graph.nodes if "recompute" not in node.meta}

    def apply(self, graph: Graph) -> list[Outcome]:
        """Runs the passes; what they found, once for each call of a graph that another calls."""
        record, fake_mode = self.record, compat.V.fake_mode
        roles, calls = self.roles_in(graph)
        # drawn by eager's generator, a mask drawn again would be another mask; Inductor's own draws start from a seed
        settings = replace(record.settings, rebuild_random=not compat.inductor_config.fallback_random)
        hint, at_least = compat.hint_for(fake_mode), compat.at_least(fake_mode)
        outcome = pipeline.run(graph, roles, settings, fake_mode, hint, at_least)
        for node in graph.find_nodes(op="placeholder"):
            node.meta[DONE] = True
        return [outcome, *(replace(renamed(outcome, names), seconds=0.0) for names in calls[1:])]

    def holding(self) -> AbstractContextManager[None]:
        """Inside the block partitioners keep what fits the memory budget, the user's or PyTorch's."""
        is_asked = self.record.budget is not None or compat.functorch_config.activation_memory_budget < 1
        return compat.choosing(self.hold) if is_asked else contextlib.nullcontext()

    def hold(self, graph: Graph, alone: Callable[[float], list[Node]], share: float) -> list[Node]:
        """What the partitioner is to keep of a joint graph, which would keep `alone(share)`, and does, after one
        warning, where the choice fails."""
        record, asked = self.record, self.record.budget
        calls = not is_body(graph) and matching(graph, record.subgraphs) is None
        ours = asked is not None or (share < 1 and any(outcome.sites for outcome in record.outcomes))
        if not ours or not calls or not any(map(is_tangent, graph.find_nodes(op="placeholder"))):
            return alone(share)
        machine, hint, values = record.settings.machine, compat.hint_for(compat.V.fake_mode), alone(1)
        try:
            if asked is None:
                return budgeting.within_share(graph, values, share, machine, hint)
            held, values = budgeting.hold(graph, values, roles_in(graph, record.roles), asked, machine, hint)
        except Exception as error:
            told = f"peft_fx left a graph without its memory budget: {type(error).__name__}: {error}"
            warnings.warn(told, RuntimeWarning, stacklevel=2)
            log.debug("the choice failed", exc_info=error)
            return alone(share)
        if record.outcomes:
            record.outcomes[-1].budget = held
        if not held.is_held:
            warnings.warn(budgeting.why_not(held), RuntimeWarning, stacklevel=2)
        return values

    def roles_in(self, graph: Graph) -> tuple[dict[Node, Role], list[dict[str, str]]]:
        """What a graph's inputs are; of a graph that another calls, also each call's names of the first one's."""
        subgraph = matching(graph, self.record.subgraphs)
        if subgraph is None:
            return roles_in(graph, self.record.roles), []
        return subgraph.roles_in(graph), subgraph.names

    def uuid(self) -> Any:
        """All that decides what the pass does besides the graph itself, which the caches look at."""
        if self.record.options.lowering != "inductor":
            return None  # not Inductor's code: not for its caches
        theirs = _uuids(self.others)
        if None in theirs:
            return None
        # the machine by its constants, not by its name or path
        options = {k: v for k, v in vars(self.record.options).items() if k not in ("inductor", "machine")}
        options["memory_budget"] = self.record.budget
        machine = self.record.settings.machine
        roles = sorted((i, r.name, r.static, r.trainable) for i, r in self.record.roles.items())
        # Inductor's own key has no instruction set: code for AVX512 answers a process that is held to AVX2, wrongly
        versions = torch.__version__, torch.backends.cpu.get_cpu_capability(), library.has_triton()
        decides = repr((source_digest(), sorted(options.items()), machine, roles, versions, theirs))
        return hashlib.sha256(decides.encode()).hexdigest()


class Finish(compat.CustomGraphPass):  # type: ignore[misc]
    """After Inductor's joint passes, which know nothing of what backward will rebuild.

    Where they remove a no-op such as `1*x`, they hand all its metadata on to x. With a recompute tag on it, an input of
    the graph would be missing in backward, and a residual stream would be computed twice: tags come off the nodes that
    had none. Where they draw a seed for a mask that is to be rebuilt, the seed is kept: drawn again, it would take the
    generator's state to be kept instead. Where they remove a copy of what forward writes, one is made anew.
    """

    def __init__(self, ours: AdapterPass, others: Sequence[Any] = ()):
        self.ours, self.others = ours, others

    def __call__(self, graph: Graph) -> None:
        for node in graph.nodes:
            is_seed = node.target in SEEDS and "ac_graph_id" not in node.meta  # of ours, not of a checkpoint's
            if node in self.ours.untagged or is_seed:
                node.meta.pop("recompute", None)
        self.ours.untagged = set()
        for other in self.others:
            other(graph)
        try:
            snapshots(Editor(graph, compat.V.fake_mode))
            no_stale_reads(graph)
        except Exception as error:
            raise PassError(f"{type(error).__name__}: {error}") from error

    def uuid(self) -> Any:
        theirs = _uuids(self.others)
        return None if None in theirs else (source_digest(), *theirs)


def patches_for(ours: AdapterPass, inductor: Mapping[str, Any]) -> dict[str, Any]:
    """Inductor's options with our passes in them: the user's own run before the first and after the last."""
    patches = dict(inductor)
    mine: AdapterPass | Finish
    for key, mine in (("joint_custom_pre_pass", ours), ("joint_custom_post_pass", Finish(ours))):
        theirs = patches.get(key) or getattr(compat.inductor_config, key) or []
        mine.others = theirs if isinstance(theirs, (list, tuple)) else [theirs]
        patches[key] = mine
    return patches


def _uuids(passes: Sequence[Any]) -> list[Any]:
    return [p.uuid() if hasattr(p, "uuid") else None for p in passes]


@functools.cache
def source_digest() -> str:
    """A hash of every source file of the project, whatever folder it is in."""
    digest = hashlib.sha256()
    root = pathlib.Path(peft_fx.__file__).parent
    folders = root, root / "passes"  # in a checkout a link, which is not followed from above
    files = {path.relative_to(root).as_posix(): path for folder in folders for path in folder.rglob("*.py")}
    for name, path in sorted(files.items()):
        digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
