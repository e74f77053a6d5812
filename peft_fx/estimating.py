"""`estimate`: what a training step takes, by variant, from traced graphs alone: no weights, no computing, no GPU."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from fractions import Fraction
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from peft_fx import budgeting, compat, machines
from peft_fx.budgeting import OPTIMIZERS
from peft_fx.compat import pytree
from peft_fx.components import ADAPTERS
from peft_fx.estimates import Estimate, Row
from peft_fx.explaining import own_inputs, unwrapped
from peft_fx.inputs import roles_of
from peft_fx.lengths import filled
from peft_fx.options import PREFIX, Options, parse
from peft_fx.passes.analyse.flow import Role
from peft_fx.retargeting import Retarget, device_of
from peft_fx.splitting import PATTERNS, Split, Target
from peft_fx.step.traced import Halves, step_of
from peft_fx.tracing import (
    IDLE,
    Ghosts,
    answer,
    call_compiled,
    device_traced,
    new_fake_mode,
    nothing_changed,
    telling_of_a_batch,
)
from peft_fx.variants import EXACT, VARIANTS, WITHIN, LeftOut, Way, by_preparation, options_of

DEPTH = 2  # layers of a deep model that are traced, and one more: a further layer costs what that one did
AGAIN = 1  # more where layers are made again: memory that waits for the next one is all there once there are three
DEEP = 6  # equal layers, from which on a model is deep


def estimate(
    model: Any,
    *args: Any,
    options: Mapping[str, Any] | None = None,
    machine: str | None = None,
    device: str | torch.device | None = None,
    optimizer: str = "adamw",
    variants: Sequence[str] | None = None,
    seq_lens: Iterable[int] | None = None,
    progress: Callable[[str], None] | None = None,
    **kwargs: Any,
) -> Estimate:
    """Peak memory and time of a training step of a model, by variant. Nothing is computed; weights need not exist.

    `estimate(model, *args, **kwargs)` traces the call on fake tensors; a model on the meta device gives the same
    figures. `options` are torch.compile's, for the variants by peft_fx; `machine` is a known name or a calibration's
    file; `device`, "cpu" or "cuda", says whose graphs are reckoned with where that is not to be the machine's or where
    the model is, as in `explain`; `optimizer` is one of `OPTIMIZERS`; `variants` some of `VARIANTS` (default: those of
    `EXACT` that the model allows).
    `seq_lens` are numbers of tokens T: inputs [B, T', ...] of the call are taken as [B, T, ...]. Lengths between two
    whose graphs differ in nothing but sizes are not traced. Values that the model returns beside the loss are taken to
    be let go of before backward. A model of more than `DEEP` equal layers is traced at two depths, and a further layer
    costs what the last one did. With `"peft_fx.memory_budget"` among the options the variants of `WITHIN` are those of
    peft_fx within it, the others without. `progress` is called with a line of text for each trace to come: of some of
    the names in each of `by_preparation(variants)`, at some of the lengths.

    Raises ValueError for an unknown option, machine, device, optimiser or variant and for a variant asked for that the
    model does not allow, TypeError for what is no module, and RuntimeError where nothing of the call is trained.
    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"estimate() knows no optimizer {optimizer!r}; valid ones: {', '.join(OPTIMIZERS)}")
    unknown = [name for name in variants or () if name not in VARIANTS]
    if unknown:
        raise ValueError(f"estimate() knows no variant {unknown[0]!r}; valid ones: {', '.join(VARIANTS)}")
    plain, _ = unwrapped(model)
    if not isinstance(plain, nn.Module):
        raise TypeError("estimate() needs a module: what it trains are the module's parameters")
    kwargs = kwargs if args or kwargs else own_inputs(plain, "estimate")
    options = dict(options or {}) | ({f"{PREFIX}machine": machine} if machine else {})
    asked = parse(options)
    traced_on = device_traced(plain, args, kwargs)
    retarget = Retarget(traced_on, device_of(asked, device, traced_on))
    target = Target(machines.resolve(asked.machine, retarget.device), retarget, OPTIMIZERS[optimizer])
    budget = asked.budget(retarget.device)
    order = list(variants or (*EXACT, *WITHIN * (budget is not None)))
    rows: list[Row] = []
    left_out: dict[str, str] = {}
    lengths = sorted(set(seq_lens)) if seq_lens is not None else [_length(args, kwargs)]
    for prepare, names in by_preparation(order).items():
        named = {Way(n, price): options_of(VARIANTS[n], options) for n in names for price in VARIANTS[n].prices}
        try:
            tracer = Tracer(plain, prepare, (args, kwargs), named, target, progress)
            found = filled(lengths, named, tracer.at, tracer.between)
            rows += [tracer.row(way.name, T, traced) for (way, T), traced in found.items()]
        except LeftOut as reason:
            if variants is not None:
                raise LeftOut(f"{', '.join(names)}: {reason}") from reason
            left_out |= dict.fromkeys(names, str(reason))
    rows.sort(key=lambda r: (r.tokens, order.index(r.name)))
    plain, frontier = ([r for r in rows if (r.name in WITHIN) == within] for within in (False, True))
    return _held(Estimate(plain, target.machine.name, left_out, frontier), budget)


def _held(estimate: Estimate, asked: budgeting.Asked | None) -> Estimate:
    """Within the budget, where there is one, of the choices that a variant has; else the quickest of them."""
    if asked is None or not estimate.frontier:
        return estimate.within(math.inf)
    row = estimate.frontier[0]  # weights and states are the same in all
    beside = row.weight_bytes if asked.of == "step" or asked.beside_weights else 0
    return estimate.within(asked.bytes + beside + (row.optimizer_bytes if asked.of == "step" else 0))


def _tensors(*trees: Any) -> list[torch.Tensor]:
    return [x for x in pytree.tree_leaves(trees) if isinstance(x, torch.Tensor)]


def _length(args: Any, kwargs: Any) -> int:
    """Tokens of a sequence: the second size of the first input that has two."""
    return next((int(t.shape[1]) for t in _tensors(args, kwargs) if t.ndim > 1), 1)


def _at_length(x: torch.Tensor, length: int, wanted: int) -> torch.Tensor:
    if x.ndim < 2 or x.shape[1] != length or length == wanted:
        return x
    return x.new_zeros((x.shape[0], wanted, *x.shape[2:]))


def _stacks(model: nn.Module) -> list[nn.ModuleList]:
    """The outermost lists of equal layers, where all are of one length and that is deep; the first layer of a list may
    differ, as where it alone has position biases."""
    lists: list[nn.ModuleList] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and module not in inside and len(module) > 1:
            lists.append(module)
            inside.update(module.modules())
    equal = all(len({_signature(layer) for layer in list(found)[1:]}) == 1 for found in lists)
    return lists if equal and len({len(found) for found in lists}) == 1 and len(lists[0]) > DEEP else []


def _signature(layer: nn.Module) -> tuple[Any, ...]:
    return tuple((name, p.shape, p.dtype, p.requires_grad) for name, p in layer.named_parameters())


def _cut(model: nn.Module, depth: int) -> nn.Module:
    for layers in _stacks(model):
        deep = len(layers)
        del layers[depth:]
        for config in {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}.values():
            if getattr(config, "num_hidden_layers", None) == deep:
                config.num_hidden_layers = depth
    return model


def _bytes(tensor: torch.Tensor) -> int:
    return int(tensor.numel() * tensor.element_size())


def _prepared(model: Any, prepare: Callable[[nn.Module], nn.Module], ghosts: Ghosts) -> Any:
    """A copy on fake tensors, as a variant has it."""
    ghost = ghosts.of(model)
    with ghosts.fake_mode:
        return prepare(ghost)


Traced = list[list[Halves]]  # the graphs of a step, at each depth that is traced


class Tracer:
    """Traces the variants that share one prepared model, and reckons what their steps take."""

    def __init__(
        self,
        model: nn.Module,
        prepare: Callable[[nn.Module], nn.Module],
        call: tuple[Any, Any],
        named: Mapping[Way, Options | None],
        target: Target,
        progress: Callable[[str], None] | None,
    ):
        self.prepare, self.call, self.named, self.target = prepare, call, named, target
        self.progress = progress
        self.whole = _prepared(model, prepare, Ghosts(new_fake_mode(), "estimate"))
        self.layers = len(stacks[0]) if (stacks := _stacks(self.whole)) else 0
        again = any(way.price for way in named) or any(
            getattr(m, "gradient_checkpointing", False) for m in self.whole.modules()
        )
        depth = DEPTH + AGAIN * again
        self.depths = (depth, depth + 1) if self.layers else (0,)
        # of a deep model the layers that are traced, cut out once: a copy of all of them takes longer
        self.cut = {n: _cut(Ghosts(new_fake_mode(), "estimate").of(model), n) for n in self.depths if n} or {0: model}

    def at(self, T: int, ways: Sequence[Way]) -> dict[Way, Traced]:
        """The graphs of some variants at T tokens."""
        if self.progress is not None:
            self.progress(f"T = {T}: {', '.join(dict.fromkeys(way.name for way in ways))}")
        given = _length(*self.call)
        one = functools.cache(lambda x: _at_length(x, given, T))  # ids that are labels too stay one input
        inputs = pytree.tree_map(lambda x: one(x) if isinstance(x, torch.Tensor) else x, self.call)
        named = {way: self.named[way] for way in ways}
        depths = [_traced(self.cut[n], inputs, self.prepare, named, self.target) for n in self.depths]
        return {way: [found[way] for found in depths] for way in ways}

    def between(self, low: Traced, high: Traced, share: Fraction) -> Traced | None:
        """The graphs at a length so far between two; None where those differ in more than sizes."""
        found: Traced = []
        for ours, theirs in zip(low, high, strict=True):
            graphs = [a.between(b, share) for a, b in zip(ours, theirs, strict=False)]
            if len(ours) != len(theirs) or None in graphs:
                return None
            found.append([graph for graph in graphs if graph is not None])
        return found

    def row(self, name: str, T: int, traced: Traced) -> Row:
        steps = [step_of([halves.part for halves in graphs]) for graphs in traced]
        step = steps[0].extended(steps[1], self.layers - self.depths[0]) if self.layers else steps[0]
        shift = {id(m.shift) for m in self.whole.modules() if hasattr(m, "shift")}
        parameters = [p for p in self.whole.parameters() if id(p) not in shift]
        weights = sum(_bytes(t) for t in (*parameters, *self.whole.buffers()))
        trained = [_bytes(p) for p in parameters if p.requires_grad]
        gradients, largest = sum(trained), max(trained, default=0)
        updated = gradients + 2 * largest  # an update is computed a parameter at a time
        told = {ADAPTERS: VARIANTS[name].trains}
        components = {told.get(k, k): round(n) for k, n in step.components.items() if round(n)}
        kept = sum(components.values())
        transient = max(*map(round, step.peaks), updated) - gradients - kept
        machine, states = self.target.machine, self.target.states
        seconds = step.seconds + (machine.one_pass((3 + 2 * states) * gradients) if gradients else 0.0)
        return Row(name, T, weights, gradients, states * gradients, kept, transient, seconds, components)


def _traced(
    model: Any,
    inputs: tuple[Any, Any],
    prepare: Callable[[nn.Module], nn.Module],
    named: Mapping[Way, Options | None],
    target: Target,
) -> dict[Way, list[Halves]]:
    ghosts = Ghosts(new_fake_mode(), "estimate")
    ghost = _prepared(model, prepare, ghosts)
    names = {p: name for name, p in ghost.named_parameters()}
    args, kwargs = ghosts(inputs)
    given = {id(copied) for copied in ghosts.known.values()}
    parts: list[dict[Way, Halves]] = []

    def capture(gm: GraphModule, example_inputs: list[Any]) -> Any:
        split = Split(gm, roles_of(gm, example_inputs, names), named, target, _handed_on(example_inputs, given))
        patches = {
            "joint_custom_pre_pass": split.joint,
            "custom_partitioner_fn": split,
            **IDLE,
            **dict.fromkeys(PATTERNS, False),  # each variant has its own
        }
        with compat.functorch_config.patch(enable_autograd_cache=False):
            called = compat.compile_fx(gm, example_inputs, inner_compile=answer, config_patches=patches)
        parts.append(split.parts)
        return called

    told = telling_of_a_batch("estimate", ghost, args, kwargs)
    with told, compat.forgetting(), nothing_changed(), ghosts.fake_mode:
        # not dynamic: Dynamo remembers that a size has changed
        call_compiled(ghost, args, kwargs, capture, "estimate", dynamic=False)
    if not any(parts):
        raise RuntimeError("nothing of this call is trained: no graph of it has a backward")
    return {way: [p[way] for p in parts if way in p] for way in named}


def _handed_on(inputs: Iterable[Any], given: Set[int]) -> dict[int, Role]:
    """The inputs of a graph that an earlier one of the step has made, by their places; `given` are the ids of what was
    there before the step."""
    tensors = {i: x for i, x in enumerate(inputs) if isinstance(x, torch.Tensor) and id(x) not in given}
    return {i: Role("", False, False) for i, x in tensors.items() if x.requires_grad and not x.is_leaf}
