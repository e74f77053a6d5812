"""Every private name of torch that the project needs, in one place, each with what it is for.
tests/peft_fx/test_compat.py is their canary."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from types import CodeType
from typing import Any

import sympy
import torch

# a check that stays in the graph
from torch import _assert_async as assert_async
from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list

# limits of recompiling, which explain() may pass
from torch._dynamo import config as dynamo_config

# what compiles backward as it runs, where a user wants that
from torch._dynamo.compiled_autograd import _disable as without_compiled_autograd

# which code objects Dynamo has compiled, and forgetting one: explain() leaves no trace
from torch._dynamo.convert_frame import input_codes

# the backends whose `reset` torch._dynamo.reset() calls; what torch.compile and torch.compiler.disable make of a module
from torch._dynamo.eval_frame import (
    DisableContext,
    OptimizedModule,
    cached_backends,
    reset_code,
    set_code_exec_strategy,
)

# what is raised where a backend raises, and where Dynamo aborts a compile, to trace the same code again
from torch._dynamo.exc import BackendCompilerFailed, RestartAnalysis
from torch._dynamo.guards import DeletedGuardManagerWrapper

# the sizes that each code object has met, by which Dynamo makes them dynamic
from torch._dynamo.pgo import get_code_state

# what a code object that ran out of recompiles is left at
from torch._dynamo.types import FrameAction, FrameExecStrategy

# graph breaks, by reason
from torch._dynamo.utils import counters

# caches off, where a pass must run
from torch._functorch import config as functorch_config

# what backward would keep of a joint graph, before and after; which of its functions says so
from torch._functorch import partitioners
from torch._functorch.partitioners import default_partition, min_cut_rematerialization_partition
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch._inductor import config as inductor_config
from torch._inductor import list_mode_options, list_options

# both passes go on to the graphs that a graph calls
from torch._inductor.compile_fx import _recursive_joint_graph_passes as joint_graph_passes
from torch._inductor.compile_fx import _recursive_post_grad_passes as post_grad_passes
from torch._inductor.compile_fx import compile_fx

# a pass with a key in Inductor's caches
from torch._inductor.custom_graph_pass import CustomGraphPass

# the fake mode that a joint pass runs under
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    in_kernel_invocation_manager,
)

# the grad_fn of a compiled graph's results
from torch.autograd.function import BackwardCFunction as CompiledCall
from torch.fx import Graph, Node

# a graph's module that writes its code when that is called for the first time
from torch.fx._lazy_graph_module import _LazyGraphModule as LazyGraphModule
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv

# trees of tensors: what calls take and give back
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.weak import WeakIdKeyDictionary

try:  # 2.13 and later
    from torch._inductor.custom_graph_pass import CustomPartitionerFn
except ImportError:  # pragma: no cover
    CustomPartitionerFn = object  # type: ignore[assignment, misc]

# a branch on a value, which a model traced without values cannot take
BRANCHES_ON_A_VALUE = (DataDependentOutputException, GuardOnDataDependentSymNode)

__all__ = [
    "BRANCHES_ON_A_VALUE",
    "BackendCompilerFailed",
    "CompiledCall",
    "CustomGraphPass",
    "CustomPartitionerFn",
    "DisableContext",
    "DynamicOutputShapeException",
    "FakeTensor",
    "FakeTensorMode",
    "LazyGraphModule",
    "OptimizedModule",
    "RestartAnalysis",
    "ShapeEnv",
    "TracingContext",
    "V",
    "WeakIdKeyDictionary",
    "assert_async",
    "at_least",
    "cache_entries",
    "cached_backends",
    "callback_of",
    "choosing",
    "compile_fx",
    "counters",
    "default_partition",
    "default_store",
    "detect_fake_mode",
    "dynamo_config",
    "fake_like",
    "forgetting",
    "functorch_config",
    "gathered",
    "has_inputs_in_memory",
    "hint_for",
    "inductor_config",
    "innermost_backend",
    "is_in_memory_of",
    "is_sharded",
    "is_traceable_wrapper_subclass",
    "joint_graph_passes",
    "list_mode_options",
    "list_options",
    "min_cut_rematerialization_partition",
    "most_reads",
    "place_of",
    "post_grad_passes",
    "pytree",
    "same_memory",
    "saved_by",
    "sizes_that_depend_on_values",
    "source_name",
    "storage_of",
    "tracing",
    "without_compiled_autograd",
]


def fake_like(known: FakeTensor, of: FakeTensor | None = None) -> FakeTensor:
    """A fake tensor laid out as another is, with fixed sizes; in new memory, or in that of a third one."""
    mode = known.fake_mode
    sizes, strides = known.shape, known.stride()
    with in_kernel_invocation_manager(mode):  # here a tensor on the meta device is what it says
        new = torch.empty_strided(sizes, strides, dtype=known.dtype, device="meta")
        if of is not None:
            new.set_(of.untyped_storage(), known.storage_offset(), sizes, strides)  # type: ignore[call-overload]
    return FakeTensor(mode, new, known.device)


def storage_of(x: torch.Tensor) -> torch.UntypedStorage:
    """The memory that a tensor is in; of a sharded one that of its own part."""
    storage: torch.UntypedStorage = getattr(x, "_local_tensor", x).untyped_storage()
    return storage


def place_of(x: torch.Tensor) -> int:
    """Which memory a tensor is in, that of its views too, be it there or not."""
    return int(storage_of(x)._cdata)


def is_in_memory_of(x: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether a tensor is a view of another, or of what that is a view of."""
    return place_of(x) == place_of(other)


def most_reads(device: str) -> int:
    """How many values a pointwise one may read before Inductor writes it to memory."""
    config, of_cpus = inductor_config, "realize_cpu_acc_reads_threshold"  # 2.13 and later
    own = getattr(config, of_cpus, None) if device == "cpu" else None
    most: Any = config.realize_acc_reads_threshold or own
    return int(most or getattr(config, "_realize_acc_reads_threshold_default", 8))


def saved_by(call: Any) -> list[torch.Tensor]:
    """What an autograd function's call, the `grad_fn` of its results, has kept for backward, AOTAutograd's among them;
    nothing once that has run."""
    try:
        return [*call.saved_tensors, *(getattr(call, "_tensors_no_vc_check", None) or ())]
    except (AttributeError, RuntimeError):
        return []


def hint_for(fake_mode: FakeTensorMode) -> Callable[[Any], int]:
    """A size as a number, by the value it had when the graph was traced: no guard is added."""
    shape_env = fake_mode.shape_env

    def hint(size: Any) -> int:
        if isinstance(size, int):
            return size
        expression = sympy.sympify(size)
        if expression.is_number:
            return int(expression)
        known = getattr(shape_env, "var_to_hint_override", {}) | dict(_values(shape_env))
        found = expression.xreplace({s: sympy.Integer(int(v)) for s, v in known.items()})
        return int(found) if found.is_number else 8192  # an unbacked size: long enough for neither form to be absurd

    return hint


def at_least(fake_mode: FakeTensorMode) -> Callable[[Any, int], bool | None]:
    """Whether a size is at least so large, guarded: another graph is compiled where it is not so. None for a size that
    is not known before the graph runs."""
    shape_env = fake_mode.shape_env

    def known(size: Any, n: int) -> bool | None:
        relation = sympy.Ge(sympy.sympify(size), n)
        if relation.is_Boolean and relation in (sympy.true, sympy.false):
            return bool(relation)
        try:
            return bool(shape_env.evaluate_expr(relation))
        except GuardOnDataDependentSymNode:
            return None

    return known


def _values(shape_env: Any) -> dict[Any, Any]:
    """Hints by symbol: `backed_var_to_val` since 2.12, `var_to_val` before."""
    for name in ("backed_var_to_val", "var_to_val"):
        found = getattr(shape_env, name, None)
        if found is not None:
            return {k: v for k, v in found.items() if isinstance(v, (int, sympy.Integer))}
    return {}


def default_store() -> Any:
    """The key-value store through which the ranks of a job met."""
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()


def gathered(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """What FSDP runs a model's code on: FSDP2's whole parameters, by the names of the shards that the model has itself;
    of FSDP1 the flat parameters, which views are handed out of."""
    paths = {module: f"{path}." if path else "" for path, module in model.named_modules()}
    for sharded in filter(_is_sharded_itself, paths):
        if not hasattr(sharded, "_get_fsdp_state"):
            if sharded._handle is not None:
                yield paths[sharded] + "_flat_param", sharded._handle.flat_param
            continue
        state: Any = sharded._get_fsdp_state()
        # several groups in one module since 2.13
        groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
        for parameter in (p for group in groups if group is not None for p in group.fsdp_params):
            info = parameter._module_info
            if hasattr(parameter, "_unsharded_param") and info.module in paths:
                yield paths[info.module] + info.param_name, parameter._unsharded_param


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether FSDP has parameters of a model."""
    return any(map(_is_sharded_itself, model.modules()))


def _is_sharded_itself(module: torch.nn.Module) -> bool:
    fsdp = sys.modules.get("torch.distributed.fsdp")  # a heavy import, which sharding has made
    return fsdp is not None and isinstance(module, (fsdp.FSDPModule, fsdp.FullyShardedDataParallel))


@contextlib.contextmanager
def sizes_that_depend_on_values() -> Iterator[None]:
    """Ops such as nonzero get a symbol for a size in the graph that Dynamo hands to a backend."""
    context = TracingContext.try_get()
    shape_env = context.fake_mode.shape_env if context is not None and context.fake_mode is not None else None
    if shape_env is None:
        yield
        return
    before = shape_env.settings
    shape_env.settings = dataclasses.replace(before, allow_dynamic_output_shape_ops=True)
    try:
        yield
    finally:
        shape_env.settings = before


@contextlib.contextmanager
def choosing(choose: Callable[[Graph, Callable[[float], list[Node]], float], list[Node]]) -> Iterator[None]:
    """Inside the block the partitioner hands backward what `choose` says, which is given a joint graph as the
    partitioner has cleaned it, what it would hand on by itself within a share of all (1), and the share that the user
    has set: PyTorch's activation_memory_budget."""
    real = partitioners.choose_saved_values_set

    def chosen(graph: Graph, info: Any, memory_budget: float = 1) -> list[Node]:
        return choose(graph, functools.partial(real, graph, info), memory_budget)

    partitioners.choose_saved_values_set = chosen
    try:
        yield
    finally:
        partitioners.choose_saved_values_set = real


def callback_of(compiled: Any) -> Any:
    """What Dynamo compiles the frames of a compiled module, function or bound method with; None where that is not
    found."""
    if isinstance(compiled, OptimizedModule):
        return compiled.dynamo_ctx.callback
    return inspect.getclosurevars(compiled).nonlocals.get("callback") if inspect.isfunction(compiled) else None


def innermost_backend(callback: Any) -> Any:
    """What torch.compile was given as its backend, inside Dynamo's wrappers; their attribute has had two names."""
    for name in ("_torchdynamo_orig_backend", "_torchdynamo_orig_callable"):
        while hasattr(callback, name):
            callback = getattr(callback, name)
    return callback


def source_name(placeholder: torch.fx.Node) -> str | None:
    """Dynamo's name for a graph input: a property in some versions, a method in others."""
    source = getattr(placeholder, "_dynamo_source", None)
    if source is None:
        return None
    name = source.name
    return name() if callable(name) else str(name)


def has_inputs_in_memory(ops: Iterable[Any]) -> None:
    """Tells Inductor what it finds out by itself where it first meets an op: that the op's inputs are to be in memory.
    Until then each of two such ops would have a copy of its own of an input."""
    from torch._inductor.lowering import add_needs_realized_inputs  # it takes seconds to import

    for op in ops:
        add_needs_realized_inputs(op)


def same_memory(x: torch.Tensor) -> torch.Tensor:
    """Another object of the same class with the same memory, and none of the attributes."""
    return torch.Tensor._make_subclass(type(x), x.detach().as_subclass(torch.Tensor), x.requires_grad)


@contextlib.contextmanager
def forgetting() -> Iterator[None]:
    """What Dynamo compiled inside the block never answers after it; what was compiled before still does. Nor does it
    know of the sizes that it met there. What Dynamo has given up, after too many compiles, it tries inside the block
    too; after it once more, and then gives it up again. It still counts what is gone: with a graph break, the code of
    modules behind it has as many recompiles less."""
    before = {code: cache_entries(code) for code in _codes()}
    for code in filter(before.get, before):  # without a compiled version, it is skipped for a reason of its own
        set_code_exec_strategy(code, FrameExecStrategy(FrameAction.DEFAULT, FrameAction.DEFAULT))
    sizes = copy.deepcopy(get_code_state())
    try:
        yield
    finally:
        get_code_state().clear()
        get_code_state().update(sizes)
        for code in _codes():
            known = before.get(code, [])
            if not known:
                reset_code(code)
            for entry in cache_entries(code):
                if not any(entry is k for k in known):
                    gone = DeletedGuardManagerWrapper("compiled by explain() alone")
                    entry.guard_manager.extra_state.invalidate(entry, gone)


def cache_entries(code: CodeType) -> list[Any]:
    """A code object's compiled versions that can still answer a call."""
    entries = _debug_get_cache_entry_list(code)
    return [e for e in entries if not isinstance(e.guard_manager, DeletedGuardManagerWrapper)]


def _codes() -> list[CodeType]:
    return [code for ref in input_codes.seen if (code := ref()) is not None]
