"""The backend: gives Inductor one pass over the joint graph, and keeps a record of what that pass did.

Where a cache answers before the pass, the record lacks what it would have found: `explain` then runs the same pass
again on the same graph, without computing anything.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from peft_fx import compat, sharing
from peft_fx.frames import with_room
from peft_fx.graphs import copy_module
from peft_fx.inductor_passes import AdapterPass, PassError, patches_for
from peft_fx.inductor_passes import source_digest as source_digest  # asked for here from outside
from peft_fx.inputs import fake_inputs, roles_of
from peft_fx.options import Options, parse
from peft_fx.records import Record, noting_calls, remember, reset

log = logging.getLogger("peft_fx")


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
        remember(record, given)
        raise
    except Exception as error:  # with suppress_errors, the code runs in eager mode
        record.lowered, record.outcomes = False, []
        record.failure = f"the compile failed, {type(error).__name__}: {error}"
        remember(record, given)
        raise
    remember(record, given)
    return compiled


backend.reset = reset  # type: ignore[attr-defined]


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
    return Record.of(copy_module(gm), fake_inputs(gm, example_inputs), roles_of(gm, example_inputs), options)


def lowered(gm: GraphModule, example_inputs: Sequence[Any], record: Record) -> Callable[..., Any]:
    """The graph compiled with our passes; where they fail, without them."""
    try:
        return _lower(gm, example_inputs, record.options, AdapterPass(record))  # type: ignore[no-any-return]
    except PassError as error:
        record.failure = str(error)
        warnings.warn(f"peft_fx left a graph to Inductor untouched: {record.failure}", RuntimeWarning, stacklevel=3)
        log.debug("the pass failed", exc_info=error.__cause__)
        return _lower(copy_module(record.graph_module), example_inputs, record.options, None)  # type: ignore[no-any-return]


def lower(gm: GraphModule, example_inputs: Sequence[Any], options: Options) -> Any:
    """A graph compiled with our pass and no record of it; a failure of the pass is raised."""
    record = Record.of(gm, fake_inputs(gm, example_inputs), roles_of(gm, example_inputs), options)
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
