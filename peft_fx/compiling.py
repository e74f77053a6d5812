"""The backend: gives Inductor one pass over the joint graph, and a record of what that pass did.

The pass runs inside AOTAutograd, so it is skipped where a cache answers first; its key covers all that decides: every
byte of the project's source, the options, the machine's constants, the role of each graph input. What a record lacks
then, `explain` finds by running the same pass again on the same graph, without computing anything.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import pathlib
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

import peft_fx
from peft_fx import budgeting, compat, sharing
from peft_fx.frames import with_room
from peft_fx.kernels import library
from peft_fx.options import Options, parse
from peft_fx.passes import pipeline
from peft_fx.passes.analyse.flow import Role, is_tangent
from peft_fx.passes.findings import Outcome, Settings
from peft_fx.passes.graph.editor import Editor
from peft_fx.passes.graph.nodes import prims
from peft_fx.passes.keep.changed_inputs import snapshots
from peft_fx.passes.loss.body import is_body
from peft_fx.passes.verify import no_stale_reads
from peft_fx.regional import Subgraph, matching, renamed, subgraphs_of
from peft_fx.sources import name_in_model

log = logging.getLogger("peft_fx")


SEEDS = {prims.inductor_seed.default, prims.inductor_seeds.default}
DONE = "peft_fx_done"  # a mark on the inputs of a graph that the passes have seen


class PassError(Exception):
    """Our own pass failed; the text and `__cause__` say how."""


@dataclass
class Record:
    """One graph that Dynamo handed us: enough to run the passes on it again, and what they found; not `lowered` where
    AOTAutograd or Inductor turned it away. `grad` and `autocast` are what it was traced under, `calls` the parameters,
    by position, of each module that it has run for: Dynamo runs one graph for all layers that are alike. `device` is
    where the graph is taken to be, if not where its inputs are; `kind` and `around` are what `sharing` knows of it.

    `compiled` is what Dynamo was given to call, and lets go of with the code that calls it; `ran` is whether it did."""

    graph_module: GraphModule
    inputs: list[Any]
    roles: dict[int, Role]
    options: Options
    grad: bool
    outcomes: list[Outcome] = field(default_factory=list)
    failure: str = ""
    lowered: bool = True
    compiled: Callable[[], Any] = lambda: None
    ran: bool = False
    autocast: list[tuple[str, torch.dtype, bool]] = field(default_factory=list)
    calls: list[dict[int, Callable[[], Any]]] = field(default_factory=list)
    resets: int = field(default_factory=lambda: _resets)
    device: torch.device | None = None
    kind: sharing.Kind | None = None
    around: sharing.Around = field(default_factory=sharing.Around)

    @classmethod
    def of(
        cls,
        gm: GraphModule,
        inputs: list[Any],
        roles: dict[int, Role],
        options: Options,
        device: torch.device | None = None,
    ) -> Record:
        """The record of a graph that is to be compiled here and now."""
        devices = sorted({t.device.type for t in inputs if isinstance(t, torch.Tensor)} | {"cpu"})
        autocast = [(d, torch.get_autocast_dtype(d), torch.is_autocast_enabled(d)) for d in devices if d != "meta"]
        return cls(gm, inputs, roles, options, torch.is_grad_enabled(), autocast=autocast, device=device)

    @property
    def is_told(self) -> bool:
        """Whether the graph can be called, or was there to be when Dynamo forgot all of them; or was turned away.

        Dynamo may start a compile again from within the backend or behind it: a graph of an aborted try is let go of
        without having run once.
        """
        forgotten = self.ran and self.resets < _resets
        return not self.lowered or forgotten or self.compiled() is not None

    @property
    def place(self) -> torch.device:
        """The device that the graph is on, or is told of as on."""
        found = next((t.device for t in self.inputs if isinstance(t, torch.Tensor)), torch.device("cpu"))
        return self.device or found

    @functools.cached_property
    def settings(self) -> Settings:
        """What the options come to on the device of the graph."""
        return self.options.settings(self.place)

    @functools.cached_property
    def budget(self) -> budgeting.Asked | None:
        """The memory budget on the device of the graph."""
        asked = self.options.budget(self.place)
        return asked and replace(asked, around=self.around)

    @functools.cached_property
    def subgraphs(self) -> list[Subgraph]:
        return subgraphs_of(self.graph_module, self.roles)


# The records of each parameter's compiles. Weak: a record lives as long as a model that it is about.
_records: compat.WeakIdKeyDictionary = compat.WeakIdKeyDictionary()
_noting = threading.Lock()
_resets = 0  # how often Dynamo has forgotten all graphs


def backend(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """The `torch.compile` backend: adapters to their weight form where that is cheaper, everything then to Inductor.

    `options` with the prefix "peft_fx." are ours, the others and `mode` go to Inductor. Raises ValueError for an
    unknown option or value; a failure of our own is one RuntimeWarning, and the graph goes to Inductor as it was. The
    environment variable PEFT_FX_DISABLE=1 hands every graph to Inductor untouched.
    """
    compat.cached_backends[id(backend)] = backend  # else a second reset is not told to what was compiled before one
    chosen = parse(options, mode)
    if is_disabled():
        return _lower(gm, example_inputs, chosen, None)
    record = record_of(gm, example_inputs, chosen)
    if chosen.memory_budget is not None:
        _look_around(record, example_inputs)
    given = [t if isinstance(t, torch.nn.Parameter) else getattr(t, "_base", None) for t in example_inputs]
    try:
        compiled = noting_calls(lowered(gm, example_inputs, record), record)
    except compat.RestartAnalysis:
        raise  # the same code is traced again
    except compat.DynamicOutputShapeException:
        record.lowered = False  # Dynamo goes on op by op
        _note(record, given)
        raise
    except Exception as error:  # with suppress_errors, the code runs in eager mode
        record.lowered, record.outcomes = False, []
        record.failure = f"the compile failed, {type(error).__name__}: {error}"
        _note(record, given)
        raise
    _note(record, given)
    return compiled


def _look_around(record: Record, example_inputs: Sequence[Any]) -> None:
    """What the graph's budget is shared with; where that fails, after one warning, the graph has all of it."""
    parameters = {record.roles[i].name: t for i, t in enumerate(example_inputs) if isinstance(t, torch.nn.Parameter)}
    try:
        record.kind, record.around = sharing.around(parameters, record.place)
    except Exception as error:
        told = f"peft_fx holds a graph to its memory budget by itself: {type(error).__name__}: {error}"
        warnings.warn(told, RuntimeWarning, stacklevel=3)
        log.debug("nothing is known around a graph", exc_info=error)


def is_disabled() -> bool:
    """Whether the environment has the backend hand every graph to Inductor untouched."""
    return os.environ.get("PEFT_FX_DISABLE", "0") not in ("", "0")


def record_of(gm: GraphModule, example_inputs: Sequence[Any], options: Options) -> Record:
    """The record of a graph as Dynamo hands it over; nobody knows of it yet."""
    return Record.of(copy_of(gm), _fake(gm, example_inputs), roles_of(gm, example_inputs), options)


def lowered(gm: GraphModule, example_inputs: Sequence[Any], record: Record) -> Callable[..., Any]:
    """The graph compiled with our passes; where they fail, without them."""
    try:
        return _lower(gm, example_inputs, record.options, AdapterPass(record))  # type: ignore[no-any-return]
    except PassError as error:
        record.failure = str(error)
        warnings.warn(f"peft_fx left a graph to Inductor untouched: {record.failure}", RuntimeWarning, stacklevel=3)
        log.debug("the pass failed", exc_info=error.__cause__)
        return _lower(copy_of(record.graph_module), example_inputs, record.options, None)  # type: ignore[no-any-return]


def _note(record: Record, tensors: Iterable[Any]) -> None:
    """Adds a record to those of the parameters among a graph's inputs, in the place of what failed or is gone."""
    with _noting:
        for p in {id(p): p for p in tensors if isinstance(p, torch.nn.Parameter)}.values():
            others = [r for r in _records.get(p, []) if r.is_told and not (r.failure and not r.lowered)]
            _records[p] = [*(r for r in others if r is not record), record]


def _reset() -> None:
    """With torch._dynamo.reset() the compiled graphs are gone: what is compiled from now on replaces their records."""
    global _resets
    _resets += 1


backend.reset = _reset  # type: ignore[attr-defined]


def noting_calls(compiled: Callable[..., Any], record: Record) -> Callable[..., Any]:
    """The compiled graph, which notes that it runs, and the parameters of each module that it runs for."""
    static = [i for i, role in record.roles.items() if role.static]
    first = sorted(static, key=lambda i: not record.roles[i].trainable)[:1]  # a frozen weight may be shared
    known = compat.WeakIdKeyDictionary()

    def note(first: torch.Tensor, args: Sequence[Any]) -> None:
        parameters = {i: args[i] for i in static if isinstance(args[i], torch.nn.Parameter)}
        with _noting:
            if first in known:
                return
            known[first] = True
            record.calls.append({i: weakref.ref(p) for i, p in parameters.items()})
        _note(record, parameters.values())

    @functools.wraps(compiled)
    def run(*args: Any) -> Any:
        record.ran = True
        for i in first:
            if args[i] not in known:
                note(args[i], args)
        results = compiled(*args)
        if record.options.memory_budget is not None:
            sharing.note(record.kind, record.around, args, results)
        return results

    record.compiled = weakref.ref(run)
    return run


def records_of(model: torch.nn.Module) -> list[Record]:
    """The graphs compiled for a model's parameters that can still be called, oldest first; those that could be before a
    torch._dynamo.reset(), until something is compiled after it."""
    found: dict[int, Record] = {}
    for parameter in parameters_of(model):
        found |= {id(r): r for r in _records.get(parameter, []) if r.is_told}
    latest = max((r.resets for r in found.values()), default=0)
    return [r for r in found.values() if r.resets == latest]


def parameters_of(model: torch.nn.Module) -> dict[torch.Tensor, str]:
    """What a model's graphs are given as its parameters, by object, with its names for them."""
    return {parameter: name for name, parameter in (*compat.gathered(model), *model.named_parameters())}


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


def lower(gm: GraphModule, example_inputs: Sequence[Any], options: Options) -> Any:
    """A graph compiled with our pass and no record of it; a failure of the pass is raised."""
    record = Record.of(gm, _fake(gm, example_inputs), roles_of(gm, example_inputs), options)
    return _lower(gm, example_inputs, options, AdapterPass(record))


@with_room
def _lower(gm: GraphModule, example_inputs: Sequence[Any], options: Options, ours: AdapterPass | None) -> Any:
    patches = dict(options.inductor) if ours is None else patches_for(ours, options.inductor)
    inner: dict[str, Any] = {}
    if options.lowering == "aot_eager":
        patches["fallback_random"] = True
        patches["fx_graph_cache"] = False
        inner["inner_compile"] = _run_eagerly
    with contextlib.nullcontext() if ours is None else ours.holding():
        return compat.compile_fx(gm, example_inputs, **inner, config_patches=patches)


def _run_eagerly(gm: GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
    """Instead of generating code: the graph's ATen ops, one by one."""
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.prims.iota.default):
        if node.kwargs["dtype"] in (torch.uint16, torch.uint32, torch.uint64):  # eager ops know these only by name
            node.kwargs = {**node.kwargs, "dtype": torch.int64}
    gm.recompile()

    def run(args: list[Any]) -> Any:
        inputs, args[:] = list(args), []
        return gm(*inputs)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


# ------------------------------------------------------------------------------------------------------------ graph
# inputs


def roles_of(
    gm: GraphModule, example_inputs: Sequence[Any], names: Mapping[torch.Tensor, str] | None = None
) -> dict[int, Role]:
    """What each input of a Dynamo graph is, by position; `names` are those of the parameters, where the model is known:
    Dynamo's own say little behind a graph break."""
    roles = {}
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    for i, (node, given) in enumerate(zip(placeholders, example_inputs, strict=False)):
        if not isinstance(given, torch.Tensor):
            continue
        source = compat.source_name(node) or node.name
        is_parameter = isinstance(given, torch.nn.Parameter) or "_parameters[" in source
        marked = "_dynamo_static_input_type" in node.meta.get("tensor_dict", {})
        in_a_hook = "_hooks[" in source  # what a call was given, handed on by a hook, comes from a module too
        static = is_parameter or "_buffers[" in source or (marked and not in_a_hook)
        roles[i] = Role((names or {}).get(given) or name_in_model(source), static, is_parameter and given.requires_grad)
    return roles


def roles_in(graph: Graph, by_position: dict[int, Role]) -> dict[Node, Role]:
    """The same for the inputs of the joint graph, by AOTAutograd's own description of them."""
    roles = {}
    for node in graph.nodes:
        if node.op != "placeholder":
            break
        described = node.meta.get("desc")
        attribute = ""
        while described is not None and not hasattr(described, "idx") and hasattr(described, "base"):
            attribute = f".{getattr(described, 'attr', '')}{attribute}"
            described = described.base
        role = by_position.get(getattr(described, "idx", -1)) if "tangents" not in node.name else None
        if role is not None:
            roles[node] = Role(role.name + attribute, role.static, role.trainable)
    return roles


def _fake(gm: GraphModule, example_inputs: Sequence[Any]) -> list[Any]:
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    return [n.meta.get("example_value", given) for n, given in zip(placeholders, example_inputs, strict=False)]


def copy_of(gm: GraphModule) -> GraphModule:
    """A graph module of its own nodes, sharing its attributes; Inductor may change the one it is given."""
    graph = Graph()
    mapping: dict[Node, Node] = {}
    output = graph.graph_copy(gm.graph, mapping)
    if output is not None:
        (old,) = (n for n in gm.graph.nodes if n.op == "output")
        graph.output(output).meta.update(old.meta)
    for old, new in mapping.items():
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    copied = GraphModule(gm, graph, type(gm).__name__)
    copied.meta.update(gm.meta)
    return copied
