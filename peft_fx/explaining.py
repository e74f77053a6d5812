"""`explain`: what the backend does to a model, told from the same passes on the same graphs, without computing
anything."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Graph, GraphModule

from peft_fx import compat
from peft_fx.components import by_component, partitioned
from peft_fx.gradients import gradient_errors
from peft_fx.graphs import copy_graph, copy_module
from peft_fx.inductor_passes import PassError, patches_for
from peft_fx.inputs import roles_of
from peft_fx.listing import Lines, listings
from peft_fx.options import Options, parse
from peft_fx.passes.findings import Outcome
from peft_fx.preparing import curable
from peft_fx.records import Record, noting_calls, parameters_of, records_of
from peft_fx.reports import Report
from peft_fx.retargeting import Retarget, RetargetedPass, device_of
from peft_fx.subgraphs import renamed
from peft_fx.tracing import (
    CPU,
    IDLE,
    Ghosts,
    answer,
    call_compiled,
    device_traced,
    new_fake_mode,
    nothing_changed,
    telling_of_a_batch,
)


def explain(
    model: Any,
    *args: Any,
    options: Mapping[str, Any] | None = None,
    measure: bool = False,
    device: str | torch.device | None = None,
    **kwargs: Any,
) -> Report:
    """What is rewritten in a model, what is not, and why. Nothing is computed and nothing is changed; weights need
    not exist.

    With `measure` the call is made, forward and backward, and the report has the error that a lossy `"peft_fx.keep"`
    puts on every gradient. Then weights and inputs must be real; gradients, buffers and random state stay as they are.

    `explain(model, *args, **kwargs)` traces the call on fake tensors, under `options` as torch.compile takes them; a
    model on the meta device works. A model that is on no GPU is told of as if it were on `device`, "cpu" or "cuda"; by
    default on a GPU where `"peft_fx.machine"` names one, and on the CPU otherwise. No GPU is needed for that.
    `explain(compiled)` of a compiled model that already ran tells what that compile did, if it was this backend's. For
    a transformers model, `explain(model)` makes its own inputs. Raises TypeError where there is nothing to go by, and
    ValueError for a device that cannot be had.
    """
    if measure:
        report = explain(model, *args, options=options, device=device, **kwargs)
        plain, compiled_options = unwrapped(model)
        kwargs = kwargs if args or kwargs else own_inputs(plain, "explain")
        chosen = parse(options) if options is not None else compiled_options or Options()
        return replace(report, errors=gradient_errors(plain, args, kwargs, chosen))
    plain, compiled_options = unwrapped(model)
    if not args and not kwargs:
        others = compiled_options is None and compat.callback_of(model) is not None
        records = records_of(plain) if isinstance(plain, torch.nn.Module) and not others else []
        wanted = compiled_options if plain is not model else None
        records = [r for r in records if wanted is None or r.options == wanted]
        if records:
            return _report_of(records, plain)
        kwargs = own_inputs(plain, "explain")
    chosen = parse(options) if options is not None else compiled_options or Options()
    with telling_of_a_batch("explain", plain, args, kwargs):
        return _trace(plain, args, kwargs, chosen, device)


def unwrapped(model: Any) -> tuple[Any, Options | None]:
    """The model inside a compiled one, and the options that it was compiled with."""
    if isinstance(model, compat.OptimizedModule):
        return model._orig_mod, _options_in(model)
    inner = getattr(model, "_torchdynamo_orig_callable", None)
    if inner is not None:
        return getattr(inner, "__self__", inner), _options_in(model)
    return model, None


def _options_in(compiled: Any) -> Options | None:
    wrapper = compat.innermost_backend(compat.callback_of(compiled))
    given = getattr(wrapper, "kwargs", None)
    ours = getattr(wrapper, "compiler_fn", None) is not None and isinstance(given, dict)
    try:
        return parse(given.get("options"), given.get("mode")) if ours and given is not None else None
    except ValueError:
        return None


def own_inputs(model: Any, caller: str) -> dict[str, Any]:
    """A transformers model's own dummy inputs, at a length at which the choice of form matters. Raises TypeError, with
    the call of `caller` to make, where a model has none."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = getattr(inner, "config", None)
    reads_ids = getattr(inner, "main_input_name", "") == "input_ids"  # others' dummies do not fit them
    if not hasattr(inner, "dummy_inputs") or config is None or not reads_ids:
        others = ["a compiled model that already ran"] * (caller == "explain") + ["a transformers model of token ids"]
        raise TypeError(
            f"{caller}() needs the inputs of a call, as in {caller}(model, x) or {caller}(model, input_ids=ids, "
            f"labels=ids); without them it can tell only of {' or of '.join(others)}"
        )
    found = {}
    length = min(2048, getattr(config, "max_position_embeddings", 2048))
    for name, tensor in inner.dummy_inputs.items():
        is_ids = isinstance(tensor, torch.Tensor) and not tensor.is_floating_point() and tensor.ndim == 2
        found[name] = torch.zeros(1, length, dtype=tensor.dtype) if is_ids else tensor
    if "input_ids" in found and inner.can_generate():
        found["labels"] = found["input_ids"]
    return found


# -----------------------------------------------------------------------------------------------------------------
# tracing


class Idle(RetargetedPass):
    """The same pass, on the device that is told of. It keeps a copy of the graph as it was, so that what would be kept
    without us can be told too; `kept` are bytes by component, `nodes` the text of each adapter's module, each before
    and after."""

    untouched: Graph | None = None

    def __init__(self, record: Record, retarget: Retarget):
        super().__init__(record, retarget)
        self.kept: dict[str, dict[str, int]] = {}
        self.nodes: dict[str, dict[str, Lines]] = {}

    def apply(self, graph: Graph) -> list[Outcome]:
        self.retarget.exchange(graph, compat.V.fake_mode)
        self.untouched = copy_graph(graph)
        outcomes = super().apply(graph)
        names = _names_told(outcomes[0])
        with self.retarget.there(self.untouched, graph):
            before, after = (listings(g, self.roles_in(g)[0], names) for g in (self.untouched, graph))
        for outcome in outcomes:
            of_call = zip(names, _names_told(outcome), strict=True)
            self.nodes |= {told: {"before": before[name], "after": after[name]} for name, told in of_call}
        return outcomes


def _names_told(outcome: Outcome) -> list[str]:
    return [*(s.name for s in outcome.sites), *(r.name for r in outcome.refusals)]


class Partitioner(compat.CustomPartitionerFn):  # type: ignore[misc]
    """Partitions the graph before and after, and counts what each keeps."""

    def __init__(self, idle: Idle):
        self.idle = idle

    def __call__(
        self, gm: GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[GraphModule, GraphModule]:
        record, kept, exchange = self.idle.record, self.idle.kept, self.idle.retarget.exchange
        exchange(gm.graph, compat.V.fake_mode)  # what patterns have made since
        if record.subgraphs:  # what a subgraph keeps is not known to the graph that calls it
            split: tuple[GraphModule, GraphModule]
            with self.idle.holding():
                split = compat.min_cut_rematerialization_partition(gm, joint_inputs, **kwargs)
            return split
        if self.idle.untouched is not None:
            before = GraphModule(gm, self.idle.untouched)
            with compat.inductor_config.patch(joint_custom_pre_pass=None, joint_custom_post_pass=None):
                before = compat.joint_graph_passes(before) or before
            exchange(before.graph, compat.V.fake_mode)
            kept["before"] = by_component(partitioned(before, joint_inputs, record.roles, kwargs)[2].values())
        with self.idle.holding():
            forward, backward, after = partitioned(gm, joint_inputs, record.roles, kwargs)
        kept["after"] = by_component(after.values())
        return forward, backward

    def uuid(self) -> Any:
        return None


def _compile_idly(
    gm: GraphModule, example_inputs: Sequence[Any], record: Record, retarget: Retarget
) -> tuple[Any, Idle]:
    """The backend's way through Inductor up to the partitioned graphs, and no further: calls answer with fake tensors.

    Returns the callable and what the pass saw; where our pass fails, the untouched graph's, as the backend would.
    """
    idle = Idle(record, retarget)
    patches = patches_for(idle, record.options.inductor) | IDLE | {"custom_partitioner_fn": Partitioner(idle)}
    untouched = copy_module(gm)
    with compat.functorch_config.patch(enable_autograd_cache=False):
        try:
            called = compat.compile_fx(gm, example_inputs, inner_compile=answer, config_patches=patches)
        except PassError as error:
            record.failure = str(error)
            plain = record.options.inductor | IDLE
            called = compat.compile_fx(untouched, example_inputs, inner_compile=answer, config_patches=plain)
    idle.untouched = None
    return called, idle


def _trace(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], options: Options, device: str | torch.device | None
) -> Report:
    fake_mode = new_fake_mode()
    traced_on = device_traced(model, args, kwargs)
    retarget = Retarget(traced_on, device_of(options, device, traced_on))
    traced: list[tuple[Record, Idle | None]] = []

    def capture(gm: GraphModule, example_inputs: list[Any]) -> Any:
        roles = roles_of(gm, example_inputs, known)
        record = Record.of(gm, list(example_inputs), roles, options, retarget.device)
        traced.append((record, None))
        untouched = copy_module(gm)
        try:
            called, idle = _compile_idly(gm, example_inputs, record, retarget)
        except compat.DynamicOutputShapeException:
            record.lowered = False
            with compat.sizes_that_depend_on_values():
                _compile_idly(untouched, example_inputs, record, retarget)
            raise
        traced[-1] = record, idle
        return noting_calls(called, record)

    ghosts = Ghosts(fake_mode, "explain")
    ghost = ghosts.of(model)
    known = _names_in(ghost)
    before = dict(compat.counters["graph_break"])
    args, kwargs = ghosts((args, kwargs))
    with compat.forgetting(), nothing_changed(), fake_mode:
        try:
            call_compiled(ghost, args, kwargs, capture, "explain")
            stopped = []
        except (*compat.BRANCHES_ON_A_VALUE, AssertionError) as error:
            if isinstance(error, AssertionError) and "data-dependent" not in str(error):
                raise  # not of Dynamo's guards, which a size that depends on values makes fail
            stopped = [
                f"the model branches on a value here, and nothing after it can be told without running it: {error}"
            ]
    breaks = stopped + [b for b, n in compat.counters["graph_break"].items() if n > before.get(b, 0)]
    if isinstance(model, torch.nn.Module) and (names := curable(model)):
        hint = f"Hint: peft_fx.prepare(model) cures the breaks in {len(names)} of its modules, such as {names[0]}"
        breaks = [f"{b}\n  {hint}" for b in breaks]
    if not traced and not breaks:
        raise RuntimeError("Dynamo traced no graph of this call: is the model disabled for torch.compile?")
    told = [(_told_of(r, known), kept) for r, kept in traced if r.ran or not r.lowered]  # others are aborted tries
    return _combine(told, breaks)


def _report_of(records: list[Record], model: torch.nn.Module) -> Report:
    """A compile's report. Where a cache answered and the pass never ran, it runs now, on the same graph."""
    for record in records:
        if not record.outcomes and not record.failure:
            _run_again(record)
    return _combine([(_told_of(r, _names_in(model)), None) for r in records], [])


def _names_in(model: Any) -> dict[torch.Tensor, str]:
    """A module's parameters, by the names that they have when nothing is compiled."""
    named = parameters_of(model) if isinstance(model, torch.nn.Module) else {}
    return {parameter: name.replace("_orig_mod.", "") for parameter, name in named.items()}


def _told_of(record: Record, names: Mapping[torch.Tensor, str]) -> Record:
    """The record with what was found for each layer that the graph ran for, by a model's own names."""
    tables = [
        {record.roles[i].name: names[p] for i, parameter in call.items() if (p := parameter()) in names}
        for call in record.calls
    ]
    found = [renamed(outcome, table) for table in tables if table for outcome in record.outcomes]
    return replace(record, outcomes=found or record.outcomes)


def _run_again(record: Record) -> None:
    gm = copy_module(record.graph_module)
    fake_mode = compat.detect_fake_mode(record.inputs)
    any_size = contextlib.nullcontext() if record.lowered else compat.sizes_that_depend_on_values()
    context = compat.tracing(compat.TracingContext(fake_mode))
    with contextlib.ExitStack() as ambient:
        for device, dtype, enabled in record.autocast:
            ambient.enter_context(torch.autocast(device, dtype, enabled))
        with context, any_size, torch.set_grad_enabled(record.grad), nothing_changed():
            _compile_idly(gm, record.inputs, record, Retarget(CPU, CPU))


def _combine(traced: list[tuple[Record, Idle | None]], breaks: list[str]) -> Report:
    report = Report(graphs=sum(r.lowered for r, _ in traced), graph_breaks=breaks)
    report.failures.extend(r.failure for r, _ in traced if r.failure)
    for record, idle in traced:
        for outcome in record.outcomes:
            report.sites.extend(outcome.sites)
            known = {s.name for s in report.sites}  # a merged weight may be handed on from graph to graph
            report.sites.extend(s for s in outcome.merged if s.name not in known)
            report.losses.extend(outcome.losses)
            report.inputs.extend(outcome.inputs)
            told = set() if record.lowered else {r.name for r in report.refusals}  # Dynamo tries more than once
            report.refusals.extend(r for r in outcome.refusals if r.name not in told)
        for label, components in idle.kept.items() if idle else ():
            of_calls = {k: n * max(1, len(record.calls)) for k, n in components.items()}
            _add(report.kept_bytes, {label: sum(of_calls.values())})
            _add(report.components.setdefault(label, {}), of_calls)
        report.budgets.extend([held for outcome in record.outcomes if (held := outcome.budget)][:1])  # for all calls
        report.nodes.update(_nodes_told(idle, record.outcomes) if idle else {})
    return report


def _nodes_told(idle: Idle, told: list[Outcome]) -> dict[str, dict[str, Lines]]:
    """The text of each adapter by the names that it is told of: a graph that runs for several layers has those of the
    first."""
    pairs = zip(itertools.cycle(idle.record.outcomes), told, strict=False)
    names = ((_names_told(own), _names_told(outcome)) for own, outcome in pairs)
    return {new: idle.nodes[old] for both in names for old, new in zip(*both, strict=True) if old in idle.nodes}


def _add(total: dict[str, int], more: Mapping[str, int]) -> None:
    for k, n in more.items():
        total[k] = total.get(k, 0) + n
